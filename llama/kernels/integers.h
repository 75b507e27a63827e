/* Weights and rows of x in integers: how they lie, and how exact sums of a share become fp32 ones. */
#pragma once

#include "vectors.h"

#define PANEL 32   /* outputs: two vectors */
#define AHEAD 6144 /* bytes that are asked for early, into the next page, where prefetchers do not go */

struct weights {
    const uint8_t *codes, *table; /* table: 16 bytes, or NULL */
    const char *scales, *offsets; /* (panels, groups, 32); offsets or NULL */
    long k, group, share;         /* share divides group */
    int bits, kept;               /* kept: as `factors` has it */
};

/* Rows of x in integers: codes (K / 4, rows, 4), a tile side by side, or for matrix units (rows, K); scales and sums of
 * codes (K / share, rows). */
struct tile {
    int8_t *codes;
    float *scales;
    int32_t *sums;
};

static inline size_t tile_bytes(const struct weights *w, long rows) { return rows * (w->k + 8 * (w->k / w->share)); }

static inline struct tile tile_at(void *tiles, const struct weights *w, long rows, long number) {
    char *at = (char *)tiles + tile_bytes(w, rows) * number;
    return (struct tile){(int8_t *)at, (float *)(at + rows * w->k), (int32_t *)(at + rows * (w->k + 4 * (w->k / w->share)))};
}

/* The codes of four inputs, outputs 0..15 and 16..31, as they are kept or as the table has them. */
INLINE void codes_at(const int bits, const int looked_up, const uint8_t *at, __m512i table, __m512i *left, __m512i *right) {
    const __m512i low = _mm512_set1_epi8(15);
    *left = _mm512_loadu_si512(at);
    _mm_prefetch((const char *)at + AHEAD, _MM_HINT_T0);
    if (bits == 8) {
        *right = _mm512_loadu_si512(at + 64);
        _mm_prefetch((const char *)at + AHEAD + 64, _MM_HINT_T0);
    } else {
        *right = _mm512_and_si512(_mm512_srli_epi16(*left, 4), low);
        *left = _mm512_and_si512(*left, low);
        if (looked_up) *left = _mm512_shuffle_epi8(table, *left), *right = _mm512_shuffle_epi8(table, *right);
    }
}

/* 16 fp32 totals with what a share's exact sum brings. */
INLINE __m512 with_share(const int with_offsets, __m512i sum, const struct tile *x, long at, __m512 scale, __m512 offset,
                         __m512 total) {
    __m512 step = _mm512_set1_ps(x->scales[at]);
    total = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), step), scale, total);
    if (!with_offsets) return total;
    return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps((float)x->sums[at]), step), offset, total);
}
