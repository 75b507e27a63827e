/* Matrix units (AMX): tiles of up to 16 rows of 64 bytes, 16 by 16 sums at a time, over panels of 32 outputs as they lie.
 *
 * Two tiles of sums stand side by side, for a panel's outputs 0..15 and 16..31, and two one above the other, for up to 32
 * rows of x. A thread sets its tiles up before it multiplies and gives them back.
 */
#pragma once

#include "vectors.h"

#define MATRIX_ROWS 32 /* of x at once: two tiles */

#if !defined(AVX2) && __GNUC__ >= 12 && defined(__linux__) /* gcc 11 gets addresses of tiles wrong */
#include <sys/syscall.h>
#include <unistd.h>

#define MATRIX __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,amx-tile,amx-int8,amx-bf16")))

/* Whether the CPU has the units and the system lets this process use them, which it has to ask for. */
static inline int matrix_units(void) {
    const int request_permission = 0x1023, tile_data = 18;
    static int found = -1;
    if (found < 0)
        found = __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("amx-bf16") &&
                syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
    return found;
}

/* Sums are tiles 0 1 above 2 3, x 4 above 5, weights 6 beside 7: `rows` of x by `depth` words of four bytes. */
static inline MATRIX void set_up_tiles(int rows, int depth) {
    struct {
        uint8_t palette, start, unused[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape = {.palette = 1};
    const int above = rows < 16 ? rows : 16, below = rows > 16 ? rows - 16 : 1;
    for (int t = 0; t < 8; t++) {
        shape.bytes[t] = t == 4 || t == 5 ? 4 * depth : 64;
        shape.rows[t] = t > 5 ? depth : t == 0 || t == 1 || t == 4 ? above : below;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(shape)); /* gcc's intrinsic says that it reads less */
}

static inline MATRIX void release_tiles(void) { _tile_release(); }

/* Codes of 16 rows of x, one every `stride`, times 16 outputs of unpacked weights (depth, 32, 4) -> sums (16, 16). */
static inline __attribute__((always_inline)) MATRIX void matrix_of_bytes(const int8_t *x, long stride, const int8_t *weights,
                                                                        int32_t *sums) {
    __asm__ volatile("" : : : "memory"); /* gcc's intrinsics do not say that they read */
    _tile_zero(0);
    _tile_loadd(4, x, stride);
    _tile_loadd(6, weights, 128);
    _tile_dpbssd(0, 4, 6);
    _tile_stored(0, sums, 64);
}

/* bf16 x (rows, K), K a multiple of 32, rows `stride` bytes apart, times a panel (K / 2, 32) of pairs -> sums (rows, 32),
 * `apart` bytes, added to what is there if `more`. Asks for the panel early if nobody has read it yet: `ahead` bytes. */
static inline MATRIX void matrix_of_pairs(int rows, const void *x, long stride, long k, const uint32_t *panel, long ahead,
                                          int more, float *sums, long apart) {
    const int two = rows > 16;
    const char *above = x, *below = above + 16 * stride;
    float *under = sums + 4 * apart;
    __asm__ volatile("" : : : "memory");
    if (more) {
        _tile_loadd(0, sums, apart);
        _tile_loadd(1, sums + 16, apart);
        if (two) _tile_loadd(2, under, apart);
        if (two) _tile_loadd(3, under + 16, apart);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (long i = 0; i < 2 * k; i += 64, panel += 512) {
        for (int line = 0; line < 2048 && ahead; line += 64) _mm_prefetch((const char *)panel + ahead + line, _MM_HINT_T0);
        _tile_loadd(4, above + i, stride);
        _tile_loadd(6, panel, 128);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, panel + 16, 128);
        _tile_dpbf16ps(1, 4, 7);
        if (two) {
            _tile_loadd(5, below + i, stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, sums, apart);
    _tile_stored(1, sums + 16, apart);
    if (two) _tile_stored(2, under, apart);
    if (two) _tile_stored(3, under + 16, apart);
}

#define BY_KEYS(sums, tile, s)                                                                           \
    if (sixteens > s) {                                                                                  \
        const char *here = keys + places[s] + i;                                                         \
        _tile_loadd(tile, here, stride);                                                                 \
        _tile_dpbf16ps(sums, tile, 6);                                                                   \
        for (int r = 0; r < 16; r++) _mm_prefetch(here + ahead[s] + r * stride, _MM_HINT_T1);            \
    }

/* Up to four times 16 keys (16, D) at places, in bytes, `stride` bytes apart, D a multiple of 32, times 16 queries turned
 * (D / 2, 16), pairs, to the same bits as queries times keys -> scores (rows, 64) of the first `rows` queries, `apart`.
 * What lies `ahead` of each sixteen is asked for. */
static inline MATRIX void matrix_of_keys(int rows, const char *keys, long stride, const long *places, long sixteens,
                                         const long *ahead, const uint32_t *queries, long dim, float *scores, long apart) {
    float sums[4][16 * 16] __attribute__((aligned(64)));
    const __m512i down = _mm512_setr_epi32(0, 16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 192, 208, 224, 240);
    __asm__ volatile("" : : : "memory");
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long i = 0; i < 2 * dim; i += 64, queries += 256) {
        _tile_loadd(6, queries, 64);
        BY_KEYS(0, 4, 0)
        BY_KEYS(1, 5, 1)
        BY_KEYS(2, 4, 2)
        BY_KEYS(3, 5, 3)
    }
    _tile_stored(0, sums[0], 64);
    _tile_stored(1, sums[1], 64);
    _tile_stored(2, sums[2], 64);
    _tile_stored(3, sums[3], 64);
    __asm__ volatile("" : : : "memory");
    for (long s = 0; s < sixteens; s++)
        for (int r = 0; r < rows; r++)
            _mm512_storeu_ps(scores + r * apart + 16 * s, _mm512_i32gather_ps(down, sums[s] + r, 4));
}
#else
static inline int matrix_units(void) { return 0; }
static inline void set_up_tiles(int rows, int depth) {}
static inline void release_tiles(void) {}
static inline void matrix_of_pairs(int rows, const void *x, long stride, long k, const uint32_t *panel, long ahead, int more,
                                   float *sums, long apart) {}
static inline void matrix_of_keys(int rows, const char *keys, long stride, const long *places, long sixteens,
                                  const long *ahead, const uint32_t *queries, long dim, float *scores, long apart) {}
#endif
