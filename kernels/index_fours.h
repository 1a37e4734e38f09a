// Rows of 4 x 1 blocks in registers of sixteen floats.
#ifndef RAREFY_INDEX_FOURS_H
#define RAREFY_INDEX_FOURS_H

#include "index_rows.h"

#if RAREFY_V4

namespace rarefy::RAREFY_NAMESPACE {

// A row of blocks of 4, several tokens: lanes are [row][4 tokens] of one register or [row][8 tokens] of two.
template <int D, int Wide>
void dot_fours_tokens(const IndexRows& part, std::int64_t block_row, float (*out)[lanes], int tokens) {
    constexpr int H = Wide / 4;
    const std::uint16_t* const columns = part.columns(block_row);
    const Stored<D>* const values = part.values<D, 4>(block_row);
    const std::int64_t n = part.units(block_row);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i from = _mm512_srli_epi32(lane, H + 1);  // the row of a lane
    __m512i place[4][H];
    for (int u = 0; u < 4; ++u)
        for (int h = 0; h < H; ++h) place[u][h] = _mm512_add_epi32(from, _mm512_set1_epi32(u * 4 + h * 2));
    __m512 acc[4][H];
    for (auto& unit : acc)
        for (auto& a : unit) a = _mm512_setzero_ps();
    const auto unit = [&](__m512 v, std::int64_t i, int u) __attribute__((always_inline)) {
        const float* const x = part.x + std::int64_t{columns[i + u]} * Wide;
        __m512 in;
        if constexpr (Wide == 4)
            in = _mm512_broadcast_f32x4(_mm_loadu_ps(x));
        else
            in = _mm512_broadcast_f32x8(_mm256_loadu_ps(x));
        for (int h = 0; h < H; ++h) acc[u][h] = _mm512_fmadd_ps(_mm512_permutexvar_ps(place[u][h], v), in, acc[u][h]);
    };
    std::int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        prefetch(columns + i, 1024);
        prefetch(values + i * 4, 2048);
        const __m512 v = sixteen(values + i * 4, 0xffff);
        for (int u = 0; u < 4; ++u) unit(v, i, u);
    }
    const __m512 rest = sixteen(values + i * 4, static_cast<__mmask16>((1u << ((n - i) * 4)) - 1u));
    for (int u = 0; u < n - i; ++u) unit(rest, i, u);
    for (int h = 0; h < H; ++h) {
        float total[lanes];
        _mm512_storeu_ps(total, _mm512_add_ps(_mm512_add_ps(acc[0][h], acc[1][h]), _mm512_add_ps(acc[2][h], acc[3][h])));
        for (int t = 0; t < tokens; ++t)
            for (int r = 0; r < 4 / H; ++r) out[t][h * 2 + r] = total[r * Wide + t];
    }
}

// A row of blocks of 4, one token: four blocks fill a register.
RAREFY_INLINE __m512 four_blocks(const std::uint16_t* columns, __m512 values, const float* x, __m512 acc) {
    __m512 in = _mm512_broadcastss_ps(_mm_load_ss(x + columns[0]));
    in = _mm512_mask_broadcastss_ps(in, 0x00f0, _mm_load_ss(x + columns[1]));
    in = _mm512_mask_broadcastss_ps(in, 0x0f00, _mm_load_ss(x + columns[2]));
    in = _mm512_mask_broadcastss_ps(in, 0xf000, _mm_load_ss(x + columns[3]));
    return _mm512_fmadd_ps(values, in, acc);
}
template <int D>
Floats<4> dot_fours(const IndexRows& part, std::int64_t block_row) {
    const std::uint16_t* const columns = part.columns(block_row);
    const Stored<D>* const values = part.values<D, 4>(block_row);
    const std::int64_t n = part.units(block_row);
    __m512 acc[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    std::int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
        if (i % 16 == 0) prefetch(columns + i, 1024);
        prefetch(values + i * 4, 2048);
        if constexpr (D == RAREFY_F32) prefetch(values + i * 4, 2048 + 64);
        acc[0] = four_blocks(columns + i, sixteen(values + i * 4, 0xffff), part.x, acc[0]);
        acc[1] = four_blocks(columns + i + 4, sixteen(values + i * 4 + lanes, 0xffff), part.x, acc[1]);
    }
    for (; i + 4 <= n; i += 4) acc[0] = four_blocks(columns + i, sixteen(values + i * 4, 0xffff), part.x, acc[0]);
    const F32 all = reinterpret_cast<F32>(_mm512_add_ps(acc[0], acc[1]));
    Floats<4> v[4];
    std::memcpy(v, &all, sizeof v);
    v[0] = v[0] + v[1] + (v[2] + v[3]);
    for (; i < n; ++i) v[0] += load_as_floats<4>(values + i * 4) * part.x[columns[i]];
    return v[0];
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif

#endif
