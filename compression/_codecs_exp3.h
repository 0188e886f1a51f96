/* exp3, a section at a time; see _codecs_sections.h. */

/* Offsets of a tile, readable beyond their end as far as planes and marks need it. */
enum { OFFSETS = (KV_TILE + 8) * BLOCK + 64, MARKS = KV_TILE * BLOCK / 64 };

static uint64_t tile_bytes(int mode, uint64_t rows, uint64_t n, uint64_t escapes) {
    if (mode == MODE_RAW) {
        return kv_pad16(2 * rows * n);
    }
    uint64_t planes = mode == MODE_EXP3
                          ? kv_pad16(kv_ceil(rows, 4) * n) + kv_pad16(kv_ceil(rows, 8) * n)
                          : kv_pad16(kv_ceil(rows, 2) * n);
    return kv_pad16(n) + kv_pad16(rows * n) + planes + 16 + kv_pad16(escapes);
}

/* --- encoding -------------------------------------------------------------------------------------- */

/* A tile taken apart. */
typedef struct {
    uint8_t largest[BLOCK], rest[KV_TILE * BLOCK], exponents[KV_TILE * BLOCK + 64];
    uint8_t offsets[OFFSETS];
    uint64_t marks[MARKS]; /* which offsets are escapes */
} parted;

/* Split the rows of a tile under *escape* and mark the escapes; return how many there are. */
static uint64_t split_tile(
    const head *h, uint64_t first, uint64_t rows, uint8_t escape, parted *to) {
    uint64_t n = h->ask->width;
    for (uint64_t t = 0, at = 0; t < rows; t++, at += n) {
        const any16 *bits = words16(values_at(h, first + t));
        chosen->split_row(
            bits, to->largest, escape, to->rest + at, to->exponents + at, to->offsets + at, n);
    }
    return chosen->mark_bytes(to->offsets, rows * n, escape, to->marks);
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
    uint8_t list[KV_TILE * BLOCK + TAKEN_AT_ONCE];
    parted tile;
    chosen->largest_exponents(values_at(h, first), h->ask->token_stride, rows, tile.largest, n);
    memset(tile.offsets + rows * n, 0, 8 * n + 64);
    memset(tile.exponents + rows * n, 0, 64);
    uint64_t escapes = split_tile(h, first, rows, 7, &tile);
    uint64_t size = tile_bytes(MODE_EXP3, rows, n, escapes);
    int mode = MODE_EXP3;
    if (size > tile_bytes(MODE_EXP4, rows, n, 0)) {
        uint64_t fewer = split_tile(h, first, rows, 15, &tile);
        if (tile_bytes(MODE_EXP4, rows, n, fewer) < size) {
            mode = MODE_EXP4;
            escapes = fewer;
            size = tile_bytes(MODE_EXP4, rows, n, fewer);
        } else {
            split_tile(h, first, rows, 7, &tile);
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
    memcpy(give(out, n), tile.largest, n);
    memcpy(give(out, rows * n), tile.rest, rows * n);
    put_planes(out, mode, tile.offsets, rows, n);
    *words32(give(out, 4)) = (uint32_t)escapes;
    chosen->gather_marked(tile.exponents, tile.marks, rows * n, list);
    memcpy(give(out, escapes), list, escapes);
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

/* --- decoding -------------------------------------------------------------------------------------- */

static int take_tile(room *in, const head *h, int mode, uint64_t first, uint64_t rows) {
    uint64_t n = h->ask->width, marks[MARKS];
    uint8_t offsets[OFFSETS];
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
    memset(offsets, 0, (rows + 8) * n + 64);
    chosen->unpack_plane(plane, wide, mode == MODE_EXP3 ? 2 : 4, 0, offsets, n);
    if (top != NULL) {
        chosen->unpack_plane(top, one, 1, 2, offsets, n);
    }
    if (chosen->mark_bytes(offsets, rows * n, mode == MODE_EXP3 ? 7 : 15, marks) != count) {
        return 0;
    }
    for (uint64_t t = 0; t < rows; t++) {
        chosen->below_largest(largest, offsets + t * n, n);
    }
    chosen->scatter_marked(offsets, marks, rows * n, list, count);
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
