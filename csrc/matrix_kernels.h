// The product kernels, written once and compiled for each instruction set (the including file sets HEADRACE_ISA and flags).
//
// A product walks over tiles of 16 outputs. Few rows: a tile's groups are unpacked into registers and used at once for up to `direct_rows` rows,
// whose sums are in registers (the weights stream past once). Many rows: a group of two tiles is unpacked into registers and used for up to
// `block_rows` rows, whose sums are in the L1 cache. Both sum in the order that matrix.h states.
#pragma once

#include <algorithm>
#include <utility>

#include "matrix.h"
#include "matrix_layout.h"
#include "matrix_simd.h"

namespace headrace::HEADRACE_ISA {
namespace {

#if defined(__AVX512VNNI__)
constexpr int direct_rows = 8;    // rows that a pass over packed weights serves
constexpr int blocked_from = 9;   // rows that count as many
constexpr int nibbles_blocked_from = 8;  // of codes of 4 bits
constexpr int row_blocked_from = 12;  // by Recipe::row
constexpr int block_rows = 64;    // rows whose sums stay in the L1 cache while the groups of two tiles go by
constexpr int row_block_rows = 12;  // Recipe::row: rows x 2 tiles of sums in registers
constexpr int float_rows = 6, float_tiles = 4;
#else
#if defined(__AVX2__)
constexpr int direct_rows = 4;
#else
constexpr int direct_rows = 1;  // more do not fit in the registers, and compile for minutes
#endif
constexpr int float_rows = 4, float_tiles = 1;
#endif
constexpr int fetch_ahead = 6144;   // bytes: what a core reads while a line is on its way
constexpr int apart_ahead = 3072;   // the same of bits apart, beside which almost twice as many bytes are read
constexpr int row_block_groups = 28;  // Recipe::row: groups unpacked at a time
constexpr int partial_rows = 512;   // Recipe::row: rows whose sums wait between blocks of inputs
constexpr int float_partial_rows = 256;  // the same of float weights
constexpr int float_block = 1024;   // inputs of float weights, for which the rows run while these stay in the L2 cache

// Calls f.operator()<R>() for R = r, 1 <= r <= Max.
template <int Max, class F>
inline void with_rows(int r, F&& f) {
    if constexpr (Max > 1) {
        if (r < Max) return with_rows<Max - 1>(r, f);
    }
    f.template operator()<Max>();
}

// Cuts `rows` into the fewest pieces of at most `most`, as even as possible, the larger ones first, and calls visit(first, count).
template <class Visit>
inline void even_pieces(int64_t rows, int64_t most, Visit visit) {
    const int64_t pieces = (rows + most - 1) / most;
    for (int64_t i = 0, first = 0; i < pieces; i++) {
        const int64_t count = rows / pieces + (i < rows % pieces);
        visit(first, count);
        first += count;
    }
}

// ---- results

struct Output {
    float* y;           // of the tile, at the first row
    int64_t ldy;
    const float* bias;  // of the tile, or null
    bool accumulate;
    int count;          // outputs of the tile that exist

    Output(const Product& p, int64_t row, int64_t tile)
        : y(p.y + row * p.ldy + tile * tile_rows), ldy(p.ldy), bias(p.bias ? p.bias + tile * tile_rows : nullptr), accumulate(p.accumulate),
          count(int(std::min(tile_rows, p.weight->rows - tile * tile_rows))) {}

