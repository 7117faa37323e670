#define HEADRACE_ISA portable
#include "sampling_impl.h"
