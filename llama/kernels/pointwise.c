/* What stands between the products, for bf16: norm, rotation, SwiGLU. Computed in fp32, rounded once. */
#include "vectors.h"

#include <math.h>

#define ALONE 8192 /* elements below which a second thread costs more than it saves */

/* x (T, H) -> y (T, H) = x / rms(x) * weight (Zhang & Sennrich 2019). */
AVX512 void promptstitch_norm(const bf16 *x, const bf16 *weight, float eps, long tokens, long width, bf16 *y) {
#pragma omp parallel for if (tokens * width > ALONE)
    for (long t = 0; t < tokens; t++) {
        __m512 squares = _mm512_setzero_ps();
        for (long i = 0; i < width; i += LANES) {
            __m512 value = load(x, t * width + i, first(width - i), 0);
            squares = _mm512_fmadd_ps(value, value, squares);
        }
        __m512 scale = _mm512_set1_ps(1.0f / sqrtf(_mm512_reduce_add_ps(squares) / (float)width + eps));
        for (long i = 0; i < width; i += LANES) {
            __mmask16 mask = first(width - i);
            __m512 value = _mm512_mul_ps(load(x, t * width + i, mask, 0), scale);
            store(y, t * width + i, _mm512_mul_ps(value, load(weight, i, mask, 0)), mask, 0);
        }
    }
}

/* x (T, heads, D), rows `stride` elements apart -> y (T, heads, D), each head turned by cos and sin (T, D), the first
 * half of sin negated; D a multiple of 32 (RoPE; Su et al. 2021). */
AVX512 void promptstitch_rotate(const bf16 *x, long stride, const bf16 *cos, const bf16 *sin, long tokens, long heads,
                                long dim, bf16 *y) {
    long half = dim / 2;
#pragma omp parallel for if (tokens * heads * dim > ALONE)
    for (long t = 0; t < tokens; t++)
        for (long h = 0; h < heads; h++) {
            const bf16 *at = x + t * stride + h * dim;
            bf16 *out = y + (t * heads + h) * dim;
            for (long i = 0; i < half; i += LANES) {
                __m512 a = load(at, i, 0xffff, 0), b = load(at, i + half, 0xffff, 0);
                __m512 c = load(cos, t * dim + i, 0xffff, 0), d = load(cos, t * dim + i + half, 0xffff, 0);
                __m512 s = load(sin, t * dim + i, 0xffff, 0), u = load(sin, t * dim + i + half, 0xffff, 0);
                store(out, i, _mm512_fmadd_ps(a, c, _mm512_mul_ps(b, s)), 0xffff, 0);
                store(out, i + half, _mm512_fmadd_ps(b, d, _mm512_mul_ps(a, u)), 0xffff, 0);
            }
        }
}

/* x (T, 2 I), gate beside up -> y (T, I) = gate * sigmoid(gate) * up (Shazeer 2020). */
AVX512 void promptstitch_swiglu(const bf16 *x, long tokens, long width, bf16 *y) {
    const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
#pragma omp parallel for if (tokens * width > ALONE)
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < width; i += LANES) {
            __mmask16 mask = first(width - i);
            __m512 gate = load(x, 2 * t * width + i, mask, 0), up = load(x, (2 * t + 1) * width + i, mask, 0);
            /* sigmoid by the exponential of -|gate|, which cannot overflow */
            __m512 small = exponential(_mm512_sub_ps(zero, _mm512_abs_ps(gate)));
            __mmask16 negative = _mm512_cmp_ps_mask(gate, zero, _CMP_LT_OQ);
            __m512 share = _mm512_div_ps(_mm512_mask_mov_ps(one, negative, small), _mm512_add_ps(one, small));
            store(y, t * width + i, _mm512_mul_ps(_mm512_mul_ps(gate, share), up), mask, 0);
        }
}
