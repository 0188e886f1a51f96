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

/* How many of *count* symbols, which begin *first*, are coded together: TOGETHER whole streams, or
 * what is left of one. */
static uint64_t symbols_together(uint64_t first, uint64_t count) {
    uint64_t left = count - first;
    return left >= TOGETHER * STREAM_SYMBOLS ? TOGETHER * STREAM_SYMBOLS
                                             : lesser(STREAM_SYMBOLS, left);
}

/* Append an encoded stream; return 0 when there is no room. */
static int put_stream(room *out, any32 *entry, const rans_stream *s) {
    size_t used = STREAM_SYMBOLS - s->at;
    *entry = (uint32_t)out->at;
    uint8_t *stream = give(out, STREAM_HEAD + 2 * used);
    if (stream == NULL) {
        return 0;
    }
    memset(stream, 0, 16);
    *words32(stream) = (uint32_t)used;
    memcpy(stream + 16, s->states, sizeof s->states);
    memcpy(stream + STREAM_HEAD, s->words + s->at, 2 * used);
    return 1;
}

/* Append the streams of a head; return 0 when there is no room. */
static int put_streams(room *out, any32 *directory, const rans_encoder *table, uint8_t filling,
    const uint8_t *symbols, uint64_t count) {
    any16 words[TOGETHER][STREAM_SYMBOLS];
    uint8_t last[STREAM_SYMBOLS];
    rans_stream s[TOGETHER];
    for (uint64_t first = 0, held; first < count; first += held) {
        held = symbols_together(first, count);
        size_t streams = streams_of(held), steps = kv_ceil(held / streams, KV_RANS_LANES);
        for (size_t k = 0; k < streams; k++) {
            s[k].symbols = (uint8_t *)(uintptr_t)symbols + first + k * STREAM_SYMBOLS;
            s[k].words = words[k];
            s[k].at = STREAM_SYMBOLS;
            s[k].steps = steps;
            for (size_t lane = 0; lane < KV_RANS_LANES; lane++) {
                s[k].states[lane] = KV_RANS_LOW;
            }
        }
        if (held % KV_RANS_LANES != 0) {
            memcpy(last, symbols + first, held);
            memset(last + held, filling, steps * KV_RANS_LANES - held);
            s[0].symbols = last;
        }
        if (!rans_encode_streams(table, s, streams)) {
            return 0;
        }
        for (size_t k = 0; k < streams; k++) {
            if (!put_stream(out, directory++, &s[k])) {
                return 0;
            }
        }
    }
    return 1;
}

/* Find the stream between two offsets; return 0 unless it is one. */
static int take_stream(const room *in, uint64_t from, uint64_t to, rans_stream *s) {
    if (from % 16 != 0 || from > to || to > in->size || to - from < STREAM_HEAD) {
        return 0;
    }
    const any32 *start = words32(in->base + from);
    s->count = start[0];
    s->at = 0;
    s->words = words16(in->base + from + STREAM_HEAD);
    memcpy(s->states, start + 4, sizeof s->states);
    return start[1] == 0 && start[2] == 0 && start[3] == 0 &&
           kv_pad16(STREAM_HEAD + 2 * (uint64_t)s->count) == to - from;
}

/* Decode the streams of a head into *count* symbols; return 0 unless all are intact. */
static int take_streams(const room *in, const any32 *directory, const rans_decoder *table,
    uint8_t filling, uint8_t *symbols, uint64_t count) {
    uint8_t last[STREAM_SYMBOLS];
    rans_stream s[TOGETHER];
    for (uint64_t first = 0, held; first < count; first += held) {
        held = symbols_together(first, count);
        size_t streams = streams_of(held), steps = kv_ceil(held / streams, KV_RANS_LANES);
        int is_short = held % KV_RANS_LANES != 0;
        for (size_t k = 0; k < streams; k++, directory++) {
            s[k].symbols = is_short ? last : symbols + first + k * STREAM_SYMBOLS;
            s[k].steps = steps;
            if (!take_stream(in, directory[0], directory[1], &s[k])) {
                return 0;
            }
        }
        if (!rans_decode_streams(table, s, streams)) {
            return 0;
        }
        if (is_short) {
            for (size_t i = held; i < steps * KV_RANS_LANES; i++) {
                if (last[i] != filling) {
                    return 0;
                }
            }
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
