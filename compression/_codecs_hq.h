/* hq4 and hq3, a head at a time; see _codecs_heads.h.
 *
 * Sixteen tokens are transformed together, as columns: row c is channel c of all of them, so that
 * whole rows are added and nothing is shuffled. Loops over channels of one token need rows again.
 */

/* Code channels of sixteen tokens, of which each has its own factor: codes, and the centroids that they
 * stand for. Index and centroid are those of kv_hq4_index and kv_hq4_centroid, with the same comparisons. */
INLINE void NAME(hq4_codes)(const float *KV_RESTRICT columns, const float *KV_RESTRICT factors,
    uint32_t *KV_RESTRICT codes, float *KV_RESTRICT found, size_t channels) {
    EACH(c, channels) {
        EACH(i, GROUP) {
            float u = kv_mul(columns[GROUP * c + i], factors[i]);
            uint32_t index = kv_hq4_index(kv_abs(u)), is_negative = u < 0.0f;
            codes[GROUP * c + i] = index | is_negative << 3;
            found[GROUP * c + i] = kv_hq_signed(kv_hq4_centroid(index), is_negative);
        }
    }
}

INLINE void NAME(hq3_codes)(const float *KV_RESTRICT columns, const float *KV_RESTRICT factors,
    uint32_t *KV_RESTRICT codes, float *KV_RESTRICT found, size_t channels) {
    EACH(c, channels) {
        EACH(i, GROUP) {
            float u = kv_mul(columns[GROUP * c + i], factors[i]);
            uint32_t index = kv_hq3_index(kv_abs(u)), is_negative = u < 0.0f;
            codes[GROUP * c + i] = index | is_negative << 2;
            found[GROUP * c + i] = kv_hq_signed(kv_hq3_centroid(index), is_negative);
        }
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

/* What K is relative to, in V ones for deviations, and the energy of channels. */
typedef struct {
    float means[BLOCK], sigmas[BLOCK], inverses[BLOCK], energy[BLOCK];
} NAME(hq_state);

/* Sixteen tokens: as they are transformed, before and after, and the centroids of their codes. */
typedef struct {
    float rows[GROUP * (BLOCK + APART)], before[GROUP * BLOCK], after[GROUP * BLOCK];
    float found[GROUP * BLOCK], norms[GROUP], alphas[GROUP];
    uint32_t codes[GROUP * BLOCK];
} NAME(hq_tokens);

/* Read sixteen tokens from *first*, zeros beyond *end*, as they are transformed. */
TARGET static void NAME(hq_read)(
    head *h, NAME(hq_state) *state, size_t first, size_t end, float *rows) {
    size_t n = h->ask->width, pitch = NAME(pitch_of)(n);
    for (size_t t = 0; t < GROUP; t++) {
        float *row = rows + t * pitch;
        if (first + t < h->ask->sinks || first + t >= end) {
            memset(row, 0, 16 * kv_ceil(n, 16) * sizeof *row);
            continue;
        }
        NAME(load_row)(h->ask->source, values_at(h, first + t), row, n);
        memset(row + n, 0, (16 * kv_ceil(n, 16) - n) * sizeof *row);
        NAME(add_squares)(row, state->energy, n);
        if (h->ask->kind == KV_KEYS) {
            NAME(subtract_row)(row, state->means, n);
            NAME(scale_row)(row, state->inverses, n);
        }
        NAME(flip_signs)(row, h->flips, n);
    }
}

/* Code tokens that are transformed. */
TARGET static void NAME(hq_code)(const head *h, NAME(hq_tokens) *g) {
    size_t n = h->ask->width;
    float factors[GROUP];
    for (size_t first = 0, block; first < n; first += block) {
        block = power_of_two_below(n - first);
        float spread = kv_sqrt(kv_div((float)n, (float)block));
        EACH(i, GROUP) {
            float norm = g->norms[i] < KV_HQ_LEAST_NORM ? 1.0f : g->norms[i];
            factors[i] = kv_mul(kv_div(1.0f, norm), spread);
        }
        size_t at = GROUP * first;
        if (h->ask->codec == KV_HQ4) {
            NAME(hq4_codes)(g->after + at, factors, g->codes + at, g->found + at, block);
        } else {
            NAME(hq3_codes)(g->after + at, factors, g->codes + at, g->found + at, block);
        }
    }
}

/* The factors of tokens whose centroids have the norms *found*: as they are stored, and in g->alphas. */
TARGET static void NAME(hq_factors)(
    head *h, NAME(hq_tokens) *g, const float *found, any16 *stored, size_t count) {
    for (size_t t = 0; t < GROUP; t++) {
        uint16_t alpha = 0;
        if (t < count && !(g->norms[t] < KV_HQ_LEAST_NORM)) {
            alpha = kv_half_of_float(kv_div(g->norms[t], found[t]));
            h->is_broken |= kv_half_is_broken(alpha);
        }
        if (t < count) {
            stored[t] = alpha;
        }
        g->alphas[t] = kv_float_of_half(alpha);
    }
}

/* Squares of what the codes of *channels* lose: *found*, of each token in its own scale, less *exact* in
 * one for all, and weighed. They take the place of *found*. */
INLINE void NAME(hq_squares)(float *KV_RESTRICT found, const float *KV_RESTRICT scale,
    const float *KV_RESTRICT exact, float whole, const float *KV_RESTRICT weights, size_t channels) {
    EACH(c, channels) {
        float weight = weights[c];
        EACH(i, GROUP) {
            float value = kv_mul(found[GROUP * c + i], scale[i]);
            float missed = kv_mul(kv_sub(value, kv_mul(exact[GROUP * c + i], whole)), weight);
            found[GROUP * c + i] = kv_mul(missed, missed);
        }
    }
}

/* Add what the codes lose. A transform keeps distances but for its factor, so that of V is seen without
 * going back; channels of K do not weigh the same. */
TARGET static void NAME(hq_lost)(head *h, const float *weights, NAME(hq_tokens) *g) {
    size_t n = h->ask->width;
    float scale[GROUP];
    if (h->ask->kind == KV_KEYS) {
        NAME(transform)(g->found, n);
    }
    for (size_t first = 0, block; first < n; first += block) {
        block = power_of_two_below(n - first);
        float shrunk = kv_div(1.0f, kv_sqrt((float)block)), *found = g->found + GROUP * first;
        if (h->ask->kind == KV_KEYS) {
            EACH(i, GROUP) scale[i] = kv_mul(g->alphas[i], shrunk);
            NAME(hq_squares)(
                found, scale, g->before + GROUP * first, 1.0f, weights + first, block);
        } else {
            NAME(hq_squares)(
                found, g->alphas, g->after + GROUP * first, shrunk, weights + first, block);
        }
    }
    h->error += NAME(sum_of)(g->found, GROUP * n);
}

/* Turn codes to rows of bytes; those of tokens that are as good as zero are zero. */
TARGET static void NAME(hq_write)(
    const head *h, NAME(hq_tokens) *g, uint8_t *KV_RESTRICT codes, size_t count) {
    size_t n = h->ask->width, pitch = NAME(pitch_of)(n);
    float columns[GROUP * GROUP];
    for (size_t c = 0; c < n; c += GROUP) {
        memcpy(columns, g->codes + GROUP * c, sizeof columns);
        NAME(turn_rows)(columns, GROUP, g->rows + c, pitch);
    }
    for (size_t t = 0; t < count; t++, codes += n) {
        const any32 *KV_RESTRICT row = (const any32 *)(void *)(g->rows + t * pitch);
        uint8_t mask = g->norms[t] < KV_HQ_LEAST_NORM ? 0 : 0xff;
        EACH(i, n) codes[i] = (uint8_t)row[i] & mask;
    }
}

/* Code tokens [first, end), at most sixteen, and store their factors. */
TARGET static void NAME(hq_group)(
    head *h, NAME(hq_state) *state, size_t first, size_t end, uint8_t *codes) {
    size_t n = h->ask->width, count = end - first;
    float found[GROUP];
    NAME(hq_tokens) g;
    NAME(hq_read)(h, state, first, end, g.rows);
    NAME(to_columns)(g.rows, g.before, n);
    NAME(hq_norms)(g.before, g.norms, n);
    memcpy(g.after, g.before, GROUP * n * sizeof *g.after);
    NAME(transform)(g.after, n);
    NAME(hq_code)(h, &g);
    NAME(hq_norms)(g.found, found, n);
    NAME(hq_factors)(h, &g, found, part16(h, 2) + first, count);
    NAME(hq_lost)(h, state->sigmas, &g);
    NAME(hq_write)(h, &g, codes, count);
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
    if (h->ask->kind == KV_KEYS) {
        NAME(take_means)(h, part16(h, 3), state.means);
        NAME(take_deviations)(h, state.means, part16(h, 4), state.sigmas);
        EACH(i, n) state.inverses[i] = kv_inverse(state.sigmas[i]);
    } else {
        EACH(i, n) state.sigmas[i] = 1.0f;
    }
    for (size_t first = 0; first < tokens; first += KV_TILE) {
        size_t count = lesser(KV_TILE, tokens - first);
        memset(codes + count * n, 0, 8 * n);
        memset(state.energy, 0, n * sizeof *state.energy);
        for (size_t t = 0; t < count; t += GROUP) {
            size_t end = first + lesser(t + GROUP, count);
            NAME(hq_group)(h, &state, first + t, end, codes + t * n);
        }
        NAME(hq_pack)(h, codes, first, count);
        h->energy += NAME(sum_of)(state.energy, n);
    }
}

/* --- decoding -------------------------------------------------------------------------------------- */

/* What a transformed row of centroids stands for, before K's deviations and means. */
TARGET static void NAME(hq_expand)(const head *h, float *row, float alpha) {
    size_t n = h->ask->width;
    for (size_t first = 0, block; first < n; first += block) {
        block = power_of_two_below(n - first);
        NAME(scale_by)(row + first, kv_mul(alpha, kv_div(1.0f, kv_sqrt((float)block))), block);
    }
    NAME(flip_signs)(row, h->flips, n);
}

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
