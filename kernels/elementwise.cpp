// The steps of a plan that have no weight.

#include "epilogue.h"
#include "families.h"

namespace rarefy::RAREFY_NAMESPACE {
namespace {

float read(const rarefy_slot& slot, std::int64_t token, std::int64_t feature) {
    const std::int64_t at = token * slot.token + feature * slot.feature;
    return slot.dtype == RAREFY_BF16 ? to_float(static_cast<const bf16*>(slot.data)[at])
                                     : static_cast<const float*>(slot.data)[at];
}

void write(const rarefy_slot& slot, std::int64_t token, std::int64_t feature, float value) {
    const std::int64_t at = token * slot.token + feature * slot.feature;
    if (slot.dtype == RAREFY_BF16)
        static_cast<bf16*>(slot.data)[at] = to_bf16(value);
    else
        static_cast<float*>(slot.data)[at] = value;
}

}  // namespace

void elementwise(const rarefy_step& step, const rarefy_slot* x, const rarefy_slot* other, const rarefy_slot* y,
                 std::int64_t tokens, int thread, int threads) {
    const std::int64_t first = y->features * thread / threads, last = y->features * (thread + 1) / threads;
    for (std::int64_t t = 0; t < tokens; ++t) {
        for (std::int64_t f = first; f < last; ++f) {
            float value = read(*x, t, f);
            if (step.operation == RAREFY_ADD) value += read(*other, t, f);
            value = activate(value, step.activation);
            if (step.operation == RAREFY_MUL) value *= read(*other, t, f);
            write(*y, t, f, value);
        }
    }
}

}  // namespace rarefy::RAREFY_NAMESPACE
