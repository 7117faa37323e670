#include "attention.h"

namespace headrace {

#define HEADRACE_DECLARE(isa)                            \
    namespace isa {                                      \
    const AttentionKernels& attention_table(KvType type); \
    size_t attention_scratch(int dim);                   \
    }
HEADRACE_DECLARE(portable)
#if defined(__x86_64__)
HEADRACE_DECLARE(avx2)
HEADRACE_DECLARE(avx512)
#endif

KvLayout::KvLayout(KvType type, int head_dim) : type(type), head_dim(head_dim), dim((head_dim + 15) / 16 * 16) {
    constexpr int element_bytes[] = {4, 2, 2, 1};
    plane_bytes = size_t(dim) * kTile * size_t(element_bytes[int(type)]);
    tile_bytes = 2 * plane_bytes + (type == KvType::i8 ? 2 * kTile * sizeof(float) : 0);
}

const AttentionKernels& attention_kernels(Isa isa, KvType type) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::attention_table(type);
    if (isa == Isa::avx2) return avx2::attention_table(type);
#endif
    (void)isa;
    return portable::attention_table(type);
}

size_t attention_scratch_bytes(Isa isa, int dim) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::attention_scratch(dim);
    if (isa == Isa::avx2) return avx2::attention_scratch(dim);
#endif
    (void)isa;
    return portable::attention_scratch(dim);
}

}  // namespace headrace
