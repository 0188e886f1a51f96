/* ecsq: the parameters, symbols and escapes of a head; see _codecs_heads.h. */

/* Symbols of a row, and what they miss; return how many are escapes. */
TARGET static size_t NAME(ecsq_symbols)(
    const float *KV_RESTRICT row, const float *KV_RESTRICT inverses, const float *KV_RESTRICT steps,
    uint32_t bound, uint8_t *KV_RESTRICT symbols, float *KV_RESTRICT error, size_t n) {
    uint32_t escapes = 0;
    EACH(i, n) {
        int32_t code = kv_ecsq_code(row[i], inverses[i], bound);
        uint32_t symbol = kv_ecsq_symbol(code, bound);
        int is_escape = symbol == 2 * bound + 1;
        symbols[i] = (uint8_t)symbol;
        float missed = kv_sub(row[i], kv_mul(kv_float_of_small(code), steps[i]));
        missed = is_escape ? 0.0f : missed; /* what those lose is added where they are listed */
        error[i] = kv_add(error[i], kv_mul(missed, missed));
        escapes += (uint32_t)is_escape;
    }
    return escapes;
}

TARGET static void NAME(ecsq_values)(
    const uint8_t *KV_RESTRICT symbols, const float *KV_RESTRICT steps, const float *KV_RESTRICT means,
    uint32_t bound, float *KV_RESTRICT row, size_t n) {
    EACH(i, n) row[i] = kv_ecsq_value(symbols[i], bound, steps[i], means[i]);
}

/* The deviation of a token's values from zero, as it is stored. */
TARGET static uint16_t NAME(ecsq_deviation)(const float *row, size_t n) {
    float sum = NAME(tree_of_squares)(row, n);
    return kv_bf16_scale_of_float(kv_sqrt(kv_div(sum, (float)n)));
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
    uint32_t bound = (uint32_t)h->ask->bound;
    any16 *stored = (any16 *)(void *)h->block;
    size_t bytes = is_keys ? 2 * n : 2 * tokens;
    memset(h->block + bytes, 0, kv_pad16(bytes) - bytes);
    if (is_keys) {
        any16 *sigmas = (any16 *)(void *)(h->block + kv_pad16(bytes));
        memset((uint8_t *)(void *)sigmas + bytes, 0, kv_pad16(bytes) - bytes);
        NAME(take_means)(h, stored, means);
        NAME(take_deviations)(h, means, sigmas, steps);
        EACH(i, n) steps[i] = kv_ecsq_step(kv_float_of_bf16(sigmas[i]), h->ask->delta);
        EACH(i, n) inverses[i] = kv_inverse(steps[i]);
    }
    for (size_t t = 0; t < tokens && !h->is_broken; t++) {
        NAME(read_row)(h, t, row);
        NAME(add_squares)(row, energy, n);
        if (!is_keys) {
            uint16_t bits = NAME(ecsq_deviation)(row, n);
            h->is_broken |= kv_bf16_is_broken(bits);
            stored[t] = kv_bf16_without_subnormals(bits);
            float step = kv_ecsq_step(kv_float_of_bf16(stored[t]), h->ask->delta);
            EACH(i, n) steps[i] = step;
            EACH(i, n) inverses[i] = kv_inverse(step);
        }
        memcpy(centred, row, n * sizeof *row);
        if (t < h->ask->sinks) {
            memset(symbols + t * n, (int)bound, n);
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
    uint32_t bound = (uint32_t)h->ask->bound;
    const any16 *stored = (const any16 *)(const void *)h->block;
    if (is_keys) {
        const any16 *sigmas = (const any16 *)(const void *)(h->block + kv_pad16(2 * n));
        NAME(load_halves)(stored, means, n);
        EACH(i, n) steps[i] = kv_ecsq_step(kv_float_of_bf16(sigmas[i]), h->ask->delta);
    }
    for (size_t t = 0; t < h->ask->tokens; t++) {
        const uint8_t *from = symbols + t * n;
        if (!is_keys) {
            float step = kv_ecsq_step(kv_float_of_bf16(stored[t]), h->ask->delta);
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
