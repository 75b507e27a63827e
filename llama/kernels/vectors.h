/* What the kernels share: 16 fp32 lanes at a time, bf16 in and out, scratch memory that a thread keeps.
 *
 * Everything is compiled for its CPUs by attribute, not by flag, so that the library loads on any x86-64; the caller asks
 * `promptstitch_kernels_supported` first. With AVX2 defined, all of it is for CPUs without AVX-512: see `halves.h`.
 */
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#ifdef AVX2
#include "halves.h"
#else
#define VECTORS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma")))
#define PAIRS __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512bf16")))
#define BYTES __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,avx512vnni")))
#define INLINE static inline __attribute__((always_inline)) VECTORS
#define TILE 12 /* rows at once: 24 sums, which leaves registers for two weights and an input */
#define FEW 4   /* rows of a token that stands alone */
#define UP_TO_TILE(case_) case_(1) case_(2) case_(3) case_(4) case_(5) case_(6) case_(7) case_(8) case_(9) case_(10) case_(11)

/* sum + w · x, two bf16 a lane by AVX512-BF16, four bytes, w unsigned, by VNNI. gcc 12 keeps the intrinsics' sums in memory. */
#define DOT_BF16(sum, w, x) __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x))
#define DOT_BYTES(sum, w, x) __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x))
#define DOT_HALVES DOT_BYTES /* the same of halves of bytes, w at most 15 */
#define SHORTS 0             /* how many of these are summed in 16 bits */
#define BYTES_ABOVE 128      /* what a byte of w is taken to stand above its value */
#define sum_of_shorts(sum, shorts) (sum)

/* Round to nearest, ties to even, by AVX512-BF16, which takes denormals for zero. */
#define NARROW_FAST(out, x) __asm__("vcvtneps2bf16 %1, %0" : "=v"(out) : "v"(x))
#endif

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

/* 16 scales or offsets from an index on, kept in bf16 (0), fp32 (1) or fp16 (2). */
INLINE __m512 factor(const char *from, int kept, long at) {
    return kept == 2 ? _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(from + 2 * at))) : load(from, at, 0xffff, kept);
}

/* 32 of them. */
INLINE void factors(const char *from, int kept, long at, __m512 *left, __m512 *right) {
    *left = factor(from, kept, at);
    *right = factor(from, kept, at + LANES);
}

#define LOG2E 1.44269504f

/* 2^x for x <= 0 by a polynomial (relative error 1e-7) that is 1 at 0; what lies below -126 counts as -126, next to
 * nothing, and what is not a number stays so. */
INLINE __m512 power_of_two(__m512 x) {
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x);
    __m512 n = _mm512_roundscale_ps(x, 0), r = _mm512_sub_ps(x, n);
    __m512 p = _mm512_set1_ps(1.32647264e-3f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.67151270e-3f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55073375e-2f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40222421e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.93146978e-1f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_scalef_ps(p, n);
}

/* Four vectors -> words 0, words 1, 2 and 3 of each four words: word 4 l + j of rows[i] goes to word 4 l + i of rows[j]. */
INLINE void turn_words(__m512i rows[4]) {
    __m512i a = _mm512_unpacklo_epi32(rows[0], rows[1]), b = _mm512_unpackhi_epi32(rows[0], rows[1]);
    __m512i c = _mm512_unpacklo_epi32(rows[2], rows[3]), d = _mm512_unpackhi_epi32(rows[2], rows[3]);
    rows[0] = _mm512_unpacklo_epi64(a, c), rows[1] = _mm512_unpackhi_epi64(a, c);
    rows[2] = _mm512_unpacklo_epi64(b, d), rows[3] = _mm512_unpackhi_epi64(b, d);
}

/* Four vectors, every `apart`-th one -> the first four words of each, the second ones, the third, the last. */
INLINE void turn_fours(__m512i *rows, const int apart) {
    __m512i a = _mm512_shuffle_i32x4(rows[0], rows[apart], 0x44), b = _mm512_shuffle_i32x4(rows[0], rows[apart], 0xee);
    __m512i c = _mm512_shuffle_i32x4(rows[2 * apart], rows[3 * apart], 0x44);
    __m512i d = _mm512_shuffle_i32x4(rows[2 * apart], rows[3 * apart], 0xee);
    rows[0] = _mm512_shuffle_i32x4(a, c, 0x88), rows[apart] = _mm512_shuffle_i32x4(a, c, 0xdd);
    rows[2 * apart] = _mm512_shuffle_i32x4(b, d, 0x88), rows[3 * apart] = _mm512_shuffle_i32x4(b, d, 0xdd);
}

/* 16 rows of 16 words, turned in place: rows[c] becomes word c of every row. */
INLINE void transpose(__m512i rows[16]) {
#pragma GCC unroll 4
    for (int r = 0; r < 16; r += 4) turn_words(rows + r);
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) turn_fours(rows + j, 4);
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
