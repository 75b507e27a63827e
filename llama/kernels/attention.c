/* Attention over pages, read where they lie (PagedAttention; Kwon et al. 2023).
 *
 * Keys and values of one layer are (pages, page size, KV heads, D), page size a multiple of 16, D of 16. A token looks
 * at the first `length` positions of its block table. All heads that share a KV head are computed together, up to four
 * at once, so that a key is read once. Scores and sums are fp32.
 */
#include "vectors.h"

#include <math.h>
#include <string.h>

#define HEADS 4 /* query heads at once */

struct paged {
    const void *keys, *values;
    const int32_t *table;
    long page, kv_heads, dim, head, length;
};

INLINE long position(const struct paged *kv, long at) {
    return ((kv->table[at / kv->page] * kv->page + at % kv->page) * kv->kv_heads + kv->head) * kv->dim;
}

/* Four vectors -> their four sums, spread over the four lanes of 128 bits: [abcd abcd abcd abcd]. */
INLINE __m512 fold(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

/* Ask for 16 positions ahead of their use: pages lie anywhere, which no prefetcher guesses. */
INLINE void fetch(const int wide, const void *at, long from, long step, long dim) {
    const long size = wide ? 4 : 2;
    for (long i = 0; i < LANES; i++)
        for (long line = 0; line < dim * size; line += 64)
            _mm_prefetch((const char *)at + (from + i * step) * size + line, _MM_HINT_T0);
}

/* Scores of 16 keys. q (heads, D) fp32. */
INLINE void scores16(const int heads, const int wide, const struct paged *kv, const float *q, long at, float *scores,
                     long stride) {
    __m512 folded[4][HEADS];
    const long step = kv->kv_heads * kv->dim;
    long from = position(kv, at);
    fetch(wide, kv->values, from, step, kv->dim);
    if (at + LANES < kv->length) fetch(wide, kv->keys, position(kv, at + LANES), step, kv->dim);
#pragma GCC unroll 4
    for (int four = 0; four < 4; four++, from += 4 * step) {
        __m512 sum[4][HEADS];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) sum[j][h] = _mm512_setzero_ps();
        for (long d = 0; d < kv->dim; d += LANES)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                __m512 key = load(kv->keys, from + j * step + d, 0xffff, wide);
#pragma GCC unroll 4
                for (int h = 0; h < heads; h++)
                    sum[j][h] = _mm512_fmadd_ps(key, _mm512_loadu_ps(q + h * kv->dim + d), sum[j][h]);
            }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) folded[four][h] = fold(sum[0][h], sum[1][h], sum[2][h], sum[3][h]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++) {
        /* Add up the four lanes of each: lane i of the result holds keys 4i .. 4i + 3. */
        __m512 a = _mm512_shuffle_f32x4(folded[0][h], folded[1][h], 0x44), b = _mm512_shuffle_f32x4(folded[0][h], folded[1][h], 0xee);
        __m512 c = _mm512_shuffle_f32x4(folded[2][h], folded[3][h], 0x44), d = _mm512_shuffle_f32x4(folded[2][h], folded[3][h], 0xee);
        __m512 low = _mm512_add_ps(a, b), high = _mm512_add_ps(c, d);
        __m512 total = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
        _mm512_storeu_ps(scores + h * stride + at, total);
    }
}

/* Scores -> what each key weighs, not yet divided by their sum, which is returned. */
INLINE float weigh(float *scores, long length) {
    __m512 most = _mm512_set1_ps(-INFINITY), sum = _mm512_setzero_ps();
    for (long at = 0; at < length; at += LANES)
        most = _mm512_mask_max_ps(most, first(length - at), most, _mm512_loadu_ps(scores + at));
    most = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (long at = 0; at < length; at += LANES) {
        __m512 weight = exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + at), most));
        _mm512_storeu_ps(scores + at, weight);
        sum = _mm512_mask_add_ps(sum, first(length - at), sum, weight);
    }
    return _mm512_reduce_add_ps(sum);
}

