/* What the library offers, as plain C: pointers and sizes, nothing of torch or Python.
 *
 * To add a kernel: a source file of its own, compiled once per instruction set (its name in CMakeLists.txt), its entry
 * in `Kernels` (isa.h) and, for an algorithm of a stored form, an id here and a line in run.cpp. Whatever changes what
 * is here raises RAREFY_ABI_VERSION, and ABI_VERSION in src/rarefy/core/native.py with it.
 *
 * Functions return 0, or another number with the outputs in an unspecified state: RAREFY_UNSUPPORTED where nothing was
 * done because no kernel applies, RAREFY_NO_MEMORY where the call's scratch could not be had.
 */
#ifndef RAREFY_H
#define RAREFY_H

#include <stddef.h>
#include <stdint.h>

#define RAREFY_ABI_VERSION 3

#if defined(_WIN32)
#define RAREFY_API __declspec(dllexport)
#else
#define RAREFY_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum { RAREFY_OK = 0, RAREFY_UNSUPPORTED = 1, RAREFY_NO_MEMORY = 2 };

RAREFY_API int rarefy_abi_version(void);

/* The instruction set in use, chosen when the library was loaded: "baseline", "v3" or "v4". The best that the
 * processor has, or the one that the environment variable RAREFY_ISA names if the processor has it. */
RAREFY_API const char* rarefy_isa(void);

/* Holding zeros: entry i of x, `width` bytes wide, stays where mask[i] is -1 and becomes all zero bits where it is 0.
 * Neither needs to be aligned; they must not overlap. Returns 0, or 1 with x untouched if width is not 1, 2, 4 or 8. */
RAREFY_API int rarefy_clear(void* x, const int8_t* mask, size_t n, int width);

/* ------------------------------------------------------------------------------------------------ weights in a form */

enum { RAREFY_F32 = 0, RAREFY_BF16 = 1, RAREFY_I8 = 2, RAREFY_I4 = 3 /* reserved: no kernel yet */ };

/* How the kept entries of a weight [rows, cols] are stored. A unit is `block` consecutive rows of one column; the rows
 * are cut into ceil(rows / block) block rows, the last one filled up with zeros. Units stand block row after block row,
 * columns ascending; values are [units][block].
 *   DENSE    values [rows][cols], block = 1, no index.
 *   BITMAP   block = 1. index: one bit per entry, uint64 words, ceil(cols / 64) words per row, lowest bit first, bits
 *            past the last column 0.
 *   INDEX16  block in {1, 4, 8, 16}, cols <= 65536. index: uint16 column of each unit.
 *   LUT      in-register look-up; its layout is known to lookup.h alone. Kept zeros are kept. */
enum { RAREFY_DENSE = 0, RAREFY_BITMAP = 1, RAREFY_INDEX16 = 2, RAREFY_LUT = 3, RAREFY_FORMS = 4 };

typedef struct {
    int32_t form, dtype, block, reserved;
    int64_t rows, cols, units;
    const void* index;
    const void* values;
    const uint32_t* starts; /* [block rows + 1]: units before each block row; not for DENSE and LUT */
    const float* scales;    /* int8: [rows], the weight is scale * value; else NULL */
} rarefy_weight;

/* Algorithms for y = x W^T. Which forms have which: run.cpp. FEW is for 1 to 7 tokens (right for any number), MANY for
 * 8 and more, EXPAND makes dense tiles of a sparse form and multiplies those. */
enum { RAREFY_FEW = 0, RAREFY_MANY = 1, RAREFY_EXPAND = 2, RAREFY_ALGORITHMS = 3 };

enum { RAREFY_NONE = 0, RAREFY_RELU = 1, RAREFY_GELU = 2 /* erf */, RAREFY_GELU_TANH = 3, RAREFY_SILU = 4 };

/* ------------------------------------------------------------------------------------------------ a plan, one call */

/* Activations of one plan: entry (t, f) of a slot is data[t * token + f * feature], in entries of `dtype` (F32 or
 * BF16). Of the two strides one is 1, except where a slot has one token or one feature. data = NULL: made by the call
 * (a value between two steps). Slots do not overlap. */
typedef struct {
    void* data;
    int64_t token, feature;
    int64_t features;
    int32_t dtype, reserved;
} rarefy_slot;

/* What a step does with slots x, other and y (indices; other = -1 for none):
 *   LINEAR  y = activation(x W^T + bias) + other        ADD  y = activation(x + other)
 *   APPLY   y = activation(x)                           MUL  y = activation(x) * other
 * W is weights[b], run by algorithm[b], b = the bucket of the tokens: 1, 2-7, 8-31, 32-127, 128 and more. */
