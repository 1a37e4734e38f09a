// The inner loops of products with many tokens: fp32 sums of a few rows and up to four vectors of tokens in registers.
#ifndef RAREFY_SPMM_ROWS_H
#define RAREFY_SPMM_ROWS_H

#include "simd.h"

// Kept a function of its own, so that its loops get the registers to themselves.
#define RAREFY_APART inline __attribute__((noinline))

namespace rarefy::RAREFY_NAMESPACE {

// Block rows of a weight, ready to be multiplied. Units of block row i in panel p: bounds[i][p] up to bounds[i][p + 1].
struct Tile {
    const std::uint16_t* columns;  // one per unit: within its panel if `relative`, else of the weight
    const float* values;           // [units][block]
    std::uint32_t* bounds;         // [count][panels + 1]
    std::uint16_t* order;          // [panels][count], or null: in which order a panel passes the block rows
    std::int64_t count, panels;
    bool relative;
};

// How many vectors of tokens and how many rows the registers hold: v4 has 32 of one vector each, v3 16 of half a
// vector, the baseline 16 of a quarter.
#if defined(__AVX512F__)
constexpr int widest_row = 4, widest_block = 4, rows_at_once = 4;
#elif defined(__AVX2__)
constexpr int widest_row = 3, widest_block = 1, rows_at_once = 4;
#else
constexpr int widest_row = 2, widest_block = 1, rows_at_once = 2;
#endif

// Sixteen times the entry at p: one load where the processor has it, which adding to zeros is not.
RAREFY_INLINE F32 spread(const float* p) {
#if defined(__AVX512F__)
    return reinterpret_cast<F32>(_mm512_set1_ps(*p));
#else
    const float x = *p;
    return F32{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
#endif
}

// Sixteen times each of the two entries at p, of which the second is not touched unless PAIR.
template <bool PAIR>
RAREFY_INLINE void spread_two(const float* p, F32 (&v)[2]) {
#if defined(__AVX512F__)
    if (PAIR) {
        double both;
        std::memcpy(&both, p, sizeof both);
        const __m512 pairs = _mm512_castpd_ps(_mm512_set1_pd(both));
        v[0] = reinterpret_cast<F32>(_mm512_moveldup_ps(pairs));
        v[1] = reinterpret_cast<F32>(_mm512_movehdup_ps(pairs));
        return;
    }
#endif
    v[0] = spread(p);
    if (PAIR) v[1] = spread(p + 1);
}

// sum [NV] += value times the column at x.
template <int NV>
RAREFY_INLINE void add_column(const float* x, F32 value, F32 (&sum)[NV]) {
    for (int j = 0; j < NV; ++j) sum[j] = fma(value, load(x + j * lanes), sum[j]);
}

// Single entries: sum [NV] = values [n] times x [columns][16 * NV]. A register's next multiply-add must wait for the
// one before it, so there are as many sets of registers as hide that, summed at the end.
template <int NV>
RAREFY_INLINE void sum_row(const float* x, const std::uint16_t* columns, const float* values, std::int64_t n,
                           F32 (&sum)[NV]) {
    constexpr std::size_t width = NV * lanes;
    constexpr int sets = NV == 1 ? 4 : NV < 4 ? 2 : 1;
    if constexpr (sets == 1) {
        const std::uint16_t* const even = columns + (n & ~std::int64_t{1});
        F32 value[2];
        for (; columns < even; columns += 2, values += 2) {
            spread_two<true>(values, value);
            add_column<NV>(x + columns[0] * width, value[0], sum);
            add_column<NV>(x + columns[1] * width, value[1], sum);
        }
        if (n & 1) {
            spread_two<false>(values, value);
            add_column<NV>(x + columns[0] * width, value[0], sum);
        }
        return;
    } else {
        F32 more[sets][NV] = {};
        for (int j = 0; j < NV; ++j) more[0][j] = sum[j];
        const std::uint16_t* const end = columns + n;
        F32 value[2];
        if (n & 1) {
            spread_two<false>(values++, value);
            add_column<NV>(x + *columns++ * width, value[0], more[0]);
        }
        if (sets == 4 && (n & 2)) {
            spread_two<true>(values, value);
            add_column<NV>(x + columns[0] * width, value[0], more[0]);
            add_column<NV>(x + columns[1] * width, value[1], more[1]);
            columns += 2;
            values += 2;
        }
        for (; columns < end; columns += sets, values += sets) {
            for (int i = 0; i < sets; i += 2) {
                spread_two<true>(values + i, value);
                add_column<NV>(x + columns[i] * width, value[0], more[i]);
                add_column<NV>(x + columns[i + 1] * width, value[1], more[i + 1]);
            }
        }
        for (int j = 0; j < NV; ++j)
            sum[j] = sets == 4 ? (more[0][j] + more[1][j]) + (more[sets - 2][j] + more[sets - 1][j])
                               : more[0][j] + more[1][j];
    }
}

// sums [ROWS][16 * NV] += values [n][stride] times x [columns][16 * NV], times scales [16 * NV] if SCALED: int8, whose
// sums of one group are whole numbers below 2^24, so exact. `fresh`: sums holds nothing yet.
template <int ROWS, int NV, bool SCALED, int stride>
RAREFY_INLINE void multiply_row(const float* x, const std::uint16_t* columns, const float* values, std::int64_t n,
                                const float* scales, float* sums, bool fresh) {
    constexpr std::size_t width = NV * lanes;
    F32 sum[ROWS][NV];
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < NV; ++j)
            sum[r][j] = fresh || SCALED ? F32{} : load(sums + static_cast<std::size_t>(r) * width + j * lanes);
    if (ROWS == 1) {
        sum_row<NV>(x, columns, values, n, sum[0]);
    } else {
        for (std::int64_t i = 0; i < n; ++i, values += stride)
            for (int r = 0; r < ROWS; ++r) add_column<NV>(x + columns[i] * width, spread(values + r), sum[r]);
    }
    for (int r = 0; r < ROWS; ++r)
        for (int j = 0; j < NV; ++j) {
            float* const to = sums + static_cast<std::size_t>(r) * width + j * lanes;
            store(to, SCALED ? fma(sum[r][j], load(scales + j * lanes), fresh ? F32{} : load(to)) : sum[r][j]);
        }
}

template <int BLOCK, int NV, bool SCALED>
RAREFY_APART void multiply_rows(const Tile& tile, std::int64_t panel, const float* x, const float* scales,
                                float* sums) {
    constexpr int ROWS = BLOCK < rows_at_once ? BLOCK : rows_at_once;
    const std::uint32_t* bounds = tile.bounds + panel;
    const std::int64_t count = tile.count, next = tile.panels + 1;
    const std::uint16_t* const columns = tile.columns;
    const float* const values = tile.values;
    if (BLOCK == 1 && tile.order != nullptr) {
        const std::uint16_t* const order = tile.order + panel * count;
        for (std::int64_t i = 0; i < count; ++i) {
            const std::int64_t row = order[i], first = bounds[row * next], n = bounds[row * next + 1] - first;
            if (n == 0 && panel > 0) continue;
            multiply_row<ROWS, NV, SCALED, BLOCK>(x, columns + first, values + first, n, scales,
                                                  sums + row * NV * lanes, panel == 0);
        }
        return;
    }
    for (std::int64_t i = 0; i < count; ++i, bounds += next, sums += BLOCK * NV * lanes) {
        const std::int64_t first = bounds[0], n = bounds[1] - first;
        if (n == 0 && panel > 0) continue;
        for (int r = 0; r < BLOCK; r += ROWS)
            multiply_row<ROWS, NV, SCALED, BLOCK>(x, columns + first, values + first * BLOCK + r, n, scales,
                                                  sums + r * NV * lanes, panel == 0);
    }
}

template <int BLOCK, bool SCALED>
inline void multiply_wide(const Tile& tile, std::int64_t panel, const float* x, int vectors, const float* scales,
                          float* sums) {
    switch (vectors) {
        case 1: multiply_rows<BLOCK, 1, SCALED>(tile, panel, x, scales, sums); break;
        case 2: multiply_rows<BLOCK, 2, SCALED>(tile, panel, x, scales, sums); break;
        case 3: multiply_rows<BLOCK, 3, SCALED>(tile, panel, x, scales, sums); break;
        default: multiply_rows<BLOCK, 4, SCALED>(tile, panel, x, scales, sums); break;
    }
}

template <bool SCALED>
inline void multiply_blocks(const Tile& tile, int block, std::int64_t panel, const float* x, int vectors,
                            const float* scales, float* sums) {
    switch (block) {
        case 1: multiply_wide<1, SCALED>(tile, panel, x, vectors, scales, sums); break;
        case 4: multiply_wide<4, SCALED>(tile, panel, x, vectors, scales, sums); break;
        case 8: multiply_wide<8, SCALED>(tile, panel, x, vectors, scales, sums); break;
        default: multiply_wide<16, SCALED>(tile, panel, x, vectors, scales, sums); break;
    }
}

// One panel of all rows of a tile; the first panel sets the sums, the others add to them. `scales`: those of the
// panel's columns, then one group of int8, else null.
inline void multiply_panel(const Tile& tile, int block, std::int64_t panel, const float* x, int vectors,
                           const float* scales, float* sums) {
    if (scales == nullptr)
        multiply_blocks<false>(tile, block, panel, x, vectors, scales, sums);
    else
        multiply_blocks<true>(tile, block, panel, x, vectors, scales, sums);
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
