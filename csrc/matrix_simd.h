// What the matrix kernels need besides simd.h: 64 weight codes (16 outputs x 4 inputs), 16 integer sums, and a fused multiply-add
// that is fused everywhere. The including file sets HEADRACE_ISA.
#pragma once

#include "simd.h"

namespace headrace::HEADRACE_ISA {

struct GroupSums { int32_t low, high, winograd; };  // of the first and the last 16 codes; for GroupBlock::winograd, 0 where that is not used

#if defined(__AVX512VNNI__)

struct Codes { __m512i v; };
struct Ints { __m512i v; };

inline Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_codes(uint8_t* p, Codes a) { _mm512_store_si512(p, a.v); }
inline Codes all_codes(int x) { return {_mm512_set1_epi8(char(x))}; }
inline Codes operator&(Codes a, Codes b) { return {_mm512_and_si512(a.v, b.v)}; }
inline Codes operator+(Codes a, Codes b) { return {_mm512_add_epi8(a.v, b.v)}; }
template <int n> inline Codes right(Codes a) { return {_mm512_srli_epi16(a.v, n)}; }  // bits cross bytes: mask them after
template <int n> inline Codes left(Codes a) { return {_mm512_slli_epi16(a.v, n)}; }
inline Codes merge(Codes a, Codes b, Codes mask) { return {_mm512_ternarylogic_epi64(a.v, b.v, mask.v, 0xF8)}; }  // a | (b & mask)
inline Codes replace(Codes a, Codes b, Codes mask) { return {_mm512_ternarylogic_epi64(a.v, b.v, mask.v, 0xD8)}; }  // (a & ~mask) | (b & mask)
inline Codes lookup(const uint8_t* table, Codes a) {
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), a.v)};
}
// Bytes q of each 16-bit lane become (q * factor + addend) >> 8, in 16 bits without sign.
inline Codes rescale(Codes q, Codes factor, Codes addend) {
    const __m512i low = _mm512_set1_epi16(0xff);
    const __m512i even = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_and_si512(q.v, low), factor.v), addend.v);
    const __m512i odd = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_srli_epi16(q.v, 8), factor.v), addend.v);
    return {_mm512_ternarylogic_epi64(_mm512_srli_epi16(even, 8), odd, low, 0xF4)};  // even | (odd & ~low)
}
inline Floats load_bytes(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)))}; }

