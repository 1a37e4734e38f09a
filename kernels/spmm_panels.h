// Activations as matrix products want them, and results as the caller wants them.
//
// A slab of tokens is cut into blocks of up to four vectors of sixteen tokens. A block is packed [columns][width],
// width = 16 times its vectors: one column of all its tokens is one stretch of memory, whatever the caller's strides
// are, and no power of two stands between two columns that are used together.
#ifndef RAREFY_SPMM_PANELS_H
#define RAREFY_SPMM_PANELS_H

#include "epilogue.h"
#include "isa.h"
#include "quantize.h"
#include "transpose.h"

namespace rarefy::RAREFY_NAMESPACE {

struct Blocks {
    std::int64_t tokens, vectors, count;

    std::int64_t first(std::int64_t block) const { return block * vectors / count; }  // vector of a block
    int width(std::int64_t block) const { return static_cast<int>(first(block + 1) - first(block)); }
    std::int64_t block_of(std::int64_t vector) const { return ((vector + 1) * count - 1) / vectors; }
};

// Blocks of nearly the same number of vectors, none with more than `widest`.
inline Blocks blocks_of(std::int64_t tokens, int widest) {
    const std::int64_t vectors = (tokens + lanes - 1) / lanes;
    return {tokens, vectors, (vectors + widest - 1) / widest};
}

inline bool by_features(const rarefy_slot& slot) { return slot.feature != 1 && slot.features > 1; }

RAREFY_INLINE void turn(F32 (&v)[lanes]) {
    U32 bits[lanes];
    for (int i = 0; i < lanes; ++i) bits[i] = reinterpret_cast<U32>(v[i]);
    transpose(bits);
    for (int i = 0; i < lanes; ++i) v[i] = reinterpret_cast<F32>(bits[i]);
}

// v[i] = sixteen tokens of feature `feature + i`; zeros past the last token and feature.
template <typename T>
RAREFY_INLINE void read_square(const rarefy_slot& slot, std::int64_t token, std::int64_t tokens, std::int64_t feature,
                               std::int64_t features, F32 (&v)[lanes]) {
    const T* const data = static_cast<const T*>(slot.data);
    if (by_features(slot)) {
        for (int i = 0; i < lanes; ++i) {
            const T* const from = data + (feature + i) * slot.feature + token;
            __builtin_prefetch(from + group * slot.feature, 0, 2);  // the next group's lines lie far apart
            v[i] = i < features ? load_at_most(from, tokens) : F32{};
        }
    } else {
        const T* const from = data + token * slot.token + feature;
        if (tokens >= lanes && features >= lanes)
            for (int i = 0; i < lanes; ++i) {
                __builtin_prefetch(reinterpret_cast<const char*>(from + i * slot.token) + 256);  // the next group's
                v[i] = load(from + i * slot.token);
            }
        else
            for (int i = 0; i < lanes; ++i) v[i] = i < tokens ? load_at_most(from + i * slot.token, features) : F32{};
        turn(v);
    }
}

template <typename T>
RAREFY_INLINE void write_square(const rarefy_slot& slot, std::int64_t token, std::int64_t tokens, std::int64_t feature,
                                std::int64_t features, F32 (&v)[lanes]) {
    T* const data = static_cast<T*>(slot.data);
    if (by_features(slot)) {
        for (int i = 0; i < lanes && i < features; ++i)
            store_at_most(data + (feature + i) * slot.feature + token, v[i], tokens);
    } else {
        turn(v);
        T* const to = data + token * slot.token + feature;
        if (tokens >= lanes && features >= lanes)
            for (int i = 0; i < lanes; ++i) store(to + i * slot.token, v[i]);
        else
            for (int i = 0; i < lanes && i < tokens; ++i) store_at_most(to + i * slot.token, v[i], features);
    }
}

// Sixteen tokens of one group become int8's whole numbers. Returns their scales, NaN for a token that is not finite.
RAREFY_INLINE F32 quantize_square(F32 (&v)[group]) {
    I32 most{};
    for (const F32& part : v) {
        const I32 magnitude = reinterpret_cast<I32>(part) & 0x7fffffff;
        most = magnitude > most ? magnitude : most;
    }
    const I32 finite = most < 0x7f800000;
    const F32 scale = reinterpret_cast<F32>(most & finite) / 127.0f;
    const F32 low = broadcast(-127.0f), high = broadcast(127.0f), divisor = scale > 0.0f ? scale : broadcast(1.0f);
    const I32 used = finite & (scale > 0.0f);
    for (F32& part : v) {
        const F32 ratio = part / divisor;
        const F32 bounded = ratio < low ? low : ratio > high ? high : ratio;
        part = reinterpret_cast<F32>(reinterpret_cast<I32>(bounded + 12582912.0f - 12582912.0f) & used);
    }
    return reinterpret_cast<F32>(reinterpret_cast<I32>(scale) | (~finite & 0x7fc00000));
}

// Columns [column, column + 64) of one vector of tokens, v[i] as in read_square.
RAREFY_INLINE void read_group(const rarefy_slot& x, std::int64_t cols, std::int64_t token, std::int64_t tokens,
                              std::int64_t column, F32 (&v)[group]) {
    for (int i = 0; i < group; i += lanes) {
        F32 square[lanes] = {};
        const std::int64_t left = cols - column - i;
        if (left > 0 && x.dtype == RAREFY_BF16)
            read_square<bf16>(x, token, tokens, column + i, left, square);
        else if (left > 0)
            read_square<float>(x, token, tokens, column + i, left, square);
        for (int j = 0; j < lanes; ++j) v[i + j] = square[j];
    }
}

// The cache lines that the square of the next features will write: sixteen tokens lie far apart, so nothing else sees
// them coming.
template <typename T>
RAREFY_INLINE void expect_square(const rarefy_slot& slot, std::int64_t token, std::int64_t tokens,
                                 std::int64_t feature) {
    if (by_features(slot)) return;
    const T* const at = static_cast<const T*>(slot.data) + token * slot.token + feature;
    for (int i = 0; i < lanes && i < tokens; ++i) __builtin_prefetch(at + i * slot.token, 1);
}

// y = activation(scale * sum + bias) + other for one square of sums, v[i] = sixteen tokens of row `row + i`. By value
// what the compiler must not fetch again after every store.
struct Ending {
    const float* scales;
    const float* bias;
    int activation;
    rarefy_slot y;
    const rarefy_slot* other;
};

template <typename T>
RAREFY_INLINE void finish_square(const Ending& end, std::int64_t token, std::int64_t tokens, std::int64_t row,
                                 std::int64_t rows, F32 (&v)[lanes]) {
    if (end.scales != nullptr)
        for (int i = 0; i < lanes && i < rows; ++i) v[i] *= end.scales[row + i];
    if (end.bias != nullptr)
        for (int i = 0; i < lanes && i < rows; ++i) v[i] += end.bias[row + i];
    if (end.activation == RAREFY_RELU)
        for (int i = 0; i < lanes; ++i) v[i] = activate(v[i], RAREFY_RELU);
    else if (end.activation != RAREFY_NONE)
        for (int i = 0; i < lanes && i < rows; ++i) v[i] = activate(v[i], end.activation);
    if (end.other != nullptr) {
        F32 other[lanes];
        read_square<T>(*end.other, token, tokens, row, rows, other);
        for (int i = 0; i < lanes; ++i) v[i] += other[i];
    }
    write_square<T>(end.y, token, tokens, row, rows, v);
}

// Sums [rows][width] of a block of tokens that begins at `token`, with `vectors` vectors, into rows `row` and on of y.
// `start`: [width] or null, what every sum began with.
template <typename T>
inline void finish(const Job& job, const float* sums, std::int64_t row, std::int64_t rows, std::int64_t token,
                   std::int64_t tokens, int vectors, const float* start) {
    const Ending end = {job.weight->scales, job.bias, job.activation, *job.y, job.other};
    const std::int64_t width = vectors * lanes;
    for (int j = 0; j < vectors && j * lanes < tokens; ++j) {
        const F32 first = start != nullptr ? load(start + j * lanes) : F32{};
        for (std::int64_t r = 0; r < rows; r += lanes) {
            if (r + 3 * lanes <= rows)
                expect_square<T>(end.y, token + j * lanes, tokens - j * lanes, row + r + 2 * lanes);
            F32 v[lanes];
            const float* const from = sums + r * width + j * lanes;
            if (r + lanes <= rows)
                for (int i = 0; i < lanes; ++i) v[i] = load(from + i * width);
            else
                for (int i = 0; i < lanes; ++i) v[i] = r + i < rows ? load(from + i * width) : F32{};
            if (start != nullptr)
                for (int i = 0; i < lanes; ++i) v[i] += first;
            finish_square<T>(end, token + j * lanes, tokens - j * lanes, row + r, rows - r, v);
        }
    }
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
