// Products of a piece of a dense row with the same piece of tokens, column beside column: what a lane sums is whole
// columns of its own, and lanes are summed at the end of the row.
//
// A `Dot` says for a dtype: the columns of a piece (`step`), a piece of a row (`Row`) and of a token (`Piece`), and how
// their product is added to sixteen sums.
#ifndef RAREFY_DOT_H
#define RAREFY_DOT_H

#include "isa.h"
#include "quantize.h"

namespace rarefy::RAREFY_NAMESPACE {

// Tokens as rows of T, features one behind the other.
template <typename T>
struct Rows {
    const T* data;
    std::int64_t stride;
};

// The slot itself where it has them so, else a copy in `memory`, [tokens][cols]. Converts.
template <typename T>
inline Rows<T> as_rows(const rarefy_slot& x, std::int64_t tokens, std::int64_t cols, unsigned char* memory) {
    constexpr int same = sizeof(T) == 2 ? RAREFY_BF16 : RAREFY_F32;
    if (x.dtype == same && (x.feature == 1 || cols == 1)) return {static_cast<const T*>(x.data), x.token};
    T* const copy = reinterpret_cast<T*>(memory);
    for (std::int64_t t = 0; t < tokens; ++t) {
        if (x.dtype == RAREFY_F32) {
            const float* const from = static_cast<const float*>(x.data) + t * x.token;
            std::int64_t k = 0;
            if (x.feature == 1)
                for (; k + lanes <= cols; k += lanes) store(copy + t * cols + k, load(from + k));
            for (; k < cols; ++k) {
                if constexpr (sizeof(T) == 2)
                    copy[t * cols + k] = to_bf16(from[k * x.feature]);
                else
                    copy[t * cols + k] = from[k * x.feature];
            }
        } else {  // bf16 to bf16: the layout alone changes
            const bf16* const from = static_cast<const bf16*>(x.data) + t * x.token;
            for (std::int64_t k = 0; k < cols; ++k) copy[t * cols + k] = static_cast<T>(from[k * x.feature]);
        }
    }
    return {copy, cols};
}

template <int dtype>
struct Dot;

template <>
struct Dot<RAREFY_F32> {
    using Value = float;
    using Input = Rows<float>;
    using Row = F32;
    using Piece = F32;
    static constexpr int step = lanes, most_tokens = 8;
    static std::size_t bytes(std::int64_t tokens, std::int64_t cols) {
        return static_cast<std::size_t>(tokens * cols) * sizeof(float);
    }
    static Input prepare(const Job& job, unsigned char* memory) {
        return as_rows<float>(*job.x, job.tokens, job.weight->cols, memory);
    }
    static RAREFY_INLINE Row row(const float* w) { return load(w); }
    static RAREFY_INLINE Row row_first(const float* w, std::int64_t n) { return load_first(w, n); }
    static RAREFY_INLINE Piece piece(const Input& x, std::int64_t t, std::int64_t k) { return load(x.data + t * x.stride + k); }
    static RAREFY_INLINE Piece piece_first(const Input& x, std::int64_t t, std::int64_t k, std::int64_t n) {
        return load_first(x.data + t * x.stride + k, n);
    }
    static RAREFY_INLINE F32 add(F32 sums, const Row& w, const Piece& x) { return fma(w, x, sums); }
};

template <>
struct Dot<RAREFY_BF16> {
    using Value = bf16;
    using Input = Rows<bf16>;
    static constexpr int most_tokens = 8;
    static std::size_t bytes(std::int64_t tokens, std::int64_t cols) {
        return static_cast<std::size_t>(tokens * cols) * sizeof(bf16);
    }
    static Input prepare(const Job& job, unsigned char* memory) {
        return as_rows<bf16>(*job.x, job.tokens, job.weight->cols, memory);
    }
#if RAREFY_V4
    using Row = U32;  // 16 pairs
    static constexpr int step = 32;
    static RAREFY_INLINE Row row(const bf16* w) {
        U32 v;
        std::memcpy(&v, w, sizeof v);
        return v;
    }
    static RAREFY_INLINE Row row_first(const bf16* w, std::int64_t n) {
        return reinterpret_cast<U32>(_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1u << n) - 1u), w));
    }
    static RAREFY_INLINE F32 add(F32 sums, const Row& w, const Row& x) {
        return reinterpret_cast<F32>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(sums), (__m512bh)w, (__m512bh)x));
    }
#else
    using Row = F32;
    static constexpr int step = lanes;
    static RAREFY_INLINE Row row(const bf16* w) { return load(w); }
    static RAREFY_INLINE Row row_first(const bf16* w, std::int64_t n) { return load_first(w, n); }
    static RAREFY_INLINE F32 add(F32 sums, const Row& w, const Row& x) { return fma(w, x, sums); }
