// Whether memory holds a sound look-up form (lookup.h): whatever was read is checked before a kernel trusts it.

#include "families.h"
#include "lookup.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

// The list of one slice: panels that exist, each once, most steps first, as many steps as stand there, zeros behind.
bool sound_list(const LookupShape& s, const PanelSteps* list, std::uint32_t steps) {
    const int most = s.panel / s.depth;
    std::uint64_t seen[most_panels / 64] = {};
    std::uint32_t sum = 0;
    int before = most;
    for (std::int64_t i = 0; i <= s.panels; ++i) {
        const PanelSteps p = list[i];
        if (p.steps == 0 ? p.panel != 0 : p.panel >= s.panels || i == s.panels) return false;
        if (p.zero != 0 || p.steps > before) return false;
        before = p.steps;
        if (p.steps == 0) continue;
        const std::uint64_t bit = std::uint64_t{1} << (p.panel % 64);
        if (seen[p.panel / 64] & bit) return false;
        seen[p.panel / 64] |= bit;
        sum += p.steps;
    }
    return sum == steps;
}

// The entries of one row in one panel, ascending, then what fills up: how many, or -1.
template <typename T>
std::int64_t sound_row(const LookupShape& s, const std::uint8_t* columns, const T* values, int steps, std::int64_t row,
                       std::int64_t width) {
    std::int64_t last = -1, n = 0;
    bool ended = false;
    for (int step = 0; step < steps; ++step)
        for (int d = 0; d < s.depth; ++d) {
            const std::int64_t at = (step * lanes + row) * s.depth + d;
            if (columns[at] == filled) {
                ended = true;
                if (values[at] != 0) return -1;
                continue;
            }
            if (ended || columns[at] <= last || columns[at] >= width) return -1;
            if (sizeof(T) == 1 && values[at] == 0x80) return -1;  // -128 is no value
            last = columns[at];
            ++n;
        }
    return n;
}

template <typename T>
std::int64_t sound_entries(const rarefy_weight& w, const LookupShape& s) {
    std::int64_t units = 0;
    for (std::int64_t at = 0; at < s.slices; ++at) {
        const LookupSlice slice = slice_of(w, s, at);
        const std::uint8_t* columns = slice.columns;
        const T* values = reinterpret_cast<const T*>(slice.values);
        for (const PanelSteps* p = slice.panels; p->steps != 0; ++p) {
            const std::int64_t left = w.cols - p->panel * s.panel, width = left < s.panel ? left : s.panel;
            for (std::int64_t row = 0; row < lanes; ++row) {
                const std::int64_t n = sound_row(s, columns, values, p->steps, row, width);
                if (n < 0 || (n > 0 && at * lanes + row >= w.rows)) return -1;
                units += n;
            }
            columns += p->steps * lanes * s.depth;
            values += p->steps * lanes * s.depth;
        }
    }
    return units;
}

bool sound_lists(const rarefy_weight& w, const LookupShape& s, std::uint64_t steps) {
    if (w.starts[0] != 0 || w.starts[s.slices] != steps) return false;
    for (std::int64_t at = 0; at < s.slices; ++at)
        if (w.starts[at + 1] < w.starts[at]) return false;
    const auto* const lists = static_cast<const PanelSteps*>(w.index);
    for (std::int64_t at = 0; at < s.slices; ++at)
        if (!sound_list(s, lists + at * (s.panels + 1), w.starts[at + 1] - w.starts[at])) return false;
    return true;
}

bool finite_scales(const rarefy_weight& w) {
    if ((w.dtype == RAREFY_I8) != (w.scales != nullptr)) return false;
    for (std::int64_t row = 0; w.scales != nullptr && row < w.rows; ++row)
        if (!__builtin_isfinite(w.scales[row])) return false;
    return true;
}

}  // namespace

int check_lut(const rarefy_weight* weight, std::int64_t steps) {
    const rarefy_weight& w = *weight;
    if (w.form != RAREFY_LUT || w.dtype < 0 || w.dtype >= dtypes || w.rows <= 0 || w.cols <= 0) return 1;
    const LookupShape s = lookup_shape(w);
    if (s.panels > most_panels || steps < 0 || !sound_lists(w, s, static_cast<std::uint64_t>(steps))) return 1;
    if (!finite_scales(w)) return 1;
    const std::int64_t units = w.dtype == RAREFY_F32    ? sound_entries<std::uint32_t>(w, s)
                               : w.dtype == RAREFY_BF16 ? sound_entries<std::uint16_t>(w, s)
                                                        : sound_entries<std::uint8_t>(w, s);
    return units == w.units ? 0 : 1;
}

}  // namespace rarefy::RAREFY_NAMESPACE
