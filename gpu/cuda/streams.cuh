/* rANS streams on a GPU: a warp is the 32 lanes of a stream, a block has as many streams as warps.
 *
 * Symbols pass through shared memory in groups of 256, eight steps: there a lane has eight that
 * follow each other, so that values are moved in whole vectors; here it has one in each step.
 * Streams are encoded twice: to know how long they are, and into the place that follows from it.
 * So no words wait anywhere, whatever their number.
 */
#ifndef KVSTORE_STREAMS_CUH
#define KVSTORE_STREAMS_CUH

#include "rans.cuh"
#include "spans.cuh"

#define KV_STREAM 8192u
#define KV_STREAM_HEAD 144u /* bytes before the words: their number, and the states */
#define KV_GROUP 256u
#define KV_GROUP_STEPS (KV_GROUP / KV_RANS_LANES)
#define KV_SYMBOLS 256u

KV_INLINE uint32_t head_streams(const Batch &batch) {
    return (uint32_t)kv_ceil((uint64_t)batch.tokens * batch.width, KV_STREAM);
}

KV_INLINE uint32_t streams_of(const Batch &batch) { return batch.heads * head_streams(batch); }

/* Eight symbols a lane, in the order of the values. */
typedef uint8_t Groups[KV_WARPS][KV_GROUP];

/* The stream of this warp: stream *index* of the section, and of its head. */
struct Stream {
    Place at;       /* of its head */
    uint32_t index; /* of the section; none when not below *count* */
    uint32_t first; /* symbol of the head */
    uint32_t count; /* symbols */
};

KV_INLINE Stream stream_of(const Batch &batch, const Place &at) {
    Stream made = {at, at.part * KV_WARPS + threadIdx.x / 32, 0, 0};
    uint32_t each = head_streams(batch), whole = batch.tokens * batch.width;
    if (made.index < streams_of(batch)) {
        made.at.head = made.index / each;
        made.first = made.index % each * KV_STREAM;
        made.count = smaller(KV_STREAM, whole - made.first);
    }
    return made;
}

KV_INLINE uint32_t steps_of(const Stream &stream) {
    return (uint32_t)kv_ceil(stream.count, KV_RANS_LANES);
}

/* Token and channel of the first of a lane's eight symbols of a group; widths are multiples of 8. */
struct Eighth {
    uint32_t token, channel;
    int is_real; /* it lies within the stream */
};

KV_INLINE Eighth eighth_of(const Batch &batch, const Stream &stream, uint32_t group) {
    uint32_t within = group * KV_GROUP + threadIdx.x % 32 * 8, at = stream.first + within;
    return Eighth{at / batch.width, at % batch.width, within < stream.count};
}

/* --- frequencies --------------------------------------------------------------------------------------- */

/* The most frequent symbol, the lowest of equals, from one frequency a thread. */
KV_CALL uint32_t filling_of(uint32_t frequency) {
    int32_t found = largest_of_block((int32_t)(frequency * KV_SYMBOLS + 255u - threadIdx.x));
    return 255u - (uint32_t)found % KV_SYMBOLS;
}

/* Frequency and start of every symbol, for the encoder; return the symbol that fills up. */
KV_CALL uint32_t prepare_encoder(uint32_t frequency, uint32_t *symbols) {
    uint32_t total, start = sum_before(frequency, &total);
    symbols[threadIdx.x] = frequency | start << 16;
    uint32_t filling = filling_of(frequency);
    __syncthreads();
    return filling;
}

/* A slot for each 4096th, for the decoder; return whether the frequencies add up. */
KV_CALL int prepare_decoder(uint32_t frequency, uint32_t *slots, uint32_t *filling) {
    __shared__ uint32_t symbols[KV_SYMBOLS];
    uint32_t total, start = sum_before(frequency, &total);
    *filling = filling_of(frequency);
    if (total != KV_RANS_TOTAL) {
        return 0;
    }
    symbols[threadIdx.x] = start;
    __syncthreads();
    for (uint32_t slot = threadIdx.x; slot < KV_RANS_TOTAL; slot += KV_THREADS) {
        uint32_t symbol = 0; /* the last that begins at the slot or before */
        for (uint32_t step = KV_SYMBOLS / 2; step > 0; step /= 2) {
            symbol += symbols[symbol + step] <= slot ? step : 0u;
        }
        uint32_t end = symbol == KV_SYMBOLS - 1 ? KV_RANS_TOTAL : symbols[symbol + 1];
        slots[slot] = kv_rans_slot(symbol, end - symbols[symbol], slot - symbols[symbol]);
    }
    __syncthreads();
    return 1;
}