#endif
    using Piece = Row;
    static RAREFY_INLINE Piece piece(const Input& x, std::int64_t t, std::int64_t k) { return row(x.data + t * x.stride + k); }
    static RAREFY_INLINE Piece piece_first(const Input& x, std::int64_t t, std::int64_t k, std::int64_t n) {
        return row_first(x.data + t * x.stride + k, n);
    }
};

template <>
struct Dot<RAREFY_I8> {
    using Value = std::int8_t;
    using Input = Quantized;
    static constexpr int step = group, most_tokens = 4;
    static std::size_t bytes(std::int64_t tokens, std::int64_t cols) { return quantized_bytes(tokens, cols); }
    static Input prepare(const Job& job, unsigned char* memory) {
        const Quantized x = quantized_at(memory, job.tokens, job.weight->cols);
        quantize(*job.x, job.weight->cols, 0, job.tokens, x);
        return x;
    }
    static RAREFY_INLINE std::int64_t entry(const Input& x, std::int64_t t, std::int64_t k) {
        return t * x.groups + k / group;
    }
#if RAREFY_V4
    using Row = U32;  // 16 times 4 unsigned bytes, w + 128
    struct Piece {
        U32 q;
        I32 start;
        float scale;
    };
    static RAREFY_INLINE Row row(const std::int8_t* w) {
        U32 v;
        std::memcpy(&v, w, sizeof v);
        return v ^ 0x80808080u;
    }
    static RAREFY_INLINE Row row_first(const std::int8_t* w, std::int64_t n) {
        return reinterpret_cast<U32>(_mm512_maskz_loadu_epi8(static_cast<__mmask64>((1ull << n) - 1ull), w)) ^ 0x80808080u;
    }
    static RAREFY_INLINE Piece piece(const Input& x, std::int64_t t, std::int64_t k) {
        const std::int64_t at = entry(x, t, k);
        Piece p;
        std::memcpy(&p.q, x.q + at * group, sizeof p.q);
        const __m512i offset = _mm512_set1_epi8(-128);  // unsigned: 128, what `row` adds to each w
        const __m512i excess = _mm512_dpbusd_epi32(_mm512_setzero_si512(), offset, reinterpret_cast<__m512i>(p.q));
        p.start = -reinterpret_cast<I32>(excess);  // lane by lane, so that each lane's sum is small and exact
        p.scale = x.scales[at];
        return p;
    }
    static RAREFY_INLINE F32 add(F32 sums, const Row& w, const Piece& x) {
        const __m512i whole = _mm512_dpbusd_epi32(reinterpret_cast<__m512i>(x.start), reinterpret_cast<__m512i>(w),
                                                  reinterpret_cast<__m512i>(x.q));
        return fma(reinterpret_cast<F32>(_mm512_cvtepi32_ps(whole)), broadcast(x.scale), sums);
    }
#else
    // Sums of 64 products of int8 are below 2^24: exact in float.
    struct Row {
        F32 part[4];
    };
    struct Piece {
        F32 part[4];
        float scale;
    };
    static RAREFY_INLINE F32 widened(const std::int8_t* p) {
        typedef std::int8_t I8 __attribute__((vector_size(16)));
        I8 v;
        std::memcpy(&v, p, sizeof v);
        return __builtin_convertvector(__builtin_convertvector(v, I32), F32);
    }
    static RAREFY_INLINE Row row(const std::int8_t* w) {
        return {{widened(w), widened(w + 16), widened(w + 32), widened(w + 48)}};
    }
    static RAREFY_INLINE Row row_first(const std::int8_t* w, std::int64_t n) {
        std::int8_t part[group] = {};
        std::memcpy(part, w, static_cast<std::size_t>(n));
        return row(part);
    }
    static RAREFY_INLINE Piece piece(const Input& x, std::int64_t t, std::int64_t k) {
        const std::int64_t at = entry(x, t, k);
        const Row q = row(x.q + at * group);
        return {{q.part[0], q.part[1], q.part[2], q.part[3]}, x.scales[at]};
    }
    static RAREFY_INLINE F32 add(F32 sums, const Row& w, const Piece& x) {
        F32 whole = w.part[0] * x.part[0];
        for (int i = 1; i < 4; ++i) whole = fma(w.part[i], x.part[i], whole);
        return fma(whole, broadcast(x.scale), sums);
    }
#endif
    static RAREFY_INLINE Piece piece_first(const Input& x, std::int64_t t, std::int64_t k, std::int64_t) {
        return piece(x, t, k);  // padded already
    }
};

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
