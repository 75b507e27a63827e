/* Attention over pages (PagedAttention; Kwon et al. 2023), a block of keys at a time with a running softmax
 * (FlashAttention; Dao et al. 2022).
 *
 * Keys and values of one layer are (pages, page size, KV heads, D), page size a multiple of 16, D of 16. A token looks
 * at the first `length` positions of its block table. Neighbouring tokens of one sequence, times the heads that share a
 * KV head, are the rows of one task, which lays keys and values out once for all of them; a token that stands alone reads
 * them where they lie. Sums are fp32; products are those of fp32, or of two bf16 at a time, weights of keys rounded to
 * bf16, where that is the faster one (`dots.c`).
 *
 * A row is the same to the last bit whichever rows share its task, and if it stands alone: blocks begin at fixed
 * positions, a score is the sum of CHAINS chains, each over every CHAINS-th word of a key, all other sums are one chain in
 * the order of positions, and what a row may not see adds zero, or multiplies by one.
 */
#include "lone.h"

#include <math.h>
#include <string.h>

#define ROWS 96  /* of a task, about: what is laid out is read so many times, and all of it stays in the second cache */
#define HEADS 4  /* KV heads at once where a token stands alone: they lie together, and are read as one piece */
#define AHEAD 32 /* positions that are asked for early; at most KEYS */

/* What a task keeps beside each other. Rows of q, weights and panels are of 32 bits: one fp32 or two bf16. */
struct room {
    uint32_t *q, *weights, *keys, *values; /* (rows, padded width), (rows, KEYS); panels (width, 32), (KEYS, 32) */
    float *scores, *sums, *most, *factor;  /* (rows, KEYS), (rows, columns), (rows,), (rows,) */
    __m512 *total;                         /* (rows,): what weights add up to, every 16th position to a lane */
    long *places;                          /* where each 16 positions lie, in bytes; behind the last ones, these again */
};

INLINE void find_places(const struct paged *kv, long size, long *places) {
    long n = 0, all = padded(kv->length) / LANES + KEYS / LANES, pages = (kv->length + kv->page - 1) / kv->page;
    for (long p = 0; p < pages; p++)
        for (long i = 0; i < kv->page && n < all; i += LANES) places[n++] = kv->table[p] * kv->bytes + i * kv->step * size;
    for (; n < all; n++) places[n] = places[n - 1];
}

