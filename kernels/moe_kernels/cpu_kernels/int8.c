/* Products of rows with int8 matrices as they are stored, each group of rows with its own:
   out = rows @ ((code - zero) * scale).T

   Codes become weights in registers, sixteen neighbours along the inputs at a time. With more rows than the registers
   hold sums for, the first of them leave the weights of four outputs in memory, which stays in a cache, for the others.
   A weight is code * scale - zero * scale in fp32, which is exact for bf16 scales. For bf16 rows it is rounded to bf16,
   as a dequantised tile is, where the CPU multiplies bf16 numbers in pairs (AVX512-BF16); elsewhere rows become fp32.
   Sums are in fp32.

   Layout: codes [slots][outputs][inputs], a byte each; scale [slots][outputs][groups], bf16 or fp32; zero, likewise, a
   byte each; no zeros mean 128. */

#include "vectors.h"

#include <stddef.h>

#include <omp.h>

/* Rows and outputs whose sums the registers hold at once. */
#define MOST_ROWS 6
#define OUTPUTS 4

/* Rows that pass all weights together, to stay in a cache meanwhile. */
#define ROWS_AT_ONCE 256

/* What is multiplied with what: PAIRS, bf16 with bf16; WIDE, fp32 with fp32. */
enum { PAIRS, WIDE };

/* Where weights come from: CODES; codes, and the weights are KEPT; weights that are SPELT out already. */
enum { CODES, KEPT, SPELT };

INLINE int size_of(const int kind) { return kind == PAIRS ? 2 : 4; }
INLINE int step_of(const int kind) { return kind == PAIRS ? 32 : 16; }

/* ---- numbers of a step in a register: of a row, of weights ---- */

INLINE __m512i load_numbers(const int kind, const char *from, int left) {
    if (left >= step_of(kind)) return _mm512_loadu_si512(from);
    if (kind == PAIRS) return _mm512_maskz_loadu_epi16((__mmask32)lowest(left), from);
    return _mm512_maskz_loadu_epi32((__mmask16)lowest(left), from);
}

INLINE __m512 sixteen_weights(const uint8_t *codes, int left, __m512 scale, __m512 shift) {
    const __m128i bytes = left >= 16 ? _mm_loadu_si128((const void *)codes)
                                     : _mm_maskz_loadu_epi8((__mmask16)lowest(left), codes);
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(bytes)), scale, shift);
}

/* What is beyond the last is no weight, and no number of a row. */
INLINE __m512i weights_of(const int kind, const uint8_t *codes, int left, __m512 scale, __m512 shift) {
    const __m512 first = sixteen_weights(codes, left, scale, shift);
#ifdef __AVX512BF16__
    if (kind == PAIRS)
        return (__m512i)_mm512_cvtne2ps_pbh(sixteen_weights(codes + 16, left - 16, scale, shift), first);
#endif
    (void)kind;
    return _mm512_castps_si512(first);
}

INLINE __m512 multiply_add(const int kind, __m512 sum, __m512i weight, __m512i x) {
#ifdef __AVX512BF16__
    if (kind == PAIRS) return _mm512_dpbf16_ps(sum, (__m512bh)weight, (__m512bh)x);
#endif
    (void)kind;
    return _mm512_fmadd_ps(_mm512_castsi512_ps(weight), _mm512_castsi512_ps(x), sum);
}

/* ---- four outputs with a block of rows ---- */

typedef struct {
    const uint8_t *codes[OUTPUTS]; /* the last repeated where there are fewer */
    const float *scale[OUTPUTS], *shift[OUTPUTS]; /* of each group */
    char *spelt; /* where the weights are spelt out: [OUTPUTS][stride] in the type to multiply in */
    int64_t stride, inputs, inner; /* inner: inputs of a group */
    int some; /* outputs that there are */
} Weights;

INLINE void add_products(const int kind, const int rows, const Weights *of, const __m512i *weight, const char *x,
                         int64_t k, int left, __m512 sum[MOST_ROWS][OUTPUTS]) {
    UNROLL for (int r = 0; r < rows; r++) {
        const __m512i row = load_numbers(kind, x + (r * of->inputs + k) * size_of(kind), left);
        UNROLL for (int o = 0; o < OUTPUTS; o++) sum[r][o] = multiply_add(kind, sum[r][o], weight[o], row);
    }
}

/* What is kept of a step may lie beyond its group: what belongs there is kept later. */
INLINE void add_codes(const int kind, const int rows, const int keep, const Weights *of, const __m512 *scale,
                      const __m512 *shift, const char *x, int64_t k, int left, __m512 sum[MOST_ROWS][OUTPUTS]) {
    __m512i weight[OUTPUTS];
    UNROLL for (int o = 0; o < OUTPUTS; o++) weight[o] = weights_of(kind, of->codes[o] + k, left, scale[o], shift[o]);
    if (keep) UNROLL for (int o = 0; o < OUTPUTS; o++)
        _mm512_storeu_si512(of->spelt + (o * of->stride + k) * size_of(kind), weight[o]);
    add_products(kind, rows, of, weight, x, k, left, sum);
}

