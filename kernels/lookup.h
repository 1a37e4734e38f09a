// The look-up form: sixteen rows are lanes, and an activation is fetched by a permutation of registers.
//
// Rows are cut into slices of 16, columns into panels that two registers hold (int8: one register, so that a panel is a
// group that shares a scale). In a panel each row of a slice has a list of its values and their columns there, ascending,
// filled up to the longest list of the sixteen and to a multiple of `depth`, the products that one instruction sums. A
// step is `depth` entries of each row. What fills up has the value 0 and the column 0x80, whose bits that permutations
// look at are those of column 0.
//
//   values   of all slices, panels, steps in this order: 64 bytes a step, [16 rows][depth] values
//   index    [slices][panels + 1] PanelSteps: the panels of a slice that have steps, most steps first, which is also the
//            order of their steps, and zeros behind them; filled up to a multiple of 64 bytes;
//            then, step after step, [16 rows][depth] uint8 columns in the panel
//   starts   [slices + 1] uint32: the steps before each slice
//   scales   int8: a copy of the source's
//
// all parts in one piece of memory, each beginning at a multiple of 64 bytes. Panels of as many steps stand together so
// that the processor foresees where the loops over steps end.
#ifndef RAREFY_LOOKUP_H
#define RAREFY_LOOKUP_H

#include "isa.h"
#include "simd.h"

namespace rarefy::RAREFY_NAMESPACE {

struct PanelSteps {
    std::uint16_t panel;
    std::uint8_t steps, zero;
};

constexpr std::uint8_t filled = 0x80;                  // the column of what fills up a list
constexpr std::int64_t most_panels = 65536 / 32;
constexpr int panel_of(int dtype) { return dtype == RAREFY_F32 ? 32 : 64; }
constexpr int depth_of(int dtype) { return dtype == RAREFY_F32 ? 1 : dtype == RAREFY_BF16 ? 2 : 4; }

struct LookupShape {
    std::int64_t slices, panels;
    int panel, depth;
};
inline LookupShape lookup_shape(const rarefy_weight& w) {
    const int panel = panel_of(w.dtype);
    return {(w.rows + lanes - 1) / lanes, (w.cols + panel - 1) / panel, panel, depth_of(w.dtype)};
}

inline std::size_t whole_lines(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

// The bytes of the first part of the index.
inline std::size_t list_bytes(const LookupShape& s) {
    return whole_lines(static_cast<std::size_t>(s.slices * (s.panels + 1)) * sizeof(PanelSteps));
}

// One slice: its panels, the columns and the values of its first step.
struct LookupSlice {
    const PanelSteps* panels;
    const std::uint8_t* columns;
    const unsigned char* values;
};
inline LookupSlice slice_of(const rarefy_weight& w, const LookupShape& s, std::int64_t slice) {
    const auto* const index = static_cast<const std::uint8_t*>(w.index);
    const std::int64_t first = w.starts[slice];
    return {reinterpret_cast<const PanelSteps*>(index) + slice * (s.panels + 1),
            index + list_bytes(s) + first * lanes * s.depth, static_cast<const unsigned char*>(w.values) + first * 64};
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
