// From images to slabs: what one channel (and phase) of the input holds around the output pixels of a tile.
//
// A tile is some whole vectors of sixteen consecutive positions (conv_plan.h). Its slab begins with the input that tap
// (0, 0) meets at these positions and goes on until the last tap has met all, so each tap reads the slab at an offset.
// Within one row neighbouring positions hold neighbouring inputs, so a vector of the slab is put together from one
// masked load per image row that it lies in; lanes that fall into the padding stay 0. These pieces are the same for
// every channel: they are listed once per tile.
#ifndef RAREFY_CONV_PACK_H
#define RAREFY_CONV_PACK_H

#include "conv_plan.h"

namespace rarefy::RAREFY_NAMESPACE {

struct Segment {
    i64 offset;  // entry offset + l, or of an input offset + l * stride, goes to lane l
    int first, last;
};

// The pieces of a tile: those of vector v of the slabs in[starts[v]] and on, of the output out[out_starts[v]] and on.
struct Pieces {
    Segment* in;
    Segment* out;
    u32* starts;
    u32* out_starts;
    i64 strip, first;  // the tile's first position
    int width;
};

RAREFY_INLINE Pieces pieces_in(const Plan& plan, unsigned char* memory, i64 tile) {
    const i64 vectors = plan.phases * plan.slab / lanes, t = tile % plan.tiles;
    Pieces p;
    p.in = reinterpret_cast<Segment*>(memory);
    p.out = p.in + vectors * pieces(plan);
    p.starts = reinterpret_cast<u32*>(p.out + widest * pieces(plan));
    p.out_starts = p.starts + vectors + 1;
    p.strip = tile / plan.tiles;
    p.first = tile_start(plan, t) * lanes;
    p.width = static_cast<int>(tile_start(plan, t + 1) - tile_start(plan, t));
    return p;
}

// Calls f(lane, last lane, image, row, column) for each row that the sixteen positions from `position` on lie in.
template <typename F>
RAREFY_INLINE void each_run(const Plan& plan, i64 strip, i64 position, F f) {
    i64 image = strip, row = position / plan.pitch, column = position % plan.pitch;
    if (plan.merged) {
        image = row / plan.out_h;
        row %= plan.out_h;
    }
    for (i64 lane = 0; lane < lanes && image < plan.images;) {
        const i64 last = least(lanes, lane + plan.pitch - column);
        f(lane, last, image, row, column);
        lane = last;
        column = 0;
        if (++row == plan.out_h && plan.merged) {
            row = 0;
            ++image;
        }
    }
}

// One more piece, or a longer last one: `first` is where the pieces of this vector begin.
RAREFY_INLINE u32 add_piece(Segment* pieces, u32 first, u32 n, i64 offset, i64 from, i64 to) {
    if (n > first && pieces[n - 1].offset == offset && pieces[n - 1].last == from) {
        pieces[n - 1].last = static_cast<int>(to);
        return n;
    }
    pieces[n] = {offset, static_cast<int>(from), static_cast<int>(to)};
    return n + 1;
}

inline void find_outputs(const Plan& plan, Pieces& p) {
    u32 n = 0;
    for (int v = 0; v < p.width; ++v) {
        const u32 begin = p.out_starts[v] = n;
        each_run(plan, p.strip, p.first + v * lanes, [&](i64 lane, i64 last, i64 image, i64 row, i64 column) {
            const i64 to = least(last, lane + plan.out_w - column);
            if (row >= plan.out_h || lane >= to) return;
            const i64 offset = image * plan.rows * plan.out_image + row * plan.out_w + column - lane;
            n = add_piece(p.out, begin, n, offset, lane, to);
        });
    }
    p.out_starts[p.width] = n;
}

inline void find_inputs(const Plan& plan, const rarefy_conv2d& c, Pieces& p) {
    const i64 image_size = plan.channels * c.height * c.width, vectors = plan.slab / lanes, stride = c.stride_w;
    u32 n = 0;
    for (i64 k = 0; k < plan.phases; ++k) {
        const i64 h0 = k / plan.phases_w - c.pad_h, w0 = k % plan.phases_w - c.pad_w;
        for (i64 v = 0; v < vectors; ++v) {
            const u32 begin = p.starts[k * vectors + v] = n;
            each_run(plan, p.strip, p.first + v * lanes, [&](i64 lane, i64 last, i64 image, i64 row, i64 column) {
                const i64 h = row * c.stride_h + h0, w = column * stride + w0;
                if (h < 0 || h >= c.height || w >= c.width) return;
                const i64 from = lane + (w < 0 ? ceil_div(-w, stride) : 0);
                const i64 to = least(last, lane + ceil_div(c.width - w, stride));
                if (from >= to) return;
                n = add_piece(p.in, begin, n, image * image_size + h * c.width + w - lane * stride, from, to);
            });
        }
    }
    p.starts[plan.phases * vectors] = n;
}

// Where each column finds its tap: entries from the tile's first slab on.
inline void find_offsets(const Plan& plan, const rarefy_conv2d& c, std::int32_t* offsets) {
    for (i64 t = 0; t < plan.taps && plan.channels > 0; ++t) {
        const i64 i = t / c.kernel_w, j = t % c.kernel_w;
        const i64 phase = i % c.stride_h * plan.phases_w + j % c.stride_w;
        offsets[t] = static_cast<std::int32_t>(phase * plan.slab + i / c.stride_h * plan.pitch + j / c.stride_w);
    }
    const std::int32_t channel = static_cast<std::int32_t>(plan.phases * plan.slab);
    for (i64 k = plan.taps; k < plan.cols; ++k) offsets[k] = offsets[k - plan.taps] + channel;
}

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
RAREFY_INLINE __mmask16 lane_mask(int first, int last) {
    return static_cast<__mmask16>(((1u << last) - 1u) & ~((1u << first) - 1u));
}
#endif

// Lanes first to last - 1 of v from x, where lane l is x[l].
RAREFY_INLINE F32 merge(F32 v, const float* x, int first, int last) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    return reinterpret_cast<F32>(_mm512_mask_loadu_ps(reinterpret_cast<__m512>(v), lane_mask(first, last), x));
#else
    for (int l = first; l < last; ++l) v[l] = x[l];
    return v;
#endif
}
RAREFY_INLINE F32 merge(F32 v, const bf16* x, int first, int last) {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
    const __mmask16 mask = lane_mask(first, last);
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, x)), 16);
    return reinterpret_cast<F32>(_mm512_mask_mov_epi32(reinterpret_cast<__m512i>(v), mask, wide));
