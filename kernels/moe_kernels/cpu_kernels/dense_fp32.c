/* Dense products in fp32. */

#include "vectors.h"

typedef float Weight;
typedef float Packed;
typedef __m512 Numbers;

#define STEP 16
#define REPACKED 0
#define LOAD_WEIGHT load_floats
#define LOAD_ROW load_floats
#define MULTIPLY_ADD(sum, weight, x) _mm512_fmadd_ps(weight, x, sum)
#define FROM_FLOAT(number) (number)
#define NAME(function) moe_dense_##function

#include "dense_product.h"