inline Ints all_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
template <int n> inline Ints scaled_by_power(Ints a) {  // a * 2^n
    if constexpr (n > 0) return {_mm512_slli_epi32(a.v, n)};
    else if constexpr (n < 0) return {_mm512_srai_epi32(a.v, -n)};
    else return a;
}
inline Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
inline Codes pairs(Ints a) { return {_mm512_or_si512(_mm512_and_si512(a.v, _mm512_set1_epi32(0xffff)), _mm512_slli_epi32(a.v, 16))}; }
inline Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_ints(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
inline Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline int32_t load_word(const void* p) { int32_t x; std::memcpy(&x, p, 4); return x; }

// acc + for each output: 4 codes * 4 int8 of x. Codes above 127 need `wide`.
template <bool wide> inline Ints dot(Ints acc, Codes w, int32_t x) { return {_mm512_dpbusd_epi32(acc.v, w.v, _mm512_set1_epi32(x))}; }
constexpr bool wide_dot_is_signed = false;  // whether wide codes count as code - 128

inline Floats fused(Floats a, Floats b, Floats c) { return fma(a, b, c); }
// Of each lane a bit: whether it is not less than x. A NaN is not.
inline uint32_t not_less(Floats a, float x) { return _mm512_cmp_ps_mask(a.v, _mm512_set1_ps(x), _CMP_NLT_UQ); }
// Without a detour over memory, where a load of what several stores wrote waits for all of them.
inline Floats with_lane(Floats a, int lane, float x) { return {_mm512_mask_broadcastss_ps(a.v, __mmask16(1 << lane), _mm_set_ss(x))}; }
inline Ints round_to_ints(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }
inline void store_low_bytes(int8_t* p, Ints a) { _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(a.v)); }
inline int32_t sum(Ints a) { return _mm512_reduce_add_epi32(a.v); }
// An integer of at most 2^22 in size, added to this one, has the bits of the float 1.5 * 2^23 plus the integer.
constexpr int32_t float_from = 0x4b400000;
// Stores the low bytes of a and b, the codes of a group, one after the other, and sums them up. GroupBlock::winograd: each code of a pair's
// second quad is multiplied by 128 + the first quad's, those of no pair by 8.
inline GroupSums store_and_sum(int8_t* p, Ints a, Ints b) {
    const __m128i a8 = _mm512_cvtepi32_epi8(a.v), b8 = _mm512_cvtepi32_epi8(b.v), ones = _mm_set1_epi8(1), none = _mm_setzero_si128();
    _mm_storeu_si128((__m128i*)p, a8), _mm_storeu_si128((__m128i*)(p + 16), b8);
    const __m128i plus128 = _mm_set1_epi8(char(0x80)), unpaired = _mm_setr_epi32(0, 0, 0x08080808, 0x08080808);
    const __m128i of_a = _mm_maskz_shuffle_epi32(0b1010, _mm_xor_si128(a8, plus128), _MM_PERM_CCAA);
    const __m128i of_b = _mm_mask_shuffle_epi32(unpaired, 0b0010, _mm_xor_si128(b8, plus128), _MM_PERM_CCAA);
    const __m128i products = _mm_dpbusd_epi32(_mm_dpbusd_epi32(none, of_a, a8), of_b, b8);
    const __m128i sums = _mm_hadd_epi32(_mm_dpbusd_epi32(none, ones, a8), _mm_dpbusd_epi32(none, ones, b8));
    const __m128i all = _mm_hadd_epi32(sums, _mm_hadd_epi32(products, products));
    const int64_t both = _mm_cvtsi128_si64(all);
    return {int32_t(both), int32_t(both >> 32), float_from - _mm_extract_epi32(all, 2)};
}

#elif defined(__AVX2__)

struct Codes { __m256i a, b; };
struct Ints { __m256i a, b; };

inline __m256i load_half(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline Codes load_codes(const uint8_t* p) { return {load_half(p), load_half(p + 32)}; }
inline void store_codes(uint8_t* p, Codes x) { _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)(p + 32), x.b); }
inline Codes all_codes(int x) { return {_mm256_set1_epi8(char(x)), _mm256_set1_epi8(char(x))}; }
inline Codes operator&(Codes x, Codes y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
inline Codes operator+(Codes x, Codes y) { return {_mm256_add_epi8(x.a, y.a), _mm256_add_epi8(x.b, y.b)}; }
template <int n> inline Codes right(Codes x) { return {_mm256_srli_epi16(x.a, n), _mm256_srli_epi16(x.b, n)}; }
template <int n> inline Codes left(Codes x) { return {_mm256_slli_epi16(x.a, n), _mm256_slli_epi16(x.b, n)}; }
inline Codes merge(Codes x, Codes y, Codes mask) {
    return {_mm256_or_si256(x.a, _mm256_and_si256(y.a, mask.a)), _mm256_or_si256(x.b, _mm256_and_si256(y.b, mask.b))};
}
inline __m256i replace(__m256i x, __m256i y, __m256i mask) { return _mm256_or_si256(_mm256_andnot_si256(mask, x), _mm256_and_si256(mask, y)); }
inline Codes replace(Codes x, Codes y, Codes mask) { return {replace(x.a, y.a, mask.a), replace(x.b, y.b, mask.b)}; }
inline Codes lookup(const uint8_t* table, Codes x) {
    const __m256i t = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    return {_mm256_shuffle_epi8(t, x.a), _mm256_shuffle_epi8(t, x.b)};
}
inline __m256i rescale(__m256i q, __m256i factor, __m256i addend) {
    const __m256i low = _mm256_set1_epi16(0xff);
    const __m256i even = _mm256_add_epi16(_mm256_mullo_epi16(_mm256_and_si256(q, low), factor), addend);
    const __m256i odd = _mm256_add_epi16(_mm256_mullo_epi16(_mm256_srli_epi16(q, 8), factor), addend);
    return _mm256_or_si256(_mm256_srli_epi16(even, 8), _mm256_andnot_si256(low, odd));
}
inline Codes rescale(Codes q, Codes factor, Codes addend) { return {rescale(q.a, factor.a, addend.a), rescale(q.b, factor.b, addend.b)}; }
inline Floats load_bytes(const uint8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p))),
            _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8))))};
}

