/* Codecs of variable rate, a section at a time: exp3, rans and ecsq (docs/codec-format.md).
 *
 * A `room` hands out parts one behind the other and never gives more than there is, for writing up
 * to the cap and for reading up to the end of what was stored.
 */

enum { STREAM_SYMBOLS = 8192, STREAM_HEAD = 16 + 4 * KV_RANS_LANES, SYMBOLS = 256 };
enum { MODE_EXP3 = 0, MODE_EXP4 = 1, MODE_RAW = 2, MODE_MASK = 15 };

typedef struct {
    uint8_t *base;
    uint64_t size, at;
} room;

/* The next *size* bytes, or NULL when they and their padding do not fit. */
static uint8_t *take(room *r, uint64_t size) {
    uint64_t left = r->size - r->at;
    if (size > left || kv_pad16(size) > left) {
        return NULL;
    }
    uint8_t *found = r->base + r->at;
    r->at += kv_pad16(size);
    return found;
}

/* The same for writing: the padding becomes zero. */
static uint8_t *give(room *r, uint64_t size) {
    uint8_t *found = take(r, size);
    if (found != NULL) {
        memset(found + size, 0, kv_pad16(size) - size);
    }
    return found;
}

static any32 *words32(uint8_t *at) { return (any32 *)(void *)at; }
static any16 *words16(uint8_t *at) { return (any16 *)(void *)at; }

/* --- exp3 ------------------------------------------------------------------------------------------ */

static uint64_t tile_bytes(int mode, uint64_t rows, uint64_t n, uint64_t escapes) {
    if (mode == MODE_RAW) {
        return kv_pad16(2 * rows * n);
    }
    uint64_t planes = mode == MODE_EXP3
                          ? kv_pad16(kv_ceil(rows, 4) * n) + kv_pad16(kv_ceil(rows, 8) * n)
                          : kv_pad16(kv_ceil(rows, 2) * n);
    return kv_pad16(n) + kv_pad16(rows * n) + planes + 16 + kv_pad16(escapes);
}

/* Eight bytes of which those that equal *wanted* have become 0x80, all others 0. */
static uint64_t equal_bytes(const uint8_t *bytes, uint8_t wanted) {
    const uint64_t ones = 0x0101010101010101u, low7 = 0x7f * ones;
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    word ^= wanted * ones;
    return ~(((word & low7) + low7) | word | low7);
}

static uint64_t count_bytes(const uint8_t *bytes, uint64_t count, uint8_t wanted) {
    uint64_t found = 0, i = 0;
    for (; i + 8 <= count; i += 8) {
        found += ((equal_bytes(bytes + i, wanted) >> 7) * 0x0101010101010101u) >> 56;
    }
    for (; i < count; i++) {
        found += bytes[i] == wanted;
    }
    return found;
}

/* Where in a row *wanted* stands; return how often. */
static uint64_t find_bytes(const uint8_t *bytes, uint64_t count, uint8_t wanted, uint16_t *places) {
    uint64_t found = 0, at = 0;
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
    for (; at + 8 <= count; at += 8) {
        for (uint64_t equal = equal_bytes(bytes + at, wanted); equal != 0; equal &= equal - 1) {
            places[found++] = (uint16_t)(at + (uint64_t)__builtin_ctzll(equal) / 8);
        }
    }
#endif
    for (; at < count; at++) {
        if (bytes[at] == wanted) {
            places[found++] = (uint16_t)at;
        }
    }
    return found;
}

/* Split the rows of a tile under *escape*; return how many values are escapes. */
static uint64_t split_tile(const head *h, uint64_t first, uint64_t rows, uint8_t escape,
    const uint8_t *largest, uint8_t *rest, uint8_t *offsets) {
    uint64_t n = h->ask->width;
    for (uint64_t t = 0; t < rows; t++) {
        const any16 *bits = words16(values_at(h, first + t));
        chosen->split_row(bits, largest, escape, rest + t * n, offsets + t * n, n);
    }
    return count_bytes(offsets, rows * n, escape);
}