/* --- encoding ------------------------------------------------------------------------------------------ */

/* Push one group's symbols, the last step first. Words go before *end*, when there is where; return
 * how many there were. */
KV_INLINE uint32_t push_group(const uint8_t *group, uint32_t steps, const uint32_t *symbols,
    uint32_t *state, uint16_t *end) {
    uint32_t lane = threadIdx.x % 32, before = (1u << lane) - 1u, given = 0;
#pragma unroll 1
    for (uint32_t step = steps; step-- > 0;) {
        uint32_t symbol = symbols[group[step * KV_RANS_LANES + lane]];
        uint32_t frequency = symbol & 0xffffu;
        int gives = kv_rans_gives_word(*state, frequency);
        uint32_t votes = __ballot_sync(KV_EVERY_LANE, gives);
        given += (uint32_t)__popc(votes);
        if (gives) {
            if (end != nullptr) {
                *(end - given + __popc(votes & before)) = (uint16_t)*state;
            }
            *state >>= 16;
        }
        *state = kv_rans_push(*state, frequency, symbol >> 16);
    }
    return given;
}

/* Encode the stream of this warp. *source* fills a group: source(eighth, eight symbols). The words
 * end at *end*, when that is not null. Return how many there were, and the lane's state. */
template <class Source>
KV_INLINE uint32_t encode_stream(const Batch &batch, const Stream &stream, Groups &groups,
    const uint32_t *symbols, uint32_t filling, uint16_t *end, uint32_t *state, Source source) {
    uint8_t *group = groups[threadIdx.x / 32];
    uint32_t steps = steps_of(stream), words = 0;
    *state = KV_RANS_LOW;
    for (uint32_t g = (uint32_t)kv_ceil(stream.count, KV_GROUP); g-- > 0;) {
        uint32_t eight[8] = {filling, filling, filling, filling,
                             filling, filling, filling, filling};
        source(eighth_of(batch, stream, g), eight);
        store8(group + threadIdx.x % 32 * 8, eight);
        __syncwarp();
        uint32_t held = smaller(KV_GROUP_STEPS, steps - g * KV_GROUP_STEPS);
        words += push_group(group, held, symbols, state, end == nullptr ? end : end - words);
        __syncwarp();
    }
    return words;
}

/* What a stream of so many words takes; how much of it is padding stands in the low bits. */
KV_INLINE uint32_t stream_entry(uint32_t words) {
    uint32_t size = KV_STREAM_HEAD + 2 * words;
    return (uint32_t)kv_pad16(size) | ((uint32_t)kv_pad16(size) - size) / 2;
}

/* The words of a stream between its entry and where the next begins. */
KV_INLINE uint32_t words_of(uint32_t entry, uint64_t end) {
    return (uint32_t)(end - size_of_piece(entry) - KV_STREAM_HEAD) / 2 - (entry & KV_PIECE_MARKS);
}

/* Write what stands before and behind the words, once the lanes know their states. */
KV_INLINE void close_stream(uint8_t *at, uint32_t words, uint32_t state) {
    uint32_t *head = (uint32_t *)at, lane = threadIdx.x % 32;
    if (lane < 4) {
        head[lane] = lane == 0 ? words : 0u;
    }
    head[4 + lane] = state;
    uint64_t size = KV_STREAM_HEAD + 2 * words;
    if (2 * lane < kv_pad16(size) - size) {
        ((uint16_t *)(at + size))[lane] = 0;
    }
}

/* --- decoding ------------------------------------------------------------------------------------------ */

