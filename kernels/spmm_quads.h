// int8 on processors with its dot product: four units of a block row at a time, whole sums of each group of 64 columns.
//
// Activations are bytes, q + 128, a column 16 or 32 tokens; what the 128 adds is taken off where a group's sum starts.
// The sums of a group meet its scales once. Groups of a block row are therefore passed by their number of quads: the
// processor foresees every loop's end, and the sums stay in registers for a whole panel of groups.
#ifndef RAREFY_SPMM_QUADS_H
#define RAREFY_SPMM_QUADS_H

#include "spmm_quad_tile.h"

namespace rarefy::RAREFY_NAMESPACE {

#if RAREFY_V4

constexpr bool has_quads = true;

// One slab of packed activations, in blocks of up to two vectors.
struct Bytes {
    Blocks blocks;
    std::int64_t token;    // its first
    std::uint8_t* packed;  // [blocks][columns][width]
    float* scales;         // [groups][16 * vectors]
    std::int64_t cols;
    std::uint8_t* block(std::int64_t b) const { return packed + blocks.first(b) * lanes * cols; }
    float* group_scales(std::int64_t g, std::int64_t vector) const {
        return scales + (g * blocks.vectors + vector) * lanes;
    }
};

// Sixteen tokens of one group become q + 128, `step` bytes apart, for the first `some` columns. Returns their scales.
RAREFY_INLINE F32 quantize_bytes(F32 (&v)[group], std::int64_t some, std::uint8_t* to, std::int64_t step) {
    I32 most{};
    for (const F32& part : v) {
        const I32 m = magnitude(part);
        most = m > most ? m : most;
    }
    F32 scale = reinterpret_cast<F32>(most) / 127.0f;
    constexpr float shift = whole_shift + 128.0f;  // the lowest byte is then the whole number + 128
    const auto put = [&](std::int64_t i, F32 shifted) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i * step),
                         _mm512_cvtepi32_epi8(reinterpret_cast<__m512i>(shifted)));
    };
    // Quotients from 1 / scale and what that leaves over, which the smallest scales have too few digits for.
    const I32 zero = scale == 0.0f, simple = (scale > 1e-30f) & (most < 0x7f800000);
    if (_mm512_movepi32_mask(reinterpret_cast<__m512i>(zero | simple)) == 0xffff) {
        const F32 inverse = zero ? F32{} : 1.0f / scale, minus = -scale, middle = broadcast(shift);
        for (std::int64_t i = 0; i < some; ++i) {
            const F32 near = v[i] * inverse, left = fma(minus, near, v[i]);
            put(i, fma(left, inverse, near) + middle);
        }
        return scale;
    }
    scale = quantize_square(v);
    for (std::int64_t i = 0; i < some; ++i) put(i, v[i] + shift);
    return scale;
}

// One block of tokens, some columns.
inline void pack_bytes(const Job& job, const Bytes& slab, std::int64_t piece) {
    const std::int64_t b = piece % slab.blocks.count, begin = piece / slab.blocks.count * pack_columns;
    const std::int64_t width = slab.blocks.width(b) * lanes, first = slab.blocks.first(b);
    for (std::int64_t column = begin; column < at_most(begin + pack_columns, slab.cols); column += group)
        for (std::int64_t vector = first; vector < slab.blocks.first(b + 1); ++vector) {
            F32 v[group];
            const std::int64_t token = vector * lanes;
            read_group(*job.x, slab.cols, slab.token + token, slab.blocks.tokens - token, column, v);
            std::uint8_t* const to = slab.block(b) + column * width + (vector - first) * lanes;
            store(slab.group_scales(column / group, vector),
                  quantize_bytes(v, at_most(group, slab.cols - column), to, width));
        }
}

// How bytes of four columns become lanes of four: vector j of a block of NV.
template <int NV>
RAREFY_INLINE __m512i interleaving(int j) {
    std::uint8_t from[64];
    for (int i = 0; i < 64; ++i) from[i] = static_cast<std::uint8_t>(i % 4 * NV * lanes + j * lanes + i / 4);
    return _mm512_loadu_si512(from);
}

RAREFY_INLINE __m512i two_halves(const std::uint8_t* low, const std::uint8_t* high) {
    return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(low))),
                              _mm256_loadu_si256(reinterpret_cast<const __m256i*>(high)), 1);
}

