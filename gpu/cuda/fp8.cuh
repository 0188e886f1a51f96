/* fp8: e4m3 codes under one power of two for a whole head, so that scaling costs no bits. */
#ifndef KVSTORE_FP8_CUH
#define KVSTORE_FP8_CUH

#include "scales.cuh"

#define KV_FP8_EXPONENT_MIN (-100)

/* The least e with size <= 448 * 2^e, but no less than -100. */
KV_INLINE int32_t kv_fp8_exponent(int32_t size_bits) {
    int32_t power = (size_bits >> 23) - 127; /* size = f * 2^power with 1 <= f < 2 */
    int32_t exponent = (size_bits & 0x7fffff) <= 0x600000 ? power - 8 : power - 7;
    return exponent > KV_FP8_EXPONENT_MIN ? exponent : KV_FP8_EXPONENT_MIN;
}

/* 2^exponent, for exponents of normal floats; a byte below -126, which no encoder writes, is -126. */
KV_INLINE float kv_power_of_two(int32_t exponent) {
    return kv_float_of_bits((uint32_t)((exponent > -126 ? exponent : -126) + 127) << 23);
}

KV_INLINE uint8_t kv_fp8_code(float value, float inverse) {
    return kv_e4m3_of_float(kv_mul(value, inverse));
}

KV_INLINE float kv_fp8_value(uint8_t code, float scale) {
    return kv_mul(kv_float_of_e4m3(code), scale);
}

#endif