INLINE void add_spelt(const int kind, const int rows, const Weights *of, const char *x, int64_t k, int left,
                      __m512 sum[MOST_ROWS][OUTPUTS]) {
    __m512i weight[OUTPUTS];
    UNROLL for (int o = 0; o < OUTPUTS; o++)
        weight[o] = load_numbers(kind, of->spelt + (o * of->stride + k) * size_of(kind), left);
    add_products(kind, rows, of, weight, x, k, left, sum);
}

INLINE void store(const __m512 *sum, char *out, int some, int wide_out) {
    float total[OUTPUTS];
    _mm_storeu_ps(total, add_lanes(sum[0], sum[1], sum[2], sum[3]));
    for (int o = 0; o < some; o++) {
        if (wide_out)
            ((float *)out)[o] = total[o];
        else
            ((uint16_t *)out)[o] = bf16_of(total[o]);
    }
}

INLINE void multiply(const int kind, const int rows, const int way, const Weights *of, const char *x, char *out,
                     int64_t outputs, int wide_out) {
    const int step = step_of(kind);
    __m512 sum[MOST_ROWS][OUTPUTS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int o = 0; o < OUTPUTS; o++) sum[r][o] = _mm512_setzero_ps();
    if (way == SPELT) {
        int64_t k = 0;
        for (; k + step <= of->inputs; k += step) add_spelt(kind, rows, of, x, k, step, sum);
        if (k < of->inputs) add_spelt(kind, rows, of, x, k, (int)(of->inputs - k), sum);
    } else {
        for (int64_t k = 0, group = 0; k < of->inputs; group++) {
            __m512 scale[OUTPUTS], shift[OUTPUTS];
            UNROLL for (int o = 0; o < OUTPUTS; o++) {
                scale[o] = _mm512_set1_ps(of->scale[o][group]);
                shift[o] = _mm512_set1_ps(of->shift[o][group]);
            }
            const int64_t end = k + of->inner;
            for (; k + step <= end; k += step) {
                /* What the next four outputs need. */
                UNROLL for (int o = 0; o < OUTPUTS; o++)
                    _mm_prefetch((const char *)of->codes[o] + k + OUTPUTS * of->inputs, _MM_HINT_T0);
                add_codes(kind, rows, way == KEPT, of, scale, shift, x, k, step, sum);
            }
            if (k < end) add_codes(kind, rows, way == KEPT, of, scale, shift, x, k, (int)(end - k), sum);
            k = end;
        }
    }
    UNROLL for (int r = 0; r < rows; r++) store(sum[r], out + r * outputs * (wide_out ? 4 : 2), of->some, wide_out);
}

/* ---- a matrix ---- */

typedef struct {
    const uint8_t *codes;
    const void *scale; /* bf16, or fp32 where wide_scale */
    const uint8_t *zero;
    int64_t outputs, inputs, groups;
    int wide_scale, wide_out;
} Matrix;

/* Inputs, and a step that begins with the last of them. */
INLINE int64_t stride_of(int64_t inputs) { return (inputs + 62) / 32 * 32; }

/* Bytes of a thread's own memory: scales and shifts of four outputs, and their weights. */
INLINE int64_t own_size(int64_t inputs, int64_t groups, int size) {
    return (2 * OUTPUTS * groups * (int64_t)sizeof(float) + OUTPUTS * stride_of(inputs) * size + 63) / 64 * 64;
}

static void fill_scales(const Matrix *matrix, int64_t first, int some, float *scale, float *shift) {
    const int64_t from = first * matrix->groups, number = some * matrix->groups;
    if (matrix->wide_scale) {
        memcpy(scale, (const float *)matrix->scale + from, number * sizeof *scale);
    } else {
        const uint16_t *narrow = (const uint16_t *)matrix->scale + from;
        for (int64_t k = 0; k < number; k++) scale[k] = float_of(narrow[k]);
    }
    if (matrix->zero) {
        const uint8_t *zero = matrix->zero + from;
        for (int64_t k = 0; k < number; k++) shift[k] = -(float)zero[k] * scale[k];
    } else {
        for (int64_t k = 0; k < number; k++) shift[k] = -128.0f * scale[k];
    }
}

#define CASE(n)                                                \
    case n:                                                    \
        multiply(kind, n, way, of, x, out, outputs, wide_out); \
        break;

INLINE void multiply_rows(const int kind, const int way, int64_t rows, const Weights *of, const char *x, char *out,
                          int64_t outputs, int wide_out) {
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
}

