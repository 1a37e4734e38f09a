// Tokens, packed for gemm.h: [piece of K][panel][unit][token of the panel].
#ifndef RAREFY_PANELS_H
#define RAREFY_PANELS_H

#include "gemm.h"
#include "isa.h"

namespace rarefy::RAREFY_NAMESPACE {

// How the vectors of sixteen tokens are dealt out to panels as wide as each other, but for one vector.
struct Split {
    std::int64_t vectors, panels;
    std::int64_t first(std::int64_t panel) const {
        const std::int64_t few = vectors / panels, wider = vectors % panels;
        return panel * few + (panel < wider ? panel : wider);
    }
    std::int64_t panel(std::int64_t vector) const {
        const std::int64_t few = vectors / panels, wider = vectors % panels, in_wider = wider * (few + 1);
        return vector < in_wider ? vector / (few + 1) : wider + (vector - in_wider) / few;
    }
};

inline Split split(std::int64_t tokens, int widest) {
    const std::int64_t vectors = (tokens + lanes - 1) / lanes;
    return {vectors, (vectors + widest - 1) / widest};
}

// The columns of int8 are whole groups, those of the rest whole units.
template <int dtype>
inline std::int64_t padded_columns(std::int64_t cols) {
    constexpr int whole = dtype == RAREFY_I8 ? group : Kind<dtype>::unit;
    return (cols + whole - 1) / whole * whole;
}

struct Panels {
    std::uint32_t* units;
    float* scales;         // int8: [groups][padded tokens]
    std::int32_t* starts;  // likewise
    std::int64_t padded;   // tokens
};

template <int dtype>
inline std::size_t panel_bytes(std::int64_t tokens, std::int64_t cols) {
    const std::int64_t padded = (tokens + lanes - 1) / lanes * lanes;
    const std::int64_t extra = dtype == RAREFY_I8 ? 2 * groups_of(cols) : 0;
    return static_cast<std::size_t>(padded * 4 * (padded_columns<dtype>(cols) / Kind<dtype>::unit + extra));
}

template <int dtype>
inline Panels panels_at(unsigned char* memory, std::int64_t tokens, std::int64_t cols) {
    const std::int64_t padded = (tokens + lanes - 1) / lanes * lanes;
    auto* const units = reinterpret_cast<std::uint32_t*>(memory);
    auto* const scales = reinterpret_cast<float*>(units + padded * (padded_columns<dtype>(cols) / Kind<dtype>::unit));
    return {units, scales, reinterpret_cast<std::int32_t*>(scales + padded * groups_of(cols)), padded};
}

// Where the vector's part of a piece of K that starts at column k and has so many units begins, and the step from a
// unit to the next.
struct Place {
    std::uint32_t* at;
    std::int64_t step;
};

template <int dtype>
inline Place place(const Panels& panels, const Split& s, std::int64_t vector, std::int64_t k, std::int64_t units) {
    const std::int64_t panel = s.panel(vector), first = s.first(panel), width = s.first(panel + 1) - first;
    std::uint32_t* const piece = panels.units + k / Kind<dtype>::unit * panels.padded;
    return {piece + first * lanes * units + (vector - first) * lanes, width * lanes};
}

// Up to sixteen floats as they enter a sum with weights of the dtype.
template <int dtype>
RAREFY_INLINE F32 entering(const rarefy_slot& x, std::int64_t at, std::int64_t n) {
    if (x.dtype == RAREFY_BF16) return load_at_most(static_cast<const bf16*>(x.data) + at, n);
    const F32 v = load_at_most(static_cast<const float*>(x.data) + at, n);
    if (dtype != RAREFY_BF16) return v;
    bf16 rounded[lanes];
    store(rounded, v);
    return load(rounded);
}

// Pairs of rounded floats: even columns low, odd ones high.
RAREFY_INLINE U32 pairs(F32 even, F32 odd) {
    return (reinterpret_cast<U32>(even) >> 16) | (reinterpret_cast<U32>(odd) & 0xffff0000u);
}

// Sixteen tokens of a slot from token t on, columns k .. end - 1, padded with zeros. F32 and BF16.
template <int dtype>
inline void pack_tokens(const rarefy_slot& x, std::int64_t t, std::int64_t some, std::int64_t k, std::int64_t end,
                        std::int64_t units, const Place& to) {
    constexpr int unit = Kind<dtype>::unit;
    const bool features = x.feature != 1 && x.features > 1;  // features, each of which has its tokens in a row
    for (std::int64_t u = 0; u < units; u += lanes) {
        U32 block[lanes];
        for (std::int64_t i = 0; i < lanes; ++i) {
            F32 v[2] = {};
            for (int j = 0; j < unit; ++j) {
                if (features) {
                    const std::int64_t column = k + (u + i) * unit + j;
                    if (column < end) v[j] = entering<dtype>(x, t * x.token + column * x.feature, some);
                } else if (i < some) {
                    const std::int64_t column = k + u * unit + j * lanes;
                    v[j] = entering<dtype>(x, (t + i) * x.token + column, end - column);
                }
            }
            block[i] = reinterpret_cast<U32>(v[0]);
            if constexpr (unit == 2) {
                if (features) {
                    block[i] = pairs(v[0], v[1]);
                } else {  // columns 0-15 and 16-31: pairs of neighbours
                    typedef U16 Half;
                    const Half low = __builtin_convertvector(reinterpret_cast<U32>(v[0]) >> 16, Half);
                    const Half high = __builtin_convertvector(reinterpret_cast<U32>(v[1]) >> 16, Half);
                    std::memcpy(&block[i], &low, sizeof low);
                    std::memcpy(reinterpret_cast<unsigned char*>(&block[i]) + sizeof low, &high, sizeof high);
                }
            }
        }
        if (!features) transpose(block);
        const std::int64_t rest = units - u < lanes ? units - u : lanes;
        for (std::int64_t i = 0; i < rest; ++i) std::memcpy(to.at + (u + i) * to.step, &block[i], sizeof block[i]);
    }
}

// Sixteen tokens of int8 that are already quantised: tokens 0 .. some - 1 of q.
inline void pack_quantized(const Quantized& q, std::int64_t some, std::int64_t first_group, std::int64_t groups,
                           const Place& to) {
    for (std::int64_t g = 0; g < groups; ++g) {
        const auto* const from = q.q + (first_group + g) * group;
        const std::int64_t stride = q.groups * group;
#if RAREFY_V4
        U32 block[lanes] = {};
        for (std::int64_t i = 0; i < some; ++i) std::memcpy(&block[i], from + i * stride, sizeof block[i]);
        transpose(block);
        for (int i = 0; i < lanes; ++i) std::memcpy(to.at + (g * lanes + i) * to.step, &block[i], sizeof block[i]);
#else
        for (int c = 0; c < group; ++c) {
            float row[lanes] = {};
            for (std::int64_t i = 0; i < some; ++i) row[i] = static_cast<float>(from[i * stride + c]);
            std::memcpy(to.at + (g * group + c) * to.step, row, sizeof row);
        }
#endif
    }
}

// Vector `vector` of sixteen tokens, all columns; x starts at the panels' first token. `own`: memory of this thread,
// quantized_bytes(16, cols).
template <int dtype>
inline void pack(const rarefy_slot& x, std::int64_t tokens, std::int64_t cols, const Split& s, std::int64_t vector,
                 const Panels& panels, unsigned char* own) {
    using K = Kind<dtype>;
    const std::int64_t t = vector * lanes, some = tokens - t < lanes ? tokens - t : lanes;
    const Quantized q = quantized_at(own, lanes, cols);
    if constexpr (dtype == RAREFY_I8) {
        rarefy_slot these = x;
        const std::int64_t size = x.dtype == RAREFY_BF16 ? 2 : 4;
        these.data = static_cast<unsigned char*>(x.data) + t * x.token * size;
        quantize(these, cols, 0, some, q);
        for (std::int64_t g = 0; g < q.groups; ++g)
            for (std::int64_t i = 0; i < lanes; ++i) {
                panels.scales[g * panels.padded + t + i] = i < some ? q.scales[i * q.groups + g] : 0.0f;
                panels.starts[g * panels.padded + t + i] = i < some ? q.starts[i * q.groups + g] : 0;
            }
    }
    const std::int64_t padded = padded_columns<dtype>(cols);
    for (std::int64_t k = 0; k < padded; k += K::columns) {
        const std::int64_t units = (padded - k < K::columns ? padded - k : K::columns) / K::unit;
        const Place to = place<dtype>(panels, s, vector, k, units);
        if constexpr (dtype == RAREFY_I8)
            pack_quantized(q, some, k / group, units * K::unit / group, to);
        else
            pack_tokens<dtype>(x, t, some, k, k + K::columns < cols ? k + K::columns : cols, units, to);
    }
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
