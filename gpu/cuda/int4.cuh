/* int4kv: four bits per value between the least of a group and 15 steps above it. */
#ifndef KVSTORE_INT4_CUH
#define KVSTORE_INT4_CUH

#include "scales.cuh"

#define KV_INT4_MAX 15.0f

KV_INLINE uint16_t kv_int4_zero(float least) { return kv_half_of_float(kv_add(least, 0.0f)); }

KV_INLINE uint16_t kv_int4_scale(float least, float most) {
    float from = kv_add(least, 0.0f), to = kv_add(most, 0.0f);
    return kv_half_of_float(kv_div(kv_sub(to, from), KV_INT4_MAX));
}

/* The code of *value* in the low 4 bits, above them the rest of KV_MAGIC_BITS. */
KV_INLINE uint32_t kv_int4_code(float value, float zero, float inverse) {
    float steps = kv_mul(kv_sub(value, zero), inverse);
    return kv_rint_bits(kv_max(kv_min(steps, KV_INT4_MAX), 0.0f));
}

/* What a code just made decodes to. */
KV_INLINE float kv_int4_value_of_bits(uint32_t code, float zero, float scale) {
    return kv_add(kv_mul(kv_sub(kv_float_of_bits(code), KV_MAGIC), scale), zero);
}

KV_INLINE float kv_int4_value(uint32_t code, float zero, float scale) {
    return kv_add(kv_mul(kv_float_of_small((int32_t)code), scale), zero);
}

#endif
