// Activations as int8: per token and group of 64 columns, symmetric.
//
// scale = max|x| / 127, q = x / scale rounded half to even. A group of zeros has scale 0 and zeros. A token with a NaN
// or an infinity has NaN for every scale (and zeros for q), so that whatever is summed with its scales becomes NaN; a
// kernel that skips groups starts its sums at 0 * scales[first group], which is 0 or NaN.
#ifndef RAREFY_QUANTIZE_H
#define RAREFY_QUANTIZE_H

#include <cstddef>

#include "rarefy.h"
#include "simd.h"
#include "transpose.h"

namespace rarefy::RAREFY_NAMESPACE {

constexpr int group = 64;  // columns that share a scale

inline std::int64_t groups_of(std::int64_t cols) { return (cols + group - 1) / group; }

struct Quantized {
    std::int8_t* q;        // [tokens][groups][64], zeros behind the last column, each group 64-byte aligned
    float* scales;         // [tokens][groups]
    std::int32_t* starts;  // [tokens][groups]: -128 times the sum of the group's q, where a sum of (w + 128) * q starts
    std::int64_t groups;
};

// The memory that so many tokens need, a multiple of 64 bytes.
inline std::size_t quantized_bytes(std::int64_t tokens, std::int64_t cols) {
    const std::int64_t entries = tokens * groups_of(cols);
    return static_cast<std::size_t>(entries * group + (entries + lanes - 1) / lanes * lanes * 8);
}

// The parts of that memory, which is 64-byte aligned.
inline Quantized quantized_at(unsigned char* memory, std::int64_t tokens, std::int64_t cols) {
    const std::int64_t entries = tokens * groups_of(cols), padded = (entries + lanes - 1) / lanes * lanes;
    unsigned char* const scales = memory + entries * group;
    return {reinterpret_cast<std::int8_t*>(memory), reinterpret_cast<float*>(scales),
            reinterpret_cast<std::int32_t*>(scales + padded * 4), groups_of(cols)};
}

typedef std::int32_t I32x8 __attribute__((vector_size(32)));
typedef std::int32_t I32x4 __attribute__((vector_size(16)));

// Halves of sixteen and of eight lanes. (Compilers warn inside some of the reducing intrinsics.)
RAREFY_INLINE void halves(const I32& v, I32x8& low, I32x8& high) {
    low = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7);
    high = __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
}
RAREFY_INLINE void halves(const I32x8& v, I32x4& low, I32x4& high) {
    low = __builtin_shufflevector(v, v, 0, 1, 2, 3);
    high = __builtin_shufflevector(v, v, 4, 5, 6, 7);
}

RAREFY_INLINE std::int32_t largest_lane(const I32& v) {
    I32x8 a, b;
    halves(v, a, b);
    I32x4 c, d;
    halves(a > b ? a : b, c, d);
    c = c > d ? c : d;
    const std::int32_t x = c[0] > c[1] ? c[0] : c[1], y = c[2] > c[3] ? c[2] : c[3];
    return x > y ? x : y;
}
RAREFY_INLINE std::int32_t sum_of_lanes(const I32& v) {
    I32x8 a, b;
    halves(v, a, b);
    I32x4 c, d;
    halves(a + b, c, d);
    c += d;
    return (c[0] + c[1]) + (c[2] + c[3]);
}

RAREFY_INLINE bool any_above(const I32& v, std::int32_t bound) {
#if defined(__AVX512F__)
    return _mm512_cmpgt_epi32_mask(reinterpret_cast<__m512i>(v), _mm512_set1_epi32(bound)) != 0;
#else
    return largest_lane(v) > bound;
#endif
}

RAREFY_INLINE I32 magnitude(F32 v) { return reinterpret_cast<I32>(v) & 0x7fffffff; }  // bits, ordered as numbers

constexpr float whole_shift = 12582912.0f;           // 1.5 * 2^23: adding it rounds to a whole number, half to even,
constexpr std::int32_t whole_bits = 0x4b400000;      // which is then what the bits are above these
constexpr std::int32_t nearly_half = 0x3efff2e5;     // the bits of 0.4999

// x / s as it is defined: rounded half to even and kept within 127; 0 where s is 0.
inline void divide_group(const F32 (&x)[4], float s, I32 (&whole)[4]) {
    const F32 low = broadcast(-127.0f), high = broadcast(127.0f);
    for (int i = 0; i < 4; ++i) {
        const F32 ratio = s > 0.0f ? x[i] / broadcast(s) : F32{};
        const F32 bounded = ratio < low ? low : ratio > high ? high : ratio;
        whole[i] = reinterpret_cast<I32>(bounded + whole_shift) - whole_bits;
    }
}

