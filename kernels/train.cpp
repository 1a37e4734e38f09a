// Training on the non-zeros alone: the products of a step, in float32.
//
// Forward, and the input's gradient on the transposed structure, are products of an INDEX16 form like any other. The
// weights' gradient is a sampled product (SDDMM): one dot product over the tokens for every kept weight. Activations are
// used feature-major, so that a dot product reads two runs of memory; columns are taken in panels that stay in the cache
// while a block of rows passes over them.

#include "families.h"
#include "simd.h"
#include "team.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

constexpr std::int64_t slab_tokens = 128;      // tokens that are summed in one pass
constexpr std::int64_t row_block = 128;        // rows that pass over a panel, and a thread's piece of work
constexpr std::int64_t near = 24 * 1024;       // bytes of a panel that stays in L1
constexpr std::int64_t far = 256 * 1024;       // and of one that stays in L2
constexpr std::int64_t units_per_row = 48;    // in a panel: fewer, and starting a row costs more than a nearer panel saves
constexpr int at_once = 8;                     // dot products side by side: hides the latency of the sums

std::int64_t rounded(std::int64_t n) { return (n + lanes - 1) / lanes * lanes; }

// Whether [features][tokens] of these strides is already what the kernel reads.
bool ready(std::int64_t token, std::int64_t feature, std::int64_t tokens) {
    return token == 1 && feature == tokens && tokens % lanes == 0 && tokens <= 2 * slab_tokens;
}

std::int64_t slab_of(const TrainJob& job) {
    if (ready(job.x_token, job.x_feature, job.tokens) || ready(job.y_token, job.y_feature, job.tokens)) {
        if (job.tokens <= 2 * slab_tokens && job.tokens % lanes == 0) return job.tokens;
    }
    return job.tokens < slab_tokens ? rounded(job.tokens) : slab_tokens;
}

// Copies tokens [first, first + n) of features [from, to) into packed [features][slab], zeros behind the last token.
void pack(const float* x, std::int64_t token, std::int64_t feature, std::int64_t first, std::int64_t n,
          std::int64_t slab, std::int64_t from, std::int64_t to, float* packed) {
    for (std::int64_t f0 = from; f0 < to; f0 += lanes) {
        const std::int64_t f1 = f0 + lanes < to ? f0 + lanes : to;
        if (token == 1) {
            for (std::int64_t f = f0; f < f1; ++f)
                std::memcpy(packed + f * slab, x + f * feature + first, static_cast<std::size_t>(n) * sizeof(float));
        } else {
            for (std::int64_t t = 0; t < n; ++t)
                for (std::int64_t f = f0; f < f1; ++f) packed[f * slab + t] = x[(first + t) * token + f * feature];
        }
        if (n < slab)
            for (std::int64_t f = f0; f < f1; ++f)
                std::memset(packed + f * slab + n, 0, static_cast<std::size_t>(slab - n) * sizeof(float));
    }
}

#if defined(__AVX512F__)
// Four sums of lanes at once: halves of two vectors side by side, then quarters of four, then within the quarters.
RAREFY_INLINE void sums4(F32 a, F32 b, F32 c, F32 d, float* out) {
    const __m512 x = reinterpret_cast<__m512>(a), y = reinterpret_cast<__m512>(b);
    const __m512 z = reinterpret_cast<__m512>(c), w = reinterpret_cast<__m512>(d);
    const __m512 xy = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xEE));
    const __m512 zw = _mm512_add_ps(_mm512_shuffle_f32x4(z, w, 0x44), _mm512_shuffle_f32x4(z, w, 0xEE));
    __m512 all = _mm512_add_ps(_mm512_shuffle_f32x4(xy, zw, 0x88), _mm512_shuffle_f32x4(xy, zw, 0xDD));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0x4E));
    all = _mm512_add_ps(all, _mm512_permute_ps(all, 0xB1));
    const __m512i firsts = _mm512_castsi128_si512(_mm_set_epi32(12, 8, 4, 0));
    _mm_storeu_ps(out, _mm512_castps512_ps128(_mm512_permutexvar_ps(firsts, all)));
}
#else
RAREFY_INLINE void sums4(F32 a, F32 b, F32 c, F32 d, float* out) {
    out[0] = sum(a);
    out[1] = sum(b);
    out[2] = sum(c);
    out[3] = sum(d);
}
#endif

