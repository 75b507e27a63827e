/* Attention of a token that stands alone: 16 keys or values, multiplied where they lie, by the rows that share them.
 *
 * To lay them out, as for many tokens, takes longer than to multiply them by a few rows.
 */
#pragma once

#include "paged.h"

/* Scores of 16 keys where they lie, for rows of q (rows, `width`), zeros behind D -> (rows, K). Pages lie anywhere, which
 * no prefetcher guesses, so those that are `ahead` are asked for meanwhile. */
INLINE void score(const int rows, const enum kind kind, const struct paged *kv, const char *at, long ahead, const uint32_t *q,
                  long width, float *scores) {
    const long next = kv->step * (kind == WIDE ? 4 : 2), count = kind == WIDE ? kv->dim : kv->dim / 2;
    const int parts = kind == NARROW ? 2 : 1; /* of a word, multiplied one after the other */
    __m512i chains[4][4];
    for (int f = 0; f < 4; f++) { /* keys f, 4 + f, 8 + f and 12 + f: four words of each are a vector */
        __m512 sum[4];
        const uint32_t *by = q;
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) sum[r] = _mm512_setzero_ps();
        for (long i = 0; i < count; i += LANES) {
            __m512i four[4];
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                const char *key = at + (4 * j + f) * next + 4 * i;
                _mm_prefetch(key + ahead, _MM_HINT_T1);
                four[j] = _mm512_maskz_loadu_epi32(first(count - i), key);
            }
            turn_fours(four, 1);
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++)
#pragma GCC unroll 2
                for (int part = 0; part < parts; part++, by += 4) {
                    __m512i key = kind != NARROW ? four[j]
                                  : part         ? _mm512_and_si512(four[j], _mm512_set1_epi32((int)0xffff0000))
                                                 : _mm512_slli_epi32(four[j], 16);
#pragma GCC unroll 4
                    for (int r = 0; r < rows; r++) {
                        __m512i query = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)(by + r * width)));
                        sum[r] = multiply_add(kind, sum[r], key, query);
                    }
                }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) chains[r][f] = _mm512_castps_si512(sum[r]);
    }
#pragma GCC unroll 4
    for (int r = 0; r < rows; r++) {
        turn_words(chains[r]);
        __m512 total = _mm512_castsi512_ps(chains[r][0]);
#pragma GCC unroll 3
        for (int j = 1; j < CHAINS; j++) total = _mm512_add_ps(total, _mm512_castsi512_ps(chains[r][j]));
        _mm512_storeu_ps(scores + r * keys_of(kind), total);
    }
}

/* The first `count` of 16 values where they lie, times weights (rows, K), added to what factors (rows,) leave of sums
 * (rows, columns). */
INLINE void gather(const int rows, const enum kind kind, const struct paged *kv, const char *at, long ahead, long count,
                   const uint32_t *weights, const float *factors, float *sums, long columns) {
    const long size = kind == WIDE ? 4 : 2, each = kind == DOTS ? 2 : 1, next = kv->step * size;
    for (long d = 0; d < kv->dim; d += PANEL, sums += PANEL) {
        const __mmask16 left = first((kv->dim - d) / each), right = kv->dim - d > LANES ? 0xffff : 0;
        const char *value = at + d * size;
        __m512 sum[4][2];
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                sum[r][half] = _mm512_loadu_ps(sums + r * columns + half * LANES);
                if (factors) sum[r][half] = _mm512_mul_ps(_mm512_set1_ps(factors[r]), sum[r][half]);
            }
        for (long i = 0; i < count; i += each, value += each * next) {
            __m512i pair[2];
            _mm_prefetch(value + ahead, _MM_HINT_T1);
            if (kind == DOTS) _mm_prefetch(value + next + ahead, _MM_HINT_T1);
            take(kind, value, next, left, right, i + 1 < count, pair);
#pragma GCC unroll 4
            for (int r = 0; r < rows; r++) {
                __m512i weight = _mm512_set1_epi32((int)weights[(r * keys_of(kind) + i) / each]);
                sum[r][0] = multiply_add(kind, sum[r][0], pair[0], weight);
                sum[r][1] = multiply_add(kind, sum[r][1], pair[1], weight);
            }
        }
#pragma GCC unroll 4
        for (int r = 0; r < rows; r++) {
            _mm512_storeu_ps(sums + r * columns, sum[r][0]);
            _mm512_storeu_ps(sums + r * columns + LANES, sum[r][1]);
        }
    }
}

#define BY_ROWS(call, rows, ...)          \
    switch (rows) {                       \
    case 1: call(1, __VA_ARGS__); break;  \
    case 2: call(2, __VA_ARGS__); break;  \
    case 3: call(3, __VA_ARGS__); break;  \
    default: call(FEW, __VA_ARGS__);      \
    }
