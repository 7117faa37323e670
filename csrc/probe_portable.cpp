#define HEADRACE_ISA portable
#include "probe_impl.h"
