/* exp3: lossless bfloat16. Per value its sign and mantissa (8 bits) and how far its exponent lies
 * below the largest of its channel in the tile (3 bits); one that lies further is an escape. */
#ifndef KVSTORE_EXP3_CUH
#define KVSTORE_EXP3_CUH

#include "dialect.cuh"

KV_INLINE uint32_t kv_exp3_exponent(uint32_t bits) { return (bits >> 7) & 0xffu; }

KV_INLINE uint32_t kv_exp3_rest(uint32_t bits) { return ((bits >> 8) & 0x80u) | (bits & 0x7fu); }

/* How far below; *escape* (7 or 15) for that far or further. */
KV_INLINE uint32_t kv_exp3_offset(uint32_t largest, uint32_t exponent, uint32_t escape) {
    uint32_t below = largest - exponent;
    return below < escape ? below : escape;
}

KV_INLINE uint32_t kv_exp3_bits(uint32_t exponent, uint32_t rest) {
    return ((rest & 0x80u) << 8) | ((exponent & 0xffu) << 7) | (rest & 0x7fu);
}

#endif
