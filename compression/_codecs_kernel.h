/* The loops of all codecs for one width of vectors; _codecs.c includes this once for each.
 *
 * TARGET and NAME come from there. Rows are runs of channels of one token, at most BLOCK long.
 * The loops are written so that compilers turn each into vector code: no branches, one type of
 * index, pointers that do not overlap.
 */

#undef EACH
#undef INLINE
#define INLINE TARGET static inline __attribute__((always_inline))
#define EACH(i, n) for (size_t i = 0; i < (n); i++)

/* --- rows: from and to the engine's type ------------------------------------------------------- */

TARGET static void NAME(load_row)(
    uint32_t source, const uint8_t *KV_RESTRICT from, float *KV_RESTRICT row, size_t n) {
    const any16 *KV_RESTRICT narrow = (const any16 *)(const void *)from;
    const any32 *KV_RESTRICT wide = (const any32 *)(const void *)from;
    switch (source) {
    case SOURCE_BF16: EACH(i, n) row[i] = kv_float_of_bf16(narrow[i]); break;
    case SOURCE_FP16: EACH(i, n) row[i] = kv_float_of_half(narrow[i]); break;
    case SOURCE_E4M3: EACH(i, n) row[i] = kv_float_of_e4m3(from[i]); break;
    case SOURCE_E5M2: EACH(i, n) row[i] = kv_float_of_e5m2(from[i]); break;
    default: EACH(i, n) row[i] = kv_float_of_bits(wide[i]);
    }
}

TARGET static void NAME(store_row)(
    uint32_t source, const float *KV_RESTRICT row, uint8_t *KV_RESTRICT to, size_t n) {
    any16 *KV_RESTRICT narrow = (any16 *)(void *)to;
    any32 *KV_RESTRICT wide = (any32 *)(void *)to;
    switch (source) {
    case SOURCE_BF16: EACH(i, n) narrow[i] = kv_bf16_of_float(row[i]); break;
    case SOURCE_FP16: EACH(i, n) narrow[i] = kv_half_value_of_float(row[i]); break;
    case SOURCE_E4M3: EACH(i, n) to[i] = kv_e4m3_of_float(row[i]); break;
    case SOURCE_E5M2: EACH(i, n) to[i] = kv_e5m2_of_float(row[i]); break;
    default: EACH(i, n) wide[i] = kv_bits_of_float(kv_finite(row[i]));
    }
}

TARGET static void NAME(load_halves)(const any16 *KV_RESTRICT from, float *KV_RESTRICT row, size_t n) {
    EACH(i, n) row[i] = kv_float_of_half(from[i]);
}

TARGET static void NAME(load_bf16)(const any16 *KV_RESTRICT from, float *KV_RESTRICT row, size_t n) {
    EACH(i, n) row[i] = kv_float_of_bf16(from[i]);
}

/* --- ranges -------------------------------------------------------------------------------------- */

/* Widen the sizes of channels by a row, and add its squares to their energy. */
TARGET static void NAME(widen_sizes)(
    const float *KV_RESTRICT row, int32_t *KV_RESTRICT sizes, float *KV_RESTRICT energy, size_t n) {
    EACH(i, n) {
        int32_t size = kv_size_bits(row[i]);
        sizes[i] = sizes[i] > size ? sizes[i] : size;
        energy[i] = kv_add(energy[i], kv_mul(row[i], row[i]));
    }
}

/* Widen the order keys of channels by a row, likewise. */
TARGET static void NAME(widen_keys)(
    const float *KV_RESTRICT row, int32_t *KV_RESTRICT least, int32_t *KV_RESTRICT most,
    float *KV_RESTRICT energy, size_t n) {
    EACH(i, n) {
        int32_t key = kv_order_key(row[i]);
        least[i] = least[i] < key ? least[i] : key;
        most[i] = most[i] > key ? most[i] : key;
        energy[i] = kv_add(energy[i], kv_mul(row[i], row[i]));
    }
}

