/* nvfp4, a head at a time; see _codecs_heads.h. */

/* What kv_e2m1_of_float's code of a size stands for, without making it: adding and taking away what has
 * the step between codes as its last place rounds to that step. */
INLINE float NAME(nvfp4_nearest)(float size) {
    float capped = NAME(held_above_zero)(size, KV_E2M1_MAX);
    int32_t bits = (int32_t)kv_bits_of_float(capped);
    float magic = bits < 0x40800000 ? KV_MAGIC : 2.0f * KV_MAGIC; /* below 4, and below 2 */
    magic = bits < 0x40000000 ? 0.5f * KV_MAGIC : magic;
    return kv_sub(kv_add(capped, magic), magic);
}

/* kv_nvfp4_code, in integers. */
INLINE uint32_t NAME(nvfp4_code)(float scaled) {
    uint32_t bits = kv_bits_of_float(NAME(held_above_zero)(kv_abs(scaled), KV_E2M1_MAX));
    uint32_t normal = (bits + 0x1fffffu + ((bits >> 22) & 1u) - (126u << 23)) >> 22;
    float size = kv_float_of_bits(bits);
    uint32_t small = kv_rint_bits(kv_add(size, size)) & 3u;
    uint32_t sign = kv_bits_of_float(scaled) > 0x80000000u ? 8u : 0u;
    return sign | (bits < 0x3f800000u ? small : normal & 7u);
}

/* Blocks lie beside each other, the 16 values of each below one another: n columns, n a multiple of
 * 16. What each loses with a given scale, summed as a tree in the order of the format. */
TARGET static void NAME(nvfp4_errors)(
    const float *KV_RESTRICT sizes, const float *KV_RESTRICT units,
    const float *KV_RESTRICT inverses, float *KV_RESTRICT errors, size_t n) {
    size_t pitch = NAME(pitch_of)(n);
    for (size_t c = 0; c < n; c += GROUP) {
        float squares[16][GROUP];
        for (size_t r = 0; r < 16; r++) {
            EACH(i, GROUP) {
                float size = sizes[r * pitch + c + i];
                float nearest = NAME(nvfp4_nearest)(kv_mul(size, inverses[c + i]));
                float missed = kv_sub(size, kv_mul(nearest, units[c + i]));
                squares[r][i] = kv_mul(missed, missed);
            }
        }
        for (size_t half = 8; half > 0; half /= 2) {
            NAME(fold)(squares[0], half * GROUP);
        }
        memcpy(errors + c, squares[0], sizeof squares[0]);
    }
}

/* Scales of n blocks so that their *largest* become *target*, and what they lose then. */
TARGET static void NAME(nvfp4_try)(
    const float *sizes, const float *KV_RESTRICT largest, float target, float tensor,
    uint8_t *KV_RESTRICT scales, float *errors, size_t n) {
    float units[BLOCK], inverses[BLOCK];
    EACH(i, n) {
        scales[i] = kv_nvfp4_block_scale(largest[i], target, tensor);
        units[i] = kv_nvfp4_unit(scales[i], tensor);
        inverses[i] = kv_inverse(units[i]);
    }
    NAME(nvfp4_errors)(sizes, units, inverses, errors, n);
}

/* Choose the scales of n blocks; return their inverses and what is lost. */
TARGET static void NAME(nvfp4_choose)(
    const float *sizes, float tensor, uint8_t *KV_RESTRICT scales, float *KV_RESTRICT inverses,
    float *KV_RESTRICT errors, size_t n) {
    float largest[BLOCK], fours[BLOCK];
    uint8_t other[BLOCK];
    memcpy(largest, sizes, n * sizeof *largest);
    for (size_t r = 1; r < 16; r++) {
        const float *KV_RESTRICT row = sizes + r * NAME(pitch_of)(n);
        EACH(i, n) {
            int32_t size = kv_size_bits(row[i]), most = kv_size_bits(largest[i]);
            largest[i] = kv_float_of_bits((uint32_t)(size > most ? size : most));
        }
    }
    NAME(nvfp4_try)(sizes, largest, 6.0f, tensor, scales, errors, n);
    NAME(nvfp4_try)(sizes, largest, 4.0f, tensor, other, fours, n);
    EACH(i, n) {
        scales[i] = fours[i] < errors[i] ? other[i] : scales[i];
        errors[i] = kv_min(errors[i], fours[i]);
        inverses[i] = kv_inverse(kv_nvfp4_unit(scales[i], tensor));
    }
}

TARGET static void NAME(nvfp4_codes)(
    const float *KV_RESTRICT row, const float *KV_RESTRICT inverses, uint8_t *KV_RESTRICT codes,
    size_t n) {
    EACH(i, n) codes[i] = (uint8_t)NAME(nvfp4_code)(kv_mul(row[i], inverses[i]));
}

