// The look-up form (lookup.h) times any number of tokens: eight at a time share one reading of the weights.
//
// A piece of work is some slices, whose weights stay in the second-level cache, times some squares of sixteen tokens.
// Each thread takes pieces of its own part first, the same in every call, so that a layer's weights stay in the caches
// of the cores that read them; then it helps the others.

#include "lut_steps.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

constexpr std::int64_t near_bytes = 384 << 10;  // of weights that are passed once for each square of tokens
constexpr std::int64_t first_level = 24 << 10;     // of activations
constexpr int pack_counter = job_counters - 1, parts = job_counters - 1;

// How the work is cut.
struct Pieces {
    std::int64_t slices, size, chunks, squares, blocks;  // size: slices of a chunk; blocks of squares of tokens
    std::int64_t count() const { return chunks * blocks; }
};

template <int D>
Pieces pieces_of(const Job& job, int threads) {
    const rarefy_weight& w = *job.weight;
    const std::int64_t slices = lookup_shape(w).slices, wanted = 8 * threads;
    const std::int64_t step_bytes = 64 + lanes * depth_of(D), near = near_bytes * slices / (w.starts[slices] * step_bytes + 1);
    const std::int64_t even = slices / wanted, most = even < near ? even : near;
    const std::int64_t size = most < 2 ? 1 : most > 32 ? 32 : most / 2 * 2;
    const std::int64_t chunks = (slices + size - 1) / size, squares = (job.tokens + lanes - 1) / lanes;
    const std::int64_t some = (wanted + chunks - 1) / chunks;
    return {slices, size, chunks, squares, some < squares ? some : squares};
}

// Calls body(piece) until all are done.
template <typename Body>
RAREFY_INLINE void own_first(const Job& job, std::int64_t count, int thread, int threads, const Body& body) {
    const int ranges = threads < parts ? threads : parts;
    for (int i = 0; i < ranges; ++i) {
        const int range = (thread + i) % ranges;
        const std::int64_t first = count * range / ranges, end = count * (range + 1) / ranges;
        for (;;) {
            const std::int64_t at = first + claim(job.counters + range);
            if (at >= end) break;
            body(at);
        }
    }
}

template <int D, int T>
__attribute__((noinline)) void run_group(const LookupSlice& slice, const Packed<D>& x, std::int64_t token,
                                         const float* starts, F32* out) {
    run_slice<D, T>(slice, x.group_at(token), D == RAREFY_I8 ? x.scales_at(token) : nullptr, starts, out);
}

template <int D>
void run_tokens(const LookupSlice& slice, const Packed<D>& x, std::int64_t token, const float* starts, F32* out) {
    switch (x.size(token)) {
        case 1: return run_group<D, 1>(slice, x, token, starts, out);
        case 2: return run_group<D, 2>(slice, x, token, starts, out);
        case 3: return run_group<D, 3>(slice, x, token, starts, out);
        case 4: return run_group<D, 4>(slice, x, token, starts, out);
        case 5: return run_group<D, 5>(slice, x, token, starts, out);
        case 6: return run_group<D, 6>(slice, x, token, starts, out);
        case 7: return run_group<D, 7>(slice, x, token, starts, out);
        default: return run_group<D, 8>(slice, x, token, starts, out);
    }
}

// The sums of sixteen rows, one vector for each of up to sixteen tokens.
void finish_sums(const Job& job, const Ending& end, std::int64_t token, std::int64_t tokens, std::int64_t row,
                 F32 (&sums)[lanes]) {
    const std::int64_t rows = job.weight->rows - row;
    if (tokens < 4 || !by_features(*job.y)) {
        for (std::int64_t t = 0; t < tokens; ++t)
            finish_rows(job, token + t, row, rows < lanes ? rows : lanes, sums[t]);
        return;
    }
    for (std::int64_t t = tokens; t < lanes; ++t) sums[t] = F32{};
    turn(sums);
    if (job.y->dtype == RAREFY_BF16)
        finish_square<bf16>(end, token, tokens, row, rows, sums);
    else
        finish_square<float>(end, token, tokens, row, rows, sums);
}

template <int D>
void run(const Job& job, int thread, int threads) {
    const Packed<D> x = pack_tokens<D>(job, thread, threads, job.counters + pack_counter);
    const Pieces pieces = pieces_of<D>(job, threads);
    const LookupShape shape = lookup_shape(*job.weight);
    // Sixteen tokens at once make whole squares of y, eight leave twice the room in the first-level cache.
    const std::int64_t token_bytes = x.cols * static_cast<std::int64_t>(sizeof(Entry<D>));
    const std::int64_t wide = lanes * token_bytes <= first_level ? lanes : eight;
    const Ending end = {job.weight->scales, job.bias, job.activation, *job.y, job.other};
    own_first(job, pieces.count(), thread, threads, [&](std::int64_t piece) {
        const std::int64_t first = piece / pieces.blocks * pieces.size, block = piece % pieces.blocks;
        const std::int64_t last = first + pieces.size < pieces.slices ? first + pieces.size : pieces.slices;
        const std::int64_t squares_end = pieces.squares * (block + 1) / pieces.blocks * lanes;
        const std::int64_t end_token = squares_end < job.tokens ? squares_end : job.tokens;
        for (std::int64_t token = pieces.squares * block / pieces.blocks * lanes; token < end_token; token += wide) {
            const std::int64_t left = end_token - token, tokens = left < wide ? left : wide;
            float starts[2][eight];
            if constexpr (D == RAREFY_I8)
                for (std::int64_t t = 0; t < tokens; t += eight)
                    starts_of_tokens(x.scales_at(token + t), x.panels, x.size(token + t), starts[t / eight]);
            for (std::int64_t slice = first; slice < last; ++slice) {
                F32 sums[lanes];
                const LookupSlice from = slice_of(*job.weight, shape, slice);
                for (std::int64_t t = 0; t < tokens; t += eight)
                    run_tokens<D>(from, x, token + t, starts[t / eight], sums + t);
                finish_sums(job, end, token, tokens, slice * lanes, sums);
            }
        }
    });
}

template <int D>
std::size_t scratch(const Job& job, int threads) {
    return shared_bytes(shared(job, Packed<D>::bytes(job)), threads);
}

}  // namespace

const Algorithm lut_product[dtypes] = {{scratch<RAREFY_F32>, run<RAREFY_F32>},
                                       {scratch<RAREFY_BF16>, run<RAREFY_BF16>},
                                       {scratch<RAREFY_I8>, run<RAREFY_I8>}};

}  // namespace rarefy::RAREFY_NAMESPACE