    void put(int64_t row, Floats sum) const {
        float* at = y + row * ldy;
        if (count == kLanes) {
            if (bias) sum = sum + load(bias);
            if (accumulate) sum = sum + load(at);
            store(at, sum);
        } else {
            if (bias) sum = sum + load_first(bias, count);
            if (accumulate) sum = sum + load_first(at, count);
            store_first(at, sum, count);
        }
    }
};

// ---- reading a packed group

template <int n>
inline Codes shifted(Codes a) {
    if constexpr (n > 0) return left<n>(a);
    else if constexpr (n < 0) return right<-n>(a);
    else return a;
}

// Quad i of a group with three bits apart, in whose place anything may be.
template <int i>
inline Codes quad_above_apart(const uint8_t* planes) {
    if constexpr (i < 5) {
        return load_codes(planes + 64 * i);
    } else {
        const Codes w = left<5>(load_codes(planes + 64 * (i - 5))), fourth = load_codes(planes + 192), fifth = load_codes(planes + 256);
        if constexpr (i < 7) return replace(w, left<2>(i == 5 ? fourth : fifth), all_codes(0x1F));
        else return replace(replace(w, left<4>(fourth), all_codes(0x1F)), left<3>(fifth), all_codes(0x0F));
    }
}

// The same with those apart.
template <int i>
inline Codes quad_with_apart(const uint8_t* planes, const uint8_t* apart) {
    const Codes w = quad_above_apart<i>(planes);
    if constexpr (i < 6) return replace(w, shifted<-(i / 3 * 3)>(load_codes(apart + i % 3 * 64)), all_codes(7));
    else return replace(replace(w, right<i - 2>(load_codes(apart + 128)), all_codes(7)), right<6>(load_codes(apart + (i - 6) * 64)), all_codes(3));
}

// Quad i of a group: for each of 16 outputs the codes of inputs 4i to 4i + 3. `apart`: of formats with bits apart, the group's.
template <Format format, int i>
inline Codes quad(const uint8_t* planes, const uint8_t* apart) {
    constexpr Layout layout = layout_of(format);
    constexpr int bits = layout.low_bits;
    if constexpr (layout.apart_bits > 0) return quad_with_apart<i>(planes, apart);
    Codes w;
    if constexpr (bits == 8) w = load_codes(planes + 64 * i);
    else w = shifted<-(i / bits * bits)>(load_codes(planes + i % bits * 64)) & all_codes((1 << bits) - 1);
    const uint8_t* high = planes + 64 * bits;
    if constexpr (layout.high_bits == 1) w = merge(w, shifted<bits - i>(load_codes(high)), all_codes(1 << bits));
    if constexpr (layout.high_bits == 2) w = merge(w, shifted<bits - i / 2 * 2>(load_codes(high + i % 2 * 64)), all_codes(3 << bits));
    if constexpr (layout.table) w = lookup(iq4_nl_codes, w);
    return w;
}

template <Format format>
inline void unpack_codes(const uint8_t* planes, const uint8_t* apart, Codes (&w)[8]) {
    [&]<int... i>(std::integer_sequence<int, i...>) { ((w[i] = quad<format, i>(planes, apart)), ...); }(std::make_integer_sequence<int, 8>());
}

inline void unpack_without_apart(const uint8_t* planes, Codes (&w)[8]) {
    [&]<int... i>(std::integer_sequence<int, i...>) { ((w[i] = quad_above_apart<i>(planes) & all_codes(0xF8)), ...); }(std::make_integer_sequence<int, 8>());
}

// Scales d and minima m of a group, as floats: [0] for the first 16 inputs, [1] for the others where the format has halves.
template <Format format>
inline void load_scales(const uint8_t* super, int group, Floats (&d)[2], Floats (&m)[2]) {
    constexpr Layout layout = layout_of(format);
    const uint8_t* head = super + layout.scales_at();
    const uint8_t* row = head + layout.head_bytes() + group * layout.scale_bytes();
    constexpr int halves = layout.halves ? 2 : 1;
    if constexpr (layout.scales == Scales::d || layout.scales == Scales::dm) {
        d[0] = load((const Half*)row);
        if constexpr (layout.scales == Scales::dm) m[0] = load((const Half*)(row + 32));
    } else {
        const Floats all_d = load((const Half*)head);
        for (int h = 0; h < halves; h++) {
            if constexpr (layout.scales == Scales::k_nibbles) {
                alignas(64) uint8_t low[16], high[16];
                for (int i = 0; i < 16; i++) low[i] = row[16 * h + i] & 15, high[i] = row[16 * h + i] >> 4;
                d[h] = all_d * load_bytes(low), m[h] = all(0) - load((const Half*)(head + 32)) * load_bytes(high);
            } else if constexpr (layout.signed_scales) {
                d[h] = all_d * load((const int8_t*)(row + 16 * h));
            } else {
                d[h] = all_d * load_bytes(row + 16 * h);
                m[h] = all(0) - load((const Half*)(head + 32)) * load_bytes(row + 16 * (halves + h));
            }
        }
    }
}

// The same as the group and shifted recipes take them: minima of `centred` formats are those of code 8.
template <Format format>
inline void load_centred_scales(const uint8_t* super, int group, Floats (&d)[2], Floats (&m)[2]) {
    load_scales<format>(super, group, d, m);
    if constexpr (layout_of(format).centred()) m[0] = fused(all(8), d[0], m[0]);
}

template <Format format>
inline const uint8_t* super_at(const uint8_t* tile, int64_t group) {
    constexpr Layout layout = layout_of(format);
    return tile + layout.tile_head_bytes() + group / layout.groups * layout.super_bytes();
}

// A tile's bits apart, from a group on.
template <Format format>
inline const uint8_t* apart_at(const PackedMatrix& matrix, int64_t tile, int64_t group) {
    return layout_of(format).apart_bits ? matrix.apart + size_t(tile) * matrix.apart_bytes + group * layout_of(format).apart_bytes() : nullptr;
}

// ---- Recipe::group, one group of one row

// The power of two that turns GroupBlock's -8 * sum into -offset * sum.
constexpr int offset_power(int offset) { return offset == 4 ? -1 : offset == 8 ? 0 : offset == 16 ? 1 : offset == 32 ? 2 : 4; }

template <Format format>
constexpr bool wide_codes = layout_of(format).low_bits == 8 || layout_of(format).table;

// What these recipes take off a code.
template <Format format>
constexpr int code_offset = layout_of(format).centred() ? 8 : layout_of(format).offset;

template <Format format>
inline Ints start(int32_t minus8) {
    constexpr int offset = code_offset<format>;
    if constexpr (offset == 0 || (wide_codes<format> && wide_dot_is_signed)) return all_ints(0);
    else return scaled_by_power<offset_power(offset)>(all_ints(minus8));
}

inline float low_sum(const GroupBlock& x) { return x.scale * float(x.minus8_low / -8); }
inline float high_sum(const GroupBlock& x) { return x.scale * float((x.minus8 - x.minus8_low) / -8); }

// acc + minima. Both halves' come before the codes'.
template <Format format>
inline Floats add_minima(Floats acc, const Floats (&m)[2], const GroupBlock& x) {
    constexpr Layout layout = layout_of(format);
    if constexpr (layout.has_min() && layout.halves) return fused(m[1], all(high_sum(x)), fused(m[0], all(low_sum(x)), acc));
    else if constexpr (layout.has_min()) return fused(m[0], all(x.sum), acc);
    else return acc;
}

// W of Recipe::shifted. `more`: to add to the sum of codes.
template <Format format>
inline Floats weight_sum(const Codes (&w)[8], const Floats (&d)[2], const Floats (&m)[2], int more = 0) {
    constexpr Layout layout = layout_of(format);
    constexpr bool wide = wide_codes<format>;
    constexpr int count = layout.halves ? 16 : 32;
    const Ints from = all_ints((wide && wide_dot_is_signed ? 0 : -code_offset<format> * count) + more);
    Ints sums[2] = {from, from};
    if constexpr (layout.nibbles()) {
        static_assert(!layout.halves);
        sums[0] = dot<false>(from, ((w[0] + w[1]) + (w[2] + w[3])) + ((w[4] + w[5]) + (w[6] + w[7])), 0x01010101);  // bytes of at most 120
    } else {
        for (int i = 0; i < 8; i++) sums[layout.halves && i >= 4] = dot<wide>(sums[layout.halves && i >= 4], w[i], 0x01010101);
    }
    Floats total;
    if constexpr (layout.has_min()) total = fused(d[0], to_floats(sums[0]), all(float(count)) * (layout.halves ? m[0] + m[1] : m[0]));
    else total = d[0] * to_floats(sums[0]);
    if constexpr (layout.halves) total = fused(d[1], to_floats(sums[1]), total);
    return total;
}

// ---- few rows

// Asks for packed weights about `fetch_ahead` bytes before they are needed, superblock by superblock: a tile's, then those of the tile that is next.
// For one use: the other caches then keep what is read again, which most weights are not before they are driven out.
template <Format format>
struct Stream {
    static constexpr Layout layout = layout_of(format);
    static constexpr int step = (layout.super_bytes() + layout.groups - 1) / layout.groups;  // bytes, with a group
    const uint8_t *at, *next;
    int64_t left;  // superblocks of the tile that are still to be asked for

