// Activations as the look-up form's kernels read them.
//
// Tokens are taken eight at a time, the last ones fewer: a group of T. Its activations are [panels][T][entries of a
// panel], zeros behind the last column: a panel of the whole group is one stretch of memory. int8: with 128 added on
// v4, which an instruction wants, and scales [panels][T] for each group of tokens.
#ifndef RAREFY_LUT_PACK_H
#define RAREFY_LUT_PACK_H

#include "few.h"
#include "lookup.h"
#include "spmm_panels.h"

namespace rarefy::RAREFY_NAMESPACE {

constexpr int eight = 8;  // tokens that share one reading of the weights

template <int D>
struct Packed {
    Entry<D>* entries;
    float* scales;
    std::int64_t tokens, cols, panels;

    static std::size_t bytes(const Job& job) {
        const std::int64_t entries = job.tokens * padded(job.weight->cols);
        const std::int64_t scales = D == RAREFY_I8 ? job.tokens * lookup_shape(*job.weight).panels : 0;
        return whole_lines(static_cast<std::size_t>(entries) * sizeof(Entry<D>)) +
               whole_lines(static_cast<std::size_t>(scales) * sizeof(float));
    }
    static Packed at(const Job& job, unsigned char* memory) {
        const std::int64_t cols = padded(job.weight->cols);
        const std::size_t entries = whole_lines(static_cast<std::size_t>(job.tokens * cols) * sizeof(Entry<D>));
        return {reinterpret_cast<Entry<D>*>(memory), reinterpret_cast<float*>(memory + entries), job.tokens, cols,
                lookup_shape(*job.weight).panels};
    }
    int size(std::int64_t first) const { return static_cast<int>(tokens - first < eight ? tokens - first : eight); }
    Entry<D>* group_at(std::int64_t first) const { return entries + first * cols; }
    float* scales_at(std::int64_t first) const { return scales + first * panels; }
};

// Sixty-four columns of one token.
template <int D>
RAREFY_INLINE void pack_part(const Packed<D>& to, std::int64_t token, std::int64_t column, const F32 (&part)[4]) {
    const std::int64_t first = token / eight * eight, size = to.size(first), t = token - first;
    if constexpr (D == RAREFY_I8) {
        std::int8_t* const q = to.group_at(first) + (column / group * size + t) * group;
        std::int32_t start;
        float* const scale = to.scales_at(first) + column / group * size + t;
        if (!quantize_group(part, q, scale, &start)) {  // its other groups keep their scales: see start_of_token
            std::memset(q, 0, group);
            *scale = __builtin_nanf("");
        }
#if RAREFY_V4
        for (int i = 0; i < group; i += lanes) {  // as they were stored, or they would have to reach the cache first
            __m128i* const some = reinterpret_cast<__m128i*>(q + i);
            _mm_store_si128(some, _mm_xor_si128(_mm_load_si128(some), _mm_set1_epi8(-128)));
        }
#endif
    } else {
        constexpr int panel = panel_of(D);
        for (int i = 0; i < group; i += panel) {
            Entry<D>* const x = to.group_at(first) + ((column + i) / panel * size + t) * panel;
            for (int j = 0; j < panel; j += lanes) {
                const F32& v = part[(i + j) / lanes];
                store(x + j, D == RAREFY_BF16 && sizeof(Entry<D>) == 4 ? round_to_bf16(v) : v);
            }
        }
    }
}

// Up to sixteen tokens from `token` on, columns [column, last).
template <int D, typename T>
inline void pack_square(const rarefy_slot& x, const Packed<D>& to, std::int64_t cols, std::int64_t token,
                        std::int64_t column, std::int64_t last) {
    const T* const data = static_cast<const T*>(x.data);
    const std::int64_t left = to.tokens - token, some = left < lanes ? left : lanes;
    for (; column < last; column += group) {
        if (!by_features(x)) {
            for (std::int64_t t = 0; t < some; ++t) {
                const T* const from = data + (token + t) * x.token + column;
                F32 part[4];
                for (int i = 0; i < 4; ++i) part[i] = load_at_most(from + i * lanes, cols - column - i * lanes);
                pack_part(to, token + t, column, part);
            }
            continue;
        }
        F32 turned[4][lanes];
        for (int i = 0; i < 4; ++i) {
            read_square<T>(x, token, some, column + i * lanes, cols - column - i * lanes, turned[i]);
            turn(turned[i]);
        }
        for (std::int64_t t = 0; t < some; ++t) {
            const F32 part[4] = {turned[0][t], turned[1][t], turned[2][t], turned[3][t]};
            pack_part(to, token + t, column, part);
        }
    }
}

constexpr std::int64_t pack_at_once = 256;  // columns

// The activations of a job: by each thread for itself where they are few, else by all, piece by piece.
template <int D>
inline Packed<D> pack_tokens(const Job& job, int thread, int threads, std::int64_t* counter) {
    const Shared s = shared(job, Packed<D>::bytes(job));
    const Packed<D> to = Packed<D>::at(job, job.scratch + (s.alone ? s.bytes * static_cast<std::size_t>(thread) : 0));
    const std::int64_t cols = job.weight->cols, blocks = (to.cols + pack_at_once - 1) / pack_at_once;
    const std::int64_t pieces = (job.tokens + lanes - 1) / lanes * blocks;
    std::int64_t alone = 0;
    for (;;) {
        const std::int64_t i = s.alone ? alone++ : claim(counter);
        if (i >= pieces) break;
        const std::int64_t column = i % blocks * pack_at_once, end = column + pack_at_once;
        const std::int64_t last = end < to.cols ? end : to.cols;
        if (job.x->dtype == RAREFY_BF16)
            pack_square<D, bf16>(*job.x, to, cols, i / blocks * lanes, column, last);
        else
            pack_square<D, float>(*job.x, to, cols, i / blocks * lanes, column, last);
    }
    if (!s.alone) barrier(threads);
    return to;
}

// int8: what the sums of a group of tokens begin with, 0, or NaN for a token that is not finite, whichever panels its
// rows keep.
inline void starts_of_tokens(const float* scales, std::int64_t panels, int tokens, float (&starts)[eight]) {
    const std::int64_t n = panels * tokens;
    F32 all{};
    for (std::int64_t i = 0; i < n; i += lanes) all += load_at_most(scales + i, n - i) * 0.0f;
    std::memset(starts, 0, sizeof starts);
    if (sum(all) == 0.0f) return;
    for (std::int64_t i = 0; i < n; ++i) starts[i % tokens] += scales[i] * 0.0f;
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
