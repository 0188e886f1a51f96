/* ecsq: the parameters, symbols and escapes of a head; see _codecs_heads.h. */

/* Symbols of a row: those of kv_ecsq_code and kv_ecsq_symbol, to which NaN does not matter. Codes are held
 * within the bound and one more, so that as integers without sign only escapes reach 2 * bound + 1. What
 * escapes lose is added where they are listed. */
INLINE void NAME(ecsq_symbols_of)(int is_narrow, const uint8_t *KV_RESTRICT row,
    const float *KV_RESTRICT means, const float *KV_RESTRICT inverses,
    const float *KV_RESTRICT steps, uint32_t bound, uint8_t *KV_RESTRICT symbols,
    float *KV_RESTRICT error, float *KV_RESTRICT energy, size_t n) {
    const float most = kv_float_of_small((int32_t)bound + 1);
    const uint32_t escape = 2 * bound + 1;
    EACH(i, n) {
        float value = NAME(value_at)(is_narrow, row, i), away = kv_sub(value, means[i]);
        int32_t q = kv_rint(NAME(held)(kv_mul(away, inverses[i]), most));
        uint32_t symbol = (uint32_t)q + bound;
        symbol = symbol < escape ? symbol : escape;
        symbols[i] = (uint8_t)symbol;
        float missed = kv_sub(away, kv_mul((float)q, steps[i]));
        missed = symbol < escape ? missed : 0.0f;
        error[i] = kv_add(error[i], kv_mul(missed, missed));
        energy[i] = kv_add(energy[i], kv_mul(value, value));
    }
}

INLINE void NAME(ecsq_values_of)(int is_narrow, const uint8_t *KV_RESTRICT symbols,
    const float *KV_RESTRICT steps, const float *KV_RESTRICT means, uint32_t bound,
    uint8_t *KV_RESTRICT row, size_t n) {
    EACH(i, n) {
        float value = kv_ecsq_value(symbols[i], bound, steps[i], means[i]);
        NAME(put_value)(is_narrow, row, i, value);
    }
}

/* Store the deviations from zero of up to sixteen tokens. Each sum is a tree over the channels, down to
 * sixteen for each token alone and from there for all side by side. */
TARGET static void NAME(ecsq_deviations)(head *h, size_t first, size_t count, any16 *stored) {
    size_t n = h->ask->width, power = power_of_two_from(n > GROUP ? n : GROUP);
    float squares[BLOCK], rows[GROUP * GROUP] = {0.0f}, columns[GROUP * GROUP];
    memset(squares + n, 0, (power - n) * sizeof *squares); /* folds leave that alone */
    for (size_t t = 0; t < count; t++) {
        NAME(read_row)(h, first + t, squares);
        NAME(square_row)(squares, squares, n);
        for (size_t half = power / 2; half >= GROUP; half /= 2) {
            NAME(fold)(squares, half);
        }
        memcpy(rows + GROUP * t, squares, GROUP * sizeof *rows);
    }
    NAME(turn_rows)(rows, GROUP, columns, GROUP);
    for (size_t half = GROUP / 2; half > 0; half /= 2) {
        NAME(fold)(columns, half * GROUP);
    }
    for (size_t t = 0; t < count; t++) {
        uint16_t bits = kv_bf16_scale_of_float(kv_sqrt(kv_div(columns[t], (float)n)));
        h->is_broken |= kv_bf16_is_broken(bits);
        stored[t] = kv_bf16_without_subnormals(bits);
    }
}

/* Append the escapes of a token, which are marked; return the end of the list. */
TARGET static any16 *NAME(ecsq_list)(head *h, size_t token, const uint64_t *marks, any16 *list) {
    float row[BLOCK];
    NAME(read_row)(h, token, row);
    for (size_t at = 0; at < h->ask->width; at += 64) {
        for (uint64_t mark = marks[at / 64]; mark != 0; mark &= mark - 1) {
            float value = row[at + (size_t)__builtin_ctzll(mark)];
            uint16_t bits = kv_bf16_scale_of_float(value);
            h->is_broken |= kv_bf16_is_broken(bits);
            double missed = value - kv_float_of_bf16(bits);
            h->error += missed * missed;
            *list++ = bits;
        }
    }
    return list;
}

/* What the symbols of K are relative to. */
TARGET static void NAME(ecsq_channels)(
    head *h, any16 *stored, any16 *sigmas, float *means, float *steps, float *inverses) {
    size_t n = h->ask->width, padding = kv_pad16(2 * n) - 2 * n;
    memset((uint8_t *)(void *)(stored + n), 0, padding);
    memset((uint8_t *)(void *)(sigmas + n), 0, padding);
    NAME(take_means)(h, stored, means);
    NAME(take_deviations)(h, means, sigmas, steps);
    EACH(i, n) steps[i] = kv_ecsq_step(kv_float_of_bf16(sigmas[i]), h->ask->delta);
    EACH(i, n) inverses[i] = kv_inverse(steps[i]);
}

/* Fill the parameters at h->block and the symbols, behind which 64 bytes can be read; return how many
 * escapes were listed. */
