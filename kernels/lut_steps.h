// The inner loops over the look-up form: one slice times one group of T tokens (lut_pack.h), sums in registers.
#ifndef RAREFY_LUT_STEPS_H
#define RAREFY_LUT_STEPS_H

#include "lut_pack.h"

namespace rarefy::RAREFY_NAMESPACE {

#if RAREFY_V4

template <int bytes>
struct Bytes {  // what a statement in assembly reads
    unsigned char all[bytes];
};

// What a panel's steps need of one token, whose activations in that panel stand t panels behind x.
template <int D>
struct Panel;

template <>
struct Panel<RAREFY_F32> {
    __m512 low, high;
    template <int t>
    RAREFY_INLINE void begin(const float* x) {
        low = _mm512_load_ps(x + t * 32);
        high = _mm512_load_ps(x + t * 32 + 16);
    }
    RAREFY_INLINE static __m512i index(const std::uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
    }
    template <int t>
    RAREFY_INLINE void step(const float*, __m512i at, __m512i values, __m512& acc) {
        acc = _mm512_fmadd_ps(_mm512_castsi512_ps(values), _mm512_permutex2var_ps(low, at, high), acc);
    }
};

template <>
struct Panel<RAREFY_BF16> {
    __m512i low, high;
    template <int t>
    RAREFY_INLINE void begin(const bf16* x) {
        low = _mm512_load_si512(x + t * 64);
        high = _mm512_load_si512(x + t * 64 + 32);
    }
    RAREFY_INLINE static __m512i index(const std::uint8_t* p) {
        return _mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
    }
    template <int t>
    RAREFY_INLINE void step(const bf16*, __m512i at, __m512i values, __m512& acc) {
        acc = _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(values),
                               reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(low, at, high)));
    }
};

// The dot product takes one side without sign: the activations, to which 128 was added. What that adds to a sum, 128
// times the weights, is summed beside it, once for all tokens. The activations are an operand in memory of every
// permutation, which is as fast and leaves registers free; said in assembly, since compilers load them once and spill
// something else.
template <>
struct Panel<RAREFY_I8> {
    __m512i sum;
    template <int t>
    RAREFY_INLINE void begin(const std::int8_t*) {
        sum = _mm512_setzero_si512();
    }
    RAREFY_INLINE static __m512i index(const std::uint8_t* p) { return _mm512_load_si512(p); }
    template <int t>
    RAREFY_INLINE void step(const std::int8_t* x, __m512i at, __m512i values, __m512&) {
        __m512i in;
        asm("vpermb %c4(%3), %2, %1\n\tvpdpbusd %5, %1, %0"
            : "+v"(sum), "=&v"(in)
            : "v"(at), "r"(x), "i"(t * 64), "v"(values), "m"(*reinterpret_cast<const Bytes<t * 64 + 64>*>(x)));
    }
};

// A register's next multiply-add waits for the one before it: few tokens have several sums each. int8 begins new sums in
// every panel.
template <int D, int T>
constexpr int sets_of = D == RAREFY_I8 || T > 3 ? 1 : T == 1 ? 4 : 2;

// Tokens t and on of a panel, and of one step of it.
template <int D, int T, int t>
RAREFY_INLINE void begin_tokens(Panel<D> (&panels)[T], const Entry<D>* x) {
    panels[t].template begin<t>(x);
    if constexpr (t + 1 < T) begin_tokens<D, T, t + 1>(panels, x);
}
template <int D, int T, int t>
RAREFY_INLINE void step_tokens(Panel<D> (&panels)[T], const Entry<D>* x, __m512i at, __m512i values,
                               __m512 (&acc)[T]) {
    panels[t].template step<t>(x, at, values, acc[t]);
    if constexpr (t + 1 < T) step_tokens<D, T, t + 1>(panels, x, at, values, acc);
}

// N steps of one panel.
template <int D, int T, int N>
RAREFY_INLINE void some_steps(Panel<D> (&panels)[T], const Entry<D>* x, const std::uint8_t*& columns,
                              const unsigned char*& values, __m512 (&acc)[sets_of<D, T>][T], __m512i& excess) {
    for (int s = 0; s < N; ++s) {
        const __m512i at = Panel<D>::index(columns), value = _mm512_load_si512(values);
        if constexpr (D == RAREFY_I8) excess = _mm512_dpbusd_epi32(excess, _mm512_set1_epi8(-128), value);
        step_tokens<D, T, 0>(panels, x, at, value, acc[s % sets_of<D, T>]);
        columns += lanes * depth_of(D);
        values += 64;
    }
}

