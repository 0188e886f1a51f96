/* int8kv and int4kv, a head at a time; see _codecs_heads.h.
 *
 * Encoders look twice at a group of tokens, for its ranges and for its codes. A group stays in a near
 * cache between the two.
 */

/* --- int8kv ---------------------------------------------------------------------------------------- */

/* kv_int8_code of a value that is finite: none is more than 127 scales, which are rounded up, but for
 * roundings of 2^-24, so that nothing needs to be held to that. */
INLINE uint32_t NAME(int8_code)(float value, float inverse) {
    return kv_rint_bits(kv_mul(value, inverse));
}

INLINE float NAME(int8_value)(uint8_t code, float scale) {
    return kv_mul((float)(int8_t)code, scale);
}

INLINE void NAME(int8_codes_of)(int is_narrow, const uint8_t *KV_RESTRICT row,
    const float *KV_RESTRICT inverse, const float *KV_RESTRICT scale, uint8_t *KV_RESTRICT codes,
    float *KV_RESTRICT error, float *KV_RESTRICT energy, size_t n) {
    EACH(i, n) {
        float value = NAME(value_at)(is_narrow, row, i);
        uint32_t code = NAME(int8_code)(value, inverse[i]);
        codes[i] = (uint8_t)code;
        float missed = kv_sub(value, kv_int8_value_of_bits(code, scale[i]));
        error[i] = kv_add(error[i], kv_mul(missed, missed));
        energy[i] = kv_add(energy[i], kv_mul(value, value));
    }
}

/* The same with one scale for the whole row. */
INLINE void NAME(int8_token_codes_of)(int is_narrow, const uint8_t *KV_RESTRICT row, float inverse,
    float scale, uint8_t *KV_RESTRICT codes, float *KV_RESTRICT error, float *KV_RESTRICT energy,
    size_t n) {
    EACH(i, n) {
        float value = NAME(value_at)(is_narrow, row, i);
        uint32_t code = NAME(int8_code)(value, inverse);
        codes[i] = (uint8_t)code;
        float missed = kv_sub(value, kv_int8_value_of_bits(code, scale));
        error[i] = kv_add(error[i], kv_mul(missed, missed));
        energy[i] = kv_add(energy[i], kv_mul(value, value));
    }
}

TARGET static void NAME(int8_keys_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    float row[BLOCK], scale[BLOCK], inverse[BLOCK], error[BLOCK] = {0}, energy[BLOCK] = {0};
    int32_t sizes[BLOCK];
    any16 *stored = part16(h, 1);
    for (size_t first = 0; first < tokens; first += KV_INT8_GROUP, stored += n) {
        size_t end = lesser(first + KV_INT8_GROUP, tokens);
        NAME(size_channels)(h, first, end, sizes);
        EACH(i, n) {
            h->is_broken |= sizes[i] >= KV_INFINITE_BITS;
            stored[i] = kv_int8_scale(kv_float_of_bits((uint32_t)sizes[i]));
            scale[i] = kv_float_of_bf16(stored[i]);
            inverse[i] = kv_inverse(scale[i]);
        }
        for (size_t t = first; t < end; t++) {
            uint8_t *codes = part(h, 0) + t * n;
            if (NAME(is_narrow)(h, t)) {
                NAME(int8_codes_of)(1, values_at(h, t), inverse, scale, codes, error, energy, n);
            } else {
                NAME(read_row)(h, t, row);
                NAME(int8_codes_of)(
                    0, (uint8_t *)(void *)row, inverse, scale, codes, error, energy, n);
            }
        }
        NAME(add_up)(h, error, energy);
    }
}

TARGET static void NAME(int8_values_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    float row[BLOCK], error[BLOCK] = {0}, energy[BLOCK] = {0}, scale[KV_TILE], inverse[KV_TILE];
    int32_t sizes[KV_TILE];
    for (size_t first = 0; first < tokens; first += KV_TILE) {
        size_t count = lesser(KV_TILE, tokens - first);
        any16 *stored = part16(h, 1) + first;
        EACH(t, count) sizes[t] = NAME(size_of_token)(h, first + t);
        EACH(t, count) {
            h->is_broken |= sizes[t] >= KV_INFINITE_BITS;
            stored[t] = kv_int8_scale(kv_float_of_bits((uint32_t)sizes[t]));
            scale[t] = kv_float_of_bf16(stored[t]);
            inverse[t] = kv_inverse(scale[t]);
        }
        EACH(t, count) {
            uint8_t *codes = part(h, 0) + (first + t) * n;
            if (NAME(is_narrow)(h, first + t)) {
                NAME(int8_token_codes_of)(1, values_at(h, first + t), inverse[t], scale[t], codes,
                    error, energy, n);
            } else {
                NAME(read_row)(h, first + t, row);
                NAME(int8_token_codes_of)(0, (uint8_t *)(void *)row, inverse[t], scale[t], codes,
                    error, energy, n);
            }
        }
        NAME(add_up)(h, error, energy);
    }
}

