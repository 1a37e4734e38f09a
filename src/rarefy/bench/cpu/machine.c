/* What this processor can do at most, measured: `machine THREADS` prints one line per limit, "name value".
 *
 * Multiply-add peaks come from loops on registers alone (GFLOP/s and GOP/s, a multiply-add counts as two), the memory's
 * from reading a gigabyte over and over (GB/s). All threads work at once. Compiled by machine.py for the processor it
 * runs on; what an instruction set lacks is not printed. */
#include <immintrin.h>
#include <omp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { CHAINS = 12, STEPS = 2000000, ROUNDS = 11 };

static volatile float sink;

/* One loop over CHAINS independent accumulators; `operations` per vector instruction. */
#define PEAK(name, vector, zero, update, operations)                                                                  \
    static double name(void) {                                                                                        \
        double best = 1e30;                                                                                           \
        for (int round = 0; round < ROUNDS; ++round) {                                                                \
            double begin = omp_get_wtime();                                                                           \
            _Pragma("omp parallel") {                                                                                 \
                vector a[CHAINS];                                                                                     \
                memset(a, 0, sizeof a);                                                                               \
                vector x = zero, y = zero;                                                                            \
                __asm__ volatile("" : "+v"(x), "+v"(y)); /* unknown to the compiler, as the sums below */             \
                for (int c = 0; c < CHAINS; ++c) __asm__ volatile("" : "+v"(a[c]));                                   \
                for (int i = 0; i < STEPS; ++i) {                                                                     \
                    _Pragma("GCC unroll 12") for (int c = 0; c < CHAINS; ++c) a[c] = update;                          \
                }                                                                                                     \
                for (int c = 0; c < CHAINS; ++c) __asm__ volatile("" : "+v"(a[c]));                                   \
            }                                                                                                         \
            double seconds = omp_get_wtime() - begin;                                                                 \
            if (seconds < best) best = seconds;                                                                       \
        }                                                                                                             \
        return (double)CHAINS * STEPS * (operations) * omp_get_max_threads() / best * 1e-9;                           \
    }

#if defined(__AVX512F__)
PEAK(peak_fp32, __m512, _mm512_setzero_ps(), _mm512_fmadd_ps(x, y, a[c]), 32)
#elif defined(__AVX2__) && defined(__FMA__)
PEAK(peak_fp32, __m256, _mm256_setzero_ps(), _mm256_fmadd_ps(x, y, a[c]), 16)
#endif
#if defined(__AVX512BF16__)
PEAK(peak_bf16, __m512, _mm512_setzero_ps(), _mm512_dpbf16_ps(a[c], (__m512bh)x, (__m512bh)y), 64)
#endif
#if defined(__AVX512VNNI__)
PEAK(peak_int8, __m512i, _mm512_setzero_si512(), _mm512_dpbusd_epi32(a[c], x, y), 128)
#endif

static double bandwidth(size_t bytes) {
    float* data = aligned_alloc(64, bytes);
    if (!data) return 0;
    size_t n = bytes / sizeof(float);
#pragma omp parallel for schedule(static)
    for (size_t i = 0; i < n; ++i) data[i] = 1;
    double best = 1e30;
    for (int round = 0; round < ROUNDS; ++round) {
        float sum = 0;
        double begin = omp_get_wtime();
#pragma omp parallel for simd schedule(static) reduction(+ : sum)
        for (size_t i = 0; i < n; ++i) sum += data[i];
        double seconds = omp_get_wtime() - begin;
        sink = sum;
        if (seconds < best) best = seconds;
    }
    free(data);
    return (double)bytes / best * 1e-9;
}

int main(int argc, char** argv) {
    omp_set_num_threads(argc > 1 ? atoi(argv[1]) : 1);
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
    printf("fp32 %.1f\n", peak_fp32());
#endif
#if defined(__AVX512BF16__)
    printf("bf16 %.1f\n", peak_bf16());
#endif
#if defined(__AVX512VNNI__)
    printf("int8 %.1f\n", peak_int8());
#endif
    printf("memory %.1f\n", bandwidth((size_t)1 << 30));
    return 0;
}