    Stream(const uint8_t* tile, const uint8_t* next_tile, int64_t groups) : next(next_tile + layout.tile_head_bytes()) {
        const int64_t supers = (groups + layout.groups - 1) / layout.groups, ahead = std::min<int64_t>(supers, std::max(1, fetch_ahead / layout.super_bytes()));
        at = tile + layout.tile_head_bytes() + (ahead - 1) * layout.super_bytes(), left = supers - ahead;
    }
    void begin_super() {
        if (left == 0)
            for (int i = 0; i < layout.tile_head_bytes(); i += 64) prefetch_once(next - layout.tile_head_bytes() + i);
        at = left-- == 0 ? next : at + layout.super_bytes();
    }
    void fetch(int group) const {
        for (int i = 0; i < step; i += 64) prefetch_once(at + group * step + i);
    }
};

// The tile that a thread reads after `tile` of [.., tile1).
inline const uint8_t* tile_after(const Product& p, int64_t tile, int64_t tile1) {
    return tile + 1 == tile1 && p.next ? p.next : p.weight->data + size_t(tile + 1) * p.weight->tile_bytes;
}

// The sums of R rows go to `put(row, sums)`. Screened: the bits apart are not read, but taken to be the middle of their range.
template <Format format, bool shifted, bool screened, int R, class Put>
inline void direct_tile(const uint8_t* tile, const uint8_t* apart, const uint8_t* next, int64_t groups, const uint8_t* x, int64_t stride, Put put) {
    constexpr Layout layout = layout_of(format);
    constexpr bool wide = wide_codes<format>;
    constexpr float middle = 0.5f * float((1 << layout.apart_bits) - 1);
    Floats acc[R];
    for (int r = 0; r < R; r++) acc[r] = zero();
    const uint8_t* super = tile + layout.tile_head_bytes();
    Stream<format> stream(tile, next, groups);
    for (int64_t first = 0; first < groups; first += layout.groups, super += layout.super_bytes()) {
        const int count = int(std::min<int64_t>(layout.groups, groups - first));
        stream.begin_super();
        for (int g = 0; g < count; g++, x += sizeof(GroupBlock)) {
            stream.fetch(g);
            Codes w[8];
            Floats d[2], m[2];
            if constexpr (screened) {
                unpack_without_apart(super + g * layout.group_bytes(), w);
            } else {
                for (int i = 0; i < layout.apart_bytes(); i += 64) prefetch_once(apart + apart_ahead + i);
                unpack_codes<format>(super + g * layout.group_bytes(), apart, w);
                apart += layout.apart_bytes();
            }
            load_centred_scales<format>(super, g, d, m);
            Floats whole;
            if constexpr (shifted) whole = weight_sum<format>(w, d, m, screened ? int(32 * middle) : 0);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                const GroupBlock& block = *reinterpret_cast<const GroupBlock*>(x + r * stride);
                if constexpr (shifted) acc[r] = fused(whole, all(block.offset), acc[r]);
                if constexpr (screened) acc[r] = fused(d[0], all(middle * block.sum), acc[r]);
                acc[r] = add_minima<format>(acc[r], m, block);
                Ints sum = start<format>(layout.halves ? block.minus8_low : block.minus8);
#pragma GCC unroll 8
                for (int i = 0; i < 8; i++) {
                    if (layout.halves && i == 4) {
                        acc[r] = fused(d[0] * all(block.scale), to_floats(sum), acc[r]);
                        sum = start<format>(block.minus8 - block.minus8_low);
                    }
                    sum = dot<wide>(sum, w[i], load_word(block.codes + 4 * i));
                }
                acc[r] = fused(d[layout.halves] * all(block.scale), to_floats(sum), acc[r]);
            }
        }
    }
    for (int r = 0; r < R; r++) put(r, acc[r]);
}

template <Format format, bool shifted, int R>
__attribute__((noinline)) void multiply_tile(const Product& p, int64_t row, int64_t tile, int64_t tile1) {
    const PackedMatrix& w = *p.weight;
    const Output out(p, row, tile);
    direct_tile<format, shifted, false, R>(w.data + size_t(tile) * w.tile_bytes, apart_at<format>(w, tile, 0), tile_after(p, tile, tile1), w.cols / 32, p.x->row(row),
                                           p.x->row_bytes, [&](int r, Floats sum) { out.put(r, sum); });
}

template <Format format, bool shifted>
void multiply_direct(const Product& p, int64_t row0, int64_t row1, int64_t tile0, int64_t tile1) {
    for (int64_t tile = tile0; tile < tile1; tile++)
        even_pieces(row1 - row0, direct_rows, [&](int64_t first, int64_t count) {
            with_rows<direct_rows>(int(count), [&]<int R>() { multiply_tile<format, shifted, R>(p, row0 + first, tile, tile1); });
        });
}

template <Format format, bool shifted, int R>
__attribute__((noinline)) bool screen_rows(const Product& p, int64_t row, int64_t tile, const Reach* reach, const float* least) {
    const PackedMatrix& w = *p.weight;
    const uint8_t* from = w.data + size_t(tile) * w.tile_bytes;
    const int count = int(std::min(tile_rows, w.rows - tile * tile_rows));
    const TileSlack& slack = *reinterpret_cast<const TileSlack*>(from + 64);
    const Floats of_norm = load(slack.of_norm), of_value = load(slack.of_value);
    bool found = false;
    direct_tile<format, shifted, true, R>(from, nullptr, tile_after(p, tile, tile + 1), w.cols / 32, p.x->row(row), p.x->row_bytes, [&](int r, Floats sum) {
        const Floats above = sum + fused(of_norm, all(reach[row + r].norm), of_value * all(reach[row + r].outliers));
        found |= (not_less(above, least[row + r]) & ((1u << count) - 1)) != 0;
    });
    return found;
}

template <Format format, bool shifted>
bool screen_tile(const Product& p, int64_t row0, int64_t row1, int64_t tile, const Reach* reach, const float* least) {
    bool found = false;
    even_pieces(row1 - row0, direct_rows, [&](int64_t first, int64_t count) {
        with_rows<direct_rows>(int(count), [&]<int R>() { found |= screen_rows<format, shifted, R>(p, row0 + first, tile, reach, least); });
    });
    return found;
}

bool screen(const Product& p, int64_t row0, int64_t row1, int64_t tile, const Reach* reach, const float* least) {
    const auto of_recipe = p.x->recipe == Recipe::shifted ? screen_tile<Format::Q8_0_APART, true> : screen_tile<Format::Q8_0_APART, false>;
    return of_recipe(p, row0, row1, tile, reach, least);
}

// ---- many rows

#if defined(__AVX512VNNI__)

// Two multiplications by one, as Winograd's inner product has it (1968): of inputs a, b and their weights v, w, codes of 4 bits,
//     (a + W) (b + V) = a b + a V + b W + V W,   W = w + 120, V = v - 8.
// Both sums fit in 8 bits, one without sign and one with. a b is summed up once for all outputs, V W once for all rows, and the additions have
// ports to spare that multiplications have not. What is to be summed up, a (v - 8) + b (w - 8), is (a + W) (b + V) - V W - b (a + 128).
// Four inputs a and four b, two quads, make a pair. With more pairs than these the additions would take longer. GroupBlock::winograd is the sum of
// -b (a + 128) over the pairs and of -8 a over the quads that are in none, with float_from: what is summed up with it has the bits of a float,
// from which V W, with float_from too, is taken off as one. That also converts the sum.
constexpr int winograd_pairs = 3;  // quads 0 and 1, 2 and 3, 4 and 5: store_and_sum() has them built in
static_assert(group_code_limit + 8 == 128 && 2 * group_code_limit + 15 <= 255);
static_assert(32 * group_code_limit * 8 + 4 * winograd_pairs * (15 + group_code_limit) * 8 <= 1 << 22);  // what float_from bears

// A group of two tiles. It stays in registers where everything that it goes through is inlined.
template <Format format>
struct GroupOfTiles {
    Codes w[2][8];           // quads; W and V of those in a pair
    Floats products[2];      // V W of all pairs, with float_from
    Floats d[2][2], m[2][2], whole[2];
};

template <Format format, bool shifted>
inline __attribute__((always_inline)) void read_group(GroupOfTiles<format>& to, const uint8_t* tile, int64_t tile_bytes, const uint8_t* apart,
                                                      int64_t apart_bytes, int64_t group) {
    constexpr Layout layout = layout_of(format);
    const int in_super = int(group % layout.groups);
#pragma GCC unroll 2
    for (int t = 0; t < 2; t++) {
        const uint8_t* super = super_at<format>(tile + t * tile_bytes, group);
        Codes(&w)[8] = to.w[t];
        unpack_codes<format>(super + in_super * layout.group_bytes(), apart + t * apart_bytes + group * layout.apart_bytes(), w);
        load_centred_scales<format>(super, in_super, to.d[t], to.m[t]);
        if constexpr (shifted) to.whole[t] = weight_sum<format>(w, to.d[t], to.m[t]);
        if constexpr (layout.nibbles()) {
            __m512i products = _mm512_set1_epi32(float_from);
#pragma GCC unroll 4
            for (int i = 0; i < 2 * winograd_pairs; i += 2) {
                const Codes with_w = w[i + 1] + all_codes(group_code_limit), with_v = w[i] + all_codes(-8);
                products = _mm512_dpbusd_epi32(products, with_w.v, with_v.v);
                w[i] = with_w, w[i + 1] = with_v;
            }
            to.products[t].v = _mm512_castsi512_ps(products);
        }
    }
}

// From memory: left to itself the compiler moves a word that is in a general register too, on a port that the dot products need.
inline __m512i broadcast(const void* p) {
    __m512i all;
    asm("vpbroadcastd %1, %0" : "=v"(all) : "m"(*static_cast<const int32_t*>(p)));
    return all;
}

// For results: a line that is not in the cache yet would hold up the writes after it.
inline void prefetch_to_write(const void* p) { __builtin_prefetch(p, 1, 3); }

// Adds a group to the sums of R rows from `row` on, which are 0 where it is the first. Those of the last go to `out`, others to `sums`.
template <Format format, bool shifted, bool first, bool last, int R>
inline __attribute__((always_inline)) void add_group(const GroupOfTiles<format>& group, const uint8_t* x, int64_t stride, float* sums, const Output (&out)[2],
                                                     int64_t row) {
    constexpr Layout layout = layout_of(format);
    auto block = [&](int r) -> const GroupBlock& { return *reinterpret_cast<const GroupBlock*>(x + r * stride); };
    Ints sum[R][2];
    auto begin = [&](int half) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            if constexpr (layout.nibbles()) {
                sum[r][0].v = sum[r][1].v = broadcast(&block(r).winograd);
            } else {
                sum[r][0] = sum[r][1] = start<format>(!layout.halves ? block(r).minus8 : half ? block(r).minus8 - block(r).minus8_low : block(r).minus8_low);
            }
        }
    };
    auto add_quad = [&](int i) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const __m512i a = broadcast(block(r).codes + 4 * i);
            for (int t = 0; t < 2; t++) sum[r][t].v = _mm512_dpbusd_epi32(sum[r][t].v, group.w[t][i].v, a);
        }
    };
    auto add_pair = [&](int i) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const __m512i a = broadcast(block(r).codes + 4 * i), b = broadcast(block(r).codes + 4 * i + 4);
            for (int t = 0; t < 2; t++)
                sum[r][t].v = _mm512_dpbusd_epi32(sum[r][t].v, _mm512_add_epi8(a, group.w[t][i].v), _mm512_add_epi8(b, group.w[t][i + 1].v));
        }
    };
    auto finish = [&](int half) __attribute__((always_inline)) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) {
            const Floats scale{_mm512_castsi512_ps(broadcast(&block(r).scale))};
#pragma GCC unroll 2
            for (int t = 0; t < 2; t++) {
                float* const at = sums + (r * 2 + t) * 16;
                Floats acc = first && half == 0 ? zero() : load(at);
                if (half == 0) {
                    if constexpr (shifted) acc = fused(group.whole[t], all(block(r).offset), acc);
                    acc = add_minima<format>(acc, group.m[t], block(r));
                }
                Floats of_codes;
                if constexpr (layout.nibbles()) of_codes = Floats{_mm512_castsi512_ps(sum[r][t].v)} - group.products[t];
                else of_codes = to_floats(sum[r][t]);
                acc = fused(group.d[t][half] * scale, of_codes, acc);
                if (last && half == layout.halves) out[t].put(row + r, acc);
                else store(at, acc);
            }
        }
    };
    begin(0);
    if constexpr (layout.nibbles()) {
        static_assert(winograd_pairs == 3);
        add_quad(6), add_pair(0), add_quad(7), add_pair(2), add_pair(4);
    } else {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            if (layout.halves && i == 4) finish(0), begin(1);
            add_quad(i);
        }
    }
    finish(layout.halves);
}

