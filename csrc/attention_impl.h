// Attention for one instruction set: included by attention_<isa>.cpp, which sets HEADRACE_ISA. See attention.h for the recipe.
#pragma once

#include <algorithm>
#include <climits>

#include "attention.h"
#include "simd.h"

#define HEADRACE_UNROLL _Pragma("GCC unroll 8")
// A function of its own, so that what it works on and nothing else takes the registers.
#define HEADRACE_APART __attribute__((noinline))

namespace headrace::HEADRACE_ISA {
namespace {

// A register tile is kTileQueries query vectors x kTileVectors vectors of keys (or of value columns); products of bytes, which
// keep two sums, have kByteQueries.
#if defined(__AVX512BF16__)
constexpr int kTileQueries = 6, kTileVectors = 4, kByteQueries = 3;
#else
constexpr int kTileQueries = 3, kTileVectors = 2, kByteQueries = 1;
#endif
constexpr int kPassQueries = 3;  // whose scores a pass goes through at once
constexpr int kTiles = kSplit / kTile;
constexpr int kScoreStride = kSplit + kTile * kTileVectors;  // a register tile may run over the end

// Storage types: Element is what lies in a page, Dot what products are made of, kWord how many elements share a 32-bit word.
struct F32Storage {
    using Element = float;
    using Dot = F32Dot;
    static constexpr int kWord = 1, kTile = kTileQueries;
    static constexpr bool kExpanded = false, kBytes = false;
};
struct F16Storage {
    using Element = Half;
    using Dot = F32Dot;
    static constexpr int kWord = 1, kTile = kTileQueries;
    static constexpr bool kExpanded = true, kBytes = false;
};
struct BF16Storage {
    using Element = BFloat;
    using Dot = BF16Dot;
    static constexpr int kWord = 2, kTile = kTileQueries;
    static constexpr bool kExpanded = false, kBytes = false;
};
struct I8Storage {
    using Element = uint8_t;
    static constexpr int kWord = 4, kTile = kByteQueries;
    static constexpr bool kExpanded = false, kBytes = true;
};

// A query as bytes: its float is scale * (128 high + low). bias = -128 * sum of (128 high + low), for keys are stored as code + 128.
struct ByteQuery {
    float scale;
    int32_t bias;
};

// Scratch of a unit of work.
struct Scratch {
    uint32_t* q;              // words of each query [dim]; as bytes, high and low words [dim / 4] each
    ByteQuery* byte_queries;  // [queries]
    float* scores;            // [queries][kScoreStride], then weights as words
    uint8_t* bytes;           // weights as bytes: [queries][high, low][kSplit]
    uint32_t *keys, *values;  // one block, where storage is expanded

