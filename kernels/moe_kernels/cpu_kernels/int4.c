/* Products of rows with int4 matrices, each group of rows with its own: out = rows @ ((code - zero) * scale).T

   Sixteen outputs are the lanes of a vector, so that a word of each holds the codes of the same eight inputs and a
   number of a row is multiplied with all of them. Weights never exist in floating point outside of registers: a code
   looks up its number less 8, which bf16 holds exactly, scale and zero come after the sum over a quantisation group:

       sum_k (code_k - zero) * scale * x_k  =  scale * sum_k (code_k - 8) * x_k  +  scale * (8 - zero) * sum_k x_k

   Sums are in fp32. Where the CPU multiplies bf16 numbers in pairs (AVX512-BF16), bf16 rows are multiplied so, which is
   exact too; everywhere else rows become fp32, and fp32 rows always do.

   Layout: words [slots][outputs / 16][inputs / 8][16], code k of eight in bits 4k; scale [slots][outputs / 16][groups]
   [16], bf16 or fp32; zero [slots][outputs / 16][groups / 2, rounded up][16], of two groups in a byte, the first in the
   lower half; no zeros mean 8. */

#include "vectors.h"

#include <stdlib.h>

/* Rows whose sums the registers hold at once. */
#define MOST_ROWS 16

/* Words of a task stay in the second cache while all row blocks of a slot pass. */
#define TASK_BYTES (256 * 1024)

/* With few rows a sum would wait for itself: it is kept in parts, to which numbers are added in turn. */
#define PARTS(rows) ((rows) == 1 ? 4 : (rows) <= 5 ? 2 : 1)

typedef struct {
    int64_t slot, first, rows;
} RowBlock;

typedef struct {
    const uint32_t *words;
    const void *scale;
    const uint8_t *zero;
    int64_t groups, inner; /* inner: inputs of a group */
    int wide_scale;
} Matrix;

INLINE f32x16 scale_of(const Matrix *of, int64_t group) {
    if (of->wide_scale) return load_f32((const float *)of->scale + group * LANES);
    return load_bf16((const uint16_t *)of->scale + group * LANES);
}

/* 8 - zero of sixteen outputs. */
INLINE f32x16 shift_of(const Matrix *of, int64_t group) {
    u8x16 both;
    memcpy(&both, of->zero + group / 2 * LANES, sizeof both);
    const u32x16 zero = __builtin_convertvector(both, u32x16) >> (group % 2 * 4) & 15;
    return __builtin_convertvector(8 - (i32x16)zero, f32x16);
}

/* ---- rows in fp32: packed [groups][rows][inner] ---- */

INLINE f32x16 number_of(u32x16 codes) {
    /* The lookup reads the lowest four bits of each lane only. */
    const f32x16 table = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    return (f32x16)_mm512_permutexvar_ps((__m512i)codes, (__m512)table);
}

INLINE void group_fp32(const int rows, const uint32_t *words, const float *x, int64_t inner, f32x16 *sum) {
    for (int64_t k = 0; k < inner; k += 8, words += LANES) {
        u32x16 word;
        memcpy(&word, words, sizeof word);
        __builtin_prefetch(words + 16 * LANES);
        UNROLL for (int j = 0; j < 8; j++) {
            const f32x16 weight = number_of(word >> (4 * j));
            UNROLL for (int r = 0; r < rows; r++) sum[r * PARTS(rows) + j % PARTS(rows)] += weight * x[r * inner + k + j];
        }
    }
}

/* ---- rows in bf16, in pairs: packed [groups][rows][inner / 2], numbers k and k + 4 of eight in one word ---- */

