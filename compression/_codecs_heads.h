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

/* --- nvfp4 --------------------------------------------------------------------------------------------- */

/* Row *token* less the means; zeros for a sink or beyond the end. */
TARGET static void NAME(read_centred)(const head *h, size_t token, const float *means, float *row) {
    size_t n = h->ask->width;
    if (token < h->ask->sinks || token >= h->ask->tokens) {
        memset(row, 0, n * sizeof *row);
        return;
    }
    NAME(load_row)(h->ask->source, values_at(h, token), row, n);
    if (h->ask->kind == KV_KEYS) {
        NAME(subtract_row)(row, means, n);
    }
}

/* The scale of the head from its largest value; also adds up the energy, and as the error what is
 * lost if that scale is zero: all but the means. */
TARGET static float NAME(nvfp4_tensor)(head *h, const float *means) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    float row[BLOCK], rest[BLOCK] = {0}, energy[BLOCK] = {0};
    int32_t largest = 0;
    for (size_t t = h->ask->sinks; t < tokens; t++) {
        NAME(read_row)(h, t, row);
        NAME(add_squares)(row, energy, n);
        NAME(read_centred)(h, t, means, row);
        int32_t size = NAME(size_of_row)(row, rest, n);
        largest = largest > size ? largest : size;
        if (t % KV_TILE == KV_TILE - 1 || t + 1 == tokens) {
            NAME(add_up)(h, rest, energy);
        }
    }
    h->is_broken |= largest >= KV_INFINITE_BITS;
    return kv_nvfp4_tensor_scale(kv_float_of_bits((uint32_t)largest));
}

/* Code 16 tokens of V: blocks are along channels, so channels become rows. */
TARGET static void NAME(nvfp4_values_block)(
    head *h, float (*rows)[BLOCK], float tensor, uint8_t *scales, uint8_t *codes, size_t count) {
    size_t n = h->ask->width, blocks = kv_ceil(n, 16);
    float turned[16][LANES];
    uint8_t found[LANES], turned_codes[16][LANES];
    for (size_t c = 0; c < n; c += 16) {
        size_t width = lesser(16, n - c);
        memset(turned, 0, sizeof turned);
        for (size_t i = 0; i < width; i++) {
            EACH(t, LANES) turned[i][t] = rows[t][c + i];
        }
        h->error += NAME(nvfp4_block)(turned[0], tensor, found, turned_codes[0], LANES, LANES);
        for (size_t t = 0; t < count; t++) {
            scales[t * blocks + c / 16] = found[t];
            EACH(i, width) codes[t * n + c + i] = turned_codes[i][t];
        }
    }
}

TARGET static void NAME(nvfp4_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens, is_keys = h->ask->kind == KV_KEYS;
    size_t row_scales = is_keys ? n : 16 * kv_ceil(n, 16);
    float means[BLOCK] = {0}, rows[16][BLOCK];
    uint8_t codes[(KV_TILE + 8) * BLOCK];
    if (is_keys) {
        NAME(take_means)(h, part16(h, 2), means);
    }
    float tensor = NAME(nvfp4_tensor)(h, means);
    memcpy(part(h, 3), &tensor, sizeof tensor);
    if (tensor == 0.0f || h->is_broken) {
        memset(part(h, 0), 0, h->at.size[0]);
        memset(part(h, 1), KV_NVFP4_EMPTY, h->at.size[1]);
        return;
    }
    uint8_t *plane = part(h, 0), *scales = part(h, 1);
    h->error = 0.0;
    for (size_t first = 0; first < tokens; first += KV_TILE) {
        size_t count = lesser(KV_TILE, tokens - first), half = (count + 1) / 2;
        memset(codes, 0, (KV_TILE + 8) * n);
        for (size_t at = 0; at < count; at += 16, scales += row_scales) {
            for (size_t t = 0; t < 16; t++) {
                float *row = is_keys ? rows[0] + t * n : rows[t];
                NAME(read_centred)(h, first + at + t, means, row);
            }
            if (is_keys) {
                h->error += NAME(nvfp4_block)(rows[0], tensor, scales, codes + at * n, n, n);
            } else {
                size_t left = lesser(16, count - at);
                NAME(nvfp4_values_block)(h, rows, tensor, scales, codes + at * n, left);
            }
        }
        NAME(pack_plane)(codes, half, 4, 0, plane, n);
        plane += half * n;
    }
}

