/* Lay the sections of containers one behind the other, when their sizes are known: each begins at a
 * multiple of 256, the first where its span says, and what lies between is zero. */
#include "spans.cuh"

#define UNIT 256u /* sections begin at multiples of it */

KV_INLINE void lay(const Batch &batch, uint32_t chunk) {
    Span *spans = batch.spans + (uint64_t)chunk * batch.span_count;
    uint8_t *container = (uint8_t *)batch.containers[chunk];
    uint64_t first = spans[0].offset;
    __syncthreads();
    for (uint32_t base = 0; base < batch.span_count; base += KV_THREADS) {
        uint32_t i = base + threadIdx.x, total;
        uint64_t size = i < batch.span_count ? spans[i].size : 0;
        uint64_t offset = first + (uint64_t)UNIT * sum_before((uint32_t)kv_ceil(size, UNIT), &total);
        if (i < batch.span_count) {
            spans[i].offset = offset;
            for (uint64_t at = kv_pad16(size); at < kv_ceil(size, UNIT) * UNIT; at += 16) {
                store16(container + offset + at, uint4{0, 0, 0, 0});
            }
        }
        first += (uint64_t)UNIT * total;
    }
}

extern "C" __global__ void __launch_bounds__(KV_THREADS) spans_lay(const Batch batch) {
    for (uint32_t chunk = blockIdx.x; chunk < batch.chunk_count; chunk += gridDim.x) {
        lay(batch, chunk);
    }
}