INLINE void NAME(int8_values_of)(int is_narrow, const uint8_t *KV_RESTRICT codes,
    const float *KV_RESTRICT scale, uint8_t *KV_RESTRICT row, size_t n) {
    EACH(i, n) {
        NAME(put_value)(is_narrow, row, i, NAME(int8_value)(codes[i], scale[i]));
    }
}

INLINE void NAME(int8_token_values_of)(int is_narrow, const uint8_t *KV_RESTRICT codes, float scale,
    uint8_t *KV_RESTRICT row, size_t n) {
    EACH(i, n) {
        NAME(put_value)(is_narrow, row, i, NAME(int8_value)(codes[i], scale));
    }
}

TARGET static void NAME(int8_keys_decode)(head *h) {
    size_t n = h->ask->width;
    int is_narrow = 0;
    float row[BLOCK], scale[BLOCK];
    for (size_t t = 0; t < h->ask->tokens; t++) {
        const uint8_t *codes = part(h, 0) + t * n;
        if (t % KV_INT8_GROUP == 0) {
            NAME(load_bf16)(part16(h, 1) + t / KV_INT8_GROUP * n, scale, n);
            is_narrow = h->ask->source == SOURCE_BF16;
            EACH(i, n) is_narrow &= NAME(is_moderate)(scale[i]);
        }
        if (is_narrow) {
            NAME(int8_values_of)(1, codes, scale, values_at(h, t), n);
        } else {
            NAME(int8_values_of)(0, codes, scale, (uint8_t *)(void *)row, n);
            NAME(write_row)(h, t, row);
        }
    }
}

TARGET static void NAME(int8_values_decode)(head *h) {
    size_t n = h->ask->width;
    float row[BLOCK];
    for (size_t t = 0; t < h->ask->tokens; t++) {
        const uint8_t *codes = part(h, 0) + t * n;
        float scale = kv_float_of_bf16(part16(h, 1)[t]);
        if (h->ask->source == SOURCE_BF16 && NAME(is_moderate)(scale)) {
            NAME(int8_token_values_of)(1, codes, scale, values_at(h, t), n);
        } else {
            NAME(int8_token_values_of)(0, codes, scale, (uint8_t *)(void *)row, n);
            NAME(write_row)(h, t, row);
        }
    }
}

/* --- int4kv ---------------------------------------------------------------------------------------- */

INLINE uint32_t NAME(int4_code)(float value, float zero, float inverse) {
    return kv_rint_bits(NAME(held_above_zero)(kv_mul(kv_sub(value, zero), inverse), KV_INT4_MAX));
}

INLINE float NAME(int4_value)(uint32_t code, float zero, float scale) {
    return kv_add(kv_mul((float)(int32_t)code, scale), zero);
}

/* What the codes of groups are relative to: those of all channels of a tile, or of all its tokens, of
 * which each has BLOCK / 64 at most. */
typedef struct {
    int32_t least[BLOCK], most[BLOCK];
    uint16_t scale_bits[BLOCK], zero_bits[BLOCK];
    float zero[BLOCK], scale[BLOCK], inverse[BLOCK];
} NAME(int4_groups);

/* Choose and store scales and zeros of *count* groups; a group without any token has neither. */
TARGET static void NAME(int4_store)(head *h, NAME(int4_groups) *g, any16 *pairs, size_t count) {
    int32_t broken = 0;
    EACH(i, count) {
        int32_t least = g->least[i], most = g->most[i], is_empty = least > most;
        float low = kv_float_of_key(least), high = kv_float_of_key(most);
        uint16_t scale = kv_int4_scale(low, high), zero = kv_int4_zero(low);
        broken |= (least < KV_KEY_MIN_FINITE) | (most > KV_KEY_MAX_FINITE);
        g->scale_bits[i] = is_empty ? 0 : scale;
        g->zero_bits[i] = is_empty ? 0 : zero;
    }
    EACH(i, count) {
        broken |= kv_half_is_broken(g->scale_bits[i]) | kv_half_is_broken(g->zero_bits[i]);
        g->scale[i] = kv_float_of_half(g->scale_bits[i]);
        g->zero[i] = kv_float_of_half(g->zero_bits[i]);
        g->inverse[i] = kv_inverse(g->scale[i]);
    }
    EACH(i, count) {
        pairs[2 * i] = g->scale_bits[i];
        pairs[2 * i + 1] = g->zero_bits[i];
    }
    h->is_broken |= broken;
}

