// Few tokens times a dense weight: its rows are read once, several at a time, and every piece of a row meets all tokens
// while it is in a register.

#include <cstdint>

#include "dot.h"
#include "families.h"
#include "output.h"
#include "team.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

constexpr std::int64_t claimed_bytes = 1 << 16;  // of weight, at least: much more than claiming costs
constexpr int ahead = 4096;  // bytes behind the rows at work where prefetching begins

// Rows read at once: their sums for all tokens stay in registers.
constexpr int rows_at_once(int tokens) { return tokens <= 3 ? 8 : 4; }

// sums[t][at + r] for R rows and T tokens. What comes behind the rows is fetched into the second cache meanwhile, in the
// order of the memory: rows side by side are short streams, which processors foresee badly.
template <class D, int T, int R>
RAREFY_INLINE void multiply(const typename D::Value* const* w, std::int64_t cols, const typename D::Input& x,
                            std::int64_t token, F32 (*sums)[lanes], int at) {
    F32 sum[R][T];
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) sum[r][t] = F32{};
    std::int64_t k = 0;
    const char* next = reinterpret_cast<const char*>(w[R - 1] + cols) + ahead;
    constexpr int taken = R * D::step * static_cast<int>(sizeof(typename D::Value));
    for (; k + D::step <= cols; k += D::step, next += taken) {
#pragma GCC unroll 8
        for (int i = 0; i < taken; i += 64) __builtin_prefetch(next + i, 0, 2);
        typename D::Piece piece[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t) piece[t] = D::piece(x, token + t, k);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
            const typename D::Row row = D::row(w[r] + k);
#pragma GCC unroll 8
            for (int t = 0; t < T; ++t) sum[r][t] = D::add(sum[r][t], row, piece[t]);
        }
    }
    if (k < cols) {
        for (int t = 0; t < T; ++t) {
            const typename D::Piece piece = D::piece_first(x, token + t, k, cols - k);
            for (int r = 0; r < R; ++r) sum[r][t] = D::add(sum[r][t], D::row_first(w[r] + k, cols - k), piece);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int t = 0; t < T; ++t) sums[t][at + r] = sum[r][t];
}

// Sixteen rows, or those that are left, for T tokens.
template <class D, int T>
void sixteen_rows(const Job& job, const typename D::Input& x, std::int64_t row, std::int64_t token) {
    constexpr int R = D::most_tokens < 8 ? (T == 1 ? 8 : 4) : rows_at_once(T);
    const rarefy_weight& weight = *job.weight;
    const auto* const values = static_cast<const typename D::Value*>(weight.values);
    F32 sums[T][lanes];
    const std::int64_t n = weight.rows - row < lanes ? weight.rows - row : lanes;
    for (int at = 0; at < lanes; at += R) {
        const typename D::Value* w[R];
        for (int r = 0; r < R; ++r) w[r] = values + (at + r < n ? row + at + r : weight.rows - 1) * weight.cols;
        multiply<D, T, R>(w, weight.cols, x, token, sums, at);
    }
    for (int t = 0; t < T; ++t) finish_rows(job, token + t, row, n, sum_each(sums[t]));
}

template <class D>
void block(const Job& job, const typename D::Input& x, std::int64_t row) {
    for (std::int64_t token = 0; token < job.tokens;) {
        const std::int64_t left = job.tokens - token;
        const int some = static_cast<int>(left < D::most_tokens ? left : D::most_tokens);
        switch (some) {
            case 1: sixteen_rows<D, 1>(job, x, row, token); break;
            case 2: sixteen_rows<D, 2>(job, x, row, token); break;
            case 3: sixteen_rows<D, 3>(job, x, row, token); break;
            case 4: sixteen_rows<D, 4>(job, x, row, token); break;
            default:
                if constexpr (D::most_tokens == 8) {
                    switch (some) {
                        case 5: sixteen_rows<D, 5>(job, x, row, token); break;
                        case 6: sixteen_rows<D, 6>(job, x, row, token); break;
                        case 7: sixteen_rows<D, 7>(job, x, row, token); break;
                        default: sixteen_rows<D, 8>(job, x, row, token); break;
                    }
                }
        }
        token += some;
    }
}

// The memory of one thread: each prepares the few tokens for itself, which takes less time than a barrier.
template <class D>
std::size_t own_bytes(const Job& job) {
    return (D::bytes(job.tokens, job.weight->cols) + 63) / 64 * 64;
}

template <class D>
std::size_t scratch(const Job& job, int threads) {
    if (job.weight->dtype == RAREFY_F32 && job.x->dtype != RAREFY_F32) return SIZE_MAX;  // no kernel
    return own_bytes<D>(job) * static_cast<std::size_t>(threads);
}

template <class D>
void run(const Job& job, int thread, int) {
    const rarefy_weight& weight = *job.weight;
    const auto x = D::prepare(job, job.scratch + static_cast<std::size_t>(thread) * own_bytes<D>(job));
    const std::int64_t row_bytes = weight.cols * static_cast<std::int64_t>(sizeof(typename D::Value)) + 1;
    const std::int64_t rows = (claimed_bytes / row_bytes / lanes + 1) * lanes;
    for (std::int64_t first; (first = claim(job.counters) * rows) < weight.rows;) {
        const std::int64_t end = first + rows < weight.rows ? first + rows : weight.rows;
        for (std::int64_t row = first; row < end; row += lanes) block<D>(job, x, row);
    }
}

}  // namespace

#define RAREFY_ENTRY(dtype) {scratch<Dot<dtype>>, run<Dot<dtype>>}
extern const Algorithm gemv_dense[dtypes];
const Algorithm gemv_dense[dtypes] = {RAREFY_ENTRY(RAREFY_F32), RAREFY_ENTRY(RAREFY_BF16), RAREFY_ENTRY(RAREFY_I8)};
#undef RAREFY_ENTRY

}  // namespace rarefy::RAREFY_NAMESPACE
