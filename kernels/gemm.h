// The inner loops of dense products with many tokens: six rows of the weight times up to 64 tokens.
//
// Lanes are tokens. A unit is what one 32-bit lane multiplies at a time: one float, two bf16, four int8, or one float
// for all dtypes where the processor has no such dot products. The tokens of a panel are packed [unit][token], the
// rows of a tile lie as a row-major weight has them, so that a dense weight needs no packing at all.
#ifndef RAREFY_GEMM_H
#define RAREFY_GEMM_H

#include "quantize.h"

namespace rarefy::RAREFY_NAMESPACE {

#if RAREFY_V4 || defined(__AVX2__)
constexpr int tile_rows = 6;
#else
constexpr int tile_rows = 2;
#endif

// One piece of K for one tile of rows and one panel of tokens. sums += tile times panel, or = where `first`.
struct Piece {
    const void* tile;         // of a Kind's `Tile`, rows `tile_stride` entries apart
    std::int64_t tile_stride;
    const std::uint32_t* panel;  // [units][tokens of the panel]
    std::int64_t units;
    const float* scales;         // int8: [groups], `padded` apart, of the panel's first token on; else null
    const std::int32_t* starts;  // likewise
    std::int64_t padded;         // tokens of all panels
    float* sums;                 // rows `padded` entries apart
    bool first;
    const unsigned char* ahead;  // of the tile that comes next, rows `ahead_stride` bytes apart: fetched; or null
    std::int64_t ahead_stride;
};

// Sixteen units are a cache line of each row.
RAREFY_INLINE void fetch_ahead(const Piece& p, std::int64_t unit) {
    if (p.ahead != nullptr)
        for (int r = 0; r < tile_rows; ++r) __builtin_prefetch(p.ahead + r * p.ahead_stride + unit * 4, 0, 2);
}

// Vectors as wide as the registers: sixteen lanes that need several registers would be spilled.
#if RAREFY_V4
typedef F32 Wide;
#elif defined(__AVX2__)
typedef float Wide __attribute__((vector_size(32)));
#else
typedef float Wide __attribute__((vector_size(16)));
#endif
constexpr int wide = sizeof(Wide) / sizeof(float);

RAREFY_INLINE Wide load_wide(const void* p) {
    Wide v;
    std::memcpy(&v, p, sizeof v);
    return v;
}
RAREFY_INLINE void store_wide(float* p, Wide v) { std::memcpy(p, &v, sizeof v); }
RAREFY_INLINE Wide fma_wide(Wide a, Wide b, Wide c) {
#if RAREFY_V4
    return fma(a, b, c);
#else
    return a * b + c;
#endif
}

// Not inlined: beside other code the sums would not stay in registers.
#define RAREFY_ALONE __attribute__((noinline))

// Floats: N vectors of sixteen tokens.
template <int N>
RAREFY_ALONE void multiply_f32(const Piece& p) {
    constexpr int parts = N * lanes / wide;
    const auto* const tile = static_cast<const float*>(p.tile);
    Wide sum[tile_rows][parts];
    for (auto& row : sum)
        for (Wide& part : row) part = Wide{};
    const std::uint32_t* x = p.panel;
    for (std::int64_t u = 0; u < p.units;) {
        fetch_ahead(p, u);
        const std::int64_t end = u + lanes < p.units ? u + lanes : p.units;
        for (; u < end; ++u, x += N * lanes) {
            Wide piece[parts];
#pragma GCC unroll 8
            for (int i = 0; i < parts; ++i) piece[i] = load_wide(x + i * wide);
#pragma GCC unroll 8
            for (int r = 0; r < tile_rows; ++r) {
                const Wide w = Wide{} + tile[r * p.tile_stride + u];
#pragma GCC unroll 8
                for (int i = 0; i < parts; ++i) sum[r][i] = fma_wide(w, piece[i], sum[r][i]);
            }
        }
    }
    for (int r = 0; r < tile_rows; ++r)
        for (int i = 0; i < parts; ++i) {
            float* const at = p.sums + r * p.padded + i * wide;
            store_wide(at, p.first ? sum[r][i] : load_wide(at) + sum[r][i]);
        }
}

#if RAREFY_V4

// Pairs of bf16: N vectors of sixteen tokens.
template <int N>
RAREFY_ALONE void multiply_bf16(const Piece& p) {
    const auto* const tile = static_cast<const bf16*>(p.tile);
    __m512 sum[tile_rows][N];
    for (auto& row : sum)
        for (auto& part : row) part = _mm512_setzero_ps();
    const std::uint32_t* x = p.panel;
    for (std::int64_t u = 0; u < p.units;) {
        fetch_ahead(p, u);
        const std::int64_t end = u + lanes < p.units ? u + lanes : p.units;
        for (; u < end; ++u, x += N * lanes) {
            __m512i piece[N];
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) piece[i] = _mm512_loadu_si512(x + i * lanes);
#pragma GCC unroll 8
            for (int r = 0; r < tile_rows; ++r) {
                std::int32_t pair;
                std::memcpy(&pair, tile + r * p.tile_stride + 2 * u, sizeof pair);
                const __m512i w = _mm512_set1_epi32(pair);
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) sum[r][i] = _mm512_dpbf16_ps(sum[r][i], (__m512bh)w, (__m512bh)piece[i]);
            }
        }
    }
    for (int r = 0; r < tile_rows; ++r)
        for (int i = 0; i < N; ++i) {
            float* const at = p.sums + r * p.padded + i * lanes;
            _mm512_storeu_ps(at, p.first ? sum[r][i] : _mm512_add_ps(_mm512_loadu_ps(at), sum[r][i]));
        }
}

