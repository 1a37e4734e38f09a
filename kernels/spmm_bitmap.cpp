// Products of the bitmap form for many tokens: the bits of a tile become columns, then as for 16-bit columns.

#include "families.h"
#include "spmm.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

// The positions of the bits of `word`, plus `base`, to columns[0], columns[1] ...; room for 64. Returns how many.
RAREFY_INLINE int positions(std::uint64_t word, std::int64_t base, std::uint16_t* columns) {
#if RAREFY_V4
    const __m512i counting = _mm512_set_epi8(
        63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41, 40, 39, 38, 37, 36,
        35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18, 17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7,
        6, 5, 4, 3, 2, 1, 0);
    const __m512i found = _mm512_maskz_compress_epi8(word, counting);
    const __m512i from = _mm512_set1_epi16(static_cast<short>(base));
    const int n = __builtin_popcountll(word);
    _mm512_storeu_si512(columns, _mm512_add_epi16(from, _mm512_cvtepu8_epi16(_mm512_castsi512_si256(found))));
    if (n > 32)
        _mm512_storeu_si512(columns + 32,
                            _mm512_add_epi16(from, _mm512_cvtepu8_epi16(_mm512_extracti64x4_epi64(found, 1))));
    return n;
#else
    int n = 0;
    for (; word != 0; word &= word - 1) columns[n++] = static_cast<std::uint16_t>(base + __builtin_ctzll(word));
    return n;
#endif
}

void widen(const void* from, int dtype, std::int64_t first, std::int64_t n, float* to) {
    if (dtype == RAREFY_BF16) {
        const bf16* const values = static_cast<const bf16*>(from) + first;
        for (std::int64_t i = 0; i < n; ++i) to[i] = to_float(values[i]);
    } else {
        const std::int8_t* const values = static_cast<const std::int8_t*>(from) + first;
        for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(values[i]);
    }
}

void decode(const rarefy_weight& w, std::int64_t first, std::int64_t panel, std::uint16_t* columns, float* values,
            Tile& tile) {
    const std::int64_t words = (w.cols + 63) / 64, per_panel = panel / 64;
    const std::int64_t start = w.starts[first], units = w.starts[first + tile.count] - start;
    const std::uint64_t* bits = static_cast<const std::uint64_t*>(w.index) + first * words;
    std::uint32_t* bounds = tile.bounds;
    std::int64_t at = 0;
    for (std::int64_t i = 0; i < tile.count; ++i, bits += words) {
        for (std::int64_t p = 0; p < tile.panels; ++p) {
            *bounds++ = static_cast<std::uint32_t>(at);
            const std::int64_t end = at_most((p + 1) * per_panel, words);
            for (std::int64_t word = p * per_panel; word < end; ++word)
                at += positions(bits[word], (word - p * per_panel) * 64, columns + at);
        }
        *bounds++ = static_cast<std::uint32_t>(at);
    }
    tile.columns = columns;
    tile.relative = true;
    tile.values = values;
    if (w.dtype == RAREFY_F32)
        tile.values = static_cast<const float*>(w.values) + start;
    else if (w.dtype == RAREFY_I8 || !has_dot)
        widen(w.values, w.dtype, start, units, values);
}

void run(const Job& job, int thread, int threads) { spmm(job, thread, threads, decode); }

}  // namespace

extern const Algorithm spmm_bitmap[dtypes];
const Algorithm spmm_bitmap[dtypes] = {{spmm_scratch, run}, {spmm_scratch, run}, {spmm_scratch, run}};

}  // namespace rarefy::RAREFY_NAMESPACE
