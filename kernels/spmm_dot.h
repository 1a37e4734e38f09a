// bf16 on processors with its dot product: two units of a block row at a time, fp32 sums.
//
// A column is packed as 32 tokens in 64 bytes (64 tokens in 128), and its tokens stand so that interleaving the low and
// the high halves of two columns' 128-bit lanes leaves sixteen pairs each, tokens in order.
#ifndef RAREFY_SPMM_DOT_H
#define RAREFY_SPMM_DOT_H

#include "spmm_rows.h"

namespace rarefy::RAREFY_NAMESPACE {

#if RAREFY_V4

constexpr bool has_dot = true;

inline std::int64_t dot_width(int vectors) { return (vectors + 1) / 2 * 32; }  // bf16 entries of a packed column

// Sixteen tokens of one column, vector `vector` of its block, to the column's place.
RAREFY_INLINE void pack_dot(F32 v, std::int64_t vector, bf16* column) {
    const auto half = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(v)));
    const __m128i low = _mm256_castsi256_si128(half), high = _mm256_extracti128_si256(half, 1);
    std::int64_t quarters[4] = {_mm_cvtsi128_si64(low), _mm_extract_epi64(low, 1), _mm_cvtsi128_si64(high),
                                _mm_extract_epi64(high, 1)};
    bf16* const to = column + vector / 2 * 32 + vector % 2 * 4;
    for (int i = 0; i < 4; ++i) std::memcpy(to + i * 8, quarters + i, sizeof quarters[i]);
}

// Units [n][BLOCK] of bf16 become pairs [ceil(n / 2)][BLOCK], 0 for what the last one lacks; so do the columns, which
// repeat the last one.
template <int BLOCK>
RAREFY_INLINE std::int64_t pair_up(const std::uint16_t* columns, const bf16* values, std::int64_t n, __m512i order,
                                   std::uint16_t* to_columns, bf16* to_values) {
    const auto first = [](std::int64_t entries) {
        return static_cast<__mmask32>(entries >= 32 ? ~0u : (1u << entries) - 1u);
    };
    if (n == 0) return 0;
    const std::int64_t even = (n + 1) / 2 * 2;
    const __m512i last = _mm512_set1_epi16(static_cast<short>(columns[n - 1]));
    const auto put = [&](std::uint16_t* to, std::int64_t room, __m512i v) {  // masked stores take much longer
        if (room >= 32)
            _mm512_storeu_si512(to, v);
        else
            _mm512_mask_storeu_epi16(to, first(room), v);
    };
    for (std::int64_t i = 0; i < even; i += 32)
        put(to_columns + i, even - i, _mm512_mask_loadu_epi16(last, first(n - i), columns + i));
    for (std::int64_t i = 0; i < even * BLOCK; i += 32) {
        const __m512i units = _mm512_maskz_loadu_epi16(first(n * BLOCK - i), values + i);
        put(to_values + i, even * BLOCK - i, _mm512_permutexvar_epi16(order, units));
    }
    return even;
}

template <int BLOCK>
RAREFY_APART void pair_rows(Tile& tile, const bf16* values, std::uint16_t* columns, bf16* pairs) {
    std::uint16_t order[32];
    for (int i = 0; i < 32; ++i)
        order[i] = static_cast<std::uint16_t>(i / (2 * BLOCK) * (2 * BLOCK) + i % 2 * BLOCK + i % (2 * BLOCK) / 2);
    const __m512i how = _mm512_loadu_si512(order);
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < tile.count; ++i) {
        std::uint32_t* const bounds = tile.bounds + i * (tile.panels + 1);
        for (std::int64_t p = 0; p < tile.panels; ++p) {
            const std::int64_t first = bounds[p], n = bounds[p + 1] - first;
            bounds[p] = static_cast<std::uint32_t>(at);
            at += pair_up<BLOCK>(tile.columns + first, values + first * BLOCK, n, how, columns + at,
                                 pairs + at * BLOCK);
        }
        bounds[tile.panels] = static_cast<std::uint32_t>(at);
    }
}

