/* The loops of all codecs for one width of vectors; _codecs.c includes this once for each.
 *
 * TARGET and NAME come from there. Rows are runs of channels of one token, at most BLOCK long.
 * The loops are written so that compilers turn each into vector code: no branches, one type of
 * index, pointers that do not overlap.
 */

#undef EACH
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
TARGET static void NAME(fold)(float *values, size_t n) {
    float *KV_RESTRICT to = values;
    const float *KV_RESTRICT from = values + n;
    EACH(i, n) to[i] = kv_add(to[i], from[i]);
}

/* (a[i], b[i]) = (a[i] + b[i], a[i] - b[i]) */
TARGET static void NAME(butterfly)(float *KV_RESTRICT a, float *KV_RESTRICT b, size_t n) {
    EACH(i, n) {
        float sum = kv_add(a[i], b[i]), difference = kv_sub(a[i], b[i]);
        a[i] = sum;
        b[i] = difference;
    }
}

TARGET static void NAME(add_rows)(float *KV_RESTRICT sum, const float *KV_RESTRICT row, size_t n) {
    EACH(i, n) sum[i] = kv_add(sum[i], row[i]);
}

TARGET static void NAME(subtract_row)(float *KV_RESTRICT row, const float *KV_RESTRICT less, size_t n) {
    EACH(i, n) row[i] = kv_sub(row[i], less[i]);
}

TARGET static void NAME(scale_row)(float *KV_RESTRICT row, const float *KV_RESTRICT by, size_t n) {
    EACH(i, n) row[i] = kv_mul(row[i], by[i]);
}

TARGET static void NAME(square_row)(const float *row, float *squares, size_t n) {
    EACH(i, n) squares[i] = kv_mul(row[i], row[i]);
}

TARGET static void NAME(add_squares)(
    const float *KV_RESTRICT row, float *KV_RESTRICT energy, size_t n) {
    EACH(i, n) energy[i] = kv_add(energy[i], kv_mul(row[i], row[i]));
}

/* --- nvfp4 ----------------------------------------------------------------------------------------- */

/* Code 16 rows of n channels with one block scale a channel; errors of the channels are summed as
 * a tree over the rows, in the order of the format. */
TARGET static void NAME(nvfp4_try)(
    const float *KV_RESTRICT rows, const float *KV_RESTRICT sizes, float target, float tensor,
    uint8_t *KV_RESTRICT scales, float *KV_RESTRICT errors, size_t n) {
    float squares[16 * BLOCK], inverses[BLOCK], units[BLOCK];
    EACH(i, n) {
        scales[i] = kv_nvfp4_block_scale(sizes[i], target, tensor);
        units[i] = kv_nvfp4_unit(scales[i], tensor);
        inverses[i] = kv_inverse(units[i]);
    }
    for (size_t r = 0; r < 16; r++) {
        const float *KV_RESTRICT row = rows + r * n;
        float *KV_RESTRICT square = squares + r * n;
        EACH(i, n) {
            uint32_t code = kv_nvfp4_code(kv_mul(row[i], inverses[i]));
            float missed = kv_sub(row[i], kv_nvfp4_value(code, units[i]));
            square[i] = kv_mul(missed, missed);
        }
    }
    for (size_t half = 8; half > 0; half /= 2) {
        NAME(fold)(squares, half * n);
    }
    memcpy(errors, squares, n * sizeof *errors);
}

TARGET static void NAME(nvfp4_codes)(
    const float *KV_RESTRICT row, const float *KV_RESTRICT inverses, uint8_t *KV_RESTRICT codes,
    size_t n) {
    EACH(i, n) codes[i] = (uint8_t)kv_nvfp4_code(kv_mul(row[i], inverses[i]));
}

/* Choose block scales for 16 rows and code them; return the sum of squared errors. */
TARGET static float NAME(nvfp4_block)(
    const float *KV_RESTRICT rows, float tensor, uint8_t *KV_RESTRICT scales,
    uint8_t *KV_RESTRICT codes, size_t pitch, size_t n) {
    float sizes[BLOCK], errors[BLOCK], fours[BLOCK], inverses[BLOCK], sum = 0.0f;
    uint8_t other[BLOCK];
    EACH(i, n) sizes[i] = 0.0f;
    for (size_t r = 0; r < 16; r++) {
        EACH(i, n) sizes[i] = kv_max(sizes[i], kv_abs(rows[r * n + i]));
    }
    NAME(nvfp4_try)(rows, sizes, 6.0f, tensor, scales, errors, n);
    NAME(nvfp4_try)(rows, sizes, 4.0f, tensor, other, fours, n);
    EACH(i, n) {
        scales[i] = fours[i] < errors[i] ? other[i] : scales[i];
        errors[i] = kv_min(errors[i], fours[i]);
        inverses[i] = kv_inverse(kv_nvfp4_unit(scales[i], tensor));
    }
    for (size_t r = 0; r < 16; r++) {
        NAME(nvfp4_codes)(rows + r * n, inverses, codes + r * pitch, n);
    }
    EACH(i, n) sum += errors[i];
    return sum;
}

TARGET static void NAME(nvfp4_values)(
    const uint8_t *KV_RESTRICT codes, const float *KV_RESTRICT units, float *KV_RESTRICT row, size_t n) {
    EACH(i, n) row[i] = kv_nvfp4_value(codes[i], units[i]);
}

