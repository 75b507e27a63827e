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
    const char *keys, *values;
    const int32_t *table;
    long page, kv_heads, shared, dim, length, bytes; /* bytes of a page */
};

/* The page that holds position `at`, or the last one. A page is asked for line by line while the one before it is read:
 * pages lie anywhere, which no prefetcher guesses. */
INLINE const char *page_of(const struct paged *kv, const char *store, long at) {
    at = at < kv->length ? at : kv->length - 1;
    return store + kv->table[at / kv->page] * kv->bytes;
}

/* Four vectors -> their four sums, spread over the four lanes of 128 bits: [abcd abcd abcd abcd]. */
INLINE __m512 fold(__m512 a, __m512 b, __m512 c, __m512 d) {
    __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    return _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
}

/* Scores of 16 keys that lie `step` elements apart, `ahead` bytes before those that come next. q (heads, D) fp32 ->
 * scores, `stride` apart. */
INLINE void score(const int heads, const int wide, const char *keys, long ahead, long step, long dim, const float *q,
                  float *scores, long stride) {
    const long size = wide ? 4 : 2;
    __m512 folded[4][HEADS];
#pragma GCC unroll 4
    for (int four = 0; four < 4; four++) {
        const char *key = keys + 4 * four * step * size;
        __m512 sum[4][HEADS];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++)
#pragma GCC unroll 4
            for (int h = 0; h < heads; h++) sum[j][h] = _mm512_setzero_ps();
        for (long d = 0; d < dim; d += LANES)
#pragma GCC unroll 4
            for (int j = 0; j < 4; j++) {
                _mm_prefetch(key + ahead + (j * step + d) * size, _MM_HINT_T1);
                __m512 part = load(key, j * step + d, 0xffff, wide);
#pragma GCC unroll 4
                for (int h = 0; h < heads; h++)
                    sum[j][h] = _mm512_fmadd_ps(part, _mm512_loadu_ps(q + h * dim + d), sum[j][h]);
            }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) folded[four][h] = fold(sum[0][h], sum[1][h], sum[2][h], sum[3][h]);
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++) {
        /* Add up the four lanes of each: lane i of the total holds keys 4 i .. 4 i + 3. */
        __m512 *f[4] = {&folded[0][h], &folded[1][h], &folded[2][h], &folded[3][h]};
        __m512 low = _mm512_add_ps(_mm512_shuffle_f32x4(*f[0], *f[1], 0x44), _mm512_shuffle_f32x4(*f[0], *f[1], 0xee));
        __m512 high = _mm512_add_ps(_mm512_shuffle_f32x4(*f[2], *f[3], 0x44), _mm512_shuffle_f32x4(*f[2], *f[3], 0xee));
        __m512 total = _mm512_add_ps(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
        _mm512_storeu_ps(scores + h * stride, total);
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

/* Add `count` weighted values to sums (heads, D), for `vectors` x 16 dimensions from d on. */
INLINE void gather(const int heads, const int vectors, const int wide, const char *values, long ahead, long step, long dim,
                   long count, const float *weights, long stride, long d, float *sums) {
    const long size = wide ? 4 : 2;
    __m512 sum[HEADS][4];
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) sum[h][v] = _mm512_loadu_ps(sums + h * dim + d + v * LANES);
    for (long i = 0; i < count; i++) {
        __m512 value[4];
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) {
            _mm_prefetch(values + ahead + (i * step + d + v * LANES) * size, _MM_HINT_T1);
            value[v] = load(values, i * step + d + v * LANES, 0xffff, wide);
        }
#pragma GCC unroll 4
        for (int h = 0; h < heads; h++) {
            __m512 weight = _mm512_set1_ps(weights[h * stride + i]);
#pragma GCC unroll 4
            for (int v = 0; v < vectors; v++) sum[h][v] = _mm512_fmadd_ps(weight, value[v], sum[h][v]);
        }
    }
#pragma GCC unroll 4
    for (int h = 0; h < heads; h++)
#pragma GCC unroll 4
        for (int v = 0; v < vectors; v++) _mm512_storeu_ps(sums + h * dim + d + v * LANES, sum[h][v]);
}

INLINE void gather_all(const int heads, const int wide, const char *values, long ahead, long step, long dim, long count,
                       const float *weights, long stride, float *sums) {
    long d = 0;
    for (; d + 4 * LANES <= dim; d += 4 * LANES)
        gather(heads, 4, wide, values, ahead, step, dim, count, weights, stride, d, sums);
    for (; d < dim; d += LANES) gather(heads, 1, wide, values, ahead, step, dim, count, weights, stride, d, sums);
}

