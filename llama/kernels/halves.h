/* The vectors of AVX-512 as two halves, for CPUs that have AVX2 and no more: the same numbers, twice the instructions.
 *
 * What the kernels use of AVX-512's intrinsics is defined anew here under their names. Masks say which of the first lanes
 * count; words are looked up and turned within their half only, which is all that the kernels ask for.
 */
#pragma once

#define VECTORS __attribute__((target("avx2,fma,f16c")))
#define PAIRS VECTORS
#define BYTES VECTORS
#define INLINE static inline __attribute__((always_inline)) VECTORS
#define TILE 3 /* rows at once: 12 sums of 8 lanes, which leaves registers for a weight and their inputs */
#define FEW 2
#define UP_TO_TILE(case_) case_(1) case_(2)

struct floats {
    __m256 lo, hi;
};
struct words {
    __m256i lo, hi;
};

#define FLOATS2(name)                                                           \
    INLINE struct floats both_##name(struct floats a, struct floats b) {        \
        return (struct floats){_mm256_##name(a.lo, b.lo), _mm256_##name(a.hi, b.hi)}; \
    }
#define FLOATS3(name)                                                                       \
    INLINE struct floats both_##name(struct floats a, struct floats b, struct floats c) {   \
        return (struct floats){_mm256_##name(a.lo, b.lo, c.lo), _mm256_##name(a.hi, b.hi, c.hi)}; \
    }
#define WORDS2(name)                                                            \
    INLINE struct words both_##name(struct words a, struct words b) {           \
        return (struct words){_mm256_##name(a.lo, b.lo), _mm256_##name(a.hi, b.hi)}; \
    }
#define SHIFTED(name)                                                           \
    INLINE struct words both_##name(struct words a, int by) {                   \
        return (struct words){_mm256_##name(a.lo, by), _mm256_##name(a.hi, by)}; \
    }
FLOATS2(add_ps)
FLOATS2(sub_ps)
FLOATS2(mul_ps)
FLOATS2(div_ps)
FLOATS2(max_ps)
FLOATS3(fmadd_ps)
FLOATS3(fnmadd_ps)
FLOATS3(blendv_ps)
WORDS2(add_epi16)
WORDS2(add_epi32)
WORDS2(max_epi32)
WORDS2(sign_epi8)
WORDS2(and_si256)
WORDS2(shuffle_epi8)
WORDS2(unpacklo_epi16)
WORDS2(unpackhi_epi16)
WORDS2(unpacklo_epi32)
WORDS2(unpackhi_epi32)
WORDS2(unpacklo_epi64)
WORDS2(unpackhi_epi64)
WORDS2(madd_epi16)
WORDS2(maddubs_epi16)
SHIFTED(srli_epi16)
SHIFTED(srli_epi32)
SHIFTED(slli_epi32)