TARGET static void NAME(nvfp4_decode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens, is_keys = h->ask->kind == KV_KEYS;
    float tensor, means[BLOCK] = {0}, units[BLOCK + 16], found[BLOCK], row[BLOCK];
    uint8_t codes[(KV_TILE + 8) * BLOCK];
    const uint8_t *plane = part(h, 0);
    memcpy(&tensor, part(h, 3), sizeof tensor);
    if (is_keys) {
        NAME(load_halves)(part16(h, 2), means, n);
    }
    for (size_t first = 0; first < tokens; first += KV_TILE) {
        size_t count = lesser(KV_TILE, tokens - first), half = (count + 1) / 2;
        memset(codes, 0, (KV_TILE + 8) * n);
        NAME(unpack_plane)(plane, half, 4, 0, codes, n);
        plane += half * n;
        for (size_t t = 0; t < count; t++) {
            size_t token = first + t;
            if (!is_keys) {
                size_t blocks = kv_ceil(n, 16);
                NAME(nvfp4_units)(part(h, 1) + token * blocks, tensor, found, blocks);
                EACH(i, n) units[i] = found[i / 16];
            } else if (t % 16 == 0) {
                NAME(nvfp4_units)(part(h, 1) + token / 16 * n, tensor, units, n);
            }
            NAME(nvfp4_values)(codes + t * n, units, row, n);
            if (is_keys) {
                NAME(add_rows)(row, means, n);
            }
            NAME(write_row)(h, token, row);
        }
    }
}

/* --- hq4 and hq3 ------------------------------------------------------------------------------------------ */

/* Butterflies of steps 1, 2, 4 and 8 within 16 neighbours: the upper of a pair becomes the lower
 * less itself, which is its negative plus the lower. */
TARGET static void NAME(turn_sixteen)(float *at) {
    static const int32_t partners[4][16] = {
        {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14},
        {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13},
        {4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11},
        {8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7},
    };
    sixteen values;
    memcpy(&values, at, sizeof values);
#pragma GCC unroll 4
    for (int step = 0; step < 4; step++) {
        sixteen_bits mask, sign, bits;
        memcpy(&mask, partners[step], sizeof mask);
        sign = (mask < LANE_NUMBERS) & (int32_t)0x80000000;
        sixteen others = SHUFFLED(values, mask, step);
        memcpy(&bits, &values, sizeof bits);
        bits ^= sign;
        memcpy(&values, &bits, sizeof values);
        values = others + values;
    }
    memcpy(at, &values, sizeof values);
}

/* Butterflies over each block of channels; blocks are the binary digits of n, largest first. */
TARGET static void NAME(transform)(float *row, size_t n) {
    for (size_t first = 0, block; first < n; first += block) {
        block = power_of_two_below(n - first);
        size_t step = 1;
        for (size_t i = 0; block >= 16 && i < block; i += 16, step = 16) {
            NAME(turn_sixteen)(row + first + i);
        }
        for (; step < block; step *= 2) {
            for (size_t i = 0; i < block; i += 2 * step) {
                float *low = row + first + i;
                NAME(butterfly)(low, low + step, step);
            }
        }
    }
}

TARGET static float NAME(tree_of_squares)(const float *row, size_t n) {
    float squares[2 * BLOCK];
    size_t power = power_of_two_from(n);
    NAME(square_row)(row, squares, n);
    memset(squares + n, 0, (power - n) * sizeof *squares);
    for (size_t half = power / 2; half > 0; half /= 2) {
        NAME(fold)(squares, half);
    }
    return squares[0];
}

/* What centroids in *row* stand for, before K's deviations and means. */
TARGET static void NAME(hq_expand)(const head *h, float *row, float alpha) {
    size_t n = h->ask->width;
    NAME(transform)(row, n);
    for (size_t first = 0, block; first < n; first += block) {
        block = power_of_two_below(n - first);
        NAME(scale_by)(row + first, kv_mul(alpha, kv_div(1.0f, kv_sqrt((float)block))), block);
    }
    NAME(flip_signs)(row, h->flips, n);
}

/* Code a token; *row* becomes its centroids, what is returned is the factor to store. */
TARGET static uint16_t NAME(hq_token)(head *h, float *row, uint8_t *codes) {
    size_t n = h->ask->width;
    float norm = kv_sqrt(NAME(tree_of_squares)(row, n));
    int is_empty = norm < KV_HQ_LEAST_NORM;
    float gain = kv_div(1.0f, is_empty ? 1.0f : norm);
    NAME(flip_signs)(row, h->flips, n);
    NAME(transform)(row, n);
    for (size_t first = 0, block; first < n; first += block) {
        block = power_of_two_below(n - first);
        float factor = kv_mul(gain, kv_sqrt(kv_div((float)n, (float)block)));
        if (h->ask->codec == KV_HQ4) {
            NAME(hq4_codes)(row + first, factor, codes + first, block);
        } else {
            NAME(hq3_codes)(row + first, factor, codes + first, block);
        }
    }
    if (is_empty) {
        memset(codes, 0, n);
        return 0;
    }
    uint16_t alpha = kv_half_of_float(kv_div(norm, kv_sqrt(NAME(tree_of_squares)(row, n))));
    h->is_broken |= kv_half_is_broken(alpha);
    return alpha;
}

