/* Bytes as they are: raw sections, and the parts of other sections that are kept (sinks, tails).
 *
 * Here `width` counts sixteenths of bytes: vectors of a token of a head, `table` is where the part
 * begins in a head block, `extra` the length of a block; planes point at the first channel kept.
 */
#include "batch.cuh"

#define ROWS_PER_PART 256u

/* A page below zero is nowhere: nothing is written to it, and zeros are read from it. */
KV_INLINE int is_nowhere(const Batch &batch, const Place &at, uint32_t token) {
    uint32_t page = (batch.first_token + token) / batch.page_tokens;
    return batch.pages[(uint64_t)at.chunk * batch.page_count + page] < 0;
}

template <int TO_PAGES> KV_INLINE void copy(const Batch &batch, const Place &at) {
    uint8_t *part = block_of(batch, at, batch.extra) + batch.table;
    uint32_t first = at.part * ROWS_PER_PART;
    uint32_t rows = smaller(ROWS_PER_PART, batch.tokens - first);
    for (uint32_t i = threadIdx.x; i < rows * batch.width; i += KV_THREADS) {
        uint32_t token = first + i / batch.width, vector = i % batch.width;
        uint8_t *page = row_of(batch, at, token) + vector * 16;
        uint8_t *flat = part + ((uint64_t)token * batch.width + vector) * 16;
        if (is_nowhere(batch, at, token)) {
            if (!TO_PAGES) {
                store16(flat, uint4{0, 0, 0, 0});
            }
        } else if (TO_PAGES) {
            store16(page, load16(flat));
        } else {
            store16(flat, load16(page));
        }
    }
}

#define PARTS kv_ceil(batch.tokens, ROWS_PER_PART)

KV_KERNEL(raw_gather, PARTS, copy<0>(batch, at))
KV_KERNEL(raw_scatter, PARTS, copy<1>(batch, at))
