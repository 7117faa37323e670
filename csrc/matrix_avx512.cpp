#define HEADRACE_ISA avx512
#include "matrix_kernels.h"

namespace headrace::avx512 {
extern const Kernels table;
const Kernels table{Isa::avx512, quantise_row, quantise_groups, multiply, screen};
}  // namespace headrace::avx512
