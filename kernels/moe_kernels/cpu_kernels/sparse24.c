/* Products of rows with matrices of the pattern 2:4 as they are stored, each group of rows with its own:
   out = rows @ weight.T

   A vector of values stands for twice as many inputs, which are two vectors of a row: exactly what one instruction
   looks numbers up in. The places of the values, two bits each, become its indices, once for all rows. So there are two
   instructions for a vector of values and a row, and no zero is ever multiplied. Sums are in fp32; bf16 numbers are
   multiplied in pairs where the CPU can (AVX512-BF16), as fp32 elsewhere, and fp32 numbers always so.

   Layout: values [slots][outputs][inputs / 2], bf16 or fp32; metadata [slots][outputs][ceil(inputs / 8)], places of
   eight inputs in a byte, the first in the lowest bits. */

#include "vectors.h"

#include <stddef.h>

/* Rows and outputs whose sums the registers hold at once. */
#define MOST_ROWS 5
#define OUTPUTS 4

/* A row of so many bytes stays in the first cache while the weights of one output after the other pass. */
#define SHORT_ROW (16 * 1024)

/* Rows of so many bytes pass all weights before the next ones do: they stay in the last cache, of which each core has a
   few MiB. */
#define CHUNK (4 * 1024 * 1024)

/* Loaded once, and not from the cache again for each output. */
#define IN_REGISTERS(a, b) __asm__("" : "+v"(a), "+v"(b))

/* What is multiplied with what: PAIRS, bf16 with bf16; NARROW, bf16 with fp32; WIDE, fp32 with fp32. */
enum { PAIRS, NARROW, WIDE };

INLINE int size_of_values(const int kind) { return kind == WIDE ? 4 : 2; }
INLINE int size_of_rows(const int kind) { return kind == PAIRS ? 2 : 4; }
/* Inputs of a step. */
INLINE int step_of(const int kind) { return kind == PAIRS ? 64 : 32; }