// Quads of int8, whole groups, the tile's entries with their sign bit turned (w + 128, unsigned): N vectors of sixteen tokens. Groups are added in ascending order, through all pieces.
template <int N>
RAREFY_ALONE void multiply_i8(const Piece& p) {
    constexpr int units = group / 4;
    const auto* tile = static_cast<const std::int8_t*>(p.tile);
    __m512 sum[tile_rows][N];
    for (int r = 0; r < tile_rows; ++r)
        for (int i = 0; i < N; ++i)
            sum[r][i] = p.first ? _mm512_setzero_ps() : _mm512_loadu_ps(p.sums + r * p.padded + i * lanes);
    const std::uint32_t* x = p.panel;
    const std::int64_t groups = p.units / units;
    for (std::int64_t g = 0; g < groups; ++g, tile += group) {
        fetch_ahead(p, g * units);
        __m512i whole[tile_rows][N];
        for (int i = 0; i < N; ++i) {
            const __m512i start = _mm512_loadu_si512(p.starts + g * p.padded + i * lanes);
            for (int r = 0; r < tile_rows; ++r) whole[r][i] = start;
        }
        for (int u = 0; u < units; ++u, x += N * lanes) {
            __m512i piece[N];
#pragma GCC unroll 8
            for (int i = 0; i < N; ++i) piece[i] = _mm512_loadu_si512(x + i * lanes);
#pragma GCC unroll 8
            for (int r = 0; r < tile_rows; ++r) {
                std::int32_t quad;
                std::memcpy(&quad, tile + r * p.tile_stride + 4 * u, sizeof quad);
                const __m512i w = _mm512_set1_epi32(quad);
#pragma GCC unroll 8
                for (int i = 0; i < N; ++i) whole[r][i] = _mm512_dpbusd_epi32(whole[r][i], w, piece[i]);
            }
        }
        for (int i = 0; i < N; ++i) {
            const __m512 scale = _mm512_loadu_ps(p.scales + g * p.padded + i * lanes);
            for (int r = 0; r < tile_rows; ++r)
                sum[r][i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[r][i]), scale, sum[r][i]);
        }
    }
    for (int r = 0; r < tile_rows; ++r)
        for (int i = 0; i < N; ++i) _mm512_storeu_ps(p.sums + r * p.padded + i * lanes, sum[r][i]);
}

#else

// Integers as floats, exact within a group: N vectors of sixteen tokens.
template <int N>
RAREFY_ALONE void multiply_i8(const Piece& p) {
    constexpr int parts = N * lanes / wide;
    alignas(64) float sums[tile_rows * N * lanes];
    if (p.first)
        for (int r = 0; r < tile_rows; ++r) std::memset(p.sums + r * p.padded, 0, sizeof(float) * N * lanes);
    for (std::int64_t g = 0; g * group < p.units; ++g) {
        Piece one = p;
        one.tile = static_cast<const float*>(p.tile) + g * group;
        one.panel = p.panel + g * group * N * lanes;
        one.units = group;
        one.padded = N * lanes;
        one.sums = sums;
        one.first = true;
        multiply_f32<N>(one);
        for (int i = 0; i < parts; ++i) {
            const Wide scale = load_wide(p.scales + g * p.padded + i * wide);
            for (int r = 0; r < tile_rows; ++r) {
                float* const at = p.sums + r * p.padded + i * wide;
                store_wide(at, fma_wide(load_wide(sums + r * N * lanes + i * wide), scale, load_wide(at)));
            }
        }
    }
}

#endif

// What a dtype's loops need: the entries of its tiles, columns per unit, the widest panel in vectors of sixteen tokens,
// and the columns of one piece of K.
template <int dtype>
struct Kind;

#if RAREFY_V4
template <>
struct Kind<RAREFY_F32> {
    using Tile = float;
    static constexpr int unit = 1, widest = 4, columns = 256;
    template <int N>
    static void multiply(const Piece& p) { multiply_f32<N>(p); }
};
template <>
struct Kind<RAREFY_BF16> {
    using Tile = bf16;
    static constexpr int unit = 2, widest = 4, columns = 512;
    template <int N>
    static void multiply(const Piece& p) { multiply_bf16<N>(p); }
};
template <>
struct Kind<RAREFY_I8> {
    using Tile = std::int8_t;
    static constexpr int unit = 4, widest = 2, columns = 1024;
    template <int N>
    static void multiply(const Piece& p) { multiply_i8<N>(p); }
};
#else
struct Floats {
    using Tile = float;
    static constexpr int unit = 1, widest = 1, columns = 256;
    template <int N>
    static void multiply(const Piece& p) { multiply_f32<N>(p); }
};
template <>
struct Kind<RAREFY_F32> : Floats {};
template <>
struct Kind<RAREFY_BF16> : Floats {};
template <>
struct Kind<RAREFY_I8> : Floats {
    template <int N>
    static void multiply(const Piece& p) { multiply_i8<N>(p); }
};
#endif

template <int dtype>
inline void multiply(int vectors, const Piece& p) {
    using K = Kind<dtype>;
    if constexpr (K::widest == 4) {
        if (vectors == 4) return K::template multiply<4>(p);
        if (vectors == 3) return K::template multiply<3>(p);
    }
    if constexpr (K::widest >= 2) {
        if (vectors == 2) return K::template multiply<2>(p);
    }
    K::template multiply<1>(p);
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