// Asks for a group of a tile's packed weights. Always inlined: GCC leaves out calls of a function that only prefetches.
template <Format format>
inline __attribute__((always_inline)) void ask_for(const uint8_t* tile, const uint8_t* apart, int64_t group) {
    constexpr Layout layout = layout_of(format);
    constexpr int step = (layout.super_bytes() + layout.groups - 1) / layout.groups;  // bytes, with a group
    const uint8_t* at = super_at<format>(tile, group) + group % layout.groups * step;
    for (int i = 0; i < step; i += 64) prefetch_once(at + i);
    for (int i = 0; i < layout.apart_bytes(); i += 64) prefetch_once(apart + group * layout.apart_bytes() + i);
}

// Two tiles and up to `block_rows` rows; `after`: the tiles that are read next, taken to be as long, or the same again.
template <Format format, bool shifted>
__attribute__((noinline)) void multiply_blocked(const Product& p, int64_t row0, int64_t row1, int64_t tile, const uint8_t* after) {
    constexpr Layout layout = layout_of(format);
    constexpr int at_once = shifted || layout.has_min() ? 3 : 4;  // rows: their integer sums and the group fit in the registers
    const PackedMatrix& w = *p.weight;
    const int64_t groups = w.cols / 32, rows = row1 - row0, stride = p.x->row_bytes;
    const int64_t whole_super = layout.groups > 2 ? layout.groups + 1 : 0;  // its scales lie at its end
    const int64_t lead = std::min(groups, std::max(whole_super, 2 + 256 / std::max<int64_t>(rows, 24)));  // groups that weights are asked for ahead
    const int64_t tile_bytes = int64_t(w.tile_bytes), apart_bytes = int64_t(w.apart_bytes);
    const uint8_t *const packed = w.data + tile * tile_bytes, *const apart = w.apart + tile * apart_bytes;
    const Output out[2] = {Output(p, row0, tile), Output(p, row0, tile + 1)};
    alignas(64) float sums[block_rows * 2 * 16];
    if (groups == 1) std::memset(sums, 0, size_t(rows) * 2 * 64);  // the first and the last at once
    const uint8_t* x = p.x->row(row0);
    int64_t asked = 0;  // rows whose results' lines were asked for: all are written with the last group
    for (int64_t g = 0; g < groups; g++, x += sizeof(GroupBlock)) {
        GroupOfTiles<format> group;
        read_group<format, shifted>(group, packed, tile_bytes, apart, apart_bytes, g);
        const int64_t soon = g + lead < groups ? g + lead : g + lead - groups;
        const uint8_t* const soon_packed = g + lead < groups ? packed : after;
        const uint8_t* const soon_apart = g + lead < groups || after == packed ? apart : apart + 2 * apart_bytes;
        for (int t = 0; t < 2; t++) ask_for<format>(soon_packed + t * tile_bytes, soon_apart + t * apart_bytes, soon);
        if (g + 1 < groups)
            for (; asked * groups < rows * (g + 1); asked++)
                for (const Output& tile_out : out) prefetch_to_write(tile_out.y + asked * tile_out.ldy);
        auto add_to_all = [&]<bool first, bool last>() __attribute__((always_inline)) {
            const uint8_t* from = x;
            float* to = sums;
            int64_t row = 0;
            for (; row + at_once <= rows; row += at_once, from += at_once * stride, to += at_once * 2 * 16)
                add_group<format, shifted, first, last, at_once>(group, from, stride, to, out, row);
            if (row < rows)
                with_rows<at_once - 1>(int(rows - row), [&]<int R>() { add_group<format, shifted, first, last, R>(group, from, stride, to, out, row); });
        };
        if (g + 1 == groups) add_to_all.template operator()<false, true>();
        else if (g == 0) add_to_all.template operator()<true, false>();
        else add_to_all.template operator()<false, false>();
    }
}

