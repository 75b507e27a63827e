/* y = x Wᵀ + b in integers: weights and inputs of 8 bits, products summed exactly by AVX-512 VNNI.
 *
 * Every GROUP inputs share a scale, of a weight's output as of a row of x, so what is summed as integers is one group's
 * share of an output; across groups fp32 sums. Weights lie in panels of 32 outputs, four inputs of each output side by
 * side, 128 above their value, since the instruction wants one side unsigned; what that adds is known beforehand.
 */
#include "vectors.h"

#include <math.h>

#define VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512vnni")))
#define PANEL 32 /* outputs: two vectors */
#define TILE 12  /* rows of x at once: 24 sums, which leaves registers for two weights and an input */
#define GROUP 64 /* inputs that share a scale */
#define FOURS (GROUP / 4)

int promptstitch_integers_supported(void) { return __builtin_cpu_supports("avx512vnni"); }

/* Rows of x in integers, a tile side by side: codes (K / 4, TILE, 4); scales and shifts (K / GROUP, TILE). */
struct tile {
    int8_t *codes;
    float *scales;
    int32_t *shifts; /* -128 times a group's sum of codes */
};

static inline size_t tile_bytes(long k) { return TILE * (k + 8 * (k / GROUP)); }

static inline struct tile tile_at(void *tiles, long k, long number) {
    char *at = (char *)tiles + tile_bytes(k) * number;
    return (struct tile){(int8_t *)at, (float *)(at + TILE * k), (int32_t *)(at + TILE * (k + 4 * (k / GROUP)))};
}

/* Rows of x (rows, K), each group rounded to a grid that its largest value spans. */
AVX512 static void encode(const float *x, long k, int rows, struct tile out) {
    for (int r = 0; r < TILE; r++)
        for (long g = 0; g < k / GROUP; g++) {
            __m512 value[GROUP / LANES], largest = _mm512_setzero_ps();
            __mmask16 nan = 0; /* has no integer, and must not become one: its group's scale is made NaN */
            for (int i = 0; i < GROUP / LANES; i++) {
                value[i] = r < rows ? _mm512_loadu_ps(x + r * k + g * GROUP + i * LANES) : _mm512_setzero_ps();
                largest = _mm512_max_ps(largest, _mm512_abs_ps(value[i]));
                nan |= _mm512_cmp_ps_mask(value[i], value[i], _CMP_UNORD_Q);
            }
            float most = nan ? NAN : _mm512_reduce_max_ps(largest);
            __m512 steps = _mm512_set1_ps(most > 0 ? 127.0f / most : 0.0f);
            __m512i sum = _mm512_setzero_si512();
            for (int i = 0; i < GROUP / LANES; i++) {
                __m512i codes = _mm512_cvtps_epi32(_mm512_mul_ps(value[i], steps));
                sum = _mm512_add_epi32(sum, codes);
                __m128i bytes = _mm512_cvtsepi32_epi8(codes);
                int32_t fours[4];
                _mm_storeu_si128((__m128i *)fours, bytes);
                for (int j = 0; j < 4; j++)
                    ((int32_t *)out.codes)[(g * FOURS + i * 4 + j) * TILE + r] = fours[j];
            }
            out.scales[g * TILE + r] = most / 127.0f;
            out.shifts[g * TILE + r] = -128 * _mm512_reduce_add_epi32(sum);
        }
}

/* A tile of x over one panel -> sums (TILE, 32). */
VNNI static void over_panel(struct tile x, const uint8_t *codes, const float *scales, long k, float *sums) {
    for (int i = 0; i < 2 * TILE; i++) _mm512_storeu_ps(sums + LANES * i, _mm512_setzero_ps());
    for (long g = 0; g < k / GROUP; g++, codes += GROUP * PANEL, scales += PANEL) {
        const int32_t *fours = (const int32_t *)x.codes + g * FOURS * TILE;
        __m512i sum[TILE][2];
#pragma GCC unroll 12
        for (int r = 0; r < TILE; r++) sum[r][0] = sum[r][1] = _mm512_set1_epi32(x.shifts[g * TILE + r]);
#pragma GCC unroll 16
        for (int i = 0; i < FOURS; i++) {
            __m512i left = _mm512_loadu_si512(codes + i * 4 * PANEL), right = _mm512_loadu_si512(codes + i * 4 * PANEL + 64);
#pragma GCC unroll 12
            for (int r = 0; r < TILE; r++) {
                __m512i input = _mm512_set1_epi32(fours[i * TILE + r]);
                sum[r][0] = _mm512_dpbusd_epi32(sum[r][0], left, input);
                sum[r][1] = _mm512_dpbusd_epi32(sum[r][1], right, input);
            }
        }
        __m512 left = _mm512_loadu_ps(scales), right = _mm512_loadu_ps(scales + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < TILE; r++) {
            __m512 scale = _mm512_set1_ps(x.scales[g * TILE + r]);
            float *at = sums + PANEL * r;
            __m512 a = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][0]), scale);
            __m512 b = _mm512_mul_ps(_mm512_cvtepi32_ps(sum[r][1]), scale);
            _mm512_storeu_ps(at, _mm512_fmadd_ps(a, left, _mm512_loadu_ps(at)));
            _mm512_storeu_ps(at + LANES, _mm512_fmadd_ps(b, right, _mm512_loadu_ps(at + LANES)));
        }
    }
}

/* x (M, K) -> y (M, N), both fp32; codes (ceil(N / 32), K / 4, 32, 4), scales (ceil(N / 32), K / 64, 32); bias (N,) or
 * NULL; K a multiple of 64. */
AVX512 void promptstitch_integers(const float *x, const uint8_t *codes, const float *scales, const float *bias, long m,
                                  long n, long k, float *y) {
    static __thread struct scratch shared;
    const long tiles = (m + TILE - 1) / TILE, panels = (n + PANEL - 1) / PANEL;
    void *encoded = reserve(&shared, tile_bytes(k) * tiles);
#pragma omp parallel
    {
#pragma omp for
        for (long t = 0; t < tiles; t++) {
            long rows = m - t * TILE < TILE ? m - t * TILE : TILE;
            encode(x + t * TILE * k, k, (int)rows, tile_at(encoded, k, t));
        }
#pragma omp for schedule(static)
        for (long p = 0; p < panels; p++) {
            long left = n - p * PANEL;
            __mmask16 here = first(left), beyond = left > LANES ? first(left - LANES) : 0;
            __m512 b0 = bias ? load(bias, p * PANEL, here, 1) : _mm512_setzero_ps();
            __m512 b1 = bias ? load(bias, p * PANEL + LANES, beyond, 1) : _mm512_setzero_ps();
            for (long t = 0; t < tiles; t++) {
                float sums[TILE * PANEL];
                over_panel(tile_at(encoded, k, t), codes + p * PANEL * k, scales + p * PANEL * (k / GROUP), k, sums);
                for (long r = 0; r < TILE && t * TILE + r < m; r++) {
                    float *out = y + (t * TILE + r) * n + p * PANEL;
                    store(out, 0, _mm512_add_ps(_mm512_loadu_ps(sums + PANEL * r), b0), here, 1);
                    store(out, LANES, _mm512_add_ps(_mm512_loadu_ps(sums + PANEL * r + LANES), b1), beyond, 1);
                }
            }
        }
    }
}
