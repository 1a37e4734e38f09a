// The product of rows of the weight with one panel, and what happens to finished sums.
#ifndef RAREFY_CONV_ROWS_H
#define RAREFY_CONV_ROWS_H

#include "conv_pack.h"
#include "epilogue.h"

namespace rarefy::RAREFY_NAMESPACE {

// Block rows [from, to) times the columns before `last`, from where they stopped, of one tile.
struct Part {
    const Plan* plan;
    const ConvJob* job;
    const Pieces* pieces;
    const std::uint16_t* columns;  // of the units
    const std::int32_t* offsets;   // of the columns, less `base` in `panel`
    i64 from, to;
    int last;
    bool begins, ends;  // the tile's first and last panel
    const float* panel;
    i64 base;
    float* sums;   // [rows][width][lanes], unused where the panel both begins and ends
    u32* cursors;  // the next unit of each block row
};

RAREFY_INLINE F32 spread(float v) { return F32{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }
RAREFY_INLINE F32 spread(bf16 v) {
#if RAREFY_V4
    return reinterpret_cast<F32>(_mm512_maskz_set1_epi16(0xaaaaaaaau, static_cast<short>(v)));
#else
    return spread(to_float(v));
#endif
}
RAREFY_INLINE F32 spread(std::int8_t v) { return spread(static_cast<float>(v)); }

RAREFY_INLINE void put(float* y, F32 v, int first, int last) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    _mm512_mask_storeu_ps(y, lane_mask(first, last), reinterpret_cast<__m512>(v));
#else
    for (int l = first; l < last; ++l) y[l] = v[l];
#endif
}
RAREFY_INLINE void put(bf16* y, F32 v, int first, int last) {
    bf16 rounded[lanes];
    store(rounded, v);
    std::memcpy(y + first, rounded + first, static_cast<std::size_t>(last - first) * sizeof(bf16));
}

__attribute__((noinline)) inline void activate_all(F32* sums, int width, int activation) {
    for (int v = 0; v < width; ++v) sums[v] = activate(sums[v], activation);
}

template <int width, typename Y>
RAREFY_INLINE void put_row(const Part& part, const F32 (&sums)[width], i64 row) {
    const ConvJob& job = *part.job;
    const Pieces& p = *part.pieces;
    const i64 at = row * part.plan->out_image;
    const Y* other = static_cast<const Y*>(job.other);
    Y* y = static_cast<Y*>(job.y) + at;
    for (int v = 0; v < width; ++v) {
        for (u32 k = p.out_starts[v]; k < p.out_starts[v + 1]; ++k) {
            const Segment s = p.out[k];
            F32 sum = sums[v];
            if (other != nullptr) sum += merge(F32{}, other + at + s.offset, s.first, s.last);
            if (s.last - s.first == lanes)
                store(y + s.offset, sum);
            else
                put(y + s.offset, sum, s.first, s.last);
        }
    }
}

// Scale, bias, activation, the other summand; then into the output.
template <int width>
RAREFY_INLINE void finish(const Part& part, const F32 (&given)[width], i64 row) {
    const rarefy_conv2d& c = *part.job->conv;
    const F32 scale = broadcast(c.weight->dtype == RAREFY_I8 ? c.weight->scales[row] : 1.0f);
    const F32 bias = broadcast(c.bias != nullptr ? c.bias[row] : 0.0f);
    F32 sums[width];
    for (int v = 0; v < width; ++v) {
        sums[v] = given[v] * scale + bias;
        if (c.activation == RAREFY_RELU) sums[v] = activate(sums[v], RAREFY_RELU);
    }
    if (c.activation > RAREFY_RELU) activate_all(sums, width, c.activation);
    if (c.dtype == RAREFY_BF16)
        put_row<width, bf16>(part, sums, row);
    else
        put_row<width, float>(part, sums, row);
}

// Units from `at` on whose column is before `last`, `rows` rows of each from row `sub` of the block.
template <int rows, int width, typename V>
RAREFY_INLINE u32 add_units(F32 (&sums)[rows][width], const Part& part, const V* values, i64 sub, u32 at, u32 end) {
    const i64 block = rows == 1 ? 1 : part.plan->block;
    const std::uint16_t* const columns = part.columns;
    const std::int32_t* const offsets = part.offsets;
    const float* const panel = part.panel - part.base;
    const int last = part.last;
    const V* v = values + static_cast<i64>(at) * block + sub;
    for (; at < end; ++at, v += block) {
        const int column = columns[at];
        if (column >= last) break;
        const float* x = panel + offsets[column];
#if defined(__x86_64__)
        __asm__("" : "+r"(x));  // one register in every address below, not a sum of two
#endif
        F32 in[width];
        if (rows > 1)
            for (int j = 0; j < width; ++j) in[j] = load(x + j * lanes);
        for (int r = 0; r < rows; ++r) {
            const F32 w = spread(v[r]);
            for (int j = 0; j < width; ++j)
                sums[r][j] = fma(w, rows > 1 ? in[j] : load(x + j * lanes), sums[r][j]);
        }
    }
    return at;
}

template <int rows, int width, typename V>
void multiply(const Part& part) {
    const rarefy_weight& weight = *part.job->conv->weight;
    const V* values = static_cast<const V*>(weight.values);
    const i64 block = part.plan->block;
    for (i64 b = part.from; b < part.to; ++b) {
        const u32 from = part.cursors[b - part.from], end = weight.starts[b + 1];
        u32 at = from;
        for (i64 sub = 0; sub < block; sub += rows) {
            float* kept = part.sums + ((b - part.from) * block + sub) * (width * lanes);
            F32 sums[rows][width];
            for (int r = 0; r < rows; ++r)
                for (int j = 0; j < width; ++j) sums[r][j] = part.begins ? F32{} : load(kept + (r * width + j) * lanes);
            at = add_units<rows, width>(sums, part, values, sub, from, end);
            for (int r = 0; r < rows; ++r) {
                if (!part.ends)
                    for (int j = 0; j < width; ++j) store(kept + (r * width + j) * lanes, sums[r][j]);
                else if (b * block + sub + r < part.plan->rows)
                    finish<width>(part, sums[r], b * block + sub + r);
            }
        }
        part.cursors[b - part.from] = at;
    }
}

template <int rows, typename V, int width = rows == 1 ? widest_row : widest_block>
inline void multiply_width(const Part& part) {
    if (part.pieces->width == width) {
        multiply<rows, width, V>(part);
    } else {
        if constexpr (width > 1) multiply_width<rows, V, width - 1>(part);
    }
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