TARGET static int32_t NAME(size_of_row)(
    const float *KV_RESTRICT row, float *KV_RESTRICT energy, size_t n) {
    int32_t largest = 0;
    EACH(i, n) {
        int32_t size = kv_size_bits(row[i]);
        largest = largest > size ? largest : size;
        energy[i] = kv_add(energy[i], kv_mul(row[i], row[i]));
    }
    return largest;
}

TARGET static void NAME(keys_of_row)(
    const float *KV_RESTRICT row, int32_t *least, int32_t *most, float *KV_RESTRICT energy, size_t n) {
    int32_t low = INT32_MAX, high = INT32_MIN;
    EACH(i, n) {
        int32_t key = kv_order_key(row[i]);
        low = low < key ? low : key;
        high = high > key ? high : key;
        energy[i] = kv_add(energy[i], kv_mul(row[i], row[i]));
    }
    *least = low;
    *most = high;
}

/* --- int8kv ---------------------------------------------------------------------------------------- */

TARGET static void NAME(int8_codes)(
    const float *KV_RESTRICT row, const float *KV_RESTRICT inverse, const float *KV_RESTRICT scale,
    uint8_t *KV_RESTRICT codes, float *KV_RESTRICT error, size_t n) {
    EACH(i, n) {
        uint32_t code = kv_int8_code(row[i], inverse[i]);
        codes[i] = (uint8_t)code;
        float missed = kv_sub(row[i], kv_int8_value_of_bits(code, scale[i]));
        error[i] = kv_add(error[i], kv_mul(missed, missed));
    }
}

/* The same with one scale for the whole row. */
TARGET static void NAME(int8_codes_of_token)(
    const float *KV_RESTRICT row, float inverse, float scale, uint8_t *KV_RESTRICT codes,
    float *KV_RESTRICT error, size_t n) {
    EACH(i, n) {
        uint32_t code = kv_int8_code(row[i], inverse);
        codes[i] = (uint8_t)code;
        float missed = kv_sub(row[i], kv_int8_value_of_bits(code, scale));
        error[i] = kv_add(error[i], kv_mul(missed, missed));
    }
}

TARGET static void NAME(int8_values)(
    const uint8_t *KV_RESTRICT codes, const float *KV_RESTRICT scale, float *KV_RESTRICT row, size_t n) {
    EACH(i, n) row[i] = kv_int8_value((int8_t)codes[i], scale[i]);
}

TARGET static void NAME(int8_values_of_token)(
    const uint8_t *KV_RESTRICT codes, float scale, float *KV_RESTRICT row, size_t n) {
    EACH(i, n) row[i] = kv_int8_value((int8_t)codes[i], scale);
}

/* --- int4kv ---------------------------------------------------------------------------------------- */

TARGET static void NAME(int4_codes)(
    const float *KV_RESTRICT low, const float *KV_RESTRICT high, const float *KV_RESTRICT zero,
    const float *KV_RESTRICT inverse, const float *KV_RESTRICT scale, uint8_t *KV_RESTRICT codes,
    float *KV_RESTRICT error, size_t n) {
    EACH(i, n) {
        uint32_t a = kv_int4_code(low[i], zero[i], inverse[i]);
        uint32_t b = kv_int4_code(high[i], zero[i], inverse[i]);
        codes[i] = (uint8_t)((a & 15u) | (b << 4));
        float missed = kv_sub(low[i], kv_int4_value_of_bits(a, zero[i], scale[i]));
        float other = kv_sub(high[i], kv_int4_value_of_bits(b, zero[i], scale[i]));
        error[i] = kv_add(error[i], kv_add(kv_mul(missed, missed), kv_mul(other, other)));
    }
}

TARGET static void NAME(int4_codes_of_token)(
    const float *KV_RESTRICT low, const float *KV_RESTRICT high, float zero, float inverse,
    float scale, uint8_t *KV_RESTRICT codes, float *KV_RESTRICT error, size_t n) {
    EACH(i, n) {
        uint32_t a = kv_int4_code(low[i], zero, inverse);
        uint32_t b = kv_int4_code(high[i], zero, inverse);
        codes[i] = (uint8_t)((a & 15u) | (b << 4));
        float missed = kv_sub(low[i], kv_int4_value_of_bits(a, zero, scale));
        float other = kv_sub(high[i], kv_int4_value_of_bits(b, zero, scale));
        error[i] = kv_add(error[i], kv_add(kv_mul(missed, missed), kv_mul(other, other)));
    }
}

