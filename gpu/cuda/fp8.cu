/* fp8: e4m3 under one power of two for a head. A part is a whole head, read twice: the second time
 * from the cache. */
#include "batch.cuh"
#include "fp8.cuh"

KV_INLINE kv_layout layout_of(const Batch &batch) {
    return kv_layout_of(KV_FP8, KV_KEYS, batch.tokens, batch.width, batch.extra);
}

template <int DTYPE> KV_INLINE void encode(const Batch &batch, const Place &at) {
    kv_layout layout = layout_of(batch);
    uint8_t *block = block_of(batch, at, layout.bytes);
    float values[8], energy = 0.0f, error = 0.0f;
    int32_t size = 0;
    for (uint32_t token = threadIdx.x / KV_LANES; token < batch.tokens; token += KV_ROWS) {
        uint32_t channel = threadIdx.x % KV_LANES * 8;
        for (; channel < batch.width; channel += KV_SLAB) {
            read8<DTYPE>(batch, at, token, channel, values);
            energy = kv_add(energy, energy8(values));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                size = larger_key(size, kv_size_bits(values[i]));
            }
        }
    }
    size = largest_of_block(size);
    int broken = size >= KV_INFINITE_BITS;
    int32_t exponent = broken ? 0 : kv_fp8_exponent(size);
    float scale = kv_power_of_two(exponent), inverse = kv_power_of_two(-exponent);
    for (uint32_t token = threadIdx.x / KV_LANES; token < batch.tokens; token += KV_ROWS) {
        uint32_t channel = threadIdx.x % KV_LANES * 8, codes[8];
        for (; channel < batch.width; channel += KV_SLAB) {
            read8<DTYPE>(batch, at, token, channel, values);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                codes[i] = kv_fp8_code(values[i], inverse);
                float missed = kv_sub(values[i], kv_fp8_value((uint8_t)codes[i], scale));
                error = kv_add(error, kv_mul(missed, missed));
            }
            store8(block + (uint64_t)token * batch.width + channel, codes);
        }
    }
    zero_padding(layout, block);
    if (threadIdx.x < 16) {
        block[layout.part[1] + threadIdx.x] = threadIdx.x == 0 ? (uint8_t)(int8_t)exponent : 0;
    }
    report(batch, at, error, energy, broken);
}

/* Decoding needs nothing but the exponent: a part is one tile. */
template <int DTYPE> KV_INLINE void decode(const Batch &batch, const Place &at) {
    kv_layout layout = layout_of(batch);
    const uint8_t *block = block_of(batch, at, layout.bytes);
    float scale = kv_power_of_two((int8_t)block[layout.part[1]]), values[8];
    for (uint32_t k = 0; k < KV_TILE / KV_ROWS; k++) {
        uint32_t token = at.part * KV_TILE + threadIdx.x / KV_LANES + k * KV_ROWS;
        uint32_t channel = threadIdx.x % KV_LANES * 8, codes[8];
        for (; token < batch.tokens && channel < batch.width; channel += KV_SLAB) {
            load8(block + (uint64_t)token * batch.width + channel, codes);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                values[i] = kv_fp8_value((uint8_t)codes[i], scale);
            }
            write8<DTYPE>(batch, at, token, channel, values);
        }
    }
}

#define KV_TILES kv_ceil(batch.tokens, KV_TILE)

/* K and V are alike; both names exist, so that whoever launches need not know. */
KV_KERNEL(fp8_keys_encode_bf16, 1, encode<KV_BF16>(batch, at))
KV_KERNEL(fp8_keys_encode_fp16, 1, encode<KV_FP16>(batch, at))
KV_KERNEL(fp8_keys_encode_fp32, 1, encode<KV_FP32>(batch, at))
KV_KERNEL(fp8_keys_decode_bf16, KV_TILES, decode<KV_BF16>(batch, at))
KV_KERNEL(fp8_keys_decode_fp16, KV_TILES, decode<KV_FP16>(batch, at))
KV_KERNEL(fp8_keys_decode_fp32, KV_TILES, decode<KV_FP32>(batch, at))
KV_KERNEL(fp8_values_encode_bf16, 1, encode<KV_BF16>(batch, at))
KV_KERNEL(fp8_values_encode_fp16, 1, encode<KV_FP16>(batch, at))
KV_KERNEL(fp8_values_encode_fp32, 1, encode<KV_FP32>(batch, at))
KV_KERNEL(fp8_values_decode_bf16, KV_TILES, decode<KV_BF16>(batch, at))
KV_KERNEL(fp8_values_decode_fp16, KV_TILES, decode<KV_FP16>(batch, at))
KV_KERNEL(fp8_values_decode_fp32, KV_TILES, decode<KV_FP32>(batch, at))