/* The values of a step, or of the inputs that are left of it, and zeros. */
INLINE __m512i load_values(const int kind, const char *from, int left) {
    const int whole = left >= step_of(kind);
    if (kind == WIDE) {
        if (whole) return _mm512_loadu_si512(from);
        return _mm512_maskz_loadu_epi32((__mmask16)lowest(left / 2), from);
    }
    if (kind == PAIRS) {
        if (whole) return _mm512_loadu_si512(from);
        return _mm512_maskz_loadu_epi16((__mmask32)lowest(left / 2), from);
    }
    const __m256i halves = whole ? _mm256_loadu_si256((const void *)from)
                                 : _mm256_maskz_loadu_epi16((__mmask16)lowest(left / 2), from);
    return _mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

/* A vector of a row, or the numbers that are left of it, and zeros. */
INLINE __m512i load_row(const int kind, const char *from, int left) {
    if (kind == PAIRS) {
        if (left >= 32) return _mm512_loadu_si512(from);
        return _mm512_maskz_loadu_epi16((__mmask32)lowest(left), from);
    }
    if (left >= 16) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi32((__mmask16)lowest(left), from);
}

/* The bytes of at most 64 inputs, and zeros. */
INLINE long long load_bytes(const uint8_t *from, int inputs) {
    long long bits;
    int few;
    if (inputs == 64) return memcpy(&bits, from, 8), bits;
    if (inputs == 32) return memcpy(&few, from, 4), few;
    return _mm_cvtsi128_si64(_mm_maskz_loadu_epi8((__mmask16)lowest((inputs + 7) / 8), from));
}

/* Where the partners of the values of a step stand in it. */
INLINE __m512i load_places(const int kind, const uint8_t *from, int left) {
    if (kind == PAIRS) {
        const long long bits = load_bytes(from, left);
        /* The byte of four values in the lanes of all four, and in each the two bits of its own moved down. */
        const __m512i bytes = _mm512_set_epi64(0x8007800780078007, 0x8006800680068006, 0x8005800580058005,
                                               0x8004800480048004, 0x8003800380038003, 0x8002800280028002,
                                               0x8001800180018001, 0x8000800080008000);
        const __m512i m = _mm512_srlv_epi16(_mm512_shuffle_epi8(_mm512_set1_epi64(bits), bytes),
                                            _mm512_set1_epi64(0x0006000400020000));
        const __m512i first = _mm512_set_epi32(0x3c003c, 0x380038, 0x340034, 0x300030, 0x2c002c, 0x280028, 0x240024,
                                               0x200020, 0x1c001c, 0x180018, 0x140014, 0x100010, 0x0c000c, 0x080008,
                                               0x040004, 0);
        return _mm512_or_si512(_mm512_and_si512(m, _mm512_set1_epi16(3)), first);
    }
    const int bits = (int)load_bytes(from, left);
    const __m512i down = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i first = _mm512_setr_epi32(0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28);
    const __m512i m = _mm512_srlv_epi32(_mm512_set1_epi32(bits), down);
    return _mm512_or_si512(_mm512_and_si512(m, _mm512_set1_epi32(3)), first);
}

INLINE __m512 multiply_add(const int kind, __m512 sum, __m512i values, __m512i places, __m512i low, __m512i high) {
#ifdef __AVX512BF16__
    if (kind == PAIRS)
        return _mm512_dpbf16_ps(sum, (__m512bh)values, (__m512bh)_mm512_permutex2var_epi16(low, places, high));
#endif
    return _mm512_fmadd_ps((__m512)values, _mm512_permutex2var_ps((__m512)low, places, (__m512)high), sum);
}

/* Some outputs of a matrix. */
typedef struct {
    const char *values[OUTPUTS]; /* the last repeated where there are fewer */
    const uint8_t *places[OUTPUTS];
    const char *next; /* values of other outputs, read after these: rows of them to ask for meanwhile */
    int next_rows, some;
    int64_t inputs;
} Weights;

INLINE void add_step(const int kind, const int rows, const Weights *of, const char *x, int64_t k, int left,
                     __m512 sum[MOST_ROWS][OUTPUTS]) {
    const int half = step_of(kind) / 2, size = size_of_rows(kind);
    __m512i values[OUTPUTS], places[OUTPUTS];
    UNROLL for (int o = 0; o < OUTPUTS; o++) {
        values[o] = load_values(kind, of->values[o] + k / 2 * size_of_values(kind), left);
        places[o] = load_places(kind, of->places[o] + k / 8, left);
    }
    UNROLL for (int r = 0; r < rows; r++) {
        const char *row = x + (r * of->inputs + k) * size;
        __m512i low = load_row(kind, row, left);
        __m512i high = load_row(kind, row + half * size, left - half);
        IN_REGISTERS(low, high);
        UNROLL for (int o = 0; o < OUTPUTS; o++)
            sum[r][o] = multiply_add(kind, sum[r][o], values[o], places[o], low, high);
    }
}

INLINE __m512 add_one(const int kind, __m512 sum, const Weights *of, int o, const char *x, int64_t k, int left) {
    const int half = step_of(kind) / 2, size = size_of_rows(kind);
    return multiply_add(kind, sum, load_values(kind, of->values[o] + k / 2 * size_of_values(kind), left),
                        load_places(kind, of->places[o] + k / 8, left), load_row(kind, x + k * size, left),
                        load_row(kind, x + (k + half) * size, left - half));
}

INLINE void store(const int kind, const float *total, char *out, int some) {
    if (kind == WIDE)
        memcpy(out, total, some * sizeof *total);
    else
        for (int o = 0; o < some; o++) ((uint16_t *)out)[o] = bf16_of(total[o]);
}

INLINE void multiply_block(const int kind, const int rows, const Weights *of, const char *x, char *out,
                           int64_t outputs) {
    const int step = step_of(kind), size = size_of_values(kind);
    __m512 sum[MOST_ROWS][OUTPUTS];
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int o = 0; o < OUTPUTS; o++) sum[r][o] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + step <= of->inputs; k += step) {
        for (int o = 0; o < of->next_rows; o++) _mm_prefetch(of->next + (o * of->inputs + k) / 2 * size, _MM_HINT_T1);
        add_step(kind, rows, of, x, k, step, sum);
    }
    if (k < of->inputs) add_step(kind, rows, of, x, k, (int)(of->inputs - k), sum);
    UNROLL for (int r = 0; r < rows; r++) {
        float total[OUTPUTS];
        _mm_storeu_ps(total, add_lanes(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
        store(kind, total, out + r * outputs * size, of->some);
    }
}

/* One short row: one output after the other, which the machine sees coming by itself. */
INLINE void multiply_one(const int kind, const Weights *of, const char *x, char *out) {
    const int step = step_of(kind);
    __m512 sum[OUTPUTS];
    for (int o = 0; o < OUTPUTS; o++) {
        /* Independent sums: a multiplication need not wait for the one before. */
        __m512 part[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        int64_t k = 0;
        for (; k + 4 * step <= of->inputs; k += 4 * step)
            UNROLL for (int p = 0; p < 4; p++) part[p] = add_one(kind, part[p], of, o, x, k + p * step, step);
        for (; k < of->inputs; k += step) {
            const int left = of->inputs - k < step ? (int)(of->inputs - k) : step;
            part[0] = add_one(kind, part[0], of, o, x, k, left);
        }
        sum[o] = _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
    }
    float total[OUTPUTS];
    _mm_storeu_ps(total, add_lanes(sum[0], sum[1], sum[2], sum[3]));
    store(kind, total, out, of->some);
}

#define CASE(n)                                       \
    case n:                                           \
        multiply_block(kind, n, of, x, out, outputs); \
        break;

INLINE void multiply_rows(const int kind, int64_t rows, const Weights *of, const char *x, char *out, int64_t outputs) {
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) }
}

