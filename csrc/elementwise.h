// Work on single rows of float32.
#pragma once

#include <cstdint>

#include "isa.h"

namespace headrace {

// The greatest value of a row seen so far, and the lowest id that has it. `finite` falls to NaN where a value is infinite or NaN.
struct Best {
    float value;
    int32_t id;
    float finite;
};
constexpr Best kNoBest{-__builtin_inff(), -1, 0.0f};

struct RowKernels {
    // y = x / sqrt(mean(x^2) + eps) * weight; x^2 is summed in 64 lanes, ascending, then halving. y may be x.
    void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* y);
    // cos and sin of position * inv_freq (a float32 product), times scale: [half] and [half].
    void (*rope_angles)(int32_t position, const float* inv_freq, float scale, int half, float* cos_sin);
    // Rotates pairs (i, i + half) of one head; the rest of head_dim is copied. y may be x.
    void (*rope)(const float* x, const float* cos_sin, int half, int head_dim, float* y);
    // gate / (1 + e^-gate) * up. y may be either.
    void (*silu_mul)(const float* gate, const float* up, int n, float* y);
    void (*add)(const float* x, const float* y, int n, float* out);
    // Takes in n more values of a row, whose ids start at `first`.
    void (*best)(const float* x, int n, int32_t first, Best& best);
};
const RowKernels& row_kernels(Isa isa);

}  // namespace headrace
