#define HEADRACE_ISA portable
#include "matrix_kernels.h"

namespace headrace::portable {
extern const Kernels table;
const Kernels table{Isa::portable, quantise_row, quantise_groups, multiply, screen};
}  // namespace headrace::portable
