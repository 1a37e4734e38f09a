// Sparse convolutions: a product of the weight with the images, in which column (c, i, j) is channel c of the padded
// images at an offset.
//
// Work is cut into tiles of a few vectors of output pixels and, where there are few tiles, into shares of the rows.
// The input around a tile is packed into scratch (conv_pack.h) for as many channels as stay in a cache while all rows
// pass over them. Each thread begins with a part of the work that is the same in every call, so that it finds weights
// and outputs in its own caches, and then helps the others. Each output is summed by one thread over ascending columns,
// one fused multiply-add after the other, so nothing depends on the cuts.
//
// Weights of any dtype multiply fp32 activations in fp32: bf16 activations are widened, fp32 ones are not rounded.
// int8 weights are no reason to quantise activations here: y is scale * (sum of value * activation). So a NaN or an
// infinity reaches what dense arithmetic on the kept weights would reach.

#include "conv_plan.h"
#include "conv_rows.h"
#include "families.h"
#include "team.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

enum { DECODE = 0, QUEUES = 1 };  // counters
constexpr int most_queues = job_counters - QUEUES;

struct Memory {
    std::uint16_t* columns;
    std::int32_t* offsets;
    unsigned char* segments;
    float* panel;
    float* sums;
    u32* cursors;
};

Memory memory_of(const ConvJob& job, const Plan& plan, int thread) {
    unsigned char* at = job.scratch;
    Memory m;
    m.columns = reinterpret_cast<std::uint16_t*>(at);
    at += plan.column_bytes;
    at += plan.own_bytes * thread;
    m.offsets = reinterpret_cast<std::int32_t*>(at);
    at += plan.offset_bytes;
    m.segments = at;
    at += plan.segment_bytes;
    m.panel = reinterpret_cast<float*>(at);
    at += plan.panel_bytes;
    m.sums = reinterpret_cast<float*>(at);
    at += plan.sum_bytes;
    m.cursors = reinterpret_cast<u32*>(at);
    return m;
}

// The columns of a row of a bitmap.
void decode_row(const std::uint64_t* bits, i64 words, std::uint16_t* columns) {
    for (i64 w = 0; w < words; ++w) {
        for (std::uint64_t left = bits[w]; left != 0; left &= left - 1)
            *columns++ = static_cast<std::uint16_t>(w * 64 + __builtin_ctzll(left));
    }
}

void decode(const ConvJob& job, std::uint16_t* columns) {
    const rarefy_weight& w = *job.conv->weight;
    const std::uint64_t* bits = static_cast<const std::uint64_t*>(w.index);
    const i64 words = ceil_div(w.cols, 64), piece = 16;
    for (i64 r; (r = claim(&job.counters[DECODE], piece)) < w.rows;)
        for (i64 k = r; k < least(w.rows, r + piece); ++k) decode_row(bits + k * words, words, columns + w.starts[k]);
}

template <typename X>
void pack_from(const ConvJob& job, const Plan& plan, i64 from, i64 to, const Pieces& p, float* slabs) {
    const X* x = static_cast<const X*>(job.x);
    if (job.conv->stride_w > 1)
        pack<true>(plan, *job.conv, x, from, to, p, slabs);
    else
        pack<false>(plan, *job.conv, x, from, to, p, slabs);
}

void pack_any(const ConvJob& job, const Plan& plan, i64 from, i64 to, const Pieces& p, float* slabs) {
    if (job.conv->dtype == RAREFY_BF16)
        pack_from<bf16>(job, plan, from, to, p, slabs);
    else
        pack_from<float>(job, plan, from, to, p, slabs);
}

Pieces find_pieces(const ConvJob& job, const Plan& plan, const Memory& m, i64 tile) {
    Pieces p = pieces_in(plan, m.segments, tile);
    find_inputs(plan, *job.conv, p);
    find_outputs(plan, p);
    return p;
}

