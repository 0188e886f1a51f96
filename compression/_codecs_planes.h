/* Loops over the tiles of a head: planes of codes, and what exp3 keeps.
 *
 * Planes are packed eight codes at a time, in words: a mask keeps the bits of each byte apart, and
 * words can be shifted by every CPU. Rows of a tile lie one behind the other, so that row r of a
 * plane of p rows, which holds rows r, r + p, r + 2p ..., is one of p runs of the same length.
 */

/* --- planes ---------------------------------------------------------------------------------------- */

INLINE void NAME(pack_width)(
    const uint8_t *KV_RESTRICT codes, size_t run, unsigned width, unsigned shift,
    uint8_t *KV_RESTRICT plane) {
    const uint64_t mask = ((1u << width) - 1u) * 0x0101010101010101u;
    size_t words = run / 8;
    EACH(i, words) {
        uint64_t packed = 0;
#pragma GCC unroll 8
        for (unsigned k = 0; k < 8 / width; k++) {
            uint64_t word = *(const any64 *)(const void *)(codes + k * run + 8 * i);
            packed |= (word >> shift & mask) << k * width;
        }
        *(any64 *)(void *)(plane + 8 * i) = packed;
    }
    for (size_t i = 8 * words; i < run; i++) {
        uint8_t packed = 0;
        for (unsigned k = 0; k < 8 / width; k++) {
            packed |= (uint8_t)((codes[k * run + i] >> shift & (uint8_t)mask) << k * width);
        }
        plane[i] = packed;
    }
}

/* Pack `width` bits, from bit `shift` on, of codes into a plane of *rows* rows of n channels. */
TARGET static void NAME(pack_plane)(
    const uint8_t *codes, size_t rows, unsigned width, unsigned shift, uint8_t *plane, size_t n) {
    switch (width) {
    case 1: NAME(pack_width)(codes, rows * n, 1, shift, plane); break;
    case 2: NAME(pack_width)(codes, rows * n, 2, shift, plane); break;
    default: NAME(pack_width)(codes, rows * n, 4, shift, plane);
    }
}

INLINE void NAME(unpack_width)(
    const uint8_t *KV_RESTRICT plane, size_t run, unsigned width, unsigned shift,
    uint8_t *KV_RESTRICT codes) {
    const uint64_t mask = ((1u << width) - 1u) * 0x0101010101010101u;
    size_t words = run / 8;
#pragma GCC unroll 8
    for (unsigned k = 0; k < 8 / width; k++) {
        uint8_t *KV_RESTRICT to = codes + k * run;
        EACH(i, words) {
            uint64_t word = *(const any64 *)(const void *)(plane + 8 * i);
            *(any64 *)(void *)(to + 8 * i) |= (word >> k * width & mask) << shift;
        }
        for (size_t i = 8 * words; i < run; i++) {
            to[i] |= (uint8_t)((plane[i] >> k * width & (uint8_t)mask) << shift);
        }
    }
}

/* The reverse: add the bits of a plane to codes, which were zero there. */
TARGET static void NAME(unpack_plane)(
    const uint8_t *plane, size_t rows, unsigned width, unsigned shift, uint8_t *codes, size_t n) {
    switch (width) {
    case 1: NAME(unpack_width)(plane, rows * n, 1, shift, codes); break;
    case 2: NAME(unpack_width)(plane, rows * n, 2, shift, codes); break;
    default: NAME(unpack_width)(plane, rows * n, 4, shift, codes);
    }
}

/* --- exp3 ------------------------------------------------------------------------------------------ */

/* The largest exponent of every channel of *rows* rows. Sign aside, larger bits are never a
 * smaller exponent. */
TARGET static void NAME(largest_exponents)(
    const uint8_t *values, int64_t stride, size_t rows, uint8_t *KV_RESTRICT largest, size_t n) {
    uint16_t most[BLOCK];
    memset(most, 0, n * sizeof *most);
    for (size_t t = 0; t < rows; t++) {
        const any16 *KV_RESTRICT bits = (const any16 *)(const void *)(values + (int64_t)t * stride);
        EACH(i, n) {
            uint16_t size = bits[i] & 0x7fffu;
            most[i] = most[i] > size ? most[i] : size;
        }
    }
    EACH(i, n) largest[i] = (uint8_t)kv_exp3_exponent(most[i]);
}