// Four columns of a panel, lanes of four bytes.
template <int NV>
RAREFY_INLINE void read_quad(const std::uint8_t* x, const std::uint16_t* at, const __m512i (&how)[NV],
                             __m512i (&quad)[NV]) {
    const auto column = [&](int i) { return x + std::size_t{at[i]} * NV; };
    if constexpr (NV == 2) {
        const __m512i low = two_halves(column(0), column(1)), high = two_halves(column(2), column(3));
        for (int j = 0; j < NV; ++j) quad[j] = _mm512_permutex2var_epi8(low, how[j], high);
    } else {
        const auto part = [&](int i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(column(i))); };
        const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(part(0)), part(1), 1);
        const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(part(2)), part(3), 1);
        quad[0] = _mm512_permutexvar_epi8(how[0], _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1));
    }
}

// What the multiplication reads, moved on.
struct QuadReader {
    const std::uint8_t* groups;
    const std::uint16_t* columns;
    const std::int32_t *starts, *values;
};

// The groups of a stretch with so many quads each; a constant for the smallest numbers.
template <int BLOCK, int ROWS, int NV>
RAREFY_INLINE void add_groups(QuadReader& r, int groups, int quads, const std::uint8_t* x, const float* scales,
                              std::int64_t step, const __m512i (&how)[NV], __m512 (&sum)[ROWS][NV]) {
    for (; groups > 0; --groups) {
        __m512i whole[ROWS][NV];
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < NV; ++j) whole[i][j] = _mm512_set1_epi32(r.starts[i]);
        for (int q = 0; q < quads; ++q, r.columns += 4, r.values += BLOCK) {
            __m512i quad[NV];
            read_quad<NV>(x, r.columns, how, quad);
            for (int i = 0; i < ROWS; ++i)
                for (int j = 0; j < NV; ++j)
                    whole[i][j] = _mm512_dpbusd_epi32(whole[i][j], quad[j], _mm512_set1_epi32(r.values[i]));
        }
        const float* const scale = scales + *r.groups * step;
        for (int i = 0; i < ROWS; ++i)
            for (int j = 0; j < NV; ++j)
                sum[i][j] =
                    _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole[i][j]), _mm512_loadu_ps(scale + j * lanes), sum[i][j]);
        ++r.groups;
        r.starts += BLOCK;
    }
}

// One panel of all rows of a tile. `start`: [16 * NV], what sums begin with; null after the first panel.
template <int BLOCK, int NV>
RAREFY_APART void quad_rows(const QuadTile& tile, std::int64_t panel, const std::uint8_t* x, const float* scales,
                            std::int64_t step, const float* start, float* sums) {
    constexpr int ROWS = BLOCK < 4 ? BLOCK : 4;
    __m512i how[NV];
    for (int j = 0; j < NV; ++j) how[j] = interleaving<NV>(j);
    const Stretch* s = tile.stretches + panel * tile.count;
    for (std::int64_t i = 0; i < tile.count; ++i, ++s) {
        for (int row = 0; row < BLOCK; row += ROWS, sums += ROWS * NV * lanes) {
            QuadReader r = {tile.groups + s->entry, tile.columns + s->quad * 4, tile.starts + s->entry * BLOCK + row,
                            tile.values + s->quad * BLOCK + row};
            __m512 sum[ROWS][NV];
            for (int k = 0; k < ROWS; ++k)
                for (int j = 0; j < NV; ++j)
                    sum[k][j] = _mm512_loadu_ps(start != nullptr ? start + j * lanes : sums + (k * NV + j) * lanes);
            add_groups<BLOCK>(r, s->groups[0], 1, x, scales, step, how, sum);
            add_groups<BLOCK>(r, s->groups[1], 2, x, scales, step, how, sum);
            add_groups<BLOCK>(r, s->groups[2], 3, x, scales, step, how, sum);
            add_groups<BLOCK>(r, s->groups[3], 4, x, scales, step, how, sum);
            for (int k = 4; k < most_quads; ++k) add_groups<BLOCK>(r, s->groups[k], k + 1, x, scales, step, how, sum);
            for (int k = 0; k < ROWS; ++k)
                for (int j = 0; j < NV; ++j) _mm512_storeu_ps(sums + (k * NV + j) * lanes, sum[k][j]);
        }
    }
}

