// The look-up form (lookup.h) times few tokens: reading one step of weights serves every token.

#include "lookup.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

// ---------------------------------------------------------------------------------------------------------- building

bool has_lookup(const rarefy_weight& w) {
    const bool form = w.form == RAREFY_BITMAP || (w.form == RAREFY_INDEX16 && w.block == 1);
    return form && w.dtype >= 0 && w.dtype < dtypes && w.rows > 0 && w.cols > 0;
}

// The steps of the panels of one slice, counts[panels], and their sum. A panel of 64 columns has at most 32 or 16, one
// of 32 at most 32.
std::size_t count_steps(const rarefy_weight& w, const LookupShape& s, std::int64_t slice, std::uint8_t* counts) {
    std::memset(counts, 0, static_cast<std::size_t>(s.panels));
    const std::int64_t last = slice * lanes + lanes < w.rows ? slice * lanes + lanes : w.rows;
    for (std::int64_t row = slice * lanes; row < last; ++row) {
        RowColumns columns(w, row);
        std::int64_t column, panel = -1, here = 0;
        while (columns.next(&column)) {
            if (column / s.panel != panel) {
                panel = column / s.panel;
                here = 0;
            }
            ++here;
            const auto steps = static_cast<std::uint8_t>((here + s.depth - 1) / s.depth);
            if (steps > counts[panel]) counts[panel] = steps;
        }
    }
    std::size_t total = 0;
    for (std::int64_t p = 0; p < s.panels; ++p) total += counts[p];
    return total;
}

constexpr std::int64_t most_panels = 65536 / 32;

std::size_t bytes(const rarefy_weight* weight) {
    if (!has_lookup(*weight)) return 0;
    const LookupShape s = lookup_shape(*weight);
    if (s.panels > most_panels) return 0;
    std::uint8_t counts[most_panels];
    std::size_t steps = 0;
    for (std::int64_t slice = 0; slice < s.slices; ++slice) steps += count_steps(*weight, s, slice, counts);
    return steps > UINT32_MAX ? 0 : lookup_parts(*weight, steps).end;
}

// The values and columns of one slice, whose first step is `first`.
void fill(const rarefy_weight& w, const LookupShape& s, std::int64_t slice, const std::uint8_t* counts,
          unsigned char* values, unsigned char* columns) {
    const std::size_t size = static_cast<std::size_t>(4 / s.depth);  // of a value
    const std::int64_t last = slice * lanes + lanes < w.rows ? slice * lanes + lanes : w.rows;
    for (std::int64_t row = slice * lanes; row < last; ++row) {
        RowColumns in(w, row);
        const unsigned char* value = static_cast<const unsigned char*>(w.values) + w.starts[row] * size;
        std::int64_t column, panel = 0, here = 0;
        std::size_t before = 0;  // steps of the slice before this panel
        while (in.next(&column)) {
            for (; panel < column / s.panel; ++panel) {
                before += counts[panel];
                here = 0;
            }
            const std::size_t step = before + static_cast<std::size_t>(here / s.depth);
            const std::size_t at = (step * lanes + static_cast<std::size_t>(row % lanes)) *
                                       static_cast<std::size_t>(s.depth) + static_cast<std::size_t>(here % s.depth);
            std::memcpy(values + at * size, value, size);
            columns[at] = static_cast<unsigned char>(column % s.panel);
            value += size;
            ++here;
        }
    }
}

int build(const rarefy_weight* weight, void* memory, rarefy_weight* lut) {
    const std::size_t size = bytes(weight);
    if (size == 0) return RAREFY_UNSUPPORTED;
    const rarefy_weight& w = *weight;
    const LookupShape s = lookup_shape(w);
    unsigned char* const to = static_cast<unsigned char*>(memory);
    std::memset(to, 0, size);
    // The parts' places depend on the number of steps: count once more, into where the counts will stand.
    std::uint8_t counts[most_panels];
    std::size_t steps = 0;
    for (std::int64_t slice = 0; slice < s.slices; ++slice) steps += count_steps(w, s, slice, counts);
    const LookupParts parts = lookup_parts(w, steps);
    auto* const starts = reinterpret_cast<std::uint32_t*>(to + parts.starts);
    for (std::int64_t slice = 0; slice < s.slices; ++slice) {
        std::uint8_t* const here = to + parts.index + slice * s.panels;
        starts[slice + 1] = starts[slice] + static_cast<std::uint32_t>(count_steps(w, s, slice, here));
        fill(w, s, slice, here, to + parts.values + std::size_t{starts[slice]} * 64,
             to + parts.steps + starts[slice] * static_cast<std::size_t>(lanes * s.depth));
    }
    if (w.scales != nullptr) std::memcpy(to + parts.scales, w.scales, static_cast<std::size_t>(w.rows) * 4);
    *lut = w;
    lut->form = RAREFY_LUT;
    lut->index = to + parts.index;
    lut->values = to + parts.values;
    lut->starts = starts;
    lut->scales = w.scales != nullptr ? reinterpret_cast<const float*>(to + parts.scales) : nullptr;
    return RAREFY_OK;
}