/* List the exponents of all escapes in order of tokens and channels. */
static void list_escapes(const uint8_t *offsets, uint8_t escape, const head *h, uint64_t first,
    uint64_t rows, uint8_t *list) {
    uint64_t n = h->ask->width;
    uint16_t places[BLOCK];
    for (uint64_t t = 0; t < rows; t++) {
        const any16 *bits = words16(values_at(h, first + t));
        const uint8_t *row = offsets + t * n;
        uint64_t held = find_bytes(row, n, escape, places);
        for (uint64_t i = 0; i < held; i++) {
            *list++ = (uint8_t)kv_exp3_exponent(bits[places[i]]);
        }
    }
}

static void put_planes(room *out, int mode, const uint8_t *offsets, uint64_t rows, uint64_t n) {
    if (mode == MODE_EXP4) {
        uint64_t packed = kv_ceil(rows, 2);
        chosen->pack_plane(offsets, packed, 4, 0, give(out, packed * n), n);
        return;
    }
    uint64_t two = kv_ceil(rows, 4), one = kv_ceil(rows, 8);
    chosen->pack_plane(offsets, two, 2, 0, give(out, two * n), n);
    chosen->pack_plane(offsets, one, 1, 2, give(out, one * n), n);
}

/* Append a tile in its shortest mode; return the mode, or -1 when there is no room. */
static int put_tile(room *out, const head *h, uint64_t first, uint64_t rows) {
    uint64_t n = h->ask->width;
    uint8_t largest[BLOCK] = {0}, rest[KV_TILE * BLOCK], offsets[(KV_TILE + 8) * BLOCK];
    for (uint64_t t = 0; t < rows; t++) {
        chosen->widen_exponents(words16(values_at(h, first + t)), largest, n);
    }
    memset(offsets + rows * n, 0, 8 * n);
    uint64_t escapes = split_tile(h, first, rows, 7, largest, rest, offsets);
    uint64_t size = tile_bytes(MODE_EXP3, rows, n, escapes);
    int mode = MODE_EXP3;
    if (size > tile_bytes(MODE_EXP4, rows, n, 0)) {
        uint64_t fewer = split_tile(h, first, rows, 15, largest, rest, offsets);
        if (tile_bytes(MODE_EXP4, rows, n, fewer) < size) {
            mode = MODE_EXP4;
            escapes = fewer;
            size = tile_bytes(MODE_EXP4, rows, n, fewer);
        } else {
            split_tile(h, first, rows, 7, largest, rest, offsets);
        }
    }
    if (tile_bytes(MODE_RAW, rows, n, 0) < size) {
        mode = MODE_RAW;
        size = tile_bytes(MODE_RAW, rows, n, 0);
    }
    if (size > out->size - out->at) {
        return -1;
    }
    if (mode == MODE_RAW) {
        uint8_t *values = give(out, 2 * rows * n);
        for (uint64_t t = 0; t < rows; t++) {
            memcpy(values + 2 * t * n, values_at(h, first + t), 2 * n);
        }
        return mode;
    }
    memcpy(give(out, n), largest, n);
    memcpy(give(out, rows * n), rest, rows * n);
    put_planes(out, mode, offsets, rows, n);
    *words32(give(out, 4)) = (uint32_t)escapes;
    list_escapes(offsets, mode == MODE_EXP3 ? 7 : 15, h, first, rows, give(out, escapes));
    return mode;
}

static int exp3_encode(head *h, room *out, uint8_t *values) {
    const request *ask = h->ask;
    uint64_t tiles = kv_ceil(ask->tokens, KV_TILE), index = 0;
    uint8_t *directory = give(out, (ask->heads * tiles + 1) * 4);
    if (directory == NULL) {
        return UNFIT;
    }
    for (uint64_t i = 0; i < ask->heads; i++) {
        h->values = values + (int64_t)i * ask->head_stride;
        for (uint64_t first = 0; first < ask->tokens; first += KV_TILE) {
            uint64_t offset = out->at;
            int mode = put_tile(out, h, first, lesser(KV_TILE, ask->tokens - first));
            if (mode < 0) {
                return UNFIT;
            }
            words32(directory)[index++] = (uint32_t)offset + (uint32_t)mode;
        }
    }
    words32(directory)[index] = (uint32_t)out->at;
    return DONE;
}

/* Turn offsets into exponents, escapes into those of the list; return 0 unless all are used up. */
static int find_exponents(uint8_t *offsets, const uint8_t *largest, uint8_t escape,
    const uint8_t *list, uint64_t count, uint64_t rows, uint64_t n) {
    uint64_t used = 0;
    uint16_t places[BLOCK];
    for (uint64_t t = 0; t < rows; t++) {
        uint8_t *row = offsets + t * n;
        uint64_t held = find_bytes(row, n, escape, places);
        if (held > count - used) {
            return 0;
        }
        chosen->below_largest(largest, row, n);
        for (uint64_t i = 0; i < held; i++) {
            row[places[i]] = list[used++];
        }
    }
    return used == count;
}

static int take_tile(room *in, const head *h, int mode, uint64_t first, uint64_t rows) {
    uint64_t n = h->ask->width;
    uint8_t offsets[(KV_TILE + 8) * BLOCK];
    if (mode == MODE_RAW) {
        const uint8_t *values = take(in, 2 * rows * n);
        for (uint64_t t = 0; values != NULL && t < rows; t++) {
            memcpy(values_at(h, first + t), values + 2 * t * n, 2 * n);
        }
        return values != NULL;
    }
    const uint8_t *largest = take(in, n), *rest = take(in, rows * n);
    uint64_t wide = kv_ceil(rows, mode == MODE_EXP3 ? 4 : 2), one = kv_ceil(rows, 8);
    const uint8_t *plane = take(in, wide * n), *top = NULL;
    if (mode == MODE_EXP3) {
        top = take(in, one * n);
    }
    uint8_t *counted = take(in, 4);
    if (largest == NULL || rest == NULL || plane == NULL || counted == NULL ||
        (mode == MODE_EXP3 && top == NULL)) {
        return 0;
    }
    uint64_t count = *words32(counted);
    const uint8_t *list = take(in, count);
    if (list == NULL) {
        return 0;
    }
    memset(offsets, 0, (rows + 8) * n);
    chosen->unpack_plane(plane, wide, mode == MODE_EXP3 ? 2 : 4, 0, offsets, n);
    if (top != NULL) {
        chosen->unpack_plane(top, one, 1, 2, offsets, n);
    }
    if (!find_exponents(offsets, largest, mode == MODE_EXP3 ? 7 : 15, list, count, rows, n)) {
        return 0;
    }
    for (uint64_t t = 0; t < rows; t++) {
        chosen->merge_row(rest + t * n, offsets + t * n, words16(values_at(h, first + t)), n);
    }
    return 1;
}

static int exp3_decode(head *h, room *in, uint8_t *values, uint64_t first_head, uint64_t end) {
    const request *ask = h->ask;
    uint64_t tiles = kv_ceil(ask->tokens, KV_TILE);
    uint8_t *directory = take(in, (ask->heads * tiles + 1) * 4);
    if (directory == NULL || words32(directory)[ask->heads * tiles] != in->size) {
        return BAD_BYTES;
    }
    for (uint64_t i = first_head; i < end; i++) {
        h->values = values + (int64_t)(i - first_head) * ask->head_stride;
        for (uint64_t tile = 0; tile < tiles; tile++) {
            uint32_t entry = words32(directory)[i * tiles + tile];
            int mode = (int)(entry & MODE_MASK);
            in->at = entry & ~(uint32_t)MODE_MASK;
            uint64_t first = tile * KV_TILE, rows = lesser(KV_TILE, ask->tokens - first);
            if (mode > MODE_RAW || in->at > in->size || !take_tile(in, h, mode, first, rows)) {
                return BAD_BYTES;
            }
        }
    }
    return DONE;
}