/* All rows of a group with four outputs. */
INLINE void multiply_group(const int kind, const char *values, const uint8_t *metadata, const char *x, char *out,
                           int64_t rows, int64_t outputs, int64_t inputs, int64_t first) {
    const int size = size_of_values(kind);
    const int64_t passes = (rows + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t left = outputs - first, after = outputs - first - OUTPUTS;
    Weights of = {.inputs = inputs, .some = left < OUTPUTS ? (int)left : OUTPUTS};
    for (int o = 0; o < OUTPUTS; o++) {
        const int64_t output = first + (o < of.some ? o : of.some - 1);
        of.values[o] = values + output * (inputs / 2) * size;
        of.places[o] = metadata + output * ((inputs + 7) / 8);
    }
    out += first * size;
    if (rows == 1 && inputs * size_of_rows(kind) <= SHORT_ROW) {
        multiply_one(kind, &of, x, out);
        return;
    }
    /* The first pass reads the weights, asked for before; the others ask for the next ones, a few rows each. One pass
       alone asks for all of them. */
    const int64_t share = passes > 1 ? (OUTPUTS + passes - 2) / (passes - 1) : OUTPUTS;
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t from = rows * pass / passes, to = rows * (pass + 1) / passes;
        const int64_t asked = (passes > 1 ? pass - 1 : 0) * share, last = after < OUTPUTS ? after : OUTPUTS;
        of.next_rows = 0;
        if (asked >= 0 && asked < last) {
            of.next = values + (first + OUTPUTS + asked) * (inputs / 2) * size;
            of.next_rows = (int)(last - asked < share ? last - asked : share);
        }
        multiply_rows(kind, to - from, &of, x + from * inputs * size_of_rows(kind), out + from * outputs * size,
                      outputs);
    }
}

#ifdef __AVX512BF16__
#define KIND_OF_BF16 PAIRS
#else
#define KIND_OF_BF16 NARROW
#endif

typedef void (*Multiply)(const char *, const uint8_t *, const char *, char *, int64_t, int64_t, int64_t, int64_t);

static void multiply_bf16(const char *values, const uint8_t *metadata, const char *x, char *out, int64_t rows,
                          int64_t outputs, int64_t inputs, int64_t first) {
    multiply_group(KIND_OF_BF16, values, metadata, x, out, rows, outputs, inputs, first);
}

static void multiply_fp32(const char *values, const uint8_t *metadata, const char *x, char *out, int64_t rows,
                          int64_t outputs, int64_t inputs, int64_t first) {
    multiply_group(WIDE, values, metadata, x, out, rows, outputs, inputs, first);
}

/* Bytes of the memory that moe_sparse24_product wants to work in. */
int64_t moe_sparse24_scratch(int64_t rows, int64_t inputs, int wide) {
    return !wide && KIND_OF_BF16 == NARROW ? rows * inputs * 4 : 0;
}

/* rows [ends[slots - 1]][inputs], values and out [...][outputs]: fp32 where wide, bf16 otherwise; inputs is a multiple
   of four; scratch is aligned to 64 bytes. */
void moe_sparse24_product(const void *rows, const int32_t *ends, const void *values, const uint8_t *metadata, void *out,
                          void *scratch, int64_t slots, int64_t outputs, int64_t inputs, int wide, int threads) {
    const int kind = wide ? WIDE : KIND_OF_BF16;
    const Multiply multiply = wide ? multiply_fp32 : multiply_bf16;
    const int64_t quads = (outputs + OUTPUTS - 1) / OUTPUTS, size = size_of_values(kind);
    const int64_t step = task_size(quads, threads), tasks = (quads + step - 1) / step;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const char *x = rows;
        if (kind == NARROW) {
            x = scratch;
            widen(rows, scratch, ends[slots - 1] * inputs);
        }
        for (int64_t slot = 0; slot < slots; slot++) {
            const int64_t first = slot ? ends[slot - 1] : 0, number = ends[slot] - first;
            if (number == 0) continue;
            const char *values_of_slot = (const char *)values + slot * outputs * (inputs / 2) * size;
            const uint8_t *places_of_slot = metadata + slot * outputs * ((inputs + 7) / 8);
            const int64_t bytes = number * inputs * size_of_rows(kind), chunks = (bytes + CHUNK - 1) / CHUNK;
            for (int64_t chunk = 0; chunk < chunks; chunk++) {
                const int64_t from = first + number * chunk / chunks, to = first + number * (chunk + 1) / chunks;
                const char *x_of_chunk = x + from * inputs * size_of_rows(kind);
                char *out_of_chunk = (char *)out + from * outputs * size;
                if (from == to) continue;
#pragma omp for schedule(dynamic) nowait
                for (int64_t task = 0; task < tasks; task++)
                    for (int64_t quad = task * step; quad < quads && quad < (task + 1) * step; quad++)
                        multiply(values_of_slot, places_of_slot, x_of_chunk, out_of_chunk, to - from, outputs, inputs,
                                 quad * OUTPUTS);
            }
        }
    }
}
