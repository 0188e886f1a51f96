/* Conversions between float and the narrow types of caches and codecs, in integer arithmetic.
 *
 * Rounding is to the nearest, ties to even. Widening is exact. What exceeds the largest finite
 * value becomes that value, except in kv_half_of_float, which is for scales and tells by infinity.
 */
#ifndef KVSTORE_NUMBERS_CUH
#define KVSTORE_NUMBERS_CUH

#include "dialect.cuh"

/* --- bfloat16 ---------------------------------------------------------------------------------- */

KV_INLINE float kv_float_of_bf16(uint16_t bits) { return kv_float_of_bits((uint32_t)bits << 16); }

KV_INLINE uint16_t kv_bf16_of_float(float value) {
    uint32_t bits = kv_bits_of_float(value);
    uint32_t size = bits & 0x7fffffffu;
    uint32_t rounded = (size + 0x7fffu + ((size >> 16) & 1u)) >> 16;
    rounded = rounded < 0x7f7fu ? rounded : 0x7f7fu;
    return (uint16_t)(rounded | (bits >> 16 & 0x8000u));
}

/* The same for scales: what is too large becomes infinite, which tells that it is no scale. */
KV_INLINE uint16_t kv_bf16_scale_of_float(float value) {
    uint32_t bits = kv_bits_of_float(value);
    uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

KV_INLINE int kv_bf16_is_broken(uint16_t bits) { return (bits & 0x7f80u) == 0x7f80u; }

KV_INLINE uint16_t kv_bf16_without_subnormals(uint16_t bits) {
    return (uint16_t)((bits & 0x7fffu) < 0x0080u ? 0u : bits);
}

/* A float that is no larger than the largest finite one. */
KV_INLINE float kv_finite(float value) {
    uint32_t bits = kv_bits_of_float(value), size = bits & 0x7fffffffu;
    return kv_float_of_bits((size < 0x7f7fffffu ? size : 0x7f7fffffu) | (bits & 0x80000000u));
}

/* The least bfloat16 that is not below a finite value >= 0. */
KV_INLINE uint16_t kv_bf16_up_of_float(float value) {
    return (uint16_t)((kv_bits_of_float(value) + 0xffffu) >> 16);
}

/* --- IEEE half --------------------------------------------------------------------------------- */

KV_INLINE float kv_float_of_half(uint16_t bits) {
#if defined(__CUDACC_RTC__)
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    uint32_t wide = (uint32_t)(bits & 0x7fffu) << 13;
    uint32_t exponent = wide & 0x0f800000u;
    uint32_t normal = wide + (112u << 23);
    normal += exponent == 0x0f800000u ? 112u << 23 : 0u; /* infinities and NaN */
    /* A subnormal is what the least normal exponent gives, less that normal. */
    float small = kv_sub(kv_float_of_bits(wide + (113u << 23)), kv_float_of_bits(113u << 23));
    uint32_t result = exponent == 0 ? kv_bits_of_float(small) : normal;
    return kv_float_of_bits(result | (uint32_t)(bits & 0x8000u) << 16);
#endif
}

KV_INLINE uint16_t kv_half_of_float(float value) {
#if defined(__CUDACC_RTC__)
    uint16_t bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
    return bits;
#else
    uint32_t bits = kv_bits_of_float(value);
    uint32_t sign = (bits >> 16) & 0x8000u;
    uint32_t size = bits & 0x7fffffffu;
    uint32_t normal = (size + 0xfffu + ((size >> 13) & 1u) - (112u << 23)) >> 13;
    /* Adding 0.5 leaves a subnormal's 10 bits, rounded, at the low end. */
    float least = kv_add(kv_float_of_bits(size), 0.5f);
    uint32_t small = kv_bits_of_float(least) - 0x3f000000u;
    uint32_t result = size < 0x38800000u ? small : normal;
    result = size >= 0x477ff000u ? 0x7c00u : result; /* 65520 and more round to infinity */
    result = size > 0x7f800000u ? 0x7e00u : result;
    return (uint16_t)(sign | result);
#endif
}

KV_INLINE int kv_half_is_broken(uint16_t bits) { return (bits & 0x7c00u) == 0x7c00u; }

/* The same for values: the largest half is what more than it becomes. */
KV_INLINE uint16_t kv_half_value_of_float(float value) {
    uint16_t bits = kv_half_of_float(value);
    uint16_t size = (uint16_t)(bits & 0x7fffu);
    return (uint16_t)((bits & 0x8000u) | (size < 0x7bffu ? size : 0x7bffu));
}

/* --- e4m3: 1 sign, 4 exponent, 3 mantissa bits, no infinities, largest 448 ----------------------- */

#define KV_E4M3_MAX 448.0f

KV_INLINE uint8_t kv_e4m3_of_float(float value) {
    uint32_t sign = (kv_bits_of_float(value) >> 24) & 0x80u;
    float size = kv_min(kv_abs(value), KV_E4M3_MAX);
    uint32_t bits = kv_bits_of_float(size);
    uint32_t normal = (bits + 0x7ffffu + ((bits >> 20) & 1u) - (120u << 23)) >> 20;
    uint32_t small = kv_rint_bits(kv_mul(size, 512.0f)) & 0xfu; /* steps of 2^-9 below 2^-6 */
    return (uint8_t)(sign | (bits < 0x3c800000u ? small : normal));
}

KV_INLINE float kv_float_of_e4m3(uint8_t code) {
    uint32_t wide = (uint32_t)(code & 0x7fu) << 20;
    float small = kv_sub(kv_float_of_bits(wide + (121u << 23)), kv_float_of_bits(121u << 23));
    uint32_t normal = wide + (120u << 23);
    uint32_t result = wide < 1u << 23 ? kv_bits_of_float(small) : normal;
    result = (code & 0x7fu) == 0x7fu ? 0x7fc00000u : result;
    return kv_float_of_bits(result | (uint32_t)(code & 0x80u) << 24);
}

/* --- e5m2: the upper byte of a half --------------------------------------------------------------- */

#define KV_E5M2_MAX 57344.0f

KV_INLINE uint8_t kv_e5m2_of_float(float value) {
    uint32_t sign = (kv_bits_of_float(value) >> 24) & 0x80u;
    float size = kv_min(kv_abs(value), KV_E5M2_MAX);
    uint32_t bits = kv_bits_of_float(size);
    uint32_t normal = (bits + 0xfffffu + ((bits >> 21) & 1u) - (112u << 23)) >> 21;
    uint32_t small = kv_rint_bits(kv_mul(size, 65536.0f)) & 0x7u; /* steps of 2^-16 below 2^-14 */
    return (uint8_t)(sign | (bits < 0x38800000u ? small : normal));
}

KV_INLINE float kv_float_of_e5m2(uint8_t code) {
    return kv_float_of_half((uint16_t)((uint32_t)code << 8));
}

/* --- e2m1: 0, .5, 1, 1.5, 2, 3, 4, 6 and their negatives ------------------------------------------ */

#define KV_E2M1_MAX 6.0f

KV_INLINE uint32_t kv_e2m1_of_float(float value) {
    uint32_t sign = (kv_bits_of_float(value) >> 28) & 8u;
    float size = kv_min(kv_abs(value), KV_E2M1_MAX);
    uint32_t bits = kv_bits_of_float(size);
    uint32_t normal = (bits + 0x1fffffu + ((bits >> 22) & 1u) - (126u << 23)) >> 22;
    uint32_t small = kv_rint_bits(kv_add(size, size)) & 3u;
    return sign | (bits < 0x3f800000u ? small : normal);
}

KV_INLINE float kv_float_of_e2m1(uint32_t code) {
    uint32_t size = code & 7u;
    uint32_t normal = (size << 22) + (126u << 23);
    uint32_t result = size < 2u ? size * 0x3f000000u : normal;
    return kv_float_of_bits(result | (code & 8u) << 28);
}

#endif