/* --- streams of a section -------------------------------------------------------------------------- */

static uint64_t streams_of(uint64_t count) { return kv_ceil(count, STREAM_SYMBOLS); }

static uint8_t filling_of(const uint16_t *frequencies, size_t count) {
    size_t most = 0;
    for (size_t i = 1; i < count; i++) {
        most = frequencies[i] > frequencies[most] ? i : most;
    }
    return (uint8_t)most;
}

/* Append the streams of a head; return 0 when there is no room. */
static int put_streams(room *out, any32 *directory, const rans_encoder *table, uint8_t filling,
    const uint8_t *symbols, uint64_t count) {
    any16 words[STREAM_SYMBOLS];
    uint8_t last[STREAM_SYMBOLS];
    uint32_t states[KV_RANS_LANES];
    for (uint64_t first = 0; first < count; first += STREAM_SYMBOLS) {
        size_t held = lesser(STREAM_SYMBOLS, count - first), steps = kv_ceil(held, KV_RANS_LANES);
        const uint8_t *from = symbols + first;
        if (held % KV_RANS_LANES != 0) {
            memcpy(last, from, held);
            memset(last + held, filling, steps * KV_RANS_LANES - held);
            from = last;
        }
        size_t used = rans_encode_stream(
            table, states, words, STREAM_SYMBOLS, from, steps, KV_RANS_LANES);
        if (used > STREAM_SYMBOLS) {
            return 0;
        }
        *directory++ = (uint32_t)out->at;
        uint8_t *stream = give(out, STREAM_HEAD + 2 * used);
        if (stream == NULL) {
            return 0;
        }
        memset(stream, 0, 16);
        *words32(stream) = (uint32_t)used;
        memcpy(stream + 16, states, sizeof states);
        memcpy(stream + STREAM_HEAD, words + STREAM_SYMBOLS - used, 2 * used);
    }
    return 1;
}

/* Decode one stream to *steps* rows of symbols; return 0 unless it is intact. */
static int take_stream(const room *in, uint64_t from, uint64_t to, const rans_decoder *table,
    uint8_t *symbols, size_t steps) {
    if (from % 16 != 0 || from > to || to > in->size || to - from < STREAM_HEAD) {
        return 0;
    }
    const any32 *start = words32(in->base + from);
    uint64_t count = start[0];
    if (start[1] != 0 || start[2] != 0 || start[3] != 0 ||
        kv_pad16(STREAM_HEAD + 2 * count) != to - from) {
        return 0;
    }
    const any16 *words = words16(in->base + from + STREAM_HEAD);
    return rans_decode_stream(table, start + 4, words, count, symbols, steps, KV_RANS_LANES);
}

/* Decode the streams of a head into *count* symbols. */
static int take_streams(const room *in, const any32 *directory, const rans_decoder *table,
    uint8_t filling, uint8_t *symbols, uint64_t count) {
    uint8_t last[STREAM_SYMBOLS];
    for (uint64_t first = 0; first < count; first += STREAM_SYMBOLS, directory++) {
        size_t held = lesser(STREAM_SYMBOLS, count - first), steps = kv_ceil(held, KV_RANS_LANES);
        uint8_t *to = held % KV_RANS_LANES != 0 ? last : symbols + first;
        if (!take_stream(in, directory[0], directory[1], table, to, steps)) {
            return 0;
        }
        for (size_t i = held; i < steps * KV_RANS_LANES; i++) {
            if (to[i] != filling) {
                return 0;
            }
        }
        if (to == last) {
            memcpy(symbols + first, last, held);
        }
    }
    return 1;
}

static int does_ascend(const any32 *directory, uint64_t entries) {
    for (uint64_t i = 0; i < entries; i++) {
        if (directory[i] > directory[i + 1]) {
            return 0;
        }
    }
    return 1;
}

/* --- rans: symbols and what is kept beside them ------------------------------------------------------ */

