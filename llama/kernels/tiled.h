/* Attention by matrix units: bf16, D a multiple of 32.
 *
 * The rows of many tokens multiply keys and values laid out in panels. A token alone reads 16 keys where they lie as the rows
 * of a tile, which its queries, turned, multiply; each of its KV heads has rows of its own, a multiple of 16.
 */
#pragma once

#include "matrix.h"
#include "room.h"

/* Rows of a KV head of a token alone. */
static inline long spanned(long shared) { return (shared + LANES - 1) / LANES * LANES; }

/* Rows of x times panels that make up (2 * count, columns), count of pairs, to sums, `apart`; added to what factors leave of
 * the sums before, if there are any. Rows of x and of sums are allocated in MATRIX_ROWS. */
INLINE void multiply_tiles(long rows, const uint32_t *x, long stride, const uint32_t *panels, long depth, long count,
                           long columns, const float *factors, float *sums, long apart) {
    for (long r = 0; factors && r < rows; r++)
        for (long c = 0; c < columns; c += LANES) {
            float *at = sums + r * apart + c;
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_set1_ps(factors[r]), _mm512_loadu_ps(at)));
        }
    for (long c = 0; c < columns; c += PANEL)
        for (long r = 0; r < rows; r += MATRIX_ROWS)
            matrix_of_pairs(rows - r, x + r * stride, 4 * stride, 2 * count, panels + c * depth, 0, factors != NULL,
                            sums + r * apart + c, 4 * apart);
}

/* What a task keeps of the rows from the r-th on, but for weights and scores, which the next ones overwrite. */
INLINE struct room rows_from(const struct room *room, long r, long columns) {
    struct room from = *room;
    from.sums += r * columns, from.most += r, from.factor += r, from.total += r, from.lengths += r;
    return from;
}

/* A block of keys from a position on, laid out for the rows of many tokens, of one KV head; few enough of these at once for
 * the first cache to hold their scores. */
INLINE void many_by_tiles(const struct paged *kv, long rows, long from, float scale, const struct room *room) {
    const long width = kv->dim / 2, columns = kv->dim, count = kv->length - from < KEYS ? padded(kv->length - from) : KEYS;
    lay_block(TILES, kv, room, from, count);
    for (long r = 0; r < rows; r += MATRIX_ROWS) {
        const struct room own = rows_from(room, r, columns);
        const long few = rows - r < MATRIX_ROWS ? rows - r : MATRIX_ROWS;
        multiply_tiles(few, room->q + r * padded(width), padded(width), own.keys, width, width, count, NULL, own.scores, KEYS);
        find_most(TILES, &own, few, from, scale);
        for (long i = 0; i < few; i++) weigh(TILES, &own, i, from, count, scale);
        multiply_tiles(few, own.weights, KEYS / 2, own.values, KEYS / 2, count / 2, columns, own.factor, own.sums, columns);
    }
}

/* The same where they lie, for one token's rows of KV heads that lie beside each other, `shared` of each. */
INLINE void alone_by_tiles(const struct paged *kv, long heads, long shared, long from, float scale, const struct room *room) {
    const long columns = kv->dim, seen = kv->length - from, count = seen < KEYS ? padded(seen) : KEYS, span = spanned(shared);
    const long block = seen < KEYS ? (seen + LANES - 1) / LANES * LANES : KEYS, bytes = 2 * kv->dim;
    const long *places = room->places + from / LANES;
    long ahead[4];
    for (long i = 0; i < block; i += 4 * LANES) {
        const long sixteens = block - i < 4 * LANES ? (block - i) / LANES : 4;
        for (long j = 0; j < sixteens; j++) ahead[j] = later(TILES, kv, room, from, i + j * LANES, block, 0);
        for (long r = 0; r < heads * span; r += LANES)
            matrix_of_keys(shared - r % span < LANES ? shared - r % span : LANES, kv->keys + r / span * bytes, 2 * kv->step,
                           places + i / LANES, sixteens, ahead, room->q + r * kv->dim / 2, kv->dim, room->scores + r * KEYS + i,
                           KEYS);
    }
    for (long h = 0; h < heads; h++) {
        struct room own = rows_from(room, h * span, columns);
        own.scores += h * span * KEYS;
        find_most(TILES, &own, shared, from, scale);
        for (long r = 0; r < shared; r++) weigh(TILES, &own, r, from, count, scale);
        for (long i = 0; i < count; i += LANES)
            lay_up_to(TILES, kv, kv->values + places[i / LANES] + h * bytes, later(TILES, kv, room, from, i, block, 1), seen - i,
                       own.values + i * PANEL / 2);
        multiply_tiles(shared, own.weights, KEYS / 2, own.values, KEYS / 2, count / 2, columns, own.factor, own.sums, columns);
    }
}