/* 16 keys -> their columns of a panel (width, 32), and perhaps of what is laid out next. */
INLINE void lay_keys(const enum kind kind, const struct paged *kv, const char *at, long ahead, uint32_t *panel) {
    const long size = kind == WIDE ? 4 : 2, each = kind == DOTS ? 2 : 1, width = kv->dim / each;
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

/* 16 values -> their rows of panels of 32 dimensions, each (KEYS, 32), or (KEYS / 2, 32) of pairs. Those from `count` on
 * are zero: a weight of zero makes nothing of what is not a number. */
INLINE void lay_values(const enum kind kind, const struct paged *kv, const char *at, long ahead, long count, uint32_t *panels) {
    const long size = kind == WIDE ? 4 : 2, each = kind == DOTS ? 2 : 1, next = kv->step * size;
    for (long d = 0; d < kv->dim; d += PANEL) {
        const __mmask16 left = first((kv->dim - d) / each), right = kv->dim - d > LANES ? 0xffff : 0;
        const char *value = at + d * size;
        uint32_t *out = panels + d * KEYS / each;
        for (int r = 0; r < LANES; r += each, value += each * next, out += PANEL) {
            __m512i pair[2];
            _mm_prefetch(value + ahead, _MM_HINT_T1);
            if (kind == DOTS) _mm_prefetch(value + next + ahead, _MM_HINT_T1);
            take(kind, value, next, r < count ? left : 0, r < count ? right : 0, r + 1 < count, pair);
            _mm512_storeu_si512(out, pair[0]);
            _mm512_storeu_si512(out + LANES, pair[1]);
        }
    }
}

/* x (rows, count), its rows `stride` apart, over a panel (count, 32), in chains -> sums (rows, 32), `apart`; added to what
 * factors (rows,) leave of the sums before, if there are any. */
INLINE void over(const int rows, const enum kind kind, const uint32_t *x, long stride, const uint32_t *panel, long count,
                 long chains, const float *factors, float *sums, long apart) {
    __m512 sum[TILE][2];
    const uint32_t *third[4] = {x, x + 3 * stride, x + 6 * stride, x + 9 * stride}; /* so that registers suffice */
    for (long chain = 0; chain < chains; chain++) {
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++)
                sum[r][half] = factors ? _mm512_mul_ps(_mm512_set1_ps(factors[r]),
                                                       _mm512_loadu_ps(sums + r * apart + half * LANES))
                                       : _mm512_setzero_ps();
        for (long i = chain; i < count; i += chains) {
            __m512i left = _mm512_loadu_si512(panel + i * PANEL), right = _mm512_loadu_si512(panel + i * PANEL + LANES);
#pragma GCC unroll 12
            for (int r = 0; r < rows; r++) {
                __m512i input = _mm512_set1_epi32((int)third[r / 3][r % 3 * stride + i]);
                sum[r][0] = multiply_add(kind, sum[r][0], left, input);
                sum[r][1] = multiply_add(kind, sum[r][1], right, input);
            }
        }
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
            for (int half = 0; half < 2; half++) {
                float *at = sums + r * apart + half * LANES;
                _mm512_storeu_ps(at, chain ? _mm512_add_ps(_mm512_loadu_ps(at), sum[r][half]) : sum[r][half]);
            }
    }
}

#define CASE(n) case n: return over(n, kind, x, stride, panel, count, chains, factors, sums, apart);
#define EVERY(name, kind_)                                                                                              \
    VECTORS static void name(long rows, const uint32_t *x, long stride, const uint32_t *panel, long count, long chains,  \
                            const float *factors, float *sums, long apart) {                                            \
        const enum kind kind = kind_;                                                                                   \
        switch (rows) {                                                                                                 \
            UP_TO_TILE(CASE)                                                                                           \
            default: return over(TILE, kind, x, stride, panel, count, chains, factors, sums, apart);                    \
        }                                                                                                               \
    }
EVERY(over_floats, WIDE)
EVERY(over_pairs, DOTS)

/* x (rows, count) over panels that make up (count, columns) -> sums (rows, columns), `apart`. */
INLINE void multiply(const enum kind kind, long rows, const uint32_t *x, long stride, const uint32_t *panels, long depth,
                     long count, long columns, long chains, const float *factors, float *sums, long apart) {
    for (long r = 0; r < rows; r += TILE)
        for (long c = 0; c < columns; c += PANEL)
            (kind == DOTS ? over_pairs : over_floats)(rows - r < TILE ? rows - r : TILE, x + r * stride, stride,
                                                      panels + c * depth, count, chains, factors ? factors + r : NULL,
                                                      sums + r * apart + c, apart);
}

/* The largest score of each row's `lengths` - from first ones, and what that makes of sums so far. */
INLINE void find_most(const struct room *room, const int32_t *lengths, long rows, long shared, long from, float scale) {
    for (long r = 0; r < rows; r++) {
        const long seen = lengths[r / shared] - from;
        __m512 most = _mm512_set1_ps(room->most[r]);
        for (long i = 0; i < KEYS && i < seen; i += LANES)
            most = _mm512_mask_max_ps(most, first(seen - i), most, _mm512_loadu_ps(room->scores + r * KEYS + i));
        const float before = room->most[r];
        room->most[r] = _mm512_reduce_max_ps(most);
        room->factor[r] = (before - room->most[r]) * scale;
    }
    for (long r = 0; r < rows; r += LANES)
        _mm512_storeu_ps(room->factor + r, power_of_two(_mm512_loadu_ps(room->factor + r)));
}

