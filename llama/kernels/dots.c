/* y = x Wᵀ + b in bf16 by matrix units, or by the dot product of AVX512-BF16 where that is faster than fp32's multiply-add
 * (`gemm.c`).
 *
 * Weights lie in panels of 32 outputs, two inputs of each output side by side, which is how matrix units want them, too.
 * Every output is one chain of sums over all its inputs, whatever rows are beside it, so a row is the same to the last bit
 * in any batch; for that, what can go to matrix units always does.
 */
#include "matrix.h"

#define PANEL 32   /* outputs: two vectors */
#define AHEAD 6144 /* bytes that are asked for early, into the next page, where prefetchers do not go */

#ifdef AVX2
int promptstitch_dots_supported(void) { return 0; } /* nothing would be gained */
#else
int promptstitch_dots_supported(void) { return __builtin_cpu_supports("avx512bf16"); }
#endif

/* A tile of x, pairs (K / 2, rows), over a panel (K / 2, 32) -> sums (rows, 32). */
static inline __attribute__((always_inline)) PAIRS void over(const int rows, const uint32_t *x, const uint32_t *panel, long pairs,
                                                             float *sums) {
    __m512 sum[TILE][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) sum[r][0] = sum[r][1] = _mm512_setzero_ps();
    for (long i = 0; i < pairs; i++, x += rows, panel += PANEL) {
        _mm_prefetch((const char *)panel + AHEAD, _MM_HINT_T0);
        _mm_prefetch((const char *)panel + AHEAD + 64, _MM_HINT_T0);
        __m512i left = _mm512_loadu_si512(panel), right = _mm512_loadu_si512(panel + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            __m512i input = _mm512_set1_epi32((int)x[r]);
            DOT_BF16(sum[r][0], left, input);
            DOT_BF16(sum[r][1], right, input);
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        _mm512_storeu_ps(sums + PANEL * r, sum[r][0]);
        _mm512_storeu_ps(sums + PANEL * r + LANES, sum[r][1]);
    }
}

#define ROWS(n) case n: return over(n, x, panel, pairs, sums);
PAIRS static void over_panel(int rows, const uint32_t *x, const uint32_t *panel, long pairs, float *sums) {
    switch (rows) {
        UP_TO_TILE(ROWS)
        default: return over(TILE, x, panel, pairs, sums);
    }
}

/* W (N, K) row by row -> panels (ceil(N / 32), K / 2, 32) of pairs; outputs beyond N are zero. K is even. */
void promptstitch_pairs(const uint32_t *w, long n, long k, uint32_t *panels) {
    long count = (n + PANEL - 1) / PANEL, pairs = k / 2;
#pragma omp parallel for
    for (long p = 0; p < count; p++)
        for (long i = 0; i < pairs; i++)
            for (long c = 0; c < PANEL; c++)
                panels[(p * pairs + i) * PANEL + c] = p * PANEL + c < n ? w[(p * PANEL + c) * pairs + i] : 0;
}

/* x (M, K) -> y (M, N); bias (N,) or NULL. */
VECTORS void promptstitch_dots(const uint32_t *x, const uint32_t *panels, const bf16 *bias, long m, long n, long k, bf16 *y) {
    static __thread struct scratch shared;
    if (m == 0) return; /* a step that only prefills looks at no row */
    const long pairs = k / 2, count = (n + PANEL - 1) / PANEL;
    const int matrix = k % 32 == 0 && matrix_units(), most = matrix ? MATRIX_ROWS : TILE;
    long tiles = (m + most - 1) / most;
    const int even = (int)((m + tiles - 1) / tiles); /* rows a tile: 11, 11 and 10 rather than 12, 12 and 8 */
    tiles = (m + even - 1) / even;
    uint32_t *turned = matrix ? NULL : reserve(&shared, sizeof(uint32_t) * tiles * even * pairs);
#pragma omp parallel
    {
        if (matrix) set_up_tiles(even, 16);
#pragma omp for
        for (long t = 0; t < (matrix ? 0 : tiles); t++)
            for (long i = 0; i < pairs; i++)
                for (int r = 0; r < even; r++) { /* what the last tile lacks repeats the last row */
                    long row = t * even + r < m ? t * even + r : m - 1;
                    turned[(t * pairs + i) * even + r] = x[row * pairs + i];
                }
#pragma omp for schedule(static)
        for (long p = 0; p < count; p++) {
            long left = n - p * PANEL;
            __mmask16 here = first(left), beyond = left > LANES ? first(left - LANES) : 0;
            __m512 b0 = bias ? load(bias, p * PANEL, here, 0) : _mm512_setzero_ps();
            __m512 b1 = bias ? load(bias, p * PANEL + LANES, beyond, 0) : _mm512_setzero_ps();
            const uint32_t *panel = panels + p * pairs * PANEL;
            for (long t = 0; t < tiles; t++) {
                float sums[MATRIX_ROWS * PANEL];
                long row = t * even;
                if (matrix && row + even > m) row = m - even; /* the last tile begins earlier instead */
                if (matrix) matrix_of_pairs(even, x + row * pairs, 2 * k, k, panel, t ? 0 : AHEAD, 0, sums, 4 * PANEL);
                else over_panel(even, turned + t * even * pairs, panel, pairs, sums);
                for (long r = 0; r < even && row < m; r++, row++) {
                    long at = row * n + p * PANEL;
                    store(y, at, _mm512_add_ps(_mm512_loadu_ps(sums + PANEL * r), b0), here, 0);
                    store(y, at + LANES, _mm512_add_ps(_mm512_loadu_ps(sums + PANEL * r + LANES), b1), beyond, 0);
                }
            }
        }
        if (matrix) release_tiles();
    }
}
