// Products of R x 1 blocks and single entries with 16-bit columns, for many tokens.

#include "families.h"
#include "spmm_quads.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

// Where each panel of 2^shift columns begins among the n ascending columns of one block row, plus `first`.
void panel_bounds(const std::uint16_t* columns, std::int64_t n, int shift, std::int64_t panels, std::int64_t first,
                  std::uint32_t* bounds) {
    std::int64_t begun = 0;  // panels with a bound
    const auto begin_up_to = [&](std::int64_t panel, std::int64_t at) {
        while (begun <= panel) bounds[begun++] = static_cast<std::uint32_t>(first + at);
    };
    std::int64_t i = 0;
#if RAREFY_V4
    // 32 at a time: where the panel is not that of the column before.
    if (n > 0) begin_up_to(columns[0] >> shift, 0);
    const __m128i by = _mm_cvtsi32_si128(shift);
    for (i = 1; i < n; i += 32) {
        const auto some = static_cast<__mmask32>(n - i < 32 ? (1u << (n - i)) - 1 : ~0u);
        const __m512i here = _mm512_srl_epi16(_mm512_maskz_loadu_epi16(some, columns + i), by);
        const __m512i before = _mm512_srl_epi16(_mm512_maskz_loadu_epi16(some, columns + i - 1), by);
        for (std::uint32_t new_panel = _mm512_mask_cmpneq_epi16_mask(some, here, before); new_panel != 0;
             new_panel &= new_panel - 1) {
            const std::int64_t at = i + __builtin_ctz(new_panel);
            begin_up_to(columns[at] >> shift, at);
        }
    }
#else
    for (; i < n; ++i) begin_up_to(columns[i] >> shift, i);
#endif
    begin_up_to(panels, n);
}

template <typename Value>
void widen(const Value* values, std::int64_t n, float* to) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = static_cast<float>(values[i]);
}

void widen(const bf16* values, std::int64_t n, float* to) {
    for (std::int64_t i = 0; i < n; ++i) to[i] = to_float(values[i]);
}

void decode(const rarefy_weight& w, std::int64_t first, std::int64_t panel, std::uint16_t*, float* values, Tile& tile) {
    const std::int64_t start = w.starts[first], units = w.starts[first + tile.count] - start;
    tile.columns = static_cast<const std::uint16_t*>(w.index) + start;
    tile.relative = false;
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(panel));
    for (std::int64_t i = 0; i < tile.count; ++i) {
        const std::int64_t at = w.starts[first + i] - start, last = w.starts[first + i + 1] - start;
        panel_bounds(tile.columns + at, last - at, shift, tile.panels, at, tile.bounds + i * (tile.panels + 1));
    }
    tile.values = values;
    if (w.dtype == RAREFY_F32)
        tile.values = static_cast<const float*>(w.values) + start * w.block;
    else if (w.dtype == RAREFY_BF16 && !has_dot)
        widen(static_cast<const bf16*>(w.values) + start * w.block, units * w.block, values);
    else if (w.dtype == RAREFY_I8)
        widen(static_cast<const std::int8_t*>(w.values) + start * w.block, units * w.block, values);
}

void run(const Job& job, int thread, int threads) { spmm(job, thread, threads, decode); }

std::size_t scratch_i8(const Job& job, int threads) {
    return has_quads ? quads_scratch(job, threads) : spmm_scratch(job, threads);
}

void run_i8(const Job& job, int thread, int threads) {
    constexpr int shift = __builtin_ctz(group);
    if (!has_quads) return run(job, thread, threads);
    quads(job, thread, threads,
          [](const std::uint16_t* columns, std::int64_t n, std::int64_t groups, std::uint32_t* bounds) {
              panel_bounds(columns, n, shift, groups, 0, bounds);
          });
}

}  // namespace

extern const Algorithm spmm_index[dtypes];
const Algorithm spmm_index[dtypes] = {{spmm_scratch, run}, {spmm_scratch, run}, {scratch_i8, run_i8}};

}  // namespace rarefy::RAREFY_NAMESPACE
