/* What the library offers, as plain C: pointers and sizes, nothing of torch or Python.
 *
 * To add a kernel: a source file of its own, compiled once per instruction set (its name in CMakeLists.txt), a pointer
 * in `Kernels` (isa.h), a line here and one in dispatch.cpp. Whatever changes what is here raises RAREFY_ABI_VERSION,
 * and ABI_VERSION in src/rarefy/core/native.py with it.
 */
#ifndef RAREFY_H
#define RAREFY_H

#include <stddef.h>
#include <stdint.h>

#define RAREFY_ABI_VERSION 1

#if defined(_WIN32)
#define RAREFY_API __declspec(dllexport)
#else
#define RAREFY_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

RAREFY_API int rarefy_abi_version(void);

/* The instruction set in use, chosen when the library was loaded: "baseline", "v3" or "v4". The best that the
 * processor has, or the one that the environment variable RAREFY_ISA names if the processor has it. */
RAREFY_API const char* rarefy_isa(void);

/* Holding zeros: entry i of x, `width` bytes wide, stays where mask[i] is -1 and becomes all zero bits where it is 0.
 * Neither needs to be aligned; they must not overlap. Returns 0, or 1 with x untouched if width is not 1, 2, 4 or 8. */
RAREFY_API int rarefy_clear(void* x, const int8_t* mask, size_t n, int width);

#ifdef __cplusplus
}
#endif

#endif
