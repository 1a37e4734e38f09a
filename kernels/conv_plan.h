// How one convolution is cut: output pixels into tiles, channels into panels, rows into shares.
#ifndef RAREFY_CONV_PLAN_H
#define RAREFY_CONV_PLAN_H

#include "isa.h"
#include "simd.h"

namespace rarefy::RAREFY_NAMESPACE {

using i64 = std::int64_t;
using u32 = std::uint32_t;

// Vectors of pixels that stay in registers for one row of the weight, and for `together` rows of a block.
#if RAREFY_V4
constexpr int together = 4, widest_row = 7, widest_block = 6;
#elif defined(__AVX2__)
constexpr int together = 2, widest_row = 4, widest_block = 2;
#else
constexpr int together = 2, widest_row = 2, widest_block = 1;
#endif
constexpr int widest = widest_row > widest_block ? widest_row : widest_block;

constexpr i64 near_bytes = 24 << 10;   // a panel that stays in the first-level cache
constexpr i64 far_bytes = 384 << 10;   // one that stays in the second-level cache
constexpr i64 kept_bytes = 640 << 10;  // the slabs of a whole tile that do
constexpr i64 worthwhile = 12;         // units of a row in a near panel that pay for fetching its sums

struct Plan {
    i64 out_h, out_w, out_image;  // one output channel of one image
    i64 rows, cols, block, block_rows;
    i64 channels, taps, images;
    i64 phases_h, phases_w, phases;  // with a stride, taps fall into phases: each reads only every other input
    // Positions: output pixels row by row, `pitch` apart from row to row. With one tap and no padding the pixels of all
    // images in a row; otherwise each image for itself, with positions between its rows that are no pixels.
    bool merged;
    i64 pitch, positions, strips;  // positions of a strip: an image, or all
    i64 vectors, tiles, shares;    // vectors and tiles of a strip
    i64 slab;                      // entries of one channel and phase of a tile: its positions and what taps reach
    i64 panel_channels, panels;
    bool kept;  // a thread keeps the slabs of all channels of a tile, not of one panel
    // Scratch, in bytes: for all threads, then for each.
    i64 column_bytes;
    i64 offset_bytes, segment_bytes, panel_bytes, sum_bytes, cursor_bytes, own_bytes;
};

RAREFY_INLINE i64 least(i64 a, i64 b) { return a < b ? a : b; }
RAREFY_INLINE i64 most(i64 a, i64 b) { return a > b ? a : b; }
RAREFY_INLINE i64 rounded_up(i64 n, i64 to) { return (n + to - 1) / to * to; }
RAREFY_INLINE i64 ceil_div(i64 n, i64 by) { return (n + by - 1) / by; }
RAREFY_INLINE i64 modulo(i64 a, i64 n) { return ((a % n) + n) % n; }

// The first vector of tile t of a strip.
RAREFY_INLINE i64 tile_start(const Plan& plan, i64 t) { return plan.vectors * t / plan.tiles; }

// The most rows that sixteen positions in a row can lie in.
RAREFY_INLINE i64 pieces(const Plan& plan) { return least(lanes, (lanes - 2) / plan.pitch + 2); }

inline void plan_positions(const rarefy_conv2d& c, Plan& plan) {
    plan.phases_h = least(c.stride_h, c.kernel_h);
    plan.phases_w = least(c.stride_w, c.kernel_w);
    plan.phases = plan.phases_h * plan.phases_w;
    plan.merged = plan.taps == 1 && c.pad_h == 0 && c.pad_w == 0;
    plan.pitch = plan.out_w + (c.kernel_w - 1) / c.stride_w;
    plan.strips = plan.merged ? 1 : plan.images;
    plan.positions = plan.merged ? plan.images * plan.out_image : (plan.out_h - 1) * plan.pitch + plan.out_w;
}

// Tiles and shares of the rows. A cache line that one core wrote is slow to reach another: each thread packs for itself
// what it needs, and few tiles of one strip are not divided among threads, since rows of the output seldom end with a
// cache line, but the rows are.
inline void plan_tiles(int threads, Plan& plan) {
    plan.vectors = ceil_div(plan.positions, lanes);
    plan.tiles = ceil_div(plan.vectors, plan.block > 1 ? widest_block : widest_row);
    plan.shares = 1;
    const i64 all = plan.tiles * plan.strips;
    if (threads > 1 && all < 4 * threads && (plan.strips == 1 || all % threads != 0))
        plan.shares = most(1, least(threads, plan.block_rows * plan.block / 16));
}

inline void plan_cuts(const rarefy_conv2d& c, int threads, Plan& plan) {
    plan_tiles(threads, plan);
    const i64 width = ceil_div(plan.vectors, plan.tiles);
    const i64 reach = (c.kernel_h - 1) / c.stride_h * plan.pitch + (c.kernel_w - 1) / c.stride_w;
    plan.slab = rounded_up(width * lanes + reach, lanes);
    const i64 channel = plan.phases * plan.slab * 4;
    const i64 per_row = c.weight->units / most(1, plan.block_rows);  // units
    i64 channels = near_bytes / channel;
    if (plan.block > 1 || per_row * channels < worthwhile * plan.channels) channels = far_bytes / channel;
    plan.panel_channels = least(most(1, channels), most(1, plan.channels));
    plan.panels = most(1, ceil_div(plan.channels, plan.panel_channels));
    plan.kept = plan.channels * channel <= kept_bytes;
    plan.panel_bytes = (plan.kept ? plan.channels : plan.panel_channels) * channel;
    plan.sum_bytes = ceil_div(plan.block_rows, plan.shares) * plan.block * width * lanes * 4;
    plan.cursor_bytes = rounded_up(ceil_div(plan.block_rows, plan.shares) * 4, 64);
}

// False where there is no kernel: another form, or a geometry that makes no output.
inline bool make_plan(const ConvJob& job, int threads, Plan& plan) {
    const rarefy_conv2d& c = *job.conv;
    const rarefy_weight& w = *c.weight;
    const bool form = (w.form == RAREFY_BITMAP && w.block == 1) ||
                      (w.form == RAREFY_INDEX16 && (w.block == 1 || w.block == 4 || w.block == 8 || w.block == 16));
    if (!form || w.cols > 65536 || (c.dtype != RAREFY_F32 && c.dtype != RAREFY_BF16)) return false;
    if (w.dtype == RAREFY_F32 && c.dtype != RAREFY_F32) return false;
    if (c.stride_h < 1 || c.stride_w < 1 || c.kernel_h < 1 || c.kernel_w < 1 || c.pad_h < 0 || c.pad_w < 0)
        return false;
    const i64 free_h = i64{c.height} + 2 * i64{c.pad_h} - c.kernel_h;
    const i64 free_w = i64{c.width} + 2 * i64{c.pad_w} - c.kernel_w;
    if (free_h < 0 || free_w < 0 || w.rows < 1) return false;
    plan.taps = i64{c.kernel_h} * c.kernel_w;
    if (w.cols != c.in_channels * plan.taps) return false;
    plan.out_h = free_h / c.stride_h + 1;
    plan.out_w = free_w / c.stride_w + 1;
    plan.out_image = plan.out_h * plan.out_w;
    plan.rows = w.rows;
    plan.cols = w.cols;
    plan.block = w.block;
    plan.block_rows = ceil_div(w.rows, w.block);
    plan.channels = c.in_channels;
    plan.images = job.images;
    plan_positions(c, plan);
    plan_cuts(c, threads, plan);
    if (plan.channels * plan.phases * plan.slab > INT32_MAX) return false;  // offsets have 32 bits
    plan.column_bytes = w.form == RAREFY_BITMAP ? rounded_up(w.units * 2 + 128, 64) : 0;
    plan.offset_bytes = rounded_up(w.cols * 4, 64);
    plan.segment_bytes = rounded_up((plan.phases * plan.slab / lanes + widest + 1) * (pieces(plan) + 1) * 16, 64);
    plan.own_bytes = plan.offset_bytes + plan.segment_bytes + plan.panel_bytes + plan.sum_bytes + plan.cursor_bytes;
    return true;
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
