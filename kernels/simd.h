// Sixteen lanes, whatever the processor: GCC's vector extension makes of them one zmm, two ymm or four xmm registers.
//
// What the extension cannot say (expanding loads, dot products of bf16 and int8) is an intrinsic where the instruction
// set has it, and plain lanes elsewhere.
#ifndef RAREFY_SIMD_H
#define RAREFY_SIMD_H

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#define RAREFY_INLINE inline __attribute__((always_inline))

// The v4 build: x86-64-v4 with vnni, bf16, vbmi and vbmi2.
#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__) && defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define RAREFY_V4 1
#else
#define RAREFY_V4 0
#endif

namespace rarefy::RAREFY_NAMESPACE {

constexpr int lanes = 16;

typedef float F32 __attribute__((vector_size(64)));
typedef std::int32_t I32 __attribute__((vector_size(64)));
typedef std::uint32_t U32 __attribute__((vector_size(64)));
typedef std::uint16_t U16 __attribute__((vector_size(32)));

using bf16 = std::uint16_t;  // the bits

RAREFY_INLINE F32 load(const float* p) {
    F32 v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
RAREFY_INLINE void store(float* p, F32 v) { std::memcpy(p, &v, sizeof v); }

RAREFY_INLINE F32 broadcast(float x) { return F32{} + x; }

RAREFY_INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
    return reinterpret_cast<F32>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b),
                                                 reinterpret_cast<__m512>(c)));
#else
    return a * b + c;  // contracted: -ffp-contract=fast
#endif
}

// A sum of lanes in a fixed order: halves, quarters, ...
RAREFY_INLINE float sum(F32 v) {
    float x[lanes];
    std::memcpy(x, &v, sizeof v);
    for (int half = lanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i) x[i] += x[i + half];
    return x[0];
}

// The first n of sixteen entries, zeros behind; and storing the first n.
RAREFY_INLINE F32 load_first(const float* p, std::int64_t n) {
#if defined(__AVX512F__)
    return reinterpret_cast<F32>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p));
#else
    F32 v{};
    std::memcpy(&v, p, static_cast<std::size_t>(n) * sizeof(float));
    return v;
#endif
}
RAREFY_INLINE void store_first(float* p, F32 v, std::int64_t n) {
#if defined(__AVX512F__)
    _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), reinterpret_cast<__m512>(v));
#else
    std::memcpy(p, &v, static_cast<std::size_t>(n) * sizeof(float));
#endif
}

RAREFY_INLINE float to_float(bf16 x) {
    const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}
// Round to nearest, ties to even; a NaN stays a NaN.
RAREFY_INLINE bf16 to_bf16(float f) {
    std::uint32_t bits;
    std::memcpy(&bits, &f, sizeof f);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16>((bits >> 16) | 0x40u);
    return static_cast<bf16>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

RAREFY_INLINE F32 load(const bf16* p) {
    U16 v;
    std::memcpy(&v, p, sizeof v);
    const U32 wide = __builtin_convertvector(v, U32) << 16;
    return reinterpret_cast<F32>(wide);
}
RAREFY_INLINE void store(bf16* p, F32 v) {
    const U32 bits = reinterpret_cast<U32>(v);
    const U32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const U32 quiet = (bits >> 16) | 0x40u;
    const U32 nan = reinterpret_cast<U32>((bits & 0x7fffffffu) > 0x7f800000u);
    const U16 narrow = __builtin_convertvector((quiet & nan) | (rounded & ~nan), U16);
    std::memcpy(p, &narrow, sizeof narrow);
}

// The same for bf16, and for either: the first n entries where n may be more than there are lanes, or none at all.
RAREFY_INLINE F32 load_first(const bf16* p, std::int64_t n) {
    bf16 part[lanes] = {};
    for (std::int64_t i = 0; i < n; ++i) part[i] = p[i];
    return load(part);
}
RAREFY_INLINE void store_first(bf16* p, F32 v, std::int64_t n) {
    bf16 part[lanes];
    store(part, v);
    std::memcpy(p, part, static_cast<std::size_t>(n) * sizeof(bf16));
}
template <typename T>
RAREFY_INLINE F32 load_at_most(const T* p, std::int64_t n) {
    return n >= lanes ? load(p) : n > 0 ? load_first(p, n) : F32{};
}
template <typename T>
RAREFY_INLINE void store_at_most(T* p, F32 v, std::int64_t n) {
    if (n >= lanes)
        store(p, v);
    else
        store_first(p, v, n);
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