// Part of a share in two halves, the second one first if `swapped`: two threads that went through the rows of
// neighbouring tiles in step would take the cache lines that both write from each other at every row.
template <typename V>
void multiply_halves(Part part, const Memory& m, bool swapped) {
    const i64 from = part.from, to = part.to, middle = from + (to - from) / 2;
    const i64 row = part.plan->block * part.pieces->width * lanes;
    for (int half = 0; half < 2; ++half) {
        const bool second = (half == 1) != swapped;
        part.from = second ? middle : from;
        part.to = second ? to : middle;
        part.sums = m.sums + (part.from - from) * row;
        part.cursors = m.cursors + (part.from - from);
        if (part.plan->block == 1)
            multiply_width<1, V>(part);
        else
            multiply_width<together, V>(part);
    }
}

// One share of the rows of a tile, whose slabs are in m.panel already if `packed`.
template <typename V>
void multiply_share(const ConvJob& job, const Plan& plan, const Memory& m, const Pieces& p, i64 share, bool packed,
                    bool swapped) {
    const rarefy_weight& w = *job.conv->weight;
    const i64 channel = plan.phases * plan.slab;
    Part part{};
    part.plan = &plan;
    part.job = &job;
    part.pieces = &p;
    part.columns = w.form == RAREFY_BITMAP ? m.columns : static_cast<const std::uint16_t*>(w.index);
    part.offsets = m.offsets;
    part.from = plan.block_rows * share / plan.shares;
    part.to = plan.block_rows * (share + 1) / plan.shares;
    part.panel = m.panel;
    for (i64 b = part.from; b < part.to; ++b) m.cursors[b - part.from] = w.starts[b];
    for (i64 k = 0; k < plan.panels; ++k) {
        const i64 from = k * plan.panel_channels, to = least(plan.channels, from + plan.panel_channels);
        part.last = static_cast<int>(to * plan.taps);
        part.begins = k == 0;
        part.ends = k == plan.panels - 1;
        part.base = plan.kept ? 0 : from * channel;
        if (!packed) pack_any(job, plan, from, to, p, m.panel + from * channel - part.base);
        multiply_halves<V>(part, m, swapped);
    }
}

// Every thread begins with a queue of its own.
template <typename V>
void multiply_all(const ConvJob& job, const Plan& plan, const Memory& m, int thread, int threads) {
    const i64 tasks = plan.strips * plan.tiles * plan.shares, queues = least(threads, most_queues);
    i64 found = -1;
    Pieces p{};
    for (i64 n = 0; n < queues; ++n) {
        const i64 queue = (thread + n) % queues, begin = tasks * queue / queues, end = tasks * (queue + 1) / queues;
        for (i64 k; (k = begin + claim(&job.counters[QUEUES + queue])) < end;) {
            const i64 tile = k % (plan.strips * plan.tiles), share = k / (plan.strips * plan.tiles);
            const bool again = tile == found;
            if (!again) p = find_pieces(job, plan, m, tile);
            found = tile;
            multiply_share<V>(job, plan, m, p, share, again && plan.kept, thread % 2 == 1);
        }
    }
}

std::size_t scratch(const ConvJob& job, int threads) {
    i64 bytes = 0;
    for (int team = 1; team <= threads; ++team) {  // the team may turn out smaller than asked for
        Plan plan;
        if (!make_plan(job, team, plan)) return SIZE_MAX;
        bytes = most(bytes, plan.column_bytes + plan.own_bytes * team);
    }
    return static_cast<std::size_t>(bytes);
}

template <typename V>
void run(const ConvJob& job, int thread, int threads) {
    Plan plan;
    if (!make_plan(job, threads, plan)) return;
    const Memory m = memory_of(job, plan, thread);
    find_offsets(plan, *job.conv, m.offsets);
    if (plan.column_bytes > 0) {
        decode(job, m.columns);
        barrier(threads);
    }
    multiply_all<V>(job, plan, m, thread, threads);
}

}  // namespace

const Convolution conv[dtypes] = {{scratch, run<float>}, {scratch, run<bf16>}, {scratch, run<std::int8_t>}};

}  // namespace rarefy::RAREFY_NAMESPACE