// The tile with its units paired, in memory of its own; `values`: the tile's own, as stored.
inline void pair_tile(Tile& tile, int block, const bf16* values, std::uint16_t* columns, float* pairs) {
    auto* const to = reinterpret_cast<bf16*>(pairs);
    switch (block) {
        case 1: pair_rows<1>(tile, values, columns, to); break;
        case 4: pair_rows<4>(tile, values, columns, to); break;
        case 8: pair_rows<8>(tile, values, columns, to); break;
        default: pair_rows<16>(tile, values, columns, to); break;
    }
    tile.columns = columns;
    tile.values = pairs;
}

template <int ROWS, int NV, int BLOCK>
RAREFY_INLINE void dot_row(const bf16* x, const std::uint16_t* columns, const float* values, std::int64_t n,
                           float* sums, bool fresh) {
    constexpr std::size_t width = (NV + 1) / 2 * 32;
    __m512 sum[ROWS][NV];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < NV; ++j)
            sum[r][j] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(sums + (r * NV + j) * lanes);
    for (std::int64_t i = 0; i < n; i += 2, values += BLOCK) {
        const bf16* const a = x + columns[i] * width;
        const bf16* const b = x + columns[i + 1] * width;
        __m512i pairs[NV];
        for (int j = 0; j < NV; j += 2) {
            const __m512i even = _mm512_loadu_si512(a + j * lanes), odd = _mm512_loadu_si512(b + j * lanes);
            pairs[j] = _mm512_unpacklo_epi16(even, odd);
            if (j + 1 < NV) pairs[j + 1] = _mm512_unpackhi_epi16(even, odd);
        }
        for (int r = 0; r < ROWS; ++r) {
            std::int32_t two;
            std::memcpy(&two, values + r, sizeof two);
            const auto value = reinterpret_cast<__m512bh>(_mm512_set1_epi32(two));
            for (int j = 0; j < NV; ++j)
                sum[r][j] = _mm512_dpbf16_ps(sum[r][j], reinterpret_cast<__m512bh>(pairs[j]), value);
        }
    }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < NV; ++j) _mm512_storeu_ps(sums + (r * NV + j) * lanes, sum[r][j]);
}

template <int BLOCK, int NV>
RAREFY_APART void dot_rows(const Tile& tile, std::int64_t panel, const bf16* x, float* sums) {
    constexpr int ROWS = BLOCK < rows_at_once ? BLOCK : rows_at_once;
    const std::uint32_t* bounds = tile.bounds + panel;
    const std::int64_t count = tile.count, next = tile.panels + 1;
    const std::uint16_t* const columns = tile.columns;
    const float* const values = tile.values;
    for (std::int64_t i = 0; i < count; ++i, bounds += next, sums += BLOCK * NV * lanes) {
        const std::int64_t first = bounds[0], n = bounds[1] - first;
        if (n == 0 && panel > 0) continue;
        for (int r = 0; r < BLOCK; r += ROWS)
            dot_row<ROWS, NV, BLOCK>(x, columns + first, values + first * BLOCK / 2 + r, n, sums + r * NV * lanes,
                                     panel == 0);
    }
}

template <int BLOCK>
inline void dot_wide(const Tile& tile, std::int64_t panel, const bf16* x, int vectors, float* sums) {
    switch (vectors) {
        case 1: dot_rows<BLOCK, 1>(tile, panel, x, sums); break;
        case 2: dot_rows<BLOCK, 2>(tile, panel, x, sums); break;
        case 3: dot_rows<BLOCK, 3>(tile, panel, x, sums); break;
        default: dot_rows<BLOCK, 4>(tile, panel, x, sums); break;
    }
}

// multiply_panel (spmm_rows.h) for a paired tile.
inline void dot_panel(const Tile& tile, int block, std::int64_t panel, const bf16* x, int vectors, float* sums) {
    switch (block) {
        case 1: dot_wide<1>(tile, panel, x, vectors, sums); break;
        case 4: dot_wide<4>(tile, panel, x, vectors, sums); break;
        case 8: dot_wide<8>(tile, panel, x, vectors, sums); break;
        default: dot_wide<16>(tile, panel, x, vectors, sums); break;
    }
}

#else

constexpr bool has_dot = false;

inline std::int64_t dot_width(int) { return 0; }
RAREFY_INLINE void pack_dot(F32, std::int64_t, bf16*) {}
inline void pair_tile(Tile&, int, const bf16*, std::uint16_t*, float*) {}
inline void dot_panel(const Tile&, int, std::int64_t, const bf16*, int, float*) {}

#endif

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
