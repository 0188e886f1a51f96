/* What fixed-rate codecs have in common, a head at a time; _codecs.c includes this after
 * _codecs_kernel.h, once for each width of vectors. The order of operations is that of
 * docs/codec-format.md.
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

/* Whether the values of *token* are bfloat16, which most loops take as they are. */
static int NAME(is_narrow)(const head *h, size_t token) {
    return h->ask->source == SOURCE_BF16 && token >= h->ask->sinks;
}

/* In eight sums, which do not wait for each other. */
TARGET static double NAME(sum_of)(const float *values, size_t n) {
    double some[8] = {0.0};
    size_t i = 0;
    for (; i + 8 <= n; i += 8) {
        EACH(k, 8) some[k] += values[i + k];
    }
    for (; i < n; i++) {
        some[0] += values[i];
    }
    return ((some[0] + some[4]) + (some[1] + some[5])) + ((some[2] + some[6]) + (some[3] + some[7]));
}

/* Add the sums of some rows to the head's, in double precision. */
TARGET static void NAME(add_up)(head *h, float *error, float *energy) {
    size_t n = h->ask->width;
    h->error += NAME(sum_of)(error, n);
    h->energy += NAME(sum_of)(energy, n);
    memset(error, 0, n * sizeof *error);
    memset(energy, 0, n * sizeof *energy);
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