static int has_exponents(const request *ask) {
    return ask->source == SOURCE_BF16 || ask->source == SOURCE_FP32;
}

/* The symbol of a value, and its rest planes. */
static void split_values(const request *ask, const uint8_t *values, uint8_t *symbols,
    uint8_t *const *rest, uint64_t n) {
    const any16 *halves = (const any16 *)(const void *)values;
    const any32 *floats = (const any32 *)(const void *)values;
    switch (ask->source) {
    case SOURCE_BF16:
        for (uint64_t i = 0; i < n; i++) {
            symbols[i] = (uint8_t)kv_exp3_exponent(halves[i]);
            rest[0][i] = (uint8_t)kv_exp3_rest(halves[i]);
        }
        break;
    case SOURCE_FP16:
        for (uint64_t i = 0; i < n; i++) {
            symbols[i] = (uint8_t)(halves[i] >> 8);
            rest[0][i] = (uint8_t)halves[i];
        }
        break;
    case SOURCE_FP32:
        for (uint64_t i = 0; i < n; i++) {
            symbols[i] = (uint8_t)(floats[i] >> 23);
            rest[0][i] = (uint8_t)floats[i];
            rest[1][i] = (uint8_t)(floats[i] >> 8);
            rest[2][i] = (uint8_t)kv_exp3_rest(floats[i] >> 16);
        }
        break;
    default: memcpy(symbols, values, n);
    }
}

static void merge_values(const request *ask, const uint8_t *symbols, uint8_t *const *rest,
    uint8_t *values, uint64_t n) {
    any16 *halves = words16(values);
    any32 *floats = words32(values);
    switch (ask->source) {
    case SOURCE_BF16: chosen->merge_row(rest[0], symbols, halves, n); break;
    case SOURCE_FP16:
        for (uint64_t i = 0; i < n; i++) {
            halves[i] = (uint16_t)(symbols[i] << 8 | rest[0][i]);
        }
        break;
    case SOURCE_FP32:
        for (uint64_t i = 0; i < n; i++) {
            uint32_t high = rest[2][i], sign = (high & 0x80u) << 24;
            floats[i] = sign | (uint32_t)symbols[i] << 23 | (high & 0x7fu) << 16 |
                        (uint32_t)rest[1][i] << 8 | rest[0][i];
        }
        break;
    default: memcpy(values, symbols, n);
    }
}

/* Rows of a head that may be taken as one, because nothing lies between them. */
static uint64_t rows_at_once(const request *ask) {
    int is_flat = ask->token_stride == (int64_t)(ask->width * ask->element);
    return is_flat && !has_exponents(ask) ? ask->tokens : 1;
}

/* Split a head; symbols of exponents become distances below the largest of their channel. */
static void split_head(const head *h, uint8_t *largest, uint8_t *symbols, uint8_t **planes) {
    const request *ask = h->ask;
    uint64_t n = ask->width, rows = rows_at_once(ask);
    for (uint64_t t = 0; t < ask->tokens; t += rows) {
        uint8_t *rest[3] = {planes[0] + t * n, planes[1] + t * n, planes[2] + t * n};
        split_values(ask, values_at(h, t), symbols + t * n, rest, rows * n);
    }
    if (!has_exponents(ask)) {
        return;
    }
    memset(largest, 0, n);
    for (uint64_t t = 0; t < ask->tokens; t++) {
        for (uint64_t c = 0; c < n; c++) {
            uint8_t symbol = symbols[t * n + c];
            largest[c] = largest[c] > symbol ? largest[c] : symbol;
        }
    }
    for (uint64_t t = 0; t < ask->tokens; t++) {
        for (uint64_t c = 0; c < n; c++) {
            symbols[t * n + c] = (uint8_t)(largest[c] - symbols[t * n + c]);
        }
    }
}

static void count_symbols(const uint8_t *symbols, uint64_t count, uint64_t *counts) {
    uint64_t some[4][SYMBOLS] = {{0}}; /* four, so that equal neighbours do not wait for each other */
    for (uint64_t i = 0; i < count; i++) {
        some[i % 4][symbols[i]]++;
    }
    for (int s = 0; s < SYMBOLS; s++) {
        counts[s] += some[0][s] + some[1][s] + some[2][s] + some[3][s];
    }
}

