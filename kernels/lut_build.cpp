// The look-up form (lookup.h) from a form with one value per unit, and back to a bitmap.

#include "families.h"
#include "lookup.h"
#include "quantize.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

// The parts of the memory, in bytes from its beginning.
struct Parts {
    std::size_t values, index, columns, starts, scales, end;
};
Parts parts_of(const rarefy_weight& w, const LookupShape& s, std::size_t steps) {
    Parts p;
    p.values = 0;
    p.index = steps * 64;
    p.columns = p.index + list_bytes(s);
    p.starts = p.columns + whole_lines(steps * static_cast<std::size_t>(lanes * s.depth));
    p.scales = p.starts + whole_lines(static_cast<std::size_t>(s.slices + 1) * 4);
    p.end = p.scales + (w.scales != nullptr ? whole_lines(static_cast<std::size_t>(w.rows) * 4) : 0);
    return p;
}

bool has_lookup(const rarefy_weight& w) {
    const bool form = w.form == RAREFY_BITMAP || (w.form == RAREFY_INDEX16 && w.block == 1);
    return form && w.dtype >= 0 && w.dtype < dtypes && w.rows > 0 && w.cols > 0 && lookup_shape(w).panels <= most_panels;
}

const std::uint64_t* words_of(const rarefy_weight& w, std::int64_t row) {
    return static_cast<const std::uint64_t*>(w.index) + row * groups_of(w.cols);
}

std::int64_t row_after(const rarefy_weight& w, std::int64_t slice) {
    return slice * lanes + lanes < w.rows ? slice * lanes + lanes : w.rows;
}

// How many entries a row keeps in each panel.
void count_row(const rarefy_weight& w, const LookupShape& s, std::int64_t row, std::uint8_t* kept) {
    if (w.form == RAREFY_BITMAP) {
        const std::uint64_t* const words = words_of(w, row);
        for (std::int64_t p = 0; p < s.panels; ++p) {
            const std::uint64_t word = words[p * s.panel / group];
            const std::uint64_t half = p % 2 == 0 ? word << 32 : word >> 32 << 32;
            kept[p] = static_cast<std::uint8_t>(__builtin_popcountll(s.panel == group ? word : half));
        }
        return;
    }
    std::memset(kept, 0, static_cast<std::size_t>(s.panels));
    const auto* const columns = static_cast<const std::uint16_t*>(w.index);
    for (std::uint32_t i = w.starts[row]; i < w.starts[row + 1]; ++i) ++kept[columns[i] / s.panel];
}

// The steps of the panels of one slice, counts[panels], and their sum. A panel has at most 32.
std::size_t count_steps(const rarefy_weight& w, const LookupShape& s, std::int64_t slice, std::uint8_t* counts) {
    std::uint8_t kept[most_panels];
    std::memset(counts, 0, static_cast<std::size_t>(s.panels));
    for (std::int64_t row = slice * lanes; row < row_after(w, slice); ++row) {
        count_row(w, s, row, kept);
        for (std::int64_t p = 0; p < s.panels; ++p) counts[p] = kept[p] > counts[p] ? kept[p] : counts[p];
    }
    std::size_t total = 0;
    for (std::int64_t p = 0; p < s.panels; ++p) {
        counts[p] = static_cast<std::uint8_t>((counts[p] + s.depth - 1) / s.depth);
        total += counts[p];
    }
    return total;
}

std::size_t all_steps(const rarefy_weight& w) {
    const LookupShape s = lookup_shape(w);
    std::uint8_t counts[most_panels];
    std::size_t steps = 0;
    for (std::int64_t slice = 0; slice < s.slices; ++slice) steps += count_steps(w, s, slice, counts);
    return steps;
}

std::size_t bytes(const rarefy_weight* weight) {
    if (!has_lookup(*weight)) return 0;
    const std::size_t steps = all_steps(*weight);
    return steps > UINT32_MAX ? 0 : parts_of(*weight, lookup_shape(*weight), steps).end;
}

