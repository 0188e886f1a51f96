/* Ranges of channels and of tokens: the first look at a head; see _codecs_heads.h.
 *
 * Sixteen bits are compared as they are, many at a time: sign aside, the bits of a float of any type
 * grow with it, and infinities and NaN are the largest of all.
 */

static int NAME(has_16_bits)(const request *ask) {
    return ask->source == SOURCE_BF16 || ask->source == SOURCE_FP16;
}

INLINE float NAME(float_of_16_bits)(const request *ask, uint16_t bits) {
    return ask->source == SOURCE_BF16 ? kv_float_of_bf16(bits) : kv_float_of_half(bits);
}

/* kv_order_key of sixteen bits, and back: its own inverse. */
INLINE int16_t NAME(order_of)(uint16_t bits) {
    int16_t same = (int16_t)bits;
    return (int16_t)(same ^ ((same >> 15) & 0x7fff));
}

/* --- sizes ------------------------------------------------------------------------------------------- */

TARGET static void NAME(widen_sizes)(
    const float *KV_RESTRICT row, int32_t *KV_RESTRICT sizes, size_t n) {
    EACH(i, n) {
        int32_t size = kv_size_bits(row[i]);
        sizes[i] = sizes[i] > size ? sizes[i] : size;
    }
}

TARGET static void NAME(widen_sizes_of_16)(
    const any16 *KV_RESTRICT row, uint16_t *KV_RESTRICT sizes, size_t n) {
    EACH(i, n) {
        uint16_t size = row[i] & 0x7fffu;
        sizes[i] = sizes[i] > size ? sizes[i] : size;
    }
}

/* The size of the largest value of each channel in tokens [first, end). */
TARGET static void NAME(size_channels)(const head *h, size_t first, size_t end, int32_t *sizes) {
    size_t n = h->ask->width;
    float row[BLOCK];
    uint16_t narrow[BLOCK];
    memset(sizes, 0, n * sizeof *sizes);
    memset(narrow, 0, n * sizeof *narrow);
    for (size_t t = first > h->ask->sinks ? first : h->ask->sinks; t < end; t++) {
        if (NAME(has_16_bits)(h->ask)) {
            NAME(widen_sizes_of_16)((const any16 *)(void *)values_at(h, t), narrow, n);
        } else {
            NAME(read_row)(h, t, row);
            NAME(widen_sizes)(row, sizes, n);
        }
    }
    if (NAME(has_16_bits)(h->ask)) {
        EACH(i, n) sizes[i] = kv_size_bits(NAME(float_of_16_bits)(h->ask, narrow[i]));
    }
}

TARGET static uint16_t NAME(size_of_16)(const any16 *row, size_t n) {
    uint16_t largest = 0;
    EACH(i, n) {
        uint16_t size = row[i] & 0x7fffu;
        largest = largest > size ? largest : size;
    }
    return largest;
}

TARGET static int32_t NAME(size_of_row)(const float *row, size_t n) {
    int32_t largest = 0;
    EACH(i, n) {
        int32_t size = kv_size_bits(row[i]);
        largest = largest > size ? largest : size;
    }
    return largest;
}

/* The size of the largest value of *token*. */
TARGET static int32_t NAME(size_of_token)(const head *h, size_t token) {
    size_t n = h->ask->width;
    float row[BLOCK];
    if (token >= h->ask->sinks && NAME(has_16_bits)(h->ask)) {
        uint16_t bits = NAME(size_of_16)((const any16 *)(void *)values_at(h, token), n);
        return kv_size_bits(NAME(float_of_16_bits)(h->ask, bits));
    }
    NAME(read_row)(h, token, row);
    return NAME(size_of_row)(row, n);
}

/* --- order keys -------------------------------------------------------------------------------------- */

TARGET static void NAME(widen_keys)(
    const float *KV_RESTRICT row, int32_t *KV_RESTRICT least, int32_t *KV_RESTRICT most, size_t n) {
    EACH(i, n) {
        int32_t key = kv_order_key(row[i]);
        least[i] = least[i] < key ? least[i] : key;
        most[i] = most[i] > key ? most[i] : key;
    }
}

