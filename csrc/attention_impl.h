// Attention for one instruction set: included by attention_<isa>.cpp, which sets HEADRACE_ISA. See attention.h for the recipe.
#pragma once

#include "attention.h"
#include "simd.h"

namespace headrace::HEADRACE_ISA {
namespace {

// A register tile is kTileQueries query vectors x kTileVectors vectors of keys (or of value columns).
#if defined(__AVX512BF16__)
constexpr int kTileQueries = 6, kTileVectors = 4;
#else
constexpr int kTileQueries = 3, kTileVectors = 2;
#endif
constexpr int kTiles = kSplit / kTile;
constexpr int kScoreStride = kSplit + kTile * kTileVectors;  // a register tile may run over the end

// Storage types: Element is what lies in a page, Dot what products are made of, kWord how many elements share a 32-bit word.
struct F32Storage {
    using Element = float;
    using Dot = F32Dot;
    static constexpr int kWord = 1;
    static constexpr bool kExpanded = false, kScaled = false;
};
struct F16Storage {
    using Element = Half;
    using Dot = F32Dot;
    static constexpr int kWord = 1;
    static constexpr bool kExpanded = true, kScaled = false;
};
struct BF16Storage {
    using Element = BFloat;
    using Dot = BF16Dot;
    static constexpr int kWord = 2;
    static constexpr bool kExpanded = false, kScaled = false;
};
struct I8Storage {
    using Element = int8_t;
    using Dot = BF16Dot;
    static constexpr int kWord = 2;
    static constexpr bool kExpanded = true, kScaled = true;
};

// Scratch of a unit of work: words of the queries, scores, and one block of keys and values where storage must be expanded.
struct Scratch {
    uint32_t* q;
    float* scores;
    uint32_t *keys, *values;