TARGET static void NAME(hq_pack)(head *h, const uint8_t *codes, size_t first, size_t count) {
    size_t n = h->ask->width;
    if (h->ask->codec == KV_HQ4) {
        NAME(pack_plane)(codes, kv_ceil(count, 2), 4, 0, part(h, 0) + kv_planes(first, 2) * n, n);
    } else {
        NAME(pack_plane)(codes, kv_ceil(count, 4), 2, 0, part(h, 0) + kv_planes(first, 4) * n, n);
        NAME(pack_plane)(codes, kv_ceil(count, 8), 1, 2, part(h, 1) + kv_planes(first, 8) * n, n);
    }
}

TARGET static void NAME(hq_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens, is_keys = h->ask->kind == KV_KEYS;
    float means[BLOCK] = {0}, sigmas[BLOCK] = {0}, inverses[BLOCK] = {0};
    float error[BLOCK] = {0}, energy[BLOCK] = {0}, original[BLOCK], row[BLOCK];
    uint8_t codes[(KV_TILE + 8) * BLOCK];
    if (is_keys) {
        NAME(take_means)(h, part16(h, 3), means);
        NAME(take_deviations)(h, means, part16(h, 4), sigmas);
        EACH(i, n) inverses[i] = kv_inverse(sigmas[i]);
    }
    for (size_t first = 0; first < tokens; first += KV_TILE) {
        size_t count = lesser(KV_TILE, tokens - first);
        memset(codes + count * n, 0, 8 * n);
        for (size_t t = 0; t < count; t++) {
            NAME(read_row)(h, first + t, original);
            NAME(read_centred)(h, first + t, means, row);
            NAME(add_squares)(original, energy, n);
            if (is_keys) {
                NAME(scale_row)(row, inverses, n);
            }
            uint16_t alpha = NAME(hq_token)(h, row, codes + t * n);
            part16(h, 2)[first + t] = alpha;
            if (first + t < h->ask->sinks) {
                continue;
            }
            NAME(hq_expand)(h, row, kv_float_of_half(alpha));
            if (is_keys) {
                NAME(scale_row)(row, sigmas, n);
                NAME(add_rows)(row, means, n);
            }
            NAME(subtract_row)(row, original, n);
            NAME(add_squares)(row, error, n);
        }
        NAME(hq_pack)(h, codes, first, count);
        NAME(add_up)(h, error, energy);
    }
}

TARGET static void NAME(hq_decode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens, is_keys = h->ask->kind == KV_KEYS;
    uint32_t is_hq4 = h->ask->codec == KV_HQ4;
    float means[BLOCK], sigmas[BLOCK], row[BLOCK];
    uint8_t codes[(KV_TILE + 8) * BLOCK];
    if (is_keys) {
        NAME(load_halves)(part16(h, 3), means, n);
        NAME(load_bf16)(part16(h, 4), sigmas, n);
    }
    for (size_t first = 0; first < tokens; first += KV_TILE) {
        size_t count = lesser(KV_TILE, tokens - first);
        memset(codes, 0, (KV_TILE + 8) * n);
        if (is_hq4) {
            NAME(unpack_plane)(part(h, 0) + kv_planes(first, 2) * n, kv_ceil(count, 2), 4, 0, codes, n);
        } else {
            NAME(unpack_plane)(part(h, 0) + kv_planes(first, 4) * n, kv_ceil(count, 4), 2, 0, codes, n);
            NAME(unpack_plane)(part(h, 1) + kv_planes(first, 8) * n, kv_ceil(count, 8), 1, 2, codes, n);
        }
        for (size_t t = 0; t < count; t++) {
            if (is_hq4) {
                NAME(hq4_centroids)(codes + t * n, row, n);
            } else {
                NAME(hq3_centroids)(codes + t * n, row, n);
            }
            NAME(hq_expand)(h, row, kv_float_of_half(part16(h, 2)[first + t]));
            if (is_keys) {
                NAME(scale_row)(row, sigmas, n);
                NAME(add_rows)(row, means, n);
            }
            NAME(write_row)(h, first + t, row);
        }
    }
}

/* --- ecsq: the parameters, symbols and escapes of a head -------------------------------------------------- */

/* The deviation of a token's values from zero, as it is stored. */
TARGET static uint16_t NAME(ecsq_deviation)(const float *row, size_t n) {
    float sum = NAME(tree_of_squares)(row, n);
    return kv_bf16_scale_of_float(kv_sqrt(kv_div(sum, (float)n)));
}

/* A step too small to have an inverse codes nothing: all codes are zero. */
TARGET static float NAME(ecsq_step)(uint16_t deviation, float delta) {
    float step = kv_mul(kv_float_of_bf16(deviation), delta);
    return step < 1.1754943508222875e-38f ? 0.0f : step;
}

