#define HEADRACE_ISA avx2
#include "probe_impl.h"
