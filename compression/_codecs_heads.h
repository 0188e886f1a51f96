/* Fixed-rate codecs, a head at a time; _codecs.c includes this after _codecs_kernel.h, once for
 * each width of vectors. The order of operations is that of docs/codec-format.md.
 *
 * Encoders fill codes and parameters of one head block; sinks and tail are the caller's. Tokens
 * that are sinks count as rows of zeros, which is what "does not exist" amounts to everywhere but
 * in ranges with an offset (int4kv), where they are left out by hand.
 */

/* Row *token* as floats: zeros for a sink. */
TARGET static void NAME(read_row)(const head *h, size_t token, float *row) {
    const request *ask = h->ask;
    if (token < ask->sinks) {
        memset(row, 0, ask->width * sizeof *row);
    } else {
        NAME(load_row)(ask->source, values_at(h, token), row, ask->width);
    }
}

TARGET static void NAME(write_row)(const head *h, size_t token, const float *row) {
    NAME(store_row)(h->ask->source, row, values_at(h, token), h->ask->width);
}

TARGET static double NAME(sum_of)(const float *values, size_t n) {
    double sum = 0.0;
    EACH(i, n) sum += values[i];
    return sum;
}

/* Add the sums of some rows to the head's, in double precision. */
TARGET static void NAME(add_up)(head *h, float *error, float *energy) {
    size_t n = h->ask->width;
    h->error += NAME(sum_of)(error, n);
    h->energy += NAME(sum_of)(energy, n);
    memset(error, 0, n * sizeof *error);
    memset(energy, 0, n * sizeof *energy);
}

/* --- int8kv ---------------------------------------------------------------------------------------- */

TARGET static void NAME(int8_keys_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    float row[BLOCK], scale[BLOCK], inverse[BLOCK], error[BLOCK] = {0}, energy[BLOCK] = {0};
    int32_t sizes[BLOCK];
    any16 *stored = part16(h, 1);
    for (size_t first = 0; first < tokens; first += KV_INT8_GROUP, stored += n) {
        size_t end = lesser(first + KV_INT8_GROUP, tokens);
        memset(sizes, 0, n * sizeof *sizes);
        for (size_t t = first; t < end; t++) {
            NAME(read_row)(h, t, row);
            NAME(widen_sizes)(row, sizes, energy, n);
        }
        EACH(i, n) {
            h->is_broken |= sizes[i] >= KV_INFINITE_BITS;
            stored[i] = kv_int8_scale(kv_float_of_bits((uint32_t)sizes[i]));
            scale[i] = kv_float_of_bf16(stored[i]);
            inverse[i] = kv_inverse(scale[i]);
        }
        for (size_t t = first; t < end; t++) {
            NAME(read_row)(h, t, row);
            NAME(int8_codes)(row, inverse, scale, part(h, 0) + t * n, error, n);
        }
        NAME(add_up)(h, error, energy);
    }
}

TARGET static void NAME(int8_values_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    float row[BLOCK], error[BLOCK] = {0}, energy[BLOCK] = {0};
    any16 *stored = part16(h, 1);
    for (size_t t = 0; t < tokens; t++) {
        NAME(read_row)(h, t, row);
        int32_t size = NAME(size_of_row)(row, energy, n);
        h->is_broken |= size >= KV_INFINITE_BITS;
        stored[t] = kv_int8_scale(kv_float_of_bits((uint32_t)size));
        float scale = kv_float_of_bf16(stored[t]);
        NAME(int8_codes_of_token)(row, kv_inverse(scale), scale, part(h, 0) + t * n, error, n);
        if (t % KV_TILE == KV_TILE - 1 || t + 1 == tokens) {
            NAME(add_up)(h, error, energy);
        }
    }
}

TARGET static void NAME(int8_decode)(head *h) {
    size_t n = h->ask->width;
    float row[BLOCK], scale[BLOCK];
    const any16 *stored = part16(h, 1);
    for (size_t t = 0; t < h->ask->tokens; t++) {
        const uint8_t *codes = part(h, 0) + t * n;
        if (h->ask->kind == KV_VALUES) {
            NAME(int8_values_of_token)(codes, kv_float_of_bf16(stored[t]), row, n);
        } else {
            if (t % KV_INT8_GROUP == 0) {
                NAME(load_bf16)(stored + t / KV_INT8_GROUP * n, scale, n);
            }
            NAME(int8_values)(codes, scale, row, n);
        }
        NAME(write_row)(h, t, row);
    }
}

/* --- int4kv ---------------------------------------------------------------------------------------- */

/* Store scale and zero of a group; a group without any token has neither. */
TARGET static void NAME(int4_store)(
    head *h, any16 *pair, int32_t least, int32_t most, float *zero, float *scale) {
    if (least > most) {
        pair[0] = pair[1] = 0;
    } else {
        float low = kv_float_of_key(least), high = kv_float_of_key(most);
        pair[0] = kv_int4_scale(low, high);
        pair[1] = kv_int4_zero(low);
    }
    h->is_broken |= least < KV_KEY_MIN_FINITE || (most > KV_KEY_MAX_FINITE && least <= most);
    h->is_broken |= kv_half_is_broken(pair[0]) || kv_half_is_broken(pair[1]);
    *scale = kv_float_of_half(pair[0]);
    *zero = kv_float_of_half(pair[1]);
}