/* Scores of a row's first `seen` of `count` keys -> what each weighs beside the largest so far; those not seen, nothing. */
INLINE void weigh(const enum kind kind, const struct room *room, long r, long seen, long count, float scale) {
    const __m512 most = _mm512_set1_ps(room->most[r]), by = _mm512_set1_ps(scale);
    __m512 sum = _mm512_setzero_ps();
    for (long i = 0; i < count; i += LANES) {
        __m512 weight = power_of_two(_mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(room->scores + r * KEYS + i), most), by));
        weight = _mm512_maskz_mov_ps(i < seen ? first(seen - i) : 0, weight);
        sum = _mm512_add_ps(sum, weight);
        if (kind == DOTS) {
            __m256i rounded;
            NARROW_FAST(rounded, weight);
            _mm256_storeu_si256((__m256i *)(room->weights + (r * KEYS + i) / 2), rounded);
        } else {
            _mm512_storeu_ps(room->weights + r * KEYS + i, weight);
        }
    }
    room->total[r] = _mm512_fmadd_ps(room->total[r], _mm512_set1_ps(room->factor[r]), sum);
}

/* A block of keys from a position on, laid out for the rows of many tokens, of one KV head. */
INLINE void many(const enum kind kind, const struct paged *kv, const int32_t *lengths, long rows, long shared, long from,
                 float scale, const struct room *room) {
    const long each = kind == DOTS ? 2 : 1, width = kv->dim / each, columns = padded(kv->dim);
    const long count = kv->length - from < KEYS ? padded(kv->length - from) : KEYS;
    for (long i = 0; i < count; i += LANES) {
        const long here = room->places[(from + i) / LANES], ahead = room->places[(from + i + AHEAD) / LANES] - here;
        lay_keys(kind, kv, kv->keys + here, ahead, room->keys + i / PANEL * PANEL * width + i % PANEL);
        lay_values(kind, kv, kv->values + here, ahead, kv->length - from - i, room->values + i * PANEL / each);
    }
    multiply(kind, rows, room->q, padded(width), room->keys, width, width, count, CHAINS, NULL, room->scores, KEYS);
    find_most(room, lengths, rows, shared, from, scale);
    for (long r = 0; r < rows; r++) weigh(kind, room, r, lengths[r / shared] - from, count, scale);
    multiply(kind, rows, room->weights, KEYS / each, room->values, KEYS / each, count / each, columns, 1, room->factor,
             room->sums, columns);
}

/* A token alone reads keys of a block, its values, keys of the next one: from the i-th key (or value) of a block on, how far
 * away lies what is read AHEAD positions later. Only so does nothing but the start of a task wait for memory. */
INLINE long later(const struct paged *kv, const struct room *room, long from, long i, long block, int values) {
    const int turn = i + AHEAD >= block; /* to the other store */
    const long then = from + i + AHEAD - (turn && !values ? block : 0), across = kv->values - kv->keys;
    return room->places[then / LANES] - room->places[(from + i) / LANES] + (turn ? (values ? -across : across) : 0);
}

/* The keys with which such a task starts, at once. */
INLINE void ask(const struct paged *kv, const struct room *room, long heads, long size) {
    for (long i = 0; i < AHEAD && i < kv->length; i++)
        for (long byte = 0; byte < heads * kv->dim * size; byte += 64)
            _mm_prefetch(kv->keys + room->places[i / LANES] + i % LANES * kv->step * size + byte, _MM_HINT_T1);
}

