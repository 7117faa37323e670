// How packed tiles are laid out: what pack() writes and the kernels read.
//
// A tile (16 outputs): 16 floats D (quantised formats; see Recipe::row), then superblocks, inputs ascending. Formats with bits apart have 32
// more floats before the superblocks: how far those bits may move each output's sums (TileSlack).
// A superblock: its groups' codes, then its groups' scales, padded to 64 bytes.
// Codes of a group of 32 inputs are bit planes of the 8 quads, quad i being the 64 bytes [output n][j] of input 4i + j. A plane of b bits is
// b x 64 bytes; quad i is in the (i % b)th 64, at bit i / b * b of every byte. 8-bit codes are signed, kept as code + 128.
// With three bits apart, the others of quads 0 to 4 are the high bits of 64 bytes each. These 64 bytes' low bits are, from the highest: in the
// first three bits 7 to 5 of quads 5, 6 and 7; in the fourth bits 4 and 3 of quad 5 and bit 4 of quad 7; in the fifth bits 4 and 3 of quad 6 and
// bit 3 of quad 7. The bits apart of all groups lie in a place of their own after all tiles, 192 bytes each: in 64 bytes those of quads i (lowest)
// and i + 3, and in their two highest bits the lower two of quad 6 (in the first) and of quad 7, and in the third bit 2 of quads 6 and 7.
// Scales are rows of 16, one for each output: fp16 d, or fp16 d and fp16 m, for every group; the K formats have fp16 d (and dmin) once
// and a row of bytes (or two, with 16-wide groups; two more for their minima) for every group.
// Float formats: F32 [input][16], F16 [input][16], BF16 [input pair][16][2], the last pair padded with 0.
#pragma once

#include "matrix.h"

namespace headrace {

enum class Scales : uint8_t { none, d, dm, k, k_min, k_nibbles };  // k_nibbles: scale and minimum share a byte (Q2_K)

// Of each output: what all of its bits apart together may add to a sum, for each unit of the input's norm, and what those of one weight may,
// for each unit of its input. Both cover the roundings of sums and bounds too (see Reach).
struct TileSlack {
    float of_norm[tile_rows], of_value[tile_rows];
};

struct Layout {
    int low_bits = 0, high_bits = 0;
    int apart_bits = 0;  // the lowest of low_bits: kept apart, so that a product of the others need not read them
    int offset = 0;      // the value of a code q is d * (q - offset) - or d * q + m
    int groups = 1;      // of 32, in a superblock
    Scales scales = Scales::none;
    bool halves = false;         // two scales a group
    bool signed_scales = false;  // the K formats' scale bytes
    bool table = false;          // codes index IQ4_NL's values

    constexpr bool has_min() const { return scales == Scales::dm || scales == Scales::k_min || scales == Scales::k_nibbles; }
    constexpr bool nibbles() const { return low_bits == 4 && high_bits == 0 && !table; }  // codes of 0 to 15
    constexpr bool centred() const { return nibbles() && has_min(); }  // d * q + m is multiplied as d * (q - 8) + (m + 8 * d)
    constexpr int tile_head_bytes() const { return apart_bits ? 64 + sizeof(TileSlack) : 64; }  // of the quantised formats
    constexpr int group_bytes() const { return 64 * (low_bits + high_bits - apart_bits); }
    constexpr int apart_bytes() const { return 64 * apart_bits; }  // of a group
    constexpr int head_bytes() const {  // of a superblock's scales, before the groups' bytes
        return scales == Scales::k ? 32 : scales == Scales::k_min || scales == Scales::k_nibbles ? 64 : 0;
    }
    constexpr int scale_bytes() const {  // of a group
        const int rows = halves ? 2 : 1;
        switch (scales) {
            case Scales::d: return 32;
            case Scales::dm: return 64;
            case Scales::k: case Scales::k_nibbles: return 16 * rows;
            case Scales::k_min: return 32 * rows;
            default: return 0;
        }
    }
    constexpr int super_bytes() const { return (groups * (group_bytes() + scale_bytes()) + head_bytes() + 63) / 64 * 64; }
    constexpr int scales_at() const { return groups * group_bytes(); }
};

constexpr Layout layout_of(Format format) {
    switch (format) {
        case Format::Q4_0: return {.low_bits = 4, .offset = 8, .groups = 2, .scales = Scales::d};
        case Format::Q4_1: return {.low_bits = 4, .scales = Scales::dm};
        case Format::Q5_0: return {.low_bits = 4, .high_bits = 1, .offset = 16, .groups = 2, .scales = Scales::d};
        case Format::Q5_1: return {.low_bits = 4, .high_bits = 1, .scales = Scales::dm};
        case Format::Q8_0: return {.low_bits = 8, .offset = 128, .groups = 2, .scales = Scales::d};
        case Format::Q8_0_APART: return {.low_bits = 8, .apart_bits = 3, .offset = 128, .groups = 2, .scales = Scales::d};
        case Format::IQ4_NL: return {.low_bits = 4, .offset = 128, .groups = 2, .scales = Scales::d, .table = true};
        case Format::Q2_K: return {.low_bits = 2, .groups = 8, .scales = Scales::k_nibbles, .halves = true};
        case Format::Q3_K: return {.low_bits = 2, .high_bits = 1, .offset = 4, .groups = 8, .scales = Scales::k, .halves = true, .signed_scales = true};
        case Format::Q4_K: return {.low_bits = 4, .groups = 8, .scales = Scales::k_min};
        case Format::Q5_K: return {.low_bits = 4, .high_bits = 1, .groups = 8, .scales = Scales::k_min};
        case Format::Q6_K: return {.low_bits = 4, .high_bits = 2, .offset = 32, .groups = 8, .scales = Scales::k, .halves = true, .signed_scales = true};
        default: return {};
    }
}

constexpr bool is_float(Format format) { return layout_of(format).scales == Scales::none; }

constexpr float row_steps = 126;  // Recipe::row: a weight row's largest value in steps D; a code's error of one step still fits int8

// IQ4_NL's 16 values, kept + 128 (the format's definition).
constexpr uint8_t iq4_nl_codes[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};

}  // namespace headrace
