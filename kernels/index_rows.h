// Rows of an INDEX16 weight: where they are, and their values as floats.
#ifndef RAREFY_INDEX_ROWS_H
#define RAREFY_INDEX_ROWS_H

#include "few.h"

namespace rarefy::RAREFY_NAMESPACE {

// n floats as one value of the language.
template <int N>
struct Vector;
template <>
struct Vector<4> {
    typedef float type __attribute__((vector_size(16)));
    typedef std::int32_t whole __attribute__((vector_size(16)));
    typedef std::uint32_t bits __attribute__((vector_size(16)));
    typedef std::uint16_t half __attribute__((vector_size(8)));
    typedef std::int8_t byte __attribute__((vector_size(4)));
};
template <>
struct Vector<8> {
    typedef float type __attribute__((vector_size(32)));
    typedef std::int32_t whole __attribute__((vector_size(32)));
    typedef std::uint32_t bits __attribute__((vector_size(32)));
    typedef std::uint16_t half __attribute__((vector_size(16)));
    typedef std::int8_t byte __attribute__((vector_size(8)));
};
template <>
struct Vector<16> {
    typedef float type __attribute__((vector_size(64)));
    typedef std::int32_t whole __attribute__((vector_size(64)));
    typedef std::uint32_t bits __attribute__((vector_size(64)));
    typedef std::uint16_t half __attribute__((vector_size(32)));
    typedef std::int8_t byte __attribute__((vector_size(16)));
};
template <int N>
using Floats = typename Vector<N>::type;

template <int N>
RAREFY_INLINE Floats<N> load_as_floats(const float* p) {
    Floats<N> v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
template <int N>
RAREFY_INLINE Floats<N> load_as_floats(const bf16* p) {
    typename Vector<N>::half v;
    std::memcpy(&v, p, sizeof v);
    const typename Vector<N>::bits wide = __builtin_convertvector(v, typename Vector<N>::bits) << 16;
    return reinterpret_cast<Floats<N>>(wide);
}
template <int N>
RAREFY_INLINE Floats<N> load_as_floats(const std::int8_t* p) {
#if defined(__AVX2__)  // of narrow vectors the compiler makes single entries
    if constexpr (N == 4) {
        std::int32_t four;
        std::memcpy(&four, p, sizeof four);
        return reinterpret_cast<Floats<N>>(_mm_cvtepi32_ps(_mm_cvtepi8_epi32(_mm_cvtsi32_si128(four))));
    } else if constexpr (N == 8) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
        return reinterpret_cast<Floats<N>>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight)));
    } else {
        Floats<N> v;
        for (int half = 0; half < 2; ++half) {
            const Floats<8> part = load_as_floats<8>(p + 8 * half);
            std::memcpy(reinterpret_cast<char*>(&v) + 32 * half, &part, sizeof part);
        }
        return v;
    }
#else
    typename Vector<N>::byte v;
    std::memcpy(&v, p, sizeof v);
    return __builtin_convertvector(__builtin_convertvector(v, typename Vector<N>::whole), Floats<N>);
#endif
}

RAREFY_INLINE float as_float(float x) { return x; }
RAREFY_INLINE float as_float(bf16 x) { return to_float(x); }
RAREFY_INLINE float as_float(std::int8_t x) { return static_cast<float>(x); }

struct IndexRows {
    const Job& job;
    const float* x;
    std::int64_t token, stride;  // stride: from token to token, padded columns

    const std::uint16_t* columns(std::int64_t block_row) const {
        return static_cast<const std::uint16_t*>(job.weight->index) + job.weight->starts[block_row];
    }
    std::int64_t units(std::int64_t block_row) const {
        return static_cast<std::int64_t>(job.weight->starts[block_row + 1] - job.weight->starts[block_row]);
    }
    template <int D, int R>
    const Stored<D>* values(std::int64_t block_row) const {
        return static_cast<const Stored<D>*>(job.weight->values) +
               static_cast<std::int64_t>(job.weight->starts[block_row]) * R;
    }
};

RAREFY_INLINE void prefetch(const void* p, std::int64_t bytes) {
    __builtin_prefetch(static_cast<const char*>(p) + bytes);
}

#if RAREFY_V4

// The first entries of sixteen, as floats; zeros behind.
RAREFY_INLINE __m512 sixteen(const float* p, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, p); }
RAREFY_INLINE __m512 sixteen(const bf16* p, __mmask16 mask) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, p)), 16));
}
RAREFY_INLINE __m512 sixteen(const std::int8_t* p, __mmask16 mask) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, p)));
}

#endif

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
