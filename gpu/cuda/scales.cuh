/* What codes are relative to: sizes of values, the order of floats, scales and their inverses. */
#ifndef KVSTORE_SCALES_CUH
#define KVSTORE_SCALES_CUH

#include "numbers.cuh"

/* |value| as an integer that grows with it. Infinities and NaN are the largest of all, so one
 * integer maximum finds both the range of values and whether they are finite. */
KV_INLINE int32_t kv_size_bits(float value) {
    return (int32_t)(kv_bits_of_float(value) & 0x7fffffffu);
}

#define KV_INFINITE_BITS 0x7f800000

/* The order of floats as signed integers, -0 below +0, NaN beyond the infinities. */
KV_INLINE int32_t kv_order_key(float value) {
    int32_t bits = (int32_t)kv_bits_of_float(value);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}

KV_INLINE float kv_float_of_key(int32_t key) {
    return kv_float_of_bits((uint32_t)(key ^ ((key >> 31) & 0x7fffffff)));
}

#define KV_KEY_MAX_FINITE 0x7f7fffff
#define KV_KEY_MIN_FINITE (-0x7f7fffff - 1)

/* 1 / scale; 0 for a scale of zero, so that every code becomes zero. A scale is zero or at least
 * 2^-126, so its inverse is finite. */
KV_INLINE float kv_inverse(float scale) { return scale > 0.0f ? kv_div(1.0f, scale) : 0.0f; }

#endif