/* Row *token* of a tile, or what codes to zero where there is none. */
TARGET static void NAME(int4_read)(
    const head *h, size_t token, size_t end, const float *zero, float *row) {
    if (token < end && token >= h->ask->sinks) {
        NAME(read_row)(h, token, row);
    } else {
        memcpy(row, zero, h->ask->width * sizeof *row);
    }
}

TARGET static void NAME(int4_keys_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    float low[BLOCK], high[BLOCK], zero[BLOCK], scale[BLOCK], inverse[BLOCK];
    float error[BLOCK] = {0}, energy[BLOCK] = {0};
    int32_t least[BLOCK], most[BLOCK];
    uint8_t *codes = part(h, 0);
    any16 *stored = part16(h, 1);
    for (size_t first = 0; first < tokens; first += KV_TILE, stored += 2 * n) {
        size_t end = lesser(first + KV_TILE, tokens), half = (end - first + 1) / 2;
        EACH(i, n) least[i] = INT32_MAX;
        EACH(i, n) most[i] = INT32_MIN;
        for (size_t t = first > h->ask->sinks ? first : h->ask->sinks; t < end; t++) {
            NAME(read_row)(h, t, low);
            NAME(widen_keys)(low, least, most, energy, n);
        }
        EACH(i, n) {
            NAME(int4_store)(h, stored + 2 * i, least[i], most[i], &zero[i], &scale[i]);
            inverse[i] = kv_inverse(scale[i]);
        }
        for (size_t q = 0; q < half; q++, codes += n) {
            NAME(int4_read)(h, first + q, end, zero, low);
            NAME(int4_read)(h, first + q + half, end, zero, high);
            NAME(int4_codes)(low, high, zero, inverse, scale, codes, error, n);
        }
        NAME(add_up)(h, error, energy);
    }
}

TARGET static void NAME(int4_keys_decode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    float low[BLOCK], high[BLOCK], zero[BLOCK], scale[BLOCK];
    const uint8_t *codes = part(h, 0);
    const any16 *stored = part16(h, 1);
    for (size_t first = 0; first < tokens; first += KV_TILE, stored += 2 * n) {
        size_t end = lesser(first + KV_TILE, tokens), half = (end - first + 1) / 2;
        EACH(i, n) scale[i] = kv_float_of_half(stored[2 * i]);
        EACH(i, n) zero[i] = kv_float_of_half(stored[2 * i + 1]);
        for (size_t q = 0; q < half; q++, codes += n) {
            NAME(int4_values)(codes, zero, scale, low, high, n);
            NAME(write_row)(h, first + q, low);
            if (first + q + half < end) {
                NAME(write_row)(h, first + q + half, high);
            }
        }
    }
}

/* One group of up to 64 channels of a token: the first half low, the second half high. */
TARGET static void NAME(int4_group_encode)(
    head *h, const float *row, any16 *pair, uint8_t *codes, float *error, float *energy, size_t n) {
    float zero, scale, padded[KV_INT4_CHANNELS];
    int32_t least, most;
    size_t half = (n + 1) / 2;
    NAME(keys_of_row)(row, &least, &most, energy, n);
    NAME(int4_store)(h, pair, least, most, &zero, &scale);
    if (n % 2 == 1) {
        memcpy(padded, row, n * sizeof *row);
        padded[n] = zero;
        row = padded;
    }
    NAME(int4_codes_of_token)(row, row + half, zero, kv_inverse(scale), scale, codes, error, half);
}

TARGET static void NAME(int4_values_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    size_t bytes = kv_int4_row_bytes(n), groups = kv_ceil(n, KV_INT4_CHANNELS);
    float row[BLOCK], error[BLOCK] = {0}, energy[BLOCK] = {0};
    for (size_t t = 0; t < tokens; t++) {
        uint8_t *codes = part(h, 0) + t * bytes;
        any16 *pairs = part16(h, 1) + t * groups * 2;
        if (t < h->ask->sinks) {
            memset(codes, 0, bytes);
            memset(pairs, 0, groups * 4);
            continue;
        }
        NAME(read_row)(h, t, row);
        for (size_t g = 0, c = 0; c < n; g++, c += KV_INT4_CHANNELS) {
            size_t width = lesser(KV_INT4_CHANNELS, n - c);
            NAME(int4_group_encode)(
                h, row + c, pairs + 2 * g, codes + c / 2, error + c, energy + c, width);
        }
        if (t % KV_TILE == KV_TILE - 1 || t + 1 == tokens) {
            NAME(add_up)(h, error, energy);
        }
    }
}