// ------------------------------------------------------------------------------------------------------- multiplying

// One slice of a job and the activations of its tokens.
template <int D>
struct Part {
    const std::uint8_t* counts;   // of the slice's panels
    const std::uint8_t* columns;  // of its first step
    const Stored<D>* values;
    std::int64_t panels, stride;  // stride: from token to token
    const Entry<D>* x;
    const float* scales;          // int8: of the groups, which are panels; the tokens' are `panels` apart
};

#if RAREFY_V4

// What a panel's steps need of one token.
template <int D>
struct Panel;

template <>
struct Panel<RAREFY_F32> {
    __m512 low, high;
    RAREFY_INLINE void begin(const Part<RAREFY_F32>& part, std::int64_t panel, int t) {
        low = _mm512_loadu_ps(part.x + t * part.stride + panel * 32);
        high = _mm512_loadu_ps(part.x + t * part.stride + panel * 32 + lanes);
    }
    RAREFY_INLINE static __m512i index(const std::uint8_t* p) {
        return _mm512_cvtepu8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(p)));
    }
    RAREFY_INLINE void step(__m512i at, const float* values, __m512& acc) {
        acc = _mm512_fmadd_ps(_mm512_load_ps(values), _mm512_permutex2var_ps(low, at, high), acc);
    }
};

template <>
struct Panel<RAREFY_BF16> {
    __m512i low, high;
    RAREFY_INLINE void begin(const Part<RAREFY_BF16>& part, std::int64_t panel, int t) {
        low = _mm512_loadu_si512(part.x + t * part.stride + panel * 64);
        high = _mm512_loadu_si512(part.x + t * part.stride + panel * 64 + 32);
    }
    RAREFY_INLINE static __m512i index(const std::uint8_t* p) {
        return _mm512_cvtepu8_epi16(_mm256_load_si256(reinterpret_cast<const __m256i*>(p)));
    }
    RAREFY_INLINE void step(__m512i at, const bf16* values, __m512& acc) {
        acc = _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(_mm512_load_si512(values)),
                               reinterpret_cast<__m512bh>(_mm512_permutex2var_epi16(low, at, high)));
    }
};

// The dot product takes one side without sign: 128 is added to the activations, and what that adds to a sum, 128 times
// the weights, is summed beside it, once for all tokens.
template <>
struct Panel<RAREFY_I8> {
    __m512i in, sum;
    RAREFY_INLINE void begin(const Part<RAREFY_I8>& part, std::int64_t panel, int t) {
        in = _mm512_xor_si512(_mm512_load_si512(part.x + t * part.stride + panel * group), _mm512_set1_epi8(-128));
        sum = _mm512_setzero_si512();
    }
    RAREFY_INLINE static __m512i index(const std::uint8_t* p) { return _mm512_load_si512(p); }
    RAREFY_INLINE void step(__m512i at, const std::int8_t* values, __m512&) {
        sum = _mm512_dpbusd_epi32(sum, _mm512_permutexvar_epi8(at, in), _mm512_load_si512(values));
    }
};

