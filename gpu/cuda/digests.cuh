/* The digest of a block of a chunk by a thread block, from vectors that its threads have at hand.
 *
 * XXH3 takes in units of 1 KiB, between which it scrambles its eight sums. What a unit adds to them
 * depends on nothing before it, so every warp adds up units of its own, and one warp scrambles:
 * loads wait for no arithmetic. A thread has eight of them under way at a time, which with two
 * thread blocks is 64 KiB of a multiprocessor.
 */
#ifndef KVSTORE_DIGESTS_CUH
#define KVSTORE_DIGESTS_CUH

#include "batch.cuh"
#include "xxh3.cuh"

#define KV_BLOCK_BYTES 65536u
#define KV_UNITS (KV_BLOCK_BYTES / KV_XXH3_UNIT)
#define KV_UNIT_VECTORS (KV_XXH3_UNIT / 16u)
#define KV_AT_ONCE 8u /* vectors of a thread: two of a unit */
#define KV_UNITS_AT_ONCE (KV_AT_ONCE / 2u * KV_WARPS)
#define KV_PAIRS 4u /* lanes beside each other: two of a stripe's eight words each */
#define KV_STRIPE_ROWS 8u

/* What each unit of a block adds to the eight sums. */
typedef uint64_t Sums[KV_UNITS][2 * KV_PAIRS];

struct Words {
    uint64_t low, high;
};

KV_INLINE Words words_of(const uint4 &vector) {
    return Words{vector.x | (uint64_t)vector.y << 32, vector.z | (uint64_t)vector.w << 32};
}

KV_INLINE uint64_t shuffled64(uint64_t value, int mask) {
    uint32_t low = __shfl_xor_sync(KV_EVERY_LANE, (uint32_t)value, mask);
    uint32_t high = __shfl_xor_sync(KV_EVERY_LANE, (uint32_t)(value >> 32), mask);
    return low | (uint64_t)high << 32;
}

/* Take in 16 bytes of a stripe under two words of the secret. */
KV_INLINE void take(Words &sums, const Words &words, uint64_t first, uint64_t second) {
    sums.low += kv_xxh3_product(words.low, first) + words.high;
    sums.high += kv_xxh3_product(words.high, second) + words.low;
}

/* How many stripes of a unit are taken in before the block's last one. */
KV_INLINE uint32_t stripes_of(uint32_t unit, uint32_t size) {
    uint32_t whole = (size - 1u) / KV_XXH3_UNIT;
    return unit < whole    ? KV_XXH3_UNIT / KV_XXH3_STRIPE
           : unit == whole ? (size - 1u - unit * KV_XXH3_UNIT) / KV_XXH3_STRIPE
                           : 0u;
}

/* The words of the secret under which this lane takes in its two vectors of a unit. */
struct Keys {
    uint64_t words[4];
};

KV_INLINE Keys keys_of_lane() {
    const uint64_t *first =
        KV_XXH3_SECRET + threadIdx.x % 32 / KV_PAIRS + threadIdx.x % KV_PAIRS * 2u;
    return Keys{{first[0], first[1], first[KV_STRIPE_ROWS], first[KV_STRIPE_ROWS + 1u]}};
}

/* What a unit adds, from the two vectors that each lane of a warp has of it. */
KV_INLINE void sum_unit(
    const uint4 *vectors, uint32_t stripes, const Keys &keys, uint64_t *sums) {
    uint32_t pair = threadIdx.x % KV_PAIRS, row = threadIdx.x % 32 / KV_PAIRS;
    Words found = {0, 0};
#pragma unroll
    for (uint32_t k = 0; k < 2; k++) {
        if (row + k * KV_STRIPE_ROWS < stripes) {
            take(found, words_of(vectors[k]), keys.words[2 * k], keys.words[2 * k + 1]);
        }
    }
#pragma unroll
    for (int mask = KV_PAIRS; mask < 32; mask <<= 1) {
        found.low += shuffled64(found.low, mask);
        found.high += shuffled64(found.high, mask);
    }
    if (row == 0) {
        sums[2 * pair] = found.low;
        sums[2 * pair + 1] = found.high;
    }
}

/* How far from a thread's first vector its others are. */
KV_INLINE constexpr uint32_t vector_at(uint32_t i) {
    return i / 2u * KV_WARPS * KV_UNIT_VECTORS + i % 2u * 32u;
}

