/* int4kv: K by channels of a tile, V by 64 channels of a token. Widths are multiples of 16. */
#include "batch.cuh"
#include "int4.cuh"

KV_INLINE kv_layout layout_of(const Batch &batch, uint32_t kind) {
    return kv_layout_of(KV_INT4, kind, batch.tokens, batch.width, batch.extra);
}

struct Range {
    uint16_t scale_bits, zero_bits;
    float scale, zero, inverse;
    int broken;
};

/* The parameters of a group from its least and greatest key; none for a group without tokens. */
KV_INLINE Range range_of(int32_t least, int32_t most) {
    Range made = {0, 0, 0.0f, 0.0f, 0.0f, 0};
    if (least <= most) {
        float low = kv_float_of_key(least), high = kv_float_of_key(most);
        made.scale_bits = kv_int4_scale(low, high);
        made.zero_bits = kv_int4_zero(low);
        made.broken = least < KV_KEY_MIN_FINITE || most > KV_KEY_MAX_FINITE ||
                      kv_half_is_broken(made.scale_bits) || kv_half_is_broken(made.zero_bits);
    }
    made.scale = kv_float_of_half(made.scale_bits);
    made.zero = kv_float_of_half(made.zero_bits);
    made.inverse = kv_inverse(made.scale);
    return made;
}

KV_INLINE uint32_t pair_of(const Range &range) {
    return range.scale_bits | (uint32_t)range.zero_bits << 16;
}

KV_INLINE float code(const Range &range, float value, uint32_t *found) {
    uint32_t bits = kv_int4_code(value, range.zero, range.inverse);
    *found = bits & 15u;
    float missed = kv_sub(value, kv_int4_value_of_bits(bits, range.zero, range.scale));
    return kv_mul(missed, missed);
}

#define KEY_MIN (-0x7fffffff - 1)
#define KEY_MAX 0x7fffffff

/* --- K: a part is a tile; rows q and q + half share bytes and a row of threads -------------------------- */