/* A stream being read, by one warp. */
struct Taken {
    const uint16_t *words;
    uint32_t count, used;
    int is_sound;
};

/* Find the stream between two places of a section, and check that it is one. */
KV_INLINE Taken open_stream(
    const uint8_t *section, uint64_t from, uint64_t to, uint64_t size, uint32_t *state) {
    Taken made = {nullptr, 0, 0, 0};
    if (from % 16 != 0 || to > size || from > to || to - from < KV_STREAM_HEAD) {
        return made;
    }
    const uint32_t *head = (const uint32_t *)(section + from);
    made.count = head[0];
    made.is_sound = (head[1] | head[2] | head[3]) == 0 &&
                    kv_pad16(KV_STREAM_HEAD + 2 * (uint64_t)made.count) == to - from;
    made.words = (const uint16_t *)(section + from + KV_STREAM_HEAD);
    *state = head[4 + threadIdx.x % 32];
    return made;
}

/* Take the symbols of one group; words beyond the last are not read. */
KV_INLINE void take_group(
    Taken &from, uint32_t steps, const uint32_t *slots, uint32_t *state, uint8_t *group) {
    uint32_t lane = threadIdx.x % 32, before = (1u << lane) - 1u;
#pragma unroll 1
    for (uint32_t step = 0; step < steps; step++) {
        uint32_t slot = slots[*state & (KV_RANS_TOTAL - 1u)];
        group[step * KV_RANS_LANES + lane] = (uint8_t)kv_rans_symbol(slot);
        *state = kv_rans_advance(*state, slot);
        int needs = kv_rans_needs_word(*state);
        uint32_t votes = __ballot_sync(KV_EVERY_LANE, needs);
        uint32_t place = from.used + (uint32_t)__popc(votes & before);
        if (needs) {
            *state = *state << 16 | (place < from.count ? from.words[place] : 0u);
        }
        from.used += (uint32_t)__popc(votes);
    }
}

/* Decode the stream of this warp: sink(eighth, eight symbols) for each group. Return whether it was
 * intact, for every lane. */
template <class Sink>
KV_INLINE int decode_stream(const Batch &batch, const Stream &stream, Groups &groups,
    const uint32_t *slots, uint32_t filling, Taken from, uint32_t state, Sink sink) {
    uint8_t *group = groups[threadIdx.x / 32];
    uint32_t steps = steps_of(stream);
    int is_sound = from.is_sound;
    for (uint32_t g = 0; is_sound && g * KV_GROUP < stream.count; g++) {
        uint32_t held = smaller(KV_GROUP_STEPS, steps - g * KV_GROUP_STEPS), eight[8];
        take_group(from, held, slots, &state, group);
        __syncwarp();
        load8(group + threadIdx.x % 32 * 8, eight);
        Eighth eighth = eighth_of(batch, stream, g);
        int is_filled = !eighth.is_real && threadIdx.x % 32 * 8 < held * KV_RANS_LANES;
        int is_odd = 0;
#pragma unroll
        for (int i = 0; i < 8; i++) {
            is_odd |= is_filled && eight[i] != filling;
        }
        is_sound = __ballot_sync(KV_EVERY_LANE, is_odd) == 0;
        sink(eighth, eight);
        __syncwarp();
    }
    int is_over = from.used == from.count && state == KV_RANS_LOW;
    return is_sound && __ballot_sync(KV_EVERY_LANE, is_over) == KV_EVERY_LANE;
}

/* Whether a directory ascends; every block of a section finds out for itself. */
KV_CALL int does_ascend(const uint32_t *directory, uint32_t entries) {
    uint32_t steps = 0, all;
    for (uint32_t i = threadIdx.x; i < entries; i += KV_THREADS) {
        steps += directory[i] > directory[i + 1];
    }
    sum_before(steps, &all);
    return all == 0;
}

/* Say that a section is damaged, for a warp. */
KV_INLINE void report_damage(const Batch &batch, const Place &at, int is_damaged) {
    if (is_damaged && threadIdx.x % 32 == 0) {
        atomicOr(&report_of(batch, at)->broken, 1u);
    }
}

#endif
