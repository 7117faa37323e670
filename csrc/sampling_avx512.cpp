#define HEADRACE_ISA avx512
#include "sampling_impl.h"
