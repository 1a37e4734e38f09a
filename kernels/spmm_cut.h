// How a product with many tokens is cut up: into slabs of tokens, tiles of rows and panels of columns.
#ifndef RAREFY_SPMM_CUT_H
#define RAREFY_SPMM_CUT_H

#include "spmm_dot.h"
#include "spmm_panels.h"

namespace rarefy::RAREFY_NAMESPACE {

// How one product is cut up, for any number of threads.
struct Cut {
    int widest;                    // vectors of tokens in a block
    std::int64_t slab;             // tokens packed at a time
    std::int64_t tile, tiles;      // block rows in a tile
    std::int64_t panel, panels;    // columns
    std::int64_t groups;           // int8: of 64 columns
    bool ordered;                  // rows of a panel by their number of units
    bool dot;                      // bf16 with dot products: two units at a time
    std::size_t packed, scales;    // bytes of a slab
    std::size_t sums, bounds, columns, values, paired, order;  // bytes of a thread
    std::size_t shared() const { return packed + scales; }
    std::size_t own() const { return sums + bounds + columns + values + paired + order; }
};

inline std::size_t lines(std::int64_t bytes) { return static_cast<std::size_t>((bytes + 63) / 64 * 64); }

inline std::int64_t at_least(std::int64_t a, std::int64_t b) { return a > b ? a : b; }
inline std::int64_t at_most(std::int64_t a, std::int64_t b) { return a < b ? a : b; }

// The units of the tile with the most.
inline std::int64_t most_units(const rarefy_weight& w, std::int64_t block_rows, std::int64_t tile) {
    std::int64_t most = 0;
    for (std::int64_t first = 0; first < block_rows; first += tile) {
        const std::int64_t last = at_most(first + tile, block_rows);
        most = at_least(most, static_cast<std::int64_t>(w.starts[last]) - w.starts[first]);
    }
    return most;
}

// Single entries: a panel in which a row meets units enough to pay for taking up the row, from what the first-level
// cache holds to what the second level spares.
inline std::int64_t panel_bytes(const rarefy_weight& w, std::int64_t block_rows) {
    const std::int64_t wanted = 32 * block_rows * w.cols / at_least(w.units, 1) * widest_row * lanes * 4;
    return at_least(at_most(wanted, 256 << 10), 32 << 10);
}

// The largest power of two of columns that so many bytes hold.
inline std::int64_t panel_columns(std::int64_t bytes, std::int64_t column) {
    std::int64_t columns = group;
    while (columns * 2 * column <= bytes) columns *= 2;
    return columns;
}

inline Cut cut(const Job& job) {
    const rarefy_weight& w = *job.weight;
    const std::int64_t block_rows = (w.rows + w.block - 1) / w.block;
    const bool bitmap = w.form == RAREFY_BITMAP;
    Cut c{};
    c.dot = has_dot && w.dtype == RAREFY_BF16;
    c.widest = w.block > 1 || c.dot ? widest_block : widest_row;
    c.slab = at_least((12 << 20) / (w.cols * 4) / 192 * 192, 192);
    c.slab = at_most(c.slab, job.tokens);
    const Blocks blocks = blocks_of(c.slab, c.widest);
    const std::int64_t width = lanes * ((blocks.vectors + blocks.count - 1) / blocks.count);
    const std::int64_t column = c.dot ? dot_width(static_cast<int>(width / lanes)) * 2 : width * 4;
    c.panel = panel_columns(w.block > 1 ? 256 << 10 : panel_bytes(w, block_rows), column);
    if (w.dtype == RAREFY_I8) c.panel = group;
    c.panels = at_least((w.cols + c.panel - 1) / c.panel, 1);
    c.groups = w.dtype == RAREFY_I8 ? groups_of(w.cols) : 0;
    // Enough tiles to share out, each small enough for the second-level cache and worth fetching a panel for.
    const std::int64_t in_squares = at_least(lanes / w.block, 1);
    const std::int64_t even = block_rows / 8 / in_squares * in_squares;
    c.tile = at_least(at_most(even, 256 / w.block), at_least(64 / w.block, in_squares));
    c.tiles = (block_rows + c.tile - 1) / c.tile;
    const std::int64_t units = most_units(w, block_rows, c.tile);
    c.packed = lines((c.slab + lanes - 1) / lanes * lanes * w.cols * 4);
    c.scales = lines((c.slab + lanes - 1) / lanes * lanes * c.groups * 4);
    c.sums = lines(c.tile * w.block * width * 4 + width * 4);
    c.bounds = lines(c.tile * (c.panels + 1) * 4);
    c.ordered = w.block == 1 && !c.dot && blocks.count > 1 && c.panels > 1;
    c.order = c.ordered ? lines(c.tile * c.panels * 2) : 0;
    c.columns = bitmap ? lines(units * 2 + 128) : 0;  // positions are written 32 at a time
    c.values = w.dtype != RAREFY_F32 ? lines(units * w.block * 4) : 0;
    if (c.dot) {  // a unit more for every odd stretch
        const std::int64_t padded = units + c.tile * c.panels;
        c.paired = lines(padded * 2 + 64);
        c.values = lines(padded * w.block * 2);
    }
    return c;
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
