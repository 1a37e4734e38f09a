// Many tokens times a dense weight, or times a bitmap that is made dense tile by tile.
//
// Tokens are packed once, up to `chunk` of them at a time. Then threads claim runs of rows: for each piece of K, six rows
// at a time meet all panels, so that a weight is read once and a panel's piece stays in the second-level cache; their
// sums gather in memory of the thread and leave through output.h.

#include <cstdint>

#include "families.h"
#include "gemm.h"
#include "output.h"
#include "panels.h"
#include "team.h"
#include "tiles.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

constexpr std::int64_t chunk = 512;     // tokens packed at once
constexpr std::int64_t run_rows = 48;   // rows whose sums gather at once: a multiple of tile_rows and of 16

// The rows of a weight as threads claim them: long runs first, short ones last, so that threads end together.
struct Runs {
    std::int64_t rows, most, middle, least;  // how many runs of each length
    explicit Runs(std::int64_t n) : rows(n) {
        most = n > 192 ? (n - 192 + run_rows - 1) / run_rows : 0;
        n -= most * run_rows;
        middle = n > 72 ? (n - 72 + 23) / 24 : 0;
        n -= middle * 24;
        least = n > 0 ? (n + 11) / 12 : 0;
    }
    std::int64_t count() const { return most + middle + least; }
    std::int64_t first(std::int64_t run) const {
        const std::int64_t after = run > most ? run - most : 0, last = after > middle ? after - middle : 0;
        const std::int64_t row = (run - after) * run_rows + (after - last) * 24 + last * 12;
        return row < rows ? row : rows;
    }
};