/* The same where they lie, for one token's rows of KV heads that lie beside each other, `shared` of each. */
INLINE void alone(const enum kind kind, const struct paged *kv, long rows, long shared, long from, float scale,
                  const struct room *room) {
    const long size = kind == WIDE ? 4 : 2, each = kind == DOTS ? 2 : 1;
    const long width = padded(kv->dim / each), columns = padded(kv->dim), seen = kv->length - from;
    const long block = seen < KEYS ? (seen + LANES - 1) / LANES * LANES : KEYS;
    const int32_t length = kv->length;
    for (long i = 0; i < block; i += LANES) {
        const long here = room->places[(from + i) / LANES], ahead = later(kv, room, from, i, block, 0);
        for (long r = 0, few; r < rows; r += few) {
            few = shared - r % shared < FEW ? shared - r % shared : FEW;
            BY_ROWS(score, few, kind, kv, kv->keys + here + r / shared * kv->dim * size, ahead, room->q + r * width, width,
                    room->scores + r * KEYS + i)
        }
    }
    find_most(room, &length, rows, rows, from, scale);
    for (long r = 0; r < rows; r++) weigh(kind, room, r, seen, seen < KEYS ? padded(seen) : KEYS, scale);
    for (long i = 0; i < block; i += LANES) {
        const long here = room->places[(from + i) / LANES], ahead = later(kv, room, from, i, block, 1);
        for (long r = 0, few; r < rows; r += few) {
            few = shared - r % shared < FEW ? shared - r % shared : FEW;
            BY_ROWS(gather, few, kind, kv, kv->values + here + r / shared * kv->dim * size, ahead,
                    seen - i < LANES ? seen - i : LANES, room->weights + (r * KEYS + i) / each,
                    i == 0 ? room->factor + r : NULL, room->sums + r * columns, columns)
        }
    }
}

/* Tokens' q (tokens, heads * shared, D), `q_stride` elements from one to the next -> out, alike, `out_stride`. Of several
 * heads where there is one token, of one where there are more. */
INLINE void look(const enum kind kind, const struct paged *kv, const int32_t *lengths, long tokens, long heads, long shared,
                 const char *q, long q_stride, float scale, const struct room *room, char *out, long out_stride) {
    const long size = kind == WIDE ? 4 : 2, each = kind == DOTS ? 2 : 1, of = heads * shared;
    const long rows = tokens * of, width = kv->dim / each, stride = padded(width), columns = padded(kv->dim);
    scale *= LOG2E;
    find_places(kv, size, room->places);
    if (tokens == 1) ask(kv, room, heads, size);
    for (long r = 0; r < rows; r++) {
        const char *row = q + (r / of * q_stride + r % of * kv->dim) * size;
        for (long i = 0; i < stride; i += LANES) {
            const __mmask16 mask = i < width ? first(width - i) : 0;
            _mm512_storeu_si512(room->q + r * stride + i, ordered(kind, row + i * each * size, mask));
        }
        for (long d = 0; d < columns; d += LANES) _mm512_storeu_ps(room->sums + r * columns + d, _mm512_setzero_ps());
        room->total[r] = _mm512_setzero_ps();
        room->most[r] = -INFINITY;
    }
    for (long from = 0; from < kv->length; from += KEYS)
        if (tokens > 1) many(kind, kv, lengths, rows, shared, from, scale, room);
        else alone(kind, kv, rows, shared, from, scale, room);
    for (long r = 0; r < rows; r++) {
        char *row = out + (r / of * out_stride + r % of * kv->dim) * size;
        __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(room->total[r]));
        for (long d = 0; d < kv->dim; d += PANEL) {
            const float *at = room->sums + r * columns + d;
            __m512 sums[2] = {_mm512_mul_ps(_mm512_loadu_ps(at), share), _mm512_mul_ps(_mm512_loadu_ps(at + LANES), share)};
            unzip(kind, sums);
            store(row, d, sums[0], 0xffff, kind == WIDE);
            store(row, d + LANES, sums[1], kv->dim - d > LANES ? 0xffff : 0, kind == WIDE);
        }
    }
}

