#include "matrix.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <utility>

#include "matrix_layout.h"

// Packing is written for any layout and compiled for each: what takes a Layout is inlined where it is a constant.
#define HEADRACE_INLINE inline __attribute__((always_inline))

namespace headrace {
namespace {

HEADRACE_INLINE float half_to_float(uint16_t h) {
    const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
        const float value = float(mantissa) * 0x1p-24f;
        return sign ? -value : value;
    }
    const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float bfloat_to_float(uint16_t b) {
    const uint32_t bits = uint32_t(b) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

uint16_t load16(const uint8_t* p) { return uint16_t(p[0] | p[1] << 8); }

// 16 bytes at once, in any compiler's own registers: loops over bytes are often left as they are.
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint64_t Words __attribute__((vector_size(16)));

HEADRACE_INLINE Bytes load_bytes(const uint8_t* p) {
    Bytes bytes;
    std::memcpy(&bytes, p, 16);
    return bytes;
}

HEADRACE_INLINE void store_bytes(uint8_t* p, Bytes bytes) { std::memcpy(p, &bytes, 16); }
HEADRACE_INLINE void add_bits(uint8_t* p, Bytes bits) { store_bytes(p, load_bytes(p) | bits); }
HEADRACE_INLINE Bytes smaller(Bytes a, Bytes b) { return a < b ? a : b; }

// A block of the file, or a superblock's row of a tile: codes and scales as the layout stores them.
struct Block {
    uint8_t codes[256];          // as stored: code + 128 for Q8_0, indices for IQ4_NL
    uint16_t d[8], m[8];         // fp16, of each group (d, dm), or [0] alone (K formats)
    uint8_t scale[16], min[16];  // K formats: of each group, or half group
};

constexpr int block_bytes(Format format) {
    switch (format) {
        case Format::F32: return 4;
        case Format::F16: case Format::BF16: return 2;
        case Format::Q4_0: case Format::IQ4_NL: return 18;
        case Format::Q4_1: return 20;
        case Format::Q5_0: return 22;
        case Format::Q5_1: return 24;
        case Format::Q8_0: case Format::Q8_0_APART: return 34;
        case Format::Q2_K: return 84;
        case Format::Q3_K: return 110;
        case Format::Q4_K: return 144;
        case Format::Q5_K: return 176;
        case Format::Q6_K: return 210;
    }
    return 0;
}

// ---- reading the file's blocks (the GGUF definitions)

// `count` nibbles low, then as many high ones.
HEADRACE_INLINE void read_nibbles(const uint8_t* q, int count, uint8_t* codes) {
    for (int j = 0; j < count; j += 16) {
        const Bytes both = load_bytes(q + j);
        store_bytes(codes + j, both & 15), store_bytes(codes + count + j, both >> 4);
    }
}

// Bit j is added to code j, as its fifth.
HEADRACE_INLINE void read_high_bits(const uint8_t* q, uint8_t* codes) {
    constexpr Bytes bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
    for (int j = 0; j < 32; j += 16) {
        const Bytes of_each = (Bytes)(Words{q[j / 8], q[j / 8 + 1]} * 0x0101010101010101u);
        add_bits(codes + j, (Bytes)((of_each & bit) != 0) & 16);
    }
}

// The K formats' 256 codes of two bits: 32 in the lowest bits of 32 bytes, 32 in the next, and the second 128 in 32 bytes more.
HEADRACE_INLINE Bytes two_bits(const uint8_t* q, int k) { return load_bytes(q + k / 128 * 32 + k % 32) >> (k % 128 / 32 * 2) & 3; }

// And one more bit of each: 32 in the lowest bits of 32 bytes, and so on.
HEADRACE_INLINE Bytes one_bit(const uint8_t* q, int k) { return load_bytes(q + k % 32) >> (k / 32) & 1; }

// The 6-bit scales and minima of Q4_K and Q5_K: 12 bytes.
HEADRACE_INLINE void read_scales_and_mins(const uint8_t* p, Block& block) {
    for (int j = 0; j < 4; j++) {
        block.scale[j] = p[j] & 63, block.min[j] = p[j + 4] & 63;
        block.scale[j + 4] = (p[j + 8] & 15) | (p[j] >> 6) << 4, block.min[j + 4] = p[j + 8] >> 4 | (p[j + 4] >> 6) << 4;
    }
}

HEADRACE_INLINE void read_block(Format format, const uint8_t* p, Block& block) {
    uint8_t* codes = block.codes;
    switch (format) {
        case Format::Q4_0: case Format::IQ4_NL:
            block.d[0] = load16(p), read_nibbles(p + 2, 16, codes);
            break;
        case Format::Q4_1:
            block.d[0] = load16(p), block.m[0] = load16(p + 2), read_nibbles(p + 4, 16, codes);
            break;
        case Format::Q5_0:
            block.d[0] = load16(p), read_nibbles(p + 6, 16, codes), read_high_bits(p + 2, codes);
            break;
        case Format::Q5_1:
            block.d[0] = load16(p), block.m[0] = load16(p + 2), read_nibbles(p + 8, 16, codes), read_high_bits(p + 4, codes);
            break;
        case Format::Q8_0: case Format::Q8_0_APART:
            block.d[0] = load16(p);
            for (int j = 0; j < 32; j += 16) store_bytes(codes + j, load_bytes(p + 2 + j) ^ 128);
            break;
        case Format::Q2_K:  // 16 scale bytes, 64 of codes, d, dmin
            std::memcpy(block.scale, p, 16);
            block.d[0] = load16(p + 80), block.m[0] = load16(p + 82);
            for (int k = 0; k < 256; k += 16) store_bytes(codes + k, two_bits(p + 16, k));
            break;
        case Format::Q3_K: {  // 32 bytes of high bits, 64 of low ones, 12 of scales, d
            block.d[0] = load16(p + 108);
            for (int k = 0; k < 256; k += 16) store_bytes(codes + k, two_bits(p + 32, k) | one_bit(p, k) << 2);
            const uint8_t* s = p + 96;
            for (int j = 0; j < 16; j++) {
                const int low = j < 8 ? s[j] & 15 : s[j - 8] >> 4, high = s[8 + j % 4] >> (j / 4 * 2) & 3;
                block.scale[j] = uint8_t((low | high << 4) - 32);
            }
            break;
        }
        case Format::Q4_K: case Format::Q5_K: {  // d, dmin, 12 bytes of scales, (32 of high bits,) 128 of nibbles
            block.d[0] = load16(p), block.m[0] = load16(p + 2);
            read_scales_and_mins(p + 4, block);
            const uint8_t* nibbles = p + (format == Format::Q5_K ? 48 : 16);
            for (int k = 0; k < 256; k += 64) read_nibbles(nibbles + k / 2, 32, codes + k);
            for (int k = 0; format == Format::Q5_K && k < 256; k += 16) add_bits(codes + k, one_bit(p + 16, k) << 4);
            break;
        }
        case Format::Q6_K:  // 128 bytes of nibbles, 64 of high bits, 16 scales, d
            std::memcpy(block.scale, p + 192, 16);
            block.d[0] = load16(p + 208);
            for (int k = 0; k < 256; k += 128) read_nibbles(p + k / 2, 64, codes + k);
            for (int k = 0; k < 256; k += 16) add_bits(codes + k, two_bits(p + 128, k) << 4);
            break;
        default: break;
    }
}

// ---- values

HEADRACE_INLINE float code_value(const Layout& layout, int code) { return float((layout.table ? int(iq4_nl_codes[code]) : code) - layout.offset); }

// The scale and minimum of group `group` (of the block), half `half`, as float: exact.
HEADRACE_INLINE void group_scale(const Layout& layout, const Block& block, int group, int half, float& d, float& m) {
    const int at = layout.halves ? 2 * group + half : group;
    m = 0;
    switch (layout.scales) {
        case Scales::d: d = half_to_float(block.d[group]); return;
        case Scales::dm: d = half_to_float(block.d[group]), m = half_to_float(block.m[group]); return;
        case Scales::k:
            d = half_to_float(block.d[0]) * float(layout.signed_scales ? int(int8_t(block.scale[at])) : int(block.scale[at]));
            return;
        case Scales::k_min:
            d = half_to_float(block.d[0]) * float(block.scale[at]), m = -(half_to_float(block.m[0]) * float(block.min[at]));
            return;
        case Scales::k_nibbles:
            d = half_to_float(block.d[0]) * float(block.scale[at] & 15), m = -(half_to_float(block.m[0]) * float(block.scale[at] >> 4));
            return;
        default: d = 0;
    }
}

HEADRACE_INLINE void block_values(const Layout& layout, const Block& block, int groups, float* out) {
    for (int group = 0; group < groups; group++)
        for (int half = 0; half < 2; half++) {
            float d, m;
            group_scale(layout, block, group, half, d, m);
            for (int j = 0; j < 16; j++) {
                const int k = group * 32 + half * 16 + j;
                out[k] = d * code_value(layout, block.codes[k]) + m;
            }
        }
}

// ---- one output's part of a superblock, written and read

// Bits [shift, shift + bits) of output n's 32 codes, to and from a plane. The four codes of a quad move as one word.
HEADRACE_INLINE void place_plane(uint8_t* plane, int bits, int shift, int n, const uint8_t* codes) {
    const uint32_t mask = 0x01010101u * uint32_t((1 << bits) - 1);
    uint32_t words[8];
    std::memcpy(words, codes, sizeof words);
    for (int i = 0; i < bits; i++) {
        uint32_t word = 0;
        for (int quad = i; quad < 8; quad += bits) word |= (words[quad] >> shift & mask) << quad / bits * bits;
        std::memcpy(plane + i * 64 + n * 4, &word, 4);
    }
}

HEADRACE_INLINE void read_plane(const uint8_t* plane, int bits, int shift, int n, uint8_t* codes) {
    const uint32_t mask = 0x01010101u * uint32_t((1 << bits) - 1);
    for (int quad = 0; bits && quad < 8; quad++) {
        uint32_t word, before;
        std::memcpy(&word, plane + quad % bits * 64 + n * 4, 4), std::memcpy(&before, codes + 4 * quad, 4);
        word = before | (word >> quad / bits * bits & mask) << shift;
        std::memcpy(codes + 4 * quad, &word, 4);
    }
}

// Of each of a quad's four codes, or of four packed bytes: `count` bits from bit `from` on.
HEADRACE_INLINE uint32_t bits_of(uint32_t word, int from, int count) { return word >> from & 0x01010101u * ((1u << count) - 1); }

// Output n's 32 codes, where three bits are apart, to and from a group's lines and those of the bits apart.
HEADRACE_INLINE void place_with_apart(uint8_t* lines, uint8_t* apart, int n, const uint8_t* codes) {
    uint32_t w[8], of_lines[5], of_apart[3];
    std::memcpy(w, codes, sizeof w);
    for (int i = 0; i < 5; i++) of_lines[i] = bits_of(w[i], 3, 5) << 3;
    for (int i = 0; i < 3; i++) of_lines[i] |= bits_of(w[5 + i], 5, 3), of_apart[i] = bits_of(w[i], 0, 3) | bits_of(w[3 + i], 0, 3) << 3;
    of_lines[3] |= bits_of(w[5], 3, 2) << 1 | bits_of(w[7], 4, 1);
    of_lines[4] |= bits_of(w[6], 3, 2) << 1 | bits_of(w[7], 3, 1);
    of_apart[0] |= bits_of(w[6], 0, 2) << 6;
    of_apart[1] |= bits_of(w[7], 0, 2) << 6;
    of_apart[2] |= bits_of(w[6], 2, 1) << 6 | bits_of(w[7], 2, 1) << 7;
    for (int i = 0; i < 5; i++) std::memcpy(lines + 64 * i + 4 * n, &of_lines[i], 4);
    for (int i = 0; i < 3; i++) std::memcpy(apart + 64 * i + 4 * n, &of_apart[i], 4);
}

HEADRACE_INLINE void read_with_apart(const uint8_t* lines, const uint8_t* apart, int n, uint8_t* codes) {
    uint32_t w[8], of_lines[5], of_apart[3];
    for (int i = 0; i < 5; i++) std::memcpy(&of_lines[i], lines + 64 * i + 4 * n, 4);
    for (int i = 0; i < 3; i++) std::memcpy(&of_apart[i], apart + 64 * i + 4 * n, 4);
    for (int i = 0; i < 5; i++) w[i] = bits_of(of_lines[i], 3, 5) << 3;
    for (int i = 0; i < 3; i++) w[5 + i] = bits_of(of_lines[i], 0, 3) << 5;
    w[5] |= bits_of(of_lines[3], 1, 2) << 3;
    w[6] |= bits_of(of_lines[4], 1, 2) << 3;
    w[7] |= bits_of(of_lines[3], 0, 1) << 4 | bits_of(of_lines[4], 0, 1) << 3;
    for (int i = 0; i < 3; i++) w[i] |= bits_of(of_apart[i], 0, 3), w[3 + i] |= bits_of(of_apart[i], 3, 3);
    w[6] |= bits_of(of_apart[0], 6, 2) | bits_of(of_apart[2], 6, 1) << 2;
    w[7] |= bits_of(of_apart[1], 6, 2) | bits_of(of_apart[2], 7, 1) << 2;
    std::memcpy(codes, w, sizeof w);
}

// Calls visit(packed byte pointer, block field pointer, bytes) for every scale field of output n, group by group.
template <class Visit>
HEADRACE_INLINE void visit_scales(const Layout& layout, uint8_t* super, int n, int first_group, int groups, Block& block, Visit visit) {
    uint8_t* head = super + layout.scales_at();
    uint8_t* rows = head + layout.head_bytes();
    if (layout.head_bytes()) visit(head + 2 * n, &block.d[0], 2);
    if (layout.head_bytes() == 64) visit(head + 32 + 2 * n, &block.m[0], 2);
    const int scales = layout.halves ? 2 : 1;
    for (int g = 0; g < groups; g++) {
        uint8_t* row = rows + (first_group + g) * layout.scale_bytes();
        if (layout.scales == Scales::d || layout.scales == Scales::dm) visit(row + 2 * n, &block.d[g], 2);
        if (layout.scales == Scales::dm) visit(row + 32 + 2 * n, &block.m[g], 2);
        if (layout.head_bytes())
            for (int s = 0; s < scales; s++) visit(row + 16 * s + n, &block.scale[g * scales + s], 1);
        if (layout.scales == Scales::k_min)
            for (int s = 0; s < scales; s++) visit(row + 16 * (scales + s) + n, &block.min[g * scales + s], 1);
    }
}

// `apart`: bits apart, of the first of the groups.
HEADRACE_INLINE void place_block(const Layout& layout, uint8_t* super, uint8_t* apart, int n, int first_group, int groups, Block& block) {
    for (int g = 0; g < groups; g++) {
        uint8_t* planes = super + (first_group + g) * layout.group_bytes();
        if (layout.apart_bits) {
            place_with_apart(planes, apart + g * layout.apart_bytes(), n, block.codes + 32 * g);
            continue;
        }
        place_plane(planes, layout.low_bits, 0, n, block.codes + 32 * g);
        place_plane(planes + 64 * layout.low_bits, layout.high_bits, layout.low_bits, n, block.codes + 32 * g);
    }
    visit_scales(layout, super, n, first_group, groups, block, [](void* packed, void* field, int bytes) { std::memcpy(packed, field, size_t(bytes)); });
}

HEADRACE_INLINE void read_placed(const Layout& layout, const uint8_t* super, const uint8_t* apart, int n, int first_group, int groups, Block& block) {
    for (int g = 0; g < groups; g++) {
        const uint8_t* planes = super + (first_group + g) * layout.group_bytes();
        if (layout.apart_bits) {
            read_with_apart(planes, apart + g * layout.apart_bytes(), n, block.codes + 32 * g);
            continue;
        }
        std::memset(block.codes + 32 * g, 0, 32);
        read_plane(planes, layout.low_bits, 0, n, block.codes + 32 * g);
        read_plane(planes + 64 * layout.low_bits, layout.high_bits, layout.low_bits, n, block.codes + 32 * g);
    }
    visit_scales(layout, const_cast<uint8_t*>(super), n, first_group, groups, block,
                 [](const void* packed, void* field, int bytes) { std::memcpy(field, packed, size_t(bytes)); });
}

// The smallest and the greatest of codes, the smallest being among `low` and what the greatest lacks to 255 among `lacks`.
HEADRACE_INLINE std::pair<int, int> extremes(Bytes low, Bytes lacks) {
    const Words a = (Words)low, b = (Words)lacks;
    Bytes least = smaller((Bytes)Words{a[0], b[0]}, (Bytes)Words{a[1], b[1]});
    for (int bits = 32; bits >= 8; bits /= 2) least = smaller(least, (Bytes)((Words)least >> bits));  // of each word the lowest byte counts
    return {least[0], 255 - least[8]};
}

// The largest |value|: a value grows or falls with its code, so the extreme codes of each scale have it.
HEADRACE_INLINE float largest(const Layout& layout, const Block& block, int groups) {
    float result = 0;
    for (int group = 0; group < groups; group++) {
        const Bytes first = load_bytes(block.codes + 32 * group), second = load_bytes(block.codes + 32 * group + 16);
        for (int half = 0; half <= layout.halves; half++) {
            const Bytes a = half ? second : first, b = layout.halves ? a : second;
            const auto [low, high] = extremes(smaller(a, b), smaller(~a, ~b));
            float d, m;
            group_scale(layout, block, group, half, d, m);
            for (const int code : {low, high}) result = std::max(result, std::fabs(d * code_value(layout, code) + m));
        }
    }
    return result;
}

// Where the codes are stored in the file's own order (16 nibbles bytes, or 32 bytes, of a block of 32): dwords move as they are.
constexpr bool dwords_move(Format format) {
    return format == Format::Q4_0 || format == Format::Q4_1 || format == Format::Q8_0 || format == Format::IQ4_NL;
}

HEADRACE_INLINE void place_dwords(const Layout& layout, uint8_t* super, int n, int first_group, const uint8_t* codes) {
    uint8_t* planes = super + first_group * layout.group_bytes();
    const uint32_t flip = layout.low_bits == 8 ? 0x80808080u : 0;
    for (int i = 0; i < layout.low_bits; i++) {
        uint32_t word;
        std::memcpy(&word, codes + 4 * i, 4);
        word ^= flip;
        std::memcpy(planes + 64 * i + 4 * n, &word, 4);
    }
}

// How far the three bits apart of an output's codes may move its sums, and roundings may: see TileSlack and Reach.
struct Slack {
    double bits = 0, weights = 0;  // squares of norms
    double greatest = 0;           // of |d|

    // One group, whose greatest weight is `most`. From the middle of their range the bits count half an odd number, whose square is 1/4 + 2 T:
    // of T, 0, 1, 3 or 6, there are at most 12 in a byte of two.
    void add(const Block& block, float most) {
        Bytes sums = {};
        for (int k = 0; k < 32; k += 16) {
            const Bytes codes = load_bytes(block.codes + k), away = (codes ^ ((Bytes)((codes & 4) == 0) & 3)) & 3;
            sums += away + (away >> 1) + (away & away >> 1) * 2;
        }
        const Words both = (Words)sums;
        const double d = std::fabs(double(half_to_float(block.d[0]))), size = double(most) + 8 * d;
        const uint64_t all = (both[0] * 0x0101010101010101u >> 56) + (both[1] * 0x0101010101010101u >> 56);
        bits += d * d * (32 * 0.25 + 2.0 * double(all)), weights += 32 * size * size, greatest = std::max(greatest, d);
    }
    // Sums and estimates have at most 3 terms a group, and each term is rounded once for every addition after it and at most 3 times before. The
    // two err apart, and a term is at most 2 * norm of the weights * norm of its part of x, of which Reach covers a quarter.
    void store(int64_t groups, TileSlack& to, int n) const {
        const double roundings = std::sqrt(weights) * double(16 * (3 * groups + 8)) * 0x1p-24;
        to.of_norm[n] = float((std::sqrt(bits) + roundings) * (1 + 0x1p-20));
        to.of_value[n] = float((3.5 * greatest + roundings) * (1 + 0x1p-20));
    }
};

// Groups of 32 inputs in a block of the file.
constexpr int file_groups(const Layout& layout) { return layout.groups == 8 ? 8 : 1; }

template <Format format>
void pack_tile(const PackedMatrix& matrix, const uint8_t* source, const int32_t* row_order, int64_t tile) {
    constexpr Layout layout = layout_of(format);
    uint8_t* packed = matrix.data + size_t(tile) * matrix.tile_bytes;
    uint8_t* apart = matrix.apart + size_t(tile) * matrix.apart_bytes;
    std::memset(packed, 0, matrix.tile_bytes);
    if (layout.apart_bits) std::memset(apart, 0, matrix.apart_bytes);
    const size_t source_bytes = source_row_bytes(format, matrix.cols);
    constexpr int step = block_bytes(format), groups = file_groups(layout);
    const int count = int(std::min<int64_t>(tile_rows, matrix.rows - tile * tile_rows));
    constexpr bool direct = dwords_move(format);
    Block block;
    for (int n = 0; n < count; n++) {
        const int64_t row = tile * tile_rows + n;
        const uint8_t* p = source + size_t(row_order ? row_order[row] : row) * source_bytes;
        float most = 0;
        Slack slack;
        for (int64_t g = 0; g < matrix.cols / 32; g += groups, p += step) {
            uint8_t* super = packed + layout.tile_head_bytes() + g / layout.groups * layout.super_bytes();
            const int first = int(g % layout.groups);
            read_block(format, p, block);
            const float here = largest(layout, block, groups);
            most = std::max(most, here);
            if constexpr (direct) {
                place_dwords(layout, super, n, first, p + step - 4 * layout.low_bits);
                visit_scales(layout, super, n, first, groups, block, [](void* to, void* field, int bytes) { std::memcpy(to, field, size_t(bytes)); });
            } else {
                place_block(layout, super, apart + g * layout.apart_bytes(), n, first, groups, block);
                if constexpr (layout.apart_bits > 0) slack.add(block, here);
            }
        }
        const float step = most / row_steps;
        std::memcpy(packed + 4 * n, &step, 4);
        if constexpr (layout.apart_bits > 0) slack.store(matrix.cols / 32, *reinterpret_cast<TileSlack*>(packed + 64), n);
    }
}

void pack_float_tile(const PackedMatrix& matrix, const uint8_t* source, const int32_t* row_order, int64_t tile) {
    uint8_t* packed = matrix.data + size_t(tile) * matrix.tile_bytes;
    std::memset(packed, 0, matrix.tile_bytes);
    const size_t width = size_t(block_bytes(matrix.format));
    const int count = int(std::min<int64_t>(tile_rows, matrix.rows - tile * tile_rows));
    for (int n = 0; n < count; n++) {
        const int64_t row = tile * tile_rows + n;
        const uint8_t* p = source + size_t(row_order ? row_order[row] : row) * width * size_t(matrix.cols);
        for (int64_t k = 0; k < matrix.cols; k++) {
            const int64_t at = matrix.format == Format::BF16 ? (k / 2 * tile_rows + n) * 2 + k % 2 : k * tile_rows + n;
            std::memcpy(packed + size_t(at) * width, p + size_t(k) * width, width);
        }
    }
}

size_t tile_size(Format format, int64_t cols) {
    if (format == Format::BF16) return size_t((cols + 1) / 2) * 64;
    if (is_float(format)) return (size_t(cols) * size_t(block_bytes(format)) * tile_rows + 63) / 64 * 64;
    const Layout layout = layout_of(format);
    return size_t(layout.tile_head_bytes()) + size_t((cols / 32 + layout.groups - 1) / layout.groups) * size_t(layout.super_bytes());
}

// Of a tile.
size_t apart_size(Format format, int64_t cols) {
    const Layout layout = layout_of(format);
    return size_t((cols / 32 + layout.groups - 1) / layout.groups) * size_t(layout.groups * layout.apart_bytes());
}

}  // namespace

const char* format_name(Format format) {
    static constexpr const char* names[format_count] = {"F32",  "F16",  "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1",
                                                        "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "Q8_0_APART"};
    return names[int(format)];
}

int64_t block_cols(Format format) {
    if (is_float(format)) return 1;
    return 32 * file_groups(layout_of(format));
}

size_t source_row_bytes(Format format, int64_t cols) { return size_t(cols / block_cols(format)) * size_t(block_bytes(format)); }

Recipe recipe_of(Format format, Recipe quantised) {
    if (format == Format::BF16) return Recipe::bf16;
    return is_float(format) ? Recipe::f32 : quantised;
}

Recipe quantised_recipe(const std::string& name) {
    if (name == "group") return Recipe::group;
    if (name == "shifted") return Recipe::shifted;
    if (name == "row") return Recipe::row;
    throw std::invalid_argument("unknown recipe '" + name + "'");
}

size_t packed_bytes(Format format, int64_t rows, int64_t cols) { return packed_matrix(format, rows, cols, nullptr).bytes(); }

PackedMatrix packed_matrix(Format format, int64_t rows, int64_t cols, void* data) {
    PackedMatrix matrix{format, rows, cols, static_cast<uint8_t*>(data), tile_size(format, cols), nullptr, apart_size(format, cols)};
    if (data) matrix.apart = matrix.data + size_t(matrix.tiles()) * matrix.tile_bytes;
    return matrix;
}

namespace {

// Calls f.operator()<format>() for a quantised format.
template <class F>
void with_format(Format format, F&& f) {
    switch (format) {
        case Format::Q4_0: return f.template operator()<Format::Q4_0>();
        case Format::Q4_1: return f.template operator()<Format::Q4_1>();
        case Format::Q5_0: return f.template operator()<Format::Q5_0>();
        case Format::Q5_1: return f.template operator()<Format::Q5_1>();
        case Format::Q8_0: return f.template operator()<Format::Q8_0>();
        case Format::Q2_K: return f.template operator()<Format::Q2_K>();
        case Format::Q3_K: return f.template operator()<Format::Q3_K>();
        case Format::Q4_K: return f.template operator()<Format::Q4_K>();
        case Format::Q5_K: return f.template operator()<Format::Q5_K>();
        case Format::Q6_K: return f.template operator()<Format::Q6_K>();
        case Format::IQ4_NL: return f.template operator()<Format::IQ4_NL>();
        case Format::Q8_0_APART: return f.template operator()<Format::Q8_0_APART>();
        default: return;
    }
}

void unpack_float_row(const PackedMatrix& matrix, const uint8_t* packed, int n, float* out) {
    for (int64_t k = 0; k < matrix.cols; k++) {
        const int64_t at = matrix.format == Format::BF16 ? (k / 2 * tile_rows + n) * 2 + k % 2 : k * tile_rows + n;
        if (matrix.format == Format::F32) std::memcpy(out + k, packed + 4 * at, 4);
        else if (matrix.format == Format::F16) out[k] = half_to_float(load16(packed + 2 * at));
        else out[k] = bfloat_to_float(load16(packed + 2 * at));
    }
}

}  // namespace

void pack(const PackedMatrix& matrix, const uint8_t* source, const int32_t* row_order, int64_t tile0, int64_t tile1) {
    for (int64_t tile = tile0; tile < tile1; tile++) {
        if (is_float(matrix.format)) pack_float_tile(matrix, source, row_order, tile);
        else with_format(matrix.format, [&]<Format format>() { pack_tile<format>(matrix, source, row_order, tile); });
    }
}

void unpack_row(const PackedMatrix& matrix, int64_t row, float* out) {
    const uint8_t* packed = matrix.data + size_t(row / tile_rows) * matrix.tile_bytes;
    const uint8_t* apart = matrix.apart + size_t(row / tile_rows) * matrix.apart_bytes;
    const int n = int(row % tile_rows);
    if (is_float(matrix.format)) return unpack_float_row(matrix, packed, n, out);
    with_format(matrix.format, [&]<Format format>() {
        constexpr Layout layout = layout_of(format);
        constexpr int groups = file_groups(layout);
        Block block;
        for (int64_t g = 0; g < matrix.cols / 32; g += groups) {
            const uint8_t* super = packed + layout.tile_head_bytes() + g / layout.groups * layout.super_bytes();
            read_placed(layout, super, apart + g * layout.apart_bytes(), n, int(g % layout.groups), groups, block);
            block_values(layout, block, groups, out + 32 * g);
        }
    });
}

namespace {
int64_t row_size(Recipe recipe, int64_t cols) {
    switch (recipe) {
        // An odd number of lines: rows are read side by side, and lines a power of two apart drive each other out of the L1 cache.
        case Recipe::group: case Recipe::shifted: return ((cols / 32 * int64_t(sizeof(GroupBlock)) + 63) / 64 | 1) * 64;
        case Recipe::row: return int64_t(sizeof(RowHead)) + (cols + 63) / 64 * 64;
        case Recipe::bf16: return (cols + 31) / 32 * 64;
        case Recipe::f32: return (cols + 15) / 16 * 64;
    }
    return 0;
}
}  // namespace

size_t activation_bytes(Recipe recipe, int64_t rows, int64_t cols) { return size_t(rows) * size_t(row_size(recipe, cols)); }

Activation activation(Recipe recipe, int64_t rows, int64_t cols, void* data) {
    return {recipe, rows, cols, static_cast<uint8_t*>(data), row_size(recipe, cols)};
}

Reach screening_reach(const Activation& activation, int64_t row) {
    const GroupBlock* blocks = reinterpret_cast<const GroupBlock*>(activation.row(row));
    const int64_t groups = activation.cols / 32;
    double squares = 0, parts = 0;  // squares of the norms of code * scale + offset, and of what is added in parts: codes * scale, and offsets
    double outliers = 0;
    // Values of at most `limit` in size count for the norm, greater ones as outliers.
    auto split = [&](double limit) {
        squares = outliers = 0;
        for (int64_t g = 0; g < groups; g++) {
            const double scale = blocks[g].scale, offset = blocks[g].offset;
            const int most = int(std::clamp(std::floor((limit - offset) / scale), -121.0, 120.0)), least = int(std::clamp(std::ceil((-limit - offset) / scale), -120.0, 121.0));
            int over = 0, under = 0, sum_over = 0, sum_under = 0, sum = 0, of_codes = 0;
            for (const int code : blocks[g].codes) {
                const bool is_over = code > most, is_under = code < least;
                const int inside = is_over || is_under ? 0 : code;
                over += is_over, under += is_under, sum_over += is_over ? code : 0, sum_under += is_under ? code : 0;
                sum += inside, of_codes += inside * inside;
            }
            outliers += scale * (sum_over - sum_under) + offset * (over - under);
            squares += std::max(scale * scale * of_codes + 2 * scale * offset * sum + (32 - over - under) * offset * offset, 0.0);
        }
    };
    for (int64_t g = 0; g < groups; g++) {
        const GroupBlock& block = blocks[g];
        int32_t sum = 0, of_codes = 0;
        for (const int8_t code : block.codes) sum += code, of_codes += code * code;
        const double scale = block.scale, offset = block.offset;
        squares += std::max(scale * scale * of_codes + 2 * scale * offset * sum + 32 * offset * offset, 0.0);  // NaN stays NaN
        parts += std::pow(scale * std::sqrt(double(of_codes)) + std::sqrt(32.0) * std::fabs(offset), 2);
    }
    if (!(squares < 1e30)) return {float(std::sqrt(squares)), 0};
    // A weight's bits are off by 3.5 at most and by 2.3 in the mean. So an outlier costs 3.5 of its size, and in the norm about 2.3 / 2 of its
    // square over the mean (of squares, rooted): the same at 3 times that mean.
    for (int round = 0; round < 2; round++) split(3 * std::sqrt(squares / double(activation.cols)));
    constexpr double up = 1 + 0x1p-20;
    return {float(std::max(std::sqrt(squares), std::sqrt(parts) / 4 - outliers) * up), float(outliers * up)};
}

namespace avx512 { extern const Kernels table; }
namespace avx2 { extern const Kernels table; }
namespace portable { extern const Kernels table; }

const Kernels& kernels(Isa isa) {
#if defined(__x86_64__)
    if (isa == Isa::avx512) return avx512::table;
    if (isa == Isa::avx2) return avx2::table;
#endif
    (void)isa;
    return portable::table;
}

}  // namespace headrace
