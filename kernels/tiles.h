// Tiles of a weight for gemm.h: the rows themselves where they are dense and whole, copies padded with zeros at the
// edges, and rows of a bitmap made dense.
#ifndef RAREFY_TILES_H
#define RAREFY_TILES_H

#include "gemm.h"
#include "isa.h"
#include "values.h"

namespace rarefy::RAREFY_NAMESPACE {

RAREFY_INLINE float as_tile(float v, float) { return v; }
RAREFY_INLINE float as_tile(bf16 v, float) { return to_float(v); }
RAREFY_INLINE float as_tile(std::int8_t v, float) { return static_cast<float>(v); }
RAREFY_INLINE bf16 as_tile(bf16 v, bf16) { return v; }
// With the sign bit turned, as multiply_i8 wants it.
RAREFY_INLINE std::int8_t as_tile(std::int8_t v, std::int8_t) { return static_cast<std::int8_t>(v ^ -128); }

template <class Tile>
struct Tiled {
    const Tile* data;
    std::int64_t stride;
};

// Entries between two rows of a copied tile: a cache line more than a piece of K, so that rows do not meet in one set.
template <int dtype>
constexpr std::int64_t tile_stride() {
    return Kind<dtype>::columns + 64 / static_cast<std::int64_t>(sizeof(typename Kind<dtype>::Tile));
}

template <int dtype>
struct Dense {
    using Tile = typename Kind<dtype>::Tile;
    using Value = Stored<dtype>;
    const rarefy_weight& weight;
    Tile* copy;  // [tile_rows][tile_stride]

    // Rows row .. row + tile_rows - 1, or zeros for those past the end, and so many columns from k on, padded.
    Tiled<Tile> tile(std::int64_t row, std::int64_t k, std::int64_t columns, const Value**) const {
        const auto* const values = static_cast<const Value*>(weight.values);
        const std::int64_t rows = weight.rows - row < tile_rows ? weight.rows - row : tile_rows;
        const std::int64_t there = weight.cols - k < columns ? weight.cols - k : columns;
        if constexpr (sizeof(Tile) == sizeof(Value) && sizeof(Tile) > 1) {
            if (rows == tile_rows && there == columns) return {values + row * weight.cols + k, weight.cols};
        }
        for (std::int64_t r = 0; r < tile_rows; ++r) {
            Tile* const to = copy + r * tile_stride<dtype>();
            const Value* const from = values + (r < rows ? row + r : row) * weight.cols + k;
            const std::int64_t n = r < rows ? there : 0;
            if constexpr (sizeof(Tile) == sizeof(Value) && sizeof(Tile) > 1)
                std::memcpy(to, from, static_cast<std::size_t>(n) * sizeof(Tile));
            else
                for (std::int64_t i = 0; i < n; ++i) to[i] = as_tile(from[i], Tile{});
            std::memset(to + n, 0, static_cast<std::size_t>(columns - n) * sizeof(Tile));
        }
        return {copy, tile_stride<dtype>()};
    }

    // Where that tile will be read, and the step between its rows in bytes; null past the end.
    const unsigned char* source(std::int64_t row, std::int64_t k) const {
        if (row >= weight.rows || k >= weight.cols) return nullptr;
        return static_cast<const unsigned char*>(weight.values) +
               (row * weight.cols + k) * static_cast<std::int64_t>(sizeof(Value));
    }
    std::int64_t source_stride() const { return weight.cols * static_cast<std::int64_t>(sizeof(Value)); }
};

// Sets bits of `word` taken from `values` in order; what is not kept is zero.
template <class Tile, class Value>
RAREFY_INLINE const Value* expand_word(std::uint64_t word, const Value* values, const Value*, Tile* to) {
    std::memset(to, 0, 64 * sizeof(Tile));
    for (; word != 0; word &= word - 1) to[__builtin_ctzll(word)] = as_tile(*values++, Tile{});
    return values;
}

#if RAREFY_V4
// Reads past the last value of a word where that is inside the array, which is faster than a read of those alone.
RAREFY_INLINE const float* expand_word(std::uint64_t word, const float* values, const float* end, float* to) {
    const bool inside = end - values >= 64 + lanes;
    for (int i = 0; i < 4; ++i) {
        const auto bits = static_cast<__mmask16>(word >> (16 * i));
        const int n = __builtin_popcount(bits);
        const __m512 from = inside ? _mm512_loadu_ps(values)
                                   : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), values);
        _mm512_storeu_ps(to + lanes * i, _mm512_maskz_expand_ps(bits, from));
        values += n;
    }
    return values;
}
RAREFY_INLINE const bf16* expand_word(std::uint64_t word, const bf16* values, const bf16* end, bf16* to) {
    const bool inside = end - values >= 64 + 32;
    for (int i = 0; i < 2; ++i) {
        const auto bits = static_cast<__mmask32>(word >> (32 * i));
        const int n = __builtin_popcount(bits);
        const __m512i from = inside ? _mm512_loadu_si512(values)
                                    : _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1u), values);
        _mm512_storeu_si512(to + 32 * i, _mm512_maskz_expand_epi16(bits, from));
        values += n;
    }
    return values;
}
RAREFY_INLINE const std::int8_t* expand_word(std::uint64_t word, const std::int8_t* values, const std::int8_t* end,
                                             std::int8_t* to) {
    const int n = __builtin_popcountll(word);
    const auto first = static_cast<__mmask64>(n == 64 ? ~0ull : (1ull << n) - 1ull);
    const __m512i from = end - values >= 64 ? _mm512_loadu_si512(values) : _mm512_maskz_loadu_epi8(first, values);
    const __m512i dense = _mm512_maskz_expand_epi8(static_cast<__mmask64>(word), from);
    _mm512_storeu_si512(to, _mm512_xor_si512(dense, _mm512_set1_epi8(-128)));
    return values + n;
}
#endif

template <int dtype>
struct Bitmap {
    using Tile = typename Kind<dtype>::Tile;
    using Value = Stored<dtype>;
    const rarefy_weight& weight;
    Tile* copy;

    // As `Dense::tile`. cursor[r] is where the values of row `row + r` from column k on begin: moved on. k is a
    // multiple of 64, and words are made dense whole, up to the end of a piece.
    Tiled<Tile> tile(std::int64_t row, std::int64_t k, std::int64_t columns, const Value** cursor) const {
        const std::int64_t words = (weight.cols + 63) / 64, first = k / 64, last = (k + columns + 63) / 64;
        const auto* const index = static_cast<const std::uint64_t*>(weight.index);
        const Value* const end = static_cast<const Value*>(weight.values) + weight.units;
        for (std::int64_t r = 0; r < tile_rows; ++r) {
            Tile* const to = copy + r * tile_stride<dtype>();
            if (row + r >= weight.rows) {
                std::memset(to, 0, static_cast<std::size_t>(columns) * sizeof(Tile));
                continue;
            }
            const Value* values = cursor[r];
            for (std::int64_t i = first; i < last; ++i)
                values = expand_word(index[(row + r) * words + i], values, end, to + (i - first) * 64);
            cursor[r] = values;
        }
        return {copy, tile_stride<dtype>()};
    }

    const unsigned char* source(std::int64_t, std::int64_t) const { return nullptr; }  // read in order: no need
    std::int64_t source_stride() const { return 0; }
};

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
