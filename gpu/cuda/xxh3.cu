/* The block digests of chunks: a thread block for every 64 KiB.
 *
 * A chunk of `extra` bytes lies in `page_count` pieces of `page_stride` bytes, the last of which
 * may be shorter; `containers` has their addresses, `[chunk][piece]`, and the digests go to
 * `reports`, as uint64 `[chunk][block]`. Sizes and addresses are multiples of 16. Where `table` is
 * not zero, it has the address of the sizes of chunks, uint64 each, and `extra` is the largest.
 */
#define KV_BOUNDS KV_THREADS, 2
#include "digests.cuh"

KV_INLINE uint32_t size_of(const Batch &batch, uint32_t chunk) {
    const uint64_t *sizes = (const uint64_t *)batch.table;
    return (uint32_t)(sizes == nullptr ? batch.extra : sizes[chunk]);
}

extern "C" __global__ void __launch_bounds__(KV_BOUNDS) xxh3_blocks(const Batch batch) {
    __shared__ Sums sums[2];
    Keys keys = keys_of_lane();
    Divisor piece_vectors = divisor_of((uint32_t)(batch.page_stride / 16));
    uint32_t blocks = (uint32_t)kv_ceil(batch.extra, KV_BLOCK_BYTES), turn = 0;
    for (uint32_t i = blockIdx.x; i < batch.chunk_count * blocks; i += gridDim.x) {
        uint32_t chunk = i / blocks, at = i % blocks * KV_BLOCK_BYTES;
        uint32_t whole = size_of(batch, chunk);
        if (at >= whole) { /* the same for all threads */
            continue;
        }
        uint32_t size = smaller(KV_BLOCK_BYTES, whole - at);
        const uint64_t *starts = batch.containers + (uint64_t)chunk * batch.page_count;
        auto fetch = [&](uint32_t number) {
            uint32_t within = at / 16u + number, piece = divide(within, piece_vectors);
            return load16((const uint8_t *)(starts[piece] + (uint64_t)within * 16u));
        };
        move_block(size, keys, sums + turn % 2u, [&](uint32_t first, uint4 *vectors) {
#pragma unroll
            for (uint32_t k = 0; k < KV_AT_ONCE; k++) { /* what lies behind the end is not used */
                vectors[k] = fetch(smaller(first + vector_at(k), size / 16u - 1u));
            }
        });
        end_block(turn, size, sums[turn % 2u], (uint64_t *)batch.reports + i, fetch);
        turn++;
    }
}
