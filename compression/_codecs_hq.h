/* hq4 and hq3, a head at a time; see _codecs_heads.h.
 *
 * Sixteen tokens are transformed together, as columns: row c is channel c of all of them, so that
 * whole rows are added and nothing is shuffled. Loops over channels of one token need rows again.
 */

/* Code a run of channels; the values become the centroids that the codes stand for. */
TARGET static void NAME(hq4_codes)(
    float *KV_RESTRICT row, float factor, uint8_t *KV_RESTRICT codes, size_t n) {
    EACH(i, n) {
        float u = kv_mul(row[i], factor);
        uint32_t index = kv_hq4_index(kv_abs(u)), is_negative = u < 0.0f;
        codes[i] = (uint8_t)(index | is_negative << 3);
        row[i] = kv_hq_signed(kv_hq4_centroid(index), is_negative);
    }
}

TARGET static void NAME(hq3_codes)(
    float *KV_RESTRICT row, float factor, uint8_t *KV_RESTRICT codes, size_t n) {
    EACH(i, n) {
        float u = kv_mul(row[i], factor);
        uint32_t index = kv_hq3_index(kv_abs(u)), is_negative = u < 0.0f;
        codes[i] = (uint8_t)(index | is_negative << 2);
        row[i] = kv_hq_signed(kv_hq3_centroid(index), is_negative);
    }
}

TARGET static void NAME(hq4_centroids)(
    const uint8_t *KV_RESTRICT codes, float *KV_RESTRICT row, size_t n) {
    EACH(i, n) row[i] = kv_hq_signed(kv_hq4_centroid(codes[i] & 7u), codes[i] >> 3);
}

TARGET static void NAME(hq3_centroids)(
    const uint8_t *KV_RESTRICT codes, float *KV_RESTRICT row, size_t n) {
    EACH(i, n) row[i] = kv_hq_signed(kv_hq3_centroid(codes[i] & 3u), codes[i] >> 2);
}

TARGET static void NAME(flip_signs)(
    float *KV_RESTRICT row, const uint32_t *KV_RESTRICT flips, size_t n) {
    EACH(i, n) row[i] = kv_float_of_bits(kv_bits_of_float(row[i]) ^ flips[i]);
}

TARGET static void NAME(scale_by)(float *KV_RESTRICT row, float by, size_t n) {
    EACH(i, n) row[i] = kv_mul(row[i], by);
}

/* --- sixteen tokens -------------------------------------------------------------------------------- */

TARGET static void NAME(to_columns)(const float *rows, float *columns, size_t n) {
    for (size_t c = 0; c < n; c += GROUP) {
        NAME(turn_rows)(rows + c, NAME(pitch_of)(n), columns + GROUP * c, GROUP);
    }
}

TARGET static void NAME(to_rows)(const float *columns, float *rows, size_t n) {
    for (size_t c = 0; c < n; c += GROUP) {
        NAME(turn_rows)(columns + GROUP * c, GROUP, rows + c, NAME(pitch_of)(n));
    }
}

/* The norms of sixteen tokens, squares summed as a tree over channels. */
TARGET static void NAME(hq_norms)(const float *columns, float *norms, size_t n) {
    float squares[GROUP * BLOCK];
    size_t power = power_of_two_from(n);
    NAME(square_row)(columns, squares, GROUP * n);
    memset(squares + GROUP * n, 0, GROUP * (power - n) * sizeof *squares);
    for (size_t half = power / 2; half > 0; half /= 2) {
        NAME(fold)(squares, GROUP * half);
    }
    EACH(i, GROUP) norms[i] = kv_sqrt(squares[i]);
}

/* (a, b, c, d) = (a + b, a - b, c + d, c - d), then the same with (a, c) and (b, d). */
INLINE void NAME(two_butterflies)(
    float *KV_RESTRICT a, float *KV_RESTRICT b, float *KV_RESTRICT c, float *KV_RESTRICT d,
    size_t n) {
    EACH(i, n) {
        float ab = kv_add(a[i], b[i]), less_b = kv_sub(a[i], b[i]);
        float cd = kv_add(c[i], d[i]), less_d = kv_sub(c[i], d[i]);
        a[i] = kv_add(ab, cd);
        b[i] = kv_add(less_b, less_d);
        c[i] = kv_sub(ab, cd);
        d[i] = kv_sub(less_b, less_d);
    }
}

