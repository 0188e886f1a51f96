/* nvfp4, storage layout: K centred, in blocks of 16 tokens of a channel; V in blocks of 16 channels
 * of a token. A part is a whole head when encoding, because of its common scale, and a tile when
 * decoding. Widths are multiples of 16, up to KV_WIDTH_MAX. */
#include "batch.cuh"
#include "means.cuh"
#include "nvfp4.cuh"

KV_INLINE kv_layout layout_of(const Batch &batch, uint32_t kind) {
    return kv_layout_of(KV_NVFP4, kind, batch.tokens, batch.width, batch.extra);
}

/* Code a block under the scale that brings its largest value to *target*; return what is lost, as
 * a tree. */
KV_INLINE float try_block(const float *values, float size, float target, float tensor,
    uint32_t *scale, uint32_t *codes) {
    float lost[16];
    *scale = kv_nvfp4_block_scale(size, target, tensor);
    float unit = kv_nvfp4_unit((uint8_t)*scale, tensor), inverse = kv_inverse(unit);
#pragma unroll
    for (int i = 0; i < 16; i++) {
        codes[i] = kv_nvfp4_code(kv_mul(values[i], inverse));
        float missed = kv_sub(values[i], kv_nvfp4_value(codes[i], unit));
        lost[i] = kv_mul(missed, missed);
    }
#pragma unroll
    for (int half = 8; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; i++) {
            lost[i] = kv_add(lost[i], lost[i + half]);
        }
    }
    return lost[0];
}

/* Code 16 values; with a tensor scale of zero all codes are zero. */
KV_INLINE float code_block(
    const float *values, float tensor, uint32_t *scale, uint32_t *codes) {
    uint32_t other_scale, other[16];
    float size = 0.0f, squares = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        size = kv_max(size, kv_abs(values[i]));
        squares = kv_add(squares, kv_mul(values[i], values[i]));
    }
    float lost = try_block(values, size, 6.0f, tensor, scale, codes);
    float less = try_block(values, size, 4.0f, tensor, &other_scale, other);
    int is_empty = tensor == 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        codes[i] = is_empty ? 0u : less < lost ? other[i] : codes[i];
    }
    *scale = is_empty ? KV_NVFP4_EMPTY : less < lost ? other_scale : *scale;
    return is_empty ? squares : less < lost ? less : lost;
}

/* Rows q and q + half of *width* codes, from *codes* to byte rows of *pitch*. */
KV_INLINE void pack_rows(const uint8_t *codes, uint32_t width, uint32_t count, uint8_t *plane,
    uint32_t pitch) {
    uint32_t half = (count + 1) / 2, vectors = width / 8;
    for (uint32_t i = threadIdx.x; i < half * vectors; i += KV_THREADS) {
        uint32_t q = i / vectors, c = i % vectors * 8, packed[8];
#pragma unroll
        for (int j = 0; j < 8; j++) {
            uint32_t high = q + half < count ? codes[(q + half) * width + c + j] : 0u;
            packed[j] = codes[q * width + c + j] | high << 4;
        }
        store8(plane + (uint64_t)q * pitch + c, packed);
    }
}

/* The largest value of the head less its means; adds up the energy of the values. */
template <int DTYPE>
KV_INLINE int32_t size_of_head(
    const Batch &batch, const Place &at, const float *means, float *energy) {
    int32_t size = 0;
    float values[8];
    for (uint32_t token = threadIdx.x / KV_LANES; token < batch.tokens; token += KV_ROWS) {
        uint32_t channel = threadIdx.x % KV_LANES * 8;
        for (; token >= batch.sinks && channel < batch.width; channel += KV_SLAB) {
            read8<DTYPE>(batch, at, token, channel, values);
            *energy = kv_add(*energy, energy8(values));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                float value = means == nullptr ? values[i] : kv_sub(values[i], means[channel + i]);
                size = larger_key(size, kv_size_bits(value));
            }
        }
    }
    return largest_of_block(size);
}