constexpr int unrolled = 8;  // steps up to which there is code for each number of them

// The next panels that have N steps; N = 0: more than are unrolled.
template <int D, int T, int N>
RAREFY_INLINE void run_panels(const PanelSteps*& panel, const std::uint8_t*& columns, const unsigned char*& values,
                              const Entry<D>* x, const float* scales, __m512 (&acc)[sets_of<D, T>][T]) {
    while (N > 0 ? panel->steps == N : panel->steps > unrolled) {
        const std::size_t first = std::size_t{panel->panel} * T;
        const Entry<D>* const here = x + first * panel_of(D);
        Panel<D> panels[T];
        begin_tokens<D, T, 0>(panels, here);
        __m512i excess = _mm512_setzero_si512();
        if constexpr (N > 0) {
            some_steps<D, T, N>(panels, here, columns, values, acc, excess);
        } else {
            int left = panel->steps;
            for (; left >= 4; left -= 4) some_steps<D, T, 4>(panels, here, columns, values, acc, excess);
            for (; left > 0; --left) some_steps<D, T, 1>(panels, here, columns, values, acc, excess);
        }
        if constexpr (D == RAREFY_I8) {
            const float* const scale = scales + first;
            for (int t = 0; t < T; ++t)
                acc[0][t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(panels[t].sum, excess)),
                                              _mm512_set1_ps(scale[t]), acc[0][t]);
        }
        ++panel;
    }
    if constexpr (N > 1) run_panels<D, T, N - 1>(panel, columns, values, x, scales, acc);
}

template <int D, int T>
RAREFY_INLINE void run_slice(const LookupSlice& slice, const Entry<D>* x, const float* scales, const float* starts,
                             F32* out) {
    const PanelSteps* panel = slice.panels;
    const std::uint8_t* columns = slice.columns;
    const unsigned char* values = slice.values;
    __m512 acc[sets_of<D, T>][T];
    for (auto& set : acc)
        for (auto& a : set) a = _mm512_setzero_ps();
    if constexpr (D == RAREFY_I8)
        for (int t = 0; t < T; ++t) acc[0][t] = _mm512_set1_ps(starts[t]);
    run_panels<D, T, 0>(panel, columns, values, x, scales, acc);
    run_panels<D, T, unrolled>(panel, columns, values, x, scales, acc);
    for (int t = 0; t < T; ++t) {
        __m512 sum = acc[0][t];
        for (int s = 1; s < sets_of<D, T>; ++s) sum = _mm512_add_ps(sum, acc[s][t]);
        out[t] = reinterpret_cast<F32>(sum);
    }
}

#else

template <int D, int T>
void run_slice(const LookupSlice& slice, const Entry<D>* x, const float* scales, const float* starts, F32* out) {
    constexpr int depth = depth_of(D), panel = panel_of(D);
    const std::uint8_t* columns = slice.columns;
    const Stored<D>* values = reinterpret_cast<const Stored<D>*>(slice.values);
    float total[T][lanes] = {};
    if constexpr (D == RAREFY_I8)
        for (int t = 0; t < T; ++t)
            for (float& sum : total[t]) sum = starts[t];
    for (const PanelSteps* p = slice.panels; p->steps != 0; ++p) {
        std::int32_t whole[T][lanes] = {};
        const Entry<D>* const from = x + p->panel * T * panel;
        for (int left = p->steps; left > 0; --left, columns += lanes * depth, values += lanes * depth)
            for (int i = 0; i < lanes * depth; ++i)
                for (int t = 0; t < T; ++t) {
                    const auto in = from[t * panel + columns[i] % panel];
                    if constexpr (D == RAREFY_I8)
                        whole[t][i / depth] += values[i] * in;
                    else if constexpr (D == RAREFY_BF16)
                        total[t][i / depth] += to_float(values[i]) * in;
                    else
                        total[t][i / depth] += values[i] * in;
                }
        if constexpr (D == RAREFY_I8)
            for (int t = 0; t < T; ++t)
                for (int i = 0; i < lanes; ++i)
                    total[t][i] += scales[p->panel * T + t] * static_cast<float>(whole[t][i]);
    }
    for (int t = 0; t < T; ++t) out[t] = load(total[t]);
}

#endif

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
