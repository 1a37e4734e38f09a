// From sums to entries of y: scale of the row, bias, activation, what is added, and the store in any layout.
#ifndef RAREFY_OUTPUT_H
#define RAREFY_OUTPUT_H

#include "epilogue.h"
#include "isa.h"
#include "quantize.h"

namespace rarefy::RAREFY_NAMESPACE {

template <typename T>
inline F32 read_lanes(const T* p, std::int64_t step, std::int64_t n) {
    if (step == 1) return load_at_most(p, n);
    T part[lanes] = {};
    for (std::int64_t i = 0; i < n; ++i) part[i] = p[i * step];
    return load(part);
}

template <typename T>
inline void write_lanes(T* p, std::int64_t step, std::int64_t n, F32 v) {
    if (step == 1) {
        store_at_most(p, v, n);
    } else {
        T part[lanes];
        store(part, v);
        for (std::int64_t i = 0; i < n; ++i) p[i * step] = part[i];
    }
}

// n <= 16 entries of a slot from (token, feature) on, one step of features or of tokens apart.
inline F32 read_slot(const rarefy_slot& slot, std::int64_t token, std::int64_t feature, std::int64_t step,
                     std::int64_t n) {
    const std::int64_t at = token * slot.token + feature * slot.feature;
    return slot.dtype == RAREFY_BF16 ? read_lanes(static_cast<const bf16*>(slot.data) + at, step, n)
                                     : read_lanes(static_cast<const float*>(slot.data) + at, step, n);
}

inline void write_slot(const rarefy_slot& slot, std::int64_t token, std::int64_t feature, std::int64_t step,
                       std::int64_t n, F32 v) {
    const std::int64_t at = token * slot.token + feature * slot.feature;
    if (slot.dtype == RAREFY_BF16)
        write_lanes(static_cast<bf16*>(slot.data) + at, step, n, v);
    else
        write_lanes(static_cast<float*>(slot.data) + at, step, n, v);
}

// The sums of n <= 16 rows for one token.
inline void finish_rows(const Job& job, std::int64_t token, std::int64_t row, std::int64_t n, F32 v) {
    if (job.weight->scales != nullptr) v *= load_at_most(job.weight->scales + row, n);
    if (job.bias != nullptr) v += load_at_most(job.bias + row, n);
    v = activate(v, job.activation);
    if (job.other != nullptr) v += read_slot(*job.other, token, row, job.other->feature, n);
    write_slot(*job.y, token, row, job.y->feature, n, v);
}

// The sums of one row for n <= 16 tokens.
inline void finish_tokens(const Job& job, std::int64_t token, std::int64_t row, std::int64_t n, F32 v) {
    if (job.weight->scales != nullptr) v *= job.weight->scales[row];
    if (job.bias != nullptr) v += job.bias[row];
    v = activate(v, job.activation);
    if (job.other != nullptr) v += read_slot(*job.other, token, row, job.other->token, n);
    write_slot(*job.y, token, row, job.y->token, n, v);
}

// Lane i of the result is the sum of the lanes of rows[i]; rows are left changed.
RAREFY_INLINE F32 sum_each(F32 (&rows)[lanes]) {
#if RAREFY_V4
    const U32 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const U32 high = low + 8;
    for (int half = lanes / 2; half > 0; half /= 2)
        for (int i = 0; i < half; ++i)
            rows[i] = __builtin_shuffle(rows[i], rows[i + half], low) + __builtin_shuffle(rows[i], rows[i + half], high);
    return rows[0];
#else
    F32 sums{};
    for (int i = 0; i < lanes; ++i) sums[i] = sum(rows[i]);
    return sums;
#endif
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
