/* int8kv: K with a scale per channel and group of 256 tokens, V with a scale per token and head. */
#include "batch.cuh"
#include "int8.cuh"

#define GROUP_ROWS (KV_INT8_GROUP / KV_ROWS)

KV_INLINE kv_layout layout_of(const Batch &batch, uint32_t kind) {
    return kv_layout_of(KV_INT8, kind, batch.tokens, batch.width, batch.extra);
}

KV_INLINE uint32_t groups_of(const Batch &batch) {
    return (uint32_t)kv_ceil(batch.tokens, KV_INT8_GROUP);
}

KV_INLINE uint32_t slabs_of(const Batch &batch) { return (uint32_t)kv_ceil(batch.width, KV_SLAB); }

/* Code eight values; return the sum of squares of what is lost. */
KV_INLINE float code8(
    const float *values, const float *scales, const float *inverses, uint32_t *codes) {
    float error = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        codes[i] = kv_int8_code(values[i], inverses[i]);
        float missed = kv_sub(values[i], kv_int8_value_of_bits(codes[i], scales[i]));
        error = kv_add(error, kv_mul(missed, missed));
    }
    return error;
}

/* --- K: a part is one group of tokens by 64 channels ------------------------------------------------- */

template <int DTYPE> KV_INLINE void encode_keys(const Batch &batch, const Place &at) {
    uint32_t group = at.part / slabs_of(batch), slab = at.part % slabs_of(batch);
    uint32_t channel = slab * KV_SLAB + threadIdx.x % KV_LANES * 8;
    uint32_t token = group * KV_INT8_GROUP + threadIdx.x / KV_LANES;
    kv_layout layout = layout_of(batch, KV_KEYS);
    uint8_t *block = block_of(batch, at, layout.bytes);
    Packed<DTYPE> packed[GROUP_ROWS];
    int32_t sizes[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    float values[8], scales[8], inverses[8], energy = 0.0f, error = 0.0f;
#pragma unroll
    for (uint32_t k = 0; k < GROUP_ROWS; k++) {
        packed[k] = load_real<DTYPE>(batch, at, token + k * KV_ROWS, channel);
    }
#pragma unroll
    for (uint32_t k = 0; k < GROUP_ROWS; k++) {
        widen8<DTYPE>(packed[k], values);
        energy = kv_add(energy, energy8(values));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sizes[i] = larger_key(sizes[i], kv_size_bits(values[i]));
        }
    }
    __shared__ SlabKeys found;
    __shared__ float scale_of[KV_SLAB], inverse_of[KV_SLAB];
    uint32_t stored[8];
    int broken = 0;
    post_largest(sizes, found);
    __syncthreads();
    if (threadIdx.x < KV_SLAB) { /* divisions are dear: one thread makes them for all rows */
        int32_t size = largest_of_channel(found, threadIdx.x);
        broken = size >= KV_INFINITE_BITS;
        float scale = kv_float_of_bf16(kv_int8_scale(kv_float_of_bits((uint32_t)size)));
        scale_of[threadIdx.x] = scale;
        inverse_of[threadIdx.x] = kv_inverse(scale);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 8; i++) {
        scales[i] = scale_of[threadIdx.x % KV_LANES * 8 + i];
        inverses[i] = inverse_of[threadIdx.x % KV_LANES * 8 + i];
        stored[i] = kv_bits_of_float(scales[i]) >> 16;
    }
    if (threadIdx.x < KV_LANES && channel < batch.width) {
        uint8_t *where = block + layout.part[1] + (uint64_t)(group * batch.width + channel) * 2;
        store16(where, uint4{stored[0] | stored[1] << 16, stored[2] | stored[3] << 16,
                             stored[4] | stored[5] << 16, stored[6] | stored[7] << 16});
    }
#pragma unroll
    for (uint32_t k = 0; k < GROUP_ROWS; k++) {
        uint32_t t = token + k * KV_ROWS, codes[8];
        widen8<DTYPE>(packed[k], values);
        error = kv_add(error, code8(values, scales, inverses, codes));
        if (t < batch.tokens && channel < batch.width) {
            store8(block + (uint64_t)t * batch.width + channel, codes);
        }
    }
    if (at.part == 0) {
        zero_padding(layout, block);
    }
    report(batch, at, error, energy, broken);
}

template <int DTYPE> KV_INLINE void decode_keys(const Batch &batch, const Place &at) {
    uint32_t group = at.part / slabs_of(batch), slab = at.part % slabs_of(batch);
    uint32_t channel = slab * KV_SLAB + threadIdx.x % KV_LANES * 8;
    uint32_t token = group * KV_INT8_GROUP + threadIdx.x / KV_LANES;
    kv_layout layout = layout_of(batch, KV_KEYS);
    const uint8_t *block = block_of(batch, at, layout.bytes);
    if (channel >= batch.width) {
        return;
    }
    float scales[8], values[8];
    uint64_t place = layout.part[1] + (uint64_t)(group * batch.width + channel) * 2;
    widen8<KV_BF16>(load_values<KV_BF16>(block + place, 0), scales);
#pragma unroll
    for (uint32_t k = 0; k < GROUP_ROWS; k++) {
        uint32_t t = token + k * KV_ROWS, codes[8];
        if (t < batch.tokens) {
            load8(block + (uint64_t)t * batch.width + channel, codes);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                values[i] = kv_int8_value((int8_t)codes[i], scales[i]);
            }
            write8<DTYPE>(batch, at, t, channel, values);
        }
    }
}

