/* ecsq: whole steps of a deviation, a byte each until they are entropy coded. */
#ifndef KVSTORE_ECSQ_CUH
#define KVSTORE_ECSQ_CUH

#include "scales.cuh"

/* A step too small to have an inverse codes nothing: all codes are zero. */
KV_INLINE float kv_ecsq_step(float deviation, float delta) {
    float step = kv_mul(deviation, delta);
    return step < 1.1754943508222875e-38f ? 0.0f : step;
}

/* Whole steps away from the centre, within *bound* and one more. NaN, which makes a section unfit, is
 * as good as zero. */
KV_INLINE int32_t kv_ecsq_code(float away, float inverse, uint32_t bound) {
    float most = kv_float_of_small((int32_t)bound + 1), steps = kv_mul(away, inverse);
    return kv_rint(steps == steps ? kv_max(kv_min(steps, most), -most) : 0.0f);
}

/* A code plus *bound*; twice that and one for what lies further. */
KV_INLINE uint32_t kv_ecsq_symbol(int32_t code, uint32_t bound) {
    int32_t bounds = (int32_t)bound;
    return (uint32_t)(code > bounds || code < -bounds ? 2 * bounds + 1 : code + bounds);
}

/* The value of a symbol that is no escape. */
KV_INLINE float kv_ecsq_value(uint32_t symbol, uint32_t bound, float step, float mean) {
    return kv_add(kv_mul(kv_float_of_small((int32_t)(symbol - bound)), step), mean);
}

#endif
