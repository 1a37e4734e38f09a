// Products of a sparse weight with many tokens, on fp32 sums: what the forms share.
//
// Work is shared in one of two ways. Either every thread takes blocks of tokens, packs them (spmm_panels.h) and goes
// through all rows: nothing is written by one core and read by another. Or x is packed once, all threads together, and
// threads claim tiles: a range of block rows. A tile's units are brought into one shape (columns in 16 bits, fp32 values, where each panel of columns begins in each block
// row) and multiplied with one block of tokens after the other, panel after panel, sums in memory of the thread's own.
// A panel of x stays in the first-level cache while all rows of the tile use it; blocks of several rows use each loaded
// vector so often that the second level will do.
#ifndef RAREFY_SPMM_H
#define RAREFY_SPMM_H

#include "spmm_cut.h"
#include "spmm_dot.h"
#include "spmm_panels.h"
#include "spmm_rows.h"
#include "team.h"

namespace rarefy::RAREFY_NAMESPACE {

// Work that threads take piece by piece, in phases: one counter counts through all of them, so a piece that a thread
// takes too early waits with it for its phase.
class Claims {
  public:
    explicit Claims(std::int64_t* counter) : counter_(counter), next_(claim(counter)) {}
    template <typename Piece>
    RAREFY_INLINE void phase(std::int64_t pieces, const Piece& piece) {
        for (; next_ < before_ + pieces; next_ = claim(counter_)) piece(next_ - before_);
        before_ += pieces;
    }

