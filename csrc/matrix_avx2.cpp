#define HEADRACE_ISA avx2
#include "matrix_kernels.h"

namespace headrace::avx2 {
extern const Kernels table;
const Kernels table{Isa::avx2, quantise_row, quantise_groups, multiply, screen};
}  // namespace headrace::avx2
