/* y = x Wᵀ + b, multiplied and summed in fp32, with W (N, K) in bf16 or packed.
 *
 * Where a CPU has AVX-512 but no matrix unit, its bf16 dot product is often half as fast as fp32's multiply-add. So
 * weights are read as they are stored and widened on the way. They lie in panels of 32 outputs, for each of the K inputs
 * in turn: bf16 as pairs of output i and output i + 16, so that one shift and one mask widen them; 4-bit codes alike,
 * output i in the low half of byte i and output i + 16 in the high one; 8-bit codes as 32 bytes. Every `group` inputs of
 * an output share a scale and perhaps an offset: W = value * scale + offset. A 4-bit code's value is looked up in a table.
 *
 * Many rows: a stretch of a panel is unpacked to fp32 once, into the cache. Few rows: codes are multiplied as they are
 * and each group's sum is scaled.
 */
#include "vectors.h"

#define PANEL 32                    /* outputs: two vectors */
#define FEWER (TILE < 6 ? TILE : 6) /* rows for which unpacking does not pay */
#define WIDENED (TILE < 6)          /* whether bf16 is unpacked, too, since a small tile reads it more often */
#define STRETCH 768                 /* inputs at once: a tile of x stays in the first cache, unpacked weights in the second */
#define AHEAD 6144                  /* bytes that are asked for early, into the next page, where prefetchers do not go */

struct weights {
    const uint8_t *panels;
    const char *scales, *offsets; /* (panels, groups, 32); offsets or NULL */
    const float *table;           /* 16 values */
    long k, group;
    int bits, kept; /* kept: scales and offsets are bf16 (0), fp32 (1) or fp16 (2) */
};

INLINE long bytes_of(int bits) { return 4 * bits; } /* of one input's 32 weights */

/* One input's 32 weights, before they are scaled. */
INLINE void values(const int bits, const uint8_t *at, __m512 table, __m512 *left, __m512 *right) {
    if (bits == 16) {
        __m512i pairs = _mm512_loadu_si512(at);
        *left = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
        *right = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000)));
    } else if (bits == 8) {
        *left = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)at)));
        *right = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(at + LANES))));
    } else {
        __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at)); /* the look-up minds four bits */
        *left = _mm512_permutexvar_ps(codes, table);
        *right = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table);
    }
}

/* Add to sums (rows, 32) what `count` inputs bring; x holds TILE rows side by side for each input. With few rows the
 * inputs are dealt out to several sums, since one sum has to wait for itself. `bits` 32: the weights are fp32. */
INLINE void tile(const int rows, const int bits, long count, const float *x, const void *weights, __m512 table, float *sums) {
    const int ways = rows == 1 ? (TILE > 4 ? 4 : 2) : 4 * rows <= TILE ? 2 : 1;
    const uint8_t *at = weights;
    __m512 sum[4][TILE][2];
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++) {
        sum[0][r][0] = _mm512_loadu_ps(sums + PANEL * r);
        sum[0][r][1] = _mm512_loadu_ps(sums + PANEL * r + LANES);
#pragma GCC unroll 4
        for (int w = 1; w < ways; w++) sum[w][r][0] = sum[w][r][1] = _mm512_setzero_ps();
    }
    for (long i = 0; i < count; i += ways)
