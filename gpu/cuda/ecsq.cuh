/* ecsq: whole steps of a deviation, a byte each until they are entropy coded. */
#ifndef KVSTORE_ECSQ_CUH
#define KVSTORE_ECSQ_CUH

#include "scales.cuh"

/* A step too small to have an inverse codes nothing: all codes are zero. */
KV_INLINE float kv_ecsq_step(float deviation, float delta) {
    float step = kv_mul(deviation, delta);
    return step < 1.1754943508222875e-38f ? 0.0f : step;
}

/* Steps away from the centre plus *bound*; twice that and one for what lies further. NaN, which makes
 * a section unfit, is as good as zero. */
KV_INLINE uint32_t kv_ecsq_symbol(float away, float inverse, uint32_t bound) {
    float most = kv_float_of_small((int32_t)bound + 1), steps = kv_mul(away, inverse);
    float held = steps == steps ? kv_max(kv_min(steps, most), -most) : 0.0f;
    int32_t whole = kv_rint(held), bounds = (int32_t)bound;
    return (uint32_t)(whole > bounds || whole < -bounds ? 2 * bounds + 1 : whole + bounds);
}

#endif
