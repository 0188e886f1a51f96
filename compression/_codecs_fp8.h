/* fp8, a head at a time; see _codecs_heads.h. */

INLINE void NAME(fp8_codes_of)(int is_narrow, const uint8_t *KV_RESTRICT row, float inverse,
    float scale, uint8_t *KV_RESTRICT codes, float *KV_RESTRICT error, float *KV_RESTRICT energy,
    size_t n) {
    EACH(i, n) {
        float value = NAME(value_at)(is_narrow, row, i);
        uint8_t code = kv_fp8_code(value, inverse);
        codes[i] = code;
        float missed = kv_sub(value, kv_fp8_value(code, scale));
        error[i] = kv_add(error[i], kv_mul(missed, missed));
        energy[i] = kv_add(energy[i], kv_mul(value, value));
    }
}

INLINE void NAME(fp8_values_of)(int is_narrow, const uint8_t *KV_RESTRICT codes, float scale,
    uint8_t *KV_RESTRICT row, size_t n) {
    EACH(i, n) NAME(put_value)(is_narrow, row, i, kv_fp8_value(codes[i], scale));
}

TARGET static void NAME(fp8_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    float row[BLOCK], error[BLOCK] = {0}, energy[BLOCK] = {0};
    int32_t sizes[BLOCK], largest = 0;
    NAME(size_channels)(h, 0, tokens, sizes);
    EACH(i, n) largest = largest > sizes[i] ? largest : sizes[i];
    h->is_broken |= largest >= KV_INFINITE_BITS;
    int32_t exponent = h->is_broken ? 0 : kv_fp8_exponent(largest);
    float scale = kv_power_of_two(exponent), inverse = kv_power_of_two(-exponent);
    part(h, 1)[0] = (uint8_t)(int8_t)exponent;
    for (size_t t = 0; t < tokens; t++) {
        uint8_t *codes = part(h, 0) + t * n;
        if (NAME(is_narrow)(h, t)) {
            NAME(fp8_codes_of)(1, values_at(h, t), inverse, scale, codes, error, energy, n);
        } else {
            NAME(read_row)(h, t, row);
            NAME(fp8_codes_of)(
                0, (uint8_t *)(void *)row, inverse, scale, codes, error, energy, n);
        }
        if (t % KV_TILE == KV_TILE - 1 || t + 1 == tokens) {
            NAME(add_up)(h, error, energy);
        }
    }
}

TARGET static void NAME(fp8_decode)(head *h) {
    size_t n = h->ask->width;
    float row[BLOCK], scale = kv_power_of_two((int8_t)part(h, 1)[0]);
    for (size_t t = 0; t < h->ask->tokens; t++) {
        const uint8_t *codes = part(h, 0) + t * n;
        if (h->ask->source == SOURCE_BF16 && NAME(is_moderate)(scale)) {
            NAME(fp8_values_of)(1, codes, scale, values_at(h, t), n);
        } else {
            NAME(fp8_values_of)(0, codes, scale, (uint8_t *)(void *)row, n);
            NAME(write_row)(h, t, row);
        }
    }
}
