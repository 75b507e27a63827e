/* For llama.cpp's matrix-unit code under gcc 12, whose intrinsic says that it reads 8 bytes of the 64: the others may not
 * have been written by then, and the server dies of an illegal instruction. */
#ifdef __AMX_TILE__
#include <immintrin.h>
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif
