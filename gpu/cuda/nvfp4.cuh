/* nvfp4: e2m1 codes in blocks of 16 under an e4m3 scale, under a float scale of the head. */
#ifndef KVSTORE_NVFP4_CUH
#define KVSTORE_NVFP4_CUH

#include "scales.cuh"

#define KV_NVFP4_BLOCK 16
#define KV_NVFP4_LEAST 0.001953125f /* 2^-9: the least e4m3 above zero, code 0x01 */
#define KV_NVFP4_EMPTY 0x01u

/* The scale of a head whose values are up to *size*; zero when all are as good as zero. */
KV_INLINE float kv_nvfp4_tensor_scale(float size) {
    float scale = kv_div(size, 1536.0f);
    return scale < 7.888609052210118e-31f ? 0.0f : scale; /* 2^-100 */
}

/* The stored scale of a block so that its largest value becomes *target* (6 or 4). */
KV_INLINE uint8_t kv_nvfp4_block_scale(float size, float target, float tensor_scale) {
    float wanted = kv_div(kv_div(size, target), tensor_scale);
    return kv_e4m3_of_float(kv_min(kv_max(wanted, KV_NVFP4_LEAST), KV_E4M3_MAX));
}

KV_INLINE float kv_nvfp4_unit(uint8_t block_scale, float tensor_scale) {
    return kv_mul(kv_float_of_e4m3(block_scale), tensor_scale);
}

/* The magnitude to the nearest of 0, .5, 1, 1.5, 2, 3, 4, 6; the sign only of what is below zero. */
KV_INLINE uint32_t kv_nvfp4_code(float scaled) {
    return (kv_e2m1_of_float(scaled) & 7u) | (scaled < 0.0f ? 8u : 0u);
}

KV_INLINE float kv_nvfp4_value(uint32_t code, float unit) {
    return kv_mul(kv_float_of_e2m1(code), unit);
}

#endif
