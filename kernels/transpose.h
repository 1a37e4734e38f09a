// Sixteen by sixteen entries of 32 bits, turned.
#ifndef RAREFY_TRANSPOSE_H
#define RAREFY_TRANSPOSE_H

#include "simd.h"

namespace rarefy::RAREFY_NAMESPACE {

// rows[i][j] becomes rows[j][i].
RAREFY_INLINE void transpose(U32 (&rows)[lanes]) {
#if RAREFY_V4
    // Four rounds of merging row i with row i + 8, entry by entry.
    const U32 low = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23};
    const U32 high = low + 8;
    U32 merged[lanes];
    for (int i = 0; i < lanes / 2; ++i) {
        merged[2 * i] = __builtin_shuffle(rows[i], rows[i + 8], low);
        merged[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + 8], high);
    }
    for (int i = 0; i < lanes / 2; ++i) {
        rows[2 * i] = __builtin_shuffle(merged[i], merged[i + 8], low);
        rows[2 * i + 1] = __builtin_shuffle(merged[i], merged[i + 8], high);
    }
    for (int i = 0; i < lanes / 2; ++i) {
        merged[2 * i] = __builtin_shuffle(rows[i], rows[i + 8], low);
        merged[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + 8], high);
    }
    for (int i = 0; i < lanes / 2; ++i) {
        rows[2 * i] = __builtin_shuffle(merged[i], merged[i + 8], low);
        rows[2 * i + 1] = __builtin_shuffle(merged[i], merged[i + 8], high);
    }
#else
    std::uint32_t from[lanes][lanes], to[lanes][lanes];
    std::memcpy(from, rows, sizeof from);
    for (int i = 0; i < lanes; ++i)
        for (int j = 0; j < lanes; ++j) to[j][i] = from[i][j];
    std::memcpy(rows, to, sizeof to);
#endif
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