template <int D, int T>
RAREFY_INLINE void run_slice(const Part<D>& part, F32 (&out)[few]) {
    constexpr int depth = depth_of(D);
    const std::uint8_t* columns = part.columns;
    const Stored<D>* values = part.values;
    __m512 acc[T];
    for (auto& a : acc) a = _mm512_setzero_ps();
    for (std::int64_t p = 0; p < part.panels; ++p) {
        Panel<D> panels[T];
        for (int t = 0; t < T; ++t) panels[t].begin(part, p, t);
        __m512i excess = _mm512_setzero_si512();
        for (int left = part.counts[p]; left > 0; --left) {
            const __m512i at = Panel<D>::index(columns);
            for (int t = 0; t < T; ++t) panels[t].step(at, values, acc[t]);
            if constexpr (D == RAREFY_I8)
                excess = _mm512_dpbusd_epi32(excess, _mm512_set1_epi8(-128), _mm512_load_si512(values));
            columns += lanes * depth;
            values += lanes * depth;
        }
        if constexpr (D == RAREFY_I8)
            for (int t = 0; t < T; ++t)
                acc[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(panels[t].sum, excess)),
                                         _mm512_set1_ps(part.scales[t * part.panels + p]), acc[t]);
    }
    for (int t = 0; t < T; ++t) out[t] = reinterpret_cast<F32>(acc[t]);
}

#else

template <int D, int T>
void run_slice(const Part<D>& part, F32 (&out)[few]) {
    constexpr int depth = depth_of(D), panel = panel_of(D);
    const std::uint8_t* columns = part.columns;
    const Stored<D>* values = part.values;
    float total[T][lanes] = {};
    for (std::int64_t p = 0; p < part.panels; ++p) {
        std::int32_t sum[T][lanes] = {};
        for (int left = part.counts[p]; left > 0; --left, columns += lanes * depth, values += lanes * depth) {
            for (int i = 0; i < lanes * depth; ++i) {
                for (int t = 0; t < T; ++t) {
                    const auto x = part.x[t * part.stride + p * panel + columns[i]];
                    if constexpr (D == RAREFY_I8)
                        sum[t][i / depth] += values[i] * x;
                    else if constexpr (D == RAREFY_BF16)
                        total[t][i / depth] += to_float(values[i]) * x;
                    else
                        total[t][i / depth] += values[i] * x;
                }
            }
        }
        if constexpr (D == RAREFY_I8)
            for (int t = 0; t < T; ++t)
                for (int i = 0; i < lanes; ++i)
                    total[t][i] += part.scales[t * part.panels + p] * static_cast<float>(sum[t][i]);
    }
    for (int t = 0; t < T; ++t) out[t] = load(total[t]);
}

#endif

template <int D>
Part<D> slice_of(const Job& job, const unsigned char* x, std::int64_t slice, std::int64_t token) {
    constexpr int depth = depth_of(D);
    const rarefy_weight& w = *job.weight;
    const LookupShape s = lookup_shape(w);
    const auto* const counts = static_cast<const std::uint8_t*>(w.index);
    const std::int64_t first = w.starts[slice], cols = padded(w.cols);
    const std::uint8_t* const columns = counts + whole_lines(static_cast<std::size_t>(s.slices * s.panels));
    Part<D> part = {counts + slice * s.panels,
                    columns + first * lanes * depth,
                    static_cast<const Stored<D>*>(w.values) + first * lanes * depth,
                    s.panels,
                    cols,
                    reinterpret_cast<const Entry<D>*>(x) + token * cols,
                    nullptr};
    if constexpr (D == RAREFY_I8)
        part.scales = quantized_at(const_cast<unsigned char*>(x), job.tokens, w.cols).scales + token * s.panels;
    return part;
}

template <int D>
void run(const Job& job, int thread, int threads) {
    const unsigned char* const x = prepared_entries<D>(job, thread, threads);
    share_out(job, threads, [&](std::int64_t first, std::int64_t last, std::int64_t token, int tokens) {
        for (std::int64_t row = first; row < last; row += lanes) {
            const std::int64_t n = last - row < lanes ? last - row : lanes;
            const Part<D> part = slice_of<D>(job, x, row / lanes, token);
            F32 out[few];
            with_tokens(tokens, [&](auto t) { run_slice<D, decltype(t)::value>(part, out); });
            for (int t = 0; t < tokens; ++t) finish_rows(job, token + t, row, n, out[t]);
        }
    });
}

}  // namespace

const Algorithm gemv_lut[dtypes] = {{entries_scratch<RAREFY_F32>, run<RAREFY_F32>},
                                    {entries_scratch<RAREFY_BF16>, run<RAREFY_BF16>},
                                    {entries_scratch<RAREFY_I8>, run<RAREFY_I8>}};
const Lut lut = {bytes, build};

}  // namespace rarefy::RAREFY_NAMESPACE