TARGET static void NAME(int4_values)(
    const uint8_t *KV_RESTRICT codes, const float *KV_RESTRICT zero, const float *KV_RESTRICT scale,
    float *KV_RESTRICT low, float *KV_RESTRICT high, size_t n) {
    EACH(i, n) {
        low[i] = kv_int4_value(codes[i] & 15u, zero[i], scale[i]);
        high[i] = kv_int4_value(codes[i] >> 4, zero[i], scale[i]);
    }
}

TARGET static void NAME(int4_values_of_token)(
    const uint8_t *KV_RESTRICT codes, float zero, float scale, float *KV_RESTRICT low,
    float *KV_RESTRICT high, size_t n) {
    EACH(i, n) {
        low[i] = kv_int4_value(codes[i] & 15u, zero, scale);
        high[i] = kv_int4_value(codes[i] >> 4, zero, scale);
    }
}

/* --- fp8 ------------------------------------------------------------------------------------------- */

TARGET static void NAME(fp8_codes)(
    const float *KV_RESTRICT row, float inverse, float scale, uint8_t *KV_RESTRICT codes,
    float *KV_RESTRICT error, size_t n) {
    EACH(i, n) {
        uint8_t code = kv_fp8_code(row[i], inverse);
        codes[i] = code;
        float missed = kv_sub(row[i], kv_fp8_value(code, scale));
        error[i] = kv_add(error[i], kv_mul(missed, missed));
    }
}

TARGET static void NAME(fp8_values)(
    const uint8_t *KV_RESTRICT codes, float scale, float *KV_RESTRICT row, size_t n) {
    EACH(i, n) row[i] = kv_fp8_value(codes[i], scale);
}

/* --- means, trees, transforms ------------------------------------------------------------------------ */

/* v[i] += v[i + n] for i < n. */
INLINE void NAME(fold)(float *values, size_t n) {
    float *KV_RESTRICT to = values;
    const float *KV_RESTRICT from = values + n;
    EACH(i, n) to[i] = kv_add(to[i], from[i]);
}

/* (a[i], b[i]) = (a[i] + b[i], a[i] - b[i]) */
INLINE void NAME(butterfly)(float *KV_RESTRICT a, float *KV_RESTRICT b, size_t n) {
    EACH(i, n) {
        float sum = kv_add(a[i], b[i]), difference = kv_sub(a[i], b[i]);
        a[i] = sum;
        b[i] = difference;
    }
}

INLINE void NAME(add_rows)(float *KV_RESTRICT sum, const float *KV_RESTRICT row, size_t n) {
    EACH(i, n) sum[i] = kv_add(sum[i], row[i]);
}

INLINE void NAME(subtract_row)(float *KV_RESTRICT row, const float *KV_RESTRICT less, size_t n) {
    EACH(i, n) row[i] = kv_sub(row[i], less[i]);
}

INLINE void NAME(scale_row)(float *KV_RESTRICT row, const float *KV_RESTRICT by, size_t n) {
    EACH(i, n) row[i] = kv_mul(row[i], by[i]);
}

INLINE void NAME(square_row)(const float *row, float *squares, size_t n) {
    EACH(i, n) squares[i] = kv_mul(row[i], row[i]);
}

INLINE void NAME(add_squares)(
    const float *KV_RESTRICT row, float *KV_RESTRICT energy, size_t n) {
    EACH(i, n) energy[i] = kv_add(energy[i], kv_mul(row[i], row[i]));
}

/* The sum of squares as a tree: of halves, of quarters ... */
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

/* Sixteen rows of n floats that are turned lie so far apart that they do not compete for the same
 * lines of the cache. */
static size_t NAME(pitch_of)(size_t n) { return 16 * kv_ceil(n, 16) + APART; }
