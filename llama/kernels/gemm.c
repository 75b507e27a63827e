/* y = x Wᵀ + b for bf16, multiplied and summed in fp32.
 *
 * Where a CPU has AVX-512 but no matrix unit, its bf16 dot product is often half as fast as fp32's multiply-add. So
 * weights are read as bf16, half the bytes, and widened in registers. W (N, K) lies in panels of 32 outputs: for each of
 * the K inputs 32 weights, output i beside output i + 16, so that one shift and one mask widen them.
 */
#include "vectors.h"

#define PANEL 32 /* outputs: two vectors */
#define AHEAD 96 /* inputs whose weights are asked for early: 6 KiB, into the next page, where prefetchers do not go */
#define TILE 12  /* rows of x at once: 24 sums, which leaves registers for two weights and an input */

/* Sums of `rows` rows over one panel; x holds TILE rows side by side for each input. With few rows the inputs are dealt
 * out to several sums, since one sum has to wait for itself. */
INLINE void tile(const int rows, long k, const float *x, const uint32_t *panel, float *sums) {
    const int ways = rows == 1 ? 4 : rows <= 3 ? 2 : 1;
    const __m512i high = _mm512_set1_epi32((int)0xffff0000);
    __m512 sum[4][TILE][2];
#pragma GCC unroll 4
    for (int w = 0; w < ways; w++)
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) sum[w][r][0] = sum[w][r][1] = _mm512_setzero_ps();
    for (long i = 0; i < k; i += ways)
#pragma GCC unroll 4
        for (int w = 0; w < ways; w++) {
            if (ways > 1 && i + w >= k) break;
            _mm_prefetch((const char *)(panel + LANES * (i + w + AHEAD)), _MM_HINT_T0);
            __m512i pair = _mm512_loadu_si512(panel + LANES * (i + w));
            __m512 left = _mm512_castsi512_ps(_mm512_slli_epi32(pair, 16));
            __m512 right = _mm512_castsi512_ps(_mm512_and_si512(pair, high));
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                __m512 input = _mm512_set1_ps(x[TILE * (i + w) + r]);
                sum[w][r][0] = _mm512_fmadd_ps(input, left, sum[w][r][0]);
                sum[w][r][1] = _mm512_fmadd_ps(input, right, sum[w][r][1]);
            }
        }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int half = 0; half < 2; half++) {
            __m512 total = sum[0][r][half];
#pragma GCC unroll 4
            for (int w = 1; w < ways; w++) total = _mm512_add_ps(total, sum[w][r][half]);
            _mm512_storeu_ps(sums + PANEL * r + LANES * half, total);
        }
}

AVX512 static void tile_of(int rows, long k, const float *x, const uint32_t *panel, float *sums) {
    switch (rows) {
    case 1: return tile(1, k, x, panel, sums);
    case 2: return tile(2, k, x, panel, sums);
    case 3: return tile(3, k, x, panel, sums);
    case 4: return tile(4, k, x, panel, sums);
    case 5: return tile(5, k, x, panel, sums);
    case 6: return tile(6, k, x, panel, sums);
    case 7: return tile(7, k, x, panel, sums);
    case 8: return tile(8, k, x, panel, sums);
    case 9: return tile(9, k, x, panel, sums);
    case 10: return tile(10, k, x, panel, sums);
    case 11: return tile(11, k, x, panel, sums);
    default: return tile(TILE, k, x, panel, sums);
    }
}

