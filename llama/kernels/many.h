/* Many rows in integers, by matrix units, 16 rows and 16 outputs at a time. */
#pragma once

#include "integers.h"
#include "matrix.h"

#ifdef MATRIX
#define SHARES 4 /* are multiplied before the first of them is added, which hides how long a tile is on its way */

/* A panel's codes -> (K / 4, 32, 4) int8, at their value. */
INLINE void unpack(const int bits, const int looked_up, const uint8_t *at, const uint8_t *values, long fours, int8_t *out) {
    const __m512i above = _mm512_set1_epi8(bits == 8 || looked_up ? (char)128 : 8);
    const __m512i table = looked_up ? _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)values)) : _mm512_setzero_si512();
    for (long i = 0; i < fours; i++, at += 16 * bits, out += 4 * PANEL) {
        __m512i left, right;
        codes_at(bits, looked_up, at, table, &left, &right);
        _mm512_store_si512(out, _mm512_sub_epi8(left, above));
        _mm512_store_si512(out + 64, _mm512_sub_epi8(right, above));
    }
}

/* Shares from .. to of a panel. */
VECTORS static void unpack_shares(const struct weights *w, long panel, long from, long to, int8_t *out) {
    const uint8_t *at = w->codes + (panel * w->k + from * w->share) * (PANEL / 8 * w->bits);
    const long fours = (to - from) * w->share / 4;
    if (w->bits == 8) unpack(8, 0, at, NULL, fours, out);
    else if (w->table) unpack(4, 1, at, w->table, fours, out);
    else unpack(4, 0, at, NULL, fours, out);
}

/* Adds to sums (16, 32) what shares from .. to bring, unpacked. */
static inline __attribute__((always_inline)) MATRIX void by_matrix(const int with_offsets, const struct weights *w, long panel,
                                                                  long from, long to, struct tile x, const int8_t *codes,
                                                                  float *sums) {
    int32_t parts[SHARES][16 * LANES] __attribute__((aligned(64)));
    for (int half = 0; half < 2; half++, sums += LANES) {
        __m512 sum[16];
        for (long g = from; g < to; g++)
            matrix_of_bytes(x.codes + g * w->share, w->k, codes + (g - from) * w->share * PANEL + 64 * half, parts[g - from]);
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) sum[r] = from ? _mm512_loadu_ps(sums + PANEL * r) : _mm512_setzero_ps();
        for (long g = from; g < to; g++) {
            long group = (panel * (w->k / w->group) + g * w->share / w->group) * PANEL + LANES * half;
            __m512 scale = factor(w->scales, w->kept, group);
            __m512 offset = with_offsets ? factor(w->offsets, w->kept, group) : _mm512_setzero_ps();
#pragma GCC unroll 16
            for (int r = 0; r < 16; r++)
                sum[r] = with_share(with_offsets, _mm512_load_si512(parts[g - from] + LANES * r), &x, g * 16 + r, scale, offset,
                                    sum[r]);
        }
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) _mm512_storeu_ps(sums + PANEL * r, sum[r]);
    }
}

/* All tiles of x over one panel -> sums (tiles, 16, 32), to the same bits as `over`. */
MATRIX static void over_matrix(const struct weights *w, long panel, void *tiles, long count, int8_t *unpacked, float *sums) {
    for (long from = 0, to; from < w->k / w->share; from = to) {
        to = from + SHARES < w->k / w->share ? from + SHARES : w->k / w->share;
        unpack_shares(w, panel, from, to, unpacked);
        for (long t = 0; t < count; t++) {
            struct tile x = tile_at(tiles, w, 16, t);
            if (w->offsets) by_matrix(1, w, panel, from, to, x, unpacked, sums + t * 16 * PANEL);
            else by_matrix(0, w, panel, from, to, x, unpacked, sums + t * 16 * PANEL);
        }
    }
}
#else
#define SHARES 0
static inline void over_matrix(const struct weights *w, long panel, void *tiles, long count, int8_t *unpacked, float *sums) {}
#endif
