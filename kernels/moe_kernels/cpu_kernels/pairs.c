/* What lies around the products of a block: routed pairs sorted by slot, and their outputs weighed and added up. */

#include "vectors.h"

/* Whether the compiler multiplies numbers in bf16 by pairs on this CPU. */
int moe_multiplies_pairs(void) {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}

/* Sorts routed pairs by the slot of their expert and leaves out those that reach none; inside a slot they keep their
   order. chosen [pairs] are experts (numbers outside [0, experts) mean nobody), slot_of [experts] their slots, below 0
   where there is none. Writes order [...] and ends [slots], and returns how many pairs there are; -1 if a slot is
   outside [0, slots), and then ends is not what it says. */
int64_t moe_sort_pairs(const int64_t *chosen, const int64_t *slot_of, int64_t pairs, int64_t experts, int64_t slots,
                       int64_t *order, int32_t *ends) {
    for (int64_t slot = 0; slot < slots; slot++) ends[slot] = 0;
    for (int64_t pair = 0; pair < pairs; pair++) {
        const int64_t expert = chosen[pair];
        if (expert < 0 || expert >= experts || slot_of[expert] < 0) continue;
        if (slot_of[expert] >= slots) return -1;
        ends[slot_of[expert]]++;
    }
    /* Beginnings first, which move on to the ends while the pairs are placed. */
    int32_t reached = 0;
    for (int64_t slot = 0; slot < slots; slot++) {
        const int32_t number = ends[slot];
        ends[slot] = reached;
        reached += number;
    }
    for (int64_t pair = 0; pair < pairs; pair++) {
        const int64_t expert = chosen[pair];
        if (expert < 0 || expert >= experts || slot_of[expert] < 0) continue;
        order[ends[slot_of[expert]]++] = pair;
    }
    return reached;
}

INLINE float number_at(const void *from, int64_t place, int wide) {
    return wide ? ((const float *)from)[place] : float_of(((const uint16_t *)from)[place]);
}

/* sums [tokens][hidden] in fp32: of the outputs [...][hidden] of each token's pairs, each times its routing weight, in
   the order of its choices, and of novices' vectors [...][hidden] likewise. place_of [tokens * top_k] is where a pair's
   output stands, below 0 where it reached no slot; novice v is slot -1 - v. wide_*: fp32, bf16 otherwise. */
void moe_combine(const void *outputs, const int64_t *order, const void *weight, const int64_t *chosen,
                 const int64_t *slot_of, const void *novices, float *sums, int32_t *place_of, int64_t reached,
                 int64_t tokens, int64_t top_k, int64_t experts, int64_t num_novices, int64_t hidden, int wide_outputs,
                 int wide_weight, int wide_novices, int threads) {
    for (int64_t pair = 0; pair < tokens * top_k; pair++) place_of[pair] = -1;
    for (int64_t place = 0; place < reached; place++) place_of[order[place]] = (int32_t)place;

#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t token = 0; token < tokens; token++) {
        float *sum = sums + token * hidden;
        for (int64_t h = 0; h < hidden; h++) sum[h] = 0;
        for (int64_t k = 0; k < top_k; k++) {
            const int64_t pair = token * top_k + k, expert = chosen[pair];
            const float by = number_at(weight, pair, wide_weight);
            const void *from = outputs;
            int64_t row = place_of[pair];
            int wide = wide_outputs;
            if (row < 0) {
                if (expert < 0 || expert >= experts || slot_of[expert] >= 0 || -1 - slot_of[expert] >= num_novices) continue;
                from = novices, row = -1 - slot_of[expert], wide = wide_novices;
            }
            if (wide)
                for (int64_t h = 0; h < hidden; h++) sum[h] += by * ((const float *)from)[row * hidden + h];
            else
                for (int64_t h = 0; h < hidden; h++) sum[h] += by * float_of(((const uint16_t *)from)[row * hidden + h]);
        }
    }
}
