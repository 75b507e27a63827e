/* y = x Wᵀ + b in integers: weights of 8 or 4 bits, inputs of 8, products summed exactly by AVX-512 VNNI, or by AVX2.
 *
 * Weights lie in panels of 32 outputs, four inputs of each output side by side: bytes 128 above their value, or halves
 * of bytes 8 above it, outputs 0..15 in the low halves; the instruction wants one side unsigned, and what that adds is
 * known beforehand. Or halves of bytes that are looked up in a table of 16 bytes, these 128 above their value. Every
 * `group` inputs of an output share a scale and perhaps an offset: W = code * scale + offset. Inputs are rounded here,
 * every `share` of a row to a grid that the largest of them spans; only from share to share fp32 sums. So an output is
 * the same to the last bit whichever rows stand beside its own, and whichever unit summed: many rows go to matrix units
 * where there are any.
 */
#include "many.h"

#include <math.h>

#define MATRIX_FROM 7 /* rows for which unpacking for matrix units pays */

#ifdef AVX2
int promptstitch_integers_supported(void) { return 1; }
#else
int promptstitch_integers_supported(void) { return __builtin_cpu_supports("avx512vnni"); }
#endif

/* Row r of a tile; from four codes to the next it is `apart` fours. */
INLINE void encode(const int wide, const char *x, const struct weights *w, int r, int rows, long apart, struct tile out) {
    int32_t *codes_of = (int32_t *)out.codes + (apart == 1 ? r * (w->k / 4) : r);
    const int vectors = (int)(w->share / LANES);
    for (long g = 0; g < w->k / w->share; g++) {
        __m512 value[4], largest = _mm512_setzero_ps();
        __mmask16 nan = 0; /* has no integer, and must not become one: its share's scale is made NaN */
        for (int i = 0; i < vectors; i++) {
            value[i] = load(x, g * w->share + i * LANES, 0xffff, wide);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(value[i]));
            nan |= _mm512_cmp_ps_mask(value[i], value[i], _CMP_UNORD_Q);
        }
        float most = nan ? NAN : _mm512_reduce_max_ps(largest);
        __m512 steps = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < vectors; i++) {
            __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(value[i], steps)); /* what has none is far below */
            codes = _mm512_max_epi32(codes, _mm512_set1_epi32(-127));
            sum = _mm512_add_epi32(sum, codes);
            int32_t fours[4];
            _mm_storeu_si128((__m128i *)fours, _mm512_cvtsepi32_epi8(codes));
            for (int j = 0; j < 4; j++)
                codes_of[(g * (w->share / 4) + i * 4 + j) * apart] = fours[j];
        }
        out.scales[g * rows + r] = most / 127.0f;
        out.sums[g * rows + r] = _mm512_reduce_add_epi32(sum);
    }
}

VECTORS static void encode_wide(const char *x, const struct weights *w, int r, int rows, long apart, struct tile out) {
    encode(1, x, w, r, rows, apart, out);
}

VECTORS static void encode_narrow(const char *x, const struct weights *w, int r, int rows, long apart, struct tile out) {
    encode(0, x, w, r, rows, apart, out);
}

/* A tile of x over one panel -> sums (rows, 32). With few rows the inputs are dealt out to several sums, since one sum
 * has to wait for itself. */
static inline __attribute__((always_inline)) BYTES void over(const int rows, const int bits, const int looked_up,
                                                            const struct weights *w, long panel, struct tile x, float *sums) {
    const int ways = rows == 1 ? (TILE > 4 ? 4 : 2) : 4 * rows <= TILE ? 2 : 1, above = bits == 8 || looked_up ? BYTES_ABOVE : 8;
    const int halves = bits == 4 && !looked_up, shorts = halves ? SHORTS : 0;
    const __m512i table = looked_up ? _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)w->table)) : _mm512_setzero_si512();
    const uint8_t *at = w->codes + panel * w->k * (PANEL / 8 * bits);
    for (int i = 0; i < 2 * rows; i++) _mm512_storeu_ps(sums + LANES * i, _mm512_setzero_ps());
    for (long g = 0; g < w->k / w->share; g++) {
        const int32_t *fours = (const int32_t *)x.codes + g * (w->share / 4) * rows;
        __m512i sum[4][TILE][2], part[4][TILE][2];
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            sum[0][r][0] = sum[0][r][1] = _mm512_set1_epi32(-above * x.sums[g * rows + r]);
#pragma GCC unroll 4
            for (int v = 1; v < ways; v++) sum[v][r][0] = sum[v][r][1] = _mm512_setzero_si512();
        }
        for (long from = 0, to; from < w->share / 4; from = to) {
            to = shorts ? from + shorts : w->share / 4;
            if (shorts) {
#pragma GCC unroll 12
                for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                    for (int v = 0; v < ways; v++) part[v][r][0] = part[v][r][1] = _mm512_setzero_si512();
            }
#pragma GCC unroll 1
            for (long i = from; i < to; i += ways)
#pragma GCC unroll 4
                for (int v = 0; v < ways; v++, at += 16 * bits) {
                    __m512i left, right;
                    codes_at(bits, looked_up, at, table, &left, &right);
#pragma GCC unroll 12
                    for (int r = 0; r < rows; r++) {
                        __m512i input = _mm512_set1_epi32(fours[(i + v) * rows + r]), *into = shorts ? part[v][r] : sum[v][r];
                        if (halves) {
                            DOT_HALVES(into[0], left, input);
                            DOT_HALVES(into[1], right, input);
                        } else {
                            DOT_BYTES(into[0], left, input);
                            DOT_BYTES(into[1], right, input);
                        }
                    }
                }
            if (shorts) {
#pragma GCC unroll 12
                for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
                    for (int v = 0; v < ways; v++)
#pragma GCC unroll 2
                        for (int half = 0; half < 2; half++) sum[v][r][half] = sum_of_shorts(sum[v][r][half], part[v][r][half]);
            }
        }
        long group = (panel * (w->k / w->group) + g * w->share / w->group) * PANEL;
        __m512 scale[2], offset[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        factors(w->scales, w->kept, group, &scale[0], &scale[1]);
        if (w->offsets) factors(w->offsets, w->kept, group, &offset[0], &offset[1]);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
#pragma GCC unroll 4
                for (int v = 1; v < ways; v++) sum[0][r][half] = _mm512_add_epi32(sum[0][r][half], sum[v][r][half]);
                float *total = sums + PANEL * r + LANES * half;
                _mm512_storeu_ps(total, with_share(w->offsets != NULL, sum[0][r][half], &x, g * rows + r, scale[half],
                                                   offset[half], _mm512_loadu_ps(total)));
            }
    }
}

