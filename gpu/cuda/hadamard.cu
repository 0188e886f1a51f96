/* hq4 and hq3: a part is a whole head for K, whose channels are centred and equalised first, and a
 * tile for V and for decoding. A warp transforms one token at a time in shared memory. Widths are
 * multiples of 8, up to KV_HQ_WIDTH_MAX (gpu/kernels.py refuses wider ones). */
#define KV_BOUNDS 256, 2 /* without this the compiler saves registers and spills */
#include "hadamard.cuh"
#include "batch.cuh"
#include "means.cuh"

struct Room {
    float row[KV_WARPS][KV_HQ_WIDTH_MAX];
    float tree[KV_WARPS][KV_HQ_WIDTH_MAX];
    float means[KV_HQ_WIDTH_MAX], sigmas[KV_HQ_WIDTH_MAX];
    uint8_t codes[KV_TILE][KV_HQ_WIDTH_MAX]; /* of the tile at hand, a byte each */
};

template <int CODEC> KV_INLINE kv_layout layout_of(const Batch &batch, uint32_t kind) {
    return kv_layout_of(CODEC, kind, batch.tokens, batch.width, batch.extra);
}

KV_INLINE uint32_t power_below(uint32_t n) {
    uint32_t power = 1;
    while (power * 2 <= n) {
        power *= 2;
    }
    return power;
}

KV_INLINE uint32_t is_flipped(const Batch &batch, const Place &at, uint32_t kind, uint32_t c) {
    uint64_t state = kv_hq_sign_state(batch.table, batch.sections[at.section].layer, kind);
    return (uint32_t)(kv_hq_signs(state, c / 64) >> (c % 64)) & 1u;
}

KV_INLINE void flip_signs(const Batch &batch, const Place &at, uint32_t kind, float *row) {
    for (uint32_t c = threadIdx.x % 32; c < batch.width; c += 32) {
        row[c] = kv_hq_signed(row[c], is_flipped(batch, at, kind, c));
    }
    __syncwarp();
}

/* Butterflies over each block of channels, by one warp. */
KV_INLINE void transform(float *row, uint32_t width) {
    for (uint32_t first = 0, size; first < width; first += size) {
        size = power_below(width - first);
        for (uint32_t step = 1; step < size; step *= 2) {
            for (uint32_t i = threadIdx.x % 32; i < size / 2; i += 32) {
                uint32_t low = first + i / step * 2 * step + i % step;
                float a = row[low], b = row[low + step];
                row[low] = kv_add(a, b);
                row[low + step] = kv_sub(a, b);
            }
            __syncwarp();
        }
    }
}

/* The sum of squares of a row as a tree, by one warp, for every lane. */
KV_INLINE float tree_of_squares(const float *row, float *tree, uint32_t width) {
    uint32_t power = 1;
    while (power < width) {
        power *= 2;
    }
    for (uint32_t i = threadIdx.x % 32; i < power; i += 32) {
        tree[i] = i < width ? kv_mul(row[i], row[i]) : 0.0f;
    }
    __syncwarp();
    for (uint32_t half = power / 2; half > 0; half /= 2) {
        for (uint32_t i = threadIdx.x % 32; i < half; i += 32) {
            tree[i] = kv_add(tree[i], tree[i + half]);
        }
        __syncwarp();
    }
    float sum = tree[0];
    __syncwarp();
    return sum;
}

template <int CODEC> KV_INLINE float centroid_of(uint32_t code) {
    float size = CODEC == KV_HQ4 ? kv_hq4_centroid(code & 7u) : kv_hq3_centroid(code & 3u);
    return kv_hq_signed(size, code >> (CODEC == KV_HQ4 ? 3 : 2));
}

/* Code the row of a token and leave the centroids in it; return the factor to store. */
template <int CODEC>
KV_INLINE uint16_t code_token(
    const Batch &batch, const Place &at, uint32_t kind, float *row, float *tree, uint8_t *codes) {
    uint32_t width = batch.width;
    float norm = kv_sqrt(tree_of_squares(row, tree, width));
    int is_empty = norm < KV_HQ_LEAST_NORM;
    float gain = kv_div(1.0f, is_empty ? 1.0f : norm);
    flip_signs(batch, at, kind, row);
    transform(row, width);
    for (uint32_t first = 0, size; first < width; first += size) {
        size = power_below(width - first);
        float factor = kv_mul(gain, kv_sqrt(kv_div((float)width, (float)size)));
        for (uint32_t c = first + threadIdx.x % 32; c < first + size; c += 32) {
            float u = kv_mul(row[c], factor);
            uint32_t index = CODEC == KV_HQ4 ? kv_hq4_index(kv_abs(u)) : kv_hq3_index(kv_abs(u));
            uint32_t code = index | (uint32_t)(u < 0.0f) << (CODEC == KV_HQ4 ? 3 : 2);
            codes[c] = is_empty ? 0 : (uint8_t)code;
            row[c] = centroid_of<CODEC>(code);
        }
    }
    __syncwarp();
    float found = kv_sqrt(tree_of_squares(row, tree, width));
    return is_empty ? 0 : kv_half_of_float(kv_div(norm, found));
}

