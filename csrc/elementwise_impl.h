// Row kernels for one instruction set: included by elementwise_<isa>.cpp, which sets HEADRACE_ISA.
#pragma once

#include "elementwise.h"
#include "simd.h"

namespace headrace::HEADRACE_ISA {
namespace {

inline int lanes_left(int n, int i) { return n - i < kLanes ? n - i : kLanes; }

// Sum of what `f` adds to a lane for each value of x.
template <class F>
inline float sum_over(const float* x, int n, F f) {
    Floats parts[4] = {zero(), zero(), zero(), zero()};
    int i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes)
        for (int j = 0; j < 4; ++j) parts[j] = f(parts[j], load(x + i + j * kLanes));
    for (int j = 0; i < n; i += kLanes, ++j) {
        const int left = lanes_left(n, i);
        parts[j] = keep(f(parts[j], load_first(x + i, left)), 0, left, parts[j]);
    }
    return sum((parts[0] + parts[2]) + (parts[1] + parts[3]));
}

// y = f(vector of x, index of its first value, how many there are).
template <class F>
inline void map(const float* x, int n, float* y, F f) {
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(y + i, f(load(x + i), i, kLanes));
    if (i < n) store_first(y + i, f(load_first(x + i, n - i), i, n - i), n - i);
}

inline Floats load_some(const float* p, int n) { return n == kLanes ? load(p) : load_first(p, n); }
inline void store_some(float* p, Floats x, int n) {
    if (n == kLanes) store(p, x);
    else store_first(p, x, n);
}

void rms_norm(const float* x, const float* weight, float eps, int n, float* y) {
    const float mean = sum_over(x, n, [](Floats acc, Floats v) { return fma(v, v, acc); }) / float(n);
    const Floats factor = all(1.0f / std::sqrt(mean + eps));
    map(x, n, y, [&](Floats v, int i, int count) { return v * factor * load_some(weight + i, count); });
}

void layer_norm(const float* x, const float* weight, const float* bias, float eps, int n, float* y) {
    const Floats mean = all(sum_over(x, n, [](Floats acc, Floats v) { return acc + v; }) / float(n));
    const float variance = sum_over(x, n, [&](Floats acc, Floats v) { return fma(v - mean, v - mean, acc); }) / float(n);
    const Floats factor = all(1.0f / std::sqrt(variance + eps));
    map(x, n, y, [&](Floats v, int i, int count) {
        const Floats scaled = (v - mean) * factor * load_some(weight + i, count);
        return bias == nullptr ? scaled : scaled + load_some(bias + i, count);
    });
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
        const Floats cos = load_some(cos_sin + i, n), sin = load_some(cos_sin + half + i, n);
        const Floats first = load_some(x + i, n), second = load_some(x + half + i, n);
        store_some(y + i, first * cos - second * sin, n);
        store_some(y + half + i, second * cos + first * sin, n);
    }
    if (y != x && 2 * half < head_dim) std::memcpy(y + 2 * half, x + 2 * half, size_t(head_dim - 2 * half) * 4);
}

inline Floats sigmoid(Floats x) { return all(1.0f) / (all(1.0f) + exp2(min(all(127.0f), x * all(-kLog2E)))); }
inline Floats silu(Floats x) { return x / (all(1.0f) + exp2(min(all(127.0f), x * all(-kLog2E)))); }

// (x + |x| erf(|x| / sqrt 2)) / 2, erf within 1.5e-7 (Abramowitz & Stegun 1964, 7.1.26).
inline Floats gelu(Floats x) {
    const Floats a = absolute(x) * all(0.70710678118654752f), t = all(1.0f) / fma(all(0.3275911f), a, all(1.0f));
    Floats p = all(1.061405429f);
    p = fma(p, t, all(-1.453152027f));
    p = fma(p, t, all(1.421413741f));
    p = fma(p, t, all(-0.284496736f));
    p = fma(p, t, all(0.254829592f));
    const Floats erf = all(1.0f) - p * t * exp2(a * a * all(-kLog2E));
    return all(0.5f) * (x + absolute(x) * erf);
}

// x (1 + tanh u) / 2 = x sigmoid(2u)
inline Floats gelu_tanh(Floats x) {
    const Floats u = all(0.79788456080286536f) * fma(all(0.044715f) * x * x, x, x);
    return x * sigmoid(u + u);
}

inline Floats relu(Floats x) { return max(zero(), x); }  // keeps a NaN

// Calls f with the function of a kind.
template <class F>
inline void with_activation(ActivationKind kind, F f) {
    switch (kind) {
        case ActivationKind::silu: return f([](Floats x) { return silu(x); });
        case ActivationKind::gelu: return f([](Floats x) { return gelu(x); });
        case ActivationKind::gelu_tanh: return f([](Floats x) { return gelu_tanh(x); });
        case ActivationKind::relu: return f([](Floats x) { return relu(x); });
        case ActivationKind::relu2: return f([](Floats x) { return relu(x) * relu(x); });
    }
}

void activate(ActivationKind kind, const float* x, int n, float* y) {
    with_activation(kind, [&](auto function) { map(x, n, y, [&](Floats v, int, int) { return function(v); }); });
}

void glu(ActivationKind kind, const float* gate, const float* up, int n, float* y) {
    with_activation(kind, [&](auto function) { map(gate, n, y, [&](Floats v, int i, int count) { return function(v) * load_some(up + i, count); }); });
}

void cap(const float* x, float factor, float cap, int n, float* y) {
    const Floats to_exponent = all(2 * kLog2E * factor / cap);  // tanh(t) = 1 - 2 / (1 + e^2t)
    if (cap > 0)
        map(x, n, y, [&](Floats v, int, int) { return (all(1.0f) - all(2.0f) / (all(1.0f) + exp2(min(all(64.0f), v * to_exponent)))) * all(cap); });
    else
        map(x, n, y, [&](Floats v, int, int) { return v * all(factor); });
}

void add(const float* x, const float* y, float factor, int n, float* out) {
    map(x, n, out, [&](Floats v, int i, int count) { return v + load_some(y + i, count) * all(factor); });
}

void sum_parts(const float* const* parts, int count, const float* residual, int n, float* out) {
    map(parts[0], n, out, [&](Floats v, int i, int lanes) {
        for (int part = 1; part < count; ++part) v = v + load_some(parts[part] + i, lanes);
        return residual == nullptr ? v : v + load_some(residual + i, lanes);
    });
}

void best(const float* x, int n, int32_t first, Best& best) {
    Floats top[2] = {all(best.value), all(best.value)}, check[2] = {zero(), zero()};  // two chains: one would wait for itself
    auto look_at = [&](int chain, Floats v) { top[chain] = max(top[chain], v), check[chain] = fma(v, zero(), check[chain]); };
    int i = 0;
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) look_at(0, load(x + i)), look_at(1, load(x + i + kLanes));
    if (i + kLanes <= n) look_at(0, load(x + i)), i += kLanes;
    float greatest_value = greatest(max(top[0], top[1])), not_finite = sum(check[0] + check[1]);
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
    static constexpr RowKernels table{rms_norm, layer_norm, rope_angles, rope, activate, glu, cap, add, sum_parts, best};
    return table;
}

}  // namespace headrace::HEADRACE_ISA
