// A bitmap times few tokens: rows are expanded into lanes as they are read, each expansion serves every token.
//
// Several rows go side by side, so that they share the activations and hide one another's latency.

#include "expand.h"
#include "few.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

struct Part {
    const Job& job;
    const unsigned char* x;
    std::int64_t words, token;

    template <int D>
    const Entry<D>* entries() const {
        return reinterpret_cast<const Entry<D>*>(x) + token * words * group;
    }
    Quantized quantized() const {  // reads only: nothing is written through it
        return quantized_at(const_cast<unsigned char*>(x), job.tokens, job.weight->cols);
    }
    const std::uint64_t* bits(std::int64_t row) const {
        return static_cast<const std::uint64_t*>(job.weight->index) + row * words;
    }
    template <int D>
    const Stored<D>* values(std::int64_t row) const {
        return static_cast<const Stored<D>*>(job.weight->values) + job.weight->starts[row];
    }
};

#if RAREFY_V4

constexpr int block = 8;  // words of a row that are prefetched together: a line of bits
constexpr int ahead = 2048;  // bytes behind the rows at work where prefetching begins

// Where R rows stand: their bits and their next values; and where what comes behind them is fetched from, in the order
// of the memory, which processors foresee best.
template <int D, int R>
struct Cursor {
    const std::uint64_t* bits[R];
    const Stored<D>* at[R];
    const char *next_bits, *next_values;
    std::int64_t lines;  // of the rows' values in one block of words, on average

    Cursor(const Part& part, std::int64_t row) {
        const rarefy_weight& w = *part.job.weight;
        for (int r = 0; r < R; ++r) {
            const std::int64_t here = row + r < w.rows ? row + r : w.rows - 1;  // the last row again: sums unused
            bits[r] = part.bits(here);
            at[r] = part.template values<D>(here);
        }
        const std::int64_t last = row + R < w.rows ? row + R : w.rows;
        const auto kept = static_cast<std::int64_t>(w.starts[last] - w.starts[row]);
        lines = kept * static_cast<std::int64_t>(sizeof(Stored<D>)) * block / (64 * part.words) + 1;
        next_bits = reinterpret_cast<const char*>(part.bits(last)) + ahead / 4;
        next_values = reinterpret_cast<const char*>(at[0] + kept) + ahead;
    }
    // Into the second cache: the rows that are being read fill the first. Nothing is read where no memory is.
    RAREFY_INLINE void prefetch() {
        for (std::int64_t i = 0; i < lines; ++i) _mm_prefetch(next_values + 64 * i, _MM_HINT_T1);
        for (int r = 0; r < R; ++r) _mm_prefetch(next_bits + 64 * r, _MM_HINT_T1);
        next_values += 64 * lines;
        next_bits += 64 * R;
    }
};

// R x T sums, four at a time, to sums[t][row % 16].
template <int R, int T>
RAREFY_INLINE void reduce(const __m512 (&acc)[R][T], float (*out)[lanes]) {
    for (int t = 0; t < T; ++t) {
        const __m128 four = sums(acc[0][t], acc[1][t], acc[R - 2][t], acc[R - 1][t]);
        if constexpr (R == 4)
            _mm_storeu_ps(out[t], four);
        else
            _mm_storel_pi(reinterpret_cast<__m64*>(out[t]), four);
    }
}

template <int T>
constexpr int rows_of(int dtype) {
    return dtype == RAREFY_I8 || T <= 4 ? 4 : 2;
}

