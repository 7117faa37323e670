// Vectors of 16 floats for the instruction set that the including file is compiled for. The file sets HEADRACE_ISA (a
// namespace) first. Every operation rounds alike on all of them, so code written in these gives the same bits, with two
// exceptions: `dot` of bfloat16 pairs, `fma`, which is two roundings in portable code, and results below the least normal number.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace headrace::HEADRACE_ISA {

constexpr int kLanes = 16;

// Storage types other than float; both are bit patterns.
struct Half { uint16_t bits; };
struct BFloat { uint16_t bits; };

#if defined(__AVX512BF16__)

struct Floats { __m512 v; };
struct Words { __m512i v; };  // 16 x 32 bits: floats, or pairs of bfloat16 (the lower half first)

inline Floats zero() { return {_mm512_setzero_ps()}; }
inline Floats all(float x) { return {_mm512_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a.v); }
inline Floats load_first(const float* p, int n) { return {_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1), p)}; }
inline void store_first(float* p, Floats a, int n) { _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1), a.v); }
inline Floats load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline Floats load(const BFloat* p) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16))};
}
inline Floats load(const int8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }
inline void store(Half* p, Floats a) { _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(a.v, 0)); }

inline Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
inline Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Floats absolute(Floats a) { return {_mm512_abs_ps(a.v)}; }
inline Floats nearest(Floats a) { return {_mm512_roundscale_ps(a.v, 0)}; }
// a * 2^n for a from 1/2 to 2 and an integer n (as float) up to 127; from -127 down the result is 0 or subnormal.
inline Floats scale2(Floats a, Floats n) { return {_mm512_scalef_ps(a.v, n.v)}; }
// Lanes first..past-1 keep a, the others take y.
inline Floats keep(Floats a, int first, int past, Floats y) {
    const __mmask16 mask = __mmask16(((1u << past) - 1) & ~((1u << first) - 1));
    return {_mm512_mask_blend_ps(mask, y.v, a.v)};
}
inline __m256 halves(Floats a, int which) { return which ? _mm512_extractf32x8_ps(a.v, 1) : _mm512_castps512_ps256(a.v); }

inline Words load_words(const uint32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_words(uint32_t* p, Words a) { _mm512_storeu_si512(p, a.v); }
inline Words all_words(uint32_t x) { return {_mm512_set1_epi32(int(x))}; }
inline Words low_halves(Words a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff))}; }
inline Words operator+(Words a, Words b) { return {_mm512_add_epi32(a.v, b.v)}; }
template <int N>
inline Words shift_left(Words a) { return {_mm512_slli_epi32(a.v, N)}; }
// acc + sum of the four products of a's bytes (unsigned) with b's (signed).
inline Words dot_bytes(Words acc, Words a, Words b) { return {_mm512_dpbusd_epi32(acc.v, a.v, b.v)}; }
inline Floats to_floats(Words a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Words to_ints(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }  // the nearest; below 2^22 in size
// The lowest byte of each word; the lowest of each, and the next of each.
inline void store_bytes(uint8_t* p, Words a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
inline void store_bytes(uint8_t* low, uint8_t* high, Words a) {
    const __m256i order = _mm256_set_epi8(61, 57, 53, 49, 45, 41, 37, 33, 29, 25, 21, 17, 13, 9, 5, 1, 60, 56, 52, 48, 44, 40, 36, 32, 28, 24, 20, 16, 12, 8, 4, 0);
    const __m256i both = _mm512_castsi512_si256(_mm512_permutexvar_epi8(_mm512_castsi256_si512(order), a.v));
    _mm_storeu_si128((__m128i*)low, _mm256_castsi256_si128(both)), _mm_storeu_si128((__m128i*)high, _mm256_extracti128_si256(both, 1));
}
// acc + a * b, for floats, and for pairs of bfloat16.
struct F32Dot {
    static Floats dot(Floats acc, Words a, Words b) { return {_mm512_fmadd_ps(_mm512_castsi512_ps(a.v), _mm512_castsi512_ps(b.v), acc.v)}; }
};
struct BF16Dot {
    static Floats dot(Floats acc, Words a, Words b) { return {_mm512_dpbf16_ps(acc.v, (__m512bh)a.v, (__m512bh)b.v)}; }
};
inline void store(BFloat* p, Floats a) { _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(a.v)); }
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
inline void prefetch_once(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_NTA); }

#elif defined(__AVX2__)