#define LOOK(name, kind)                                                                                                    \
    VECTORS static void name(const struct paged *kv, const int32_t *lengths, long tokens, long heads, long shared,           \
                            const char *q, long q_stride, float scale, const struct room *room, char *out, long out_stride) { \
        look(kind, kv, lengths, tokens, heads, shared, q, q_stride, scale, room, out, out_stride);                          \
    }
LOOK(look_narrow, NARROW)
LOOK(look_wide, WIDE)
LOOK(look_pairs, DOTS)

/* Lays out a task's room behind `at`, each piece on lines of its own; how many bytes that takes. */
static size_t divide(char *at, long rows, long dim, long longest, struct room *room) {
    const long columns = (dim + PANEL - 1) / PANEL * PANEL;
    const struct {
        void *piece;
        long words;
    } pieces[] = {
        {&room->q, rows * columns},      {&room->weights, rows * KEYS},    {&room->keys, (dim + LANES) * KEYS},
        {&room->values, columns * KEYS}, {&room->scores, rows * KEYS},     {&room->sums, rows * columns},
        {&room->most, rows},             {&room->factor, rows + LANES},    {&room->total, rows * LANES},
        {&room->places, 2 * (longest + PANEL + KEYS) / LANES},
    };
    size_t bytes = 0;
    for (size_t i = 0; i < sizeof pieces / sizeof *pieces; i++) {
        *(void **)pieces[i].piece = at + bytes;
        bytes += (pieces[i].words * 4 + 63) / 64 * 64;
    }
    return bytes;
}

/* q (T, KV heads * shared, D), its rows q_stride elements apart; token t looks at the first lengths[t] positions of row
 * rows[t] of tables (B, columns). out (T, KV heads * shared, D). `kind`: 0 for bf16, multiplied in fp32; 1 for fp32; 2
 * for bf16, multiplied by the dot product, which the CPU must have. */
void promptstitch_attention(int kind, const char *q, long q_stride, const char *keys, const char *values,
                            const int32_t *tables, long columns, const int32_t *rows, const int32_t *lengths, long tokens,
                            long kv_heads, long shared, long dim, long page, float scale, char *out) {
    static __thread struct scratch tasks;
    const long size = kind == WIDE ? 4 : 2, step = kv_heads * dim, width = shared * dim;
    const long most = shared < ROWS ? ROWS / shared : 1; /* tokens of a task */
    const long rows_at_most = (most > HEADS ? most : HEADS) * shared;
    long *starts = reserve(&tasks, sizeof(long) * (tokens + 1)), count = 0, longest = 0;
    for (long t = 0; t < tokens; t++) {
        longest = lengths[t] > longest ? lengths[t] : longest;
        if (t == 0 || rows[t] != rows[t - 1] || t - starts[count - 1] == most) starts[count++] = t;
    }
    starts[count] = tokens;
#pragma omp parallel
    {
        static __thread struct scratch kept;
        struct room room;
        divide(reserve(&kept, divide(NULL, rows_at_most, dim, longest, &room)), rows_at_most, dim, longest, &room);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < count * kv_heads; task++) {
            long t = starts[task / kv_heads], end = starts[task / kv_heads + 1], head = task % kv_heads, length = 0;
            const long together = end - t > 1 ? 1 : kv_heads - head < HEADS ? kv_heads - head : HEADS;
            if (end - t == 1 && head % HEADS > 0) continue;
            for (long i = t; i < end; i++) length = lengths[i] > length ? lengths[i] : length;
            struct paged kv = {keys + head * dim * size, values + head * dim * size, tables + rows[t] * columns,
                               page,                     step,                       dim,
                               length,                   page * step * size};
            (kind == DOTS ? look_pairs : kind == WIDE ? look_wide : look_narrow)(
                &kv, lengths + t, end - t, together, shared, q + (t * q_stride + head * width) * size, q_stride, scale, &room,
                out + (t * kv_heads + head) * width * size, kv_heads * width);
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
