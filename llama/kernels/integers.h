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

/* 16 fp32 totals with what a share's exact sum brings. */
INLINE __m512 with_share(const int with_offsets, __m512i sum, const struct tile *x, long at, __m512 scale, __m512 offset,
                         __m512 total) {
    __m512 step = _mm512_set1_ps(x->scales[at]);
    total = _mm512_fmadd_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(sum), step), scale, total);
    if (!with_offsets) return total;
    return _mm512_fmadd_ps(_mm512_mul_ps(_mm512_set1_ps((float)x->sums[at]), step), offset, total);
}