inline Ints all_ints(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
template <int n> inline Ints scaled_by_power(Ints x) {
    if constexpr (n > 0) return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)};
    else if constexpr (n < 0) return {_mm256_srai_epi32(x.a, -n), _mm256_srai_epi32(x.b, -n)};
    else return x;
}
inline Ints operator-(Ints x, Ints y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline __m256i pairs(__m256i x) { return _mm256_or_si256(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)), _mm256_slli_epi32(x, 16)); }
inline Codes pairs(Ints x) { return {pairs(x.a), pairs(x.b)}; }
inline Ints load_ints(const int32_t* p) { return {load_half(p), load_half(p + 8)}; }
inline void store_ints(int32_t* p, Ints x) { _mm256_storeu_si256((__m256i*)p, x.a), _mm256_storeu_si256((__m256i*)(p + 8), x.b); }
inline Floats to_floats(Ints x) { return {_mm256_cvtepi32_ps(x.a), _mm256_cvtepi32_ps(x.b)}; }
inline int32_t load_word(const void* p) { int32_t x; std::memcpy(&x, p, 4); return x; }

// Sums of pairs must stay within 16 bits: u8 codes up to 127 do (127 * 127 * 2). Wide ones are taken as signed, |code| times x with its sign.
template <bool wide> inline __m256i dot(__m256i acc, __m256i w, __m256i x) {
    if constexpr (wide) {
        const __m256i s = _mm256_xor_si256(w, _mm256_set1_epi8(char(0x80)));
        x = _mm256_sign_epi8(x, s), w = _mm256_abs_epi8(s);
    }
    return _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
template <bool wide> inline Ints dot(Ints acc, Codes w, int32_t x) {
    const __m256i all = _mm256_set1_epi32(x);
    return {dot<wide>(acc.a, w.a, all), dot<wide>(acc.b, w.b, all)};
}
constexpr bool wide_dot_is_signed = true;

inline Floats fused(Floats x, Floats y, Floats z) { return fma(x, y, z); }
inline uint32_t not_less(Floats x, float y) {
    const __m256 all = _mm256_set1_ps(y);
    return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps(x.a, all, _CMP_NLT_UQ)) | _mm256_movemask_ps(_mm256_cmp_ps(x.b, all, _CMP_NLT_UQ)) << 8);
}
inline __m256 with_lane(__m256 a, int lane, float x) {
    const __m256i here = _mm256_cmpeq_epi32(_mm256_set1_epi32(lane), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    return _mm256_blendv_ps(a, _mm256_set1_ps(x), _mm256_castsi256_ps(here));
}
inline Floats with_lane(Floats a, int lane, float x) { return {with_lane(a.a, lane, x), with_lane(a.b, lane - 8, x)}; }
inline Ints round_to_ints(Floats x) { return {_mm256_cvtps_epi32(x.a), _mm256_cvtps_epi32(x.b)}; }
inline void store_low_bytes(int8_t* p, Ints x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    _mm_storeu_si128((__m128i*)p, _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1)));
}
inline int32_t sum(Ints x) {
    const __m256i s = _mm256_add_epi32(x.a, x.b);
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}

#else

struct Codes { uint8_t v[64]; };
struct Ints { int32_t v[kLanes]; };