#define BY_HEADS(call, ...)                    \
    switch (heads) {                           \
    case 1: call(1, wide, __VA_ARGS__); break; \
    case 2: call(2, wide, __VA_ARGS__); break; \
    case 3: call(3, wide, __VA_ARGS__); break; \
    default: call(4, wide, __VA_ARGS__);       \
    }

/* One token: q (KV heads * shared, D) -> out, alike. Page after page, so that each is read as one piece. */
INLINE void look(const int wide, const struct paged *kv, const char *q, float scale, float *room, char *out) {
    const long size = wide ? 4 : 2, dim = kv->dim, step = kv->kv_heads * dim, width = kv->shared * step;
    const long stride = (kv->length + kv->page - 1) / kv->page * kv->page;
    float *scaled = room, *sums = room + width, *scores = sums + width;
    for (long d = 0; d < width; d += LANES) {
        _mm512_storeu_ps(scaled + d, _mm512_mul_ps(load(q, d, 0xffff, wide), _mm512_set1_ps(scale)));
        _mm512_storeu_ps(sums + d, _mm512_setzero_ps());
    }
    for (long at = 0; at < kv->length; at += kv->page) {
        const char *keys = page_of(kv, kv->keys, at);
        long ahead = page_of(kv, kv->keys, at + kv->page) - keys;
        for (long from = 0; from < kv->page && at + from < kv->length; from += LANES)
            for (long head = 0; head < kv->kv_heads * kv->shared;) {
                long group = head / kv->shared, left = (group + 1) * kv->shared - head, heads = left < HEADS ? left : HEADS;
                BY_HEADS(score, keys + (from * step + group * dim) * size, ahead, step, dim, scaled + head * dim,
                         scores + head * stride + at + from, stride)
                head += heads;
            }
    }
    for (long head = 0; head < kv->kv_heads * kv->shared; head++) {
        __m512 share = _mm512_set1_ps(1.0f / weigh(scores + head * stride, kv->length));
        for (long at = 0; at < kv->length; at += LANES)
            _mm512_storeu_ps(scores + head * stride + at, _mm512_mul_ps(_mm512_loadu_ps(scores + head * stride + at), share));
    }
    for (long at = 0; at < kv->length; at += kv->page) {
        const char *values = page_of(kv, kv->values, at);
        long ahead = page_of(kv, kv->values, at + kv->page) - values;
        long count = kv->length - at < kv->page ? kv->length - at : kv->page;
        for (long head = 0; head < kv->kv_heads * kv->shared;) {
            long group = head / kv->shared, left = (group + 1) * kv->shared - head, heads = left < HEADS ? left : HEADS;
            BY_HEADS(gather_all, values + group * dim * size, ahead, step, dim, count, scores + head * stride + at, stride,
                     sums + head * dim)
            head += heads;
        }
    }
    for (long d = 0; d < width; d += LANES) store(out, d, _mm512_loadu_ps(sums + d), 0xffff, wide);
}

AVX512 static void look_wide(const struct paged *kv, const char *q, float scale, float *room, char *out) {
    look(1, kv, q, scale, room, out);
}

AVX512 static void look_narrow(const struct paged *kv, const char *q, float scale, float *room, char *out) {
    look(0, kv, q, scale, room, out);
}

/* q (T, KV heads * shared, D), its rows q_stride elements apart; token t looks at the first lengths[t] positions of row
 * rows[t] of tables (B, columns). out (T, KV heads * shared, D). `wide`: fp32 throughout, else bf16. */
void promptstitch_attention(int wide, const char *q, long q_stride, const char *keys, const char *values,
                            const int32_t *tables, long columns, const int32_t *rows, const int32_t *lengths, long tokens,
                            long kv_heads, long shared, long dim, long page, float scale, char *out) {
    const long size = wide ? 4 : 2, width = kv_heads * shared * dim;
    long longest = 0;
    for (long t = 0; t < tokens; t++) longest = lengths[t] > longest ? lengths[t] : longest;
#pragma omp parallel
    {
        static __thread struct scratch kept;
        float *room = reserve(&kept, sizeof(float) * (2 * width + kv_heads * shared * (longest + page)));
#pragma omp for schedule(dynamic)
        for (long t = 0; t < tokens; t++) {
            struct paged kv = {keys, values, tables + rows[t] * columns, page, kv_heads, shared, dim, lengths[t],
                               page * kv_heads * dim * size};
            (wide ? look_wide : look_narrow)(&kv, q + t * q_stride * size, scale, room, out + t * width * size);
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