#pragma GCC unroll 4
        for (int w = 0; w < ways; w++) {
            if (ways > 1 && i + w >= count) break;
            __m512 left, right;
            if (bits == 32) {
                left = _mm512_loadu_ps((const float *)weights + PANEL * (i + w));
                right = _mm512_loadu_ps((const float *)weights + PANEL * (i + w) + LANES);
            } else {
                _mm_prefetch((const char *)at + bytes_of(bits) * (i + w) + AHEAD, _MM_HINT_T0);
                values(bits, at + bytes_of(bits) * (i + w), table, &left, &right);
            }
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

#define ROWS(n) case n: return tile(n, bits, count, x, weights, table, sums);
#define EVERY(name, bits_)                                                                                           \
    VECTORS static void name(int rows, long count, const float *x, const void *weights, __m512 table, float *sums) { \
        const int bits = bits_;                                                                                      \
        switch (rows) {                                                                                              \
            UP_TO_TILE(ROWS)                                                                                         \
            default: return tile(TILE, bits, count, x, weights, table, sums);                                        \
        }                                                                                                            \
    }
EVERY(tile32, 32)
EVERY(tile16, 16)
EVERY(tile8, 8)
EVERY(tile4, 4)

/* Where the scales and offsets of a panel's group begin. */
INLINE long group_at(const struct weights *w, long panel, long group) {
    return (panel * (w->k / w->group) + group) * PANEL;
}

/* Inputs from .. to of a panel of codes as fp32 (inputs, 32). */
INLINE void unpack(const int bits, const struct weights *w, __m512 table, long panel, long from, long to, float *out) {
    const uint8_t *at = w->panels + (panel * w->k + from) * bytes_of(bits);
    for (long i = from; i < to;) {
        __m512 scale[2], offset[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        long group = group_at(w, panel, i / w->group);
        factors(w->scales, w->kept, group, &scale[0], &scale[1]);
        if (w->offsets) factors(w->offsets, w->kept, group, &offset[0], &offset[1]);
        long end = (i / w->group + 1) * w->group;
        for (end = end < to ? end : to; i < end; i++, at += bytes_of(bits), out += PANEL) {
            __m512 left, right;
            _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
            values(bits, at, table, &left, &right);
            _mm512_storeu_ps(out, _mm512_fmadd_ps(left, scale[0], offset[0]));
            _mm512_storeu_ps(out + LANES, _mm512_fmadd_ps(right, scale[1], offset[1]));
        }
    }
}

VECTORS static void unpack8(const struct weights *w, __m512 table, long panel, long from, long to, float *out) {
    unpack(8, w, table, panel, from, to, out);
}

VECTORS static void unpack16(const struct weights *w, long panel, long from, long to, float *out) {
    const uint8_t *at = w->panels + (panel * w->k + from) * bytes_of(16);
    for (long i = from; i < to; i++, at += bytes_of(16), out += PANEL) {
        __m512 left, right;
        _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
        values(16, at, _mm512_setzero_ps(), &left, &right);
        _mm512_storeu_ps(out, left);
        _mm512_storeu_ps(out + LANES, right);
    }
}

VECTORS static void unpack4(const struct weights *w, __m512 table, long panel, long from, long to, float *out) {
    unpack(4, w, table, panel, from, to, out);
}

/* Few rows of x over one panel of codes without offsets. */
VECTORS static void by_groups(const struct weights *w, __m512 table, long panel, int rows, const float *x, float *sums) {
    float part[FEWER * PANEL];
    for (long from = 0; from < w->k; from += w->group) {
        for (int i = 0; i < rows * 2; i++) _mm512_storeu_ps(part + LANES * i, _mm512_setzero_ps());
        const uint8_t *at = w->panels + (panel * w->k + from) * bytes_of(w->bits);
        (w->bits == 8 ? tile8 : tile4)(rows, w->group, x + TILE * from, at, table, part);
        __m512 scale[2];
        factors(w->scales, w->kept, group_at(w, panel, from / w->group), &scale[0], &scale[1]);
        for (int i = 0; i < rows * 2; i++) {
            __m512 sum = _mm512_loadu_ps(sums + LANES * i);
            _mm512_storeu_ps(sums + LANES * i, _mm512_fmadd_ps(_mm512_loadu_ps(part + LANES * i), scale[i % 2], sum));
        }
    }
}

/* All rows of x, `turned`, `even` a tile, over one panel -> sums (M, 32). */
VECTORS static void over_panel(const struct weights *w, __m512 table, long panel, long m, int even, const float *turned,
                              float *unpacked, float *sums) {
    for (long i = 0; i < 2 * m; i++) _mm512_storeu_ps(sums + LANES * i, _mm512_setzero_ps());
    if (w->bits < 16 && m <= FEWER && !w->offsets) return by_groups(w, table, panel, (int)m, turned, sums);
    for (long from = 0; from < w->k; from += STRETCH) {
        long to = from + STRETCH < w->k ? from + STRETCH : w->k;
        const void *weights = unpacked;
        const int as_stored = w->bits == 16 && (!WIDENED || m <= FEWER);
        if (as_stored) weights = w->panels + (panel * w->k + from) * bytes_of(16);
        else if (w->bits == 16) unpack16(w, panel, from, to, unpacked);
        else (w->bits == 8 ? unpack8 : unpack4)(w, table, panel, from, to, unpacked);
        for (long start = 0; start < m; start += even) {
            int rows = (int)(m - start < even ? m - start : even);
            const float *x = turned + start / even * TILE * w->k + TILE * from;
            (as_stored ? tile16 : tile32)(rows, to - from, x, weights, table, sums + PANEL * start);
        }
    }
}

/* 16 columns of up to TILE rows, turned: out[TILE * i + r] = rows[r][i]. */
INLINE void turn16(const int wide, const char *x, long k, long i, int rows, float *out) {
    long n = k - i < LANES ? k - i : LANES;
    __m512i row[16];
#pragma GCC unroll 16
    for (int r = 0; r < 16; r++)
        row[r] = r < rows ? _mm512_castps_si512(load(x, r * k + i, first(n), wide)) : _mm512_setzero_si512();
    transpose(row);
#pragma GCC unroll 16
    for (int c = 0; c < 16; c++)
        if (c < n) _mm512_mask_storeu_epi32(out + TILE * (i + c), first(TILE), row[c]);
}

VECTORS static void turn16_wide(const char *x, long k, long i, int rows, float *out) { turn16(1, x, k, i, rows, out); }
VECTORS static void turn16_narrow(const char *x, long k, long i, int rows, float *out) { turn16(0, x, k, i, rows, out); }

/* Rows of x (rows, K), widened and turned so that the TILE values of one input are neighbours. */
VECTORS static void turn(int wide, const char *x, long k, int rows, float *turned) {
    for (long i = 0; i < k; i += LANES) (wide ? turn16_wide : turn16_narrow)(x, k, i, rows, turned);
}

/* bf16 W (N, K) row by row -> panels (ceil(N / 32), K, 16) of pairs; outputs beyond N are zero. */
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

/* x (M, K) -> y (M, N); bias (N,) or NULL. `bits` of the weights: 16, 8 or 4; `wide`: x, bias and y are fp32, not bf16. */
VECTORS void promptstitch_gemm(int bits, int kept, int wide, const char *x, const uint8_t *panels, const char *scales,
                              const char *offsets, const float *values_of, long group, const char *bias, long m, long n,
                              long k, char *y) {
    static __thread struct scratch shared;
    if (m == 0) return; /* a step that only prefills looks at no row */
    const struct weights w = {panels, scales, offsets, values_of, k, group, bits, kept};
    const long size = wide ? 4 : 2, count = (n + PANEL - 1) / PANEL;
    long tiles = (m + TILE - 1) / TILE;
    int even = (int)((m + tiles - 1) / tiles); /* rows a tile: 11, 11 and 10 rather than 12, 12 and 8 */
    tiles = (m + even - 1) / even;
    float *turned = reserve(&shared, sizeof(float) * tiles * TILE * k);
#pragma omp parallel
    {
        static __thread struct scratch own;
        float *sums = reserve(&own, sizeof(float) * PANEL * (m + STRETCH)), *unpacked = sums + PANEL * m;
        __m512 table = values_of ? _mm512_loadu_ps(values_of) : _mm512_setzero_ps();
#pragma omp for
        for (long t = 0; t < tiles; t++) {
            long start = t * even;
            turn(wide, x + start * k * size, k, (int)(m - start < even ? m - start : even), turned + t * TILE * k);
        }
#pragma omp for schedule(static)
        for (long p = 0; p < count; p++) {
            long left = n - p * PANEL;
            __mmask16 here = first(left), beyond = left > LANES ? first(left - LANES) : 0;
            over_panel(&w, table, p, m, even, turned, unpacked, sums);
            __m512 b0 = bias ? load(bias, p * PANEL, here, wide) : _mm512_setzero_ps();
            __m512 b1 = bias ? load(bias, p * PANEL + LANES, beyond, wide) : _mm512_setzero_ps();
            for (long r = 0; r < m; r++) {
                store(y, r * n + p * PANEL, _mm512_add_ps(_mm512_loadu_ps(sums + PANEL * r), b0), here, wide);
                store(y, r * n + p * PANEL + LANES, _mm512_add_ps(_mm512_loadu_ps(sums + PANEL * r + LANES), b1), beyond, wide);
            }
        }
    }
}
