// int8 weights in quads: four units of a block row at a time, four weights of each row in a lane.
#ifndef RAREFY_SPMM_QUAD_TILE_H
#define RAREFY_SPMM_QUAD_TILE_H

#include "spmm.h"

namespace rarefy::RAREFY_NAMESPACE {

#if RAREFY_V4

constexpr int widest_quads = 2;                // vectors of tokens in a block: their sums, twice, fill the registers
constexpr std::int64_t panel_groups = lanes;   // 32 KiB of two vectors' activations
constexpr int most_quads = group / 4;          // of a group
constexpr std::size_t spare = 64;              // bytes behind what is written a cache line at a time

// The groups of one block row in one panel that have units.
struct Stretch {
    std::uint32_t entry, quad;         // the first ones
    std::uint8_t groups[most_quads];   // how many have 1, 2 ... quads
};

// Block rows of a weight in quads.
struct QuadTile {
    Stretch* stretches;      // [panels][count]
    std::uint8_t* groups;    // [entries]: within the panel
    std::int32_t* starts;    // [entries][block]: -128 times the sum of the weights
    std::uint16_t* columns;  // [quads][4]: 16 times the column within the panel
    std::int32_t* values;    // [quads][block]: four weights each
    std::int64_t count;
};

// How one product is cut up, for any number of threads.
struct QuadCut {
    std::int64_t slab, vectors;  // tokens packed at a time
    std::int64_t tile, tiles;    // block rows
    std::int64_t groups, panels;
    std::size_t packed, scales;  // bytes of a slab
    std::size_t sums, bounds, stretches, entries, starts, columns, values;  // bytes of a thread
    std::size_t shared() const { return packed + scales; }
    std::size_t own() const { return sums + bounds + stretches + entries + starts + columns + values; }
};

inline QuadCut quad_cut(const Job& job) {
    const rarefy_weight& w = *job.weight;
    const std::int64_t block_rows = (w.rows + w.block - 1) / w.block, in_squares = at_least(lanes / w.block, 1);
    QuadCut c{};
    c.slab = at_most(at_least((3 << 20) / w.cols / 192 * 192, 192), job.tokens);
    c.vectors = (c.slab + lanes - 1) / lanes;
    c.groups = groups_of(w.cols);
    c.panels = at_least((c.groups + panel_groups - 1) / panel_groups, 1);
    c.tile = at_least(at_most(block_rows / 8 / in_squares * in_squares, 256 / w.block), in_squares);
    c.tiles = (block_rows + c.tile - 1) / c.tile;
    const std::int64_t units = most_units(w, block_rows, c.tile), entries = at_most(units, c.tile * c.groups);
    const std::int64_t quads = units / 4 + entries;
    c.packed = lines(c.vectors * lanes * w.cols);
    c.scales = lines(c.vectors * lanes * c.groups * 4);
    c.sums = lines((c.tile * w.block + 1) * widest_quads * lanes * 4);
    c.bounds = lines((c.groups + 1) * 4);
    c.stretches = lines(c.tile * c.panels * static_cast<std::int64_t>(sizeof(Stretch)));
    c.entries = lines(entries);
    c.starts = lines(entries * w.block * 4) + spare;
    c.columns = lines(quads * 4 * 2) + spare;
    c.values = lines(quads * w.block * 4) + spare;
    return c;
}

// The n units of one group become quads: what the last one lacks is 0 times the group's first column. Writes up to a
// cache line past their end, faster than what ends in time: groups are brought here in the order in which they stand.
template <int BLOCK>
RAREFY_INLINE void to_quads(const std::uint16_t* columns, const std::int8_t* values, std::int64_t n, std::int64_t panel,
                            __m512i turned, std::uint16_t* to_columns, std::int32_t* to_values, std::int32_t* start) {
    const __m128i by = _mm_cvtsi32_si128(4);
    if (BLOCK == 4 && n <= 8) {  // nearly all groups of sparse weights: half as much to store
        const auto some = static_cast<__mmask8>((1u << n) - 1u);
        const __m128i column = _mm_mask_loadu_epi16(_mm_set1_epi16(static_cast<short>(columns[0])), some, columns);
        const __m128i base = _mm_set1_epi16(static_cast<short>(panel * panel_groups * group));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to_columns), _mm_sll_epi16(_mm_sub_epi16(column, base), by));
        const __m256i units = _mm256_maskz_loadu_epi32(some, values);
        const __m256i quads = _mm256_permutexvar_epi8(_mm512_castsi512_si256(turned), units);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_values), quads);
        const __m256i sums = _mm256_dpbusd_epi32(_mm256_setzero_si256(), _mm256_set1_epi8(-128), quads);
        const __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(start), _mm_sub_epi32(_mm_setzero_si128(), sum));
        return;
    }
    constexpr std::int64_t most = BLOCK == 1 ? 32 : 64 / BLOCK;  // units at a time
    const __m512i first = _mm512_set1_epi16(static_cast<short>(columns[0]));
    const __m512i base = _mm512_set1_epi16(static_cast<short>(panel * panel_groups * group));
    __m512i sum = _mm512_setzero_si512();
    for (std::int64_t i = 0; i < n; i += most) {
        const std::int64_t some = at_most(most, n - i);
        const auto mask = [](std::int64_t bits) { return bits >= 64 ? ~0ull : (1ull << bits) - 1; };
        const __m512i column = _mm512_mask_loadu_epi16(first, static_cast<__mmask32>(mask(some)), columns + i);
        const __m512i offset = _mm512_sll_epi16(_mm512_sub_epi16(column, base), by);
        if (most <= 16)
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to_columns + i), _mm512_castsi512_si256(offset));
        else
            _mm512_storeu_si512(to_columns + i, offset);
        const __m512i units = _mm512_maskz_loadu_epi8(mask(some * BLOCK), values + i * BLOCK);
        const __m512i quads = _mm512_permutexvar_epi8(turned, units);
        _mm512_storeu_si512(to_values + i / 4 * BLOCK, quads);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), quads);
    }
    if (BLOCK <= 8) sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, sum, 8));
    if (BLOCK <= 4) sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, sum, 4));
    if (BLOCK == 1) sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, sum, 2));
    if (BLOCK == 1) sum = _mm512_add_epi32(sum, _mm512_alignr_epi32(sum, sum, 1));
    sum = _mm512_sub_epi32(_mm512_setzero_si512(), sum);
    if (BLOCK <= 4)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(start), _mm512_castsi512_si128(sum));
    else
        _mm512_storeu_si512(start, sum);
}