#endif

// ---- Recipe::row

// A group's codes as int8 + 128, in steps of D; inverse is 256 / D.
template <Format format>
inline void unpack_row_codes(const uint8_t* super, const uint8_t* apart, int group, Floats inverse, Codes (&w)[8]) {
    constexpr Layout layout = layout_of(format);
    Floats d[2], m[2];
    unpack_codes<format>(super + group * layout.group_bytes(), apart, w);
    load_scales<format>(super, group, d, m);
    for (int h = 0; h <= layout.halves; h++) {
        const Ints factor = round_to_ints(d[h] * inverse), half = all_ints(128 * 256 + 128);
        Ints addend = half;
        if constexpr (layout.has_min()) addend = half - (all_ints(0) - round_to_ints(m[h] * inverse));
        if constexpr (layout.offset != 0) {
            constexpr int power = layout.offset == 4 ? 2 : layout.offset == 8 ? 3 : layout.offset == 16 ? 4 : layout.offset == 32 ? 5 : 7;
            addend = addend - scaled_by_power<power>(factor);
        }
        const Codes f = pairs(factor), a = pairs(addend);
        constexpr int quads = layout.halves ? 4 : 8;
        for (int i = h * quads; i < (h + 1) * quads; i++) w[i] = rescale(w[i], f, a);
    }
}

// 256 / D for each output of a tile. Where D is 0 the result multiplies zeros: any finite number does.
inline Floats inverse_steps(const uint8_t* tile) { return all(256) / max(load((const float*)tile), all(0x1p-100f)); }

inline const RowHead& head_of(const Activation& a, int64_t row) { return *reinterpret_cast<const RowHead*>(a.row(row)); }
inline Ints row_start(const RowHead& head) { return all_ints(wide_dot_is_signed ? 0 : -128 * head.sum); }
inline Floats row_value(Ints sum, const uint8_t* tile, const RowHead& head) { return to_floats(sum) * (load((const float*)tile) * all(head.scale)); }