// The panels with steps, most steps first; before[panels]: the steps of the slice that stand before each panel's.
void sort_panels(const LookupShape& s, const std::uint8_t* counts, PanelSteps* to, std::uint32_t* before) {
    std::uint32_t steps = 0;
    for (int n = 32; n > 0; --n)
        for (std::int64_t p = 0; p < s.panels; ++p) {
            if (counts[p] != n) continue;
            *to++ = {static_cast<std::uint16_t>(p), counts[p], 0};
            before[p] = steps;
            steps += counts[p];
        }
}

// Where entry `i` of a row in a panel stands among the entries of its slice.
std::size_t place(const LookupShape& s, std::uint32_t before, std::int64_t row, std::uint32_t i) {
    const auto depth = static_cast<std::uint32_t>(s.depth);
    const std::size_t step = std::size_t{before} + i / depth;
    return (step * lanes + static_cast<std::size_t>(row % lanes)) * depth + i % depth;
}

// The values and columns of one row, given those of its slice.
template <typename T>
void fill_row(const rarefy_weight& w, const LookupShape& s, std::int64_t row, const std::uint32_t* before, T* values,
              std::uint8_t* columns) {
    const T* value = static_cast<const T*>(w.values) + w.starts[row];
    std::int64_t panel = -1;
    std::uint32_t here = 0;
    const auto put = [&](std::int64_t column) {
        if (column / s.panel != panel) {
            panel = column / s.panel;
            here = 0;
        }
        const std::size_t at = place(s, before[panel], row, here++);
        values[at] = *value++;
        columns[at] = static_cast<std::uint8_t>(column % s.panel);
    };
    if (w.form == RAREFY_BITMAP) {
        const std::uint64_t* const words = words_of(w, row);
        for (std::int64_t g = 0; g < groups_of(w.cols); ++g)
            for (std::uint64_t bits = words[g]; bits != 0; bits &= bits - 1) put(g * group + __builtin_ctzll(bits));
    } else {
        const auto* const from = static_cast<const std::uint16_t*>(w.index);
        for (std::uint32_t i = w.starts[row]; i < w.starts[row + 1]; ++i) put(from[i]);
    }
}

template <typename T>
void fill(const rarefy_weight& w, const LookupShape& s, const Parts& parts, unsigned char* to) {
    auto* const starts = reinterpret_cast<std::uint32_t*>(to + parts.starts);
    std::uint8_t counts[most_panels];
    std::uint32_t before[most_panels];
    for (std::int64_t slice = 0; slice < s.slices; ++slice) {
        const std::size_t first = starts[slice];
        starts[slice + 1] = starts[slice] + static_cast<std::uint32_t>(count_steps(w, s, slice, counts));
        sort_panels(s, counts, reinterpret_cast<PanelSteps*>(to + parts.index) + slice * (s.panels + 1), before);
        for (std::int64_t row = slice * lanes; row < row_after(w, slice); ++row)
            fill_row(w, s, row, before, reinterpret_cast<T*>(to + parts.values + first * 64),
                     to + parts.columns + first * static_cast<std::size_t>(lanes * s.depth));
    }
}

