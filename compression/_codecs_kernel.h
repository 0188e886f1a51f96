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

/* Value i of a row of bfloat16 (narrow) or of floats. Loops that take either are compiled for each:
 * a row that is used once need not become floats in memory first. */
INLINE float NAME(value_at)(int is_narrow, const uint8_t *row, size_t i) {
    return is_narrow ? kv_float_of_bf16(((const any16 *)(const void *)row)[i])
                     : kv_float_of_bits(((const any32 *)(const void *)row)[i]);
}

/* Whether 448 times *scale*, and as much again, are still far from the largest bfloat16. */
INLINE int NAME(is_moderate)(float scale) { return kv_size_bits(scale) < MODERATE; }

/* A value of a row of bfloat16 (narrow), which does not become larger than the largest when it is
 * rounded, or of floats. */
INLINE void NAME(put_value)(int is_narrow, uint8_t *row, size_t i, float value) {
    uint32_t bits = kv_bits_of_float(value);
    if (is_narrow) {
        ((any16 *)(void *)row)[i] = (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    } else {
        ((any32 *)(void *)row)[i] = bits;
    }
}

/* kv_max(kv_min(value, most), 0) of what is not NaN: floats above zero are in the order of their bits,
 * those below zero have the sign of integers below it, and compilers know least and greatest integers. */
INLINE float NAME(held_above_zero)(float value, float most) {
    int32_t bits = (int32_t)kv_bits_of_float(value), bound = (int32_t)kv_bits_of_float(most);
    bits = bits < bound ? bits : bound;
    return kv_float_of_bits((uint32_t)(bits > 0 ? bits : 0));
}

/* kv_max(kv_min(value, most), -most), likewise. */
INLINE float NAME(held)(float value, float most) {
    uint32_t bits = kv_bits_of_float(value);
    int32_t size = kv_size_bits(value), bound = (int32_t)kv_bits_of_float(most);
    return kv_float_of_bits((uint32_t)(size < bound ? size : bound) | (bits & 0x80000000u));
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

/* Sixteen rows of n floats that are turned lie so far apart that they do not compete for the same
 * lines of the cache. */
static size_t NAME(pitch_of)(size_t n) { return 16 * kv_ceil(n, 16) + APART; }
