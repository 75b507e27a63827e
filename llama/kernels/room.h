/* What a task of attention keeps beside each other: keys and values laid out, scores of a block, and the running softmax over
 * blocks.
 */
#pragma once

#include "paged.h"

#include <math.h>

/* Rows of q, weights and panels are of 32 bits: one fp32 or two bf16. K: keys of a block. */
struct room {
    uint32_t *q, *weights, *keys, *values; /* (rows, padded width), (rows, K); panels (width, 32), (K, 32) */
    float *scores, *sums, *most, *factor;  /* (rows, K), (rows, columns), (rows,), (rows,) */
    __m512 *total;                         /* (rows,): what weights add up to, every 16th position to a lane */
    long *lengths;                         /* (rows,): positions that each sees */
    long *places;                          /* where each 16 positions lie, in bytes; behind the last ones, these again */
};

/* Positions that are asked for early; at most those of a block. */
INLINE long early(const enum kind kind) { return kind == TILES ? 64 : 32; }

INLINE void find_places(const enum kind kind, const struct paged *kv, long *places) {
    const long size = kind == WIDE ? 4 : 2;
    long n = 0, all = padded(kv->length) / LANES + keys_of(kind) / LANES, pages = (kv->length + kv->page - 1) / kv->page;
    for (long p = 0; p < pages; p++)
        for (long i = 0; i < kv->page && n < all; i += LANES) places[n++] = kv->table[p] * kv->bytes + i * kv->step * size;
    for (; n < all; n++) places[n] = places[n - 1];
}

/* A token alone reads keys of a block, its values, keys of the next one: from the i-th key (or value) of a block on, how far
 * away lies what is read `early` positions later. Only so does nothing but the start of a task wait for memory. */
INLINE long later(const enum kind kind, const struct paged *kv, const struct room *room, long from, long i, long block, int values) {
    const int turn = i + early(kind) >= block; /* to the other store */
    const long then = from + i + early(kind) - (turn && !values ? block : 0), across = kv->values - kv->keys;
    return room->places[then / LANES] - room->places[(from + i) / LANES] + (turn ? (values ? -across : across) : 0);
}

/* 16 keys -> their columns of a panel (width, 32), and perhaps of what is laid out next. */
INLINE void lay_keys(const enum kind kind, const struct paged *kv, const char *at, long ahead, uint32_t *panel) {
    const long size = kind == WIDE ? 4 : 2, each = kind >= DOTS ? 2 : 1, width = kv->dim / each;
    for (long i = 0; i < width; i += LANES) {
        const __mmask16 mask = first(width - i);
        const char *key = at + i * each * size;
        __m512i row[LANES];
#pragma GCC unroll 16
        for (int r = 0; r < LANES; r++, key += kv->step * size) {
            row[r] = ordered(kind, key, mask);
            _mm_prefetch(key + ahead, _MM_HINT_T1);
        }
        transpose(row);
#pragma GCC unroll 16
        for (int c = 0; c < LANES; c++) _mm512_storeu_si512(panel + (i + c) * PANEL, row[c]);
    }
}

/* 16 values -> their rows of panels of 32 dimensions, each (K, 32), or (K / 2, 32) of pairs. Those from `count` on
 * are zero: a weight of zero makes nothing of what is not a number. */
INLINE void lay_values(const enum kind kind, const struct paged *kv, const char *at, long ahead, long count,
                       uint32_t *panels) {
    const long size = kind == WIDE ? 4 : 2, each = kind >= DOTS ? 2 : 1, next = kv->step * size;
    for (long d = 0; d < kv->dim; d += PANEL) {
        const __mmask16 left = first((kv->dim - d) / each), right = kv->dim - d > LANES ? 0xffff : 0;
        const char *value = at + d * size;
        uint32_t *out = panels + d * keys_of(kind) / each;
#pragma GCC unroll 8
        for (int r = 0; r < LANES; r += each, value += each * next, out += PANEL) {
            __m512i pair[2];
            _mm_prefetch(value + ahead, _MM_HINT_T1);
            if (kind >= DOTS) _mm_prefetch(value + next + ahead, _MM_HINT_T1);
            take(kind, value, next, r < count ? left : 0, r < count ? right : 0, r + 1 < count, pair);
            _mm512_storeu_si512(out, pair[0]);
            _mm512_storeu_si512(out + LANES, pair[1]);
        }
    }
}

