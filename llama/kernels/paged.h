/* What attention of many tokens and of one that stands alone share: where keys and values lie, how two of their elements
 * are multiplied, and in which order those of a key and a value are added up.
 */
#pragma once

#include "vectors.h"

#define KEYS 256 /* of a block, at most */
#define CHAINS 4 /* of a score: a key that is read where it lies has four words in a lane of 128 bits */
#define PANEL 32 /* keys or dimensions beside each other: two vectors */

/* How elements are stored and multiplied. */
enum kind { NARROW, WIDE, DOTS, TILES }; /* bf16 by fp32, fp32, bf16 by pairs, the same by matrix units */

/* Keys of a block: where products are for free, more of them share what a block costs beside. */
INLINE long keys_of(const enum kind kind) { return kind == TILES ? KEYS : 64; }

struct paged {
    const char *keys, *values; /* of one KV head in page 0 */
    const int32_t *table;
    long page, step, dim, length, bytes; /* step: elements from a position to the next; length: that any row sees */
};

INLINE long padded(long n) { return (n + PANEL - 1) / PANEL * PANEL; }

INLINE __m512 multiply_add(const enum kind kind, __m512 sum, __m512i x, __m512i y) {
    if (kind < DOTS) return _mm512_fmadd_ps(_mm512_castsi512_ps(x), _mm512_castsi512_ps(y), sum);
    DOT_BF16(sum, x, y);
    return sum;
}

/* 16 elements as 32 bits each, or 32 as pairs; mask: of these 16. */
INLINE __m512i words(const enum kind kind, const char *at, __mmask16 mask) {
    if (kind >= DOTS) return _mm512_maskz_loadu_epi32(mask, at);
    return _mm512_castps_si512(load(at, 0, mask, kind == WIDE));
}

/* The same, of a query or a key, in the order in which they are multiplied: of 8 bf16 those that are the lower halves of
 * words go first. */
INLINE __m512i ordered(const enum kind kind, const char *at, __mmask16 mask) {
    const __m512i halves = _mm512_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    return kind == NARROW ? _mm512_permutexvar_epi32(halves, words(kind, at, mask)) : words(kind, at, mask);
}

/* 32 dimensions of one value, or of two that follow each other, zipped, which leaves dimensions in the order that
 * `unzip` ends; masks: of each 16 words that lie there. */
INLINE void take(const enum kind kind, const char *at, long next, __mmask16 left, __mmask16 right, int second, __m512i out[2]) {
    if (kind >= DOTS) {
        __m512i one = words(kind, at, left), other = words(kind, at + next, second ? left : 0);
        out[0] = _mm512_unpacklo_epi16(one, other), out[1] = _mm512_unpackhi_epi16(one, other);
    } else {
        out[0] = words(kind, at, left), out[1] = words(kind, at + LANES * (kind == WIDE ? 4 : 2), right);
    }
}

INLINE void unzip(const enum kind kind, __m512 sums[2]) {
    if (kind < DOTS) return;
    __m512 low = _mm512_shuffle_f32x4(sums[0], sums[1], 0x44), high = _mm512_shuffle_f32x4(sums[0], sums[1], 0xee);
    sums[0] = _mm512_shuffle_f32x4(low, low, 0xd8), sums[1] = _mm512_shuffle_f32x4(high, high, 0xd8);
}