template <class F> inline Codes each_code(F f) {
    Codes out;
    for (int i = 0; i < 64; i++) out.v[i] = uint8_t(f(i));
    return out;
}
template <class F> inline Ints each_int(F f) {
    Ints out;
    for (int i = 0; i < kLanes; i++) out.v[i] = f(i);
    return out;
}
inline Codes load_codes(const uint8_t* p) { Codes x; std::memcpy(x.v, p, 64); return x; }
inline void store_codes(uint8_t* p, Codes x) { std::memcpy(p, x.v, 64); }
inline Codes all_codes(int x) { return each_code([&](int) { return x; }); }
inline Codes operator&(Codes x, Codes y) { return each_code([&](int i) { return x.v[i] & y.v[i]; }); }
inline Codes operator+(Codes x, Codes y) { return each_code([&](int i) { return x.v[i] + y.v[i]; }); }
template <int n> inline Codes right(Codes x) { return each_code([&](int i) { return x.v[i] >> n; }); }
template <int n> inline Codes left(Codes x) { return each_code([&](int i) { return x.v[i] << n; }); }
inline Codes merge(Codes x, Codes y, Codes mask) { return each_code([&](int i) { return x.v[i] | (y.v[i] & mask.v[i]); }); }
inline Codes replace(Codes x, Codes y, Codes mask) { return each_code([&](int i) { return (x.v[i] & ~mask.v[i]) | (y.v[i] & mask.v[i]); }); }
inline Codes lookup(const uint8_t* table, Codes x) { return each_code([&](int i) { return table[x.v[i]]; }); }
inline Codes rescale(Codes q, Codes factor, Codes addend) {
    return each_code([&](int i) {
        uint16_t f, a;
        std::memcpy(&f, factor.v + i / 2 * 2, 2), std::memcpy(&a, addend.v + i / 2 * 2, 2);
        return uint16_t(q.v[i] * f + a) >> 8;
    });
}
inline Floats load_bytes(const uint8_t* p) { return each([&](int i) { return float(p[i]); }); }

inline Ints all_ints(int32_t x) { return each_int([&](int) { return x; }); }
template <int n> inline Ints scaled_by_power(Ints x) {
    if constexpr (n > 0) return each_int([&](int i) { return x.v[i] * (1 << n); });
    else return each_int([&](int i) { return x.v[i] >> -n; });
}
inline Ints operator-(Ints x, Ints y) { return each_int([&](int i) { return x.v[i] - y.v[i]; }); }
inline Codes pairs(Ints x) {
    Codes out;
    for (int i = 0; i < kLanes; i++) {
        const uint32_t pair = uint32_t(x.v[i] & 0xffff) * 0x10001u;
        std::memcpy(out.v + 4 * i, &pair, 4);
    }
    return out;
}
inline Ints load_ints(const int32_t* p) { Ints x; std::memcpy(x.v, p, sizeof x.v); return x; }
inline void store_ints(int32_t* p, Ints x) { std::memcpy(p, x.v, sizeof x.v); }
inline Floats to_floats(Ints x) { return each([&](int i) { return float(x.v[i]); }); }
inline int32_t load_word(const void* p) { int32_t x; std::memcpy(&x, p, 4); return x; }
template <bool wide> inline Ints dot(Ints acc, Codes w, int32_t x) {
    int8_t parts[4];
    std::memcpy(parts, &x, 4);
    for (int i = 0; i < kLanes; i++)
        for (int j = 0; j < 4; j++) acc.v[i] += int(w.v[4 * i + j]) * parts[j];
    return acc;
}
constexpr bool wide_dot_is_signed = false;

inline Floats fused(Floats x, Floats y, Floats z) { return each([&](int i) { return std::fma(x.v[i], y.v[i], z.v[i]); }); }
inline uint32_t not_less(Floats x, float y) {
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; ++i) bits |= uint32_t(!(x.v[i] < y)) << i;
    return bits;
}
inline Floats with_lane(Floats a, int lane, float x) { a.v[lane] = x; return a; }
inline Ints round_to_ints(Floats x) { return each_int([&](int i) { return int32_t(std::nearbyintf(x.v[i])); }); }
inline void store_low_bytes(int8_t* p, Ints x) { for (int i = 0; i < kLanes; i++) p[i] = int8_t(x.v[i]); }
inline int32_t sum(Ints x) {
    int32_t total = 0;
    for (const int32_t value : x.v) total += value;
    return total;
}

#endif

#if !defined(__AVX512VNNI__)
inline GroupSums store_and_sum(int8_t* p, Ints a, Ints b) {
    store_low_bytes(p, a), store_low_bytes(p + 16, b);
    return {sum(a), sum(b), 0};
}
#endif

}  // namespace headrace::HEADRACE_ISA