  private:
    std::int64_t* counter_;
    std::int64_t before_ = 0, next_;
};

// One slab of packed activations.
struct Slab {
    Blocks blocks;
    std::int64_t token;  // its first
    float* packed;       // [blocks][columns][width]
    float* scales;       // int8: [groups][16 * vectors]
    std::int64_t cols;
    float* block(std::int64_t b) const { return packed + blocks.first(b) * lanes * cols; }
    bf16* dot_block(std::int64_t b) const {  // [columns][dot_width]; every block but the last may have padding
        return reinterpret_cast<bf16*>(packed) + (blocks.first(b) + b) * lanes * cols;
    }
    float* group_scales(std::int64_t g, std::int64_t b) const {
        return scales + (g * blocks.vectors + blocks.first(b)) * lanes;
    }
};

constexpr std::int64_t pack_columns = 256;  // in one piece of work

inline std::int64_t pack_pieces(const Slab& slab) {
    return slab.blocks.vectors * ((slab.cols + pack_columns - 1) / pack_columns);
}

// Rounds what the weight's dtype rounds.
RAREFY_INLINE void pack_group(const Job& job, const Slab& slab, std::int64_t vector, std::int64_t column) {
    const std::int64_t token = vector * lanes, b = slab.blocks.block_of(vector);
    const std::int64_t width = slab.blocks.width(b) * lanes, some = at_most(group, slab.cols - column);
    F32 v[group];
    read_group(*job.x, slab.cols, slab.token + token, slab.blocks.tokens - token, column, v);
    if (has_dot && job.weight->dtype == RAREFY_BF16) {
        const std::int64_t wide = dot_width(slab.blocks.width(b));
        bf16* const halves = slab.dot_block(b) + column * wide;
        for (std::int64_t i = 0; i < some; ++i) pack_dot(v[i], vector - slab.blocks.first(b), halves + i * wide);
        return;
    }
    if (job.weight->dtype == RAREFY_I8) {
        const F32 scale = quantize_square(v);
        store(slab.scales + (column / group * slab.blocks.vectors + vector) * lanes, scale);
    } else if (job.weight->dtype == RAREFY_BF16 && job.x->dtype == RAREFY_F32) {
        for (F32& part : v) {
            bf16 half[lanes];
            store(half, part);
            part = load(half);
        }
    }
    float* const to = slab.block(b) + column * width + (vector - slab.blocks.first(b)) * lanes;
    for (std::int64_t i = 0; i < some; ++i) store(to + i * width, v[i]);
}

inline void pack_piece(const Job& job, const Slab& slab, std::int64_t piece) {
    const std::int64_t vector = piece % slab.blocks.vectors, column = piece / slab.blocks.vectors * pack_columns;
    const std::int64_t last = at_most(column + pack_columns, slab.cols);
    for (std::int64_t c = column; c < last; c += group) pack_group(job, slab, vector, c);
}

// int8: 0, or NaN for a token that is not finite, whichever columns a row keeps. `scales`: of the first group, the next
// group's `step` entries behind.
inline void start_of_sums(const float* scales, std::int64_t step, std::int64_t groups, int vectors, float* start) {
    for (int j = 0; j < vectors; ++j) {
        F32 sum{};
        for (std::int64_t g = 0; g < groups; ++g) sum += load(scales + g * step + j * lanes) * 0.0f;
        store(start + j * lanes, sum);
    }
}

// Rows of as many units one after the other, in every panel: then the processor foresees where their loops end.
inline void order_rows(Tile& tile, std::uint16_t* order) {
    constexpr std::int64_t most = 63;
    const std::int64_t next = tile.panels + 1;
    tile.order = order;
    for (std::int64_t p = 0; p < tile.panels; ++p, order += tile.count) {
        std::uint32_t begin[most + 2] = {};
        const std::uint32_t* const bounds = tile.bounds + p;
        const auto units = [&](std::int64_t i) {
            return at_most(static_cast<std::int64_t>(bounds[i * next + 1]) - bounds[i * next], most);
        };
        for (std::int64_t i = 0; i < tile.count; ++i) ++begin[units(i) + 1];
        for (std::int64_t n = 0; n < most; ++n) begin[n + 1] += begin[n];
        for (std::int64_t i = 0; i < tile.count; ++i) order[begin[units(i)]++] = static_cast<std::uint16_t>(i);
    }
}

// All panels of a tile, with block `b` of the slab.
RAREFY_INLINE void multiply_tile(const Job& job, const Cut& c, const Slab& slab, std::int64_t b, const Tile& tile,
                                 int vectors, float* sums) {
    const int block = job.weight->block;
    for (std::int64_t p = 0; p < c.panels; ++p) {
        const std::int64_t column = tile.relative ? p * c.panel : 0;
        if (c.dot)
            dot_panel(tile, block, p, slab.dot_block(b) + column * dot_width(vectors), vectors, sums);
        else
            multiply_panel(tile, block, p, slab.block(b) + column * vectors * lanes, vectors,
                           c.groups > 0 ? slab.group_scales(p, b) : nullptr, sums);
    }
}

inline void finish_any(const Job& job, const float* sums, std::int64_t row, std::int64_t rows, std::int64_t token,
                       std::int64_t tokens, int vectors, const float* start) {
    if (job.y->dtype == RAREFY_BF16)
        finish<bf16>(job, sums, row, rows, token, tokens, vectors, start);
    else
        finish<float>(job, sums, row, rows, token, tokens, vectors, start);
}

// `Decode` brings block rows [first, first + count) into a Tile.
template <typename Decode>
inline void spmm_tile(const Job& job, const Cut& c, const Slab& slab, std::int64_t at, unsigned char* own,
                      const Decode& decode) {
    const rarefy_weight& w = *job.weight;
    const std::int64_t block_rows = (w.rows + w.block - 1) / w.block, first = at * c.tile;
    float* const sums = reinterpret_cast<float*>(own);
    own += c.sums;
    Tile tile{};
    tile.count = at_most(c.tile, block_rows - first);
    tile.bounds = reinterpret_cast<std::uint32_t*>(own);
    tile.panels = c.panels;
    own += c.bounds;
    decode(w, first, c.panel, reinterpret_cast<std::uint16_t*>(own), reinterpret_cast<float*>(own + c.columns), tile);
    if (c.dot)
        pair_tile(tile, w.block,
                  static_cast<const bf16*>(w.values) + static_cast<std::int64_t>(w.starts[first]) * w.block,
                  reinterpret_cast<std::uint16_t*>(own + c.columns + c.values),
                  reinterpret_cast<float*>(own + c.columns));
    if (c.ordered) order_rows(tile, reinterpret_cast<std::uint16_t*>(own + c.columns + c.values + c.paired));
    const std::int64_t row = first * w.block, rows = at_most(tile.count * w.block, w.rows - row);
    for (std::int64_t b = 0; b < slab.blocks.count; ++b) {
        const int vectors = slab.blocks.width(b);
        multiply_tile(job, c, slab, b, tile, vectors, sums);
        float* const spare = sums + c.tile * w.block * vectors * lanes;
        if (c.groups > 0)
            start_of_sums(slab.group_scales(0, b), slab.blocks.vectors * lanes, c.groups, vectors, spare);
        const float* const start = c.groups > 0 ? spare : nullptr;
        const std::int64_t token = slab.blocks.first(b) * lanes, tokens = slab.blocks.tokens - token;
        finish_any(job, sums, row, rows, slab.token + token, tokens, vectors, start);
    }
}

// The other way to share work: every thread takes whole blocks of tokens, which it packs for itself, so that no two
// cores write and read the same lines. Where the blocks can be dealt out evenly.
inline bool takes_blocks(const Job& job, const Cut& c, int threads) {
    const std::int64_t count = blocks_of(job.tokens, c.widest).count;
    const rarefy_weight& w = *job.weight;
    if (w.dtype != RAREFY_F32 && !c.dot) return false;
    if (count % threads != 0 && count < 4 * threads) return false;
    // Every thread reads the whole weight for each of its blocks: where a block of x stays in the second-level cache,
    // or the weight in the third.
    return w.cols * c.widest * lanes * 4 <= (384 << 10) || w.units * (2 + 4 * w.block) <= (6 << 20);
}

// Of all tiles: themselves, their bounds and orders, columns and values where those are not used as they are stored.
// Then one packed block and the sums of a tile for each thread.
struct Whole {
    std::size_t tiles, bounds, order, columns, paired, values, packed, sums;
    std::size_t shared() const { return tiles + bounds + order + columns + paired + values; }
    std::size_t own() const { return packed + sums; }
};

constexpr std::int64_t spare_columns = 64;  // of a tile: the bitmap's are written 32 at a time

inline Whole whole(const Job& job, const Cut& c) {
    const rarefy_weight& w = *job.weight;
    const std::int64_t rows = c.tiles * c.tile, width = c.widest * lanes, padded = w.units + rows * c.panels + 2;
    Whole size{};
    size.tiles = lines(c.tiles * static_cast<std::int64_t>(sizeof(Tile)));
    size.bounds = lines(rows * (c.panels + 1) * 4);
    size.order = c.ordered ? lines(rows * c.panels * 2) : 0;
    size.columns = w.form == RAREFY_BITMAP ? lines((w.units + (c.tiles + 1) * spare_columns) * 2) : 0;
    size.paired = c.dot ? lines(padded * 2 + 64) : 0;
    size.values = c.dot ? lines(padded * w.block * 2) : 0;
    size.packed = lines(w.cols * width * 4);
    size.sums = lines(c.tile * w.block * width * 4);
    return size;
}

// Brings tile `at` into the shape that is multiplied, in its part of the shared memory.
template <typename Decode>
inline void ready_tile(const Job& job, const Cut& c, const Whole& size, std::int64_t at, const Decode& decode) {
    const rarefy_weight& w = *job.weight;
    const std::int64_t first = at * c.tile, unit = w.starts[first];
    const std::int64_t padded = (unit + first * c.panels + 1) / 2 * 2;  // pairs: a tile takes an even number
    unsigned char* memory = job.scratch;
    Tile& tile = reinterpret_cast<Tile*>(memory)[at];
    tile = Tile{};
    tile.panels = c.panels;
    tile.count = at_most(c.tile, (w.rows + w.block - 1) / w.block - first);
    tile.bounds = reinterpret_cast<std::uint32_t*>(memory += size.tiles) + first * (c.panels + 1);
    std::uint16_t* const order = reinterpret_cast<std::uint16_t*>(memory += size.bounds) + first * c.panels;
    std::uint16_t* const columns = reinterpret_cast<std::uint16_t*>(memory += size.order) + unit + at * spare_columns;
    std::uint16_t* const paired = reinterpret_cast<std::uint16_t*>(memory += size.columns) + padded;
    float* const pairs = reinterpret_cast<float*>(memory += size.paired) + padded / 2 * w.block;
    decode(w, first, c.panel, columns, nullptr, tile);
    if (c.dot) pair_tile(tile, w.block, static_cast<const bf16*>(w.values) + unit * w.block, paired, pairs);
    if (c.ordered) order_rows(tile, order);
}

template <typename Decode>
inline void spmm_by_blocks(const Job& job, const Cut& c, int thread, int threads, const Decode& decode) {
    const rarefy_weight& w = *job.weight;
    const Whole size = whole(job, c);
    unsigned char* const own = job.scratch + size.shared() + size.own() * static_cast<std::size_t>(thread);
    float* const packed = reinterpret_cast<float*>(own);
    float* const sums = reinterpret_cast<float*>(own + size.packed);
    const Tile* const tiles = reinterpret_cast<const Tile*>(job.scratch);
    Claims claims(job.counters);
    claims.phase(c.tiles, [&](std::int64_t at) { ready_tile(job, c, size, at, decode); });
    barrier(threads);
    const Blocks blocks = blocks_of(job.tokens, c.widest);
    claims.phase(blocks.count, [&](std::int64_t b) {
        const int vectors = blocks.width(b);
        const std::int64_t token = blocks.first(b) * lanes, tokens = job.tokens - token;
        const Slab slab = {blocks_of(at_most(tokens, vectors * lanes), vectors), token, packed, nullptr, w.cols};
        for (std::int64_t column = 0; column < w.cols; column += group)
            for (std::int64_t vector = 0; vector < vectors; ++vector) pack_group(job, slab, vector, column);
        for (std::int64_t at = 0; at < c.tiles; ++at) {
            multiply_tile(job, c, slab, 0, tiles[at], vectors, sums);
            const std::int64_t row = at * c.tile * w.block, rows = at_most(tiles[at].count * w.block, w.rows - row);
            finish_any(job, sums, row, rows, token, tokens, vectors, nullptr);
        }
    });
}

inline std::size_t spmm_scratch(const Job& job, int threads) {
    const Cut c = cut(job);
    const Whole size = whole(job, c);
    return takes_blocks(job, c, threads) ? size.shared() + size.own() * static_cast<std::size_t>(threads)
                                         : c.shared() + c.own() * static_cast<std::size_t>(threads);
}

template <typename Decode>
inline void spmm(const Job& job, int thread, int threads, const Decode& decode) {
    const Cut c = cut(job);
    if (takes_blocks(job, c, threads)) return spmm_by_blocks(job, c, thread, threads, decode);
    unsigned char* const own = job.scratch + c.shared() + c.own() * static_cast<std::size_t>(thread);
    Claims claims(job.counters);
    for (std::int64_t token = 0; token < job.tokens; token += c.slab) {
        const Slab slab = {blocks_of(at_most(c.slab, job.tokens - token), c.widest), token,
                           reinterpret_cast<float*>(job.scratch), reinterpret_cast<float*>(job.scratch + c.packed),
                           job.weight->cols};
        claims.phase(pack_pieces(slab), [&](std::int64_t piece) { pack_piece(job, slab, piece); });
        barrier(threads);
        claims.phase(c.tiles, [&](std::int64_t tile) { spmm_tile(job, c, slab, tile, own, decode); });
        barrier(threads);
    }
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