#else
    for (int l = first; l < last; ++l) v[l] = to_float(x[l]);
    return v;
#endif
}

RAREFY_INLINE float as_float(float x) { return x; }
RAREFY_INLINE float as_float(bf16 x) { return to_float(x); }

// Lanes first to last - 1 of v from x, where lane l is x[l * stride].
template <typename X>
RAREFY_INLINE F32 merge_lane_by_lane(F32 v, const X* x, int first, int last, i64 stride) {
    float entries[lanes];
    std::memcpy(entries, &v, sizeof v);
    for (int l = first; l < last; ++l) entries[l] = as_float(x[l * stride]);
    return load(entries);
}
RAREFY_INLINE F32 merge_strided(F32 v, const float* x, int first, int last, i64 stride) {
#if RAREFY_V4
    if (stride == 2) {
        const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
        const __mmask16 mask = lane_mask(first, last);
        const u32 entries = _pdep_u32(mask, 0x55555555u);
        const __m512 low = _mm512_maskz_loadu_ps(static_cast<__mmask16>(entries & 0xffffu), x);
        const __m512 high = _mm512_maskz_loadu_ps(static_cast<__mmask16>(entries >> 16), x + lanes);
        const __m512 both = _mm512_permutex2var_ps(low, even, high);
        return reinterpret_cast<F32>(_mm512_mask_mov_ps(reinterpret_cast<__m512>(v), mask, both));
    }
#endif
    return merge_lane_by_lane(v, x, first, last, stride);
}
RAREFY_INLINE F32 merge_strided(F32 v, const bf16* x, int first, int last, i64 stride) {
#if RAREFY_V4
    if (stride == 2) {  // as 32 bits, lane l has x[2 * l] below and its neighbour, which is not loaded, above
        const __mmask16 mask = lane_mask(first, last);
        const __m512i pairs = _mm512_maskz_loadu_epi16(_pdep_u32(mask, 0x55555555u), x);
        return reinterpret_cast<F32>(
            _mm512_mask_slli_epi32(reinterpret_cast<__m512i>(v), mask, pairs, 16));
    }
#endif
    return merge_lane_by_lane(v, x, first, last, stride);
}

template <bool strided, typename X>
RAREFY_INLINE F32 merge_piece(F32 v, const X* x, const Segment& s, i64 stride) {
    if (strided) return merge_strided(v, x + s.offset, s.first, s.last, stride);
    return merge(v, x + s.offset, s.first, s.last);
}

// The slabs of channels [from, to) of a tile: [to - from][phases][slab].
template <bool strided, typename X>
inline void pack(const Plan& plan, const rarefy_conv2d& c, const X* x, i64 from, i64 to, const Pieces& p,
                 float* slabs) {
    const i64 channel = i64{c.height} * c.width, size = plan.phases * plan.slab, stride = c.stride_w;
    for (i64 v = 0; v < size / lanes; ++v) {
        const Segment* s = p.in + p.starts[v];
        const i64 n = p.starts[v + 1] - p.starts[v];
        float* y = slabs + v * lanes;
        const X* in = x + from * channel;
        if (n == 1) {
            const Segment a = s[0];
            for (i64 k = from; k < to; ++k, in += channel, y += size)
                store(y, merge_piece<strided>(F32{}, in, a, stride));
        } else if (n == 2) {
            const Segment a = s[0], b = s[1];
            for (i64 k = from; k < to; ++k, in += channel, y += size)
                store(y, merge_piece<strided>(merge_piece<strided>(F32{}, in, a, stride), in, b, stride));
        } else {
            for (i64 k = from; k < to; ++k, in += channel, y += size) {
                F32 sum{};
                for (i64 i = 0; i < n; ++i) sum = merge_piece<strided>(sum, in, s[i], stride);
                store(y, sum);
            }
        }
    }
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