TARGET static void NAME(nvfp4_values)(
    const uint8_t *KV_RESTRICT codes, const float *KV_RESTRICT units, float *KV_RESTRICT row, size_t n) {
    EACH(i, n) row[i] = kv_nvfp4_value(codes[i], units[i]);
}

TARGET static void NAME(nvfp4_units)(
    const uint8_t *KV_RESTRICT scales, float tensor, float *KV_RESTRICT units, size_t n) {
    EACH(i, n) units[i] = kv_nvfp4_unit(scales[i], tensor);
}

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
        if (h->ask->kind == KV_KEYS) {
            NAME(subtract_row)(row, means, n);
        }
        NAME(add_squares)(row, rest, n);
        int32_t size = NAME(size_of_row)(row, n);
        largest = largest > size ? largest : size;
        if (t % KV_TILE == KV_TILE - 1 || t + 1 == tokens) {
            NAME(add_up)(h, rest, energy);
        }
    }
    h->is_broken |= largest >= KV_INFINITE_BITS;
    return kv_nvfp4_tensor_scale(kv_float_of_bits((uint32_t)largest));
}

TARGET static void NAME(sizes_of_row)(
    const float *row, float *sizes, size_t n) {
    EACH(i, n) sizes[i] = kv_abs(row[i]);
}

/* Code 16 tokens of K, whose blocks are along tokens. Rows go on with zeros up to a multiple of 16
 * channels. */
TARGET static void NAME(nvfp4_keys_block)(
    head *h, const float *rows, float tensor, uint8_t *scales, uint8_t *codes) {
    size_t n = h->ask->width, wide = 16 * kv_ceil(n, 16), pitch = NAME(pitch_of)(n);
    float sizes[16 * (BLOCK + APART)], inverses[BLOCK], errors[BLOCK];
    uint8_t found[BLOCK];
    for (size_t r = 0; r < 16; r++) {
        NAME(sizes_of_row)(rows + r * pitch, sizes + r * pitch, wide);
    }
    NAME(nvfp4_choose)(sizes, tensor, found, inverses, errors, wide);
    memcpy(scales, found, n);
    for (size_t r = 0; r < 16; r++) {
        NAME(nvfp4_codes)(rows + r * pitch, inverses, codes + r * n, n);
    }
    h->error += NAME(sum_of)(errors, n);
}

/* Code up to 16 tokens of V, whose blocks are along channels: sixteen blocks of sixteen tokens are
 * turned, so that columns are tokens. */
TARGET static void NAME(nvfp4_values_block)(
    head *h, const float *rows, float tensor, uint8_t *scales, uint8_t *codes, size_t count) {
    size_t n = h->ask->width, blocks = kv_ceil(n, 16), pitch = NAME(pitch_of)(n);
    float sizes[16 * (BLOCK + APART)], inverses[BLOCK], errors[BLOCK], wide[BLOCK];
    uint8_t found[BLOCK];
    for (size_t b = 0; b < blocks; b++) {
        NAME(turn_rows)(rows + 16 * b, pitch, sizes + 16 * b, pitch);
    }
    for (size_t r = 0; r < 16; r++) {
        NAME(sizes_of_row)(sizes + r * pitch, sizes + r * pitch, 16 * blocks);
    }
    NAME(nvfp4_choose)(sizes, tensor, found, inverses, errors, 16 * blocks);
    h->error += NAME(sum_of)(errors, 16 * blocks);
    for (size_t t = 0; t < count; t++) {
        for (size_t b = 0; b < blocks; b++) {
            scales[t * blocks + b] = found[16 * b + t];
            EACH(i, 16) wide[16 * b + i] = inverses[16 * b + t];
        }
        NAME(nvfp4_codes)(rows + t * pitch, wide, codes + t * n, n);
    }
}

TARGET static void NAME(nvfp4_encode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens, is_keys = h->ask->kind == KV_KEYS;
    size_t row_scales = is_keys ? n : 16 * kv_ceil(n, 16);
    float means[BLOCK] = {0}, rows[16 * (BLOCK + APART)];
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
                float *row = rows + t * NAME(pitch_of)(n);
                NAME(read_centred)(h, first + at + t, means, row);
                memset(row + n, 0, (16 * kv_ceil(n, 16) - n) * sizeof *row);
            }
            if (is_keys) {
                NAME(nvfp4_keys_block)(h, rows, tensor, scales, codes + at * n);
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
    float tensor, means[BLOCK] = {0}, units[BLOCK + APART], found[BLOCK], row[BLOCK];
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
                for (size_t c = 0; c < n; c += 16) {
                    EACH(i, 16) units[c + i] = found[c / 16];
                }
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