/* Split a row into what is kept as it is, the exponents, and their offsets. */
TARGET static void NAME(split_row)(
    const any16 *KV_RESTRICT bits, const uint8_t *KV_RESTRICT largest, uint8_t escape,
    uint8_t *KV_RESTRICT rest, uint8_t *KV_RESTRICT exponents, uint8_t *KV_RESTRICT offsets,
    size_t n) {
    EACH(i, n) {
        uint8_t exponent = (uint8_t)kv_exp3_exponent(bits[i]);
        uint8_t below = (uint8_t)(largest[i] - exponent);
        rest[i] = (uint8_t)kv_exp3_rest(bits[i]);
        exponents[i] = exponent;
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

/* --- rans: symbols, and planes of what is kept beside them ------------------------------------------ */

/* The symbol of a value, and its rest planes. */
TARGET static void NAME(split_values)(uint32_t source, const uint8_t *KV_RESTRICT values,
    uint8_t *KV_RESTRICT symbols, uint8_t *const *rest, size_t n) {
    const any16 *KV_RESTRICT halves = (const any16 *)(const void *)values;
    const any32 *KV_RESTRICT floats = (const any32 *)(const void *)values;
    uint8_t *KV_RESTRICT first = rest[0], *KV_RESTRICT second = rest[1], *KV_RESTRICT third = rest[2];
    switch (source) {
    case SOURCE_BF16:
        EACH(i, n) symbols[i] = (uint8_t)kv_exp3_exponent(halves[i]);
        EACH(i, n) first[i] = (uint8_t)kv_exp3_rest(halves[i]);
        break;
    case SOURCE_FP16:
        EACH(i, n) symbols[i] = (uint8_t)(halves[i] >> 8);
        EACH(i, n) first[i] = (uint8_t)halves[i];
        break;
    case SOURCE_FP32:
        EACH(i, n) symbols[i] = (uint8_t)(floats[i] >> 23);
        EACH(i, n) first[i] = (uint8_t)floats[i];
        EACH(i, n) second[i] = (uint8_t)(floats[i] >> 8);
        EACH(i, n) third[i] = (uint8_t)kv_exp3_rest(floats[i] >> 16);
        break;
    default: memcpy(symbols, values, n);
    }
}

TARGET static void NAME(merge_values)(uint32_t source, const uint8_t *KV_RESTRICT symbols,
    uint8_t *const *rest, uint8_t *KV_RESTRICT values, size_t n) {
    any16 *KV_RESTRICT halves = (any16 *)(void *)values;
    any32 *KV_RESTRICT floats = (any32 *)(void *)values;
    const uint8_t *KV_RESTRICT first = rest[0], *KV_RESTRICT second = rest[1];
    const uint8_t *KV_RESTRICT third = rest[2];
    switch (source) {
    case SOURCE_BF16: NAME(merge_row)(first, symbols, halves, n); break;
    case SOURCE_FP16:
        EACH(i, n) halves[i] = (uint16_t)(symbols[i] << 8 | first[i]);
        break;
    case SOURCE_FP32:
        EACH(i, n) {
            uint32_t high = third[i], sign = (high & 0x80u) << 24;
            floats[i] = sign | (uint32_t)symbols[i] << 23 | (high & 0x7fu) << 16 |
                        (uint32_t)second[i] << 8 | first[i];
        }
        break;
    default: memcpy(values, symbols, n);
    }
}

TARGET static void NAME(raise_largest)(
    uint8_t *KV_RESTRICT largest, const uint8_t *KV_RESTRICT symbols, size_t n) {
    EACH(i, n) largest[i] = largest[i] > symbols[i] ? largest[i] : symbols[i];
}

/* --- what is marked ------------------------------------------------------------------------------ */

/* Mark which of *count* bytes are *wanted*, a bit each; return how many. The bytes are readable up
 * to a multiple of 64. */
TARGET static size_t NAME(mark_bytes)(
    const uint8_t *bytes, size_t count, uint8_t wanted, uint64_t *marks) {
    size_t found = 0;
    for (size_t at = 0; at < count; at += 64) {
        uint64_t mark = NAME(mark_64)(bytes + at, wanted);
        if (count - at < 64) {
            mark &= ((uint64_t)1 << (count - at)) - 1;
        }
        marks[at / 64] = mark;
        found += (size_t)__builtin_popcountll(mark);
    }
    return found;
}

/* Append the *bytes* that are marked to *list*, which has room for as many more; return its end. */
TARGET static uint8_t *NAME(gather_marked)(
    const uint8_t *bytes, const uint64_t *marks, size_t count, uint8_t *list) {
    for (size_t at = 0; at < count; at += 64) {
        uint64_t mark = marks[at / 64];
        uint8_t *end = list + __builtin_popcountll(mark);
#pragma GCC unroll 4
        for (int k = 0; k < TAKEN_AT_ONCE; k++) {
            list[k] = bytes[at + (size_t)__builtin_ctzll(mark | (uint64_t)1 << 63)];
            mark &= mark - 1;
        }
        for (list += TAKEN_AT_ONCE; mark != 0; mark &= mark - 1) {
            *list++ = bytes[at + (size_t)__builtin_ctzll(mark)];
        }
        list = end;
    }
    return list;
}

/* The reverse: *bytes* that are marked become those of *list*, which has one for each. */
TARGET static void NAME(scatter_marked)(
    uint8_t *bytes, const uint64_t *marks, size_t count, const uint8_t *list, size_t listed) {
    const uint8_t *last = list + listed;
    for (size_t at = 0; at < count; at += 64) {
        uint64_t mark = marks[at / 64];
        const uint8_t *end = list + __builtin_popcountll(mark);
        if (last - list >= TAKEN_AT_ONCE) {
#pragma GCC unroll 4
            for (int k = 0; k < TAKEN_AT_ONCE; k++) {
                uint8_t *place = bytes + at + (size_t)__builtin_ctzll(mark | (uint64_t)1 << 63);
                *place = mark != 0 ? list[k] : *place;
                mark &= mark - 1;
            }
            list += TAKEN_AT_ONCE;
        }
        for (; mark != 0; mark &= mark - 1) {
            bytes[at + (size_t)__builtin_ctzll(mark)] = *list++;
        }
        list = end;
    }
}
