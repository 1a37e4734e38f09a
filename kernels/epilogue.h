// What happens to a sum before it is stored: the activation.
#ifndef RAREFY_EPILOGUE_H
#define RAREFY_EPILOGUE_H

#include <cmath>

#include "rarefy.h"
#include "simd.h"

namespace rarefy::RAREFY_NAMESPACE {

RAREFY_INLINE float activate(float x, int activation) {
    switch (activation) {
        case RAREFY_RELU: return x < 0.0f ? 0.0f : x;  // a NaN stays
        case RAREFY_GELU: return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
        case RAREFY_GELU_TANH: return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
        case RAREFY_SILU: return x / (1.0f + expf(-x));
        default: return x;
    }
}

RAREFY_INLINE F32 activate(F32 v, int activation) {
    if (activation == RAREFY_NONE) return v;
    for (int i = 0; i < lanes; ++i) v[i] = activate(v[i], activation);
    return v;
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