TARGET static size_t NAME(ecsq_encode)(head *h, uint8_t *symbols, any16 *list) {
    size_t n = h->ask->width, tokens = h->ask->tokens, is_keys = h->ask->kind == KV_KEYS;
    float row[BLOCK], means[BLOCK] = {0}, steps[BLOCK], inverses[BLOCK];
    float error[BLOCK] = {0}, energy[BLOCK] = {0};
    uint32_t bound = (uint32_t)h->ask->bound;
    uint64_t marks[BLOCK / 64];
    any16 *stored = (any16 *)(void *)h->block, *end = list;
    if (is_keys) {
        any16 *sigmas = (any16 *)(void *)(h->block + kv_pad16(2 * n));
        NAME(ecsq_channels)(h, stored, sigmas, means, steps, inverses);
    } else {
        memset(h->block + 2 * tokens, 0, kv_pad16(2 * tokens) - 2 * tokens);
    }
    for (size_t t = 0; t < tokens && !h->is_broken; t++) {
        if (!is_keys) {
            if (t % GROUP == 0) {
                NAME(ecsq_deviations)(h, t, lesser(GROUP, tokens - t), stored + t);
            }
            float step = kv_ecsq_step(kv_float_of_bf16(stored[t]), h->ask->delta);
            float inverse = kv_inverse(step);
            EACH(i, n) steps[i] = step;
            EACH(i, n) inverses[i] = inverse;
        }
        if (t < h->ask->sinks) {
            memset(symbols + t * n, (int)bound, n);
            continue;
        }
        if (NAME(is_narrow)(h, t)) {
            NAME(ecsq_symbols_of)(1, values_at(h, t), means, inverses, steps, bound,
                symbols + t * n, error, energy, n);
        } else {
            NAME(read_row)(h, t, row);
            NAME(ecsq_symbols_of)(0, (uint8_t *)(void *)row, means, inverses, steps, bound,
                symbols + t * n, error, energy, n);
        }
        if (NAME(mark_bytes)(symbols + t * n, n, (uint8_t)(2 * bound + 1), marks) > 0) {
            end = NAME(ecsq_list)(h, t, marks, end);
        }
        if (t % KV_TILE == KV_TILE - 1 || t + 1 == tokens) {
            NAME(add_up)(h, error, energy);
        }
    }
    return (size_t)(end - list);
}

/* Replace the values that are marked by those that *list* begins with. */
TARGET static void NAME(ecsq_replace)(
    int is_narrow, const uint64_t *marks, const any16 *list, uint8_t *row, size_t n) {
    for (size_t at = 0; at < n; at += 64) {
        for (uint64_t mark = marks[at / 64]; mark != 0; mark &= mark - 1) {
            size_t i = at + (size_t)__builtin_ctzll(mark);
            float value = kv_float_of_bf16(*list++);
            value = is_narrow ? kv_float_of_bf16(kv_bf16_of_float(value)) : value;
            NAME(put_value)(is_narrow, row, i, value);
        }
    }
}

/* Turn symbols, behind which 64 bytes can be read, into values; return 0 unless exactly *held* of them
 * are escapes. */
TARGET static int NAME(ecsq_decode)(
    head *h, const uint8_t *symbols, const any16 *list, size_t held) {
    size_t n = h->ask->width, used = 0, is_keys = h->ask->kind == KV_KEYS;
    float row[BLOCK], means[BLOCK] = {0}, steps[BLOCK];
    int32_t largest = 0;
    uint32_t bound = (uint32_t)h->ask->bound;
    uint64_t marks[BLOCK / 64];
    const any16 *stored = (const any16 *)(const void *)h->block;
    if (is_keys) {
        const any16 *sigmas = (const any16 *)(const void *)(h->block + kv_pad16(2 * n));
        NAME(load_halves)(stored, means, n);
        EACH(i, n) steps[i] = kv_ecsq_step(kv_float_of_bf16(sigmas[i]), h->ask->delta);
        largest = NAME(size_of_row)(steps, n) | NAME(size_of_row)(means, n);
    }
    for (size_t t = 0; t < h->ask->tokens; t++) {
        const uint8_t *from = symbols + t * n;
        if (!is_keys) {
            float step = kv_ecsq_step(kv_float_of_bf16(stored[t]), h->ask->delta);
            EACH(i, n) steps[i] = step;
            largest = kv_size_bits(step);
        }
        size_t far = NAME(mark_bytes)(from, n, (uint8_t)(2 * bound + 1), marks);
        if (far > held - used) {
            return 0;
        }
        int is_narrow = h->ask->source == SOURCE_BF16 && largest < MODERATE;
        uint8_t *to = is_narrow ? values_at(h, t) : (uint8_t *)(void *)row;
        if (is_narrow) {
            NAME(ecsq_values_of)(1, from, steps, means, bound, to, n);
        } else {
            NAME(ecsq_values_of)(0, from, steps, means, bound, to, n);
        }
        if (far > 0) {
            NAME(ecsq_replace)(is_narrow, marks, list + used, to, n);
            used += far;
        }
        if (!is_narrow) {
            NAME(write_row)(h, t, row);
        }
    }
    return used == held;
}
