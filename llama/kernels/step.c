/* All blocks of a model over T tokens in one call: what `llama.model.Block` does layer by layer, by the same kernels in the
 * same order, so to the same bits. At one token a step takes a few milliseconds, and calling the kernels one by one from
 * Python takes as long again. bf16 throughout.
 */
#include "vectors.h"

/* y = x Wᵀ + b by one of three kernels. Fields in the order of `llama.native.Product`. */
struct product {
    const void *weights, *scales, *offsets, *values, *bias;
    long outputs, inputs, group;
    int kind, bits, kept, unused; /* 0: gemm, 1: integers, 2: dots */
};

struct layer {
    const void *attention_norm, *mlp_norm;
    struct product qkv, o, gate_up, down;
};

/* Where keys and values of a layer lie, and what each token may see: as `promptstitch_attention` has it. */
struct pages {
    char *keys, *values;
    const int64_t *slots;
    const int32_t *tables, *rows, *lengths;
    long columns, page, layer_bytes;
};

struct shape {
    long layers, tokens, hidden, kv_heads, shared, dim, inner, attention; /* attention: its kind */
    float eps, scale;
};

void promptstitch_gemm(int, int, int, const void *, const void *, const void *, const void *, const void *, long, const void *,
                       long, long, long, void *);
void promptstitch_integers(int, int, int, const void *, const void *, const void *, const void *, const void *, long,
                           const void *, long, long, long, void *);
void promptstitch_dots(const void *, const void *, const void *, long, long, long, void *);
void promptstitch_norm(int, const void *, const void *, float, long, long, void *);
void promptstitch_rotate(int, const char *, long, const void *, const void *, long, long, long, char *);
void promptstitch_swiglu(int, const void *, long, long, void *);
void promptstitch_write(int, const char *, long, const char *, long, const int64_t *, long, long, char *, char *);
void promptstitch_attention(int, const char *, long, const char *, const char *, const int32_t *, long, const int32_t *,
                            const int32_t *, long, long, long, long, long, float, char *);

static void multiply(const struct product *p, const void *x, long tokens, void *y) {
    if (p->kind == 2)
        promptstitch_dots(x, p->weights, p->bias, tokens, p->outputs, p->inputs, y);
    else if (p->kind == 1)
        promptstitch_integers(p->bits, p->kept, 0, x, p->weights, p->scales, p->offsets, p->values, p->group, p->bias, tokens,
                              p->outputs, p->inputs, y);
    else
        promptstitch_gemm(p->bits, p->kept, 0, x, p->weights, p->scales, p->offsets, p->values, p->group, p->bias, tokens,
                          p->outputs, p->inputs, y);
}

/* x += y, rounded. */
VECTORS static void add(bf16 *x, const bf16 *y, long count) {
#pragma omp parallel for if (count > 16384)
    for (long i = 0; i < count; i += LANES) {
        __mmask16 mask = first(count - i);
        store(x, i, _mm512_add_ps(load(x, i, mask, 0), load(y, i, mask, 0)), mask, 0);
    }
}

/* x (T, H), overwritten; cos and sin (T, D); scratch (T, hidden + the widest of the products' outputs, twice). */
void promptstitch_step(const struct layer *layers, const struct shape *s, const struct pages *pages, const char *cos,
                       const char *sin, bf16 *x, bf16 *scratch) {
    const long t = s->tokens, queries = s->kv_heads * s->shared * s->dim, keys = s->kv_heads * s->dim;
    const long heads = s->kv_heads * (s->shared + 1), row = queries + 2 * keys;
    const long widest = row > 2 * s->inner ? row : 2 * s->inner;
    bf16 *normed = scratch, *one = normed + t * s->hidden, *other = one + t * widest;
    for (long l = 0; l < s->layers; l++) {
        const struct layer *layer = layers + l;
        char *k = pages->keys + l * pages->layer_bytes, *v = pages->values + l * pages->layer_bytes;
        promptstitch_norm(0, x, layer->attention_norm, s->eps, t, s->hidden, normed);
        multiply(&layer->qkv, normed, t, one);
        promptstitch_rotate(0, (char *)one, row, cos, sin, t, heads, s->dim, (char *)other);
        promptstitch_write(0, (char *)(other + queries), queries + keys, (char *)(one + queries + keys), row, pages->slots, t, keys,
                           k, v);
        promptstitch_attention((int)s->attention, (char *)other, queries + keys, k, v, pages->tables, pages->columns, pages->rows,
                               pages->lengths, t, s->kv_heads, s->shared, s->dim, pages->page, s->scale, (char *)one);
        multiply(&layer->o, one, t, normed);
        add(x, normed, t * s->hidden);
        promptstitch_norm(0, x, layer->mlp_norm, s->eps, t, s->hidden, normed);
        multiply(&layer->gate_up, normed, t, one);
        promptstitch_swiglu(0, one, t, s->inner, other);
        multiply(&layer->down, other, t, normed);
        add(x, normed, t * s->hidden);
    }
}
