// Columns and values times few tokens.
//
// One token, single weights: sixteen activations are gathered at a time. Blocks: an activation times the block's values,
// rows in lanes. Several tokens: the lanes are tokens for single weights, rows by tokens for blocks of 4. Activations
// are floats in every case (for bf16 weights rounded to bf16, for int8 scale times integer).

#include "index_fours.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

// How many tokens lie one behind the other in the activations: 1, all features of a token, or, where the tokens are
// lanes, 4 or 8 tokens of a feature.
int tokens_wide(const Job& job) {
    const int block = job.weight->block;
    if (job.tokens == 1 || block > 4 || (block == 4 && !RAREFY_V4)) return 1;
    return job.tokens <= 4 ? 4 : 8;
}

#if RAREFY_V4

template <typename T>
RAREFY_INLINE __m512 gathered(const std::uint16_t* columns, const T* values, __mmask16 mask, const float* x,
                              __m512 acc) {
    const __m512i at = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, columns));
    const __m512 in = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, at, x, 4);
    return _mm512_fmadd_ps(sixteen(values, mask), in, acc);
}

// One row of single weights, one token.
template <int D>
float dot(const IndexRows& part, std::int64_t row) {
    const std::uint16_t* const columns = part.columns(row);
    const Stored<D>* const values = part.values<D, 1>(row);
    const std::int64_t n = part.units(row);
    __m512 acc[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
    std::int64_t i = 0;
    for (; i + 2 * lanes <= n; i += 2 * lanes) {
        prefetch(columns + i, 1024);
        prefetch(values + i, 2048);
        if constexpr (D == RAREFY_F32) prefetch(values + i, 2048 + 64);
        acc[0] = gathered(columns + i, values + i, 0xffff, part.x, acc[0]);
        acc[1] = gathered(columns + i + lanes, values + i + lanes, 0xffff, part.x, acc[1]);
    }
    for (int j = 0; i < n; i += lanes, ++j) {
        const auto mask = static_cast<__mmask16>(n - i < lanes ? (1u << (n - i)) - 1u : 0xffffu);
        acc[j] = gathered(columns + i, values + i, mask, part.x, acc[j]);
    }
    return sum(reinterpret_cast<F32>(_mm512_add_ps(acc[0], acc[1])));
}

#else

template <int D>
float dot(const IndexRows& part, std::int64_t row) {
    const std::uint16_t* const columns = part.columns(row);
    const Stored<D>* const values = part.values<D, 1>(row);
    const std::int64_t n = part.units(row);
    float acc[4] = {};
    std::int64_t i = 0;
    for (; i + 4 <= n; i += 4)
        for (int j = 0; j < 4; ++j) acc[j] += as_float(values[i + j]) * part.x[columns[i + j]];
    for (; i < n; ++i) acc[0] += as_float(values[i]) * part.x[columns[i]];
    return acc[0] + acc[1] + (acc[2] + acc[3]);
}

#endif

// One row of single weights, 4 or 8 tokens, which lie side by side.
template <int D, int Wide>
Floats<Wide> dot_tokens(const IndexRows& part, std::int64_t row) {
    const std::uint16_t* const columns = part.columns(row);
    const Stored<D>* const values = part.values<D, 1>(row);
    const std::int64_t n = part.units(row);
    Floats<Wide> acc[4] = {};
    std::int64_t i = 0;
    for (; i + 4 <= n; i += 4) {
        if (i % 16 == 0) {
            prefetch(columns + i, 1024);
            prefetch(values + i, 2048);
        }
        for (int j = 0; j < 4; ++j)
            acc[j] += load_as_floats<Wide>(part.x + std::int64_t{columns[i + j]} * Wide) * as_float(values[i + j]);
    }
    for (; i < n; ++i) acc[0] += load_as_floats<Wide>(part.x + std::int64_t{columns[i]} * Wide) * as_float(values[i]);
    return acc[0] + acc[1] + (acc[2] + acc[3]);
}

// A row of blocks, T tokens: out[t][0 .. R). U units go side by side.
template <int D, int R, int T>
void dot_blocks(const IndexRows& part, std::int64_t block_row, float (*out)[lanes]) {
    constexpr int U = T == 1 ? 4 : T <= 3 ? 2 : 1;
    const std::uint16_t* const columns = part.columns(block_row);
    const Stored<D>* const values = part.values<D, R>(block_row);
    const std::int64_t n = part.units(block_row);
    Floats<R> acc[U][T] = {};
    std::int64_t i = 0;
    for (; i + U <= n; i += U) {
        prefetch(columns + i, 1024);
        prefetch(values + i * R, 2048);
        for (int u = 0; u < U; ++u) {
            const Floats<R> v = load_as_floats<R>(values + (i + u) * R);
            const float* const x = part.x + columns[i + u];
            for (int t = 0; t < T; ++t) acc[u][t] += v * x[t * part.stride];
        }
    }
    for (; i < n; ++i) {
        const Floats<R> v = load_as_floats<R>(values + i * R);
        for (int t = 0; t < T; ++t) acc[0][t] += v * part.x[t * part.stride + columns[i]];
    }
    for (int t = 0; t < T; ++t) {
        for (int u = 1; u < U; ++u) acc[0][t] += acc[u][t];
        std::memcpy(out[t], &acc[0][t], sizeof acc[0][t]);
    }
}

#if RAREFY_V4

template <int D, int Wide>
void run_fours(const IndexRows& part, std::int64_t row, std::int64_t n, float (&out)[few][lanes], int tokens) {
    for (std::int64_t i = 0; i < n; i += 4)
        dot_fours_tokens<D, Wide>(part, (row + i) / 4, reinterpret_cast<float(*)[lanes]>(&out[0][i]), tokens);
}

#endif

template <int D, int Wide>
void run_tokens(const IndexRows& part, std::int64_t row, std::int64_t n, float (&out)[few][lanes], int tokens) {
    for (std::int64_t i = 0; i < n; ++i) {
        const Floats<Wide> v = dot_tokens<D, Wide>(part, row + i);
        for (int t = 0; t < tokens; ++t) out[t][i] = v[t];
    }
}

template <int D, int R>
void run_blocks(const IndexRows& part, std::int64_t row, std::int64_t n, float (&out)[few][lanes], int tokens) {
    with_tokens(tokens, [&](auto t) {
        constexpr int T = decltype(t)::value;
        for (std::int64_t i = 0; i < n; i += R) {
            const std::int64_t block_row = (row + i) / R;
#if RAREFY_V4
            if constexpr (R == 4 && T == 1) {
                const Floats<4> v = dot_fours<D>(part, block_row);
                std::memcpy(&out[0][i], &v, sizeof v);
                continue;
            }
#endif
            dot_blocks<D, R, T>(part, block_row, reinterpret_cast<float(*)[lanes]>(&out[0][i]));
        }
    });
}

template <int D>
void run_slice(const IndexRows& part, std::int64_t row, std::int64_t n, float (&out)[few][lanes], int tokens) {
    const int wide = tokens_wide(part.job);
    switch (part.job.weight->block) {
        case 4:
#if RAREFY_V4
            if (wide == 8) return run_fours<D, 8>(part, row, n, out, tokens);
            if (wide == 4) return run_fours<D, 4>(part, row, n, out, tokens);
#endif
            return run_blocks<D, 4>(part, row, n, out, tokens);
        case 8: return run_blocks<D, 8>(part, row, n, out, tokens);
        case 16: return run_blocks<D, 16>(part, row, n, out, tokens);
        default: break;
    }
    if (wide == 8) return run_tokens<D, 8>(part, row, n, out, tokens);
    if (wide == 4) return run_tokens<D, 4>(part, row, n, out, tokens);
    for (std::int64_t i = 0; i < n; ++i) out[0][i] = dot<D>(part, row + i);
}

// Activations: [tokens][padded columns], or, where tokens are lanes, [chunks of 7 tokens][padded columns][4 or 8].
// Behind them, int8 alone: what quantising needs, and one float per token that is NaN where the token is spoilt.
struct Layout {
    int wide;
    std::int64_t cols, floats;
};
Layout layout(const Job& job) {
    const std::int64_t cols = padded(job.weight->cols), chunks = (job.tokens + few - 1) / few;
    const int wide = tokens_wide(job);
    return {wide, cols, (wide == 1 ? job.tokens : chunks * wide) * cols};
}
template <int D>
Shared activations(const Job& job) {
    const Layout l = layout(job);
    std::size_t bytes = static_cast<std::size_t>(l.floats) * sizeof(float);
    if constexpr (D == RAREFY_I8) bytes += quantized_bytes(job.tokens, l.cols);
    return shared(job, bytes);
}
template <int D>
std::size_t scratch(const Job& job, int threads) {
    return shared_bytes(activations<D>(job), threads);
}

Quantized integers(const Job& job, unsigned char* memory, const Layout& l) {
    return quantized_at(memory + static_cast<std::size_t>(l.floats) * sizeof(float), job.tokens, job.weight->cols);
}

// Where feature 0 of a token is, and how far it is to the next feature.
float* token_at(unsigned char* memory, const Layout& l, std::int64_t token, std::int64_t* step) {
    float* const x = reinterpret_cast<float*>(memory);
    *step = l.wide;
    return l.wide == 1 ? x + token * l.cols : x + token / few * l.cols * l.wide + token % few;
}

template <int D>
void prepare(const Job& job, unsigned char* memory, std::int64_t first, std::int64_t last) {
    const Layout l = layout(job);
    const std::int64_t cols = job.weight->cols;
    if constexpr (D == RAREFY_I8) {
        const Quantized in = integers(job, memory, l);
        quantize(*job.x, cols, first, last, in);
        for (std::int64_t t = first; t < last; ++t) {
            std::int64_t step;
            float* const to = token_at(memory, l, t, &step);
            for (std::int64_t c = 0; c < l.cols; ++c)
                to[c * step] = in.scales[t * in.groups + c / group] * static_cast<float>(in.q[t * l.cols + c]);
        }
    } else {
        for (std::int64_t t = first; t < last; ++t) {
            std::int64_t step;
            float* const to = token_at(memory, l, t, &step);
            if (step == 1) {
                copy_token(*job.x, t, cols, D == RAREFY_BF16, to);
                continue;
            }
            for (std::int64_t c = 0; c < cols; ++c) {
                const float v = read(*job.x, t, c);
                to[c * step] = D == RAREFY_BF16 ? to_float(to_bf16(v)) : v;
            }
        }
    }
}

template <int D>
void run(const Job& job, int thread, int threads) {
    const Layout l = layout(job);
    unsigned char* const memory =
        prepared(job, activations<D>(job), thread, threads,
                 [&](unsigned char* to, std::int64_t first, std::int64_t last) { prepare<D>(job, to, first, last); });
    share_out(job, threads, [&](std::int64_t first, std::int64_t last, std::int64_t token, int tokens) {
        std::int64_t step;
        const IndexRows part = {job, token_at(memory, l, token, &step), token, l.cols};
        for (std::int64_t row = first; row < last; row += lanes) {
            const std::int64_t n = last - row < lanes ? last - row : lanes;
            float out[few][lanes];
            run_slice<D>(part, row, n, out, tokens);
            for (int t = 0; t < tokens; ++t) {
                F32 v = load(out[t]);
                if constexpr (D == RAREFY_I8) {  // a NaN reaches every output of its token, where no weight is kept too
                    const Quantized in = integers(job, memory, l);
                    v += 0.0f * in.scales[(token + t) * in.groups];
                }
                finish_rows(job, token + t, row, n, v);
            }
        }
    });
}

}  // namespace

const Algorithm gemv_index[dtypes] = {{scratch<RAREFY_F32>, run<RAREFY_F32>},
                                      {scratch<RAREFY_BF16>, run<RAREFY_BF16>},
                                      {scratch<RAREFY_I8>, run<RAREFY_I8>}};

}  // namespace rarefy::RAREFY_NAMESPACE