TARGET static void NAME(widen_keys_of_16)(
    const any16 *KV_RESTRICT row, int16_t *KV_RESTRICT least, int16_t *KV_RESTRICT most, size_t n) {
    EACH(i, n) {
        int16_t key = NAME(order_of)(row[i]);
        least[i] = least[i] < key ? least[i] : key;
        most[i] = most[i] > key ? most[i] : key;
    }
}

INLINE int32_t NAME(key_of_order)(const request *ask, int16_t order) {
    return kv_order_key(NAME(float_of_16_bits)(ask, (uint16_t)NAME(order_of)((uint16_t)order)));
}

/* The order keys of the least and the greatest value of each channel in tokens [first, end); the least
 * is above the greatest where all of them are sinks. */
TARGET static void NAME(range_channels)(
    const head *h, size_t first, size_t end, int32_t *least, int32_t *most) {
    size_t n = h->ask->width, start = first > h->ask->sinks ? first : h->ask->sinks;
    float row[BLOCK];
    int16_t low[BLOCK], high[BLOCK];
    EACH(i, n) low[i] = INT16_MAX;
    EACH(i, n) high[i] = INT16_MIN;
    EACH(i, n) least[i] = INT32_MAX;
    EACH(i, n) most[i] = INT32_MIN;
    for (size_t t = start; t < end; t++) {
        if (NAME(has_16_bits)(h->ask)) {
            NAME(widen_keys_of_16)((const any16 *)(void *)values_at(h, t), low, high, n);
        } else {
            NAME(read_row)(h, t, row);
            NAME(widen_keys)(row, least, most, n);
        }
    }
    if (start < end && NAME(has_16_bits)(h->ask)) {
        EACH(i, n) least[i] = NAME(key_of_order)(h->ask, low[i]);
        EACH(i, n) most[i] = NAME(key_of_order)(h->ask, high[i]);
    }
}

INLINE void NAME(keys_of_row)(const float *row, int32_t *least, int32_t *most, size_t n) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    EACH(i, n) {
        int32_t key = kv_order_key(row[i]);
        low = low < key ? low : key;
        high = high > key ? high : key;
    }
    *least = low;
    *most = high;
}

INLINE void NAME(keys_of_16)(
    const request *ask, const any16 *row, int32_t *least, int32_t *most, size_t n) {
    int16_t low = INT16_MAX, high = INT16_MIN;
    EACH(i, n) {
        int16_t key = NAME(order_of)(row[i]);
        low = low < key ? low : key;
        high = high > key ? high : key;
    }
    *least = NAME(key_of_order)(ask, low);
    *most = NAME(key_of_order)(ask, high);
}

/* The order keys of the least and the greatest value of each group of channels of a token. */
TARGET static void NAME(range_groups)(
    const head *h, size_t token, int32_t *least, int32_t *most) {
    size_t n = h->ask->width, whole = n / KV_INT4_CHANNELS, at = whole * KV_INT4_CHANNELS;
    float row[BLOCK];
    if (NAME(has_16_bits)(h->ask)) {
        const any16 *values = (const any16 *)(void *)values_at(h, token);
        for (size_t g = 0; g < whole; g++) { /* of a number of channels that the compiler knows */
            const any16 *group = values + g * KV_INT4_CHANNELS;
            NAME(keys_of_16)(h->ask, group, least + g, most + g, KV_INT4_CHANNELS);
        }
        if (at < n) {
            NAME(keys_of_16)(h->ask, values + at, least + whole, most + whole, n - at);
        }
        return;
    }
    NAME(read_row)(h, token, row);
    for (size_t c = 0; c < n; c += KV_INT4_CHANNELS, least++, most++) {
        NAME(keys_of_row)(row + c, least, most, lesser(KV_INT4_CHANNELS, n - c));
    }
}
