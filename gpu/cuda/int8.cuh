/* int8kv: a signed byte per value, times a bfloat16 scale that no value exceeds 127 times. */
#ifndef KVSTORE_INT8_CUH
#define KVSTORE_INT8_CUH

#include "scales.cuh"

#define KV_INT8_MAX 127.0f

/* The stored scale of values up to *size*, rounded up; zero when it would be subnormal. */
KV_INLINE uint16_t kv_int8_scale(float size) {
    uint16_t bits = kv_bf16_up_of_float(kv_div(size, KV_INT8_MAX));
    return (uint16_t)(bits < 0x0080u ? 0u : bits);
}

/* The code of *value* in the low 8 bits, above them what kv_int8_value ignores. */
KV_INLINE uint32_t kv_int8_code(float value, float inverse) {
    float steps = kv_mul(value, inverse);
    return kv_rint_bits(kv_max(kv_min(steps, KV_INT8_MAX), -KV_INT8_MAX));
}

/* What a code just made decodes to. */
KV_INLINE float kv_int8_value_of_bits(uint32_t code, float scale) {
    return kv_mul(kv_sub(kv_float_of_bits(code), KV_MAGIC), scale);
}

KV_INLINE float kv_int8_value(int32_t code, float scale) {
    return kv_mul(kv_float_of_small(code), scale);
}

#endif