    Scratch(uint8_t* memory, int dim) {
        q = (uint32_t*)memory;
        byte_queries = (ByteQuery*)(q + kQueries * dim);
        scores = (float*)(byte_queries + kQueries);
        bytes = (uint8_t*)(scores + kQueries * kScoreStride);
        keys = (uint32_t*)(bytes + kQueries * 2 * kSplit);
        values = keys + kSplit * dim;
    }
    static size_t size(int dim) { return size_t(kQueries) * (size_t(dim + kScoreStride) * 4 + sizeof(ByteQuery) + 2 * kSplit) + 2 * size_t(kSplit) * size_t(dim) * 4; }
};

// ---- storing

constexpr float kLeastScale = 0x1p-100f;  // so that its inverse is a float; what is far below it becomes 0

inline int lanes_left(int dim, int d) { return dim - d < kLanes ? dim - d : kLanes; }

inline void to_elements(const float* x, int dim, float* out, float*, int) { std::memcpy(out, x, size_t(dim) * 4); }

template <class Element>
inline void to_elements(const float* x, int dim, Element* out, float*, int) {
    for (int d = 0; d < dim; d += kLanes) store(out + d, load_first(x + d, lanes_left(dim, d)));
}

inline void to_elements(const float* x, int dim, uint8_t* out, float* scale, int offset) {
    Floats size = zero();
    for (int d = 0; d < dim; d += kLanes) size = max(size, absolute(load_first(x + d, lanes_left(dim, d))));
    *scale = std::max(greatest(size) / 127.0f, kLeastScale);
    const Floats inverse = all(1.0f / *scale);
    for (int d = 0; d < dim; d += kLanes) {
        const Floats codes = max(nearest(load_first(x + d, lanes_left(dim, d)) * inverse), all(-127.0f));  // a NaN becomes -127
        store_bytes(out + d, to_ints(codes + all(float(offset))));
    }
}

template <class S>
void store_token(const KvLayout& layout, uint8_t* tile, int offset, const float* k, const float* v) {
    using Element = typename S::Element;
    constexpr int W = S::kWord;
    Element key[kMaxHeadDim], value[kMaxHeadDim];
    float* scales = (float*)(tile + 2 * layout.plane_bytes);
    to_elements(k, layout.head_dim, key, scales + offset, 128);
    to_elements(v, layout.head_dim, value, scales + kTile + offset, 0);
    Element *keys = (Element*)tile, *values = (Element*)(tile + layout.plane_bytes) + offset / W * layout.dim * W + offset % W;
    int d = 0;
    for (; d + W <= layout.head_dim; d += W) std::memcpy(keys + d * kTile + offset * W, key + d, sizeof(Element) * W);
    for (; d < layout.head_dim; ++d) keys[(d / W * kTile + offset) * W + d % W] = key[d];
    HEADRACE_UNROLL for (d = 0; d < layout.head_dim; ++d) values[d * W] = value[d];
}

// ---- queries

inline void store_as(uint32_t* words, int i, Floats x, F32Dot) { store((float*)words + i, x); }
inline void store_as(uint32_t* words, int i, Floats x, BF16Dot) { store((BFloat*)words + i, x); }

// What turns q . k into the argument of 2^x, or of tanh where there is a softcap (e^2x is what tanh needs).
inline float score_factor(const AttentionCall& call) {
    return call.softcap > 0 ? call.scale * (2 * kLog2E / call.softcap) : call.scale * kLog2E;
}

inline void to_bytes(const float* q, int dim, uint32_t* words, ByteQuery& query) {
    constexpr float steps = 127 * 128;
    Floats size = zero();
    for (int d = 0; d < dim; d += kLanes) size = max(size, absolute(load(q + d)));
    query.scale = std::max(greatest(size) / steps, kLeastScale);
    const Floats inverse = all(1.0f / query.scale);
    uint8_t *high = (uint8_t*)words, *low = high + dim;
    Floats total = zero();  // of whole numbers below 2^24
    for (int d = 0; d < dim; d += kLanes) {
        const Floats code = max(nearest(load(q + d) * inverse), all(-steps)), upper = nearest(code * all(1.0f / 128));
        store_bytes(high + d, to_ints(upper));
        store_bytes(low + d, to_ints(code - upper * all(128.0f)));
        total = total + code;
    }
    query.bias = -128 * int32_t(sum(total));
}

template <class S>
void prepare(const AttentionCall& call, const float* const* q, int count, uint8_t* memory) {
    const KvLayout& layout = *call.layout;
    const Scratch scratch(memory, layout.dim);
    const Floats factor = all(score_factor(call));
    for (int i = 0; i < count; ++i) {
        uint32_t* words = scratch.q + i * layout.dim;
        float scaled[kMaxHeadDim];
        for (int d = 0; d < layout.dim; d += kLanes) {
            const int left = lanes_left(layout.head_dim, d);
            const Floats x = (left == kLanes ? load(q[i] + d) : load_first(q[i] + d, left)) * factor;
            if constexpr (S::kBytes)
                store(scaled + d, x);
            else
                store_as(words, d, x, typename S::Dot());
        }
        if constexpr (S::kBytes) to_bytes(scaled, layout.dim, words, scratch.byte_queries[i]);
    }
}

// ---- reading ahead

// Fetches what later blocks read, evenly over this one's work: memory is busy while the core computes, and a core drops what it is asked for
// faster than memory gives. The last tile comes first: where a unit ends with it, that unit begins with writing a key to it, and a store to what
// is on its way holds up those after it.
class Fetcher {
  public:
    // `calls`: how often some() will be called, about.
    Fetcher(const KeyBlock& block, int tile_bytes, int calls) : next_(block.later), end_(block.later + block.later_count), all_(tile_bytes) {
        step_ = int(int64_t(block.later_count) * tile_bytes / calls) + (block.later_count > 0);
        if (next_ != end_) tile_ = *--end_, bytes_ = all_;
    }