enum { RAREFY_LINEAR = 0, RAREFY_ADD = 1, RAREFY_MUL = 2, RAREFY_APPLY = 3 };
enum { RAREFY_BUCKETS = 5 };

typedef struct {
    int32_t operation, activation;
    int32_t x, other, y, reserved;
    const float* bias; /* [rows] or NULL */
    const rarefy_weight* weights[RAREFY_BUCKETS];
    int32_t algorithm[RAREFY_BUCKETS];
    int32_t reserved2;
} rarefy_step;

/* All steps, one after the other, for `tokens` tokens, on at most `threads` threads. Bit-identical for any number of
 * threads; safe to call from several threads at once and after a fork. int8 weights: x is quantised per token and group
 * of 64 columns, symmetric, scale = max|x| / 127, round half to even; a token with a NaN or an infinity gives NaN. */
RAREFY_API int rarefy_run(const rarefy_step* steps, int32_t n_steps, const rarefy_slot* slots, int32_t n_slots,
                          int64_t tokens, int32_t threads);

/* Whether a kernel exists for this form, dtype and algorithm in the instruction set in use (1 or 0). */
RAREFY_API int rarefy_runs(int32_t form, int32_t dtype, int32_t algorithm);

/* The LUT form of a BITMAP or INDEX16 (block 1) weight: bytes needed (0: no such form for it), and building it into
 * `bytes` (64-byte aligned), which `lut` then points to. */
RAREFY_API size_t rarefy_lut_bytes(const rarefy_weight* weight);
RAREFY_API int rarefy_lut_build(const rarefy_weight* weight, void* bytes, rarefy_weight* lut);

/* The BITMAP form of a LUT weight, exactly what one was built from or would be: starts [rows + 1], words
 * [rows][ceil(cols / 64)] (8-byte aligned), values [lut->units]. `bitmap` then points to them; its scales are those of
 * `lut`. Nothing is checked: `lut` must be as rarefy_lut_build made it. */
RAREFY_API int rarefy_lut_decode(const rarefy_weight* lut, uint32_t* starts, uint64_t* words, void* values,
                                 rarefy_weight* bitmap);

/* 0 if a LUT weight that was read from somewhere, of `steps` steps, is one that rarefy_lut_build makes, so that the
 * other functions stay within it; its pointers lead to memory of the sizes that lookup.h says. */
RAREFY_API int rarefy_lut_check(const rarefy_weight* lut, int64_t steps);

/* ------------------------------------------------------------------------------------------------------ convolutions */

/* y[n] = activation(conv2d(x[n], W) + bias) + other[n], images [n][channels][height][width], contiguous, F32 or BF16.
 * W is a weight of `groups` = 1 with cols = in_channels * kernel_h * kernel_w in torch's order (c, i, j), in form BITMAP
 * or INDEX16. Zero padding, dilation 1. */
typedef struct {
    const rarefy_weight* weight;
    const float* bias;
    int32_t activation, dtype; /* dtype of x, other and y */
    int32_t in_channels, height, width;
    int32_t kernel_h, kernel_w, stride_h, stride_w, pad_h, pad_w;
} rarefy_conv2d;

RAREFY_API int rarefy_conv(const rarefy_conv2d* conv, const void* x, const void* other, void* y, int64_t images,
                           int32_t threads);

/* ----------------------------------------------------------------------------- training on the non-zeros alone, F32 */

/* A structure is (columns, starts) as in INDEX16 with block 1. x, y, dy are strided as a slot is.
 *   forward          y[t, r] = bias[r] + sum over units i of row r of values[i] * x[t, columns[i]]
 *   weight_gradient  gradient[i] = sum over t of dy[t, row of i] * x[t, columns[i]]
 *   gather           out[i] = values[order[i]] */
RAREFY_API int rarefy_train_forward(const float* values, const uint16_t* columns, const uint32_t* starts, int64_t rows,
                                    int64_t cols, const float* x, int64_t x_token, int64_t x_feature, float* y,
                                    int64_t y_token, int64_t y_feature, const float* bias, int64_t tokens,
                                    int32_t threads);
RAREFY_API int rarefy_train_weight_gradient(const uint16_t* columns, const uint32_t* starts, int64_t rows, int64_t cols,
                                            const float* x, int64_t x_token, int64_t x_feature, const float* dy,
                                            int64_t dy_token, int64_t dy_feature, float* gradient, int64_t tokens,
                                            int32_t threads);
RAREFY_API int rarefy_train_gather(const float* values, const uint32_t* order, float* out, int64_t n, int32_t threads);

#ifdef __cplusplus
}
#endif

#endif