    Scratch(uint8_t* memory, int dim) {
        q = (uint32_t*)memory;
        scores = (float*)(q + kQueries * dim);
        keys = (uint32_t*)(scores + kQueries * kScoreStride);
        values = keys + kSplit * dim;
    }
};

// ---- storing

inline int lanes_left(int dim, int d) { return dim - d < kLanes ? dim - d : kLanes; }

inline void to_elements(const float* x, int dim, float* out, float*) { std::memcpy(out, x, size_t(dim) * 4); }

template <class Element>
inline void to_elements(const float* x, int dim, Element* out, float*) {
    for (int d = 0; d < dim; d += kLanes) store(out + d, load_first(x + d, lanes_left(dim, d)));
}

inline void to_elements(const float* x, int dim, int8_t* out, float* scale) {
    Floats size = zero();
    for (int d = 0; d < dim; d += kLanes) size = max(size, absolute(load_first(x + d, lanes_left(dim, d))));
    *scale = greatest(size) / 127.0f;
    const Floats divisor = all(*scale > 0 ? *scale : 1.0f);
    for (int d = 0; d < dim; d += kLanes) {
        float codes[kLanes];
        store(codes, nearest(load_first(x + d, lanes_left(dim, d)) / divisor));
        for (int i = 0; i < kLanes; ++i) out[d + i] = int8_t(codes[i]);
    }
}

template <class S>
void store_token(const KvLayout& layout, uint8_t* tile, int offset, const float* k, const float* v) {
    using Element = typename S::Element;
    constexpr int W = S::kWord;
    Element key[kMaxHeadDim], value[kMaxHeadDim];
    float* scales = (float*)(tile + 2 * layout.plane_bytes);
    to_elements(k, layout.head_dim, key, scales + offset);
    to_elements(v, layout.head_dim, value, scales + kTile + offset);
    Element *keys = (Element*)tile, *values = (Element*)(tile + layout.plane_bytes) + offset / W * layout.dim * W + offset % W;
    for (int d = 0; d < layout.head_dim; ++d) {
        keys[(d / W * kTile + offset) * W + d % W] = key[d];
        values[d * W] = value[d];
    }
}

// ---- queries

inline void store_as(uint32_t* words, int i, Floats x, F32Dot) { store((float*)words + i, x); }
inline void store_as(uint32_t* words, int i, Floats x, BF16Dot) { store((BFloat*)words + i, x); }

// What turns q . k into the argument of 2^x, or of tanh where there is a softcap (e^2x is what tanh needs).
inline float score_factor(const AttentionCall& call) {
    return call.softcap > 0 ? call.scale * (2 * kLog2E / call.softcap) : call.scale * kLog2E;
}

template <class S>
void prepare(const AttentionCall& call, const float* const* q, int count, uint8_t* memory) {
    const KvLayout& layout = *call.layout;
    const int words = layout.dim / S::kWord;
    const Scratch scratch(memory, layout.dim);
    const Floats factor = all(score_factor(call));
    for (int i = 0; i < count; ++i)
        for (int d = 0; d < layout.dim; d += kLanes) {
            const int left = lanes_left(layout.head_dim, d);
            const Floats x = left == kLanes ? load(q[i] + d) : load_first(q[i] + d, left);
            store_as(scratch.q + i * words, d, x * factor, typename S::Dot());
        }
}

// ---- products

// scores[query][16 v + lane] = sum over d of q . key, for NV tiles of keys.
template <class Dot, int NQ, int NV>
inline void score_tile(const uint32_t* q, int words, const uint32_t* const* keys, float* scores) {
    Floats acc[NQ][NV];
    for (int i = 0; i < NQ; ++i)
        for (int v = 0; v < NV; ++v) acc[i][v] = zero();
    for (int w = 0; w < words; ++w) {
        Words key[NV];
        for (int v = 0; v < NV; ++v) key[v] = load_words(keys[v] + w * kTile);
        for (int i = 0; i < NQ; ++i) {
            const Words a = all_words(q[i * words + w]);
            for (int v = 0; v < NV; ++v) acc[i][v] = Dot::dot(acc[i][v], a, key[v]);
        }
    }
    for (int i = 0; i < NQ; ++i)
        for (int v = 0; v < NV; ++v) store(scores + i * kScoreStride + v * kTile, acc[i][v]);
}

// out[query][16 v + lane] = sum over `count` tokens of p . value, for NV vectors of value columns.
template <class Dot, int W, int NQ, int NV>
inline void value_tile(const uint32_t* p, const uint32_t* const* values, int column, int dim, int count, float* out) {
    Floats acc[NQ][NV];
    for (int i = 0; i < NQ; ++i)
        for (int v = 0; v < NV; ++v) acc[i][v] = zero();
    auto add = [&](const uint32_t* weights, const uint32_t* row, auto mask) {
        Words value[NV];
        for (int v = 0; v < NV; ++v) value[v] = mask(load_words(row + v * kLanes));
        for (int i = 0; i < NQ; ++i) {
            const Words a = all_words(weights[i * kScoreStride]);
            for (int v = 0; v < NV; ++v) acc[i][v] = Dot::dot(acc[i][v], a, value[v]);
        }
    };
    for (int t = 0; t < count; t += kTile) {
        const uint32_t* row = values[t / kTile] + column;
        const int whole = (count - t < kTile ? count - t : kTile) / W;
        for (int w = 0; w < whole; ++w) add(p + t / W + w, row + w * dim, [](Words x) { return x; });
        // The last token's partner in a word is not stored yet: what lies there may be anything, even a NaN.
        if (W == 2 && count - t < kTile && count % 2) add(p + t / W + whole, row + whole * dim, [](Words x) { return low_halves(x); });
    }
    for (int i = 0; i < NQ; ++i)
        for (int v = 0; v < NV; ++v) store(out + size_t(i) * dim + v * kLanes, acc[i][v]);
}

// Calls f with a constant number of queries for each register tile of `count` of them.
template <class F>
inline void query_tiles(int count, F f) {
    int i = 0;
    for (; i + kTileQueries <= count; i += kTileQueries) f(i, std::integral_constant<int, kTileQueries>());
    switch (count - i) {
        case 1: f(i, std::integral_constant<int, 1>()); break;
        case 2: f(i, std::integral_constant<int, 2>()); break;
#if defined(__AVX512BF16__)
        case 3: f(i, std::integral_constant<int, 3>()); break;
        case 4: f(i, std::integral_constant<int, 4>()); break;
        case 5: f(i, std::integral_constant<int, 5>()); break;
#endif
    }
}

// ---- one block of keys

// Words of a tile's keys and values, and their scales.
struct Tiles {
    const uint32_t *keys[kTiles], *values[kTiles];
    const float* scales[kTiles];
};

inline void expand(const Half* from, int n, uint32_t* to) {
    for (int i = 0; i < n; i += kLanes) store((float*)to + i, load(from + i));
}
inline void expand(const int8_t* from, int n, uint32_t* to) {
    for (int i = 0; i < n; i += kLanes) store((BFloat*)to + i, load(from + i));
}

// Finds (and expands) tiles first..past-1 of the block that starts at position `start`.
template <class S>
inline void find_tiles(const AttentionCall& call, int kv_head, int start, int first, int past, const Scratch& scratch, Tiles& tiles) {
    const KvLayout& layout = *call.layout;
    const int elements = layout.dim * kTile, words = elements / S::kWord;
    for (int t = first; t < past; ++t) {
        const int position = start + t * kTile, page = position / layout.page_size;
        const int64_t slot = int64_t(call.pages[page]) * layout.page_size + (position - page * layout.page_size);
        const uint8_t* tile = kv_tile(layout, call.cache, slot, kv_head);
        tiles.scales[t] = (const float*)(tile + 2 * layout.plane_bytes);
        if constexpr (S::kExpanded) {
            using Element = typename S::Element;
            expand((const Element*)tile, elements, scratch.keys + t * words);
            expand((const Element*)(tile + layout.plane_bytes), elements, scratch.values + t * words);
            tiles.keys[t] = scratch.keys + t * words;
            tiles.values[t] = scratch.values + t * words;
        } else {
            tiles.keys[t] = (const uint32_t*)tile;
            tiles.values[t] = (const uint32_t*)(tile + layout.plane_bytes);
        }
    }
}

// The keys that a query sees in a block, counted from its start.
struct Seen {
    int first, past;
};

// Scores of one query become weights p, in place, as words; gives m and l.
template <class S>
inline void soften(const AttentionCall& call, float* row, Seen seen, int first_tile, int past_tile, const Tiles& tiles, float* m, float* l) {
    const Floats none = all(-INFINITY);
    Floats best = none;
    for (int t = first_tile; t < past_tile; ++t) {
        const int from = seen.first - t * kTile, to = seen.past - t * kTile;
        const bool whole = from <= 0 && to >= kTile;
        Floats s = load(row + t * kTile);
        if (S::kScaled || call.softcap > 0 || !whole) {
            if constexpr (S::kScaled) s = s * load(tiles.scales[t]);
            if (call.softcap > 0) {  // tanh(x) = 1 - 2 / (1 + e^2x)
                const Floats tanh = all(1.0f) - all(2.0f) / (all(1.0f) + exp2(min(all(64.0f), s)));
                s = tanh * all(call.softcap * kLog2E);
            }
            if (!whole) s = keep(s, from < 0 ? 0 : from > kTile ? kTile : from, to < 0 ? 0 : to > kTile ? kTile : to, none);
            store(row + t * kTile, s);
        }
        best = max(best, s);
    }
    *m = greatest(best);
    const Floats top = all(seen.past > seen.first ? *m : 0.0f);
    Floats total = zero();
    for (int t = first_tile; t < past_tile; ++t) {
        Floats p = exp2(load(row + t * kTile) - top);
        total = total + p;
        if constexpr (S::kScaled) {
            const int to = seen.past - t * kTile;  // scales past the last token may be anything
            const Floats scales = load(tiles.scales[t] + kTile);
            p = p * (to < kTile ? keep(scales, 0, to < 0 ? 0 : to, zero()) : scales);
        }
        store_as((uint32_t*)row, t * kTile, p, typename S::Dot());
    }
    *l = sum(total);
}

template <class S>
void partial(const AttentionCall& call, const int32_t* positions, int count, int kv_head, int block, uint8_t* memory, float* out) {
    using Dot = typename S::Dot;
    constexpr int W = S::kWord;
    const KvLayout& layout = *call.layout;
    const int dim = layout.dim, start = block * kSplit;
    Seen seen[kQueries];
    int low = kSplit, high = 0;
    for (int i = 0; i < count; ++i) {
        const int past = positions[i] + 1 - start, first = call.window > 0 ? past - call.window : 0;
        seen[i] = {first < 0 ? 0 : first, past > kSplit ? kSplit : past};
        if (seen[i].past <= seen[i].first) {
            seen[i] = {0, 0};
            continue;
        }
        low = seen[i].first < low ? seen[i].first : low;
        high = seen[i].past > high ? seen[i].past : high;
    }
    float *m = out, *l = out + count, *o = out + 2 * count;
    if (high == 0) {
        for (int i = 0; i < count; ++i) m[i] = -INFINITY;
        return;
    }
    const Scratch scratch(memory, dim);
    const int first = low / kTile, past = (high + kTile - 1) / kTile;
    Tiles tiles;
    find_tiles<S>(call, kv_head, start, first, past, scratch, tiles);

    // Few queries make little of what they read: memory should be busy all the time.
    auto fetch = [&](const uint32_t* const* of, int t) {
        if (S::kExpanded || count > kTileQueries || t >= past) return;
        for (size_t byte = 0; byte < layout.plane_bytes; byte += 64) prefetch((const uint8_t*)of[t] + byte);
    };
    for (int t = first; t < past && t < first + kTileVectors; ++t) fetch(tiles.keys, t);
    for (int t = first; t < past;) {
        for (int v = 0; v < kTileVectors; ++v) fetch(tiles.keys, t + kTileVectors + v), fetch(tiles.values, t + v);
        if (past - t == 1) {
            query_tiles(count, [&](int i, auto n) {
                score_tile<Dot, n, 1>(scratch.q + i * (dim / W), dim / W, tiles.keys + t, scratch.scores + i * kScoreStride + t * kTile);
            });
            break;
        }
        const uint32_t* keys[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) keys[v] = tiles.keys[t + v < past ? t + v : past - 1];
        query_tiles(count, [&](int i, auto n) {
            score_tile<Dot, n, kTileVectors>(scratch.q + i * (dim / W), dim / W, keys, scratch.scores + i * kScoreStride + t * kTile);
        });
        t += kTileVectors;
    }

    for (int i = 0; i < count; ++i) soften<S>(call, scratch.scores + i * kScoreStride, seen[i], first, past, tiles, m + i, l + i);

    const int tokens = high - first * kTile;
    int column = 0;
    auto values = [&](auto vectors) {
        query_tiles(count, [&](int i, auto n) {
            const uint32_t* p = (const uint32_t*)(scratch.scores + i * kScoreStride) + first * kTile / W;
            value_tile<Dot, W, n, vectors>(p, tiles.values + first, column, dim, tokens, o + size_t(i) * dim + column);
        });
        column += vectors * kLanes;
    };
    while (column + kTileVectors * kLanes <= dim) values(std::integral_constant<int, kTileVectors>());
    while (column < dim) values(std::integral_constant<int, 1>());
}

// ---- merging

void merge(float* state, const float* part, int count, int dim, bool first) {
    if (first) {
        std::memcpy(state, part, state_floats(count, dim) * 4);
        return;
    }
    for (int i = 0; i < count; ++i) {
        if (part[i] == -INFINITY) continue;
        float* o = state + 2 * count + size_t(i) * dim;
        const float* more = part + 2 * count + size_t(i) * dim;
        const float m = state[i] > part[i] ? state[i] : part[i];
        const Floats a = exp2(all(state[i] - m)), b = exp2(all(part[i] - m));
        if (state[i] == -INFINITY) {
            std::memcpy(o, more, size_t(dim) * 4);
            state[count + i] = part[count + i];
        } else {
            float lanes[kLanes];
            store(lanes, fma(all(state[count + i]), a, all(part[count + i]) * b));
            state[count + i] = lanes[0];
            for (int d = 0; d < dim; d += kLanes) store(o + d, fma(load(o + d), a, load(more + d) * b));
        }
        state[i] = m;
    }
}

void finish(const float* state, int count, int dim, int head_dim, float* const* out) {
    for (int i = 0; i < count; ++i) {
        const Floats l = all(state[count + i]);
        const float* o = state + 2 * count + size_t(i) * dim;
        for (int d = 0; d < head_dim; d += kLanes) store_first(out[i] + d, load(o + d) / l, lanes_left(head_dim, d));
    }
}

template <class S>
constexpr AttentionKernels table() {
    return {store_token<S>, prepare<S>, partial<S>, merge, finish};
}

}  // namespace

const AttentionKernels& attention_table(KvType type) {
    static constexpr AttentionKernels tables[] = {table<F32Storage>(), table<F16Storage>(), table<BF16Storage>(), table<I8Storage>()};
    return tables[int(type)];
}

size_t attention_scratch(int dim) { return (size_t(kQueries) * (dim + kScoreStride) + 2 * size_t(kSplit) * dim) * 4; }

}  // namespace headrace::HEADRACE_ISA