struct Floats { __m256 a, b; };
struct Words { __m256i a, b; };

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats x) { _mm256_storeu_ps(p, x.a), _mm256_storeu_ps(p + 8, x.b); }
inline Floats load_first(const float* p, int n) {
    float whole[kLanes] = {};
    std::memcpy(whole, p, size_t(n) * 4);
    return load(whole);
}
inline void store_first(float* p, Floats x, int n) {
    float whole[kLanes];
    store(whole, x);
    std::memcpy(p, whole, size_t(n) * 4);
}
inline Floats load(const Half* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline __m256 widen(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
inline Floats load(const BFloat* p) {
    return {widen(_mm_loadu_si128((const __m128i*)p)), widen(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline Floats load(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}
inline void store(Half* p, Floats x) {
    _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x.a, 0)), _mm_storeu_si128((__m128i*)(p + 8), _mm256_cvtps_ph(x.b, 0));
}

inline Floats operator+(Floats x, Floats y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
inline Floats operator-(Floats x, Floats y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
inline Floats operator*(Floats x, Floats y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
inline Floats operator/(Floats x, Floats y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
inline Floats fma(Floats x, Floats y, Floats z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
inline Floats max(Floats x, Floats y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
inline Floats min(Floats x, Floats y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }
inline Floats absolute(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.a), _mm256_andnot_ps(sign, x.b)};
}
inline Floats nearest(Floats x) { return {_mm256_round_ps(x.a, 0x8), _mm256_round_ps(x.b, 0x8)}; }
inline __m256 scale2(__m256 x, __m256 n) {
    const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23)));
    return _mm256_and_ps(scaled, _mm256_cmp_ps(n, _mm256_set1_ps(-127), _CMP_GT_OQ));
}
inline Floats scale2(Floats x, Floats n) { return {scale2(x.a, n.a), scale2(x.b, n.b)}; }
inline Floats keep(Floats x, int first, int past, Floats y) {
    const __m256i low = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), high = _mm256_add_epi32(low, _mm256_set1_epi32(8));
    const __m256i before = _mm256_set1_epi32(first - 1), after = _mm256_set1_epi32(past);
    auto pick = [&](__m256 in, __m256 out, __m256i lane) {
        __m256i mask = _mm256_and_si256(_mm256_cmpgt_epi32(lane, before), _mm256_cmpgt_epi32(after, lane));
        return _mm256_blendv_ps(out, in, _mm256_castsi256_ps(mask));
    };
    return {pick(x.a, y.a, low), pick(x.b, y.b, high)};
}
inline __m256 halves(Floats x, int which) { return which ? x.b : x.a; }

inline Words load_words(const uint32_t* p) { return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 8))}; }
inline void store_words(uint32_t* p, Words x) { _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)(p + 8), x.b); }
inline Words all_words(uint32_t x) { return {_mm256_set1_epi32(int(x)), _mm256_set1_epi32(int(x))}; }
inline Words low_halves(Words x) {
    const __m256i mask = _mm256_set1_epi32(0xffff);
    return {_mm256_and_si256(x.a, mask), _mm256_and_si256(x.b, mask)};
}
inline Words operator+(Words x, Words y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }
template <int N>
inline Words shift_left(Words x) { return {_mm256_slli_epi32(x.a, N), _mm256_slli_epi32(x.b, N)}; }
inline __m256i dot_bytes(__m256i acc, __m256i x, __m256i y) {  // bytes of each parity as 16-bit numbers: no sum saturates
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(x, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(y, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(x, 8), _mm256_srai_epi16(y, 8));
    return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
inline Words dot_bytes(Words acc, Words x, Words y) { return {dot_bytes(acc.a, x.a, y.a), dot_bytes(acc.b, x.b, y.b)}; }
inline Floats to_floats(Words x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline Words to_ints(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline void store_bytes(uint8_t* p, Words x) {
    uint32_t words[kLanes];
    store_words(words, x);
    for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(words[i]);
}
inline void store_bytes(uint8_t* low, uint8_t* high, Words x) {
    uint32_t words[kLanes];
    store_words(words, x);
    for (int i = 0; i < kLanes; ++i) low[i] = uint8_t(words[i]), high[i] = uint8_t(words[i] >> 8);
}
inline __m256 as_floats(__m256i x) { return _mm256_castsi256_ps(x); }
inline __m256 first_of_pair(__m256i x) { return as_floats(_mm256_slli_epi32(x, 16)); }
inline __m256 second_of_pair(__m256i x) { return as_floats(_mm256_and_si256(x, _mm256_set1_epi32(int(0xffff0000)))); }
struct F32Dot {
    static Floats dot(Floats acc, Words x, Words y) {
        return {_mm256_fmadd_ps(as_floats(x.a), as_floats(y.a), acc.a), _mm256_fmadd_ps(as_floats(x.b), as_floats(y.b), acc.b)};
    }
};
struct BF16Dot {
    static __m256 dot(__m256 acc, __m256i x, __m256i y) {
        acc = _mm256_fmadd_ps(first_of_pair(x), first_of_pair(y), acc);
        return _mm256_fmadd_ps(second_of_pair(x), second_of_pair(y), acc);
    }
    static Floats dot(Floats acc, Words x, Words y) { return {dot(acc.a, x.a, y.a), dot(acc.b, x.b, y.b)}; }
};
inline __m256i round_to_bfloat(__m256 x) {  // the upper half of each 32-bit lane, rounded to nearest even, in its lower half
    const __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff)), 16);
}
inline void store(BFloat* p, Floats x) {
    const __m256i packed = _mm256_packus_epi32(round_to_bfloat(x.a), round_to_bfloat(x.b));
    _mm256_storeu_si256((__m256i*)p, _mm256_permute4x64_epi64(packed, 0xd8));
}
inline void prefetch(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }
inline void prefetch_once(const void* p) { _mm_prefetch((const char*)p, _MM_HINT_NTA); }

#else

struct Floats { float v[kLanes]; };
struct Words { uint32_t v[kLanes]; };

template <class F>
inline Floats each(F f) {
    Floats out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = f(i);
    return out;
}
inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
inline float widen(Half h) {
    const uint32_t sign = uint32_t(h.bits & 0x8000) << 16, rest = h.bits & 0x7fff;
    if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
    if (rest >= 0x0400) return from_bits(sign | ((rest << 13) + (112u << 23)));
    return from_bits(sign | to_bits(float(rest) * 0x1p-24f));
}
inline uint16_t to_half(float x) {
    const uint32_t sign = to_bits(x) >> 16 & 0x8000;
    const float size = std::fabs(x);
    if (size != size) return uint16_t(sign | 0x7e00);
    if (size >= 65520.0f) return uint16_t(sign | 0x7c00);
    if (size < 0x1p-14f) return uint16_t(sign | uint32_t(std::nearbyintf(size * 0x1p24f)));
    const uint32_t bits = to_bits(size);
    return uint16_t(sign | ((bits - (112u << 23) + 0xfff + (bits >> 13 & 1)) >> 13));
}
inline uint16_t to_bfloat(float x) {
    const uint32_t bits = to_bits(x);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline Floats all(float x) { return each([&](int) { return x; }); }
inline Floats zero() { return all(0); }
inline Floats load(const float* p) { return each([&](int i) { return p[i]; }); }
inline void store(float* p, Floats x) { std::memcpy(p, x.v, sizeof x.v); }
inline Floats load_first(const float* p, int n) { return each([&](int i) { return i < n ? p[i] : 0.0f; }); }
inline void store_first(float* p, Floats x, int n) { std::memcpy(p, x.v, size_t(n) * 4); }
inline Floats load(const Half* p) { return each([&](int i) { return widen(p[i]); }); }
inline Floats load(const BFloat* p) { return each([&](int i) { return from_bits(uint32_t(p[i].bits) << 16); }); }
inline Floats load(const int8_t* p) { return each([&](int i) { return float(p[i]); }); }
inline void store(Half* p, Floats x) { for (int i = 0; i < kLanes; ++i) p[i].bits = to_half(x.v[i]); }
inline void store(BFloat* p, Floats x) { for (int i = 0; i < kLanes; ++i) p[i].bits = to_bfloat(x.v[i]); }

inline Floats operator+(Floats x, Floats y) { return each([&](int i) { return x.v[i] + y.v[i]; }); }
inline Floats operator-(Floats x, Floats y) { return each([&](int i) { return x.v[i] - y.v[i]; }); }
inline Floats operator*(Floats x, Floats y) { return each([&](int i) { return x.v[i] * y.v[i]; }); }
inline Floats operator/(Floats x, Floats y) { return each([&](int i) { return x.v[i] / y.v[i]; }); }
inline Floats fma(Floats x, Floats y, Floats z) { return each([&](int i) { return x.v[i] * y.v[i] + z.v[i]; }); }
inline Floats max(Floats x, Floats y) { return each([&](int i) { return x.v[i] > y.v[i] ? x.v[i] : y.v[i]; }); }
inline Floats min(Floats x, Floats y) { return each([&](int i) { return x.v[i] < y.v[i] ? x.v[i] : y.v[i]; }); }
inline Floats absolute(Floats x) { return each([&](int i) { return std::fabs(x.v[i]); }); }
inline Floats nearest(Floats x) {
    // Adding 1.5 * 2^23 leaves the integer in the low bits: exact for the sizes met here, below 2^22.
    return each([&](int i) { return (x.v[i] + 12582912.0f) - 12582912.0f; });
}
inline Floats scale2(Floats x, Floats n) {
    return each([&](int i) { return n.v[i] > -127 ? from_bits(to_bits(x.v[i]) + (uint32_t(int32_t(n.v[i])) << 23)) : 0.0f; });
}
inline Floats keep(Floats x, int first, int past, Floats y) { return each([&](int i) { return i >= first && i < past ? x.v[i] : y.v[i]; }); }

inline Words load_words(const uint32_t* p) {
    Words x;
    std::memcpy(x.v, p, sizeof x.v);
    return x;
}
inline void store_words(uint32_t* p, Words x) { std::memcpy(p, x.v, sizeof x.v); }
inline Words all_words(uint32_t x) {
    Words out;
    for (uint32_t& word : out.v) word = x;
    return out;
}
inline Words low_halves(Words x) {
    for (uint32_t& word : x.v) word &= 0xffff;
    return x;
}
inline Words operator+(Words x, Words y) {
    for (int i = 0; i < kLanes; ++i) x.v[i] += y.v[i];
    return x;
}
template <int N>
inline Words shift_left(Words x) {
    for (uint32_t& word : x.v) word <<= N;
    return x;
}
inline Words dot_bytes(Words acc, Words x, Words y) {
    for (int i = 0; i < kLanes; ++i)
        for (int shift = 0; shift < 32; shift += 8) acc.v[i] += uint32_t(int32_t(uint8_t(x.v[i] >> shift)) * int32_t(int8_t(y.v[i] >> shift)));
    return acc;
}
inline Floats to_floats(Words x) { return each([&](int i) { return float(int32_t(x.v[i])); }); }
inline Words to_ints(Floats x) {
    Words out;
    x = nearest(x);
    for (int i = 0; i < kLanes; ++i) out.v[i] = uint32_t(int32_t(x.v[i]));
    return out;
}
inline void store_bytes(uint8_t* p, Words x) {
    for (int i = 0; i < kLanes; ++i) p[i] = uint8_t(x.v[i]);
}
inline void store_bytes(uint8_t* low, uint8_t* high, Words x) {
    for (int i = 0; i < kLanes; ++i) low[i] = uint8_t(x.v[i]), high[i] = uint8_t(x.v[i] >> 8);
}
struct F32Dot {
    static Floats dot(Floats acc, Words x, Words y) { return each([&](int i) { return acc.v[i] + from_bits(x.v[i]) * from_bits(y.v[i]); }); }
};
struct BF16Dot {
    static Floats dot(Floats acc, Words x, Words y) {
        acc = each([&](int i) { return acc.v[i] + from_bits(x.v[i] << 16) * from_bits(y.v[i] << 16); });
        return each([&](int i) { return acc.v[i] + from_bits(x.v[i] & 0xffff0000) * from_bits(y.v[i] & 0xffff0000); });
    }
};
inline void prefetch(const void*) {}
inline void prefetch_once(const void*) {}

#endif

// Sum and maximum of the lanes, by halving: lane i with i + 8, then i + 4, i + 2, i + 1.
#if defined(__AVX2__)
inline float sum(Floats x) {
    const __m256 a = _mm256_add_ps(halves(x, 0), halves(x, 1));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline float greatest(Floats x) {
    const __m256 a = _mm256_max_ps(halves(x, 0), halves(x, 1));
    const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}
#else
inline float sum(Floats x) {
    for (int half = kLanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
    return x.v[0];
}
inline float greatest(Floats x) {
    float best = x.v[0];
    for (float value : x.v) best = value > best ? value : best;
    return best;
}
#endif

// 2^x within 2e-7 of its value for x from -126 to 127; below, 0 or almost. Minimax polynomial of degree 6 on [-1/2, 1/2] (the
// coefficients of Cephes' exp2f).
inline Floats exp2(Floats x) {
    const Floats bounded = max(all(-200.0f), x), n = nearest(bounded), f = bounded - n;
    Floats p = all(1.535336188319500e-4f);
    p = fma(p, f, all(1.339887440266574e-3f));
    p = fma(p, f, all(9.618437357674640e-3f));
    p = fma(p, f, all(5.550332471162809e-2f));
    p = fma(p, f, all(2.402264791363012e-1f));
    p = fma(p, f, all(6.931472028550421e-1f));
    p = fma(p, f, all(1.0f));
    return scale2(p, n);
}

constexpr float kLog2E = 1.44269504088896341f;

}  // namespace headrace::HEADRACE_ISA