/* --- V: a part is one tile of 64 tokens; eight threads share a token ----------------------------------- */

template <int DTYPE> KV_INLINE void encode_values(const Batch &batch, const Place &at) {
    kv_layout layout = layout_of(batch, KV_VALUES);
    uint8_t *block = block_of(batch, at, layout.bytes);
    uint32_t lane = threadIdx.x % KV_LANES;
    float values[8], energy = 0.0f, error = 0.0f;
    int broken = 0;
    for (uint32_t k = 0; k < KV_TILE / KV_ROWS; k++) {
        uint32_t token = at.part * KV_TILE + threadIdx.x / KV_LANES + k * KV_ROWS;
        int32_t size = 0;
        for (uint32_t channel = lane * 8; channel < batch.width; channel += KV_SLAB) {
            read8<DTYPE>(batch, at, token, channel, values);
            energy = kv_add(energy, energy8(values));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                size = larger_key(size, kv_size_bits(values[i]));
            }
        }
        for (int mask = KV_LANES / 2; mask > 0; mask >>= 1) {
            size = larger_key(size, shuffled(size, mask));
        }
        broken |= size >= KV_INFINITE_BITS;
        uint16_t stored = kv_int8_scale(kv_float_of_bits((uint32_t)size));
        float scale = kv_float_of_bf16(stored), inverse = kv_inverse(scale);
        float scales[8] = {scale, scale, scale, scale, scale, scale, scale, scale};
        float inverses[8] = {inverse, inverse, inverse, inverse,
                             inverse, inverse, inverse, inverse};
        if (token < batch.tokens && lane == 0) {
            ((uint16_t *)(block + layout.part[1]))[token] = stored;
        }
        for (uint32_t channel = lane * 8; channel < batch.width; channel += KV_SLAB) {
            uint32_t codes[8];
            read8<DTYPE>(batch, at, token, channel, values); /* in the nearest cache by now */
            error = kv_add(error, code8(values, scales, inverses, codes));
            if (token < batch.tokens) {
                store8(block + (uint64_t)token * batch.width + channel, codes);
            }
        }
    }
    if (at.part == 0) {
        zero_padding(layout, block);
    }
    report(batch, at, error, energy, broken);
}

template <int DTYPE> KV_INLINE void decode_values(const Batch &batch, const Place &at) {
    kv_layout layout = layout_of(batch, KV_VALUES);
    const uint8_t *block = block_of(batch, at, layout.bytes);
    float values[8];
    for (uint32_t k = 0; k < KV_TILE / KV_ROWS; k++) {
        uint32_t token = at.part * KV_TILE + threadIdx.x / KV_LANES + k * KV_ROWS;
        if (token >= batch.tokens) {
            return;
        }
        float scale = kv_float_of_bf16(((const uint16_t *)(block + layout.part[1]))[token]);
        uint32_t channel = threadIdx.x % KV_LANES * 8;
        for (; channel < batch.width; channel += KV_SLAB) {
            uint32_t codes[8];
            load8(block + (uint64_t)token * batch.width + channel, codes);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                values[i] = kv_int8_value((int8_t)codes[i], scale);
            }
            write8<DTYPE>(batch, at, token, channel, values);
        }
    }
}

#define KV_KEY_PARTS (groups_of(batch) * slabs_of(batch))
#define KV_VALUE_PARTS kv_ceil(batch.tokens, KV_TILE)

KV_KERNEL(int8_keys_encode_bf16, KV_KEY_PARTS, encode_keys<KV_BF16>(batch, at))
KV_KERNEL(int8_keys_encode_fp16, KV_KEY_PARTS, encode_keys<KV_FP16>(batch, at))
KV_KERNEL(int8_keys_encode_fp32, KV_KEY_PARTS, encode_keys<KV_FP32>(batch, at))
KV_KERNEL(int8_keys_decode_bf16, KV_KEY_PARTS, decode_keys<KV_BF16>(batch, at))
KV_KERNEL(int8_keys_decode_fp16, KV_KEY_PARTS, decode_keys<KV_FP16>(batch, at))
KV_KERNEL(int8_keys_decode_fp32, KV_KEY_PARTS, decode_keys<KV_FP32>(batch, at))
KV_KERNEL(int8_values_encode_bf16, KV_VALUE_PARTS, encode_values<KV_BF16>(batch, at))
KV_KERNEL(int8_values_encode_fp16, KV_VALUE_PARTS, encode_values<KV_FP16>(batch, at))
KV_KERNEL(int8_values_encode_fp32, KV_VALUE_PARTS, encode_values<KV_FP32>(batch, at))
KV_KERNEL(int8_values_decode_bf16, KV_VALUE_PARTS, decode_values<KV_BF16>(batch, at))
KV_KERNEL(int8_values_decode_fp16, KV_VALUE_PARTS, decode_values<KV_FP16>(batch, at))
KV_KERNEL(int8_values_decode_fp32, KV_VALUE_PARTS, decode_values<KV_FP32>(batch, at))