static void normalise(const uint64_t *counts, uint64_t total, uint16_t *frequencies) {
    int64_t wide[SYMBOLS], missing = KV_RANS_TOTAL;
    size_t most = 0;
    for (size_t s = 0; s < SYMBOLS; s++) {
        wide[s] = (int64_t)(counts[s] * KV_RANS_TOTAL / total);
        wide[s] = counts[s] > 0 && wide[s] == 0 ? 1 : wide[s];
        missing -= wide[s];
        most = counts[s] > counts[most] ? s : most;
    }
    wide[most] += missing > 0 ? missing : 0;
    for (; missing < 0; missing++) {
        size_t greatest = 0;
        for (size_t s = 1; s < SYMBOLS; s++) {
            greatest = wide[s] > wide[greatest] ? s : greatest;
        }
        wide[greatest]--;
    }
    for (size_t s = 0; s < SYMBOLS; s++) {
        frequencies[s] = (uint16_t)wide[s];
    }
}

static int rans_put(head *h, room *out, uint8_t *values, uint8_t *symbols) {
    const request *ask = h->ask;
    uint64_t count = ask->tokens * ask->width, per_head = streams_of(count), counts[SYMBOLS] = {0};
    uint64_t planes = ask->element - 1, entries = ask->heads * per_head;
    uint16_t frequencies[SYMBOLS];
    rans_encoder table;
    uint8_t *stored = give(out, 2 * SYMBOLS), *directory = give(out, 4 * (entries + 1));
    uint8_t *largest = give(out, has_exponents(ask) ? ask->heads * kv_pad16(ask->width) : 0);
    uint8_t *rest = give(out, ask->heads * planes * kv_pad16(count));
    if (stored == NULL || directory == NULL || largest == NULL || rest == NULL) {
        return UNFIT;
    }
    for (uint64_t i = 0; i < ask->heads; i++) {
        uint8_t *found[3], *top = largest + i * kv_pad16(ask->width);
        for (uint64_t k = 0; k < 3; k++) {
            found[k] = rest + (i * planes + (k < planes ? k : 0)) * kv_pad16(count);
        }
        h->values = values + (int64_t)i * ask->head_stride;
        split_head(h, top, symbols + i * count, found);
        for (uint64_t k = 0; k < planes; k++) {
            memset(found[k] + count, 0, kv_pad16(count) - count);
        }
        if (has_exponents(ask)) {
            memset(top + ask->width, 0, kv_pad16(ask->width) - ask->width);
        }
        count_symbols(symbols + i * count, count, counts);
    }
    normalise(counts, ask->heads * count, frequencies);
    memcpy(stored, frequencies, sizeof frequencies);
    rans_prepare_encoder(&table, frequencies, SYMBOLS);
    uint8_t filling = filling_of(frequencies, SYMBOLS);
    for (uint64_t i = 0; i < ask->heads; i++) {
        any32 *entry = words32(directory) + i * per_head;
        if (!put_streams(out, entry, &table, filling, symbols + i * count, count)) {
            return UNFIT;
        }
    }
    words32(directory)[entries] = (uint32_t)out->at;
    return DONE;
}

static int rans_encode(head *h, room *out, uint8_t *values) {
    uint8_t *symbols = malloc(h->ask->heads * h->ask->tokens * h->ask->width);
    if (symbols == NULL) {
        return NO_MEMORY;
    }
    int status = rans_put(h, out, values, symbols);
    free(symbols);
    return status;
}