/* What the centroids of a row stand for; K's deviations and means are the caller's. */
KV_INLINE void expand(
    const Batch &batch, const Place &at, uint32_t kind, float *row, float alpha) {
    transform(row, batch.width);
    for (uint32_t first = 0, size; first < batch.width; first += size) {
        size = power_below(batch.width - first);
        float factor = kv_mul(alpha, kv_div(1.0f, kv_sqrt((float)size)));
        for (uint32_t c = first + threadIdx.x % 32; c < first + size; c += 32) {
            row[c] = kv_mul(row[c], factor);
        }
    }
    __syncwarp();
    flip_signs(batch, at, kind, row);
}

/* Rows q, q + rows, q + 2 rows ... of the tile's codes in one byte, eight channels a thread. */
KV_INLINE void pack_plane(const Room &room, uint32_t width, uint32_t count, uint32_t bits,
    uint32_t shift, uint8_t *plane) {
    uint32_t per_byte = 8 / bits, rows = (count + per_byte - 1) / per_byte;
    uint32_t vectors = width / 8, mask = (1u << bits) - 1;
    for (uint32_t i = threadIdx.x; i < rows * vectors; i += KV_THREADS) {
        uint32_t q = i / vectors, c = i % vectors * 8, packed[8] = {0, 0, 0, 0, 0, 0, 0, 0};
        for (uint32_t k = 0; k < per_byte && q + k * rows < count; k++) {
            const uint8_t *codes = room.codes[q + k * rows] + c;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                packed[j] |= (uint32_t)(codes[j] >> shift & mask) << (k * bits);
            }
        }
        store8(plane + (uint64_t)q * width + c, packed);
    }
}

KV_INLINE void unpack_plane(Room &room, uint32_t width, uint32_t count, uint32_t bits,
    uint32_t shift, const uint8_t *plane) {
    uint32_t rows = (count + 8 / bits - 1) / (8 / bits), mask = (1u << bits) - 1;
    for (uint32_t i = threadIdx.x; i < count * (width / 8); i += KV_THREADS) {
        uint32_t row = i / (width / 8), c = i % (width / 8) * 8, packed[8];
        load8(plane + (uint64_t)(row % rows) * width + c, packed);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            uint32_t bitsof = packed[j] >> (row / rows * bits) & mask;
            uint8_t before = shift == 0 ? 0 : room.codes[row][c + j];
            room.codes[row][c + j] = (uint8_t)(before | bitsof << shift);
        }
    }
}

template <int CODEC>
KV_INLINE void pack_tile(const Batch &batch, const Room &room, const kv_layout &layout,
    uint8_t *block, uint32_t first, uint32_t count) {
    uint64_t width = batch.width;
    if (CODEC == KV_HQ4) {
        pack_plane(room, batch.width, count, 4, 0, block + kv_planes(first, 2) * width);
    } else {
        pack_plane(room, batch.width, count, 2, 0, block + kv_planes(first, 4) * width);
        uint8_t *signs = block + layout.part[1];
        pack_plane(room, batch.width, count, 1, 2, signs + kv_planes(first, 8) * width);
    }
}

/* Code one tile; means and sigmas in the room are those of K. */
template <int CODEC, int DTYPE>
KV_INLINE void encode_tile(const Batch &batch, const Place &at, uint32_t kind, Room &room,
    const kv_layout &layout, uint8_t *block, uint32_t first, float *error, float *energy,
    int *broken) {
    uint32_t count = smaller(KV_TILE, batch.tokens - first), warp = threadIdx.x / 32;
    float *row = room.row[warp];
    for (uint32_t t = warp; t < count; t += KV_WARPS) {
        uint32_t token = first + t, is_real = token >= batch.sinks;
        const uint8_t *source = row_of(batch, at, token);
        for (uint32_t c = threadIdx.x % 32; c < batch.width; c += 32) {
            float value = is_real ? read1<DTYPE>(source, c) : 0.0f;
            *energy = kv_add(*energy, kv_mul(value, value));
            if (kind == KV_KEYS && is_real) {
                value = kv_mul(kv_sub(value, room.means[c]), kv_inverse(room.sigmas[c]));
            }
            row[c] = value;
        }
        __syncwarp();
        uint16_t alpha = code_token<CODEC>(batch, at, kind, row, room.tree[warp], room.codes[t]);
        *broken |= kv_half_is_broken(alpha);
        if (threadIdx.x % 32 == 0) {
            ((uint16_t *)(block + layout.part[2]))[token] = alpha;
        }
        expand(batch, at, kind, row, kv_float_of_half(alpha));
        for (uint32_t c = threadIdx.x % 32; is_real && c < batch.width; c += 32) {
            float value = row[c];
            if (kind == KV_KEYS) {
                value = kv_add(kv_mul(value, room.sigmas[c]), room.means[c]);
            }
            float missed = kv_sub(read1<DTYPE>(source, c), value);
            *error = kv_add(*error, kv_mul(missed, missed));
        }
        __syncwarp();
    }
    __syncthreads();
    pack_tile<CODEC>(batch, room, layout, block, first, count);
    __syncthreads();
}