#ifdef __AVX512BF16__
INLINE void group_bf16(const int rows, const uint32_t *words, const uint32_t *x, int64_t inner, f32x16 *sum) {
    /* -8 to 7 in bf16. The lookup reads five bits of each half lane, of which the fifth belongs to the next code. */
    const __m256i once = _mm256_setr_epi16((short)0xC100, (short)0xC0E0, (short)0xC0C0, (short)0xC0A0, (short)0xC080,
                                           (short)0xC040, (short)0xC000, (short)0xBF80, 0, 0x3F80, 0x4000, 0x4040,
                                           0x4080, 0x40A0, 0x40C0, 0x40E0);
    const __m512i table = _mm512_broadcast_i64x4(once);
    for (int64_t k = 0; k < inner; k += 8, words += LANES) {
        const __m512i word = _mm512_loadu_si512(words);
        __builtin_prefetch(words + 16 * LANES);
        UNROLL for (int j = 0; j < 4; j++) {
            const __m512bh weight = (__m512bh)_mm512_permutexvar_epi16(_mm512_srli_epi32(word, 4 * j), table);
            UNROLL for (int r = 0; r < rows; r++) {
                const __m512bh pair = (__m512bh)_mm512_set1_epi32((int)x[(r * inner + k) / 2 + j]);
                f32x16 *part = &sum[r * PARTS(rows) + j % PARTS(rows)];
                *part = (f32x16)_mm512_dpbf16_ps((__m512)*part, weight, pair);
            }
        }
    }
}
#else
INLINE void group_bf16(const int rows, const uint32_t *words, const uint32_t *x, int64_t inner, f32x16 *sum) {
    (void)rows, (void)words, (void)x, (void)inner, (void)sum;
}
#endif

/* ---- a block of rows with sixteen outputs ---- */

INLINE void multiply(const int rows, const int pairs, const Matrix *of, const void *x, const float *sums_of_x,
                     f32x16 *total) {
    UNROLL for (int r = 0; r < rows; r++) total[r] = zeros();
    for (int64_t group = 0; group < of->groups; group++) {
        f32x16 sum[MOST_ROWS];
        for (int part = 0; part < rows * PARTS(rows); part++) sum[part] = zeros();
        const uint32_t *words = of->words + group * of->inner / 8 * LANES;
        const int64_t start = group * rows * of->inner;
        if (pairs)
            group_bf16(rows, words, (const uint32_t *)x + start / 2, of->inner, sum);
        else
            group_fp32(rows, words, (const float *)x + start, of->inner, sum);
        UNROLL for (int r = 0; r < rows; r++) {
            f32x16 whole = sum[r * PARTS(rows)];
            for (int part = 1; part < PARTS(rows); part++) whole += sum[r * PARTS(rows) + part];
            sum[r] = whole;
        }
        const f32x16 scale = scale_of(of, group);
        UNROLL for (int r = 0; r < rows; r++) total[r] += sum[r] * scale;
        if (of->zero) {
            const f32x16 shift = scale * shift_of(of, group);
            UNROLL for (int r = 0; r < rows; r++) total[r] += shift * sums_of_x[group * rows + r];
        }
    }
}

#define CASE(n)                                                          \
    case n:                                                              \
        if (pairs)                                                       \
            multiply(n, 1, of, x, sums_of_x, total);                     \
        else                                                             \
            multiply(n, 0, of, x, sums_of_x, total);                     \
        break;

static void multiply_rows(int64_t rows, int pairs, const Matrix *of, const void *x, const float *sums_of_x,
                          f32x16 *total) {
    switch (rows) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8)
        CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15) CASE(16)
    }
}

/* ---- rows, packed ---- */

static void pack_rows(const RowBlock *block, const void *rows, int wide, int pairs, int64_t inputs, int64_t groups,
                      void *packed, float *sums) {
    const int64_t inner = inputs / groups;
    for (int64_t r = 0; r < block->rows; r++) {
        const int64_t row = (block->first + r) * inputs;
        for (int64_t group = 0; group < groups; group++) {
            const int64_t from = row + group * inner, to = (group * block->rows + r) * inner;
            const uint16_t *narrow_x = (const uint16_t *)rows + from;
            const float *wide_x = (const float *)rows + from;
            float sum = 0;
            if (pairs) {
                uint32_t *out = (uint32_t *)packed + to / 2;
                for (int64_t k = 0; k < inner; k += 8)
                    for (int j = 0; j < 4; j++)
                        out[k / 2 + j] = narrow_x[k + j] | (uint32_t)narrow_x[k + 4 + j] << 16;
                for (int64_t k = 0; k < inner; k++) sum += float_of(narrow_x[k]);
            } else {
                float *out = (float *)packed + to;
                for (int64_t k = 0; k < inner; k++) sum += out[k] = wide ? wide_x[k] : float_of(narrow_x[k]);
            }
            sums[group * block->rows + r] = sum;
        }
    }
}