template <int BLOCK, typename Bounds>
inline void quads_of_tile(const Job& job, const QuadCut& c, const Bytes& slab, std::int64_t at, unsigned char* own,
                          const Bounds& find) {
    const rarefy_weight& w = *job.weight;
    const std::int64_t first = at * c.tile;
    const auto take = [&](std::size_t bytes) { return (own += bytes) - bytes; };
    float* const sums = reinterpret_cast<float*>(take(c.sums));
    auto* const bounds = reinterpret_cast<std::uint32_t*>(take(c.bounds));
    QuadTile tile{};
    tile.stretches = reinterpret_cast<Stretch*>(take(c.stretches));
    tile.groups = take(c.entries);
    tile.starts = reinterpret_cast<std::int32_t*>(take(c.starts));
    tile.columns = reinterpret_cast<std::uint16_t*>(take(c.columns));
    tile.values = reinterpret_cast<std::int32_t*>(take(c.values));
    tile.count = at_most(c.tile, (w.rows + BLOCK - 1) / BLOCK - first);
    quad_tile<BLOCK>(w, c, first, find, bounds, tile);
    const std::int64_t row = first * BLOCK, rows = at_most(tile.count * BLOCK, w.rows - row);
    for (std::int64_t b = 0; b < slab.blocks.count; ++b) {
        const int vectors = slab.blocks.width(b);
        float* const start = sums + c.tile * BLOCK * vectors * lanes;
        start_of_sums(slab.group_scales(0, slab.blocks.first(b)), slab.blocks.vectors * lanes, c.groups, vectors, start);
        for (std::int64_t p = 0; p < c.panels; ++p) {
            const std::uint8_t* const x = slab.block(b) + p * panel_groups * group * vectors * lanes;
            const float* const scales = slab.group_scales(p * panel_groups, slab.blocks.first(b));
            const auto rows_of = vectors == 1 ? quad_rows<BLOCK, 1> : quad_rows<BLOCK, 2>;
            rows_of(tile, p, x, scales, slab.blocks.vectors * lanes, p == 0 ? start : nullptr, sums);
        }
        const std::int64_t token = slab.blocks.first(b) * lanes;
        finish_any(job, sums, row, rows, slab.token + token, slab.blocks.tokens - token, vectors, nullptr);
    }
}

inline std::size_t quads_scratch(const Job& job, int threads) {
    const QuadCut c = quad_cut(job);
    return c.shared() + c.own() * static_cast<std::size_t>(threads);
}

// `find(columns, n, groups, bounds)`: where each group begins among the columns of a block row.
template <int BLOCK, typename Bounds>
inline void spmm_quads(const Job& job, int thread, int threads, const Bounds& find) {
    const QuadCut c = quad_cut(job);
    unsigned char* const own = job.scratch + c.shared() + c.own() * static_cast<std::size_t>(thread);
    Claims claims(job.counters);
    for (std::int64_t token = 0; token < job.tokens; token += c.slab) {
        const Bytes slab = {blocks_of(at_most(c.slab, job.tokens - token), widest_quads), token, job.scratch,
                            reinterpret_cast<float*>(job.scratch + c.packed), job.weight->cols};
        const std::int64_t pieces = slab.blocks.count * ((slab.cols + pack_columns - 1) / pack_columns);
        claims.phase(pieces, [&](std::int64_t piece) { pack_bytes(job, slab, piece); });
        barrier(threads);
        claims.phase(c.tiles, [&](std::int64_t at) { quads_of_tile<BLOCK>(job, c, slab, at, own, find); });
        barrier(threads);
    }
}

template <typename Bounds>
inline void quads(const Job& job, int thread, int threads, const Bounds& find) {
    switch (job.weight->block) {
        case 1: spmm_quads<1>(job, thread, threads, find); break;
        case 4: spmm_quads<4>(job, thread, threads, find); break;
        case 8: spmm_quads<8>(job, thread, threads, find); break;
        default: spmm_quads<16>(job, thread, threads, find); break;
    }
}

#else

constexpr bool has_quads = false;

inline std::size_t quads_scratch(const Job&, int) { return 0; }
template <typename Bounds>
inline void quads(const Job&, int, int, const Bounds&) {}

#endif

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