/* Scales and zeros of *count* groups as stored; return whether all are finite, as encoders leave them. */
TARGET static int NAME(int4_load)(
    const any16 *KV_RESTRICT pairs, float *KV_RESTRICT zero, float *KV_RESTRICT scale, size_t count) {
    uint16_t most = 0;
    EACH(i, 2 * count) {
        uint16_t size = pairs[i] & 0x7fffu;
        most = most > size ? most : size;
    }
    EACH(i, count) scale[i] = kv_float_of_half(pairs[2 * i]);
    EACH(i, count) zero[i] = kv_float_of_half(pairs[2 * i + 1]);
    return !kv_half_is_broken(most);
}

INLINE void NAME(int4_codes_of)(int is_narrow, const uint8_t *KV_RESTRICT low,
    const uint8_t *KV_RESTRICT high, const float *KV_RESTRICT zero,
    const float *KV_RESTRICT inverse, const float *KV_RESTRICT scale, uint8_t *KV_RESTRICT codes,
    float *KV_RESTRICT error, float *KV_RESTRICT energy, float *KV_RESTRICT high_energy, size_t n) {
    EACH(i, n) {
        float x = NAME(value_at)(is_narrow, low, i), y = NAME(value_at)(is_narrow, high, i);
        uint32_t a = NAME(int4_code)(x, zero[i], inverse[i]), b = NAME(int4_code)(y, zero[i], inverse[i]);
        codes[i] = (uint8_t)((a & 15u) | (b << 4));
        float missed = kv_sub(x, kv_int4_value_of_bits(a, zero[i], scale[i]));
        float other = kv_sub(y, kv_int4_value_of_bits(b, zero[i], scale[i]));
        error[i] = kv_add(error[i], kv_add(kv_mul(missed, missed), kv_mul(other, other)));
        energy[i] = kv_add(energy[i], kv_mul(x, x));
        high_energy[i] = kv_add(high_energy[i], kv_mul(y, y));
    }
}

INLINE void NAME(int4_token_codes_of)(int is_narrow, const uint8_t *KV_RESTRICT low,
    const uint8_t *KV_RESTRICT high, float zero, float inverse, float scale,
    uint8_t *KV_RESTRICT codes, float *KV_RESTRICT error, float *KV_RESTRICT energy,
    float *KV_RESTRICT high_energy, size_t n) {
    EACH(i, n) {
        float x = NAME(value_at)(is_narrow, low, i), y = NAME(value_at)(is_narrow, high, i);
        uint32_t a = NAME(int4_code)(x, zero, inverse), b = NAME(int4_code)(y, zero, inverse);
        codes[i] = (uint8_t)((a & 15u) | (b << 4));
        float missed = kv_sub(x, kv_int4_value_of_bits(a, zero, scale));
        float other = kv_sub(y, kv_int4_value_of_bits(b, zero, scale));
        error[i] = kv_add(error[i], kv_add(kv_mul(missed, missed), kv_mul(other, other)));
        energy[i] = kv_add(energy[i], kv_mul(x, x));
        high_energy[i] = kv_add(high_energy[i], kv_mul(y, y));
    }
}

/* Sums over the rows of a head. What stands in for rows that do not exist is left out. */
typedef struct {
    float error[BLOCK], energy[BLOCK], high_energy[BLOCK], left_out[BLOCK];
} NAME(int4_sums);

