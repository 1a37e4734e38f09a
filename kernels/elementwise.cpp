// The steps of a plan that have no weight: sixteen entries at a time, along whichever direction y has in a row.

#include "families.h"
#include "output.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

struct Slots {
    const rarefy_step& step;
    const rarefy_slot* x;
    const rarefy_slot* other;  // or null
    const rarefy_slot* y;
};

// n <= 16 entries from (token, feature) on, tokens or features apart.
void some(const Slots& s, std::int64_t token, std::int64_t feature, std::int64_t n, bool tokens) {
    const auto stride = [tokens](const rarefy_slot& slot) { return tokens ? slot.token : slot.feature; };
    F32 v = read_slot(*s.x, token, feature, stride(*s.x), n);
    const F32 other = s.other != nullptr ? read_slot(*s.other, token, feature, stride(*s.other), n) : F32{};
    if (s.step.operation == RAREFY_ADD) v += other;
    v = activate(v, s.step.activation);
    if (s.step.operation == RAREFY_MUL) v *= other;
    write_slot(*s.y, token, feature, stride(*s.y), n, v);
}

}  // namespace

void elementwise(const rarefy_step& step, const rarefy_slot* x, const rarefy_slot* other, const rarefy_slot* y,
                 std::int64_t tokens, int thread, int threads) {
    const Slots slots = {step, x, other, y};
    const std::int64_t blocks = (y->features + lanes - 1) / lanes;
    const std::int64_t first = blocks * thread / threads * lanes, end = blocks * (thread + 1) / threads * lanes;
    const std::int64_t last = end < y->features ? end : y->features;
    if (y->token == 1 && y->feature != 1) {
        for (std::int64_t f = first; f < last; ++f)
            for (std::int64_t t = 0; t < tokens; t += lanes)
                some(slots, t, f, tokens - t < lanes ? tokens - t : lanes, true);
    } else {
        for (std::int64_t t = 0; t < tokens; ++t)
            for (std::int64_t f = first; f < last; f += lanes)
                some(slots, t, f, last - f < lanes ? last - f : lanes, false);
    }
}

}  // namespace rarefy::RAREFY_NAMESPACE