INLINE struct floats both_set1_ps(float x) { return (struct floats){_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
INLINE struct words both_set1_epi32(int x) { return (struct words){_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
INLINE struct words both_set1_epi16(short x) { return (struct words){_mm256_set1_epi16(x), _mm256_set1_epi16(x)}; }
INLINE struct words both_set1_epi8(char x) { return (struct words){_mm256_set1_epi8(x), _mm256_set1_epi8(x)}; }

INLINE struct floats as_floats(struct words a) {
    return (struct floats){_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)};
}
INLINE struct words as_words(struct floats a) {
    return (struct words){_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)};
}

INLINE struct floats both_loadu_ps(const void *at) {
    return (struct floats){_mm256_loadu_ps(at), _mm256_loadu_ps((const float *)at + 8)};
}
INLINE struct words both_loadu(const void *at) {
    return (struct words){_mm256_loadu_si256(at), _mm256_loadu_si256((const __m256i *)at + 1)};
}
INLINE void both_storeu_ps(void *at, struct floats a) {
    _mm256_storeu_ps(at, a.lo);
    _mm256_storeu_ps((float *)at + 8, a.hi);
}
INLINE void both_storeu(void *at, struct words a) {
    _mm256_storeu_si256(at, a.lo);
    _mm256_storeu_si256((__m256i *)at + 1, a.hi);
}

/* All bits of the lanes that a mask names. */
INLINE struct words lanes_of(uint16_t mask) {
    const struct words each = {_mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128),
                               _mm256_setr_epi32(256, 512, 1024, 2048, 4096, 8192, 16384, 32768)};
    struct words named = both_and_si256(both_set1_epi32(mask), each);
    return (struct words){_mm256_cmpeq_epi32(named.lo, each.lo), _mm256_cmpeq_epi32(named.hi, each.hi)};
}
INLINE struct floats both_mask_mov_ps(struct floats a, uint16_t mask, struct floats b) {
    return both_blendv_ps(a, b, as_floats(lanes_of(mask)));
}
INLINE struct words both_maskz_load(uint16_t mask, const void *at) {
    if (mask == 0xffff) return both_loadu(at);
    struct words lanes = lanes_of(mask);
    return (struct words){_mm256_maskload_epi32(at, lanes.lo), _mm256_maskload_epi32((const int *)at + 8, lanes.hi)};
}
INLINE void both_mask_store(void *at, uint16_t mask, struct words a) {
    if (mask == 0xffff) return both_storeu(at, a);
    struct words lanes = lanes_of(mask);
    _mm256_maskstore_epi32(at, lanes.lo, a.lo);
    _mm256_maskstore_epi32((int *)at + 8, lanes.hi, a.hi);
}
INLINE __m256i maskz_load_shorts(uint16_t mask, const void *at) {
    if (mask == 0xffff) return _mm256_loadu_si256(at);
    uint16_t kept[16] = {0};
    for (int i = 0; i < 16 && mask >> i; i++) kept[i] = ((const uint16_t *)at)[i];
    return _mm256_loadu_si256((const __m256i *)kept);
}
INLINE void mask_store_shorts(void *at, uint16_t mask, __m256i x) {
    if (mask == 0xffff) return _mm256_storeu_si256(at, x);
    uint16_t kept[16];
    _mm256_storeu_si256((__m256i *)kept, x);
    for (int i = 0; i < 16 && mask >> i; i++) ((uint16_t *)at)[i] = kept[i];
}

INLINE float both_reduce_add_ps(struct floats a) {
    __m256 eight = _mm256_add_ps(a.lo, a.hi);
    __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
INLINE float both_reduce_max_ps(struct floats a) {
    __m256 eight = _mm256_max_ps(a.lo, a.hi);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
INLINE int both_reduce_add_epi32(struct words a) {
    __m256i eight = _mm256_add_epi32(a.lo, a.hi);
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}

INLINE struct floats both_abs_ps(struct floats a) {
    return as_floats(both_and_si256(as_words(a), both_set1_epi32(0x7fffffff)));
}
INLINE struct floats both_round_ps(struct floats a) {
    return (struct floats){_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
                           _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
INLINE struct floats both_cvtepi32_ps(struct words a) {
    return (struct floats){_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)};
}
INLINE struct words both_cvtps_epi32(struct floats a) {
    return (struct words){_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)};
}
/* a * 2^n, n whole and from -126 to 127. */
INLINE struct floats both_scalef_ps(struct floats a, struct floats n) {
    return both_mul_ps(a, as_floats(both_slli_epi32(both_add_epi32(both_cvtps_epi32(n), both_set1_epi32(127)), 23)));
}
INLINE struct floats both_cvtph_ps(__m256i halves) {
    return (struct floats){_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}
INLINE struct words both_cvtepu16_epi32(__m256i x) {
    return (struct words){_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)),
                          _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
INLINE struct words both_cvtepu8_epi32(__m128i x) {
    return (struct words){_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))};
}
INLINE struct words both_cvtepi8_epi32(__m128i x) {
    return (struct words){_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
INLINE __m256i both_cvtepi32_epi16(struct words a) { /* of at most 16 bits */
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(a.lo, a.hi), 0xd8);
}
INLINE __m128i both_cvtsepi32_epi8(struct words a) {
    __m256i shorts = _mm256_permute4x64_epi64(_mm256_packs_epi32(a.lo, a.hi), 0xd8);
    return _mm_packs_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
}
INLINE struct words both_broadcast(__m128i x) {
    return (struct words){_mm256_broadcastsi128_si256(x), _mm256_broadcastsi128_si256(x)};
}

/* Of a table of 16 the values that the low four bits of words name. */
INLINE struct floats both_permutexvar_ps(struct words at, struct floats table) {
    struct floats below = {_mm256_permutevar8x32_ps(table.lo, at.lo), _mm256_permutevar8x32_ps(table.lo, at.hi)};
    struct floats above = {_mm256_permutevar8x32_ps(table.hi, at.lo), _mm256_permutevar8x32_ps(table.hi, at.hi)};
    return both_blendv_ps(below, above, as_floats(both_slli_epi32(at, 28)));
}
/* Words in another order, each within its half. */
INLINE struct words both_permutexvar_epi32(struct words at, struct words a) {
    return (struct words){_mm256_permutevar8x32_epi32(a.lo, at.lo), _mm256_permutevar8x32_epi32(a.hi, at.hi)};
}

/* sum + w · x, two bf16 a lane. */
INLINE void dot_bf16(struct floats *sum, struct words w, struct words x) {
    const struct words high = both_set1_epi32((int)0xffff0000);
    *sum = both_fmadd_ps(as_floats(both_slli_epi32(w, 16)), as_floats(both_slli_epi32(x, 16)), *sum);
    *sum = both_fmadd_ps(as_floats(both_and_si256(w, high)), as_floats(both_and_si256(x, high)), *sum);
}

/* The same of four bytes, w 128 above its value: the one instruction there is wants w without a sign, and two products of
 * 255 and 127 are too large for its 16 bits, but two of 128 and 127 are not. */
INLINE void dot_bytes(struct words *sum, struct words w, struct words x) {
    const struct words value = {_mm256_sub_epi8(w.lo, _mm256_set1_epi8(-128)), _mm256_sub_epi8(w.hi, _mm256_set1_epi8(-128))};
    const struct words size = {_mm256_abs_epi8(value.lo), _mm256_abs_epi8(value.hi)};
    struct words pairs = both_maddubs_epi16(size, both_sign_epi8(x, value));
    *sum = both_add_epi32(*sum, both_madd_epi16(pairs, both_set1_epi16(1)));
}

/* The same of halves of bytes, w at most 15, summed in 16 bits, which is enough for SHORTS of them. */
INLINE void dot_halves(struct words *sum, struct words w, struct words x) {
    *sum = both_add_epi16(*sum, both_maddubs_epi16(w, x));
}
INLINE struct words sum_of_shorts(struct words sum, struct words shorts) {
    return both_add_epi32(sum, both_madd_epi16(shorts, both_set1_epi16(1)));
}
#define SHORTS 8
#define BYTES_ABOVE 0
#define DOT_BF16(sum, w, x) dot_bf16(&(sum), w, x)
#define DOT_BYTES(sum, w, x) dot_bytes(&(sum), w, x)
#define DOT_HALVES(sum, w, x) dot_halves(&(sum), w, x)
#define NARROW_FAST(out, x) (out) = narrow(x)

#undef _mm512_setr_epi32 /* compilers may have these as macros already */
#undef _mm512_roundscale_ps
#undef _mm512_cmp_ps_mask
#undef _mm512_shuffle_i32x4
#undef _mm512_shuffle_f32x4

#define __m512 struct floats
#define __m512i struct words
#define __mmask16 uint16_t
#define _mm512_setzero_ps() both_set1_ps(0.0f)
#define _mm512_setzero_si512() both_set1_epi32(0)
#define _mm512_set1_ps both_set1_ps
#define _mm512_set1_epi32 both_set1_epi32
#define _mm512_set1_epi8 both_set1_epi8
#define _mm512_setr_epi32(a, b, c, d, e, f, g, h, ...) \
    ((struct words){_mm256_setr_epi32(a, b, c, d, e, f, g, h), _mm256_setr_epi32(__VA_ARGS__)})
#define _mm512_castsi512_ps as_floats
#define _mm512_castps_si512 as_words
#define _mm512_add_ps both_add_ps
#define _mm512_sub_ps both_sub_ps
#define _mm512_mul_ps both_mul_ps
#define _mm512_div_ps both_div_ps
#define _mm512_max_ps both_max_ps
#define _mm512_abs_ps both_abs_ps
#define _mm512_fmadd_ps both_fmadd_ps
#define _mm512_fnmadd_ps both_fnmadd_ps
#define _mm512_scalef_ps both_scalef_ps
#define _mm512_roundscale_ps(a, places) both_round_ps(a)
#define _mm512_reduce_add_ps both_reduce_add_ps
#define _mm512_reduce_max_ps both_reduce_max_ps
#define _mm512_reduce_add_epi32 both_reduce_add_epi32
#define _mm512_cmp_ps_mask(a, b, how)                                \
    ((uint16_t)(_mm256_movemask_ps(_mm256_cmp_ps((a).lo, (b).lo, how)) | \
                _mm256_movemask_ps(_mm256_cmp_ps((a).hi, (b).hi, how)) << 8))
#define _mm512_add_epi32 both_add_epi32
#define _mm512_max_epi32 both_max_epi32
#define _mm512_and_si512 both_and_si256
#define _mm512_srli_epi16 both_srli_epi16
#define _mm512_srli_epi32 both_srli_epi32
#define _mm512_slli_epi32 both_slli_epi32
#define _mm512_loadu_ps both_loadu_ps
#define _mm512_loadu_si512 both_loadu
#define _mm512_storeu_ps both_storeu_ps
#define _mm512_storeu_si512 both_storeu
#define _mm512_maskz_loadu_ps(mask, at) as_floats(both_maskz_load(mask, at))
#define _mm512_maskz_loadu_epi32 both_maskz_load
#define _mm512_mask_storeu_ps(at, mask, a) both_mask_store(at, mask, as_words(a))
#define _mm512_mask_storeu_epi32 both_mask_store
#define _mm256_maskz_loadu_epi16 maskz_load_shorts
#define _mm256_mask_storeu_epi16 mask_store_shorts
#define _mm512_mask_mov_ps both_mask_mov_ps
#define _mm512_mask_mov_epi32(a, mask, b) as_words(both_mask_mov_ps(as_floats(a), mask, as_floats(b)))
#define _mm512_maskz_mov_ps(mask, a) as_floats(both_and_si256(lanes_of(mask), as_words(a)))
#define _mm512_mask_max_ps(a, mask, b, c) both_mask_mov_ps(a, mask, both_max_ps(b, c))
#define _mm512_cvtepi32_ps both_cvtepi32_ps
#define _mm512_cvtps_epi32 both_cvtps_epi32
#define _mm512_cvtph_ps both_cvtph_ps
#define _mm512_cvtepu16_epi32 both_cvtepu16_epi32
#define _mm512_cvtepu8_epi32 both_cvtepu8_epi32
#define _mm512_cvtepi8_epi32 both_cvtepi8_epi32
#define _mm512_cvtepi32_epi16 both_cvtepi32_epi16
#define _mm512_cvtsepi32_epi8 both_cvtsepi32_epi8
#define _mm512_broadcast_i32x4 both_broadcast
#define _mm512_permutexvar_ps both_permutexvar_ps
#define _mm512_permutexvar_epi32 both_permutexvar_epi32
#define _mm512_shuffle_epi8 both_shuffle_epi8
#define _mm512_unpacklo_epi16 both_unpacklo_epi16
#define _mm512_unpackhi_epi16 both_unpackhi_epi16
#define _mm512_unpacklo_epi32 both_unpacklo_epi32
#define _mm512_unpackhi_epi32 both_unpackhi_epi32
#define _mm512_unpacklo_epi64 both_unpacklo_epi64
#define _mm512_unpackhi_epi64 both_unpackhi_epi64
#define _mm512_shuffle_i32x4(a, b, order)                                                            \
    ((struct words){_mm256_permute2x128_si256((a).lo, (a).hi, ((order) & 3) | ((order) >> 2 & 3) << 4), \
                    _mm256_permute2x128_si256((b).lo, (b).hi, ((order) >> 4 & 3) | ((order) >> 6 & 3) << 4)})
#define _mm512_shuffle_f32x4(a, b, order) as_floats(_mm512_shuffle_i32x4(as_words(a), as_words(b), order))
