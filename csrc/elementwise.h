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

enum class ActivationKind : uint8_t { silu, gelu, gelu_tanh, relu, relu2 };

// Sums over a row are made in 64 lanes, ascending, then by halving.
struct RowKernels {
    // y = x / sqrt(mean(x^2) + eps) * weight. y may be x.
    void (*rms_norm)(const float* x, const float* weight, float eps, int n, float* y);
    // y = (x - mean(x)) / sqrt(variance(x) + eps) * weight + bias; bias may be null. y may be x.
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int n, float* y);
    // cos and sin of position * inv_freq (a float32 product), times scale: [half] and [half].
    void (*rope_angles)(int32_t position, const float* inv_freq, float scale, int half, float* cos_sin);
    // Rotates pairs (i, i + half) of one head; the rest of head_dim is copied. y may be x.
    void (*rope)(const float* x, const float* cos_sin, int half, int head_dim, float* y);
    // y may be x.
    void (*activate)(ActivationKind kind, const float* x, int n, float* y);
    // The activation of gate, times up. y may be either.
    void (*glu)(ActivationKind kind, const float* gate, const float* up, int n, float* y);
    // y = cap * tanh(factor * x / cap), or factor * x where cap is 0. y may be x.
    void (*cap)(const float* x, float factor, float cap, int n, float* y);
    // out = x + factor * y, rounded twice. out may be either.
    void (*add)(const float* x, const float* y, float factor, int n, float* out);
    // out = ((parts[0] + parts[1]) + ...) + residual, which may be null. out may be the residual.
    void (*sum)(const float* const* parts, int count, const float* residual, int n, float* out);
    // Takes in n more values of a row, whose ids start at `first`.
    void (*best)(const float* x, int n, int32_t first, Best& best);
};
const RowKernels& row_kernels(Isa isa);

}  // namespace headrace
