/* What the kernels share: 16 fp32 lanes at a time, bf16 in and out, scratch memory that a thread keeps.
 *
 * Everything is compiled for AVX-512 by attribute, not by flag, so that the library loads on any x86-64; the caller
 * asks `promptstitch_kernels_supported` first.
 */
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#define AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define INLINE static inline __attribute__((always_inline)) AVX512
#define LANES 16

typedef uint16_t bf16;

INLINE __m512 widen(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }

/* Round to nearest, ties to even; a NaN stays one. */
INLINE __m256i narrow(__m512 x) {
    __m512i bits = _mm512_castps_si512(x);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}

INLINE __mmask16 first(long n) { return n >= LANES ? 0xffff : (__mmask16)((1u << n) - 1); }

/* Up to 16 elements as fp32; `wide` says that they are fp32 already, else they are bf16. */
INLINE __m512 load(const void *at, long index, __mmask16 mask, int wide) {
    if (wide) return _mm512_maskz_loadu_ps(mask, (const float *)at + index);
    return widen(_mm256_maskz_loadu_epi16(mask, (const bf16 *)at + index));
}

INLINE void store(void *at, long index, __m512 x, __mmask16 mask, int wide) {
    if (wide) _mm512_mask_storeu_ps((float *)at + index, mask, x);
    else _mm256_mask_storeu_epi16((bf16 *)at + index, mask, narrow(x));
}

/* 32 scales or offsets from an index on, kept in bf16 (0), fp32 (1) or fp16 (2). */
INLINE void factors(const char *from, int kept, long at, __m512 *left, __m512 *right) {
    if (kept == 2) {
        const __m256i *halves = (const __m256i *)(from + 2 * at);
        *left = _mm512_cvtph_ps(_mm256_loadu_si256(halves));
        *right = _mm512_cvtph_ps(_mm256_loadu_si256(halves + 1));
        return;
    }
    *left = load(from, at, 0xffff, kept);
    *right = load(from, at + LANES, 0xffff, kept);
}

/* e^x for x <= 0: Cephes' polynomial (relative error 2e-7); what lies below -87 counts as -87, next to nothing. */
INLINE __m512 exponential(__m512 x) {
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 p = _mm512_set1_ps(1.9875691500e-4f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
    p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
    return _mm512_scalef_ps(p, n);
}

/* Scratch that grows and is kept: a step asks for the same sizes again and again. `held` starts out zeroed. */
struct scratch {
    void *at;
    size_t bytes;
};

static inline void *reserve(struct scratch *held, size_t bytes) {
    if (held->bytes < bytes) {
        free(held->at);
        held->bytes = (bytes + 4095) & ~(size_t)4095;
        held->at = aligned_alloc(64, held->bytes);
        if (!held->at) abort();
    }
    return held->at;
}
