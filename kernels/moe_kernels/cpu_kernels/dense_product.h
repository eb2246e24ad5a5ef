/* Products of rows with dense matrices as they lie, each group of rows with its own: out = rows @ weight.T

   For few rows, where a product takes as long as to read the weights: each is read once from memory and serves all rows
   of its group while it is in a cache. Sums are in fp32, over sixteen lanes along the inputs.

   The file that includes this one says what is multiplied and how: Weight (type of weights, rows and results), Packed
   (type of a row's numbers as they are multiplied) and REPACKED (whether it is fp32 for bf16), Numbers (a vector), STEP
   (numbers in one), LOAD_WEIGHT, LOAD_ROW, MULTIPLY_ADD, FROM_FLOAT, and NAME for its functions. */

#include <stddef.h>

/* Rows and outputs whose sums the registers hold at once. */
#define MOST_ROWS 6
#define OUTPUTS 4

typedef struct {
    const Weight *weight[OUTPUTS]; /* of each output, the last repeated where there are fewer */
    const Weight *next; /* what the next pass over other weights will read: rows of it to ask for meanwhile */
    int next_rows;
    int64_t inputs;
} Weights;

INLINE void add_step(const int rows, const Weight *const *weight, const Packed *x, int64_t inputs, int64_t k,
                     int left, __m512 sum[MOST_ROWS][OUTPUTS]) {
    Numbers numbers[OUTPUTS];
    UNROLL for (int o = 0; o < OUTPUTS; o++) numbers[o] = LOAD_WEIGHT(weight[o] + k, left);
    UNROLL for (int r = 0; r < rows; r++) {
        const Numbers row = LOAD_ROW(x + r * inputs + k, left);
        UNROLL for (int o = 0; o < OUTPUTS; o++) sum[r][o] = MULTIPLY_ADD(sum[r][o], numbers[o], row);
    }
}

INLINE void multiply(const int rows, const Weights *of, const Packed *x, Weight *out, int64_t outputs, int some) {
    __m512 sum[MOST_ROWS][OUTPUTS];
    const Weight *const *weight = of->weight;
    UNROLL for (int r = 0; r < rows; r++) UNROLL for (int o = 0; o < OUTPUTS; o++) sum[r][o] = _mm512_setzero_ps();
    int64_t k = 0;
    for (; k + STEP <= of->inputs; k += STEP) {
        if (of->next) {
            for (int o = 0; o < of->next_rows; o++) _mm_prefetch((const char *)(of->next + o * of->inputs + k), _MM_HINT_T1);
        } else {
            /* Past the last output this asks for what may not be there, which does nothing. */
            UNROLL for (int o = 0; o < OUTPUTS; o++)
                _mm_prefetch((const char *)(weight[o] + OUTPUTS * of->inputs + k), _MM_HINT_T1);
        }
        add_step(rows, weight, x, of->inputs, k, STEP, sum);
    }
    if (k < of->inputs) add_step(rows, weight, x, of->inputs, k, (int)(of->inputs - k), sum);
    UNROLL for (int r = 0; r < rows; r++) {
        float total[OUTPUTS];
        _mm_storeu_ps(total, add_lanes(sum[r][0], sum[r][1], sum[r][2], sum[r][3]));
        for (int o = 0; o < some; o++) out[r * outputs + o] = FROM_FLOAT(total[o]);
    }
}

