/* What this CPU can do: whether it runs the kernels, and how fast its bf16 dot product is beside fp32's multiply-add. */
#include "matrix.h"

#include <time.h>

#define CHAINS 16
#define TURNS 400

int promptstitch_matrix_units(void) { return matrix_units(); }

#ifdef AVX2
int promptstitch_kernels_supported(void) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); /* F16C is older */
}

double promptstitch_dot_gain(void) { return 0; } /* there is no such instruction */
#else
int promptstitch_kernels_supported(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
}

static double seconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

VECTORS static double multiply_add(volatile float *sink) {
    __m512 sum[CHAINS], one = _mm512_set1_ps(*sink);
    for (int c = 0; c < CHAINS; c++) sum[c] = _mm512_setzero_ps();
    double start = seconds();
    for (int t = 0; t < TURNS; t++)
#pragma GCC unroll 16
        for (int c = 0; c < CHAINS; c++) sum[c] = _mm512_fmadd_ps(one, one, sum[c]);
    double taken = seconds() - start;
    for (int c = 0; c < CHAINS; c++) *sink = _mm512_reduce_add_ps(sum[c]);
    return taken;
}

PAIRS static double dot(volatile float *sink) {
    __m512 sum[CHAINS];
    __m512bh one = (__m512bh)_mm512_castps_si512(_mm512_set1_ps(*sink));
    for (int c = 0; c < CHAINS; c++) sum[c] = _mm512_setzero_ps();
    double start = seconds();
    for (int t = 0; t < TURNS; t++)
#pragma GCC unroll 16
        for (int c = 0; c < CHAINS; c++) sum[c] = _mm512_dpbf16_ps(sum[c], one, one);
    double taken = seconds() - start;
    for (int c = 0; c < CHAINS; c++) *sink = _mm512_reduce_add_ps(sum[c]);
    return taken;
}

/* Products a second of the bf16 dot product (AVX512-BF16, which the caller has asked for) over those of fp32's
 * multiply-add. The best of many bursts of some microseconds, so that a busy machine changes nothing. */
double promptstitch_dot_gain(void) {
    double best[2] = {1, 1};
    for (int i = 0; i < 100; i++) {
        volatile float sink = 0;
        double plain = multiply_add(&sink), dotted = dot(&sink);
        best[0] = plain < best[0] ? plain : best[0];
        best[1] = dotted < best[1] ? dotted : best[1];
    }
    return 2 * best[0] / best[1];
}
#endif
