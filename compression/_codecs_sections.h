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