template <Format format, int R>
__attribute__((noinline)) void multiply_tile_by_row(const Product& p, int64_t row, int64_t index, int64_t tile1) {
    constexpr Layout layout = layout_of(format);
    const Activation& input = *p.x;
    const int64_t groups = p.weight->cols / 32;
    const uint8_t* tile = p.weight->data + size_t(index) * p.weight->tile_bytes;
    const uint8_t* apart = apart_at<format>(*p.weight, index, 0);
    const Output out(p, row, index);
    const Floats inverse = inverse_steps(tile);
    Ints sum[R];
    for (int r = 0; r < R; r++) sum[r] = row_start(head_of(input, row + r));
    const uint8_t* x = input.row(row) + sizeof(RowHead);
    Stream<format> stream(tile, tile_after(p, index, tile1), groups);
    for (int64_t g = 0; g < groups; g++, x += 32, apart += layout.apart_bytes()) {
        const uint8_t* super = super_at<format>(tile, g);
        const int in_super = int(g % layout.groups);
        if (in_super == 0) stream.begin_super();
        stream.fetch(in_super);
        Codes w[8];
        unpack_row_codes<format>(super, apart, in_super, inverse, w);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
#pragma GCC unroll 8
            for (int i = 0; i < 8; i++) sum[r] = dot<true>(sum[r], w[i], load_word(x + r * input.row_bytes + 4 * i));
    }
    for (int r = 0; r < R; r++) out.put(r, row_value(sum[r], tile, head_of(input, row + r)));
}

template <Format format>
void multiply_direct_by_row(const Product& p, int64_t row0, int64_t row1, int64_t tile0, int64_t tile1) {
    for (int64_t tile = tile0; tile < tile1; tile++)
        even_pieces(row1 - row0, direct_rows, [&](int64_t first, int64_t count) {
            with_rows<direct_rows>(int(count), [&]<int R>() { multiply_tile_by_row<format, R>(p, row0 + first, tile, tile1); });
        });
}

#if defined(__AVX512VNNI__)

// Packed weights that will be needed next, a block of each of two tiles: asked for step by step, a step being one group of one row block.
struct Ahead {
    const uint8_t *at, *past;  // of the first tile
    int64_t tile_bytes, bytes;  // a step

    static Ahead block(const uint8_t* at, size_t tile_bytes, int64_t blocks, int64_t steps) {
        const int64_t lines = int64_t(tile_bytes) / 64 / blocks + 1;
        return {at, at + lines * 64, int64_t(tile_bytes), (lines + steps - 1) / steps * 64};
    }
    void step() {  // into the second-level cache: the first has no room for so long
        if (at >= past) return;
        for (const uint8_t* const to = at + bytes; at < to; at += 64) __builtin_prefetch(at, 0, 2), __builtin_prefetch(at + tile_bytes, 0, 2);
    }
};

struct RowCodes {  // of a block of inputs of two tiles
    alignas(64) uint8_t group[row_block_groups][8][2][64];
};

// Adds `groups` groups of two tiles to the sums of R rows from `row` on. The sums start anew where this is the first block of inputs, and go to
// `out` where it is the last; between blocks they wait in `partial`.
template <int R>
__attribute__((noinline)) void run_rows_by_row(const RowCodes& u, const uint8_t* const (&tiles)[2], const Activation& input, int64_t row, int64_t group0, int groups,
                                               int32_t* partial, const Output (&out)[2], Ahead& shared_ahead) {
    Ahead ahead = shared_ahead;  // in registers
    const bool first = group0 == 0, last = (group0 + groups) * 32 == input.cols;
    const int64_t stride = input.row_bytes;
    const uint8_t* x = input.row(row) + sizeof(RowHead) + group0 * 32;
    Ints sum[R][2];
    if (first)
#pragma GCC unroll 12
        for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = row_start(head_of(input, row + r));
    else
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int t = 0; t < 2; t++) sum[r][t] = load_ints(partial + (r * 2 + t) * 16);
    for (int g = 0; g < groups; g++, x += 32) {
        ahead.step();
        const uint8_t* rows[4] = {x, x + 3 * stride, x + 6 * stride, x + 9 * stride};
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            Codes w[2];
            for (int t = 0; t < 2; t++) w[t] = load_codes(u.group[g][i][t]);
#pragma GCC unroll 12
            for (int r = 0; r < R; r++) {
                const __m512i all = _mm512_set1_epi32(load_word(rows[r / 3] + r % 3 * stride + 4 * i));
                for (int t = 0; t < 2; t++) sum[r][t].v = _mm512_dpbusd_epi32(sum[r][t].v, w[t].v, all);
            }
        }
    }
    shared_ahead = ahead;
    if (last) {
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int t = 0; t < 2; t++) out[t].put(r, row_value(sum[r][t], tiles[t], head_of(input, row + r)));
    } else {
#pragma GCC unroll 12
        for (int r = 0; r < R; r++)
#pragma GCC unroll 2
            for (int t = 0; t < 2; t++) store_ints(partial + (r * 2 + t) * 16, sum[r][t]);
    }
}

template <Format format>
void multiply_blocked_by_row(const Product& p, int64_t row0, int64_t row1, int64_t tile, const uint8_t* after) {
    constexpr Layout layout = layout_of(format);
    const PackedMatrix& w = *p.weight;
    const int64_t groups = w.cols / 32, rows = row1 - row0;
    RowCodes u;
    alignas(64) int32_t partial[partial_rows * 2 * 16];
    const uint8_t* const tiles[2] = {w.data + size_t(tile) * w.tile_bytes, w.data + size_t(tile + 1) * w.tile_bytes};
    const int64_t blocks = (groups + row_block_groups - 1) / row_block_groups;
    for (int64_t b = 0; b < blocks; b++) {
        const int64_t group0 = groups * b / blocks, group1 = groups * (b + 1) / blocks;
        for (int t = 0; t < 2; t++) {
            const Floats inverse = inverse_steps(tiles[t]);
            const uint8_t* apart = apart_at<format>(w, tile + t, group0);
            for (int64_t g = group0; g < group1; g++, apart += layout.apart_bytes()) {
                Codes c[8];
                unpack_row_codes<format>(super_at<format>(tiles[t], g), apart, int(g % layout.groups), inverse, c);
                for (int i = 0; i < 8; i++) store_codes(u.group[g - group0][i][t], c[i]);
            }
        }
        Ahead ahead = Ahead::block(b + 1 < blocks ? super_at<format>(tiles[0], group1) : after, w.tile_bytes, blocks,
                                   (rows + row_block_rows - 1) / row_block_rows * (group1 - group0));
        even_pieces(rows, row_block_rows, [&](int64_t first, int64_t count) {
            const Output out[2] = {Output(p, row0 + first, tile), Output(p, row0 + first, tile + 1)};
            with_rows<row_block_rows>(int(count), [&]<int R>() {
                run_rows_by_row<R>(u, tiles, *p.x, row0 + first, group0, int(group1 - group0), partial + first * 2 * 16, out, ahead);
            });
        });
    }
}

