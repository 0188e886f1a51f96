/* nvfp4-compat: as ModelOpt keeps a tensor. Blocks of 16 channels of a token under an e4m3 scale, all
 * of a section under one float. K and V are alike. Widths are multiples of 16. */
#include "batch.cuh"
#include "nvfp4.cuh"

#define KV_COMPAT_RANGE 2688.0f /* 448 * 6 */
#define KV_COMPAT_EMPTY 1.0f

KV_INLINE kv_layout layout_of(const Batch &batch) {
    return kv_layout_of(KV_COMPAT, KV_VALUES, batch.tokens, batch.width, batch.extra);
}

/* A part is a section: the scale that all of it has in common, into every head block. */
template <int DTYPE> KV_INLINE void scale(const Batch &batch, Place at) {
    kv_layout layout = layout_of(batch);
    uint32_t vectors = batch.width / 8;
    int32_t size = 0;
    for (at.head = 0; at.head < batch.heads; at.head++) {
        for (uint32_t i = threadIdx.x; i < batch.tokens * vectors; i += KV_THREADS) {
            float values[8];
            read8<DTYPE>(batch, at, i / vectors, i % vectors * 8, values);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                size = larger_key(size, kv_size_bits(values[j]));
            }
        }
    }
    size = largest_of_block(size);
    int is_broken = size >= KV_INFINITE_BITS;
    float tensor = is_broken ? 0.0f : kv_div(kv_float_of_bits((uint32_t)size), KV_COMPAT_RANGE);
    for (at.head = 0; at.head < batch.heads; at.head++) {
        uint32_t *stored = (uint32_t *)(block_of(batch, at, layout.bytes) + layout.part[2]);
        if (threadIdx.x < 4) {
            stored[threadIdx.x] = threadIdx.x == 0 ? kv_bits_of_float(tensor) : 0u;
        }
    }
    if (is_broken && threadIdx.x == 0) {
        report_of(batch, at)->broken = 1;
    }
    __syncthreads();
}

/* Code 16 values; return what is lost. */
KV_INLINE float code_block(const float *values, float tensor, uint32_t *codes, uint8_t *stored) {
    float size = 0.0f, lost = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        size = kv_max(size, kv_abs(values[i]));
    }
    int is_empty = !(tensor > 0.0f);
    float wanted = is_empty ? 0.0f : kv_div(size, kv_mul(KV_E2M1_MAX, tensor));
    wanted = wanted == 0.0f ? KV_COMPAT_EMPTY : wanted;
    *stored = kv_e4m3_of_float(kv_min(kv_max(wanted, KV_NVFP4_LEAST), KV_E4M3_MAX));
    float unit = kv_nvfp4_unit(*stored, tensor);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        codes[i] = is_empty ? 0u : kv_nvfp4_code(kv_div(values[i], unit));
        float missed = kv_sub(values[i], kv_nvfp4_value(codes[i], unit));
        lost = kv_add(lost, kv_mul(missed, missed));
    }
    return lost;
}

/* A part is a tile; a thread has a block of channels. */
template <int DTYPE> KV_INLINE void encode(const Batch &batch, const Place &at) {
    kv_layout layout = layout_of(batch);
    uint8_t *block = block_of(batch, at, layout.bytes);
    float tensor = kv_float_of_bits(*(const uint32_t *)(block + layout.part[2]));
    uint32_t groups = batch.width / 16, first = at.part * KV_TILE;
    uint32_t count = smaller(KV_TILE, batch.tokens - first) * groups;
    float error = 0.0f, energy = 0.0f;
    for (uint32_t i = threadIdx.x; i < count; i += KV_THREADS) {
        uint32_t token = first + i / groups, channel = i % groups * 16, codes[16], packed[8];
        uint64_t place = (uint64_t)first * groups + i;
        float values[16];
        read8<DTYPE>(batch, at, token, channel, values);
        read8<DTYPE>(batch, at, token, channel + 8, values + 8);
        energy = kv_add(energy, kv_add(energy8(values), energy8(values + 8)));
        error = kv_add(error, code_block(values, tensor, codes, block + layout.part[1] + place));
#pragma unroll
        for (int j = 0; j < 8; j++) {
            packed[j] = codes[2 * j] | codes[2 * j + 1] << 4;
        }
        store8(block + place * 8, packed);
    }
    if (at.part == 0) {
        zero_padding(layout, block);
    }
    report(batch, at, error, energy, 0);
}

template <int DTYPE> KV_INLINE void decode(const Batch &batch, const Place &at) {
    kv_layout layout = layout_of(batch);
    const uint8_t *block = block_of(batch, at, layout.bytes);
    float tensor = kv_float_of_bits(*(const uint32_t *)(block + layout.part[2]));
    uint32_t groups = batch.width / 16, first = at.part * KV_TILE;
    uint32_t count = smaller(KV_TILE, batch.tokens - first) * groups;
    for (uint32_t i = threadIdx.x; i < count; i += KV_THREADS) {
        uint32_t token = first + i / groups, channel = i % groups * 16, packed[8];
        uint64_t place = (uint64_t)first * groups + i;
        float unit = kv_nvfp4_unit(block[layout.part[1] + place], tensor), values[16];
        load8(block + place * 8, packed);
#pragma unroll
        for (int j = 0; j < 16; j++) {
            values[j] = kv_nvfp4_value(packed[j / 2] >> (4 * (j % 2)) & 15u, unit);
        }
        write8<DTYPE>(batch, at, token, channel, values);
        write8<DTYPE>(batch, at, token, channel + 8, values + 8);
    }
}

#define KV_TILES kv_ceil(batch.tokens, KV_TILE)
#define EACH(dtype, DTYPE)                                                                         \
    KV_SECTION_KERNEL(compat_scale_##dtype, 1, scale<DTYPE>(batch, at))                            \
    KV_KERNEL(compat_encode_##dtype, KV_TILES, encode<DTYPE>(batch, at))                           \
    KV_KERNEL(compat_decode_##dtype, KV_TILES, decode<DTYPE>(batch, at))

EACH(bf16, KV_BF16)
EACH(fp16, KV_FP16)
EACH(fp32, KV_FP32)
