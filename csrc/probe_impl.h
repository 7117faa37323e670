// Loops of the probes for one instruction set: included by probe_<isa>.cpp, which sets HEADRACE_ISA.
#pragma once

#include <cstddef>
#include <cstdint>
#include <initializer_list>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace headrace::HEADRACE_ISA {

// Reads `bytes` (a multiple of 512); the result only keeps the reads alive.
uint64_t probe_read(const uint8_t* data, size_t bytes) {
#if defined(__AVX512F__)
    __m512i sums[8] = {};
    for (size_t i = 0; i < bytes; i += 512)
        for (int j = 0; j < 8; ++j) sums[j] = _mm512_xor_si512(sums[j], _mm512_load_si512(data + i + 64 * j));
    for (int j = 1; j < 8; ++j) sums[0] = _mm512_xor_si512(sums[0], sums[j]);
    return uint64_t(_mm512_reduce_or_epi64(sums[0]));
#else
    uint64_t sums[16] = {};
    for (size_t i = 0; i < bytes; i += 128)
        for (int j = 0; j < 16; ++j) sums[j] ^= ((const uint64_t*)(data + i))[j];
    for (int j = 1; j < 16; ++j) sums[0] |= sums[j];
    return sums[0];
#endif
}

// Runs `rounds` rounds of int8 products and returns the operations in a round. The sums are kept apart by hand: a compiler that sees that
// they are all equal computes one.
int probe_int8(int rounds, int32_t* out) {
#if defined(__AVX512VNNI__)
    __m512i a{}, b{}, c{}, d{}, e{}, f{}, g{}, h{}, x = _mm512_set1_epi8(3), y = _mm512_set1_epi8(5);
    for (int i = 0; i < rounds; ++i) {
        for (__m512i* sum : {&a, &b, &c, &d, &e, &f, &g, &h}) *sum = _mm512_dpbusd_epi32(*sum, x, y);
        asm volatile("" : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h));
    }
    *out = _mm512_reduce_add_epi32(a + b + c + d + e + f + g + h);
    return 8 * 64 * 2;
#elif defined(__AVX2__)
    __m256i a{}, b{}, c{}, d{}, x = _mm256_set1_epi8(3), y = _mm256_set1_epi8(5);
    const __m256i ones = _mm256_set1_epi16(1);
    for (int i = 0; i < rounds; ++i)
        for (__m256i* sum : {&a, &b, &c, &d}) {
            asm volatile("" : "+x"(x), "+x"(y));
            *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(_mm256_maddubs_epi16(x, y), ones));
        }
    *out = _mm256_extract_epi32(a + b + c + d, 0);
    return 4 * 32 * 2;
#else
    int8_t x[64];
    for (int j = 0; j < 64; ++j) x[j] = int8_t(j);
    int32_t sums[16] = {};
    for (int i = 0; i < rounds; ++i) {
        for (int j = 0; j < 64; ++j) sums[j % 16] += int32_t(x[j]) * int32_t(int8_t(i));
        asm volatile("" : : "r"(x) : "memory");
    }
    *out = sums[0];
    for (int j = 1; j < 16; ++j) *out += sums[j];
    return 64 * 2;
#endif
}

}  // namespace headrace::HEADRACE_ISA
