#include "elementwise.h"

namespace headrace {

namespace portable { const RowKernels& row_table(); }
#if defined(__x86_64__)
namespace avx2 { const RowKernels& row_table(); }
namespace avx512 { const RowKernels& row_table(); }
#endif

const RowKernels& row_kernels(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::row_table();
    if (isa == Isa::avx2) return avx2::row_table();
#endif
    (void)isa;
    return portable::row_table();
}

}  // namespace headrace
