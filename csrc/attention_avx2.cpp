#define HEADRACE_ISA avx2
#include "attention_impl.h"