template <int CODEC, int DTYPE> KV_INLINE void encode_keys(const Batch &batch, const Place &at) {
    __shared__ Room room;
    kv_layout layout = layout_of<CODEC>(batch, KV_KEYS);
    uint8_t *block = block_of(batch, at, layout.bytes);
    float error = 0.0f, energy = 0.0f;
    int broken = take_means<DTYPE>(batch, at, block + layout.part[3], room.means);
    broken |= take_deviations<DTYPE>(
        batch, at, block + layout.part[4], room.means, room.sigmas);
    for (uint32_t first = 0; first < batch.tokens; first += KV_TILE) {
        encode_tile<CODEC, DTYPE>(
            batch, at, KV_KEYS, room, layout, block, first, &error, &energy, &broken);
    }
    zero_padding(layout, block);
    report(batch, at, error, energy, broken);
}

template <int CODEC, int DTYPE> KV_INLINE void encode_values(const Batch &batch, const Place &at) {
    __shared__ Room room;
    kv_layout layout = layout_of<CODEC>(batch, KV_VALUES);
    uint8_t *block = block_of(batch, at, layout.bytes);
    float error = 0.0f, energy = 0.0f;
    int broken = 0;
    encode_tile<CODEC, DTYPE>(batch, at, KV_VALUES, room, layout, block, at.part * KV_TILE, &error,
        &energy, &broken);
    if (at.part == 0) {
        zero_padding(layout, block);
    }
    report(batch, at, error, energy, broken);
}

template <int CODEC, int DTYPE>
KV_INLINE void decode(const Batch &batch, const Place &at, uint32_t kind) {
    __shared__ Room room;
    kv_layout layout = layout_of<CODEC>(batch, kind);
    const uint8_t *block = block_of(batch, at, layout.bytes);
    uint32_t first = at.part * KV_TILE, count = smaller(KV_TILE, batch.tokens - first);
    uint32_t warp = threadIdx.x / 32;
    uint64_t width = batch.width;
    float *row = room.row[warp];
    if (CODEC == KV_HQ4) {
        unpack_plane(room, batch.width, count, 4, 0, block + kv_planes(first, 2) * width);
    } else {
        unpack_plane(room, batch.width, count, 2, 0, block + kv_planes(first, 4) * width);
        __syncthreads();
        const uint8_t *signs = block + layout.part[1];
        unpack_plane(room, batch.width, count, 1, 2, signs + kv_planes(first, 8) * width);
    }
    __syncthreads();
    const uint16_t *means = (const uint16_t *)(block + layout.part[3]);
    const uint16_t *sigmas = (const uint16_t *)(block + layout.part[4]);
    for (uint32_t t = warp; t < count; t += KV_WARPS) {
        for (uint32_t c = threadIdx.x % 32; c < batch.width; c += 32) {
            row[c] = centroid_of<CODEC>(room.codes[t][c]);
        }
        __syncwarp();
        uint16_t alpha = ((const uint16_t *)(block + layout.part[2]))[first + t];
        expand(batch, at, kind, row, kv_float_of_half(alpha));
        uint8_t *target = row_of(batch, at, first + t);
        for (uint32_t c = threadIdx.x % 32; c < batch.width; c += 32) {
            float value = row[c];
            if (kind == KV_KEYS) {
                value = kv_mul(value, kv_float_of_bf16(sigmas[c]));
                value = kv_add(value, kv_float_of_half(means[c]));
            }
            write1<DTYPE>(target, c, value);
        }
        __syncwarp();
    }
    __syncthreads();
}

#define KV_TILES kv_ceil(batch.tokens, KV_TILE)
#define BOTH(codec, CODEC, dtype, DTYPE)                                                           \
    KV_KERNEL(codec##_keys_encode_##dtype, 1, (encode_keys<CODEC, DTYPE>(batch, at)))              \
    KV_KERNEL(codec##_values_encode_##dtype, KV_TILES, (encode_values<CODEC, DTYPE>(batch, at)))   \
    KV_KERNEL(codec##_keys_decode_##dtype, KV_TILES, (decode<CODEC, DTYPE>(batch, at, KV_KEYS)))   \
    KV_KERNEL(codec##_values_decode_##dtype, KV_TILES, (decode<CODEC, DTYPE>(batch, at, KV_VALUES)))

BOTH(hq4, KV_HQ4, bf16, KV_BF16)
BOTH(hq4, KV_HQ4, fp16, KV_FP16)
BOTH(hq3, KV_HQ3, bf16, KV_BF16)
BOTH(hq3, KV_HQ3, fp16, KV_FP16)