/* All rows of a group with four outputs. */
INLINE void multiply_group(const int kind, const Matrix *matrix, const char *x, char *out, int64_t rows, int64_t first,
                           char *own) {
    const int wide_out = matrix->wide_out;
    const int64_t inputs = matrix->inputs, outputs = matrix->outputs, groups = matrix->groups;
    const int64_t left = outputs - first;
    float *scale = (float *)own, *shift = scale + OUTPUTS * groups;
    Weights of = {
        .spelt = (char *)(shift + OUTPUTS * groups),
        .stride = stride_of(inputs),
        .inputs = inputs,
        .inner = inputs / groups,
        .some = left < OUTPUTS ? (int)left : OUTPUTS,
    };
    fill_scales(matrix, first, of.some, scale, shift);
    for (int o = 0; o < OUTPUTS; o++) {
        const int64_t output = o < of.some ? o : of.some - 1;
        of.codes[o] = matrix->codes + (first + output) * inputs;
        of.scale[o] = scale + output * groups, of.shift[o] = shift + output * groups;
    }
    out += first * (wide_out ? 4 : 2);
    const int64_t passes = (rows + MOST_ROWS - 1) / MOST_ROWS;
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t from = rows * pass / passes, number = rows * (pass + 1) / passes - from;
        const char *some_x = x + from * inputs * size_of(kind);
        char *to = out + from * outputs * (wide_out ? 4 : 2);
        if (passes == 1)
            multiply_rows(kind, CODES, number, &of, some_x, to, outputs, wide_out);
        else if (pass == 0)
            multiply_rows(kind, KEPT, number, &of, some_x, to, outputs, wide_out);
        else
            multiply_rows(kind, SPELT, number, &of, some_x, to, outputs, wide_out);
    }
}

#define GROUP(name, kind)                                                                                      \
    static void name(const Matrix *matrix, const char *x, char *out, int64_t rows, int64_t first, char *own) { \
        multiply_group(kind, matrix, x, out, rows, first, own);                                                \
    }
#ifdef __AVX512BF16__
GROUP(multiply_bf16, PAIRS)
#define KIND_OF_BF16 PAIRS
#else
#define multiply_bf16 multiply_fp32
#define KIND_OF_BF16 WIDE
#endif
GROUP(multiply_fp32, WIDE)

/* Whether rows are turned into fp32 first. */
INLINE int widens(int wide) { return !wide && KIND_OF_BF16 == WIDE; }

/* Bytes of the memory that moe_int8_product wants to work in. */
int64_t moe_int8_scratch(int64_t rows, int64_t inputs, int64_t groups, int wide, int threads) {
    const int64_t packed = widens(wide) ? (rows * inputs * 4 + 63) / 64 * 64 : 0;
    return packed + threads * own_size(inputs, groups, size_of(wide ? WIDE : KIND_OF_BF16));
}

/* rows [ends[slots - 1]][inputs] and out [...][outputs]: fp32 where wide, bf16 otherwise; zero may be NULL; groups
   divide inputs; scratch is aligned to 64 bytes. */
void moe_int8_product(const void *rows, const int32_t *ends, const uint8_t *codes, const void *scale,
                      const uint8_t *zero, void *out, void *scratch, int64_t slots, int64_t outputs, int64_t inputs,
                      int64_t groups, int wide, int wide_scale, int threads) {
    const int kind = wide ? WIDE : KIND_OF_BF16;
    const int64_t quads = (outputs + OUTPUTS - 1) / OUTPUTS, total = ends[slots - 1];
    const int64_t step = task_size(quads, threads), tasks = (quads + step - 1) / step;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const char *x = rows;
        char *own = scratch;
        if (widens(wide)) {
            x = scratch, own += (total * inputs * 4 + 63) / 64 * 64;
            widen(rows, scratch, total * inputs);
        }
        own += omp_get_thread_num() * own_size(inputs, groups, size_of(kind));
        for (int64_t slot = 0; slot < slots; slot++) {
            const int64_t first = slot ? ends[slot - 1] : 0, number = ends[slot] - first;
            if (number == 0) continue;
            const Matrix matrix = {
                .codes = codes + slot * outputs * inputs,
                .scale = (const char *)scale + slot * outputs * groups * (wide_scale ? 4 : 2),
                .zero = zero ? zero + slot * outputs * groups : NULL,
                .outputs = outputs,
                .inputs = inputs,
                .groups = groups,
                .wide_scale = wide_scale,
                .wide_out = wide,
            };
            const int64_t parts = (number + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE;
            for (int64_t part = 0; part < parts; part++) {
                const int64_t from = first + number * part / parts, to = first + number * (part + 1) / parts;
                const char *some_x = x + from * inputs * size_of(kind);
                char *some_out = (char *)out + from * outputs * (wide ? 4 : 2);
#pragma omp for schedule(dynamic) nowait
                for (int64_t task = 0; task < tasks; task++)
                    for (int64_t quad = task * step; quad < quads && quad < (task + 1) * step; quad++)
                        (wide ? multiply_fp32 : multiply_bf16)(&matrix, some_x, some_out, to - from, quad * OUTPUTS,
                                                               own);
            }
        }
    }
}
