/* One language for three compilers: what NVRTC, a host C compiler and a host C++ compiler share.
 *
 * Everything that decides a byte is written once, in the headers beside this file, in the words
 * defined here. No fused multiply-add is ever formed: NVRTC is told so (--fmad=false) and host
 * compilers too (-ffp-contract=off), and on the GPU every operation is an explicit intrinsic.
 */
#ifndef KVSTORE_DIALECT_CUH
#define KVSTORE_DIALECT_CUH

#if defined(__CUDACC_RTC__)
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef short int16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#define KV_INLINE static __device__ __forceinline__
#define KV_CALL static __device__ __noinline__
#define KV_RESTRICT __restrict__
#define KV_TABLE static __device__ const
#else
#include <stdint.h>
#include <string.h>
#if !defined(KV_INLINE) /* the GPU for tests has its own: it is built often, and need not be fast */
#define KV_INLINE static inline __attribute__((always_inline, unused))
#endif
#define KV_CALL static __attribute__((unused))
#if defined(__cplusplus)
#define KV_RESTRICT __restrict__
#else
#define KV_RESTRICT restrict
#endif
#define KV_TABLE static const __attribute__((unused))
#endif

/* --- bits and floats ------------------------------------------------------------------------- */

KV_INLINE float kv_float_of_bits(uint32_t bits) {
#if defined(__CUDACC_RTC__)
    return __uint_as_float(bits);
#else
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

KV_INLINE uint32_t kv_bits_of_float(float value) {
#if defined(__CUDACC_RTC__)
    return __float_as_uint(value);
#else
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
#endif
}

/* --- arithmetic, rounded to nearest even, never contracted ------------------------------------- */

#if defined(__CUDACC_RTC__)
KV_INLINE float kv_add(float a, float b) { return __fadd_rn(a, b); }
KV_INLINE float kv_sub(float a, float b) { return __fsub_rn(a, b); }
KV_INLINE float kv_mul(float a, float b) { return __fmul_rn(a, b); }
KV_INLINE float kv_div(float a, float b) { return __fdiv_rn(a, b); }
KV_INLINE float kv_sqrt(float a) { return __fsqrt_rn(a); }
#else
KV_INLINE float kv_add(float a, float b) { return a + b; }
KV_INLINE float kv_sub(float a, float b) { return a - b; }
KV_INLINE float kv_mul(float a, float b) { return a * b; }
KV_INLINE float kv_div(float a, float b) { return a / b; }
KV_INLINE float kv_sqrt(float a) { return __builtin_sqrtf(a); }
#endif

/* Ternaries, not fminf: they become one instruction each, and NaN never gets this far. */
KV_INLINE float kv_min(float a, float b) { return a < b ? a : b; }
KV_INLINE float kv_max(float a, float b) { return a > b ? a : b; }
KV_INLINE float kv_abs(float a) { return kv_float_of_bits(kv_bits_of_float(a) & 0x7fffffffu); }

/* Round to the nearest integer, ties to even, for |value| <= 2^22: adding 1.5 * 2^23 leaves the
 * integer in the low bits. One addition, no conversion unit, and it vectorises everywhere. */
#define KV_MAGIC 12582912.0f
#define KV_MAGIC_BITS 0x4b400000u

KV_INLINE uint32_t kv_rint_bits(float value) { return kv_bits_of_float(kv_add(value, KV_MAGIC)); }
KV_INLINE int32_t kv_rint(float value) { return (int32_t)(kv_rint_bits(value) - KV_MAGIC_BITS); }

/* The float of an integer within +-2^22, without a conversion unit. */
KV_INLINE float kv_float_of_small(int32_t value) {
    return kv_sub(kv_float_of_bits((uint32_t)value + KV_MAGIC_BITS), KV_MAGIC);
}

#endif
