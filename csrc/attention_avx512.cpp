#define HEADRACE_ISA avx512
#include "attention_impl.h"