static int rans_take(head *h, room *in, uint8_t *values, uint64_t first, uint64_t end,
    uint8_t *symbols) {
    const request *ask = h->ask;
    uint64_t n = ask->width, count = ask->tokens * n, per_head = streams_of(count);
    uint64_t planes = ask->element - 1, entries = ask->heads * per_head;
    rans_decoder table;
    uint16_t frequencies[SYMBOLS];
    uint8_t *stored = take(in, 2 * SYMBOLS), *directory = take(in, 4 * (entries + 1));
    uint8_t *largest = take(in, has_exponents(ask) ? ask->heads * kv_pad16(n) : 0);
    uint8_t *rest = take(in, ask->heads * planes * kv_pad16(count));
    if (stored == NULL || directory == NULL || largest == NULL || rest == NULL) {
        return BAD_BYTES;
    }
    memcpy(frequencies, stored, sizeof frequencies);
    if (!rans_prepare_decoder(&table, frequencies, SYMBOLS) ||
        !does_ascend(words32(directory), entries) || words32(directory)[entries] != in->size) {
        return BAD_BYTES;
    }
    uint8_t filling = filling_of(frequencies, SYMBOLS);
    for (uint64_t i = first; i < end; i++) {
        const any32 *entry = words32(directory) + i * per_head;
        if (!take_streams(in, entry, &table, filling, symbols, count)) {
            return BAD_BYTES;
        }
        h->values = values + (int64_t)(i - first) * ask->head_stride;
        const uint8_t *top = largest + i * kv_pad16(n);
        uint64_t rows = rows_at_once(ask);
        for (uint64_t t = 0; t < ask->tokens; t += rows) {
            uint8_t *row = symbols + t * n, *found[3];
            for (uint64_t k = 0; k < 3; k++) {
                found[k] = rest + (i * planes + (k < planes ? k : 0)) * kv_pad16(count) + t * n;
            }
            for (uint64_t c = 0; has_exponents(ask) && c < n; c++) {
                row[c] = (uint8_t)(top[c] - row[c]);
            }
            merge_values(ask, row, found, values_at(h, t), rows * n);
        }
    }
    return DONE;
}

static int rans_decode(head *h, room *in, uint8_t *values, uint64_t first, uint64_t end) {
    if (in->size < 2 * SYMBOLS) {
        return BAD_BYTES;
    }
    uint8_t *symbols = malloc(h->ask->tokens * h->ask->width);
    if (symbols == NULL) {
        return NO_MEMORY;
    }
    int status = rans_take(h, in, values, first, end, symbols);
    free(symbols);
    return status;
}

/* --- ecsq ------------------------------------------------------------------------------------------ */

/* Whether the request's own table is one that ecsq can have. */
static int has_sound_table(const request *ask) {
    return ask->frequencies != NULL && ask->bound > 0 && ask->bound < 127 && ask->delta > 0.0f;
}

typedef struct {
    uint8_t *stored; /* parameters of all heads */
    uint64_t bytes;  /* of one head */
} parameters;

static parameters ecsq_parameters(const request *ask, uint8_t *at) {
    uint64_t n = ask->kind == KV_KEYS ? 2 * kv_pad16(2 * ask->width) : kv_pad16(2 * ask->tokens);
    return (parameters){at, n};
}

/* Leave room for the sinks and tails of all heads; return 0 when there is none. */
static int leave_extra(room *out, const request *ask) {
    for (uint64_t i = 0; i < ask->heads; i++) {
        if (give(out, sinks_bytes(ask)) == NULL || give(out, tail_bytes(ask)) == NULL) {
            return 0;
        }
    }
    return 1;
}