TARGET static void NAME(nvfp4_units)(
    const uint8_t *KV_RESTRICT scales, float tensor, float *KV_RESTRICT units, size_t n) {
    EACH(i, n) units[i] = kv_nvfp4_unit(scales[i], tensor);
}

/* --- hq4 and hq3 ------------------------------------------------------------------------------------- */

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

/* --- ecsq ------------------------------------------------------------------------------------------ */

/* Symbols of a row: q + bound, or 2 * bound + 1 for an escape; return how many escapes. */
TARGET static size_t NAME(ecsq_symbols)(
    const float *KV_RESTRICT row, const float *KV_RESTRICT inverses, const float *KV_RESTRICT steps,
    int32_t bound, uint8_t *KV_RESTRICT symbols, float *KV_RESTRICT error, size_t n) {
    float most = kv_float_of_small(bound + 1);
    uint32_t escapes = 0;
    EACH(i, n) {
        float v = kv_max(kv_min(kv_mul(row[i], inverses[i]), most), -most);
        int32_t q = kv_rint(v);
        int is_escape = q > bound || q < -bound;
        symbols[i] = (uint8_t)(is_escape ? 2 * bound + 1 : q + bound);
        float missed = kv_sub(row[i], kv_mul(kv_float_of_small(q), steps[i]));
        missed = is_escape ? 0.0f : missed; /* what those lose is added where they are listed */
        error[i] = kv_add(error[i], kv_mul(missed, missed));
        escapes += (uint32_t)is_escape;
    }
    return escapes;
}

TARGET static void NAME(ecsq_values)(
    const uint8_t *KV_RESTRICT symbols, const float *KV_RESTRICT steps, const float *KV_RESTRICT means,
    int32_t bound, float *KV_RESTRICT row, size_t n) {
    EACH(i, n) {
        float value = kv_mul(kv_float_of_small((int32_t)symbols[i] - bound), steps[i]);
        row[i] = kv_add(value, means[i]);
    }
}

/* --- exp3 ------------------------------------------------------------------------------------------ */

TARGET static void NAME(widen_exponents)(
    const any16 *KV_RESTRICT bits, uint8_t *KV_RESTRICT largest, size_t n) {
    EACH(i, n) {
        uint8_t exponent = (uint8_t)kv_exp3_exponent(bits[i]);
        largest[i] = largest[i] > exponent ? largest[i] : exponent;
    }
}

/* Split a row into what is kept as it is and the offsets. */
TARGET static void NAME(split_row)(
    const any16 *KV_RESTRICT bits, const uint8_t *KV_RESTRICT largest, uint8_t escape,
    uint8_t *KV_RESTRICT rest, uint8_t *KV_RESTRICT offsets, size_t n) {
    EACH(i, n) {
        uint8_t below = (uint8_t)(largest[i] - (uint8_t)kv_exp3_exponent(bits[i]));
        rest[i] = (uint8_t)kv_exp3_rest(bits[i]);
        offsets[i] = below < escape ? below : escape;
    }
}

/* offsets become exponents. */
TARGET static void NAME(below_largest)(
    const uint8_t *KV_RESTRICT largest, uint8_t *KV_RESTRICT offsets, size_t n) {
    EACH(i, n) offsets[i] = (uint8_t)(largest[i] - offsets[i]);
}

TARGET static void NAME(merge_row)(
    const uint8_t *KV_RESTRICT rest, const uint8_t *KV_RESTRICT exponents, any16 *KV_RESTRICT bits,
    size_t n) {
    EACH(i, n) bits[i] = (uint16_t)kv_exp3_bits(exponents[i], rest[i]);
}

/* Row r of a plane holds rows r, r + rows, r + 2 rows ... of the offsets, `width` bits of each. */
TARGET static void NAME(pack_plane)(
    const uint8_t *KV_RESTRICT offsets, size_t rows, unsigned width, unsigned shift,
    uint8_t *KV_RESTRICT plane, size_t n) {
    uint8_t mask = (uint8_t)((1u << width) - 1u);
    for (size_t r = 0; r < rows; r++) {
        uint8_t *KV_RESTRICT packed = plane + r * n;
        memset(packed, 0, n);
        for (unsigned k = 0; k < 8 / width; k++) {
            const uint8_t *KV_RESTRICT row = offsets + (r + k * rows) * n;
            unsigned place = k * width;
            EACH(i, n) packed[i] |= (uint8_t)(((row[i] >> shift) & mask) << place);
        }
    }
}

/* The reverse: add the bits of a plane to the offsets, which were zero there. */
TARGET static void NAME(unpack_plane)(
    const uint8_t *KV_RESTRICT plane, size_t rows, unsigned width, unsigned shift,
    uint8_t *KV_RESTRICT offsets, size_t n) {
    uint8_t mask = (uint8_t)((1u << width) - 1u);
    for (size_t r = 0; r < rows; r++) {
        const uint8_t *KV_RESTRICT packed = plane + r * n;
        for (unsigned k = 0; k < 8 / width; k++) {
            uint8_t *KV_RESTRICT row = offsets + (r + k * rows) * n;
            unsigned place = k * width;
            EACH(i, n) row[i] |= (uint8_t)(((packed[i] >> place) & mask) << shift);
        }
    }
}