// `N` dot products of dy's row with columns of x, over `slab` tokens.
template <int N>
RAREFY_INLINE void dots(const float* dy, const float* x, const std::uint16_t* columns, std::int64_t slab, float* out) {
    const float* column[N];
    F32 sums[N];
    for (int j = 0; j < N; ++j) {
        column[j] = x + columns[j] * slab;
        sums[j] = F32{};
    }
    for (std::int64_t t = 0; t < slab; t += lanes) {
        const F32 y = load(dy + t);
        for (int j = 0; j < N; ++j) sums[j] = fma(y, load(column[j] + t), sums[j]);
    }
    if constexpr (N % 4 == 0) {
        for (int j = 0; j < N; j += 4) sums4(sums[j], sums[j + 1], sums[j + 2], sums[j + 3], out + j);
    } else {
        float all[4];
        sums4(sums[0], N > 1 ? sums[N > 1] : F32{}, N > 2 ? sums[N > 2 ? 2 : 0] : F32{}, F32{}, all);
        std::memcpy(out, all, N * sizeof(float));
    }
}

// The gradients of units [i, end) of one row; added to what is there where the slab is not the first.
RAREFY_INLINE void row_of(const float* dy, const float* x, const std::uint16_t* columns, std::int64_t i,
                          std::int64_t end, std::int64_t slab, bool first, float* gradient) {
    float out[at_once];
    while (i < end) {
        const std::int64_t n = end - i < at_once ? end - i : at_once;
        std::int64_t done;
        if (n == at_once) {
            dots<at_once>(dy, x, columns + i, slab, out);
            done = at_once;
        } else if (n >= 4) {
            dots<4>(dy, x, columns + i, slab, out);
            done = 4;
        } else if (n == 3) {
            dots<3>(dy, x, columns + i, slab, out);
            done = 3;
        } else if (n == 2) {
            dots<2>(dy, x, columns + i, slab, out);
            done = 2;
        } else {
            dots<1>(dy, x, columns + i, slab, out);
            done = 1;
        }
        for (std::int64_t j = 0; j < done; ++j) gradient[i + j] = first ? out[j] : gradient[i + j] + out[j];
        i += done;
    }
}

// Columns of a panel: as many as stay in L1, or more where rows would meet too few of their units in it.
std::int64_t panel_columns(const TrainJob& job, std::int64_t slab) {
    const std::int64_t bytes = slab * static_cast<std::int64_t>(sizeof(float));
    const std::int64_t units = job.starts[job.rows];
    const std::int64_t wanted = units > 0 ? units_per_row * job.cols * job.rows / units : job.cols;
    std::int64_t columns = near / bytes;
    if (columns < wanted) columns = wanted;
    if (columns > far / bytes) columns = far / bytes;
    return columns > 0 ? columns : 1;
}

void rows_of(const TrainJob& job, const float* x, const float* dy, std::int64_t from, std::int64_t to,
             std::int64_t slab, bool first) {
    std::uint32_t next[row_block];
    for (std::int64_t r = from; r < to; ++r) next[r - from] = job.starts[r];
    const std::int64_t step = panel_columns(job, slab);
    for (std::int64_t panel = 0; panel < job.cols; panel += step) {
        for (std::int64_t r = from; r < to; ++r) {
            const std::int64_t begin = next[r - from], stop = job.starts[r + 1];
            std::int64_t end = begin;
            if (panel + step >= job.cols)
                end = stop;
            else
                while (end < stop && job.columns[end] < panel + step) ++end;
            row_of(dy + r * slab, x, job.columns, begin, end, slab, first, job.gradient);
            next[r - from] = static_cast<std::uint32_t>(end);
        }
    }
}

