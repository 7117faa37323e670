// Paged keys and values, and causal grouped-query attention over them.
//
// Keys are taken in blocks of kSplit positions that start at multiples of kSplit. For one query and one block:
//     s_t = (softcap(scale * q . k_t) + slope * (t - position)) / ln 2, sums over head_dim ascending    m = max s_t    p_t = 2^(s_t - m)
//     l = sum p_t in 16 lanes by t mod 16, ascending, then halving               o = sum p_t v_t, t ascending
// and blocks are merged in ascending order: m' = max(m, m_b), a = 2^(m - m'), b = 2^(m_b - m'), l = fma(l, a, l_b * b), o likewise.
// So a row has the same bits whichever chunk, page, batch or thread it is computed in. With float32 and float16 storage, products are
// of floats. With bfloat16, q and p are rounded to it. With int8, q is rounded to steps of max|q| / 16256 and p_t times v_t's scale to
// steps of its greatest value / 65535, and the products are sums of integers; no scale, and no such greatest value, is below 2^-100.
#pragma once

#include <cstddef>
#include <cstdint>

#include "isa.h"

namespace headrace {

constexpr int kSplit = 256;        // positions in a block of keys
constexpr int kTile = 16;          // tokens that lie together in a page
constexpr int kQueries = 24;      // query vectors (row, head) that one unit of work takes at most
constexpr int kMaxHeadDim = 512;

enum class KvType : uint8_t { f32, f16, bf16, i8 };

// A tile of 16 tokens: keys [head_dim / w][16][w], values [16 / w][head_dim][w] with w = 1 element (float32, float16), 2 (bfloat16) or 4 (int8)
// to a word; for int8 (keys: code + 128), then 16 float scales of keys and 16 of values.
struct KvLayout {
    KvType type;
    int head_dim;
    int dim;  // head_dim padded to 16; padding stays 0
    size_t plane_bytes, tile_bytes;

    KvLayout(KvType type, int head_dim);
};

// Attention of one layer, for one chunk.
struct AttentionCall {
    const KvLayout* layout;
    float scale;
    int window;     // 0: none
    float softcap;  // 0: none
    const float* slopes = nullptr;  // ALiBi: of each query vector; the score of a key at t gains slope * (t - position)
};

// A block of keys of one KV head.
struct KeyBlock {
    int start;                    // position of its first key
    int first, past;              // its tiles that hold keys which the queries see
    const uint8_t* const* tiles;  // [past - first]
    bool fetched;                 // into cache, as later ones of a block before
    const uint8_t* const* later;  // [later_count]: tiles that later blocks read, to be fetched into cache meanwhile
    int later_count;
};

// Floats of the running or partial result of `queries` query vectors: m, l, o [dim] of each.
inline size_t state_floats(int queries, int dim) { return size_t(queries) * size_t(2 + dim); }
size_t attention_scratch_bytes(Isa isa, int dim);

struct AttentionKernels {
    // Stores one token's key and value (float32 [head_dim]) at place `offset` of a tile.
    void (*store)(const KvLayout& layout, uint8_t* tile, int offset, const float* k, const float* v);
    // Query vectors as words in scratch, for `partial`.
    void (*prepare)(const AttentionCall& call, const float* const* q, int count, uint8_t* scratch);
    // (m, l, o) of `count` prepared query vectors at `positions` over a block of keys; m is -inf where a query sees none of it.
    void (*partial)(const AttentionCall& call, const int32_t* positions, int count, const KeyBlock& block, uint8_t* scratch, float* out);
    // state = merge(state, part); `first`: state = part.
    void (*merge)(float* state, const float* part, int count, int dim, bool first);
    // out[i] = o * (1 / l), head_dim floats.
    void (*finish)(const float* state, int count, int dim, int head_dim, float* const* out);
};
const AttentionKernels& attention_kernels(Isa isa, KvType type);

}  // namespace headrace