/* Have *move* fetch all vectors of a block of *size* bytes, eight at a time: it is told where in the
 * block this thread's first is, see `vector_at`; some may lie behind the end. What each unit adds
 * goes to *sums*; null: nobody wants to know. */
template <typename Move>
KV_INLINE void move_block(uint32_t size, const Keys &keys, Sums *sums, const Move &move) {
    uint32_t warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll 1
    for (uint32_t base = 0; base * KV_XXH3_UNIT < size; base += KV_UNITS_AT_ONCE) {
        uint4 vectors[KV_AT_ONCE];
        move((base + warp) * KV_UNIT_VECTORS + lane, vectors);
        if (sums != nullptr) {
#pragma unroll
            for (uint32_t i = 0; i < KV_AT_ONCE; i += 2) {
                uint32_t unit = base + warp + i / 2u * KV_WARPS;
                if (unit * KV_XXH3_UNIT < size) { /* the same for all lanes of a warp */
                    sum_unit(vectors + i, stripes_of(unit, size), keys, (*sums)[unit]);
                }
            }
        }
    }
}

/* The digest of a block, by one warp, when all has been added up; *fetch* gives any vector of it. */
template <typename Fetch>
KV_INLINE uint64_t digest_of(uint32_t size, const Sums &sums, const Fetch &fetch) {
    if (size <= KV_XXH3_MEDIUM) {
        uint64_t words[KV_XXH3_MEDIUM / 8u];
        for (uint32_t i = 0; i < size / 16u; i++) {
            Words found = words_of(fetch(i));
            words[2 * i] = found.low;
            words[2 * i + 1] = found.high;
        }
        return kv_xxh3_of_few(words, size);
    }
    uint32_t pair = threadIdx.x % KV_PAIRS, units = (size - 1u) / KV_XXH3_UNIT;
    uint32_t word = KV_XXH3_SCRAMBLE + 2 * pair;
    Words total = {KV_XXH3_START[2 * pair], KV_XXH3_START[2 * pair + 1]};
    for (uint32_t unit = 0; unit < units; unit++) {
        total.low = kv_xxh3_scrambled(total.low + sums[unit][2 * pair], KV_XXH3_SECRET[word]);
        total.high =
            kv_xxh3_scrambled(total.high + sums[unit][2 * pair + 1], KV_XXH3_SECRET[word + 1]);
    }
    total.low += sums[units][2 * pair];
    total.high += sums[units][2 * pair + 1];
    uint32_t key = KV_XXH3_LAST + 16u * pair;
    Words last = words_of(fetch(size / 16u - KV_PAIRS + pair));
    take(total, last, kv_xxh3_secret(key), kv_xxh3_secret(key + 8u));
    key = KV_XXH3_MERGE + 16u * pair;
    uint64_t hash = kv_xxh3_fold(
        total.low ^ kv_xxh3_secret(key), total.high ^ kv_xxh3_secret(key + 8u));
    hash += shuffled64(hash, 1);
    hash += shuffled64(hash, 2);
    return kv_xxh3_avalanche(hash + size * KV_PRIME64_1);
}

/* End a block when all warps have come here: one digests it, a different one each *turn*, while the
 * others go on. So the sums of the next turn are others, those of the one after it these again. */
template <typename Fetch>
KV_INLINE void end_block(
    uint32_t turn, uint32_t size, const Sums &sums, uint64_t *found, const Fetch &fetch) {
    __syncthreads();
    if (threadIdx.x / 32 == turn % KV_WARPS) {
        uint64_t hash = digest_of(size, sums, fetch);
        if (threadIdx.x % 32 == 0) {
            *found = hash;
        }
    }
}

/* --- division of numbers below 2^31 by what is the same all along --------------------------------- */

struct Divisor {
    uint32_t by, factor, shift;
};

KV_INLINE Divisor divisor_of(uint32_t by) {
    uint32_t shift = 31;
    while ((uint64_t)by << 31 > 1ull << shift) {
        shift++;
    }
    return Divisor{by, (uint32_t)((1ull << shift) / by + 1u), shift};
}

/* Divide *number*; leave the rest in it. */
KV_INLINE uint32_t divide(uint32_t &number, const Divisor &divisor) {
    uint32_t quotient = (uint32_t)((uint64_t)number * divisor.factor >> divisor.shift);
    number -= quotient * divisor.by;
    return quotient;
}

#endif