/* Butterflies over a block of channels, two steps at a time. */
TARGET static void NAME(transform_block)(float *columns, size_t block) {
    size_t step = 1;
    for (; 4 * step <= block; step *= 4) {
        size_t run = GROUP * step;
        for (size_t i = 0; i < block; i += 4 * step) {
            float *at = columns + GROUP * i;
            NAME(two_butterflies)(at, at + run, at + 2 * run, at + 3 * run, run);
        }
    }
    if (2 * step <= block) {
        NAME(butterfly)(columns, columns + GROUP * step, GROUP * step);
    }
}

/* Over each block of channels; blocks are the binary digits of n, largest first. */
TARGET static void NAME(transform)(float *columns, size_t n) {
    for (size_t first = 0, block; first < n; first += block) {
        block = power_of_two_below(n - first);
        NAME(transform_block)(columns + GROUP * first, block);
    }
}

/* --- encoding -------------------------------------------------------------------------------------- */

/* What K is relative to, and sums over tokens. */
typedef struct {
    float means[BLOCK], sigmas[BLOCK], inverses[BLOCK], error[BLOCK], energy[BLOCK];
} NAME(hq_state);

/* Read sixteen tokens from *first*, zeros beyond *end*: as they are, and as they are transformed. */
TARGET static void NAME(hq_read)(
    head *h, NAME(hq_state) *state, size_t first, size_t end, float *originals, float *rows) {
    size_t n = h->ask->width, pitch = NAME(pitch_of)(n);
    memset(rows, 0, GROUP * pitch * sizeof *rows);
    for (size_t t = 0; t < GROUP && first + t < end; t++) {
        float *original = originals + t * pitch, *row = rows + t * pitch;
        NAME(read_row)(h, first + t, original);
        NAME(add_squares)(original, state->energy, n);
        if (first + t < h->ask->sinks) {
            continue;
        }
        memcpy(row, original, n * sizeof *row);
        if (h->ask->kind == KV_KEYS) {
            NAME(subtract_row)(row, state->means, n);
            NAME(scale_row)(row, state->inverses, n);
        }
        NAME(flip_signs)(row, h->flips, n);
    }
}

/* Code a transformed token of *norm*; its row becomes the centroids. */
TARGET static void NAME(hq_token)(const head *h, float *row, float norm, uint8_t *codes) {
    size_t n = h->ask->width;
    float gain = kv_div(1.0f, norm < KV_HQ_LEAST_NORM ? 1.0f : norm);
    for (size_t first = 0, block; first < n; first += block) {
        block = power_of_two_below(n - first);
        float factor = kv_mul(gain, kv_sqrt(kv_div((float)n, (float)block)));
        if (h->ask->codec == KV_HQ4) {
            NAME(hq4_codes)(row + first, factor, codes + first, block);
        } else {
            NAME(hq3_codes)(row + first, factor, codes + first, block);
        }
    }
    if (norm < KV_HQ_LEAST_NORM) {
        memset(codes, 0, n);
    }
}

/* What a transformed row of centroids stands for, before K's deviations and means. */
TARGET static void NAME(hq_expand)(const head *h, float *row, float alpha) {
    size_t n = h->ask->width;
    for (size_t first = 0, block; first < n; first += block) {
        block = power_of_two_below(n - first);
        NAME(scale_by)(row + first, kv_mul(alpha, kv_div(1.0f, kv_sqrt((float)block))), block);
    }
    NAME(flip_signs)(row, h->flips, n);
}