#define ROWS(n) case n: return over(n, bits, looked_up, w, panel, x, sums);
#define EVERY(name, bits_, looked_up_)                                                                            \
    BYTES static void name(int rows, const struct weights *w, long panel, struct tile x, float *sums) {            \
        const int bits = bits_, looked_up = looked_up_;                                                           \
        switch (rows) {                                                                                           \
            UP_TO_TILE(ROWS)                                                                                      \
            default: return over(TILE, bits, looked_up, w, panel, x, sums);                                       \
        }                                                                                                         \
    }
EVERY(over8, 8, 0)
EVERY(over4, 4, 0)
EVERY(over_table, 4, 1)

/* x (M, K) -> y (M, N); bias (N,) or NULL; `bits` 8 or 4, table NULL with 8; `wide`: x, bias and y are fp32, not bf16;
 * `group` a multiple of 32 that divides K. */
VECTORS void promptstitch_integers(int bits, int kept, int wide, const char *x, const uint8_t *codes, const char *scales,
                                  const char *offsets, const uint8_t *table, long group, const char *bias, long m, long n,
                                  long k, char *y) {
    static __thread struct scratch shared;
    if (m == 0) return; /* a step that only prefills looks at no row */
    const struct weights w = {codes, table, scales, offsets, k, group, group % 64 ? 32 : 64, bits, kept};
    const long size = wide ? 4 : 2, panels = (n + PANEL - 1) / PANEL;
    const int matrix = m >= MATRIX_FROM && matrix_units(), most = matrix ? 16 : TILE;
    long tiles = (m + most - 1) / most;
    const int even = matrix ? 16 : (int)((m + tiles - 1) / tiles); /* rows a tile: 11, 11 and 10 rather than 12, 12 and 8 */
    tiles = (m + even - 1) / even;
    void *encoded = reserve(&shared, tile_bytes(&w, even) * tiles);
#pragma omp parallel
    {
        static __thread struct scratch own;
        float few[TILE * PANEL], *sums = few;
        if (matrix) {
            sums = reserve(&own, sizeof(float) * PANEL * 16 * tiles + SHARES * 64 * PANEL);
            set_up_tiles(16, (int)w.share / 4);
        }
#pragma omp for
        for (long r = 0; r < tiles * even; r++) /* what a tile lacks repeats the last row */
            (wide ? encode_wide : encode_narrow)(x + (r < m ? r : m - 1) * k * size, &w, (int)(r % even), even,
                                                 matrix ? 1 : even, tile_at(encoded, &w, even, r / even));
#pragma omp for schedule(static)
        for (long p = 0; p < panels; p++) {
            long left = n - p * PANEL;
            __mmask16 here = first(left), beyond = left > LANES ? first(left - LANES) : 0;
            __m512 b0 = bias ? load(bias, p * PANEL, here, wide) : _mm512_setzero_ps();
            __m512 b1 = bias ? load(bias, p * PANEL + LANES, beyond, wide) : _mm512_setzero_ps();
            if (matrix) over_matrix(&w, p, encoded, tiles, (int8_t *)(sums + PANEL * 16 * tiles), sums);
            for (long t = 0; t < tiles; t++) {
                const float *from = matrix ? sums + t * 16 * PANEL : sums;
                if (!matrix) (bits == 8 ? over8 : table ? over_table : over4)(even, &w, p, tile_at(encoded, &w, even, t), sums);
                for (long r = 0, row = t * even; r < even && row < m; r++, row++) {
                    long at = row * n + p * PANEL;
                    store(y, at, _mm512_add_ps(_mm512_loadu_ps(from + PANEL * r), b0), here, wide);
                    store(y, at + LANES, _mm512_add_ps(_mm512_loadu_ps(from + PANEL * r + LANES), b1), beyond, wide);
                }
            }
        }
        if (matrix) release_tiles();
    }
}
