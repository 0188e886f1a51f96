/* rans and ecsq, a section at a time; see _codecs_sections.h. */

/* --- rans: symbols and what is kept beside them ------------------------------------------------------ */

static int has_exponents(const request *ask) {
    return ask->source == SOURCE_BF16 || ask->source == SOURCE_FP32;
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
        chosen->split_values(ask->source, values_at(h, t), symbols + t * n, rest, rows * n);
    }
    if (!has_exponents(ask)) {
        return;
    }
    memset(largest, 0, n);
    for (uint64_t t = 0; t < ask->tokens; t++) {
        chosen->raise_largest(largest, symbols + t * n, n);
    }
    for (uint64_t t = 0; t < ask->tokens; t++) {
        chosen->below_largest(largest, symbols + t * n, n);
    }
}

static void count_symbols(const uint8_t *symbols, uint64_t count, uint64_t *counts) {
    uint64_t some[4][SYMBOLS] = {{0}}; /* four, so that equal neighbours do not wait for each other */
    uint64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        uint64_t word = *(const any64 *)(const void *)(symbols + i);
#pragma GCC unroll 8
        for (int k = 0; k < 8; k++) {
            some[k % 4][word >> 8 * k & 0xff]++;
        }
    }
    for (; i < count; i++) {
        some[0][symbols[i]]++;
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
            if (has_exponents(ask)) {
                chosen->below_largest(top, row, n);
            }
            chosen->merge_values(ask->source, row, found, values_at(h, t), rows * n);
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
    uint8_t *symbols = malloc(count + 64); /* marks are made of 64 at a time */
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
    uint8_t *symbols = malloc(h->ask->tokens * h->ask->width + 64);
    if (symbols == NULL) {
        return NO_MEMORY;
    }
    int status = ecsq_take(h, in, values, first, end, symbols);
    free(symbols);
    return status;
}
