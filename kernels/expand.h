// Sixteen, 32 or 64 columns of a bitmap row as full lanes: values taken in order to where the bits are, zeros elsewhere.
//
// `End` says that a full vector from the pointer on may reach past the last value: then only those that are wanted are
// read.
#ifndef RAREFY_EXPAND_H
#define RAREFY_EXPAND_H

#include "simd.h"

#if RAREFY_V4

namespace rarefy::RAREFY_NAMESPACE {

template <bool End>
RAREFY_INLINE __m512 expand(__mmask16 bits, const float* p) {
    if constexpr (End)
        return _mm512_maskz_expandloadu_ps(bits, p);
    else
        return _mm512_maskz_expand_ps(bits, _mm512_loadu_ps(p));
}

template <bool End>
RAREFY_INLINE __m512i expand(__mmask32 bits, const bf16* p) {
    if constexpr (End)
        return _mm512_maskz_expandloadu_epi16(bits, p);
    else
        return _mm512_maskz_expand_epi16(bits, _mm512_loadu_si512(p));
}

template <bool End>
RAREFY_INLINE __m512i expand(__mmask64 bits, const std::int8_t* p) {
    if constexpr (End)
        return _mm512_maskz_expandloadu_epi8(bits, p);
    else
        return _mm512_maskz_expand_epi8(bits, _mm512_loadu_si512(p));
}

RAREFY_INLINE int count(std::uint64_t bits) { return static_cast<int>(_mm_popcnt_u64(bits)); }

// Masks straight from memory: half the price of a way through a general register, which compilers prefer.
RAREFY_INLINE __mmask16 mask_at(const std::uint16_t* p) {
    __mmask16 mask;
    __asm__("kmovw %1, %0" : "=k"(mask) : "m"(*p));
    return mask;
}
RAREFY_INLINE __mmask32 mask_at(const std::uint32_t* p) {
    __mmask32 mask;
    __asm__("kmovd %1, %0" : "=k"(mask) : "m"(*p));
    return mask;
}
RAREFY_INLINE __mmask64 mask_at(const std::uint64_t* p) {
    __mmask64 mask;
    __asm__("kmovq %1, %0" : "=k"(mask) : "m"(*p));
    return mask;
}

// Sums of four vectors' lanes, in this order.
RAREFY_INLINE __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd)));
    const __m512 abcd = _mm512_add_ps(low, high);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif

#endif
