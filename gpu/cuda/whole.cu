/* Whole chunks as they are: from pages to where a chunk lies in one piece, and back. Their digests are
 * taken on the way, so that no byte is read twice.
 *
 * A chunk is `[section][head][token][vector]` without gaps; offsets of sections, `extra` and `table`
 * say nothing here. `width` counts vectors of sixteen bytes: those of a token of a head. Block
 * digests go to `reports`, as uint64 `[chunk][block]`; null: none are taken.
 */
#define KV_BOUNDS KV_THREADS, 2
#include "digests.cuh"

/* What numbers of vectors are divided by to find their places in pages. */
struct Steps {
    Divisor width, tokens, heads, page_tokens;
};

/* Where a vector lies in its pages, if that is anywhere. */
struct Found {
    uint8_t *at;
    int is_somewhere;
};

KV_INLINE Found page_of(
    const Batch &batch, const Steps &steps, const int32_t *pages, uint32_t number) {
    uint32_t vector = number, token = divide(vector, steps.width);
    uint32_t head = divide(token, steps.tokens), section = divide(head, steps.heads);
    uint32_t within = batch.first_token + token, page = divide(within, steps.page_tokens);
    int64_t stored = pages[page];
    uint64_t address = batch.sections[section].plane + (uint64_t)(stored * batch.page_stride);
    address += (uint64_t)((int64_t)within * batch.token_stride + (int64_t)head * batch.head_stride);
    return Found{(uint8_t *)(address + vector * 16u), stored >= 0};
}

/* Move the *count* vectors of a chunk from *first* on. There is no branch between a thread's loads, so
 * that all of them are under way at once: what lies behind the end is loaded from before it, what
 * is nowhere from the chunk itself. */
template <int TO_PAGES>
KV_INLINE void move_chunk(const Batch &batch, const Steps &steps, const Keys &keys, uint32_t chunk,
    uint32_t first, uint32_t count, Sums *sums) {
    const int32_t *pages = batch.pages + (uint64_t)chunk * batch.page_count;
    uint8_t *flat = (uint8_t *)batch.containers[chunk] + (uint64_t)first * 16u;
    auto move = [&](uint32_t at, uint4 *vectors) {
        Found found[KV_AT_ONCE];
#pragma unroll
        for (uint32_t i = 0; i < KV_AT_ONCE; i++) {
            uint32_t here = smaller(at + vector_at(i), count - 1u);
            found[i] = page_of(batch, steps, pages, first + here);
            vectors[i] =
                load16(TO_PAGES || !found[i].is_somewhere ? flat + here * 16u : found[i].at);
        }
#pragma unroll
        for (uint32_t i = 0; i < KV_AT_ONCE; i++) {
            uint32_t here = at + vector_at(i);
            if (!TO_PAGES && !found[i].is_somewhere) {
                vectors[i] = uint4{0, 0, 0, 0};
            }
            if (here < count && (!TO_PAGES || found[i].is_somewhere)) {
                store16(TO_PAGES ? found[i].at : flat + here * 16u, vectors[i]);
            }
        }
    };
    move_block(count * 16u, keys, sums, move);
}

template <int TO_PAGES> KV_INLINE void move(const Batch &batch) {
    __shared__ Sums sums[2];
    Steps steps = {divisor_of(batch.width), divisor_of(batch.tokens), divisor_of(batch.heads),
                   divisor_of(batch.page_tokens)};
    Keys keys = keys_of_lane();
    uint32_t vectors = batch.section_count * batch.heads * batch.tokens * batch.width, turn = 0;
    uint32_t blocks = (uint32_t)kv_ceil(vectors, KV_BLOCK_BYTES / 16u);
    for (uint32_t i = blockIdx.x; i < batch.chunk_count * blocks; i += gridDim.x, turn++) {
        uint32_t chunk = i / blocks, first = i % blocks * (KV_BLOCK_BYTES / 16u);
        uint32_t count = smaller(KV_BLOCK_BYTES / 16u, vectors - first);
        Sums *mine = batch.reports == nullptr ? nullptr : sums + turn % 2u;
        move_chunk<TO_PAGES>(batch, steps, keys, chunk, first, count, mine);
        if (mine != nullptr) { /* the same for all threads */
            const uint8_t *flat = (const uint8_t *)batch.containers[chunk] + (uint64_t)first * 16u;
            end_block(turn, count * 16u, *mine, (uint64_t *)batch.reports + i,
                      [&](uint32_t at) { return load16(flat + (uint64_t)at * 16u); });
        }
    }
}

extern "C" __global__ void __launch_bounds__(KV_BOUNDS) whole_gather(const Batch batch) {
    move<0>(batch);
}

extern "C" __global__ void __launch_bounds__(KV_BOUNDS) whole_scatter(const Batch batch) {
    move<1>(batch);
}
