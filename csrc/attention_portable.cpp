#define HEADRACE_ISA portable
#include "attention_impl.h"
