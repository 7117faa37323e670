// Row kernels for one instruction set: included by elementwise_<isa>.cpp, which sets HEADRACE_ISA.
#pragma once

#include "elementwise.h"
#include "simd.h"

namespace headrace::HEADRACE_ISA {
namespace {

inline int lanes_left(int n, int i) { return n - i < kLanes ? n - i : kLanes; }

void rms_norm(const float* x, const float* weight, float eps, int n, float* y) {
    Floats squares[4] = {zero(), zero(), zero(), zero()};
    int i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
        for (int j = 0; j < 4; ++j) {
            const Floats v = load(x + i + j * kLanes);
            squares[j] = fma(v, v, squares[j]);
        }
    for (int j = 0; i < n; i += kLanes, ++j) {
        const Floats v = load_first(x + i, lanes_left(n, i));
        squares[j] = fma(v, v, squares[j]);
    }
    const float mean = sum((squares[0] + squares[2]) + (squares[1] + squares[3])) / float(n);
    const Floats factor = all(1.0f / std::sqrt(mean + eps));
    for (i = 0; i + kLanes <= n; i += kLanes) store(y + i, load(x + i) * factor * load(weight + i));
    if (i < n) store_first(y + i, load_first(x + i, n - i) * factor * load_first(weight + i, n - i), n - i);
}

void rope_angles(int32_t position, const float* inv_freq, float scale, int half, float* cos_sin) {
    for (int i = 0; i < half; ++i) {
        const float angle = float(position) * inv_freq[i];
        cos_sin[i] = std::cos(angle) * scale;
        cos_sin[half + i] = std::sin(angle) * scale;
    }
}

void rope(const float* x, const float* cos_sin, int half, int head_dim, float* y) {
    for (int i = 0; i < half; i += kLanes) {
        const int n = lanes_left(half, i);
        const Floats cos = load_first(cos_sin + i, n), sin = load_first(cos_sin + half + i, n);
        const Floats first = load_first(x + i, n), second = load_first(x + half + i, n);
        store_first(y + i, first * cos - second * sin, n);
        store_first(y + half + i, second * cos + first * sin, n);
    }
    if (y != x && 2 * half < head_dim) std::memcpy(y + 2 * half, x + 2 * half, size_t(head_dim - 2 * half) * 4);
}

inline Floats silu(Floats x) { return x / (all(1.0f) + exp2(min(all(127.0f), x * all(-kLog2E)))); }

void silu_mul(const float* gate, const float* up, int n, float* y) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, silu(load(gate + i)) * load(up + i));
    if (i < n) store_first(y + i, silu(load_first(gate + i, n - i)) * load_first(up + i, n - i), n - i);
}

void add(const float* x, const float* y, int n, float* out) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, load(x + i) + load(y + i));
    if (i < n) store_first(out + i, load_first(x + i, n - i) + load_first(y + i, n - i), n - i);
}

void best(const float* x, int n, int32_t first, Best& best) {
    Floats top = all(best.value), check = zero();
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) {
        const Floats v = load(x + i);
        top = max(top, v);
        check = fma(v, zero(), check);
    }
    float greatest_value = greatest(top), not_finite = sum(check);
    for (; i < n; ++i) {
        greatest_value = x[i] > greatest_value ? x[i] : greatest_value;
        not_finite += x[i] * 0.0f;
    }
    best.finite += not_finite;
    if (!(greatest_value > best.value)) return;
    best.value = greatest_value;
    for (i = 0; i < n; ++i)
        if (x[i] == greatest_value) {
            best.id = first + i;
            return;
        }
}

}  // namespace

const RowKernels& row_table() {
    static constexpr RowKernels table{rms_norm, rope_angles, rope, silu_mul, add, best};
    return table;
}

}  // namespace headrace::HEADRACE_ISA