std::size_t gradient_scratch(const TrainJob& job, int) {
    const std::int64_t slab = slab_of(job);
    std::int64_t features = 0;
    if (!(ready(job.x_token, job.x_feature, job.tokens) && slab == job.tokens)) features += job.cols;
    if (!(ready(job.y_token, job.y_feature, job.tokens) && slab == job.tokens)) features += job.rows;
    return static_cast<std::size_t>(features * slab) * sizeof(float);
}

void weight_gradient(const TrainJob& job, int thread, int threads) {
    const std::int64_t slab = slab_of(job);
    const bool x_ready = ready(job.x_token, job.x_feature, job.tokens) && slab == job.tokens;
    const bool y_ready = ready(job.y_token, job.y_feature, job.tokens) && slab == job.tokens;
    float* const packed_x = reinterpret_cast<float*>(job.scratch);
    float* const packed_y = packed_x + (x_ready ? 0 : job.cols * slab);
    const float* const x = x_ready ? job.x : packed_x;
    const float* const dy = y_ready ? job.dy : packed_y;
    const std::int64_t blocks = (job.rows + row_block - 1) / row_block;
    if (job.tokens <= 0 && thread == 0)
        std::memset(job.gradient, 0, static_cast<std::size_t>(job.starts[job.rows]) * sizeof(float));
    for (std::int64_t first = 0; first < job.tokens; first += slab) {
        const std::int64_t n = job.tokens - first < slab ? job.tokens - first : slab;
        if (!x_ready)
            pack(job.x, job.x_token, job.x_feature, first, n, slab, job.cols * thread / threads,
                 job.cols * (thread + 1) / threads, packed_x);
        if (!y_ready)
            pack(job.dy, job.y_token, job.y_feature, first, n, slab, job.rows * thread / threads,
                 job.rows * (thread + 1) / threads, packed_y);
        barrier(threads);
        // Slabs count on from one another, so that the counter needs no reset between two barriers.
        const std::int64_t before = first / slab * (blocks + threads);
        for (std::int64_t b = claim(job.counters) - before; b < blocks; b = claim(job.counters) - before) {
            const std::int64_t from = b * row_block;
            rows_of(job, x, dy, from, from + row_block < job.rows ? from + row_block : job.rows, slab, first == 0);
        }
        barrier(threads);
    }
}

// A forward product is that of an INDEX16 form.
struct Forward {
    rarefy_weight weight;
    rarefy_slot x, y;
    Job job;

    explicit Forward(const TrainJob& from)
        : weight{RAREFY_INDEX16, RAREFY_F32, 1, 0, from.rows, from.cols, from.starts[from.rows],
                 from.columns, from.values, from.starts, nullptr},
          x{const_cast<float*>(from.x), from.x_token, from.x_feature, from.cols, RAREFY_F32, 0},
          y{from.y, from.y_token, from.y_feature, from.rows, RAREFY_F32, 0},
          job{&weight, from.bias, RAREFY_NONE, &x, nullptr, &y, from.tokens, from.scratch, from.counters} {}
    Forward(const Forward&) = delete;
    Forward& operator=(const Forward&) = delete;

    const Algorithm& algorithm() const {
        return job.tokens < 8 ? gemv_index[RAREFY_F32] : spmm_index[RAREFY_F32];
    }
};

std::size_t forward_scratch(const TrainJob& from, int threads) {
    const Forward forward(from);
    if (forward.algorithm().run == nullptr) return static_cast<std::size_t>(-1);
    return forward.algorithm().scratch != nullptr ? forward.algorithm().scratch(forward.job, threads) : 0;
}

void forward(const TrainJob& from, int thread, int threads) {
    const Forward forward(from);
    forward.algorithm().run(forward.job, thread, threads);
}

}  // namespace

const Training train_forward = {forward_scratch, forward};
const Training train_weight_gradient = {gradient_scratch, weight_gradient};

}  // namespace rarefy::RAREFY_NAMESPACE
