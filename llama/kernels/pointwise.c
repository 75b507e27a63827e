/* What stands between the products: norm, rotation, SwiGLU, and their derivatives. Computed in fp32, rounded once; `wide`
 * says that everything is fp32, else it is bf16. Derivatives are for fp32. */
#include "vectors.h"

#include <math.h>

#define ALONE 8192 /* elements below which a second thread costs more than it saves */

/* x (T, H) -> y (T, H) = x / rms(x) * weight (Zhang & Sennrich 2019). */
VECTORS void promptstitch_norm(int wide, const void *x, const void *weight, float eps, long tokens, long width, void *y) {
#pragma omp parallel for if (tokens * width > ALONE)
    for (long t = 0; t < tokens; t++) {
        __m512 squares = _mm512_setzero_ps();
        for (long i = 0; i < width; i += LANES) {
            __m512 value = load(x, t * width + i, first(width - i), wide);
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + eps));
        for (long i = 0; i < width; i += LANES) {
            __mmask16 mask = first(width - i);
            __m512 value = _mm512_mul_ps(load(x, t * width + i, mask, wide), scale);
            store(y, t * width + i, _mm512_mul_ps(value, load(weight, i, mask, wide)), mask, wide);
        }
    }
}

/* dy (T, H), and x and weight as in the norm -> dx (T, H) = r (w dy - x r² mean(w dy x)), where r = 1 / rms(x). */
VECTORS void promptstitch_norm_slope(const float *dy, const float *x, const float *weight, float eps, long tokens, long width,
                                    float *dx) {
#pragma omp parallel for if (tokens * width > ALONE)
    for (long t = 0; t < tokens; t++) {
        __m512 squares = _mm512_setzero_ps(), along = _mm512_setzero_ps();
        for (long i = 0; i < width; i += LANES) {
            __mmask16 mask = first(width - i);
            __m512 value = load(x, t * width + i, mask, 1);
            __m512 pull = _mm512_mul_ps(load(dy, t * width + i, mask, 1), load(weight, i, mask, 1));
            squares = _mm512_fmadd_ps(value, value, squares);
            along = _mm512_fmadd_ps(value, pull, along);
        }
        float r = 1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + eps);
        __m512 scale = _mm512_set1_ps(r), share = _mm512_set1_ps(r * r * _mm512_reduce_add_ps(along) / (float)width);
        for (long i = 0; i < width; i += LANES) {
            __mmask16 mask = first(width - i);
            __m512 pull = _mm512_mul_ps(load(dy, t * width + i, mask, 1), load(weight, i, mask, 1));
            __m512 rest = _mm512_fnmadd_ps(load(x, t * width + i, mask, 1), share, pull);
            store(dx, t * width + i, _mm512_mul_ps(rest, scale), mask, 1);
        }
    }
}

/* x (T, heads, D), rows `stride` elements apart -> y (T, heads, D), each head turned by cos and sin (T, D), the first
 * half of sin negated; D a multiple of 32 (RoPE; Su et al. 2021). */
VECTORS void promptstitch_rotate(int wide, const char *x, long stride, const void *cos, const void *sin, long tokens,
                                long heads, long dim, char *y) {
    const long half = dim / 2, size = wide ? 4 : 2;
#pragma omp parallel for if (tokens * heads * dim > ALONE)
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++) {
            const char *at = x + (t * stride + h * dim) * size;
            char *out = y + (t * heads + h) * dim * size;
            for (long i = 0; i < half; i += LANES) {
                __m512 a = load(at, i, 0xffff, wide), b = load(at, i + half, 0xffff, wide);
                __m512 c = load(cos, t * dim + i, 0xffff, wide), d = load(cos, t * dim + i + half, 0xffff, wide);
                __m512 s = load(sin, t * dim + i, 0xffff, wide), u = load(sin, t * dim + i + half, 0xffff, wide);
                store(out, i, _mm512_fmadd_ps(a, c, _mm512_mul_ps(b, s)), 0xffff, wide);
                store(out, i + half, _mm512_fmadd_ps(b, d, _mm512_mul_ps(a, u)), 0xffff, wide);
            }
        }
}

/* By e^-|x|, which cannot overflow. */
INLINE __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 small = power_of_two(_mm512_mul_ps(_mm512_abs_ps(x), _mm512_set1_ps(-LOG2E)));
    __mmask16 negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    return _mm512_div_ps(_mm512_mask_mov_ps(one, negative, small), _mm512_add_ps(one, small));
}

/* x (T, 2 I), gate beside up -> y (T, I) = gate * sigmoid(gate) * up (Shazeer 2020). */
VECTORS void promptstitch_swiglu(int wide, const void *x, long tokens, long width, void *y) {
#pragma omp parallel for if (tokens * width > ALONE)
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < width; i += LANES) {
            __mmask16 mask = first(width - i);
            __m512 gate = load(x, 2 * t * width + i, mask, wide), up = load(x, (2 * t + 1) * width + i, mask, wide);
            store(y, t * width + i, _mm512_mul_ps(_mm512_mul_ps(gate, sigmoid(gate)), up), mask, wide);
        }
}

/* dy (T, I), and x as in SwiGLU -> dx (T, 2 I). */
VECTORS void promptstitch_swiglu_slope(const float *dy, const float *x, long tokens, long width, float *dx) {
    const __m512 one = _mm512_set1_ps(1.0f);
#pragma omp parallel for if (tokens * width > ALONE)
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < width; i += LANES) {
            __mmask16 mask = first(width - i);
            __m512 gate = load(x, 2 * t * width + i, mask, 1), up = load(x, (2 * t + 1) * width + i, mask, 1);
            __m512 pull = load(dy, t * width + i, mask, 1), share = sigmoid(gate);
            __m512 bend = _mm512_fmadd_ps(gate, _mm512_sub_ps(one, share), one); /* silu' = share (1 + gate (1 - share)) */
            store(dx, 2 * t * width + i, _mm512_mul_ps(_mm512_mul_ps(pull, up), _mm512_mul_ps(share, bend)), mask, 1);
            store(dx, (2 * t + 1) * width + i, _mm512_mul_ps(pull, _mm512_mul_ps(gate, share)), mask, 1);
        }
}