int build(const rarefy_weight* weight, void* memory, rarefy_weight* lut) {
    const rarefy_weight& w = *weight;
    if (!has_lookup(w)) return RAREFY_UNSUPPORTED;
    const std::size_t steps = all_steps(w);
    if (steps > UINT32_MAX) return RAREFY_UNSUPPORTED;
    const LookupShape s = lookup_shape(w);
    const Parts parts = parts_of(w, s, steps);
    unsigned char* const to = static_cast<unsigned char*>(memory);
    std::memset(to, 0, parts.columns);
    std::memset(to + parts.columns, filled, parts.starts - parts.columns);
    std::memset(to + parts.starts, 0, parts.end - parts.starts);
    if (w.dtype == RAREFY_F32)
        fill<std::uint32_t>(w, s, parts, to);
    else if (w.dtype == RAREFY_BF16)
        fill<std::uint16_t>(w, s, parts, to);
    else
        fill<std::uint8_t>(w, s, parts, to);
    if (w.scales != nullptr) std::memcpy(to + parts.scales, w.scales, static_cast<std::size_t>(w.rows) * 4);
    *lut = w;
    lut->form = RAREFY_LUT;
    lut->block = 1;
    lut->index = to + parts.index;
    lut->values = to + parts.values;
    lut->starts = reinterpret_cast<std::uint32_t*>(to + parts.starts);
    lut->scales = w.scales != nullptr ? reinterpret_cast<const float*>(to + parts.scales) : nullptr;
    return RAREFY_OK;
}

// ---------------------------------------------------------------------------------------------------------- decoding

// One row: its bits into words that are 0, its values from `to` on; how many they are.
template <typename T>
std::uint32_t read_row(const LookupSlice& slice, const LookupShape& s, std::int64_t row, const std::uint32_t* before,
                       const std::uint8_t* counts, std::uint64_t* words, T* to) {
    const T* const values = reinterpret_cast<const T*>(slice.values);
    std::uint32_t n = 0;
    for (std::int64_t p = 0; p < s.panels; ++p)
        for (std::uint32_t i = 0; i < std::uint32_t{counts[p]} * static_cast<std::uint32_t>(s.depth); ++i) {
            const std::size_t at = place(s, before[p], row, i);
            if (slice.columns[at] == filled) break;
            const std::int64_t column = p * s.panel + slice.columns[at];
            words[column / group] |= std::uint64_t{1} << (column % group);
            to[n++] = values[at];
        }
    return n;
}

template <typename T>
void read_all(const rarefy_weight& w, std::uint32_t* starts, std::uint64_t* words, T* values) {
    const LookupShape s = lookup_shape(w);
    const std::int64_t groups = groups_of(w.cols);
    std::memset(words, 0, static_cast<std::size_t>(w.rows * groups) * 8);
    starts[0] = 0;
    for (std::int64_t at = 0; at < s.slices; ++at) {
        const LookupSlice slice = slice_of(w, s, at);
        std::uint8_t counts[most_panels];
        std::uint32_t before[most_panels], steps = 0;
        std::memset(counts, 0, static_cast<std::size_t>(s.panels));
        for (const PanelSteps* p = slice.panels; p->steps != 0; ++p) {
            counts[p->panel] = p->steps;
            before[p->panel] = steps;
            steps += p->steps;
        }
        for (std::int64_t row = at * lanes; row < row_after(w, at); ++row)
            starts[row + 1] =
                starts[row] + read_row(slice, s, row, before, counts, words + row * groups, values + starts[row]);
    }
}

int decode(const rarefy_weight* lut, std::uint32_t* starts, std::uint64_t* words, void* values, rarefy_weight* bitmap) {
    if (lut->form != RAREFY_LUT || lut->dtype < 0 || lut->dtype >= dtypes) return RAREFY_UNSUPPORTED;
    if (lut->dtype == RAREFY_F32)
        read_all(*lut, starts, words, static_cast<std::uint32_t*>(values));
    else if (lut->dtype == RAREFY_BF16)
        read_all(*lut, starts, words, static_cast<std::uint16_t*>(values));
    else
        read_all(*lut, starts, words, static_cast<std::uint8_t*>(values));
    *bitmap = *lut;
    bitmap->form = RAREFY_BITMAP;
    bitmap->index = words;
    bitmap->values = values;
    bitmap->starts = starts;
    return RAREFY_OK;
}

}  // namespace

const Lut lut = {bytes, build, decode, check_lut};

}  // namespace rarefy::RAREFY_NAMESPACE
