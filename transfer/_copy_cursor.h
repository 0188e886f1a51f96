/* The scattered side of a copy: a place in runs of pieces, and what is read and written there. */

/* Run i is inner_count pieces of piece_bytes, inner_stride apart, the first at addresses[i].
 * Python fills this in (Pieces in native.py): the fields and their order are known there too. */
typedef struct {
    const uint64_t *addresses;
    uint64_t count;
    uint64_t piece_bytes;
    uint64_t inner_count;
    uint64_t inner_stride;
} runs;

/* A place in the byte order of the runs. */
typedef struct {
    const runs *of;
    uint64_t run;
    uint64_t inner;
    uint64_t offset;
} cursor;

static cursor cursor_at(const runs *of, uint64_t position) {
    uint64_t piece = position / of->piece_bytes;
    return (cursor){
        .of = of,
        .run = piece / of->inner_count,
        .inner = piece % of->inner_count,
        .offset = position % of->piece_bytes,
    };
}

static int cursor_ended(const cursor *at) { return at->run >= at->of->count; }

static uint64_t cursor_room(const cursor *at) { return at->of->piece_bytes - at->offset; }

static uint8_t *cursor_address(const cursor *at) {
    uint64_t address = at->of->addresses[at->run] + at->inner * at->of->inner_stride + at->offset;
    return (uint8_t *)(uintptr_t)address;
}

/* Advance by at most the room that is left in the piece. */
static void cursor_skip(cursor *at, uint64_t size) {
    at->offset += size;
    if (at->offset == at->of->piece_bytes) {
        at->offset = 0;
        at->inner++;
        if (at->inner == at->of->inner_count) {
            at->inner = 0;
            at->run++;
        }
    }
}

static void read_pieces(cursor *at, uint8_t *to, uint64_t size) {
    while (size > 0) {
        uint64_t step = smaller(cursor_room(at), size);
        memcpy(to, cursor_address(at), step);
        cursor_skip(at, step);
        to += step;
        size -= step;
    }
}

static void write_pieces(cursor *at, const uint8_t *from, uint64_t size) {
    while (size > 0) {
        uint64_t step = smaller(cursor_room(at), size);
        chosen->stream(cursor_address(at), from, step);
        cursor_skip(at, step);
        from += step;
        size -= step;
    }
}

static void prefetch_pieces(cursor at, uint64_t size) {
    while (size > 0 && !cursor_ended(&at)) {
        uint64_t step = smaller(cursor_room(&at), size);
        const uint8_t *address = cursor_address(&at);
        for (uint64_t i = 0; i < step; i += LINE) {
            __builtin_prefetch(address + i);
        }
        cursor_skip(&at, step);
        size -= step;
    }
}