/* Append the escapes of a row; return how many. */
TARGET static size_t NAME(ecsq_list)(
    head *h, const float *row, const uint8_t *symbols, uint8_t escape, any16 *list) {
    size_t found = 0;
    EACH(i, h->ask->width) {
        if (symbols[i] == escape) {
            uint16_t bits = kv_bf16_scale_of_float(row[i]);
            h->is_broken |= kv_bf16_is_broken(bits);
            double missed = row[i] - kv_float_of_bf16(bits);
            h->error += missed * missed;
            list[found++] = bits;
        }
    }
    return found;
}

/* Fill the parameters at h->block and the symbols; return how many escapes were listed. */
TARGET static size_t NAME(ecsq_encode)(head *h, uint8_t *symbols, any16 *list) {
    size_t n = h->ask->width, tokens = h->ask->tokens, found = 0, is_keys = h->ask->kind == KV_KEYS;
    float row[BLOCK], centred[BLOCK], means[BLOCK] = {0}, steps[BLOCK], inverses[BLOCK];
    float error[BLOCK] = {0}, energy[BLOCK] = {0};
    int32_t bound = (int32_t)h->ask->bound;
    any16 *stored = (any16 *)(void *)h->block;
    size_t bytes = is_keys ? 2 * n : 2 * tokens;
    memset(h->block + bytes, 0, kv_pad16(bytes) - bytes);
    if (is_keys) {
        any16 *sigmas = (any16 *)(void *)(h->block + kv_pad16(bytes));
        memset((uint8_t *)(void *)sigmas + bytes, 0, kv_pad16(bytes) - bytes);
        NAME(take_means)(h, stored, means);
        NAME(take_deviations)(h, means, sigmas, steps);
        EACH(i, n) steps[i] = NAME(ecsq_step)(sigmas[i], h->ask->delta);
        EACH(i, n) inverses[i] = kv_inverse(steps[i]);
    }
    for (size_t t = 0; t < tokens && !h->is_broken; t++) {
        NAME(read_row)(h, t, row);
        NAME(add_squares)(row, energy, n);
        if (!is_keys) {
            uint16_t bits = NAME(ecsq_deviation)(row, n);
            h->is_broken |= kv_bf16_is_broken(bits);
            stored[t] = kv_bf16_without_subnormals(bits);
            float step = NAME(ecsq_step)(stored[t], h->ask->delta);
            EACH(i, n) steps[i] = step;
            EACH(i, n) inverses[i] = kv_inverse(step);
        }
        memcpy(centred, row, n * sizeof *row);
        if (t < h->ask->sinks) {
            memset(symbols + t * n, bound, n);
            continue;
        }
        if (is_keys) {
            NAME(subtract_row)(centred, means, n);
        }
        size_t far = NAME(ecsq_symbols)(
            centred, inverses, steps, bound, symbols + t * n, error, n);
        if (far > 0) {
            found += NAME(ecsq_list)(
                h, row, symbols + t * n, (uint8_t)(2 * bound + 1), list + found);
        }
        if (t % KV_TILE == KV_TILE - 1 || t + 1 == tokens) {
            NAME(add_up)(h, error, energy);
        }
    }
    return found;
}

/* Turn symbols into values; return 0 unless exactly *held* of them are escapes. */
TARGET static int NAME(ecsq_decode)(
    head *h, const uint8_t *symbols, const any16 *list, size_t held) {
    size_t n = h->ask->width, used = 0, is_keys = h->ask->kind == KV_KEYS;
    float row[BLOCK], means[BLOCK] = {0}, steps[BLOCK];
    int32_t bound = (int32_t)h->ask->bound;
    const any16 *stored = (const any16 *)(const void *)h->block;
    if (is_keys) {
        const any16 *sigmas = (const any16 *)(const void *)(h->block + kv_pad16(2 * n));
        NAME(load_halves)(stored, means, n);
        EACH(i, n) steps[i] = kv_mul(kv_float_of_bf16(sigmas[i]), h->ask->delta);
    }
    for (size_t t = 0; t < h->ask->tokens; t++) {
        const uint8_t *from = symbols + t * n;
        if (!is_keys) {
            float step = kv_mul(kv_float_of_bf16(stored[t]), h->ask->delta);
            EACH(i, n) steps[i] = step;
        }
        NAME(ecsq_values)(from, steps, means, bound, row, n);
        uint32_t far = 0;
        EACH(i, n) far += from[i] == 2 * bound + 1;
        for (size_t i = 0; far > 0 && i < n; i++) {
            if (from[i] == 2 * bound + 1) {
                if (used == held) {
                    return 0;
                }
                row[i] = kv_float_of_bf16(list[used++]);
                far--;
            }
        }
        NAME(write_row)(h, t, row);
    }
    return used == held;
}