template <int DTYPE>
KV_INLINE void encode_slab(const Batch &batch, const Place &at, const kv_layout &layout,
    uint8_t *block, uint32_t slab, float *error, float *energy, int *broken) {
    uint32_t first = at.part * KV_TILE, end = smaller(first + KV_TILE, batch.tokens);
    uint32_t half = (end - first + 1) / 2, row = threadIdx.x / KV_LANES;
    uint32_t channel = slab * KV_SLAB + threadIdx.x % KV_LANES * 8;
    uint32_t tokens[2] = {first + row, first + row + half};
    int is_real[2] = {row < half && tokens[0] >= batch.sinks,
                      row < half && tokens[1] < end && tokens[1] >= batch.sinks};
    float values[2][8];
    int32_t least[8], most[8]; /* least: of negated keys, so that both are maxima */
#pragma unroll
    for (int i = 0; i < 8; i++) {
        least[i] = most[i] = KEY_MIN;
    }
#pragma unroll
    for (int k = 0; k < 2; k++) {
        read8<DTYPE>(batch, at, is_real[k] ? tokens[k] : batch.tokens, channel, values[k]);
        *energy = kv_add(*energy, energy8(values[k]));
#pragma unroll
        for (int i = 0; i < 8; i++) {
            int32_t key = kv_order_key(values[k][i]);
            most[i] = is_real[k] ? larger_key(most[i], key) : most[i];
            least[i] = is_real[k] ? larger_key(least[i], ~key) : least[i];
        }
    }
    __shared__ SlabKeys least_found, most_found;
    __shared__ Range ranges[KV_SLAB];
    post_largest(most, most_found);
    post_largest(least, least_found);
    __syncthreads();
    if (threadIdx.x < KV_SLAB) { /* a division is dear: one thread makes it for all rows */
        ranges[threadIdx.x] = range_of(~largest_of_channel(least_found, threadIdx.x),
                                       largest_of_channel(most_found, threadIdx.x));
        *broken |= ranges[threadIdx.x].broken && slab * KV_SLAB + threadIdx.x < batch.width;
    }
    __syncthreads();
    uint32_t pairs[8], codes[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const Range &range = ranges[threadIdx.x % KV_LANES * 8 + i];
        uint32_t low, high;
        pairs[i] = pair_of(range);
        float lost = code(range, is_real[0] ? values[0][i] : range.zero, &low);
        *error = kv_add(*error, is_real[0] ? lost : 0.0f);
        lost = code(range, is_real[1] ? values[1][i] : range.zero, &high);
        *error = kv_add(*error, is_real[1] ? lost : 0.0f);
        codes[i] = low | high << 4;
    }
    if (channel >= batch.width) {
        return;
    }
    if (row < half) {
        store8(block + (uint64_t)(first / 2 + row) * batch.width + channel, codes);
    }
    if (row == 0) {
        uint8_t *where = block + layout.part[1] + (uint64_t)(at.part * batch.width + channel) * 4;
        store16(where, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
        store16(where + 16, uint4{pairs[4], pairs[5], pairs[6], pairs[7]});
    }
}

template <int DTYPE> KV_INLINE void encode_keys(const Batch &batch, const Place &at) {
    kv_layout layout = layout_of(batch, KV_KEYS);
    uint8_t *block = block_of(batch, at, layout.bytes);
    float error = 0.0f, energy = 0.0f;
    int broken = 0;
    for (uint32_t slab = 0; slab * KV_SLAB < batch.width; slab++) {
        encode_slab<DTYPE>(batch, at, layout, block, slab, &error, &energy, &broken);
    }
    if (at.part == 0) {
        zero_padding(layout, block);
    }
    report(batch, at, error, energy, broken);
}

template <int DTYPE> KV_INLINE void decode_keys(const Batch &batch, const Place &at) {
    kv_layout layout = layout_of(batch, KV_KEYS);
    const uint8_t *block = block_of(batch, at, layout.bytes);
    uint32_t first = at.part * KV_TILE, end = smaller(first + KV_TILE, batch.tokens);
    uint32_t half = (end - first + 1) / 2, row = threadIdx.x / KV_LANES;
    if (row >= half) {
        return;
    }
    uint32_t channel = threadIdx.x % KV_LANES * 8;
    for (; channel < batch.width; channel += KV_SLAB) {
        uint64_t place = layout.part[1] + (uint64_t)(at.part * batch.width + channel) * 4;
        uint4 near = load16(block + place), far = load16(block + place + 16);
        const uint32_t pairs[8] = {near.x, near.y, near.z, near.w, far.x, far.y, far.z, far.w};
        uint32_t codes[8];
        float low[8], high[8];
        load8(block + (uint64_t)(first / 2 + row) * batch.width + channel, codes);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float scale = kv_float_of_half((uint16_t)pairs[i]);
            float zero = kv_float_of_half((uint16_t)(pairs[i] >> 16));
            low[i] = kv_int4_value(codes[i] & 15u, zero, scale);
            high[i] = kv_int4_value(codes[i] >> 4, zero, scale);
        }
        write8<DTYPE>(batch, at, first + row, channel, low);
        if (first + row + half < end) {
            write8<DTYPE>(batch, at, first + row + half, channel, high);
        }
    }
}

/* --- V: a part is a tile; eight threads hold a group of a token ------------------------------------------ */

template <int DTYPE>
KV_INLINE void encode_group(const Batch &batch, const Place &at, const kv_layout &layout,
    uint8_t *block, uint32_t token, uint32_t group, float *error, float *energy, int *broken) {
    uint32_t lane = threadIdx.x % KV_LANES, base = threadIdx.x % 32 - lane;
    uint32_t lanes = smaller(KV_SLAB, batch.width - group * KV_SLAB) / 8; /* of them in use */
    int is_real = token >= batch.sinks && token < batch.tokens && lane < lanes;
    uint32_t channel = group * KV_SLAB + lane * 8;
    float values[8];
    int32_t least = KEY_MIN, most = KEY_MIN; /* least: of negated keys */
    read8<DTYPE>(batch, at, is_real ? token : batch.tokens, channel, values);
    *energy = kv_add(*energy, energy8(values));
#pragma unroll
    for (int i = 0; i < 8; i++) {
        int32_t key = kv_order_key(values[i]);
        most = is_real ? larger_key(most, key) : most;
        least = is_real ? larger_key(least, ~key) : least;
    }
    for (int mask = KV_LANES / 2; mask > 0; mask >>= 1) {
        most = larger_key(most, shuffled(most, mask));
        least = larger_key(least, shuffled(least, mask));
    }
    Range range = range_of(~least, most);
    *broken |= range.broken;
    uint32_t nibbles = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        uint32_t found;
        float lost = code(range, is_real ? values[i] : range.zero, &found);
        *error = kv_add(*error, is_real ? lost : 0.0f);
        nibbles |= found << (4 * i);
    }
    uint32_t others = __shfl_sync(KV_EVERY_LANE, nibbles, base + (lane + lanes / 2) % KV_LANES);
    if (token >= batch.tokens) {
        return;
    }
    if (lane < lanes / 2) {
        uint32_t codes[8];
#pragma unroll
        for (int i = 0; i < 8; i++) {
            codes[i] = (nibbles >> (4 * i) & 15u) | (others >> (4 * i) & 15u) << 4;
        }
        uint64_t row = (uint64_t)token * kv_int4_row_bytes(batch.width);
        store8(block + row + group * (KV_SLAB / 2) + lane * 8, codes);
    }
    if (lane == 0) {
        uint64_t groups = kv_ceil(batch.width, KV_INT4_CHANNELS);
        ((uint32_t *)(block + layout.part[1]))[token * groups + group] = pair_of(range);
    }
}