template <int T, bool End>
void run_rows(const Part& part, std::int64_t row, float (*out)[lanes], Number<RAREFY_F32>) {
    constexpr int R = rows_of<T>(RAREFY_F32);
    Cursor<RAREFY_F32, R> c(part, row);
    const std::int64_t words = part.words, stride = words * group;
    const float* const x = part.entries<RAREFY_F32>();
    __m512 acc[R][T];
    for (auto& of_row : acc)
        for (auto& a : of_row) a = _mm512_setzero_ps();
    for (std::int64_t w = 0; w < words; ++w) {
        if (w % block == 0) c.prefetch();
        for (int quarter = 0; quarter < 4; ++quarter) {
            __m512 in[T];
            for (int t = 0; t < T; ++t) in[t] = _mm512_loadu_ps(x + t * stride + w * group + quarter * lanes);
            for (int r = 0; r < R; ++r) {
                const auto* const bits = reinterpret_cast<const std::uint16_t*>(c.bits[r] + w) + quarter;
                const __m512 v = expand<End>(mask_at(bits), c.at[r]);
                c.at[r] += count(*bits);
                for (int t = 0; t < T; ++t) acc[r][t] = _mm512_fmadd_ps(v, in[t], acc[r][t]);
            }
        }
    }
    reduce<R, T>(acc, out);
}

template <int T, bool End>
void run_rows(const Part& part, std::int64_t row, float (*out)[lanes], Number<RAREFY_BF16>) {
    constexpr int R = rows_of<T>(RAREFY_BF16);
    Cursor<RAREFY_BF16, R> c(part, row);
    const std::int64_t words = part.words, stride = words * group;
    const bf16* const x = part.entries<RAREFY_BF16>();
    __m512 acc[R][T];
    for (auto& of_row : acc)
        for (auto& a : of_row) a = _mm512_setzero_ps();
    for (std::int64_t w = 0; w < words; ++w) {
        if (w % block == 0) c.prefetch();
        for (int half = 0; half < 2; ++half) {
            __m512i in[T];
            for (int t = 0; t < T; ++t) in[t] = _mm512_loadu_si512(x + t * stride + w * group + half * 32);
            for (int r = 0; r < R; ++r) {
                const auto* const bits = reinterpret_cast<const std::uint32_t*>(c.bits[r] + w) + half;
                const __m512i v = expand<End>(mask_at(bits), c.at[r]);
                c.at[r] += count(*bits);
                for (int t = 0; t < T; ++t)
                    acc[r][t] = _mm512_dpbf16_ps(acc[r][t], reinterpret_cast<__m512bh>(v),
                                                 reinterpret_cast<__m512bh>(in[t]));
            }
        }
    }
    reduce<R, T>(acc, out);
}

// The dot product takes one side without sign: 128 is added to the weights, and sums start 128 times the q's lower, lane
// by lane, so that each lane's sum is a whole number that a float holds.
template <int T, bool End>
void run_rows(const Part& part, std::int64_t row, float (*out)[lanes], Number<RAREFY_I8>) {
    constexpr int R = rows_of<T>(RAREFY_I8);
    Cursor<RAREFY_I8, R> c(part, row);
    const std::int64_t words = part.words;
    const Quantized x = part.quantized();
    const std::int8_t* const q = x.q + part.token * words * group;
    const float* const scales = x.scales + part.token * words;
    const __m512i sign = _mm512_set1_epi8(-128), zero = _mm512_setzero_si512();
    __m512 acc[R][T];
    for (auto& of_row : acc)
        for (auto& a : of_row) a = _mm512_setzero_ps();
    for (std::int64_t w = 0; w < words; ++w) {
        if (w % block == 0) c.prefetch();
        __m512i v[R];
        for (int r = 0; r < R; ++r) {
            v[r] = _mm512_xor_si512(expand<End>(mask_at(c.bits[r] + w), c.at[r]), sign);
            c.at[r] += count(c.bits[r][w]);
        }
        for (int t = 0; t < T; ++t) {
            const __m512i in = _mm512_load_si512(q + (t * words + w) * group);
            const __m512i start = _mm512_sub_epi32(zero, _mm512_dpbusd_epi32(zero, sign, in));
            const __m512 scale = _mm512_set1_ps(scales[t * words + w]);
            for (int r = 0; r < R; ++r) {
                const __m512 sum = _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, v[r], in));
                acc[r][t] = _mm512_fmadd_ps(sum, scale, acc[r][t]);
            }
        }
    }
    reduce<R, T>(acc, out);
}