/* As many of 16 as there are. */
INLINE void lay_up_to(const enum kind kind, const struct paged *kv, const char *at, long ahead, long count, uint32_t *panels) {
    if (count < LANES) lay_values(kind, kv, at, ahead, count, panels);
    else lay_values(kind, kv, at, ahead, LANES, panels);
}

/* Some of a block's keys and values, from its first on. */
INLINE void lay_block(const enum kind kind, const struct paged *kv, const struct room *room, long from, long count) {
    const long each = kind >= DOTS ? 2 : 1, width = kv->dim / each;
    for (long i = 0; i < count; i += LANES) {
        const long here = room->places[(from + i) / LANES], ahead = room->places[(from + i + early(kind)) / LANES] - here;
        lay_keys(kind, kv, kv->keys + here, ahead, room->keys + i / PANEL * PANEL * width + i % PANEL);
        lay_up_to(kind, kv, kv->values + here, ahead, kv->length - from - i, room->values + i * PANEL / each);
    }
}

/* The largest score of each row's first ones, of the block from a position on, and what that makes of sums so far. */
INLINE void find_most(const enum kind kind, const struct room *room, long rows, long from, float scale) {
    const long block = keys_of(kind);
    for (long r = 0; r < rows; r++) {
        const long seen = room->lengths[r] - from, all = seen < 0 ? 0 : seen < block ? seen : block, whole = all & -LANES;
        const float *scores = room->scores + r * block, before = room->most[r];
        __m512 most = _mm512_set1_ps(before);
        for (long i = 0; i < whole; i += LANES) most = _mm512_max_ps(most, _mm512_loadu_ps(scores + i));
        if (whole < all) most = _mm512_mask_max_ps(most, first(all - whole), most, _mm512_loadu_ps(scores + whole));
        room->most[r] = _mm512_reduce_max_ps(most);
        room->factor[r] = (before - room->most[r]) * scale;
    }
    for (long r = 0; r < rows; r += LANES)
        _mm512_storeu_ps(room->factor + r, power_of_two(_mm512_loadu_ps(room->factor + r)));
}

/* What 16 scores weigh beside the largest so far, and where that is kept. */
INLINE __m512 weight_of(const enum kind kind, const float *scores, __mmask16 seen, __m512 most, __m512 scale, uint32_t *at) {
    const __m512 power = power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores), most), scale));
    const __m512 weight = _mm512_maskz_mov_ps(seen, power);
    __m256i rounded;
    if (kind < DOTS) {
        _mm512_storeu_ps(at, weight);
    } else {
        NARROW_FAST(rounded, weight);
        _mm256_storeu_si256((__m256i *)at, rounded);
    }
    return weight;
}

/* Scores of a row's first ones of `count` keys, of the block from a position on -> weights; of those not seen, nothing. */
INLINE void weigh(const enum kind kind, const struct room *room, long r, long from, long count, float scale) {
    const long seen = room->lengths[r] - from, each = kind >= DOTS ? 2 : 1, block = keys_of(kind);
    const long all = seen < 0 ? 0 : seen < count ? seen : count, whole = all & -LANES;
    const float *scores = room->scores + r * block;
    uint32_t *at = room->weights + r * block / each;
    const __m512 most = _mm512_set1_ps(room->most[r]), by = _mm512_set1_ps(scale);
    __m512 sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (const float *end = scores + whole; scores < end; scores += LANES, at += LANES / each)
        sum = _mm512_add_ps(sum, weight_of(kind, scores, 0xffff, most, by, at));
    for (long i = whole; i < count; i += LANES, scores += LANES, at += LANES / each)
        sum = _mm512_add_ps(sum, weight_of(kind, scores, i < all ? first(all - i) : 0, most, by, at));
    room->total[r] = _mm512_fmadd_ps(room->total[r], _mm512_set1_ps(room->factor[r]), sum);
}