/* Code tokens [first, end), at most sixteen, and store their factors. */
TARGET static void NAME(hq_group)(
    head *h, NAME(hq_state) *state, size_t first, size_t end, uint8_t *codes) {
    size_t n = h->ask->width, pitch = NAME(pitch_of)(n);
    float originals[GROUP * (BLOCK + APART)], rows[GROUP * (BLOCK + APART)];
    float columns[GROUP * BLOCK], norms[GROUP], found[GROUP];
    NAME(hq_read)(h, state, first, end, originals, rows);
    NAME(to_columns)(rows, columns, n);
    NAME(hq_norms)(columns, norms, n);
    NAME(transform)(columns, n);
    NAME(to_rows)(columns, rows, n);
    for (size_t t = 0; t < end - first; t++) {
        NAME(hq_token)(h, rows + t * pitch, norms[t], codes + t * n);
    }
    NAME(to_columns)(rows, columns, n);
    NAME(hq_norms)(columns, found, n);
    NAME(transform)(columns, n);
    NAME(to_rows)(columns, rows, n);
    for (size_t t = 0; t < end - first; t++) {
        float *row = rows + t * pitch;
        uint16_t alpha = 0;
        if (!(norms[t] < KV_HQ_LEAST_NORM)) {
            alpha = kv_half_of_float(kv_div(norms[t], found[t]));
            h->is_broken |= kv_half_is_broken(alpha);
        }
        part16(h, 2)[first + t] = alpha;
        if (first + t < h->ask->sinks) {
            continue;
        }
        NAME(hq_expand)(h, row, kv_float_of_half(alpha));
        if (h->ask->kind == KV_KEYS) {
            NAME(scale_row)(row, state->sigmas, n);
            NAME(add_rows)(row, state->means, n);
        }
        NAME(subtract_row)(row, originals + t * pitch, n);
        NAME(add_squares)(row, state->error, n);
    }
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
    size_t n = h->ask->width, tokens = h->ask->tokens;
    NAME(hq_state) state;
    uint8_t codes[(KV_TILE + 8) * BLOCK];
    memset(state.error, 0, n * sizeof *state.error);
    memset(state.energy, 0, n * sizeof *state.energy);
    if (h->ask->kind == KV_KEYS) {
        NAME(take_means)(h, part16(h, 3), state.means);
        NAME(take_deviations)(h, state.means, part16(h, 4), state.sigmas);
        EACH(i, n) state.inverses[i] = kv_inverse(state.sigmas[i]);
    }
    for (size_t first = 0; first < tokens; first += KV_TILE) {
        size_t count = lesser(KV_TILE, tokens - first);
        memset(codes + count * n, 0, 8 * n);
        for (size_t t = 0; t < count; t += GROUP) {
            size_t end = first + lesser(t + GROUP, count);
            NAME(hq_group)(h, &state, first + t, end, codes + t * n);
        }
        NAME(hq_pack)(h, codes, first, count);
        NAME(add_up)(h, state.error, state.energy);
    }
}

/* --- decoding -------------------------------------------------------------------------------------- */

TARGET static void NAME(hq_unpack)(const head *h, uint8_t *codes, size_t first, size_t count) {
    size_t n = h->ask->width;
    memset(codes, 0, (KV_TILE + 8) * n);
    if (h->ask->codec == KV_HQ4) {
        NAME(unpack_plane)(part(h, 0) + kv_planes(first, 2) * n, kv_ceil(count, 2), 4, 0, codes, n);
    } else {
        NAME(unpack_plane)(part(h, 0) + kv_planes(first, 4) * n, kv_ceil(count, 4), 2, 0, codes, n);
        NAME(unpack_plane)(part(h, 1) + kv_planes(first, 8) * n, kv_ceil(count, 8), 1, 2, codes, n);
    }
}

/* The rows of *count* tokens, at most sixteen, before their factors. */
TARGET static void NAME(hq_centroids)(
    const head *h, const uint8_t *codes, size_t count, float *rows) {
    size_t n = h->ask->width, pitch = NAME(pitch_of)(n);
    float columns[GROUP * BLOCK];
    memset(rows, 0, GROUP * pitch * sizeof *rows);
    for (size_t t = 0; t < count; t++) {
        if (h->ask->codec == KV_HQ4) {
            NAME(hq4_centroids)(codes + t * n, rows + t * pitch, n);
        } else {
            NAME(hq3_centroids)(codes + t * n, rows + t * pitch, n);
        }
    }
    NAME(to_columns)(rows, columns, n);
    NAME(transform)(columns, n);
    NAME(to_rows)(columns, rows, n);
}

TARGET static void NAME(hq_decode)(head *h) {
    size_t n = h->ask->width, tokens = h->ask->tokens;
    float means[BLOCK], sigmas[BLOCK], rows[GROUP * (BLOCK + APART)];
    uint8_t codes[(KV_TILE + 8) * BLOCK];
    if (h->ask->kind == KV_KEYS) {
        NAME(load_halves)(part16(h, 3), means, n);
        NAME(load_bf16)(part16(h, 4), sigmas, n);
    }
    for (size_t token = 0; token < tokens; token++) {
        if (token % KV_TILE == 0) {
            NAME(hq_unpack)(h, codes, token, lesser(KV_TILE, tokens - token));
        }
        if (token % GROUP == 0) {
            size_t count = lesser(GROUP, tokens - token);
            NAME(hq_centroids)(h, codes + token % KV_TILE * n, count, rows);
        }
        float *row = rows + token % GROUP * NAME(pitch_of)(n);
        NAME(hq_expand)(h, row, kv_float_of_half(part16(h, 2)[token]));
        if (h->ask->kind == KV_KEYS) {
            NAME(scale_row)(row, sigmas, n);
            NAME(add_rows)(row, means, n);
        }
        NAME(write_row)(h, token, row);
    }
}
