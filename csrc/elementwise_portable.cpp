#define HEADRACE_ISA portable
#include "elementwise_impl.h"