#endif

// ---- every quantised format

template <Format format>
void multiply_quantised(const Product& p, int64_t row0, int64_t row1, int64_t tile0, int64_t tile1) {
    const Recipe recipe = p.x->recipe;
    const auto direct = recipe == Recipe::row       ? multiply_direct_by_row<format>
                        : recipe == Recipe::shifted ? multiply_direct<format, true>
                                                    : multiply_direct<format, false>;
#if defined(__AVX512VNNI__)
    if (row1 - row0 >= (recipe == Recipe::row ? row_blocked_from : layout_of(format).nibbles() ? nibbles_blocked_from : blocked_from)) {
        const auto blocked = recipe == Recipe::row       ? multiply_blocked_by_row<format>
                             : recipe == Recipe::shifted ? multiply_blocked<format, true>
                                                         : multiply_blocked<format, false>;
        int64_t tile = tile0;
        for (; tile + 2 <= tile1; tile += 2)
            even_pieces(row1 - row0, recipe == Recipe::row ? partial_rows : block_rows, [&](int64_t first, int64_t count) {
                const int64_t from = row0 + first, to = from + count;
                blocked(p, from, to, tile, to < row1 ? p.weight->data + size_t(tile) * p.weight->tile_bytes : tile_after(p, tile + 1, tile1));
            });
        direct(p, row0, row1, tile, tile1);
        return;
    }
#endif
    direct(p, row0, row1, tile0, tile1);
}

// ---- float weights

template <Format format>
struct FloatWeights {  // F32, F16: one input at a time
    static constexpr int step = 1;
    static constexpr int64_t bytes = format == Format::F32 ? 64 : 32;
    using Row = const float*;
    static Floats weights(const uint8_t* p) {
        if constexpr (format == Format::F32) return load((const float*)p);
        else return load((const Half*)p);
    }
    static Floats add(Floats acc, Floats w, Row x, int64_t k) { return fused(all(x[k]), w, acc); }
};

template <>
struct FloatWeights<Format::BF16> {  // two inputs at a time
    static constexpr int step = 2;
    static constexpr int64_t bytes = 64;
    using Row = const uint32_t*;
    static Words weights(const uint8_t* p) { return load_words((const uint32_t*)p); }
    static Floats add(Floats acc, Words w, Row x, int64_t k) { return BF16Dot::dot(acc, all_words(x[k]), w); }
};