// Block rows first .. first + tile.count - 1. `bounds`: [groups + 1], for one block row at a time.
template <int BLOCK, typename Bounds>
RAREFY_APART void quad_tile(const rarefy_weight& w, const QuadCut& c, std::int64_t first, const Bounds& find,
                            std::uint32_t* bounds, const QuadTile& tile) {
    std::uint8_t order[64];
    for (int i = 0; i < 64; ++i)
        order[i] = static_cast<std::uint8_t>(i / (4 * BLOCK) * (4 * BLOCK) + i % 4 * BLOCK + i % (4 * BLOCK) / 4);
    const __m512i turned = _mm512_loadu_si512(order);
    const __m512i counting = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    std::uint32_t entry = 0, quad = 0;
    for (std::int64_t i = 0; i < tile.count; ++i) {
        const std::int64_t unit = w.starts[first + i];
        const std::uint16_t* const columns = static_cast<const std::uint16_t*>(w.index) + unit;
        const std::int8_t* const values = static_cast<const std::int8_t*>(w.values) + unit * BLOCK;
        find(columns, w.starts[first + i + 1] - unit, c.groups, bounds);
        for (std::int64_t p = 0; p < c.panels; ++p) {
            Stretch& s = tile.stretches[p * tile.count + i];
            s = Stretch{entry, quad, {}};
            const std::int64_t begin = p * panel_groups, end = at_most(begin + panel_groups, c.groups);
            const auto some = static_cast<__mmask16>((1u << (end - begin)) - 1u);
            const __m512i units = _mm512_sub_epi32(_mm512_maskz_loadu_epi32(some, bounds + begin + 1),
                                                   _mm512_maskz_loadu_epi32(some, bounds + begin));
            const __m512i quads = _mm512_srli_epi32(_mm512_add_epi32(units, _mm512_set1_epi32(3)), 2);
            std::uint8_t sorted[2 * panel_groups];  // by their number of quads
            int there = 0;
            __mmask16 left = _mm512_test_epi32_mask(quads, quads);
            for (int k = 1; left != 0; ++k) {
                const __mmask16 these = _mm512_mask_cmpeq_epi32_mask(left, quads, _mm512_set1_epi32(k));
                const __m128i found = _mm512_cvtepi32_epi8(_mm512_maskz_compress_epi32(these, counting));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(sorted + there), found);
                s.groups[k - 1] = static_cast<std::uint8_t>(__builtin_popcount(these));
                there += s.groups[k - 1];
                left = static_cast<__mmask16>(left & ~these);
            }
            for (int k = 0; k < there; ++k, ++entry) {
                const std::int64_t g = begin + sorted[k];
                const std::uint32_t at = bounds[g], n = bounds[g + 1] - at;
                tile.groups[entry] = sorted[k];
                to_quads<BLOCK>(columns + at, values + at * BLOCK, n, p, turned,
                                tile.columns + quad * 4, tile.values + quad * BLOCK, tile.starts + entry * BLOCK);
                quad += (n + 3) / 4;
            }
        }
    }
}

#endif

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