template <int D, int T>
void run_slice(const Part& part, std::int64_t row, std::int64_t n, float (&out)[few][lanes]) {
    constexpr int R = rows_of<T>(D), vector = 64 / static_cast<int>(sizeof(Stored<D>));
    const rarefy_weight& w = *part.job.weight;
    for (std::int64_t i = 0; i < n; i += R) {
        const auto to = reinterpret_cast<float(*)[lanes]>(&out[0][i]);
        const std::int64_t last = row + i + R < w.rows ? row + i + R : w.rows;
        if (w.starts[last] + vector <= w.units)
            run_rows<T, false>(part, row + i, to, Number<D>{});
        else
            run_rows<T, true>(part, row + i, to, Number<D>{});
    }
}

#else

// One weight after the other, found by its bit. Sums of one word stay apart, so that words overlap.
template <int D, int T>
void run_row(const Part& part, std::int64_t row, float* out) {
    const std::uint64_t* const bits = part.bits(row);
    const Stored<D>* at = part.values<D>(row);
    const std::int64_t words = part.words, stride = words * group;
    float total[T] = {};
    for (std::int64_t w = 0; w < words; ++w) {
        if constexpr (D == RAREFY_I8) {
            const Quantized x = part.quantized();
            std::int32_t sum[T] = {};
            for (std::uint64_t left = bits[w]; left != 0; left &= left - 1, ++at)
                for (int t = 0; t < T; ++t)
                    sum[t] += *at * x.q[(part.token + t) * stride + w * group + __builtin_ctzll(left)];
            for (int t = 0; t < T; ++t) total[t] += x.scales[(part.token + t) * words + w] * static_cast<float>(sum[t]);
        } else {
            const float* const x = part.entries<D>() + w * group;
            float sum[T] = {};
            for (std::uint64_t left = bits[w]; left != 0; left &= left - 1, ++at) {
                float v;
                if constexpr (D == RAREFY_BF16)
                    v = to_float(*at);
                else
                    v = *at;
                for (int t = 0; t < T; ++t) sum[t] += v * x[t * stride + __builtin_ctzll(left)];
            }
            for (int t = 0; t < T; ++t) total[t] += sum[t];
        }
    }
    for (int t = 0; t < T; ++t) out[t * lanes] = total[t];
}

template <int D, int T>
void run_slice(const Part& part, std::int64_t row, std::int64_t n, float (&out)[few][lanes]) {
    for (std::int64_t i = 0; i < n; ++i) run_row<D, T>(part, row + i, &out[0][i]);
}

#endif

template <int D>
void run(const Job& job, int thread, int threads) {
    const unsigned char* const x = prepared_entries<D>(job, thread, threads);
    share_out(job, threads, [&](std::int64_t first, std::int64_t last, std::int64_t token, int tokens) {
        const Part part = {job, x, groups_of(job.weight->cols), token};
        for (std::int64_t row = first; row < last; row += lanes) {
            const std::int64_t n = last - row < lanes ? last - row : lanes;
            float out[few][lanes];
            with_tokens(tokens, [&](auto t) { run_slice<D, decltype(t)::value>(part, row, n, out); });
            for (int t = 0; t < tokens; ++t) finish_rows(job, token + t, row, n, load(out[t]));
        }
    });
}

}  // namespace

const Algorithm gemv_bitmap[dtypes] = {{entries_scratch<RAREFY_F32>, run<RAREFY_F32>},
                                       {entries_scratch<RAREFY_BF16>, run<RAREFY_BF16>},
                                       {entries_scratch<RAREFY_I8>, run<RAREFY_I8>}};

}  // namespace rarefy::RAREFY_NAMESPACE