    void some() {
        due_ += step_;
        int at = at_;
        for (; at < due_ && at < bytes_; at += 64) prefetch(tile_ + at);
        at_ = at;
        if (at >= bytes_) due_ -= bytes_, next_tile();
    }

    // What is left.
    void rest() {
        for (; bytes_ < INT_MAX; next_tile())
            for (; at_ < bytes_; at_ += 64) prefetch(tile_ + at_);
    }

  private:
    void next_tile() {
        at_ = 0;
        if (next_ == end_)
            due_ = step_ = 0, bytes_ = INT_MAX;
        else
            tile_ = *next_++, bytes_ = all_;
    }

    const uint8_t *const *next_, *const *end_;
    int all_;
    const uint8_t* tile_ = nullptr;
    // Of the tile's bytes: what is asked for next, what should have been by now, what a call adds (not only whole lines), all. Those of no tile
    // never end.
    int at_ = 0, due_ = 0, step_ = 0, bytes_ = INT_MAX;
};

// ---- products

// scores[query][16 v + lane] = sum over d of q . key, for NV tiles of keys.
template <class Dot, int NQ, int NV>
HEADRACE_APART void score_tile(const uint32_t* q, int stride, int words, const uint32_t* const* keys, float* scores, Fetcher& shared_fetcher) {
    Fetcher fetcher = shared_fetcher;  // in registers
    Floats acc[NQ][NV];
    HEADRACE_UNROLL for (int i = 0; i < NQ; ++i)
        HEADRACE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = zero();
    for (int w = 0; w < words; ++w) {
        if (NQ < kTileQueries) fetcher.some();  // a full tile of queries keeps the core busy by itself
        Words key[NV];
        HEADRACE_UNROLL for (int v = 0; v < NV; ++v) key[v] = load_words(keys[v] + w * kTile);
        HEADRACE_UNROLL for (int i = 0; i < NQ; ++i) {
            const Words a = all_words(q[i * stride + w]);
            HEADRACE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = Dot::dot(acc[i][v], a, key[v]);
        }
    }
    HEADRACE_UNROLL for (int i = 0; i < NQ; ++i)
        HEADRACE_UNROLL for (int v = 0; v < NV; ++v) store(scores + i * kScoreStride + v * kTile, acc[i][v]);
    shared_fetcher = fetcher;
}

// out[query][16 v + lane] = sum over `count` tokens of p . value, for NV vectors of value columns.
template <class Dot, int W, int NQ, int NV>
HEADRACE_APART void value_tile(const uint32_t* p, const uint32_t* const* values, int column, int dim, int count, float* out, Fetcher& shared_fetcher) {
    Fetcher fetcher = shared_fetcher;  // in registers
    Floats acc[NQ][NV];
    HEADRACE_UNROLL for (int i = 0; i < NQ; ++i)
        HEADRACE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = zero();
    auto add = [&](const uint32_t* weights, const uint32_t* row, auto mask) {
        Words value[NV];
        HEADRACE_UNROLL for (int v = 0; v < NV; ++v) value[v] = mask(load_words(row + v * kLanes));
        HEADRACE_UNROLL for (int i = 0; i < NQ; ++i) {
            const Words a = all_words(weights[i * kScoreStride]);
            HEADRACE_UNROLL for (int v = 0; v < NV; ++v) acc[i][v] = Dot::dot(acc[i][v], a, value[v]);
        }
    };
    for (int t = 0; t < count; t += kTile) {
        const uint32_t* row = values[t / kTile] + column;
        const int whole = (count - t < kTile ? count - t : kTile) / W;
        for (int w = 0; w < whole; ++w) {
            if (NQ < kTileQueries) fetcher.some();
            add(p + t / W + w, row + w * dim, [](Words x) { return x; });
        }
        // The last token's partner in a word is not stored yet: what lies there may be anything, even a NaN.
        if (W == 2 && count - t < kTile && count % 2) add(p + t / W + whole, row + whole * dim, [](Words x) { return low_halves(x); });
    }
    HEADRACE_UNROLL for (int i = 0; i < NQ; ++i)
        HEADRACE_UNROLL for (int v = 0; v < NV; ++v) store(out + size_t(i) * dim + v * kLanes, acc[i][v]);
    shared_fetcher = fetcher;
}

// The same of bytes: exact sums of integers.
template <int NQ, int NV>
HEADRACE_APART void score_tile_bytes(const uint32_t* q, int stride, int words, const ByteQuery* queries, const uint32_t* const* keys, float* scores,
                             Fetcher& shared_fetcher) {
    Fetcher fetcher = shared_fetcher;  // in registers
    Words high[NQ][NV], low[NQ][NV];
    HEADRACE_UNROLL for (int i = 0; i < NQ; ++i)
        HEADRACE_UNROLL for (int v = 0; v < NV; ++v) high[i][v] = all_words(0), low[i][v] = all_words(uint32_t(queries[i].bias));
    for (int w = 0; w < words; ++w) {
        fetcher.some();
        Words key[NV];
        HEADRACE_UNROLL for (int v = 0; v < NV; ++v) key[v] = load_words(keys[v] + w * kTile);
        HEADRACE_UNROLL for (int i = 0; i < NQ; ++i) {
            const Words upper = all_words(q[i * stride + w]), lower = all_words(q[i * stride + words + w]);
            HEADRACE_UNROLL for (int v = 0; v < NV; ++v) {
                high[i][v] = dot_bytes(high[i][v], key[v], upper);
                low[i][v] = dot_bytes(low[i][v], key[v], lower);
            }
        }
    }
    HEADRACE_UNROLL for (int i = 0; i < NQ; ++i)
        HEADRACE_UNROLL for (int v = 0; v < NV; ++v)
            store(scores + i * kScoreStride + v * kTile, to_floats(shift_left<7>(high[i][v]) + low[i][v]) * all(queries[i].scale));
    shared_fetcher = fetcher;
}

// out = factor * sum of (256 high + low) * value.
template <int NQ, int NV>
HEADRACE_APART void value_tile_bytes(const uint8_t* p, const float* factors, const uint32_t* const* values, int column, int dim, int tiles, float* out,
                             Fetcher& shared_fetcher) {
    Fetcher fetcher = shared_fetcher;  // in registers
    Words high[NQ][NV], low[NQ][NV];
    HEADRACE_UNROLL for (int i = 0; i < NQ; ++i)
        HEADRACE_UNROLL for (int v = 0; v < NV; ++v) high[i][v] = low[i][v] = all_words(0);
    const uint32_t* row = nullptr;
    for (int w = 0; w < tiles * (kTile / 4); ++w, row += dim) {  // one loop: of two nested ones GCC stores the sums again and again
        if (w % (kTile / 4) == 0) row = values[w / (kTile / 4)] + column;
        fetcher.some();
        Words value[NV];
        HEADRACE_UNROLL for (int v = 0; v < NV; ++v) value[v] = load_words(row + v * kLanes);
        HEADRACE_UNROLL for (int i = 0; i < NQ; ++i) {
            const uint32_t* weights = (const uint32_t*)(p + i * 2 * kSplit) + w;
            const Words upper = all_words(weights[0]), lower = all_words(weights[kSplit / 4]);
            HEADRACE_UNROLL for (int v = 0; v < NV; ++v) {
                high[i][v] = dot_bytes(high[i][v], upper, value[v]);
                low[i][v] = dot_bytes(low[i][v], lower, value[v]);
            }
        }
    }
    HEADRACE_UNROLL for (int i = 0; i < NQ; ++i)
        HEADRACE_UNROLL for (int v = 0; v < NV; ++v) store(out + size_t(i) * dim + v * kLanes, to_floats(shift_left<8>(high[i][v]) + low[i][v]) * all(factors[i]));
    shared_fetcher = fetcher;
}

// Calls f with a constant number of queries for each register tile of `count` of them; a tile has at most Most.
template <int Most, class F>
inline void query_tiles(int count, F f) {
    int i = 0;
    for (; i + Most <= count; i += Most) f(i, std::integral_constant<int, Most>());
    if constexpr (Most > 1)
        if (i < count) query_tiles<Most - 1>(count - i, [&](int first, auto n) { f(i + first, n); });
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

// The parts (expanded) of a block's tiles.
template <class S>
inline void open_tiles(const KvLayout& layout, const KeyBlock& block, const Scratch& scratch, Tiles& tiles) {
    const int elements = layout.dim * kTile, words = elements / S::kWord;
    for (int t = block.first; t < block.past; ++t) {
        const uint8_t* tile = block.tiles[t - block.first];
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

constexpr float kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// Calls f(tile, whole) for tiles first..past-1; `whole`, which the compiler knows: all N queries see all of its keys.
template <int N, class F>
inline void each_tile(const Seen* seen, int first, int past, F f) {
    int from = first, to = past;
    HEADRACE_UNROLL for (int i = 0; i < N; ++i) from = std::max(from, (seen[i].first + kTile - 1) / kTile), to = std::min(to, seen[i].past / kTile);
    int t = first;
    for (; t < past && t < from; ++t) f(t, std::false_type());
    for (; t < to; ++t) f(t, std::true_type());
    for (; t < past; ++t) f(t, std::false_type());
}

// x in the lanes of tile t that the query sees, `other` in the rest.
inline Floats keep(Floats x, Seen seen, int t, Floats other) {
    return keep(x, std::clamp(seen.first - t * kTile, 0, kTile), std::clamp(seen.past - t * kTile, 0, kTile), other);
}

// The scores of N queries in tiles first..past-1, [N][kScoreStride], become in place arguments of 2^x, -inf where a query does not look; m: the
// greatest of each. `distances`: from each query to the block's start.
template <class S, int N>
inline void finish_scores(const AttentionCall& call, float* scores, const Seen* seen, const int* distances, const float* slopes, int first, int past,
                          const Tiles& tiles, float* m, Fetcher& fetcher) {
    const Floats none = all(-INFINITY);
    const bool capped = call.softcap > 0;
    Floats best[N];
    HEADRACE_UNROLL for (int i = 0; i < N; ++i) best[i] = none;
    each_tile<N>(seen, first, past, [&](int t, auto whole) {
        fetcher.some();
        HEADRACE_UNROLL for (int i = 0; i < N; ++i) {
            float* const at = scores + i * kScoreStride + t * kTile;
            Floats s = load(at);
            if constexpr (S::kBytes) s = s * load(tiles.scales[t]);
            if (capped) {  // tanh(x) = 1 - 2 / (1 + e^2x)
                const Floats tanh = all(1.0f) - all(2.0f) / (all(1.0f) + exp2(min(all(64.0f), s)));
                s = tanh * all(call.softcap * kLog2E);
            }
            if (slopes) s = fma(all(slopes[i] * kLog2E), load(kLaneNumbers) + all(float(distances[i] + t * kTile)), s);
            if constexpr (!whole) s = keep(s, seen[i], t, none);
            store(at, s);
            best[i] = max(s, best[i]);  // which keeps no NaN, whatever comes after it
        }
    });
    HEADRACE_UNROLL for (int i = 0; i < N; ++i) m[i] = greatest(best[i]);
}

// Finished scores become weights p in place, 0 where a query does not look; l: the sum of each. As bytes they take their values' scales too, and
// `most` becomes the greatest of each.
template <class S, int N>
inline void weigh(float* scores, const Seen* seen, const float* m, int first, int past, const Tiles& tiles, float* l, float* most, Fetcher& fetcher) {
    Floats top[N], total[N], greatest_weight[N];
    HEADRACE_UNROLL for (int i = 0; i < N; ++i) top[i] = all(m[i] > -INFINITY ? m[i] : 0.0f), total[i] = greatest_weight[i] = zero();
    each_tile<N>(seen, first, past, [&](int t, auto whole) {
        fetcher.some();
        HEADRACE_UNROLL for (int i = 0; i < N; ++i) {
            float* const row = scores + i * kScoreStride;
            const Floats p = exp2(load(row + t * kTile) - top[i]);
            total[i] = total[i] + p;
            if constexpr (S::kBytes) {
                Floats weight = p * load(tiles.scales[t] + kTile);
                if constexpr (!whole) weight = keep(weight, seen[i], t, zero());  // the scale of what is not there may be a NaN
                store(row + t * kTile, weight);
                greatest_weight[i] = max(weight, greatest_weight[i]);
            } else {
                store_as((uint32_t*)row, t * kTile, p, typename S::Dot());
            }
        }
    });
    HEADRACE_UNROLL for (int i = 0; i < N; ++i) l[i] = sum(total[i]);
    if constexpr (S::kBytes)
        HEADRACE_UNROLL for (int i = 0; i < N; ++i) most[i] = greatest(greatest_weight[i]);
}

// Weights as 16-bit fractions of the greatest one of each query, `most`, which becomes its step: [N][high, low][kSplit] bytes.
template <int N>
inline void fractions(const float* scores, int first, int past, float* most, uint8_t* bytes, Fetcher& fetcher) {
    constexpr float steps = 65535;
    Floats factor[N];
    HEADRACE_UNROLL for (int i = 0; i < N; ++i) {
        most[i] = std::max(most[i], kLeastScale);  // 0 where a query sees nothing
        factor[i] = all(steps / most[i]), most[i] = most[i] / steps;
    }
    for (int t = first; t < past; ++t) {
        fetcher.some();
        HEADRACE_UNROLL for (int i = 0; i < N; ++i) {
            uint8_t* const high = bytes + i * 2 * kSplit + t * kTile;
            store_bytes(high + kSplit, high, to_ints(min(load(scores + i * kScoreStride + t * kTile) * factor[i], all(steps))));
        }
    }
}

template <class S>
void partial(const AttentionCall& call, const int32_t* positions, int count, const KeyBlock& block, uint8_t* memory, float* out) {
    constexpr int W = S::kWord;
    const KvLayout& layout = *call.layout;
    const int dim = layout.dim, first = block.first, past = block.past;
    Seen seen[kQueries];
    int distances[kQueries], high = 0;
    for (int i = 0; i < count; ++i) {
        distances[i] = block.start - positions[i];
        const int end = positions[i] + 1 - block.start, begin = call.window > 0 ? end - call.window : 0;
        seen[i] = {begin < 0 ? 0 : begin, end > kSplit ? kSplit : end};
        if (seen[i].past <= seen[i].first) seen[i] = {0, 0};
        high = seen[i].past > high ? seen[i].past : high;
    }
    float *m = out, *l = out + count, *o = out + 2 * count;
    const Scratch scratch(memory, dim);
    Tiles tiles;
    open_tiles<S>(layout, block, scratch, tiles);

    // Calls for a tile of keys: from register tiles of queries (of bytes all, of others those that are not full), for its words and as many of
    // values, kTileVectors at once; then from the passes over scores.
    const int calling = S::kBytes ? (count + S::kTile - 1) / S::kTile : count % S::kTile > 0;
    const int passes = (S::kBytes ? 3 : 2) * ((count + kPassQueries - 1) / kPassQueries);
    Fetcher fetcher(block, int(layout.tile_bytes), (past - first) * (calling * 2 * dim / (W * kTileVectors) + passes));
    // Few queries make little of what they read: memory should be busy all the time.
    auto fetch = [&](const uint32_t* const* of, int t) {
        if (block.fetched || S::kExpanded || count > S::kTile || t >= past) return;
        for (size_t byte = 0; byte < layout.plane_bytes; byte += 64) prefetch((const uint8_t*)of[t] + byte);
    };
    for (int t = first; t < past && t < first + kTileVectors; ++t) fetch(tiles.keys, t);
    for (int t = first; t < past;) {
        for (int v = 0; v < kTileVectors; ++v) fetch(tiles.keys, t + kTileVectors + v), fetch(tiles.values, t + v);
        const int vectors = past - t == 1 ? 1 : kTileVectors;
        const uint32_t* keys[kTileVectors];
        for (int v = 0; v < kTileVectors; ++v) keys[v] = tiles.keys[t + v < past ? t + v : past - 1];
        auto products = [&](auto n_vectors) {
            query_tiles<S::kTile>(count, [&](int i, auto n) {
                const uint32_t* q = scratch.q + i * dim;
                float* scores = scratch.scores + i * kScoreStride + t * kTile;
                if constexpr (S::kBytes)
                    score_tile_bytes<n, n_vectors>(q, dim, dim / W, scratch.byte_queries + i, keys, scores, fetcher);
                else
                    score_tile<typename S::Dot, n, n_vectors>(q, dim, dim / W, keys, scores, fetcher);
            });
        };
        if (vectors == 1)
            products(std::integral_constant<int, 1>());
        else
            products(std::integral_constant<int, kTileVectors>());
        t += vectors;
    }

    // Pass by pass over all queries: the last sums of some are then added up while the next ones' are computed.
    float factors[kQueries];
    auto pass = [&](auto f) { query_tiles<kPassQueries>(count, [&](int i, auto n) { f(i, scratch.scores + i * kScoreStride, n); }); };
    pass([&](int i, float* scores, auto n) {
        const float* slopes = call.slopes ? call.slopes + i : nullptr;
        finish_scores<S, n>(call, scores, seen + i, distances + i, slopes, first, past, tiles, m + i, fetcher);
    });
    pass([&](int i, float* scores, auto n) { weigh<S, n>(scores, seen + i, m + i, first, past, tiles, l + i, factors + i, fetcher); });
    if constexpr (S::kBytes)
        pass([&](int i, float* scores, auto n) { fractions<n>(scores, first, past, factors + i, scratch.bytes + i * 2 * kSplit, fetcher); });

    const int tokens = high - first * kTile;
    int column = 0;
    auto mix = [&](auto vectors) {
        query_tiles<S::kTile>(count, [&](int i, auto n) {
            float* result = o + size_t(i) * dim + column;
            if constexpr (S::kBytes) {
                value_tile_bytes<n, vectors>(scratch.bytes + i * 2 * kSplit + first * kTile, factors + i, tiles.values + first, column, dim, past - first, result, fetcher);
            } else {
                const uint32_t* p = (const uint32_t*)(scratch.scores + i * kScoreStride) + first * kTile / W;
                value_tile<typename S::Dot, W, n, vectors>(p, tiles.values + first, column, dim, tokens, result, fetcher);
            }
        });
        column += vectors * kLanes;
    };
    while (column + kTileVectors * kLanes <= dim) mix(std::integral_constant<int, kTileVectors>());
    while (column < dim) mix(std::integral_constant<int, 1>());
    fetcher.rest();
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
        const Floats inverse = all(1.0f / state[count + i]);
        const float* o = state + 2 * count + size_t(i) * dim;
        for (int d = 0; d < head_dim; d += kLanes) store_first(out[i] + d, load(o + d) * inverse, lanes_left(head_dim, d));
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

size_t attention_scratch(int dim) { return Scratch::size(dim); }

}  // namespace headrace::HEADRACE_ISA