/* One row: a weight's row after the other, which the machine sees coming by itself. */
static void multiply_one(const Weights *of, const Packed *x, Weight *out, int some) {
    __m512 sum[OUTPUTS];
    for (int o = 0; o < OUTPUTS; o++) {
        const Weight *weight = of->weight[o];
        __m512 part[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
        int64_t k = 0;
        for (; k + 4 * STEP <= of->inputs; k += 4 * STEP) {
            UNROLL for (int p = 0; p < 4; p++) {
                part[p] = MULTIPLY_ADD(part[p], LOAD_WEIGHT(weight + k + p * STEP, STEP), LOAD_ROW(x + k + p * STEP, STEP));
            }
        }
        for (; k < of->inputs; k += STEP) {
            const int left = of->inputs - k < STEP ? (int)(of->inputs - k) : STEP;
            part[0] = MULTIPLY_ADD(part[0], LOAD_WEIGHT(weight + k, left), LOAD_ROW(x + k, left));
        }
        sum[o] = _mm512_add_ps(_mm512_add_ps(part[0], part[1]), _mm512_add_ps(part[2], part[3]));
    }
    float total[OUTPUTS];
    _mm_storeu_ps(total, add_lanes(sum[0], sum[1], sum[2], sum[3]));
    for (int o = 0; o < some; o++) out[o] = FROM_FLOAT(total[o]);
}

#define CASE(n)                                      \
    case n:                                          \
        multiply(n, of, x, out, outputs, some);      \
        break;

static void multiply_rows(int64_t rows, const Weights *of, const Packed *x, Weight *out, int64_t outputs, int some) {
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) }
}

/* All rows of a group with four outputs. */
static void multiply_group(const Weight *weight, const Packed *x, Weight *out, int64_t rows, int64_t outputs,
                           int64_t inputs, int64_t first) {
    const int64_t passes = (rows + MOST_ROWS - 1) / MOST_ROWS;
    const int64_t left = outputs - first, after = outputs - first - OUTPUTS;
    const int some = left < OUTPUTS ? (int)left : OUTPUTS;
    Weights of = {.inputs = inputs};
    for (int o = 0; o < OUTPUTS; o++) of.weight[o] = weight + (first + (o < some ? o : some - 1)) * inputs;
    /* The first pass reads the weights and asks for the next ones; the others ask again, a few rows each: by then there
       is time for it. */
    const int64_t share = passes > 1 ? (OUTPUTS + passes - 2) / (passes - 1) : 0;
    for (int64_t pass = 0; pass < passes; pass++) {
        const int64_t from = rows * pass / passes, to = rows * (pass + 1) / passes, asked = (pass - 1) * share;
        of.next = NULL, of.next_rows = 0;
        if (pass > 0) {
            const int64_t most = asked + share < after ? share : after - asked;
            of.next = weight + (first + OUTPUTS + asked) * inputs;
            of.next_rows = most < 0 || asked >= OUTPUTS ? 0 : (int)most;
        }
        if (rows == 1)
            multiply_one(&of, x, out + first, some);
        else
            multiply_rows(to - from, &of, x + from * inputs, out + from * outputs + first, outputs, some);
    }
}

/* Bytes of the memory that the product wants to work in. */
int64_t NAME(scratch)(int64_t rows, int64_t inputs) { return REPACKED ? rows * inputs * (int64_t)sizeof(Packed) : 0; }

/* rows [ends[slots - 1]][inputs], weight [slots][outputs][inputs] and out [...][outputs] in one type; scratch is aligned
   to 64 bytes. */
void NAME(product)(const Weight *rows, const int32_t *ends, const Weight *weight, Weight *out, void *scratch,
                   int64_t slots, int64_t outputs, int64_t inputs, int threads) {
    const int64_t quads = (outputs + OUTPUTS - 1) / OUTPUTS;
    const int64_t step = task_size(quads, threads), tasks = (quads + step - 1) / step;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const Packed *x = REPACKED ? scratch : (const void *)rows;
        if (REPACKED) widen((const uint16_t *)rows, scratch, ends[slots - 1] * inputs);
        for (int64_t slot = 0; slot < slots; slot++) {
            const int64_t first = slot ? ends[slot - 1] : 0, number = ends[slot] - first;
            if (number == 0) continue;
#pragma omp for schedule(dynamic) nowait
            for (int64_t task = 0; task < tasks; task++)
                for (int64_t quad = task * step; quad < quads && quad < (task + 1) * step; quad++)
                    multiply_group(weight + slot * outputs * inputs, x + first * inputs, out + first * outputs, number,
                                   outputs, inputs, quad * OUTPUTS);
        }
    }
}
