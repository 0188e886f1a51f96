/* XXH3-64 without a seed, of whole multiples of 16 bytes: the checksum of blocks.
 *
 * Written from the specification of the algorithm (XXH3, "small inputs" to "large inputs"). What is
 * longer than 240 bytes is folded by a thread block: see digests.cuh.
 */
#ifndef KVSTORE_XXH3_CUH
#define KVSTORE_XXH3_CUH

#include "dialect.cuh"

#define KV_XXH3_SMALL 128u  /* inputs up to here, and up to the next, have ways of their own */
#define KV_XXH3_MEDIUM 240u
#define KV_XXH3_UNIT 1024u  /* what is taken in between two scramblings: 16 stripes */
#define KV_XXH3_STRIPE 64u
#define KV_XXH3_SCRAMBLE 16u /* words of the secret */
#define KV_XXH3_LAST 121u    /* bytes of the secret, as are the next two */
#define KV_XXH3_MERGE 11u

#define KV_PRIME32_1 0x9e3779b1ull
#define KV_PRIME32_2 0x85ebca77ull
#define KV_PRIME32_3 0xc2b2ae3dull
#define KV_PRIME64_1 0x9e3779b185ebca87ull
#define KV_PRIME64_2 0xc2b2ae3d27d4eb4full
#define KV_PRIME64_3 0x165667b19e3779f9ull
#define KV_PRIME64_4 0x85ebca77c2b2ae63ull
#define KV_PRIME64_5 0x27d4eb2f165667c5ull
#define KV_PRIME_MIX 0x165667919e3779f9ull

KV_TABLE uint64_t KV_XXH3_SECRET[24] = {
    0xbe4ba423396cfeb8ull, 0x1cad21f72c81017cull, 0xdb979083e96dd4deull,
    0x1f67b3b7a4a44072ull, 0x78e5c0cc4ee679cbull, 0x2172ffcc7dd05a82ull,
    0x8e2443f7744608b8ull, 0x4c263a81e69035e0ull, 0xcb00c391bb52283cull,
    0xa32e531b8b65d088ull, 0x4ef90da297486471ull, 0xd8acdea946ef1938ull,
    0x3f349ce33f76faa8ull, 0x1d4f0bc7c7bbdcf9ull, 0x3159b4cd4be0518aull,
    0x647378d9c97e9fc8ull, 0xc3ebd33483acc5eaull, 0xeb6313faffa081c5ull,
    0x49daf0b751dd0d17ull, 0x9e68d429265516d3ull, 0xfca1477d58be162bull,
    0xce31d07ad1b8f88full, 0x280416958f3acb45ull, 0x7e404bbbcafbd7afull,
};

KV_TABLE uint64_t KV_XXH3_START[8] = {
    KV_PRIME32_3, KV_PRIME64_1, KV_PRIME64_2, KV_PRIME64_3,
    KV_PRIME64_4, KV_PRIME32_2, KV_PRIME64_5, KV_PRIME32_1,
};

/* Eight bytes of the secret from byte *at* on. */
KV_INLINE uint64_t kv_xxh3_secret(uint32_t at) {
    uint32_t word = at / 8u, shift = at % 8u * 8u;
    uint64_t low = KV_XXH3_SECRET[word] >> shift;
    return shift == 0 ? low : low | KV_XXH3_SECRET[word + 1u] << (64u - shift);
}

/* The two halves of a product of 128 bits, one on the other. */
KV_INLINE uint64_t kv_xxh3_fold(uint64_t a, uint64_t b) {
#if defined(__CUDACC_RTC__)
    return (a * b) ^ __umul64hi(a, b);
#else
    __extension__ typedef unsigned __int128 wide;
    wide product = (wide)a * b;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
#endif
}

KV_INLINE uint64_t kv_xxh3_avalanche(uint64_t hash) {
    hash = (hash ^ hash >> 37) * KV_PRIME_MIX;
    return hash ^ hash >> 32;
}

KV_INLINE uint64_t kv_xxh3_swapped(uint64_t value) {
    uint64_t swapped = 0;
    for (int i = 0; i < 8; i++) {
        swapped = swapped << 8 | (value >> (8 * i) & 0xffu);
    }
    return swapped;
}

/* What one half of a stripe's 16 bytes adds to its own accumulator; its word goes to the other. */
KV_INLINE uint64_t kv_xxh3_product(uint64_t word, uint64_t key) {
    uint64_t mixed = word ^ key;
    return (mixed & 0xffffffffull) * (mixed >> 32);
}

KV_INLINE uint64_t kv_xxh3_scrambled(uint64_t sum, uint64_t key) {
    return (sum ^ sum >> 47 ^ key) * KV_PRIME32_1;
}

/* --- up to 240 bytes: words is the input, size a multiple of 16 ----------------------------------- */

KV_INLINE uint64_t kv_xxh3_mix(const uint64_t *words, uint32_t at, uint32_t key) {
    return kv_xxh3_fold(words[at / 8u] ^ kv_xxh3_secret(key),
                        words[at / 8u + 1u] ^ kv_xxh3_secret(key + 8u));
}

KV_INLINE uint64_t kv_xxh3_of_16(const uint64_t *words) {
    uint64_t low = words[0] ^ KV_XXH3_SECRET[3] ^ KV_XXH3_SECRET[4];
    uint64_t high = words[1] ^ KV_XXH3_SECRET[5] ^ KV_XXH3_SECRET[6];
    return kv_xxh3_avalanche(16u + kv_xxh3_swapped(low) + high + kv_xxh3_fold(low, high));
}

KV_INLINE uint64_t kv_xxh3_of_few(const uint64_t *words, uint32_t size) {
    if (size == 16u) {
        return kv_xxh3_of_16(words);
    }
    uint64_t hash = size * KV_PRIME64_1;
    if (size <= KV_XXH3_SMALL) {
        for (uint32_t i = (size - 1u) / 32u + 1u; i-- > 0;) {
            hash += kv_xxh3_mix(words, 16u * i, 32u * i);
            hash += kv_xxh3_mix(words, size - 16u * (i + 1u), 32u * i + 16u);
        }
        return kv_xxh3_avalanche(hash);
    }
    for (uint32_t i = 0; i < 8; i++) {
        hash += kv_xxh3_mix(words, 16u * i, 16u * i);
    }
    hash = kv_xxh3_avalanche(hash);
    for (uint32_t i = 8; i < size / 16u; i++) {
        hash += kv_xxh3_mix(words, 16u * i, 16u * (i - 8u) + 3u);
    }
    return kv_xxh3_avalanche(hash + kv_xxh3_mix(words, size - 16u, 119u));
}

#endif