template <int DTYPE> KV_INLINE void encode_values(const Batch &batch, const Place &at) {
    kv_layout layout = layout_of(batch, KV_VALUES);
    uint8_t *block = block_of(batch, at, layout.bytes);
    float error = 0.0f, energy = 0.0f;
    int broken = 0;
    for (uint32_t k = 0; k < KV_TILE / KV_ROWS; k++) {
        uint32_t token = at.part * KV_TILE + threadIdx.x / KV_LANES + k * KV_ROWS;
        for (uint32_t group = 0; group * KV_SLAB < batch.width; group++) {
            encode_group<DTYPE>(batch, at, layout, block, token, group, &error, &energy, &broken);
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
    uint32_t lane = threadIdx.x % KV_LANES;
    for (uint32_t k = 0; k < KV_TILE / KV_ROWS; k++) {
        uint32_t token = at.part * KV_TILE + threadIdx.x / KV_LANES + k * KV_ROWS;
        if (token >= batch.tokens) {
            return;
        }
        for (uint32_t group = 0; group * KV_SLAB < batch.width; group++) {
            uint32_t lanes = smaller(KV_SLAB, batch.width - group * KV_SLAB) / 8;
            uint64_t groups = kv_ceil(batch.width, KV_INT4_CHANNELS);
            uint32_t pair = ((const uint32_t *)(block + layout.part[1]))[token * groups + group];
            float scale = kv_float_of_half((uint16_t)pair), values[8];
            float zero = kv_float_of_half((uint16_t)(pair >> 16));
            if (lane >= lanes) {
                continue;
            }
            uint32_t codes[8], is_high = lane >= lanes / 2;
            uint64_t row = (uint64_t)token * kv_int4_row_bytes(batch.width);
            uint32_t byte = (lane - (is_high ? lanes / 2 : 0)) * 8;
            load8(block + row + group * (KV_SLAB / 2) + byte, codes);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                values[i] = kv_int4_value(codes[i] >> (4 * is_high) & 15u, zero, scale);
            }
            write8<DTYPE>(batch, at, token, group * KV_SLAB + lane * 8, values);
        }
    }
}

#define KV_TILES kv_ceil(batch.tokens, KV_TILE)

KV_KERNEL(int4_keys_encode_bf16, KV_TILES, encode_keys<KV_BF16>(batch, at))
KV_KERNEL(int4_keys_encode_fp16, KV_TILES, encode_keys<KV_FP16>(batch, at))
KV_KERNEL(int4_keys_encode_fp32, KV_TILES, encode_keys<KV_FP32>(batch, at))
KV_KERNEL(int4_keys_decode_bf16, KV_TILES, decode_keys<KV_BF16>(batch, at))
KV_KERNEL(int4_keys_decode_fp16, KV_TILES, decode_keys<KV_FP16>(batch, at))
KV_KERNEL(int4_keys_decode_fp32, KV_TILES, decode_keys<KV_FP32>(batch, at))
KV_KERNEL(int4_values_encode_bf16, KV_TILES, encode_values<KV_BF16>(batch, at))
KV_KERNEL(int4_values_encode_fp16, KV_TILES, encode_values<KV_FP16>(batch, at))
KV_KERNEL(int4_values_encode_fp32, KV_TILES, encode_values<KV_FP32>(batch, at))
KV_KERNEL(int4_values_decode_bf16, KV_TILES, decode_values<KV_BF16>(batch, at))
KV_KERNEL(int4_values_decode_fp16, KV_TILES, decode_values<KV_FP16>(batch, at))
KV_KERNEL(int4_values_decode_fp32, KV_TILES, decode_values<KV_FP32>(batch, at))