KV_INLINE void store_tensor(uint8_t *where, float tensor) {
    if (threadIdx.x < 4) {
        ((uint32_t *)where)[threadIdx.x] = threadIdx.x == 0 ? kv_bits_of_float(tensor) : 0u;
    }
}

/* --- K ------------------------------------------------------------------------------------------------ */

/* A tile by 64 channels: a thread for every block of 16 tokens of a channel. */
template <int DTYPE>
KV_INLINE float encode_slab(const Batch &batch, const Place &at, const kv_layout &layout,
    uint8_t *block, const float *means, float tensor, uint32_t first, uint32_t slab) {
    __shared__ uint8_t tile[KV_TILE * KV_SLAB];
    uint32_t lane = threadIdx.x % KV_SLAB, group = threadIdx.x / KV_SLAB, codes[16], scale;
    uint32_t channel = slab * KV_SLAB + lane, count = smaller(KV_TILE, batch.tokens - first);
    uint32_t width = smaller(KV_SLAB, batch.width - slab * KV_SLAB);
    float values[16], lost = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; i++) {
        uint32_t token = first + group * 16 + i;
        values[i] = 0.0f;
        if (token >= batch.sinks && token < batch.tokens && lane < width) {
            float value = read1<DTYPE>(row_of(batch, at, token), channel);
            values[i] = kv_sub(value, means[channel]);
        }
    }
    if (lane < width && group * 16 < count) {
        lost = code_block(values, tensor, &scale, codes);
        uint8_t *scales = block + layout.part[1];
        scales[(uint64_t)(first / 16 + group) * batch.width + channel] = (uint8_t)scale;
        for (int i = 0; i < 16; i++) {
            tile[(group * 16 + i) * width + lane] = (uint8_t)codes[i];
        }
    }
    __syncthreads();
    uint8_t *plane = block + (uint64_t)(first / 2) * batch.width + slab * KV_SLAB;
    pack_rows(tile, width, count, plane, batch.width);
    __syncthreads();
    return lost;
}

template <int DTYPE> KV_INLINE void encode_keys(const Batch &batch, const Place &at) {
    __shared__ float means[KV_WIDTH_MAX];
    kv_layout layout = layout_of(batch, KV_KEYS);
    uint8_t *block = block_of(batch, at, layout.bytes);
    float error = 0.0f, energy = 0.0f;
    int broken = take_means<DTYPE>(batch, at, block + layout.part[2], means);
    int32_t size = size_of_head<DTYPE>(batch, at, means, &energy);
    broken |= size >= KV_INFINITE_BITS;
    float tensor = kv_nvfp4_tensor_scale(kv_float_of_bits((uint32_t)size));
    for (uint32_t first = 0; first < batch.tokens; first += KV_TILE) {
        for (uint32_t slab = 0; slab * KV_SLAB < batch.width; slab++) {
            float lost = encode_slab<DTYPE>(batch, at, layout, block, means, tensor, first, slab);
            error = kv_add(error, lost);
        }
    }
    zero_padding(layout, block);
    store_tensor(block + layout.part[3], tensor);
    report(batch, at, error, energy, broken);
}

/* --- V ------------------------------------------------------------------------------------------------ */

