#define HEADRACE_ISA avx512
#include "elementwise_impl.h"