TARGET static void NAME(int4_values_decode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    size_t bytes = kv_int4_row_bytes(n), groups = kv_ceil(n, KV_INT4_CHANNELS);
    float row[BLOCK + 1];
    for (size_t t = 0; t < tokens; t++) {
        const uint8_t *codes = part(h, 0) + t * bytes;
        const any16 *pairs = part16(h, 1) + t * groups * 2;
        for (size_t g = 0, c = 0; c < n; g++, c += KV_INT4_CHANNELS) {
            size_t half = (lesser(KV_INT4_CHANNELS, n - c) + 1) / 2;
            float scale = kv_float_of_half(pairs[2 * g]), zero = kv_float_of_half(pairs[2 * g + 1]);
            NAME(int4_values_of_token)(codes + c / 2, zero, scale, row + c, row + c + half, half);
        }
        NAME(write_row)(h, t, row);
    }
}

/* --- fp8 --------------------------------------------------------------------------------------------- */

TARGET static void NAME(fp8_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    float row[BLOCK], error[BLOCK] = {0}, energy[BLOCK] = {0};
    int32_t largest = 0;
    for (size_t t = h->ask->sinks; t < tokens; t++) {
        NAME(read_row)(h, t, row);
        int32_t size = NAME(size_of_row)(row, energy, n);
        largest = largest > size ? largest : size;
    }
    h->is_broken |= largest >= KV_INFINITE_BITS;
    int32_t exponent = h->is_broken ? 0 : kv_fp8_exponent(largest);
    float scale = kv_power_of_two(exponent), inverse = kv_power_of_two(-exponent);
    part(h, 1)[0] = (uint8_t)(int8_t)exponent;
    for (size_t t = 0; t < tokens; t++) {
        NAME(read_row)(h, t, row);
        NAME(fp8_codes)(row, inverse, scale, part(h, 0) + t * n, error, n);
        if (t % KV_TILE == KV_TILE - 1 || t + 1 == tokens) {
            NAME(add_up)(h, error, energy);
        }
    }
}

TARGET static void NAME(fp8_decode)(head *h) {
    size_t n = h->ask->width;
    float row[BLOCK], scale = kv_power_of_two((int8_t)part(h, 1)[0]);
    for (size_t t = 0; t < h->ask->tokens; t++) {
        NAME(fp8_values)(part(h, 0) + t * n, scale, row, n);
        NAME(write_row)(h, t, row);
    }
}

/* --- means and deviations of channels ------------------------------------------------------------------ */

/* Sum the rows of each tile as a tree and the tiles in order: of the values, or of the squares of
 * their distance from *means*. */
TARGET static void NAME(sum_tokens)(head *h, const float *means, float *sums) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    float rows[KV_TILE][STRIP];
    memset(sums, 0, n * sizeof *sums);
    for (size_t first = 0; first < tokens; first += KV_TILE) {
        size_t count = lesser(KV_TILE, tokens - first), power = power_of_two_from(count);
        for (size_t c = 0; c < n; c += STRIP) {
            size_t width = lesser(STRIP, n - c);
            memset(rows, 0, power * sizeof rows[0]);
            for (size_t t = 0; t < count; t++) {
                if (first + t < h->ask->sinks) {
                    continue;
                }
                const uint8_t *from = values_at(h, first + t) + c * h->ask->element;
                NAME(load_row)(h->ask->source, from, rows[t], width);
                if (means != NULL) {
                    NAME(subtract_row)(rows[t], means + c, width);
                    NAME(square_row)(rows[t], rows[t], width);
                }
            }
            for (size_t half = power / 2; half > 0; half /= 2) {
                NAME(fold)(rows[0], half * STRIP);
            }
            NAME(add_rows)(sums + c, rows[0], width);
        }
    }
}

/* Store the channels' means and return them as stored. */
TARGET static void NAME(take_means)(head *h, any16 *stored, float *means) {
    size_t n = h->ask->width, count = h->ask->tokens - h->ask->sinks;
    NAME(sum_tokens)(h, NULL, means);
    EACH(i, n) {
        stored[i] = count > 0 ? kv_half_of_float(kv_div(means[i], (float)count)) : 0;
        h->is_broken |= kv_half_is_broken(stored[i]);
        means[i] = kv_float_of_half(stored[i]);
    }
}

/* Store the channels' deviations from their means and return them as stored. */
TARGET static void NAME(take_deviations)(head *h, const float *means, any16 *stored, float *sigmas) {
    size_t n = h->ask->width, count = h->ask->tokens - h->ask->sinks;
    NAME(sum_tokens)(h, means, sigmas);
    EACH(i, n) {
        float variance = count > 0 ? kv_div(sigmas[i], (float)count) : 0.0f;
        uint16_t bits = kv_bf16_scale_of_float(kv_sqrt(variance));
        h->is_broken |= kv_bf16_is_broken(bits);
        stored[i] = kv_bf16_without_subnormals(bits);
        sigmas[i] = kv_float_of_bf16(stored[i]);
    }
}
