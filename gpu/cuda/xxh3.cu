/* The block digests of chunks: a warp for every 64 KiB.
 *
 * A chunk of `extra` bytes lies in `page_count` pieces of `page_stride` bytes, the last of which
 * may be shorter; `containers` has their addresses, `[chunk][piece]`, and the digests go to
 * `reports`, as uint64 `[chunk][block]`. Sizes and addresses are multiples of 16. Where `table` is
 * not zero, it has the address of the sizes of chunks, uint64 each, and `extra` is the largest.
 */
#include "batch.cuh"
#include "xxh3.cuh"

#define BLOCK_BYTES 65536u
#define PAIRS 4u /* lanes beside each other: two of a stripe's eight words each */
#define ROWS 8u  /* stripes at a time */

struct Words {
    uint64_t low, high;
};

KV_INLINE Words words_at(const Batch &batch, uint32_t chunk, uint32_t at) {
    uint32_t piece_bytes = (uint32_t)batch.page_stride, piece = at / piece_bytes;
    uint64_t start = batch.containers[(uint64_t)chunk * batch.page_count + piece];
    uint4 packed = load16((const uint8_t *)(start + at % piece_bytes));
    return Words{packed.x | (uint64_t)packed.y << 32, packed.z | (uint64_t)packed.w << 32};
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

/* Take in *count* stripes, eight at a time, and leave their sums in every row. */
KV_INLINE void take_stripes(
    const Batch &batch, uint32_t chunk, uint32_t at, uint32_t count, Words &sums) {
    uint32_t pair = threadIdx.x % PAIRS, row = threadIdx.x % 32 / PAIRS;
    Words found = {0, 0};
#pragma unroll
    for (uint32_t k = 0; k < 2; k++) {
        uint32_t stripe = row + k * ROWS;
        if (stripe < count) {
            Words words = words_at(batch, chunk, at + stripe * KV_XXH3_STRIPE + pair * 16u);
            take(found, words, KV_XXH3_SECRET[stripe + 2 * pair],
                KV_XXH3_SECRET[stripe + 2 * pair + 1]);
        }
    }
    for (int mask = PAIRS; mask < 32; mask <<= 1) {
        found.low += shuffled64(found.low, mask);
        found.high += shuffled64(found.high, mask);
    }
    sums.low += found.low;
    sums.high += found.high;
}

/* The digest of more than 240 bytes, in every lane. */
KV_INLINE uint64_t digest_of(const Batch &batch, uint32_t chunk, uint32_t at, uint32_t size) {
    uint32_t pair = threadIdx.x % PAIRS, units = (size - 1u) / KV_XXH3_UNIT, end = at + size;
    Words sums = {KV_XXH3_START[2 * pair], KV_XXH3_START[2 * pair + 1]};
    for (uint32_t unit = 0; unit < units; unit++, at += KV_XXH3_UNIT) {
        take_stripes(batch, chunk, at, KV_XXH3_UNIT / KV_XXH3_STRIPE, sums);
        uint32_t word = KV_XXH3_SCRAMBLE + 2 * pair;
        sums.low = kv_xxh3_scrambled(sums.low, KV_XXH3_SECRET[word]);
        sums.high = kv_xxh3_scrambled(sums.high, KV_XXH3_SECRET[word + 1]);
    }
    take_stripes(batch, chunk, at, (end - at - 1u) / KV_XXH3_STRIPE, sums);
    uint32_t key = KV_XXH3_LAST + 16u * pair;
    Words last = words_at(batch, chunk, end - KV_XXH3_STRIPE + pair * 16u);
    take(sums, last, kv_xxh3_secret(key), kv_xxh3_secret(key + 8u));
    key = KV_XXH3_MERGE + 16u * pair;
    uint64_t hash = kv_xxh3_fold(
        sums.low ^ kv_xxh3_secret(key), sums.high ^ kv_xxh3_secret(key + 8u));
    hash += shuffled64(hash, 1);
    hash += shuffled64(hash, 2);
    return kv_xxh3_avalanche(hash + size * KV_PRIME64_1);
}

KV_INLINE uint64_t digest_of_few(const Batch &batch, uint32_t chunk, uint32_t at, uint32_t size) {
    uint64_t words[KV_XXH3_MEDIUM / 8u];
    for (uint32_t i = 0; i < size / 16u; i++) {
        Words found = words_at(batch, chunk, at + 16u * i);
        words[2 * i] = found.low;
        words[2 * i + 1] = found.high;
    }
    return kv_xxh3_of_few(words, size);
}

KV_INLINE uint32_t size_of(const Batch &batch, uint32_t chunk) {
    const uint64_t *sizes = (const uint64_t *)batch.table;
    return (uint32_t)(sizes == nullptr ? batch.extra : sizes[chunk]);
}

extern "C" __global__ void __launch_bounds__(KV_BOUNDS) xxh3_blocks(const Batch batch) {
    uint32_t blocks = (uint32_t)kv_ceil(batch.extra, BLOCK_BYTES);
    uint32_t warp = blockIdx.x * KV_WARPS + threadIdx.x / 32;
    for (uint32_t i = warp; i < batch.chunk_count * blocks; i += gridDim.x * KV_WARPS) {
        uint32_t chunk = i / blocks, at = i % blocks * BLOCK_BYTES;
        uint32_t whole = size_of(batch, chunk);
        if (at >= whole) { /* the same for all lanes of a warp */
            continue;
        }
        uint32_t size = smaller(BLOCK_BYTES, whole - at);
        uint64_t hash = 0;
        if (size > KV_XXH3_MEDIUM) { /* the same for all lanes of a warp */
            hash = digest_of(batch, chunk, at, size);
        } else if (threadIdx.x % 32 == 0) {
            hash = digest_of_few(batch, chunk, at, size);
        }
        if (threadIdx.x % 32 == 0) {
            ((uint64_t *)batch.reports)[i] = hash;
        }
    }
}
