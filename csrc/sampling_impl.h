// The loops of sampling over all of a vocabulary, for the compiler to vectorise: no operation may be fused or reordered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace headrace::HEADRACE_ISA {

// exp((logit - best) / temperature) of n logits, as sampling.py's `_weights`; divisor = temperature * ln 2.
void sampling_weights(const float* logits, int n, float best, double divisor, double* out) {
    // Taylor terms of 2^f: ln(2)^k / k! for k = 11..1.
    constexpr double terms[] = {0x1.e8cac7351bb22p-32, 0x1.e4cf5158b8ec7p-28, 0x1.b5253d395e7c1p-24, 0x1.62c0223a5c822p-20,
                                0x1.ffcbfc588b0c5p-17, 0x1.430912f86c786p-13, 0x1.5d87fe78a6730p-10, 0x1.3b2ab6fba4e77p-7,
                                0x1.c6b08d704a0bfp-5, 0x1.ebfbdff82c58ep-3, 0x1.62e42fefa39efp-1};
    constexpr double least = -1000.0, round = 0x1.8p52, tiny = 0x1p-1000;
    const double top = double(best);
    for (int i = 0; i < n; ++i) {
        double x = (double(logits[i]) - top) / divisor;
        x = x > least ? x : least;
        const double whole = x + round;
        x -= whole - round;
        double y = x * terms[0];
        for (int k = 1; k < 11; ++k) y = (y + terms[k]) * x;
        y += 1.0;
        int64_t bits, shift;
        std::memcpy(&bits, &y, 8);
        std::memcpy(&shift, &whole, 8);
        bits += shift << 52;
        std::memcpy(&y, &bits, 8);
        out[i] = y - tiny;
    }
}

// Sums of blocks of 256 weights (the last may be shorter), each one after the other.
void sampling_block_sums(const double* weights, int n, double* sums) {
    constexpr int block = 256, together = 8;
    const int whole = n / block;
    int b = 0;
    for (; b + together <= whole; b += together) {
        double sum[together] = {};
        for (int i = 0; i < block; ++i)
            for (int j = 0; j < together; ++j) sum[j] += weights[size_t(b + j) * block + i];
        for (int j = 0; j < together; ++j) sums[b + j] = sum[j];
    }
    for (; b * block < n; ++b) {
        double sum = 0;
        for (int i = b * block; i < n && i < (b + 1) * block; ++i) sum += weights[i];
        sums[b] = sum;
    }
}

// The greatest of each run of 64 logits.
void sampling_run_maxima(const float* logits, int runs, float* maxima) {
    for (int r = 0; r < runs; ++r) {
        float lanes[16];
        for (int j = 0; j < 16; ++j) lanes[j] = logits[r * 64 + j];
        for (int i = 16; i < 64; i += 16)
            for (int j = 0; j < 16; ++j) lanes[j] = logits[r * 64 + i + j] > lanes[j] ? logits[r * 64 + i + j] : lanes[j];
        float top = lanes[0];
        for (int j = 1; j < 16; ++j) top = lanes[j] > top ? lanes[j] : top;
        maxima[r] = top;
    }
}

}  // namespace headrace::HEADRACE_ISA
