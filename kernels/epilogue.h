// What happens to a sum before it is stored: the activation.
//
// Within about 4e-7 of the exact value, relatively, far into the tails too: where gelu and silu fade out, the small
// factor is computed itself and not as one minus its complement. Where float64 gives a NaN or an infinity, so do these.
#ifndef RAREFY_EPILOGUE_H
#define RAREFY_EPILOGUE_H

#include "rarefy.h"
#include "simd.h"

namespace rarefy::RAREFY_NAMESPACE {

// e^(x + low), where low is much smaller than x: 0 below -104, infinity above 89.
RAREFY_INLINE F32 exponential(F32 x, F32 low) {
    const F32 least = broadcast(-104.0f), most = broadcast(104.0f);
    const F32 shift = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
    x = x < least ? least : x > most ? most : x;
    const F32 shifted = fma(x, broadcast(1.44269504f), shift);
    const F32 n = shifted - shift;
    // ln 2 in two parts, the first exact times n
    F32 r = fma(n, broadcast(-0.693359375f), x);
    r = fma(n, broadcast(2.12194440e-4f), r) + low;
    F32 g = broadcast(1.37511503e-3f);  // e^r = 1 + r + r^2 g(r), least squares on |r| <= ln 2 / 2
    g = fma(g, r, broadcast(8.36898723e-3f));
    g = fma(g, r, broadcast(4.16695443e-2f));
    g = fma(g, r, broadcast(1.66665179e-1f));
    g = fma(g, r, broadcast(4.99999885e-1f));
    const F32 e = fma(g * r, r, r) + 1.0f;
    // 2^n in two factors, since n may lie outside a float's exponents
    const I32 whole = reinterpret_cast<I32>(shifted) - 0x4b400000, half = whole >> 1;
    const F32 first = reinterpret_cast<F32>((half + 127) << 23), second = reinterpret_cast<F32>((whole - half + 127) << 23);
    return e * first * second;
}

// The normal distribution's upper tail at a >= 0: e^(-a^2/2) times a polynomial in (a - 5) / (a + 5), fitted to
// erfcx(a / sqrt 2) / 2 up to a = 16.
RAREFY_INLINE F32 upper_tail(F32 a) {
    const F32 most = broadcast(16.0f);
    a = a > most ? most : a;
    const F32 t = (a - 5.0f) / (a + 5.0f);
    const float coefficients[] = {7.69193023e-2f,  -1.43457547e-1f, 1.16068847e-1f, -8.08841139e-2f,
                                  4.78547849e-2f,  -2.34112367e-2f, 8.99560843e-3f, -2.38985801e-3f,
                                  2.03556614e-4f,  1.49864500e-4f,  -3.49934198e-5f};
    F32 p = broadcast(coefficients[10]);
    for (int i = 9; i >= 0; --i) p = fma(p, t, broadcast(coefficients[i]));
    // a^2 in two parts, the first exact
    const F32 head = reinterpret_cast<F32>(reinterpret_cast<U32>(a) & 0xfffff000u);
    return p * exponential(head * head * -0.5f, (a - head) * (a + head) * -0.5f);
}

RAREFY_INLINE F32 activate(F32 x, int activation) {
    const F32 zero{};
    switch (activation) {
        case RAREFY_RELU: return x < zero ? zero : x;  // a NaN stays
        case RAREFY_GELU: {
            const F32 tail = upper_tail(x < zero ? -x : x);
            return x * (x < zero ? tail : 1.0f - tail);
        }
        case RAREFY_GELU_TANH: {  // (1 + tanh u) / 2 = 1 / (1 + e^(-2u))
            const F32 u = x * fma(x * x, broadcast(-0.0713548162726f), broadcast(-1.59576912161f));
            return x / (exponential(u, zero) + 1.0f);
        }
        case RAREFY_SILU: return x / (exponential(-x, zero) + 1.0f);
        default: return x;
    }
}

RAREFY_INLINE float activate(float x, int activation) {
    if (activation == RAREFY_NONE) return x;
    return activate(broadcast(x), activation)[0];
}

}  // namespace rarefy::RAREFY_NAMESPACE

#endif
