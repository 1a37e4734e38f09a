// The look-up form: sixteen rows are lanes, and an activation is fetched by a permutation of registers.
//
// Rows are cut into slices of 16, columns into panels that two registers hold (int8: one register, so that a panel is a
// group that shares a scale). In a panel each row of a slice has a list of its values and their columns there, filled up
// with zeros to the longest list of the sixteen, and to a multiple of `depth`, the products that one instruction sums. A
// step is `depth` entries of each row.
//
//   values   of all slices, panels, steps in this order: 64 bytes a step, [16 rows][depth] values
//   index    counts: [slices][panels] uint8, the steps; filled up to a multiple of 64 bytes;
//            then, step after step, [16 rows][depth] uint8 columns in the panel
//   starts   [slices + 1] uint32: the steps before each slice
//   scales   int8: a copy of the source's
//
// all parts in one piece of memory, each beginning at a multiple of 64 bytes.
#ifndef RAREFY_LOOKUP_H
#define RAREFY_LOOKUP_H

#include "few.h"

namespace rarefy::RAREFY_NAMESPACE {

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

// The parts of the memory, in bytes from its beginning.
struct LookupParts {
    std::size_t values, index, steps, starts, scales, end;
};
inline LookupParts lookup_parts(const rarefy_weight& w, std::size_t steps) {
    const LookupShape s = lookup_shape(w);
    LookupParts p;
    p.values = 0;
    p.index = steps * 64;
    p.steps = p.index + whole_lines(static_cast<std::size_t>(s.slices * s.panels));
    p.starts = p.steps + whole_lines(steps * static_cast<std::size_t>(lanes * s.depth));
    p.scales = p.starts + whole_lines(static_cast<std::size_t>(s.slices + 1) * 4);
    p.end = p.scales + (w.scales != nullptr ? whole_lines(static_cast<std::size_t>(w.rows) * 4) : 0);
    return p;
}

// The kept columns of one row of a BITMAP or an INDEX16 weight with block 1, ascending.
class RowColumns {
  public:
    RowColumns(const rarefy_weight& w, std::int64_t row)
        : left_(w.starts[row + 1] - w.starts[row]), bits_(0), base_(-group), columns_(nullptr), words_(nullptr) {
        if (w.form == RAREFY_BITMAP)
            words_ = static_cast<const std::uint64_t*>(w.index) + row * groups_of(w.cols);
        else
            columns_ = static_cast<const std::uint16_t*>(w.index) + w.starts[row];
    }
    bool next(std::int64_t* column) {
        if (left_ == 0) return false;
        --left_;
        if (columns_ != nullptr) {
            *column = *columns_++;
            return true;
        }
        for (; bits_ == 0; base_ += group) bits_ = *words_++;
        *column = base_ + __builtin_ctzll(bits_);
        bits_ &= bits_ - 1;
        return true;
    }

  private:
    std::uint32_t left_;
    std::uint64_t bits_;
    std::int64_t base_;
    const std::uint16_t* columns_;
    const std::uint64_t* words_;
};

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
