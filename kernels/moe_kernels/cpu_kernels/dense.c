/* Dense products in bf16: numbers are multiplied in pairs where the CPU can (AVX512-BF16), as fp32 elsewhere. */

#include "vectors.h"

typedef uint16_t Weight;

#ifdef __AVX512BF16__

#define STEP 32
#define REPACKED 0
typedef uint16_t Packed;
typedef __m512i Numbers;

INLINE __m512i load_pairs(const uint16_t *from, int left) {
    if (left >= STEP) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi16((__mmask32)((1u << left) - 1), from);
}

#define LOAD_WEIGHT load_pairs
#define LOAD_ROW load_pairs
#define MULTIPLY_ADD(sum, weight, x) _mm512_dpbf16_ps(sum, (__m512bh)(weight), (__m512bh)(x))

#else

#define STEP 16
#define REPACKED 1
typedef float Packed;
typedef __m512 Numbers;

INLINE __m512 load_wide(const uint16_t *from, int left) {
    const __m256i halves = left >= STEP ? _mm256_loadu_si256((const void *)from)
                                        : _mm256_maskz_loadu_epi16((__mmask16)((1u << left) - 1), from);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

#define LOAD_WEIGHT load_wide
#define LOAD_ROW load_floats
#define MULTIPLY_ADD(sum, weight, x) _mm512_fmadd_ps(weight, x, sum)

#endif

#define FROM_FLOAT bf16_of
#define NAME(function) moe_dense_##function

#include "dense_product.h"
