// Matrix products y = x W^T: packed weights, activations prepared once per product input, and one family of kernels.
//
// Use:  pack() the file's rows into a PackedMatrix (any thread, disjoint ranges of tiles); quantise_row() each row of x into an
// Activation (the caller may do it inside its norm); multiply() any ranges of rows and tiles, from any thread.
//
// A tile is 16 outputs. Every y[row][n] is summed in one order, whatever the ranges, the number of rows and the thread:
//
//   Recipe::group  (all quantised weights) per group of 32 inputs. Activation: scale s = max|x| * (1 / 120f), kept in 2^-64..2^64;
//                  codes = round-half-even(x * (1 / s)), from -120 to 120. For groups ascending:
//                      acc = fma(m, s * sum of codes, acc)                  where the format has a minimum m
//                      acc = fma(d * s, sum of (q - offset) * code, acc)
//                  Q4_1 and Q4_K take 8 for their offset and fma(8, d, m) for m. Formats with 16-wide groups (Q2_K, Q3_K, Q6_K) do so for
//                  each half, both minima first. The integer sums are exact: the result has the same bits on every instruction set.
//   Recipe::shifted as group, but the codes are of x - o, o being the middle of the group's range, 0.5 * (max x + min x): half the error where
//                  a group has outliers, for a tenth more time. Before a group's other sums, acc = fma(W, o, acc), where W is the sum of
//                  the group's weights: d * (sum of (q - offset)), or fma(d, that, 32 * m); with halves fma(d1, sum1, d0 * sum0), or
//                  fma(d1, sum1, fma(d0, sum0, 16 * (m0 + m1))).
//   Recipe::row    (opt-in, all quantised weights) Activation: one scale a row, s = max|x| * (1 / 127f); codes as above, to 127. Weights: int8 too, the
//                  file's values in steps of their row's D = max|w| / 126: with f = round(d * (256 / D)) and
//                  a = round(m * (256 / D)) - offset * f, w8 = floor((q * f + a + 128) / 256). y = float(sum of w8 * code) * (D * s).
//                  The same bits everywhere.
//   Recipe::bf16   (BF16 weights) x rounded to bfloat16; pairs of products are summed as the instruction does it. Bits differ between
//                  instruction sets, not between calls.
//   Recipe::f32    (F32, F16 weights) acc = fma(x, w, acc), inputs ascending. The same bits everywhere.
//
// Then y = acc (+ bias) (+ what y held), each rounded once.
//
// Where only the greatest of a row's results is asked for, not all bits of the weights need be read. Q8_0_APART keeps Q8_0's codes with their
// three lowest bits apart: screen() bounds a tile's results by the other five, and a tile without the greatest need not be multiplied.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "isa.h"

namespace headrace {

enum class Format : uint8_t { F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, Q8_0_APART };

constexpr int format_count = 15;
const char* format_name(Format format);

enum class Recipe : uint8_t { group, shifted, row, bf16, f32 };

constexpr int64_t tile_rows = 16;

// ---- weights

// Inputs a block of the file holds: cols must be a multiple of it (1 for F32, F16, BF16).
int64_t block_cols(Format format);

// The form for a weight whose greatest result is often all that is asked for, where the file has `format`; `format` itself if there is none.
constexpr Format screened_format(Format format) { return format == Format::Q8_0 ? Format::Q8_0_APART : format; }

// Bytes of one row of `cols` weights in the file.
size_t source_row_bytes(Format format, int64_t cols);

// The recipe that goes with a format, where `quantised` (group, shifted or row) is wanted for the quantised ones.
Recipe recipe_of(Format format, Recipe quantised = Recipe::group);
// "group", "shifted" or "row"; throws std::invalid_argument for other names.
Recipe quantised_recipe(const std::string& name);

struct PackedMatrix {
    Format format;
    int64_t rows;       // outputs
    int64_t cols;       // inputs
    uint8_t* data;      // 64-byte aligned, tiles() * tile_bytes; owned by the caller
    size_t tile_bytes;  // a multiple of 64
    uint8_t* apart;     // bits that a format keeps apart, tiles() * apart_bytes, after the tiles
    size_t apart_bytes; // of a tile, a multiple of 64; 0 for other formats

    int64_t tiles() const { return (rows + tile_rows - 1) / tile_rows; }
    size_t bytes() const { return size_t(tiles()) * (tile_bytes + apart_bytes); }

    // Outputs [first, first + count) as a matrix of their own, in the same memory: several tensors of one format that share an input
    // are packed into one matrix so. `first` must be a multiple of 16, and so must `count` unless it ends the matrix.
    PackedMatrix part(int64_t first, int64_t count) const {
        const size_t tile = size_t(first / tile_rows);
        return {format, count, cols, data + tile * tile_bytes, tile_bytes, apart + tile * apart_bytes, apart_bytes};
    }
};

size_t packed_bytes(Format format, int64_t rows, int64_t cols);
PackedMatrix packed_matrix(Format format, int64_t rows, int64_t cols, void* data);

// Packs tiles [tile0, tile1) from the file's bytes (row-major blocks, no alignment needed). Output n of the matrix is row
// row_order[n] of the file, or row n where row_order is null. The caller has checked sizes and indices.
void pack(const PackedMatrix& matrix, const uint8_t* source, const int32_t* row_order, int64_t tile0, int64_t tile1);

// One row of the matrix as float32 [cols], the file's own values.
void unpack_row(const PackedMatrix& matrix, int64_t row, float* out);

// ---- activations

constexpr int group_code_limit = 120;  // of Recipe::group, Recipe::shifted: with a weight's code of 4 bits added, a code still fits 8 bits

// 32 inputs of one row (Recipe::group, Recipe::shifted).
struct GroupBlock {
    int8_t codes[32];
    float scale;         // s
    float sum;           // s * sum of codes
    int32_t minus8;      // -8 * sum of codes
    int32_t minus8_low;  // -8 * sum of the first 16 codes
    int32_t winograd;    // what pairs of quads need (matrix_kernels.h); 0 where the instruction set has no use for it
    float offset;        // o; 0 in Recipe::group
};

// One row's head (Recipe::row); its codes follow.
struct RowHead {
    float scale;
    int32_t sum;  // of codes
    int32_t unused[14];
};

// Rows of x ready for products, in memory of the caller's (activation_bytes, 64-byte aligned).
//   group, shifted: GroupBlock [rows][cols / 32], rows padded    row: RowHead, int8 codes [cols] for each row
//   bf16:  uint16 [rows][cols, padded to 32 with 0]     f32: float [rows][cols, padded to 16 with 0]
struct Activation {
    Recipe recipe;
    int64_t rows, cols;
    uint8_t* data;
    int64_t row_bytes;

    uint8_t* row(int64_t index) const { return data + index * row_bytes; }
};

size_t activation_bytes(Recipe recipe, int64_t rows, int64_t cols);
Activation activation(Recipe recipe, int64_t rows, int64_t cols, void* data);

// ---- products

struct Product {
    const PackedMatrix* weight;
    const Activation* x;
    float* y;                       // [rows][ldy]; only columns [0, weight->rows) are written
    int64_t ldy;
    const float* bias = nullptr;    // [weight->rows]
    bool accumulate = false;        // add to what y holds
    const uint8_t* next = nullptr;  // packed tiles that the thread reads after these, for prefetches; null: those that follow in memory
};

// What bounds how far the bits apart may move a row's sums (Recipe::group, Recipe::shifted). Of what the product takes for x, the norm of most
// values, as Cauchy and Schwarz have it, and the sum of the few that stand out: of these each counts for what the bits of one weight may be.
struct Reach {
    float norm, outliers;
};

Reach screening_reach(const Activation& activation, int64_t row);
// Whether no sum overflows, and roundings are relative: sums of smaller x may be denormal. False for a NaN.
constexpr bool may_screen(Reach reach) { return reach.norm >= 1e-30f && reach.norm + reach.outliers <= 1e12f; }

struct Kernels {
    Isa isa;
    // Row `row` of the activation from x float32 [cols].
    void (*quantise_row)(const Activation& activation, int64_t row, const float* x);
    // The same of groups [first, first + count) alone, from x float32 [32 * count] (Recipe::group, Recipe::shifted).
    void (*quantise_groups)(const Activation& activation, int64_t row, int64_t first, int64_t count, const float* x);
    // y[row0..row1) for the outputs of tiles [tile0, tile1). No memory is allocated; less than 128 KiB of stack is used. Best cut: few rows,
    // split the tiles; many rows, split either way, in pieces of at least 32 rows and 2 tiles.
    void (*multiply)(const Product& product, int64_t row0, int64_t row1, int64_t tile0, int64_t tile1);
    // Of Q8_0_APART, by Recipe::group or Recipe::shifted: false if all sums of these rows and the tile, as multiply() makes them before it adds
    // anything, are below least[row]. The bits apart are not read, nor y, bias or accumulate. reach[row]: for it `may_screen` must hold.
    bool (*screen)(const Product& product, int64_t row0, int64_t row1, int64_t tile, const Reach* reach, const float* least);
};

// The kernels of an instruction set that runs here (isa_runs).
const Kernels& kernels(Isa isa);

}  // namespace headrace
