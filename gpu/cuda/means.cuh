/* Means and deviations of the channels of a head, summed in the order of the format: the rows of a
 * tile as a tree, the tiles one after the other. A whole thread block does one head. */
#ifndef KVSTORE_MEANS_CUH
#define KVSTORE_MEANS_CUH

#include "batch.cuh"

/* The widest head for which parameters of all channels are kept in shared memory. */
#define KV_WIDTH_MAX 576

/* The widest for the transforms of hq, which keep a row for every warp beside the codes. */
#define KV_HQ_WIDTH_MAX 256

/* Sum the 64 channels from *first* over all tokens: of values, or of squares of their distance from
 * *means*. `sums` receives one float a channel. */
template <int DTYPE>
KV_INLINE void sum_tokens(
    const Batch &batch, const Place &at, uint32_t first, const float *means, float *sums) {
    __shared__ float rows[KV_ROWS][KV_SLAB];
    uint32_t row = threadIdx.x / KV_LANES, lane = threadIdx.x % KV_LANES * 8;
    uint32_t channel = first + lane;
    float total[8] = {0, 0, 0, 0, 0, 0, 0, 0};
    for (uint32_t tile = 0; tile < batch.tokens; tile += KV_TILE) {
        uint32_t count = smaller(KV_TILE, batch.tokens - tile), power = 1;
        while (power < count) {
            power *= 2;
        }
        float values[2][8];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            uint32_t token = tile + row + k * KV_ROWS;
            read8<DTYPE>(batch, at, token, channel, values[k]);
            int is_real = token >= batch.sinks && token < batch.tokens && channel < batch.width;
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (means != nullptr) {
                    float away = is_real ? kv_sub(values[k][i], means[channel + i]) : 0.0f;
                    values[k][i] = kv_mul(away, away);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            float folded = kv_add(values[0][i], values[1][i]);
            rows[row][lane + i] = power > KV_ROWS ? folded : values[0][i];
        }
        __syncthreads();
        for (uint32_t half = smaller(power / 2, KV_ROWS / 2); half > 0; half /= 2) {
            if (row < half) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    rows[row][lane + i] = kv_add(rows[row][lane + i], rows[row + half][lane + i]);
                }
            }
            __syncthreads();
        }
        if (row == 0) {
#pragma unroll
            for (int i = 0; i < 8; i++) {
                total[i] = kv_add(total[i], rows[0][lane + i]);
            }
        }
        __syncthreads();
    }
    if (row == 0 && channel < batch.width) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            sums[channel + i] = total[i];
        }
    }
    __syncthreads();
}

/* Store the means of all channels, and leave them as stored in *means*. */
template <int DTYPE>
KV_INLINE int take_means(const Batch &batch, const Place &at, uint8_t *stored, float *means) {
    uint32_t count = batch.tokens - batch.sinks;
    int broken = 0;
    for (uint32_t first = 0; first < batch.width; first += KV_SLAB) {
        sum_tokens<DTYPE>(batch, at, first, nullptr, means);
    }
    for (uint32_t c = threadIdx.x; c < batch.width; c += KV_THREADS) {
        uint16_t bits = count > 0 ? kv_half_of_float(kv_div(means[c], (float)count)) : 0;
        broken |= kv_half_is_broken(bits);
        ((uint16_t *)stored)[c] = bits;
        means[c] = kv_float_of_half(bits);
    }
    __syncthreads();
    return broken;
}

/* Store the deviations from the means, and leave them as stored in *sigmas*. */
template <int DTYPE>
KV_INLINE int take_deviations(
    const Batch &batch, const Place &at, uint8_t *stored, const float *means, float *sigmas) {
    uint32_t count = batch.tokens - batch.sinks;
    int broken = 0;
    for (uint32_t first = 0; first < batch.width; first += KV_SLAB) {
        sum_tokens<DTYPE>(batch, at, first, means, sigmas);
    }
    for (uint32_t c = threadIdx.x; c < batch.width; c += KV_THREADS) {
        float variance = count > 0 ? kv_div(sigmas[c], (float)count) : 0.0f;
        uint16_t bits = kv_bf16_scale_of_float(kv_sqrt(variance));
        broken |= kv_bf16_is_broken(bits);
        bits = kv_bf16_without_subnormals(bits);
        ((uint16_t *)stored)[c] = bits;
        sigmas[c] = kv_float_of_bf16(bits);
    }
    __syncthreads();
    return broken;
}

#endif