template <Format format, int R, int tiles>
__attribute__((noinline)) void float_rows_of(const uint8_t* packed, int64_t tile_bytes, int64_t steps, const uint8_t* x, int64_t stride,
                                             float* partial, bool first) {
    using W = FloatWeights<format>;
    Floats acc[R][tiles];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        for (int t = 0; t < tiles; t++) acc[r][t] = first ? zero() : load(partial + (r * tiles + t) * 16);
    for (int64_t k = 0; k < steps; k++, packed += W::bytes) {
        decltype(W::weights(packed)) w[tiles];
        for (int t = 0; t < tiles; t++) w[t] = W::weights(packed + t * tile_bytes);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            for (int t = 0; t < tiles; t++) acc[r][t] = W::add(acc[r][t], w[t], (typename W::Row)(x + r * stride), k);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
        for (int t = 0; t < tiles; t++) store(partial + (r * tiles + t) * 16, acc[r][t]);
}

template <Format format, int tiles>
void multiply_float_tiles(const Product& p, int64_t row0, int64_t row1, int64_t tile) {
    using W = FloatWeights<format>;
    const PackedMatrix& w = *p.weight;
    alignas(64) float partial[float_partial_rows * tiles * 16];
    const int64_t steps = (w.cols + W::step - 1) / W::step;
    for (int64_t from = 0; from < steps; from += float_block) {
        const int64_t count = std::min<int64_t>(float_block, steps - from);
        even_pieces(row1 - row0, float_rows, [&](int64_t first, int64_t rows) {
            with_rows<float_rows>(int(rows), [&]<int R>() {
                float_rows_of<format, R, tiles>(w.data + size_t(tile) * w.tile_bytes + from * W::bytes, int64_t(w.tile_bytes), count,
                                                p.x->row(row0 + first) + from * 4, p.x->row_bytes, partial + first * tiles * 16, from == 0);
            });
        });
    }
    for (int t = 0; t < tiles; t++) {
        const Output out(p, row0, tile + t);
        for (int64_t r = 0; r < row1 - row0; r++) out.put(r, load(partial + (r * tiles + t) * 16));
    }
}

template <Format format>
void multiply_float(const Product& p, int64_t row0, int64_t row1, int64_t tile0, int64_t tile1) {
    for (int64_t from = row0; from < row1; from += float_partial_rows) {
        const int64_t to = std::min<int64_t>(row1, from + float_partial_rows);
        int64_t tile = tile0;
        for (; tile + float_tiles <= tile1; tile += float_tiles) multiply_float_tiles<format, float_tiles>(p, from, to, tile);
        for (; tile < tile1; tile++) multiply_float_tiles<format, 1>(p, from, to, tile);
    }
}

// ---- activations

// Scales of 16 groups, from the greatest sizes of their inputs.
inline Floats group_scales(Floats sizes) {
    return min(all(0x1p64f), max(all(0x1p-64f), sizes * all(1.0f / group_code_limit)));  // a NaN stays one
}

template <bool shifted>
void quantise_blocks(GroupBlock* blocks, int64_t groups, const float* x) {
    const Floats most = all(group_code_limit), least = all(-group_code_limit);
    for (; groups > 0; groups -= kLanes, blocks += kLanes, x += 32 * kLanes) {
        const int count = int(std::min<int64_t>(groups, kLanes));
        Floats sizes = zero(), middles = zero();
        for (int g = 0; g < count; g++) {
            const Floats low = load(x + 32 * g), high = load(x + 32 * g + 16);
            if constexpr (shifted) {
                const float top = greatest(max(low, high)), bottom = -greatest(all(0) - min(low, high)), middle = 0.5f * (top + bottom);
                middles = with_lane(middles, g, middle);
                sizes = with_lane(sizes, g, std::max(top - middle, middle - bottom));
            } else {
                sizes = with_lane(sizes, g, greatest(max(absolute(low), absolute(high))));
            }
        }
        alignas(64) float scales[kLanes], inverses[kLanes], offsets[kLanes];
        const Floats of_groups = group_scales(sizes);
        store(scales, of_groups), store(inverses, all(1) / of_groups), store(offsets, middles);
        for (int g = 0; g < count; g++) {
            GroupBlock& block = blocks[g];
            const Floats inverse = all(inverses[g]);
            Floats values[2] = {load(x + 32 * g), load(x + 32 * g + 16)};
            Ints codes[2];
            for (int half = 0; half < 2; half++) {
                if constexpr (shifted) values[half] = values[half] - all(offsets[g]);
                codes[half] = round_to_ints(min(max(values[half] * inverse, least), most));
            }
            const GroupSums sums = store_and_sum(block.codes, codes[0], codes[1]);
            const int32_t total = sums.low + sums.high;
            block.scale = scales[g], block.sum = scales[g] * float(total), block.minus8 = -8 * total, block.minus8_low = -8 * sums.low;
            block.winograd = sums.winograd, block.offset = offsets[g];
        }
    }
}

inline void quantise_whole_row(const Activation& a, int64_t row, const float* x) {
    RowHead* head = reinterpret_cast<RowHead*>(a.row(row));
    int8_t* codes = reinterpret_cast<int8_t*>(head + 1);
    Floats size = zero();
    for (int64_t k = 0; k < a.cols; k += 16) size = max(size, absolute(load(x + k)));
    const float scale = std::min(std::max(greatest(size) * (1 / 127.0f), 0x1p-64f), 0x1p64f);
    const Floats inverse = all(1 / scale), most = all(127), least = all(-127);
    Ints total = all_ints(0);
    for (int64_t k = 0; k < a.cols; k += 16) {
        const Ints part = round_to_ints(min(max(load(x + k) * inverse, least), most));
        store_low_bytes(codes + k, part);
        total = total - part;
    }
    head->scale = scale, head->sum = -sum(total);
}

inline void round_row(const Activation& a, int64_t row, const float* x) {
    BFloat* to = reinterpret_cast<BFloat*>(a.row(row));
    int64_t k = 0;
    for (; k + 16 <= a.cols; k += 16) store(to + k, load(x + k));
    if (k < a.cols) store(to + k, load_first(x + k, int(a.cols - k))), k += 16;
    if (k * 2 < a.row_bytes) std::memset(to + k, 0, size_t(a.row_bytes - k * 2));
}

inline void copy_row(const Activation& a, int64_t row, const float* x) {
    std::memcpy(a.row(row), x, size_t(a.cols) * 4);
    std::memset(a.row(row) + a.cols * 4, 0, size_t(a.row_bytes - a.cols * 4));
}

void quantise_groups(const Activation& a, int64_t row, int64_t first, int64_t count, const float* x) {
    GroupBlock* blocks = reinterpret_cast<GroupBlock*>(a.row(row)) + first;
    if (a.recipe == Recipe::shifted) quantise_blocks<true>(blocks, count, x);
    else quantise_blocks<false>(blocks, count, x);
}

void quantise_row(const Activation& a, int64_t row, const float* x) {
    switch (a.recipe) {
        case Recipe::group: case Recipe::shifted: return quantise_groups(a, row, 0, a.cols / 32, x);
        case Recipe::row: return quantise_whole_row(a, row, x);
        case Recipe::bf16: return round_row(a, row, x);
        case Recipe::f32: return copy_row(a, row, x);
    }
}

void multiply(const Product& p, int64_t row0, int64_t row1, int64_t tile0, int64_t tile1) {
    switch (p.weight->format) {
        case Format::Q4_0: return multiply_quantised<Format::Q4_0>(p, row0, row1, tile0, tile1);
        case Format::Q4_1: return multiply_quantised<Format::Q4_1>(p, row0, row1, tile0, tile1);
        case Format::Q5_0: return multiply_quantised<Format::Q5_0>(p, row0, row1, tile0, tile1);
        case Format::Q5_1: return multiply_quantised<Format::Q5_1>(p, row0, row1, tile0, tile1);
        case Format::Q8_0: return multiply_quantised<Format::Q8_0>(p, row0, row1, tile0, tile1);
        case Format::Q2_K: return multiply_quantised<Format::Q2_K>(p, row0, row1, tile0, tile1);
        case Format::Q3_K: return multiply_quantised<Format::Q3_K>(p, row0, row1, tile0, tile1);
        case Format::Q4_K: return multiply_quantised<Format::Q4_K>(p, row0, row1, tile0, tile1);
        case Format::Q5_K: return multiply_quantised<Format::Q5_K>(p, row0, row1, tile0, tile1);
        case Format::Q6_K: return multiply_quantised<Format::Q6_K>(p, row0, row1, tile0, tile1);
        case Format::IQ4_NL: return multiply_quantised<Format::IQ4_NL>(p, row0, row1, tile0, tile1);
        case Format::Q8_0_APART: return multiply_quantised<Format::Q8_0_APART>(p, row0, row1, tile0, tile1);
        case Format::F32: return multiply_float<Format::F32>(p, row0, row1, tile0, tile1);
        case Format::F16: return multiply_float<Format::F16>(p, row0, row1, tile0, tile1);
        case Format::BF16: return multiply_float<Format::BF16>(p, row0, row1, tile0, tile1);
    }
}

}  // namespace
}  // namespace headrace::HEADRACE_ISA