/* The weighted sum of `vectors` x 16 dimensions of the values. */
INLINE void gather(const int heads, const int vectors, const int wide, const struct paged *kv, const float *weights,
                   long stride, const float *sums, long d, char *out) {
    __m512 sum[HEADS][4];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[h][v] = _mm512_setzero_ps();
    for (long start = 0; start < kv->length; start += kv->page) {
        long from = position(kv, start) + d, step = kv->kv_heads * kv->dim;
        long stop = kv->length - start < kv->page ? kv->length : start + kv->page;
        for (long at = start; at < stop; at++, from += step) {
            __m512 value[4];
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) value[v] = load(kv->values, from + v * LANES, 0xffff, wide);
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) {
                __m512 weight = _mm512_set1_ps(weights[h * stride + at]);
#pragma GCC unroll 4
                for (int v = 0; v < vectors; v++) sum[h][v] = _mm512_fmadd_ps(weight, value[v], sum[h][v]);
            }
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++) {
        __m512 share = _mm512_set1_ps(1.0f / sums[h]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++)
            store(out, h * kv->dim + d + v * LANES, _mm512_mul_ps(sum[h][v], share), 0xffff, wide);
    }
}

INLINE void look(const int heads, const int wide, const struct paged *kv, const char *q, float scale, float *room,
                 char *out) {
    long stride = (kv->length + LANES - 1) / LANES * LANES;
    float *scaled = room, *scores = room + HEADS * kv->dim, sums[HEADS];
    for (long d = 0; d < heads * kv->dim; d += LANES)
        _mm512_storeu_ps(scaled + d, _mm512_mul_ps(load(q, d, 0xffff, wide), _mm512_set1_ps(scale)));
    for (long at = 0; at < kv->length; at += LANES) scores16(heads, wide, kv, scaled, at, scores, stride);
    for (int h = 0; h < heads; h++) sums[h] = weigh(scores + h * stride, kv->length);
    long d = 0;
    for (; d + 4 * LANES <= kv->dim; d += 4 * LANES) gather(heads, 4, wide, kv, scores, stride, sums, d, out);
    for (; d < kv->dim; d += LANES) gather(heads, 1, wide, kv, scores, stride, sums, d, out);
}

AVX512 static void look_of(int heads, int wide, const struct paged *kv, const char *q, float scale, float *room,
                           char *out) {
    switch (2 * heads + (wide != 0)) {
    case 2: return look(1, 0, kv, q, scale, room, out);
    case 3: return look(1, 1, kv, q, scale, room, out);
    case 4: return look(2, 0, kv, q, scale, room, out);
    case 5: return look(2, 1, kv, q, scale, room, out);
    case 6: return look(3, 0, kv, q, scale, room, out);
    case 7: return look(3, 1, kv, q, scale, room, out);
    case 8: return look(4, 0, kv, q, scale, room, out);
    default: return look(4, 1, kv, q, scale, room, out);
    }
}

/* q (T, KV heads * shared, D), its rows q_stride elements apart; token t looks at the first lengths[t] positions of row
 * rows[t] of tables (B, width). out (T, KV heads * shared, D). `wide`: fp32 throughout, else bf16. */
void promptstitch_attention(int wide, const char *q, long q_stride, const void *keys, const void *values,
                            const int32_t *tables, long width, const int32_t *rows, const int32_t *lengths, long tokens,
                            long kv_heads, long shared, long dim, long page, float scale, char *out) {
    const long size = wide ? 4 : 2;
    long longest = 0;
    for (long t = 0; t < tokens; t++) longest = lengths[t] > longest ? lengths[t] : longest;
#pragma omp parallel
    {
        static __thread struct scratch kept;
        float *room = reserve(&kept, sizeof(float) * HEADS * (dim + longest + LANES));
#pragma omp for schedule(dynamic)
        for (long task = 0; task < tokens * kv_heads; task++) {
            long t = task / kv_heads, head = task % kv_heads;
            struct paged kv = {keys, values, tables + rows[t] * width, page, kv_heads, dim, head, lengths[t]};
            for (long h = 0; h < shared; h += HEADS) {
                long at = (head * shared + h) * dim;
                look_of((int)(shared - h < HEADS ? shared - h : HEADS), wide, &kv, q + (t * q_stride + at) * size, scale,
                        room, out + (t * kv_heads * shared * dim + at) * size);
            }
        }
    }
}

/* k, v (T, KV heads * D), rows k_stride and v_stride elements apart -> slots[t] = page * page size + offset. */
void promptstitch_write(int wide, const char *k, long k_stride, const char *v, long v_stride, const int64_t *slots,
                        long tokens, long width, char *keys, char *values) {
    const long size = wide ? 4 : 2;
    for (long t = 0; t < tokens; t++) {
        memcpy(keys + slots[t] * width * size, k + t * k_stride * size, width * size);
        memcpy(values + slots[t] * width * size, v + t * v_stride * size, width * size);
    }
}