TARGET static void NAME(int4_add_up)(head *h, NAME(int4_sums) *sums) {
    NAME(add_up)(h, sums->error, sums->energy);
    h->energy += NAME(sum_of)(sums->high_energy, h->ask->width);
    memset(sums->high_energy, 0, h->ask->width * sizeof *sums->high_energy);
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

/* Code two tokens of a tile that ends at *end*; of the two, either may not exist. */
TARGET static void NAME(int4_keys_pair)(head *h, const NAME(int4_groups) *g, NAME(int4_sums) *sums,
    size_t low, size_t high, size_t end, uint8_t *codes) {
    size_t n = h->ask->width, sinks = h->ask->sinks;
    float first[BLOCK], second[BLOCK];
    if (NAME(is_narrow)(h, low) && high < end) {
        NAME(int4_codes_of)(1, values_at(h, low), values_at(h, high), g->zero, g->inverse, g->scale,
            codes, sums->error, sums->energy, sums->high_energy, n);
    } else if (low < sinks && (high < sinks || high >= end)) {
        memset(codes, 0, n);
    } else {
        NAME(int4_read)(h, low, end, g->zero, first);
        NAME(int4_read)(h, high, end, g->zero, second);
        NAME(int4_codes_of)(0, (uint8_t *)(void *)first, (uint8_t *)(void *)second, g->zero,
            g->inverse, g->scale, codes, sums->error, low < sinks ? sums->left_out : sums->energy,
            high < end ? sums->high_energy : sums->left_out, n);
    }
}

TARGET static void NAME(int4_keys_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    NAME(int4_groups) groups;
    NAME(int4_sums) sums = {0};
    uint8_t *codes = part(h, 0);
    any16 *stored = part16(h, 1);
    for (size_t first = 0; first < tokens; first += KV_TILE, stored += 2 * n) {
        size_t end = lesser(first + KV_TILE, tokens), half = (end - first + 1) / 2;
        NAME(range_channels)(h, first, end, groups.least, groups.most);
        NAME(int4_store)(h, &groups, stored, n);
        for (size_t t = first; t < first + half; t++, codes += n) {
            NAME(int4_keys_pair)(h, &groups, &sums, t, t + half, end, codes);
        }
        NAME(int4_add_up)(h, &sums);
    }
}

/* One group of up to 64 channels of a token: the first half low, the second half high. */
INLINE void NAME(int4_group_encode)(int is_narrow, const uint8_t *row, float zero, float inverse,
    float scale, uint8_t *codes, NAME(int4_sums) *sums, size_t n) {
    size_t half = (n + 1) / 2, element = is_narrow ? 2 : 4;
    NAME(int4_token_codes_of)(is_narrow, row, row + half * element, zero, inverse, scale, codes,
        sums->error, sums->energy, sums->high_energy, n / 2);
    if (n % 2 == 1) {
        float last = NAME(value_at)(is_narrow, row, half - 1);
        NAME(int4_token_codes_of)(0, (uint8_t *)(void *)&last, (uint8_t *)(void *)&zero, zero,
            inverse, scale, codes + half - 1, sums->error, sums->energy, sums->left_out, 1);
    }
}

/* All groups of a token. */
INLINE void NAME(int4_token_encode)(int is_narrow, const head *h, const uint8_t *row,
    const NAME(int4_groups) *g, size_t at, uint8_t *codes, NAME(int4_sums) *sums) {
    size_t n = h->ask->width, element = is_narrow ? 2 : 4, c = 0;
    for (; c + KV_INT4_CHANNELS <= n; at++, c += KV_INT4_CHANNELS) {
        NAME(int4_group_encode)(is_narrow, row + c * element, g->zero[at], g->inverse[at],
            g->scale[at], codes + c / 2, sums, KV_INT4_CHANNELS);
    }
    if (c < n) {
        NAME(int4_group_encode)(is_narrow, row + c * element, g->zero[at], g->inverse[at],
            g->scale[at], codes + c / 2, sums, n - c);
    }
}

TARGET static void NAME(int4_values_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens, sinks = h->ask->sinks;
    size_t bytes = kv_int4_row_bytes(n), groups = kv_ceil(n, KV_INT4_CHANNELS);
    NAME(int4_groups) g;
    NAME(int4_sums) sums = {0};
    float row[BLOCK];
    memset(part(h, 0), 0, sinks * bytes);
    memset(part16(h, 1), 0, sinks * groups * 4);
    for (size_t first = sinks, end; first < tokens; first = end) {
        end = lesser(first + KV_TILE, tokens);
        for (size_t t = first; t < end; t++) {
            size_t at = (t - first) * groups;
            NAME(range_groups)(h, t, g.least + at, g.most + at);
        }
        NAME(int4_store)(h, &g, part16(h, 1) + first * groups * 2, (end - first) * groups);
        for (size_t t = first; t < end; t++) {
            uint8_t *codes = part(h, 0) + t * bytes;
            if (NAME(is_narrow)(h, t)) {
                NAME(int4_token_encode)(1, h, values_at(h, t), &g, (t - first) * groups, codes, &sums);
            } else {
                NAME(read_row)(h, t, row);
                NAME(int4_token_encode)(
                    0, h, (uint8_t *)(void *)row, &g, (t - first) * groups, codes, &sums);
            }
        }
        NAME(int4_add_up)(h, &sums);
    }
}

INLINE void NAME(int4_values_of)(int is_narrow, const uint8_t *KV_RESTRICT codes,
    const float *KV_RESTRICT zero, const float *KV_RESTRICT scale, uint8_t *KV_RESTRICT low,
    uint8_t *KV_RESTRICT high, size_t n) {
    EACH(i, n) {
        NAME(put_value)(is_narrow, low, i, NAME(int4_value)(codes[i] & 15u, zero[i], scale[i]));
        NAME(put_value)(is_narrow, high, i, NAME(int4_value)(codes[i] >> 4, zero[i], scale[i]));
    }
}

INLINE void NAME(int4_token_values_of)(int is_narrow, const uint8_t *KV_RESTRICT codes, float zero,
    float scale, uint8_t *KV_RESTRICT low, uint8_t *KV_RESTRICT high, size_t n) {
    EACH(i, n) NAME(put_value)(is_narrow, low, i, NAME(int4_value)(codes[i] & 15u, zero, scale));
    EACH(i, n) NAME(put_value)(is_narrow, high, i, NAME(int4_value)(codes[i] >> 4, zero, scale));
}

TARGET static void NAME(int4_keys_decode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    float low[BLOCK], high[BLOCK], zero[BLOCK], scale[BLOCK];
    const uint8_t *codes = part(h, 0);
    const any16 *stored = part16(h, 1);
    for (size_t first = 0; first < tokens; first += KV_TILE, stored += 2 * n) {
        size_t end = lesser(first + KV_TILE, tokens), half = (end - first + 1) / 2;
        int is_narrow = NAME(int4_load)(stored, zero, scale, n) && h->ask->source == SOURCE_BF16;
        for (size_t t = first; t < first + half; t++, codes += n) {
            if (is_narrow && t + half < end) {
                NAME(int4_values_of)(
                    1, codes, zero, scale, values_at(h, t), values_at(h, t + half), n);
                continue;
            }
            NAME(int4_values_of)(
                0, codes, zero, scale, (uint8_t *)(void *)low, (uint8_t *)(void *)high, n);
            NAME(write_row)(h, t, low);
            if (t + half < end) {
                NAME(write_row)(h, t + half, high);
            }
        }
    }
}

/* All groups of a token; an odd last group leaves a value too many behind it. */
INLINE void NAME(int4_token_decode)(int is_narrow, const head *h, const uint8_t *codes,
    const float *zero, const float *scale, uint8_t *row) {
    size_t n = h->ask->width, element = is_narrow ? 2 : 4, c = 0;
    for (; c + KV_INT4_CHANNELS <= n; zero++, scale++, c += KV_INT4_CHANNELS) {
        uint8_t *low = row + c * element, *high = low + KV_INT4_CHANNELS / 2 * element;
        NAME(int4_token_values_of)(
            is_narrow, codes + c / 2, *zero, *scale, low, high, KV_INT4_CHANNELS / 2);
    }
    if (c < n) {
        size_t half = (n - c + 1) / 2;
        uint8_t *low = row + c * element, *high = low + half * element;
        NAME(int4_token_values_of)(is_narrow, codes + c / 2, *zero, *scale, low, high, half);
    }
}

TARGET static void NAME(int4_values_decode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    size_t bytes = kv_int4_row_bytes(n), groups = kv_ceil(n, KV_INT4_CHANNELS);
    float row[BLOCK + 1], zero[BLOCK], scale[BLOCK];
    int is_narrow = 0;
    for (size_t t = 0; t < tokens; t++) {
        size_t at = t % KV_TILE * groups;
        const uint8_t *codes = part(h, 0) + t * bytes;
        if (at == 0) {
            size_t count = lesser(KV_TILE, tokens - t) * groups;
            is_narrow = NAME(int4_load)(part16(h, 1) + t * groups * 2, zero, scale, count) &&
                        h->ask->source == SOURCE_BF16 && n % 2 == 0;
        }
        if (is_narrow) {
            NAME(int4_token_decode)(1, h, codes, zero + at, scale + at, values_at(h, t));
        } else {
            NAME(int4_token_decode)(0, h, codes, zero + at, scale + at, (uint8_t *)(void *)row);
            NAME(write_row)(h, t, row);
        }
    }
}