/* 16 columns of up to TILE rows, turned: out[TILE * i + r] = rows[r][i]. */
INLINE void turn16(const bf16 *x, long k, long i, int rows, float *out) {
    long n = k - i < LANES ? k - i : LANES;
    __m512 row[16], pair[16], four[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++) row[r] = r < rows ? load(x, r * k + i, first(n), 0) : _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int r = 0; r < 16; r += 2) {
        pair[r] = _mm512_unpacklo_ps(row[r], row[r + 1]);
        pair[r + 1] = _mm512_unpackhi_ps(row[r], row[r + 1]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) /* lane l of four[r + j]: column 4 l + j of rows r .. r + 3 */
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) {
            __m512d low = _mm512_castps_pd(pair[r + j]), high = _mm512_castps_pd(pair[r + j + 2]);
            four[r + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
            four[r + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
        }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        __m512 a = _mm512_shuffle_f32x4(four[j], four[4 + j], 0x44), b = _mm512_shuffle_f32x4(four[j], four[4 + j], 0xee);
        __m512 c = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0x44);
        __m512 d = _mm512_shuffle_f32x4(four[8 + j], four[12 + j], 0xee);
        __m512 column[4] = {_mm512_shuffle_f32x4(a, c, 0x88), _mm512_shuffle_f32x4(a, c, 0xdd),
                            _mm512_shuffle_f32x4(b, d, 0x88), _mm512_shuffle_f32x4(b, d, 0xdd)};
#pragma GCC unroll 4
        for (int l = 0; l < 4; l++)
            if (4 * l + j < n) _mm512_mask_storeu_ps(out + TILE * (i + 4 * l + j), first(TILE), column[l]);
    }
}

/* Rows of x (rows, K), widened and turned so that the TILE values of one input are neighbours. */
AVX512 static void turn(const bf16 *x, long k, int rows, float *turned) {
    for (long i = 0; i < k; i += LANES) turn16(x, k, i, rows, turned);
}

/* W (N, K) row by row -> panels (ceil(N / 32), K, 16) of pairs; outputs beyond N are zero. */
void promptstitch_panels(const bf16 *w, long n, long k, uint32_t *panels) {
    long count = (n + PANEL - 1) / PANEL;
#pragma omp parallel for
    for (long p = 0; p < count; p++)
        for (long c = 0; c < LANES; c++) {
            long left = p * PANEL + c, right = left + LANES;
            for (long i = 0; i < k; i++) {
                uint32_t low = left < n ? w[left * k + i] : 0, high = right < n ? w[right * k + i] : 0;
                panels[(p * k + i) * LANES + c] = high << 16 | low;
            }
        }
}

/* x (M, K) -> y (M, N); bias (N,) or NULL. */
AVX512 void promptstitch_gemm(const bf16 *x, const uint32_t *panels, const bf16 *bias, long m, long n, long k, bf16 *y) {
    static __thread struct scratch kept;
    long tiles = (m + TILE - 1) / TILE, count = (n + PANEL - 1) / PANEL;
    float *turned = reserve(&kept, sizeof(float) * tiles * TILE * k);
    int even = (int)((m + tiles - 1) / tiles); /* rows a tile: 11, 11 and 10 rather than 12, 12 and 8 */
    tiles = (m + even - 1) / even;
#pragma omp parallel
    {
#pragma omp for
        for (long t = 0; t < tiles; t++) {
            long start = t * even;
            turn(x + start * k, k, (int)(m - start < even ? m - start : even), turned + t * TILE * k);
        }
        float sums[TILE * PANEL];
#pragma omp for schedule(static)
        for (long p = 0; p < count; p++) {
            long from = p * PANEL, left = n - from;
            __m512 b0 = bias ? load(bias, from, first(left), 0) : _mm512_setzero_ps();
            __m512 b1 = bias && left > LANES ? load(bias, from + LANES, first(left - LANES), 0) : _mm512_setzero_ps();
            for (long t = 0; t < tiles; t++) {
                long start = t * even;
                int rows = (int)(m - start < even ? m - start : even);
                tile_of(rows, k, turned + t * TILE * k, panels + p * k * LANES, sums);
                for (int r = 0; r < rows; r++) {
                    bf16 *out = y + (start + r) * n + from;
                    store(out, 0, _mm512_add_ps(_mm512_loadu_ps(sums + PANEL * r), b0), first(left), 0);
                    if (left > LANES)
                        store(out, LANES, _mm512_add_ps(_mm512_loadu_ps(sums + PANEL * r + LANES), b1),
                              first(left - LANES), 0);
                }
            }
        }
    }
}