template <int DTYPE> KV_INLINE void encode_values(const Batch &batch, const Place &at) {
    __shared__ uint8_t tile[KV_TILE * KV_WIDTH_MAX];
    kv_layout layout = layout_of(batch, KV_VALUES);
    uint8_t *block = block_of(batch, at, layout.bytes);
    float error = 0.0f, energy = 0.0f;
    int32_t size = size_of_head<DTYPE>(batch, at, nullptr, &energy);
    float tensor = kv_nvfp4_tensor_scale(kv_float_of_bits((uint32_t)size));
    uint32_t groups = batch.width / 16;
    for (uint32_t first = 0; first < batch.tokens; first += KV_TILE) {
        uint32_t count = smaller(KV_TILE, batch.tokens - first);
        for (uint32_t i = threadIdx.x; i < count * groups; i += KV_THREADS) {
            uint32_t row = i / groups, group = i % groups, codes[16], scale;
            float values[16];
            read8<DTYPE>(batch, at, first + row, group * 16, values);
            read8<DTYPE>(batch, at, first + row, group * 16 + 8, values + 8);
            error = kv_add(error, code_block(values, tensor, &scale, codes));
            block[layout.part[1] + (uint64_t)(first + row) * groups + group] = (uint8_t)scale;
            for (int j = 0; j < 16; j++) {
                tile[row * batch.width + group * 16 + j] = (uint8_t)codes[j];
            }
        }
        __syncthreads();
        uint8_t *plane = block + (uint64_t)(first / 2) * batch.width;
        pack_rows(tile, batch.width, count, plane, batch.width);
        __syncthreads();
    }
    zero_padding(layout, block);
    store_tensor(block + layout.part[3], tensor);
    report(batch, at, error, energy, size >= KV_INFINITE_BITS);
}

/* --- both --------------------------------------------------------------------------------------------- */

template <int DTYPE, int KIND> KV_INLINE void decode(const Batch &batch, const Place &at) {
    kv_layout layout = layout_of(batch, KIND);
    const uint8_t *block = block_of(batch, at, layout.bytes);
    uint32_t first = at.part * KV_TILE, count = smaller(KV_TILE, batch.tokens - first);
    uint32_t half = (count + 1) / 2, row = threadIdx.x / KV_LANES, codes[8];
    float tensor = kv_float_of_bits(*(const uint32_t *)(block + layout.part[3])), values[8];
    uint32_t channel = threadIdx.x % KV_LANES * 8;
    for (; row < half && channel < batch.width; channel += KV_SLAB) {
        load8(block + (uint64_t)(first / 2 + row) * batch.width + channel, codes);
        for (uint32_t k = 0; k < 2 && row + k * half < count; k++) {
            uint32_t token = first + row + k * half, scales[8];
            const uint8_t *stored = block + layout.part[1];
            if (KIND == KV_KEYS) {
                load8(stored + (uint64_t)(token / 16) * batch.width + channel, scales);
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                uint64_t group = (uint64_t)token * (batch.width / 16) + channel / 16;
                uint32_t scale = KIND == KV_KEYS ? scales[i] : stored[group];
                float unit = kv_nvfp4_unit((uint8_t)scale, tensor);
                values[i] = kv_nvfp4_value(codes[i] >> (4 * k) & 15u, unit);
                if (KIND == KV_KEYS) {
                    const uint16_t *means = (const uint16_t *)(block + layout.part[2]);
                    values[i] = kv_add(values[i], kv_float_of_half(means[channel + i]));
                }
            }
            write8<DTYPE>(batch, at, token, channel, values);
        }
    }
}

#define KV_TILES kv_ceil(batch.tokens, KV_TILE)

KV_KERNEL(nvfp4_keys_encode_bf16, 1, encode_keys<KV_BF16>(batch, at))
KV_KERNEL(nvfp4_keys_encode_fp16, 1, encode_keys<KV_FP16>(batch, at))
KV_KERNEL(nvfp4_values_encode_bf16, 1, encode_values<KV_BF16>(batch, at))
KV_KERNEL(nvfp4_values_encode_fp16, 1, encode_values<KV_FP16>(batch, at))
KV_KERNEL(nvfp4_keys_decode_bf16, KV_TILES, (decode<KV_BF16, KV_KEYS>(batch, at)))
KV_KERNEL(nvfp4_keys_decode_fp16, KV_TILES, (decode<KV_FP16, KV_KEYS>(batch, at)))
KV_KERNEL(nvfp4_values_decode_bf16, KV_TILES, (decode<KV_BF16, KV_VALUES>(batch, at)))
KV_KERNEL(nvfp4_values_decode_fp16, KV_TILES, (decode<KV_FP16, KV_VALUES>(batch, at)))
