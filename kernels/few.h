// Products of few tokens: the activations as kernels read them, and the work dealt out.
#ifndef RAREFY_FEW_H
#define RAREFY_FEW_H

#include "families.h"
#include "output.h"
#include "quantize.h"
#include "team.h"
#include "values.h"

namespace rarefy::RAREFY_NAMESPACE {

constexpr int few = 7;  // tokens that share one reading of a weight

// A number that the compiler knows, as an argument.
template <int N>
struct Number {
    static constexpr int value = N;
};

inline std::int64_t padded(std::int64_t cols) { return (cols + group - 1) / group * group; }

inline float read(const rarefy_slot& slot, std::int64_t token, std::int64_t feature) {
    const std::int64_t at = token * slot.token + feature * slot.feature;
    return slot.dtype == RAREFY_BF16 ? to_float(static_cast<const bf16*>(slot.data)[at])
                                     : static_cast<const float*>(slot.data)[at];
}

RAREFY_INLINE F32 round_to_bf16(F32 v) {
    bf16 bits[lanes];
    store(bits, v);
    return load(bits);
}

// One token as T (float or bf16), zeros behind its last column up to a multiple of 64. `round`: floats to bf16's.
template <typename T>
inline void copy_token(const rarefy_slot& x, std::int64_t token, std::int64_t cols, bool round, T* out) {
    std::int64_t c = 0;
    if (x.feature == 1) {
        const std::int64_t at = token * x.token;
        for (; c + lanes <= cols; c += lanes) {
            const F32 v = x.dtype == RAREFY_BF16 ? load(static_cast<const bf16*>(x.data) + at + c)
                                                 : load(static_cast<const float*>(x.data) + at + c);
            store(out + c, round ? round_to_bf16(v) : v);
        }
    }
    for (; c < cols; ++c) {
        const float v = read(x, token, c);
        if constexpr (sizeof(T) == sizeof(float))
            out[c] = round ? to_float(to_bf16(v)) : v;
        else
            out[c] = to_bf16(v);
    }
    for (; c < padded(cols); ++c) out[c] = T{};
}

// Activations of a job: prepared by each thread for itself where they are few (a barrier costs more), else by all.
struct Shared {
    bool alone;
    std::size_t bytes;  // of one copy
};
inline Shared shared(const Job& job, std::size_t bytes) {
    return {job.tokens == 1 || job.tokens * job.weight->cols <= 8192, bytes};
}
inline std::size_t shared_bytes(const Shared& s, int threads) {
    return s.bytes * (s.alone ? static_cast<std::size_t>(threads) : 1);
}
// This thread's copy, made by prepare(memory, first token, last token).
template <typename Prepare>
inline unsigned char* prepared(const Job& job, const Shared& s, int thread, int threads, const Prepare& prepare) {
    if (s.alone) {
        unsigned char* const mine = job.scratch + s.bytes * static_cast<std::size_t>(thread);
        prepare(mine, std::int64_t{0}, job.tokens);
        return mine;
    }
    prepare(job.scratch, job.tokens * thread / threads, job.tokens * (thread + 1) / threads);
    barrier(threads);
    return job.scratch;
}

// Activations [tokens][padded columns]: floats; for bf16 weights bf16, where there is an instruction for that; for int8
// weights int8, with what quantising needs.
template <int D>
using Entry = Stored<RAREFY_V4 || D != RAREFY_BF16 ? D : RAREFY_F32>;

template <int D>
inline Shared entries_shared(const Job& job) {
    const std::int64_t cols = padded(job.weight->cols);
    return shared(job, D == RAREFY_I8 ? quantized_bytes(job.tokens, cols)
                                      : static_cast<std::size_t>(job.tokens * cols) * sizeof(Entry<D>));
}
template <int D>
inline std::size_t entries_scratch(const Job& job, int threads) {
    return shared_bytes(entries_shared<D>(job), threads);
}
template <int D>
inline const unsigned char* prepared_entries(const Job& job, int thread, int threads) {
    const std::int64_t cols = job.weight->cols;
    return prepared(
        job, entries_shared<D>(job), thread, threads, [&](unsigned char* to, std::int64_t first, std::int64_t last) {
            if constexpr (D == RAREFY_I8) {
                quantize(*job.x, cols, first, last, quantized_at(to, job.tokens, cols));
            } else {
                for (std::int64_t t = first; t < last; ++t)
                    copy_token(*job.x, t, cols, D == RAREFY_BF16, reinterpret_cast<Entry<D>*>(to) + t * padded(cols));
            }
        });
}

// Calls piece(first row, last row, first token, tokens) until all of [rows] x [tokens] is done: rows in multiples of 16,
// at most 7 tokens.
template <typename Piece>
inline void share_out(const Job& job, int threads, const Piece& piece) {
    const std::int64_t rows = job.weight->rows, slices = (rows + lanes - 1) / lanes;
    const std::int64_t wanted = slices / (8 * threads), size = wanted < 1 ? 1 : wanted > 16 ? 16 : wanted;
    const std::int64_t pieces = (slices + size - 1) / size, chunks = (job.tokens + few - 1) / few;
    for (;;) {
        const std::int64_t i = claim(job.counters);
        if (i >= pieces * chunks) return;
        const std::int64_t first = i % pieces * size * lanes, last = first + size * lanes, token = i / pieces * few;
        const std::int64_t left = job.tokens - token;
        piece(first, last < rows ? last : rows, token, static_cast<int>(left < few ? left : few));
    }
}

// Calls body(Number<tokens>): the number of tokens as the compiler knows it.
template <typename Body>
RAREFY_INLINE void with_tokens(int tokens, const Body& body) {
    switch (tokens) {
        case 1: return body(Number<1>{});
        case 2: return body(Number<2>{});
        case 3: return body(Number<3>{});
        case 4: return body(Number<4>{});
        case 5: return body(Number<5>{});
        case 6: return body(Number<6>{});
        default: return body(Number<7>{});
    }
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
