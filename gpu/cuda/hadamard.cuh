/* hq4 and hq3: signs, a Hadamard transform, then the nearest of a few centroids of a Gaussian. */
#ifndef KVSTORE_HADAMARD_CUH
#define KVSTORE_HADAMARD_CUH

#include "scales.cuh"

#define KV_HQ_LEAST_NORM 8.673617379884035e-19f /* 2^-60 */

KV_INLINE uint32_t kv_hq3_index(float size) {
    return (uint32_t)(size >= 0.5005f) + (uint32_t)(size >= 1.05f) + (uint32_t)(size >= 1.7479f);
}

KV_INLINE uint32_t kv_hq4_index(float size) {
    return (uint32_t)(size >= 0.2582f) + (uint32_t)(size >= 0.5224f) +
           (uint32_t)(size >= 0.7995f) + (uint32_t)(size >= 1.0993f) +
           (uint32_t)(size >= 1.4371f) + (uint32_t)(size >= 1.8435f) +
           (uint32_t)(size >= 2.4008f);
}

KV_INLINE float kv_hq3_centroid(uint32_t index) {
    float low = (index & 1u) ? 0.756f : 0.2451f;
    float high = (index & 1u) ? 2.1519f : 1.3439f;
    return (index & 2u) ? high : low;
}

KV_INLINE float kv_hq4_centroid(uint32_t index) {
    float a = (index & 1u) ? 0.388f : 0.1284f, b = (index & 1u) ? 0.9423f : 0.6568f;
    float c = (index & 1u) ? 1.618f : 1.2562f, d = (index & 1u) ? 2.7326f : 2.069f;
    float low = (index & 2u) ? b : a, high = (index & 2u) ? d : c;
    return (index & 4u) ? high : low;
}

/* *value* with the sign of its code. */
KV_INLINE float kv_hq_signed(float value, uint32_t is_negative) {
    return kv_float_of_bits(kv_bits_of_float(value) ^ (is_negative ? 0x80000000u : 0u));
}

/* --- which channels are negated ---------------------------------------------------------------------- */

KV_INLINE uint64_t kv_hq_sign_state(uint64_t table, uint32_t layer, uint32_t kind) {
    return table ^ ((uint64_t)(layer << 1 | kind) * 0x9E3779B97F4A7C15ull);
}

/* Signs of channels 64 * index to 64 * index + 63, as bits. */
KV_INLINE uint64_t kv_hq_signs(uint64_t state, uint32_t index) {
    uint64_t z = state + (uint64_t)(index + 1u) * 0x9E3779B97F4A7C15ull;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
}

#endif
