#define HEADRACE_ISA avx512
#include "probe_impl.h"
