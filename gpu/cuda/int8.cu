/* int8kv: K with a scale per channel and group of tokens, V with a scale per token and head. */
#include "batch.cuh"
#include "int8.cuh"
#include "layout.cuh"

/* --- K: a tile is one group of tokens by 64 channels ------------------------------------------------ */

/* Find the largest size of every channel of the slab among all threads of the block. */
KV_INLINE void largest_of_channels(int32_t *sizes, int32_t (*shared)[KV_SLAB]) {
    uint32_t lane = threadIdx.x % KV_LANES, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int32_t other = shuffled(sizes[i], 8);
        sizes[i] = sizes[i] > other ? sizes[i] : other;
        other = shuffled(sizes[i], 16);
        sizes[i] = sizes[i] > other ? sizes[i] : other;
    }
    if (threadIdx.x % 32 < KV_LANES) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            shared[warp][lane * 8 + i] = sizes[i];
        }
    }
    __syncthreads();
    if (threadIdx.x < KV_SLAB) {
        int32_t largest = 0;
        for (int i = 0; i < KV_THREADS / 32; i++) {
            int32_t size = shared[i][threadIdx.x];
            largest = largest > size ? largest : size;
        }
        shared[0][threadIdx.x] = largest;
    }
    __syncthreads();
}

template <int DTYPE> KV_INLINE void encode_keys(const Batch &batch, const Place &at) {
    __shared__ int32_t shared[KV_THREADS / 32][KV_SLAB];
    uint32_t channel = at.slab * KV_SLAB + threadIdx.x % KV_LANES * 8;
    uint32_t first = at.part * KV_INT8_GROUP, row = threadIdx.x / KV_LANES;
    uint32_t rows = kv_smaller(KV_INT8_GROUP, batch.tokens - first);
    int is_inside = channel < batch.width;
    uint4 packed[KV_INT8_GROUP / KV_ROWS];
    int32_t sizes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    float energy = 0.0f, error = 0.0f, values[8];
#pragma unroll
    for (int k = 0; k < KV_INT8_GROUP / KV_ROWS; k++) {
        uint32_t token = row + k * KV_ROWS;
        packed[k] = uint4{0, 0, 0, 0};
        if (is_inside && token < rows) {
            packed[k] = load16(row_of(batch, at, first + token) + channel * 2);
        }
    }
#pragma unroll
    for (int k = 0; k < KV_INT8_GROUP / KV_ROWS; k++) {
        widen8<DTYPE>(packed[k], values);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int32_t size = kv_size_bits(values[i]);
            sizes[i] = sizes[i] > size ? sizes[i] : size;
            energy = kv_add(energy, kv_mul(values[i], values[i]));
        }
    }
    largest_of_channels(sizes, shared);
    uint8_t *slice = section_of(batch, at) + at.head * kv_int8_slice_bytes(0, batch.tokens, batch.width);
    float scales[8], inverses[8];
    int broken = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int32_t size = shared[0][threadIdx.x % KV_LANES * 8 + i];
        broken |= size >= KV_INFINITE_BITS;
        uint16_t stored = kv_int8_scale(kv_float_of_bits((uint32_t)size));
        scales[i] = kv_float_of_bf16(stored);
        inverses[i] = kv_inverse(scales[i]);
        if (is_inside && row == 0) {
            uint8_t *where = slice + kv_int8_scales_at(batch.tokens, batch.width);
            ((uint16_t *)where)[at.part * batch.width + channel + i] = stored;
        }
    }
#pragma unroll
    for (int k = 0; k < KV_INT8_GROUP / KV_ROWS; k++) {
        uint32_t token = row + k * KV_ROWS, codes[8];
        widen8<DTYPE>(packed[k], values);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            codes[i] = kv_int8_code(values[i], inverses[i]);
            float missed = kv_sub(values[i], kv_int8_of_bits(codes[i], scales[i]));
            error = kv_add(error, kv_mul(missed, missed));
        }
        if (is_inside && token < rows) {
            uint8_t *where = slice + (uint64_t)(first + token) * batch.width + channel;
            *(uint2 *)where = uint2{packed4(codes), packed4(codes + 4)};
        }
    }
    report(batch, at, error, energy, broken);
}