std::size_t aligned(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

std::int64_t chunk_of(const Job& job) { return job.tokens < chunk ? job.tokens : chunk; }

// What a thread has for itself.
template <int dtype>
struct Own {
    unsigned char* quantized;
    typename Kind<dtype>::Tile* tile;
    float* sums;  // [run_rows][padded tokens]
};

template <int dtype>
std::size_t tile_bytes() {
    return aligned(tile_rows * static_cast<std::size_t>(tile_stride<dtype>()) * sizeof(typename Kind<dtype>::Tile));
}

template <int dtype>
std::size_t quantized_part(const Job& job) {
    return dtype == RAREFY_I8 ? aligned(quantized_bytes(lanes, job.weight->cols)) : 0;
}

std::size_t sums_bytes(const Job& job) {
    return static_cast<std::size_t>((chunk_of(job) + lanes - 1) / lanes * lanes * run_rows) * sizeof(float);
}

template <int dtype>
std::size_t own_bytes(const Job& job) {
    return quantized_part<dtype>(job) + tile_bytes<dtype>() + sums_bytes(job) + 64;
}

template <int dtype>
std::size_t shared_bytes(const Job& job) {
    return aligned(panel_bytes<dtype>(chunk_of(job), job.weight->cols));
}

// Where sixteen lanes would be half empty, the product for few tokens is the faster one.
template <int dtype>
bool few(const Job& job) {
    return job.weight->form == RAREFY_DENSE && job.tokens < (dtype == RAREFY_F32 ? 15 : dtype == RAREFY_BF16 ? 12 : 9);
}

template <int dtype>
std::size_t scratch(const Job& job, int threads) {
    if (dtype == RAREFY_F32 && job.x->dtype != RAREFY_F32) return SIZE_MAX;  // no kernel
    if (few<dtype>(job)) return gemv_dense[dtype].scratch(job, threads);
    return shared_bytes<dtype>(job) + static_cast<std::size_t>(threads) * own_bytes<dtype>(job);
}

template <int dtype>
Own<dtype> own_part(const Job& job, int thread) {
    unsigned char* const at =
        job.scratch + shared_bytes<dtype>(job) + static_cast<std::size_t>(thread) * own_bytes<dtype>(job);
    unsigned char* const tile = at + quantized_part<dtype>(job);
    return {at, reinterpret_cast<typename Kind<dtype>::Tile*>(tile), reinterpret_cast<float*>(tile + tile_bytes<dtype>())};
}

// One chunk of tokens, packed.
struct Tokens {
    Split split;
    Panels panels;
    std::int64_t first, count;
};

// Six rows, one piece of K, all panels.
template <int dtype, class Tile>
void tile_times_panels(const Tokens& x, const Tiled<Tile>& tile, std::int64_t k, std::int64_t columns, float* sums,
                       const unsigned char* ahead, std::int64_t ahead_stride) {
    const std::int64_t units = columns / Kind<dtype>::unit, padded = x.panels.padded;
    for (std::int64_t panel = 0; panel < x.split.panels; ++panel) {
        const std::int64_t first = x.split.first(panel) * lanes;
        const Piece piece = {tile.data,
                             tile.stride,
                             x.panels.units + k / Kind<dtype>::unit * padded + first * units,
                             units,
                             x.panels.scales + k / group * padded + first,
                             x.panels.starts + k / group * padded + first,
                             padded,
                             sums + first,
                             k == 0,
                             panel == 0 ? ahead : nullptr,
                             ahead_stride};
        multiply<dtype>(static_cast<int>(x.split.first(panel + 1) - x.split.first(panel)), piece);
    }
}

void finish(const Job& job, const Tokens& x, std::int64_t row, std::int64_t rows, const float* sums) {
    for (std::int64_t t = 0; t < x.count; t += lanes) {
        const std::int64_t some = x.count - t < lanes ? x.count - t : lanes;
        if (job.y->token == 1) {
            for (std::int64_t r = 0; r < rows; ++r)
                finish_tokens(job, x.first + t, row + r, some, load(sums + r * x.panels.padded + t));
            continue;
        }
        for (std::int64_t r = 0; r < rows; r += lanes) {
            const std::int64_t n = rows - r < lanes ? rows - r : lanes;
            U32 block[lanes] = {};
            for (std::int64_t i = 0; i < n; ++i)
                block[i] = reinterpret_cast<U32>(load(sums + (r + i) * x.panels.padded + t));
            transpose(block);
            for (std::int64_t i = 0; i < some; ++i)
                finish_rows(job, x.first + t + i, row + r, n, reinterpret_cast<F32>(block[i]));
        }
    }
}

template <int dtype, template <int> class Provider>
void rows_times_tokens(const Job& job, const Tokens& x, std::int64_t row, std::int64_t rows, const Own<dtype>& own) {
    using K = Kind<dtype>;
    using Value = Stored<dtype>;
    const rarefy_weight& weight = *job.weight;
    const Provider<dtype> provider = {weight, own.tile};
    const std::int64_t cols = padded_columns<dtype>(weight.cols);
    const Value* cursor[run_rows] = {};
    if (weight.form == RAREFY_BITMAP)
        for (std::int64_t r = 0; r < rows; ++r)
            cursor[r] = static_cast<const Value*>(weight.values) + weight.starts[row + r];
    for (std::int64_t k = 0; k < cols; k += K::columns) {
        const std::int64_t columns = cols - k < K::columns ? cols - k : K::columns;
        for (std::int64_t r = 0; r < rows; r += tile_rows)
            tile_times_panels<dtype>(x, provider.tile(row + r, k, columns, cursor + r), k, columns,
                                     own.sums + r * x.panels.padded,
                                     r + tile_rows < rows ? provider.source(row + r + tile_rows, k)
                                                          : provider.source(row, k + columns),
                                     provider.source_stride());
    }
    finish(job, x, row, rows, own.sums);
}

template <int dtype, template <int> class Provider>
void run(const Job& job, int thread, int threads) {
    if (few<dtype>(job)) return gemv_dense[dtype].run(job, thread, threads);
    const std::int64_t cols = job.weight->cols;
    const Runs runs(job.weight->rows);
    const Own<dtype> own = own_part<dtype>(job, thread);
    const std::int64_t size = job.x->dtype == RAREFY_BF16 ? 2 : 4;
    std::int64_t packed = 0, done = 0;  // claims of earlier chunks: every thread makes one too many
    for (std::int64_t first = 0; first < job.tokens; first += chunk) {
        Tokens x;
        x.first = first;
        x.count = job.tokens - first < chunk ? job.tokens - first : chunk;
        x.split = split(x.count, Kind<dtype>::widest);
        x.panels = panels_at<dtype>(job.scratch, x.count, cols);
        rarefy_slot slot = *job.x;
        slot.data = static_cast<unsigned char*>(slot.data) + first * slot.token * size;
        for (std::int64_t v; (v = claim(job.counters) - packed) < x.split.vectors;)
            pack<dtype>(slot, x.count, cols, x.split, v, x.panels, own.quantized);
        packed += x.split.vectors + threads;
        barrier(threads);
        for (std::int64_t r; (r = claim(job.counters + 1) - done) < runs.count();)
            rows_times_tokens<dtype, Provider>(job, x, runs.first(r), runs.first(r + 1) - runs.first(r), own);
        done += runs.count() + threads;
        if (first + chunk < job.tokens) barrier(threads);
    }
}

}  // namespace

#define RAREFY_ENTRY(dtype, provider) {scratch<dtype>, run<dtype, provider>}
extern const Algorithm gemm_dense[dtypes];
const Algorithm gemm_dense[dtypes] = {RAREFY_ENTRY(RAREFY_F32, Dense), RAREFY_ENTRY(RAREFY_BF16, Dense),
                                      RAREFY_ENTRY(RAREFY_I8, Dense)};
extern const Algorithm gemm_expand[dtypes];
const Algorithm gemm_expand[dtypes] = {RAREFY_ENTRY(RAREFY_F32, Bitmap), RAREFY_ENTRY(RAREFY_BF16, Bitmap),
                                       RAREFY_ENTRY(RAREFY_I8, Bitmap)};
#undef RAREFY_ENTRY

}  // namespace rarefy::RAREFY_NAMESPACE
