/* What the products share: sixteen numbers at a time, and how work is cut. For CPUs with AVX-512. */

#ifndef MOE_VECTORS_H
#define MOE_VECTORS_H

#ifndef __AVX512F__
#error "the compiler was not told that this CPU has AVX-512: -march=native did not reach it"
#endif

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define LANES 16

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint8_t u8x16 __attribute__((vector_size(16)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))

#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 32")
#endif

INLINE f32x16 zeros(void) { return (f32x16){0}; }

INLINE f32x16 load_f32(const float *from) {
    f32x16 numbers;
    memcpy(&numbers, from, sizeof numbers);
    return numbers;
}

/* bf16 numbers are the upper halves of fp32 ones. */
INLINE f32x16 load_bf16(const uint16_t *from) {
    u16x16 halves;
    memcpy(&halves, from, sizeof halves);
    return (f32x16)(__builtin_convertvector(halves, u32x16) << 16);
}

INLINE float float_of(uint16_t half) {
    uint32_t bits = (uint32_t)half << 16;
    float number;
    memcpy(&number, &bits, sizeof number);
    return number;
}

INLINE void store_f32(float *to, f32x16 numbers) { memcpy(to, &numbers, sizeof numbers); }

/* Rounds to the nearest, to even between two; what is not a number stays none. */
INLINE void store_bf16(uint16_t *to, f32x16 numbers) {
    u32x16 bits = (u32x16)numbers;
    u32x16 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    u32x16 wrong = (u32x16)(numbers != numbers);
    u16x16 halves = __builtin_convertvector((rounded & ~wrong) | (((bits >> 16) | 0x40) & wrong), u16x16);
    memcpy(to, &halves, sizeof halves);
}

/* One number as store_bf16 rounds it. */
INLINE uint16_t bf16_of(float number) {
    uint32_t bits;
    memcpy(&bits, &number, sizeof bits);
    if (number != number) return (uint16_t)(bits >> 16 | 0x40);
    return (uint16_t)((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/* A mask of so many of the lowest bits, of all or of none too. */
INLINE uint32_t lowest(int bits) { return bits >= 32 ? ~0u : bits <= 0 ? 0 : (1u << bits) - 1; }

/* Sixteen numbers, or those that are left and zeros. */
INLINE __m512 load_floats(const float *from, int left) {
    return left >= LANES ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps((__mmask16)lowest(left), from);
}

/* Adds up the lanes of four vectors. */
INLINE __m128 add_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512d low = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d high = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512 all = _mm512_add_ps(_mm512_castpd_ps(low), _mm512_castpd_ps(high));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all),
                                      _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(all), 1)));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* Pieces of a task: enough for all threads, and for those that are late. */
INLINE int64_t task_size(int64_t pieces, int threads) {
    const int64_t size = pieces / (4 * threads);
    return size > 32 ? 32 : size < 1 ? 1 : size;
}

/* Turns bf16 numbers into fp32 ones; called by all threads of a team, which share the work and wait for its end. */
INLINE void widen(const uint16_t *narrow, float *wide, int64_t numbers) {
#pragma omp for
    for (int64_t k = 0; k < numbers; k++) wide[k] = float_of(narrow[k]);
}

#endif
