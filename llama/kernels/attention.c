/* Attention over pages (PagedAttention; Kwon et al. 2023), a block of keys at a time with a running softmax
 * (FlashAttention; Dao et al. 2022).
 *
 * Keys and values of one layer are (pages, page size, KV heads, D), page size a multiple of 16, D of 16. A token looks
 * at the first `length` positions of its block table. Neighbouring tokens of one sequence, times the heads that share a
 * KV head, are the rows of one task, which lays keys and values out once for all of them; a token that stands alone reads
 * them where they lie. Sums are fp32; products are those of fp32, or of two bf16 at a time, weights of keys rounded to
 * bf16, where that is the faster one (`dots.c`), or of matrix units where there are any (`tiled.h`).
 *
 * A row is the same to the last bit whichever rows share its task, and if it stands alone: blocks begin at fixed
 * positions, a score is the sum of CHAINS chains, each over every CHAINS-th word of a key, all other sums are one chain in
 * the order of positions (those of matrix units, two in each 32), and what a row may not see, where it is
 * finite, adds zero, or multiplies by one.
 */
#include "lone.h"
#include "tiled.h"

#include <string.h>

#define ROWS 96  /* of a task, about: what is laid out is read so many times, and all of it stays in the second cache */
#define HEADS 4  /* KV heads at once where a token stands alone: they lie together, and are read as one piece */
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

/* A block of keys from a position on, laid out for the rows of many tokens, of one KV head. */
INLINE void many(const enum kind kind, const struct paged *kv, long rows, long from, float scale, const struct room *room) {
    const long each = kind == DOTS ? 2 : 1, width = kv->dim / each, columns = padded(kv->dim), block = keys_of(kind);
    const long count = kv->length - from < block ? padded(kv->length - from) : block;
    lay_block(kind, kv, room, from, count);
    multiply(kind, rows, room->q, padded(width), room->keys, width, width, count, CHAINS, NULL, room->scores, block);
    find_most(kind, room, rows, from, scale);
    for (long r = 0; r < rows; r++) weigh(kind, room, r, from, count, scale);
    multiply(kind, rows, room->weights, block / each, room->values, block / each, count / each, columns, 1, room->factor,
             room->sums, columns);
}

/* The keys with which such a task starts, at once. */
INLINE void ask(const enum kind kind, const struct paged *kv, const struct room *room, long heads, long size) {
    for (long i = 0; i < early(kind) && i < kv->length; i++)
        for (long byte = 0; byte < heads * kv->dim * size; byte += 64)
            _mm_prefetch(kv->keys + room->places[i / LANES] + i % LANES * kv->step * size + byte, _MM_HINT_T1);
}

/* The same where they lie, for one token's rows of KV heads that lie beside each other, `shared` of each. */
INLINE void alone(const enum kind kind, const struct paged *kv, long rows, long shared, long from, float scale,
                  const struct room *room) {
    const long size = kind == WIDE ? 4 : 2, each = kind == DOTS ? 2 : 1;
    const long width = padded(kv->dim / each), columns = padded(kv->dim), seen = kv->length - from, all = keys_of(kind);
    const long block = seen < all ? (seen + LANES - 1) / LANES * LANES : all;
    for (long i = 0; i < block; i += LANES) {
        const long here = room->places[(from + i) / LANES], ahead = later(kind, kv, room, from, i, block, 0);
        for (long r = 0, few; r < rows; r += few) {
            few = shared - r % shared < FEW ? shared - r % shared : FEW;
            BY_ROWS(score, few, kind, kv, kv->keys + here + r / shared * kv->dim * size, ahead, room->q + r * width, width,
                    room->scores + r * all + i)
        }
    }
    find_most(kind, room, rows, from, scale);
    for (long r = 0; r < rows; r++) weigh(kind, room, r, from, seen < all ? padded(seen) : all, scale);
    for (long i = 0; i < block; i += LANES) {
        const long here = room->places[(from + i) / LANES], ahead = later(kind, kv, room, from, i, block, 1);
        for (long r = 0, few; r < rows; r += few) {
            few = shared - r % shared < FEW ? shared - r % shared : FEW;
            BY_ROWS(gather, few, kind, kv, kv->values + here + r / shared * kv->dim * size, ahead,
                    seen - i < LANES ? seen - i : LANES, room->weights + (r * all + i) / each,
                    i == 0 ? room->factor + r : NULL, room->sums + r * columns, columns)
        }
    }
}

/* Tokens' q (tokens, heads * shared, D), `q_stride` elements from one to the next -> out, alike, `out_stride`. Of several
 * heads where there is one token, of one where there are more. */
INLINE void look(const enum kind kind, const struct paged *kv, const int32_t *lengths, long tokens, long heads, long shared,
                 const char *q, long q_stride, float scale, const struct room *room, char *out, long out_stride) {
    const long size = kind == WIDE ? 4 : 2, each = kind >= DOTS ? 2 : 1, of = heads * shared;
    const long rows = tokens * of, width = kv->dim / each, stride = padded(width), columns = padded(kv->dim);
    const int turned = kind == TILES && tokens == 1;
    const long span = turned ? spanned(shared) : shared;
    scale *= LOG2E;
    find_places(kind, kv, room->places);
    if (tokens == 1) ask(kind, kv, room, heads, size);
    for (long r = 0; r < rows; r++) {
        const char *row = q + (r / of * q_stride + r % of * kv->dim) * size;
        const long at = r / shared * span + r % shared;
        for (long i = 0; i < stride && !turned; i += LANES) {
            const __mmask16 mask = i < width ? first(width - i) : 0;
            _mm512_storeu_si512(room->q + at * stride + i, ordered(kind, row + i * each * size, mask));
        }
        for (long i = 0; i < width && turned; i++)
            room->q[(at / LANES * width + i) * LANES + at % LANES] = ((const uint32_t *)row)[i];
        for (long d = 0; d < columns; d += LANES) _mm512_storeu_ps(room->sums + at * columns + d, _mm512_setzero_ps());
        room->lengths[at] = lengths[r / of];
        room->total[at] = _mm512_setzero_ps();
        room->most[at] = -INFINITY;
    }
    for (long from = 0; from < kv->length; from += keys_of(kind))
        if (turned) alone_by_tiles(kv, heads, shared, from, scale, room);
        else if (kind == TILES) many_by_tiles(kv, rows, from, scale, room);
        else if (tokens > 1) many(kind, kv, rows, from, scale, room);
        else alone(kind, kv, rows, shared, from, scale, room);
    for (long r = 0; r < rows; r++) {
        char *row = out + (r / of * out_stride + r % of * kv->dim) * size;
        const long at = r / shared * span + r % shared;
        __m512 share = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(room->total[at]));
        for (long d = 0; d < kv->dim; d += PANEL) {
            const float *from = room->sums + at * columns + d;
            __m512 sums[2] = {_mm512_mul_ps(_mm512_loadu_ps(from), share),
                              _mm512_mul_ps(_mm512_loadu_ps(from + LANES), share)};
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
LOOK(look_tiles, TILES)

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
        {&room->lengths, 2 * rows},
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
 * for bf16, multiplied by the dot product, 3 by matrix units, D a multiple of 32: which the CPU must have. */
void promptstitch_attention(int kind, const char *q, long q_stride, const char *keys, const char *values,
                            const int32_t *tables, long columns, const int32_t *rows, const int32_t *lengths, long tokens,
                            long kv_heads, long shared, long dim, long page, float scale, char *out) {
    static __thread struct scratch tasks;
    const long size = kind == WIDE ? 4 : 2, step = kv_heads * dim, width = shared * dim;
    const long most = shared < ROWS ? ROWS / shared : 1; /* tokens of a task */
    const long of_many = most * shared, of_one = HEADS * spanned(shared);
    const long rows_at_most = ((of_many > of_one ? of_many : of_one) + MATRIX_ROWS - 1) / MATRIX_ROWS * MATRIX_ROWS;
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
        if (kind == TILES) set_up_tiles(MATRIX_ROWS, LANES);
#pragma omp for schedule(dynamic)
        for (long task = 0; task < count * kv_heads; task++) {
            long t = starts[task / kv_heads], end = starts[task / kv_heads + 1], head = task % kv_heads, length = 0;
            const long together = end - t > 1 ? 1 : kv_heads - head < HEADS ? kv_heads - head : HEADS;
            if (end - t == 1 && head % HEADS > 0) continue;
            for (long i = t; i < end; i++) length = lengths[i] > length ? lengths[i] : length;
            struct paged kv = {keys + head * dim * size, values + head * dim * size, tables + rows[t] * columns,
                               page,                     step,                       dim,
                               length,                   page * step * size};
            (kind == TILES ? look_tiles : kind == DOTS ? look_pairs : kind == WIDE ? look_wide : look_narrow)(
                &kv, lengths + t, end - t, together, shared, q + (t * q_stride + head * width) * size, q_stride, scale, &room,
                out + (t * kv_heads + head) * width * size, kv_heads * width);
        }
        if (kind == TILES) release_tiles();
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