// One group of one token. Returns whether all of it is finite.
RAREFY_INLINE bool quantize_group(const F32 (&x)[4], std::int8_t* q, float* scale, std::int32_t* start) {
    typedef std::int8_t I8 __attribute__((vector_size(16)));
    I32 most{};  // what is not finite is above all that is
    for (const F32& part : x) {
        const I32 m = magnitude(part);
        most = m > most ? m : most;
    }
    const std::int32_t bits = largest_lane(most);
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    const bool finite = bits < 0x7f800000;
    const float s = finite ? largest / 127.0f : 0.0f;
    *scale = s;
    // A product with 1 / s rounds to the same number unless it lies next to the middle between two; divisions, which take
    // ten times as long, decide those, and where s has too few digits for 1 / s to be good.
    const F32 inverse = broadcast(1.0f / s);
    I32 whole[4], rest{};
    for (int i = 0; i < 4; ++i) {
        const F32 ratio = x[i] * inverse, shifted = ratio + whole_shift;
        const I32 m = magnitude(ratio - (shifted - whole_shift));
        rest = m > rest ? m : rest;
        whole[i] = reinterpret_cast<I32>(shifted) - whole_bits;
    }
    if (__builtin_expect(!(s > 1e-37f) || any_above(rest, nearly_half), 0)) divide_group(x, s, whole);
    for (int i = 0; i < 4; ++i) {
        const I8 narrow = __builtin_convertvector(whole[i], I8);
        std::memcpy(q + i * lanes, &narrow, sizeof narrow);
    }
    *start = -128 * sum_of_lanes((whole[0] + whole[1]) + (whole[2] + whole[3]));
    return finite;
}

// What one token of `out` says when something in it is not finite.
inline void spoil(const Quantized& out, std::int64_t token) {
    std::memset(out.q + token * out.groups * group, 0, static_cast<std::size_t>(out.groups * group));
    for (std::int64_t g = 0; g < out.groups; ++g) {
        out.scales[token * out.groups + g] = __builtin_nanf("");
        out.starts[token * out.groups + g] = 0;
    }
}

// Tokens whose features lie one behind the other.
template <typename T>
inline void quantize_token_major(const T* x, std::int64_t stride, std::int64_t cols, std::int64_t first,
                                 std::int64_t last, const Quantized& out) {
    for (std::int64_t t = first; t < last; ++t) {
        const T* const row = x + t * stride;
        bool finite = true;
        for (std::int64_t g = 0; g < out.groups; ++g) {
            F32 part[4];
            for (int i = 0; i < 4; ++i) {
                const std::int64_t at = g * group + i * lanes;
                part[i] = load_at_most(row + at, cols - at);
            }
            const std::int64_t at = t * out.groups + g;
            finite &= quantize_group(part, out.q + at * group, out.scales + at, out.starts + at);
        }
        if (!finite) spoil(out, t);
    }
}

// Features whose tokens lie one behind the other: sixteen tokens at a time, turned.
template <typename T>
inline void quantize_feature_major(const T* x, std::int64_t stride, std::int64_t cols, std::int64_t first,
                                   std::int64_t last, const Quantized& out) {
    for (std::int64_t t = first; t < last; t += lanes) {
        const int some = static_cast<int>(last - t < lanes ? last - t : lanes);
        std::uint32_t finite = 0xffff;
        for (std::int64_t g = 0; g < out.groups; ++g) {
            U32 turned[4][lanes];
            for (int i = 0; i < 4; ++i) {
                for (int c = 0; c < lanes; ++c) {
                    const std::int64_t at = g * group + i * lanes + c;
                    turned[i][c] = at < cols ? reinterpret_cast<U32>(load_at_most(x + at * stride + t, some)) : U32{};
                }
                transpose(turned[i]);
            }
            for (int j = 0; j < some; ++j) {
                const F32 part[4] = {reinterpret_cast<F32>(turned[0][j]), reinterpret_cast<F32>(turned[1][j]),
                                     reinterpret_cast<F32>(turned[2][j]), reinterpret_cast<F32>(turned[3][j])};
                const std::int64_t at = (t + j) * out.groups + g;
                if (!quantize_group(part, out.q + at * group, out.scales + at, out.starts + at)) finite &= ~(1u << j);
            }
        }
        for (int j = 0; j < some; ++j)
            if ((finite >> j & 1u) == 0) spoil(out, t + j);
    }
}

// Tokens first .. last - 1 of a slot, into the same tokens of `out`. Any strides of which one is 1. Threads that take
// tokens in multiples of 16 read whole cache lines of feature-major slots.
inline void quantize(const rarefy_slot& x, std::int64_t cols, std::int64_t first, std::int64_t last,
                     const Quantized& out) {
    const auto* const f32 = static_cast<const float*>(x.data);
    const auto* const half = static_cast<const bf16*>(x.data);
    if (x.feature == 1 || cols == 1) {
        if (x.dtype == RAREFY_BF16)
            quantize_token_major(half, x.token, cols, first, last, out);
        else
            quantize_token_major(f32, x.token, cols, first, last, out);
    } else if (x.dtype == RAREFY_BF16) {
        quantize_feature_major(half, x.feature, cols, first, last, out);
    } else {
        quantize_feature_major(f32, x.feature, cols, first, last, out);
    }
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