static int ecsq_put(head *h, room *out, uint8_t *values, uint8_t *symbols, any16 *escapes) {
    const request *ask = h->ask;
    uint64_t count = ask->tokens * ask->width, per_head = streams_of(count), found = 0;
    uint64_t entries = ask->heads * per_head, size = 2 * ask->bound + 2;
    rans_encoder table;
    uint8_t *directory = give(out, 4 * (entries + 1)), *before = give(out, 4 * (ask->heads + 1));
    parameters scales = ecsq_parameters(ask, out->base + out->at);
    if (directory == NULL || before == NULL || take(out, ask->heads * scales.bytes) == NULL ||
        !leave_extra(out, ask) ||
        !rans_prepare_encoder(&table, ask->frequencies, size)) {
        return UNFIT;
    }
    uint8_t filling = filling_of(ask->frequencies, size);
    for (uint64_t i = 0; i < ask->heads; i++) {
        h->values = values + (int64_t)i * ask->head_stride;
        h->block = scales.stored + i * scales.bytes;
        words32(before)[i] = (uint32_t)found;
        found += chosen->ecsq_encode(h, symbols, escapes + found);
        if (h->is_broken || found > out->size / 2 ||
            !put_streams(
                out, words32(directory) + i * per_head, &table, filling, symbols, count)) {
            return UNFIT;
        }
    }
    words32(before)[ask->heads] = (uint32_t)found;
    words32(directory)[entries] = (uint32_t)out->at;
    uint8_t *list = give(out, 2 * found);
    if (list == NULL) {
        return UNFIT;
    }
    memcpy(list, escapes, 2 * found);
    return DONE;
}

static int ecsq_encode(head *h, room *out, uint8_t *values) {
    uint64_t count = h->ask->tokens * h->ask->width;
    if (!has_sound_table(h->ask)) {
        return BAD_REQUEST;
    }
    uint8_t *symbols = malloc(count);
    any16 *escapes = malloc(out->size + 2 * count); /* the cap, and what one head can add to it */
    int status = symbols == NULL || escapes == NULL ? NO_MEMORY
                                                    : ecsq_put(h, out, values, symbols, escapes);
    free(symbols);
    free(escapes);
    return status;
}

static int ecsq_take(head *h, room *in, uint8_t *values, uint64_t first, uint64_t end,
    uint8_t *symbols) {
    const request *ask = h->ask;
    uint64_t count = ask->tokens * ask->width, per_head = streams_of(count);
    uint64_t entries = ask->heads * per_head, size = 2 * ask->bound + 2;
    rans_decoder table;
    if (!rans_prepare_decoder(&table, ask->frequencies, size)) {
        return BAD_REQUEST;
    }
    uint8_t *directory = take(in, 4 * (entries + 1)), *before = take(in, 4 * (ask->heads + 1));
    parameters scales = ecsq_parameters(ask, in->base + in->at);
    if (directory == NULL || before == NULL || take(in, ask->heads * scales.bytes) == NULL ||
        take(in, ask->heads * extra_bytes(ask)) == NULL || !does_ascend(words32(directory), entries) ||
        !does_ascend(words32(before), ask->heads) || words32(before)[0] != 0) {
        return BAD_BYTES;
    }
    in->at = words32(directory)[entries];
    if (in->at > in->size || in->at % 16 != 0) {
        return BAD_BYTES;
    }
    const uint8_t *list = take(in, 2 * (uint64_t)words32(before)[ask->heads]);
    if (list == NULL || in->at != in->size) {
        return BAD_BYTES;
    }
    uint8_t filling = filling_of(ask->frequencies, size);
    for (uint64_t i = first; i < end; i++) {
        const any32 *entry = words32(directory) + i * per_head;
        uint64_t from = words32(before)[i], held = words32(before)[i + 1] - from;
        h->values = values + (int64_t)(i - first) * ask->head_stride;
        h->block = scales.stored + i * scales.bytes;
        if (!take_streams(in, entry, &table, filling, symbols, count) ||
            !chosen->ecsq_decode(h, symbols, words16((uint8_t *)(uintptr_t)list) + from, held)) {
            return BAD_BYTES;
        }
    }
    return DONE;
}

static int ecsq_decode(head *h, room *in, uint8_t *values, uint64_t first, uint64_t end) {
    if (!has_sound_table(h->ask)) {
        return BAD_REQUEST;
    }
    uint8_t *symbols = malloc(h->ask->tokens * h->ask->width);
    if (symbols == NULL) {
        return NO_MEMORY;
    }
    int status = ecsq_take(h, in, values, first, end, symbols);
    free(symbols);
    return status;
}