static int64_t cut_rows(const int32_t *ends, int64_t slots, RowBlock *blocks) {
    int64_t number = 0, first = 0;
    for (int64_t slot = 0; slot < slots; slot++) {
        const int64_t rows = ends[slot] - first, parts = (rows + MOST_ROWS - 1) / MOST_ROWS;
        for (int64_t part = 0; part < parts; part++) {
            const int64_t from = rows * part / parts, to = rows * (part + 1) / parts;
            blocks[number++] = (RowBlock){slot, first + from, to - from};
        }
        first = ends[slot];
    }
    return number;
}

/* Bytes of the memory that moe_int4_product wants to work in. */
int64_t moe_int4_scratch(int64_t rows, int64_t inputs, int64_t groups, int wide) {
#ifdef __AVX512BF16__
    const int64_t size = wide ? 4 : 2;
#else
    const int64_t size = 4;
    (void)wide;
#endif
    return rows * (inputs * size + groups * (int64_t)sizeof(float)) + (rows + 1) * (int64_t)sizeof(RowBlock);
}

/* rows [ends[slots - 1]][inputs] and out [...][outputs]: fp32 where wide, bf16 otherwise. zero may be NULL. scratch is
   aligned to 64 bytes. */
void moe_int4_product(const void *rows, const int32_t *ends, const uint32_t *words, const void *scale,
                      const uint8_t *zero, void *out, void *scratch, int64_t slots, int64_t outputs, int64_t inputs,
                      int64_t groups, int wide, int wide_scale, int threads) {
    const int64_t total_rows = ends[slots - 1], inner = inputs / groups, columns = outputs / LANES;
#ifdef __AVX512BF16__
    const int pairs = !wide;
#else
    const int pairs = 0;
#endif
    const int64_t size = pairs ? 2 : 4;
    char *packed = scratch;
    float *sums = (float *)(packed + total_rows * inputs * size);
    RowBlock *blocks = (RowBlock *)(sums + total_rows * groups + (total_rows * groups & 1));
    const int64_t number = cut_rows(ends, slots, blocks);
    int64_t step = TASK_BYTES / (LANES * inputs / 2);
    const int64_t fair = columns / (2 * threads);
    if (step > fair) step = fair;
    if (step < 1) step = 1;
    const int64_t tasks = (columns + step - 1) / step;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t b = 0; b < number; b++)
            pack_rows(&blocks[b], rows, wide, pairs, inputs, groups, packed + blocks[b].first * inputs * size,
                      sums + blocks[b].first * groups);

        int64_t start = 0;
        while (start < number) {
            int64_t stop = start;
            while (stop < number && blocks[stop].slot == blocks[start].slot) stop++;
            const int64_t slot = blocks[start].slot;
#pragma omp for schedule(dynamic) nowait
            for (int64_t task = 0; task < tasks; task++) {
                const int64_t end = task * step + step < columns ? task * step + step : columns;
                for (int64_t b = start; b < stop; b++) {
                    const RowBlock *block = &blocks[b];
                    for (int64_t column = task * step; column < end; column++) {
                        const int64_t place = slot * columns + column;
                        const Matrix matrix = {
                            .words = words + place * (inputs / 8) * LANES,
                            .scale = (const char *)scale + place * groups * LANES * (wide_scale ? 4 : 2),
                            .zero = zero ? zero + place * ((groups + 1) / 2) * LANES : NULL,
                            .groups = groups,
                            .inner = inner,
                            .wide_scale = wide_scale,
                        };
                        f32x16 total[MOST_ROWS];
                        multiply_rows(block->rows, pairs, &matrix, packed + block->first * inputs * size,
                                      sums + block->first * groups, total);
                        for (int64_t r = 0; r < block->rows; r++) {
                            const int64_t to = (block->first + r) * outputs + column * LANES;
                            if (wide)
                                store_f32((float *)out + to, total[r]);
                            else
                                store_bf16((uint16_t *)out + to, total[r]);
                        }
                    }
                }
            }
            start = stop;
        }
    }
}
