/* rans: exponents below the largest of their channel (half: high bytes), entropy coded with the
 * frequencies of the section; the rest of each value as it is. K and V are alike. */
#include "exp3.cuh"
#include "streams.cuh"

/* --- what is a symbol, and what is kept ------------------------------------------------------------------ */

template <int DTYPE> KV_INLINE constexpr int has_exponents() { return DTYPE != KV_FP16; }

template <int DTYPE> KV_INLINE constexpr uint32_t rest_planes() { return bytes_of<DTYPE>() - 1; }

template <int DTYPE> KV_INLINE uint32_t symbol_of(uint32_t bits) {
    return DTYPE == KV_BF16   ? kv_exp3_exponent(bits)
           : DTYPE == KV_FP16 ? bits >> 8
                              : bits >> 23 & 0xffu;
}

template <int DTYPE> KV_INLINE uint32_t rest_of(uint32_t bits, uint32_t plane) {
    return DTYPE == KV_BF16   ? kv_exp3_rest(bits)
           : DTYPE == KV_FP16 ? bits & 0xffu
           : plane == 2       ? kv_exp3_rest(bits >> 16)
                              : bits >> (8 * plane) & 0xffu;
}

/* The part of a value that a byte of a rest plane is. */
template <int DTYPE> KV_INLINE uint32_t bits_of_rest(uint32_t rest, uint32_t plane) {
    return DTYPE == KV_BF16   ? (rest & 0x80u) << 8 | (rest & 0x7fu)
           : DTYPE == KV_FP16 ? rest
           : plane == 2       ? (rest & 0x80u) << 24 | (rest & 0x7fu) << 16
                              : rest << (8 * plane);
}

template <int DTYPE> KV_INLINE uint32_t bits_of_symbol(uint32_t symbol) {
    return DTYPE == KV_BF16   ? (symbol & 0xffu) << 7
           : DTYPE == KV_FP16 ? symbol << 8
                              : (symbol & 0xffu) << 23;
}

/* --- where things lie ------------------------------------------------------------------------------------ */

/* Parts of a section; widths are multiples of 16, so that only directory and streams are padded. */
struct Parts {
    uint64_t directory, largest, rest, streams;
};

template <int DTYPE> KV_INLINE Parts parts_of(const Batch &batch) {
    Parts made;
    uint64_t values = (uint64_t)batch.heads * batch.tokens * batch.width;
    made.directory = 2 * KV_SYMBOLS;
    made.largest = made.directory + directory_bytes(streams_of(batch));
    made.rest = made.largest + (has_exponents<DTYPE>() ? batch.heads * batch.width : 0);
    made.streams = made.rest + rest_planes<DTYPE>() * values;
    return made;
}

/* Scratch of a section: counts of every head, the frequencies, the largest exponents, the streams. */
struct Scratch {
    uint32_t *counts, *entries;
    uint16_t *frequencies;
    uint8_t *largest;
};

KV_INLINE Scratch scratch_parts(const Batch &batch, const Place &at) {
    uint32_t counts = batch.heads * KV_SYMBOLS, frequencies = KV_SYMBOLS / 2;
    uint32_t largest = batch.heads * batch.width / 4;
    uint32_t *first = scratch_of(batch, at, counts + frequencies + largest + streams_of(batch));
    Scratch made;
    made.counts = first;
    made.frequencies = (uint16_t *)(first + counts);
    made.largest = (uint8_t *)(first + counts + frequencies);
    made.entries = first + counts + frequencies + largest;
    return made;
}

KV_INLINE uint32_t groups_of(const Batch &batch) {
    return (uint32_t)kv_ceil(streams_of(batch), KV_WARPS);
}

/* --- frequencies ------------------------------------------------------------------------------------------ */

/* The largest exponents of 64 channels of a head, over all tokens. */
template <int DTYPE>
KV_INLINE void find_largest(
    const Batch &batch, const Place &at, uint32_t first, uint8_t *stored, uint32_t *largest) {
    __shared__ SlabKeys found;
    uint32_t channel = first + threadIdx.x % KV_LANES * 8, bits[8];
    int32_t keys[8] = {0, 0, 0, 0, 0, 0, 0, 0};
#pragma unroll 1
    for (uint32_t t = threadIdx.x / KV_LANES; t < batch.tokens; t += KV_ROWS) {
        if (channel < batch.width) {
            unpack8<DTYPE>(load_values<DTYPE>(row_of(batch, at, t), channel), bits);
#pragma unroll
            for (int i = 0; i < 8; i++) {
                keys[i] = larger_key(keys[i], (int32_t)symbol_of<DTYPE>(bits[i]));
            }
        }
    }
    post_largest(keys, found);
    __syncthreads();
    if (threadIdx.x < KV_SLAB && first + threadIdx.x < batch.width) {
        largest[threadIdx.x] = (uint32_t)largest_of_channel(found, threadIdx.x);
        stored[first + threadIdx.x] = (uint8_t)largest[threadIdx.x];
    }
    __syncthreads();
}

/* A part is a head: count its symbols. */
template <int DTYPE> KV_INLINE void count(const Batch &batch, const Place &at) {
    __shared__ uint32_t counts[KV_WARPS][KV_SYMBOLS], largest[KV_SLAB];
    Scratch scratch = scratch_parts(batch, at);
    for (uint32_t i = 0; i < KV_WARPS; i++) {
        counts[i][threadIdx.x] = 0;
    }
    __syncthreads();
    for (uint32_t first = 0; first < batch.width; first += KV_SLAB) {
        uint32_t lane = threadIdx.x % KV_LANES * 8, bits[8];
        if (has_exponents<DTYPE>()) {
            uint8_t *stored = scratch.largest + at.head * batch.width;
            find_largest<DTYPE>(batch, at, first, stored, largest);
        }
        for (uint32_t t = threadIdx.x / KV_LANES; t < batch.tokens; t += KV_ROWS) {
            if (first + lane < batch.width) {
                unpack8<DTYPE>(load_values<DTYPE>(row_of(batch, at, t), first + lane), bits);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    uint32_t symbol = symbol_of<DTYPE>(bits[i]);
                    symbol = has_exponents<DTYPE>() ? largest[lane + i] - symbol : symbol;
                    atomicAdd(&counts[threadIdx.x / 32][symbol], 1u);
                }
            }
        }
        __syncthreads();
    }
    uint32_t total = 0;
    for (uint32_t i = 0; i < KV_WARPS; i++) {
        total += counts[i][threadIdx.x];
    }
    scratch.counts[at.head * KV_SYMBOLS + threadIdx.x] = total;
    __syncthreads();
}

/* A section's frequencies, a symbol a thread: floors of its share, at least one; what is missing
 * goes to the symbol that occurs most, what is too much comes from the most frequent. */
KV_INLINE void normalise(const Batch &batch, const Place &at) {
    Scratch scratch = scratch_parts(batch, at);
    uint64_t values = (uint64_t)batch.heads * batch.tokens * batch.width;
    uint32_t found = 0, total;
#pragma unroll 1
    for (uint32_t head = 0; head < batch.heads; head++) {
        found += scratch.counts[head * KV_SYMBOLS + threadIdx.x];
    }
    uint32_t frequency = (uint32_t)((uint64_t)found * KV_RANS_TOTAL / values);
    frequency = found > 0 && frequency == 0 ? 1u : frequency;
    sum_before(frequency, &total);
    uint32_t most = (uint32_t)largest_of_block((int32_t)found);
    int32_t lowest = largest_of_block(found == most ? 255 - (int32_t)threadIdx.x : -1);
    if (total < KV_RANS_TOTAL && (int32_t)threadIdx.x == 255 - lowest) {
        frequency += KV_RANS_TOTAL - total;
    }
    for (; total > KV_RANS_TOTAL; total--) {
        frequency -= threadIdx.x == filling_of(frequency);
    }
    scratch.frequencies[threadIdx.x] = (uint16_t)frequency;
}

/* --- streams ---------------------------------------------------------------------------------------------- */

/* Eight values of a group, as bits. */
template <int DTYPE>
KV_INLINE void load_eighth(
    const Batch &batch, const Stream &stream, const Eighth &eighth, uint32_t *bits) {
    const uint8_t *row = row_of(batch, stream.at, eighth.token);
    unpack8<DTYPE>(load_values<DTYPE>(row, eighth.channel), bits);
}

template <int DTYPE>
KV_INLINE void symbols_of(const uint32_t *bits, const uint8_t *largest, uint32_t *symbols) {
    uint32_t most[8];
    if (has_exponents<DTYPE>()) {
        load8(largest, most);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        uint32_t symbol = symbol_of<DTYPE>(bits[i]);
        symbols[i] = has_exponents<DTYPE>() ? most[i] - symbol : symbol;
    }
}

/* A part is a stream for each warp: how long they are. */
template <int DTYPE> KV_INLINE void measure(const Batch &batch, const Place &at) {
    __shared__ uint32_t symbols[KV_SYMBOLS];
    __shared__ Groups groups;
    Scratch scratch = scratch_parts(batch, at);
    uint32_t filling = prepare_encoder(scratch.frequencies[threadIdx.x], symbols), state;
    Stream stream = stream_of(batch, at);
    const uint8_t *largest = scratch.largest + stream.at.head * batch.width;
    auto source = [&](const Eighth &eighth, uint32_t *eight) {
        if (eighth.is_real) {
            uint32_t bits[8];
            load_eighth<DTYPE>(batch, stream, eighth, bits);
            symbols_of<DTYPE>(bits, largest + eighth.channel, eight);
        }
    };
    uint32_t words = encode_stream(batch, stream, groups, symbols, filling, nullptr, &state, source);
    if (stream.count > 0 && threadIdx.x % 32 == 0) {
        scratch.entries[stream.index] = stream_entry(words);
    }
    __syncthreads();
}

template <int DTYPE> KV_INLINE void total(const Batch &batch, const Place &at) {
    Scratch scratch = scratch_parts(batch, at);
    uint64_t raw = (uint64_t)batch.heads * batch.tokens * batch.width * bytes_of<DTYPE>();
    uint64_t first = parts_of<DTYPE>(batch).streams;
    close_section(batch, at, lay_pieces(scratch.entries, streams_of(batch), first), raw);
}

/* The values of the streams of a part, as they are. */
template <int DTYPE>
KV_INLINE void place_raw(const Batch &batch, const Stream &stream, uint8_t *section) {
    uint64_t whole = (uint64_t)batch.tokens * batch.width * bytes_of<DTYPE>();
#pragma unroll 1
    for (uint32_t g = 0; g * KV_GROUP < stream.count; g++) {
        Eighth eighth = eighth_of(batch, stream, g);
        if (eighth.is_real) {
            const uint8_t *row = row_of(batch, stream.at, eighth.token);
            uint8_t *flat = section + stream.at.head * whole +
                            (uint64_t)eighth.token * batch.width * bytes_of<DTYPE>();
            store_values<DTYPE>(flat, eighth.channel, load_values<DTYPE>(row, eighth.channel));
        }
    }
}

/* What stands before the rest planes; one block of the section writes it. */
template <int DTYPE>
KV_INLINE void place_tables(
    const Batch &batch, const Scratch &scratch, uint64_t size, uint8_t *section) {
    Parts parts = parts_of<DTYPE>(batch);
    uint32_t streams = streams_of(batch), words = (uint32_t)directory_bytes(streams) / 4;
    ((uint16_t *)section)[threadIdx.x] = scratch.frequencies[threadIdx.x];
    for (uint32_t i = threadIdx.x; i < words; i += KV_THREADS) {
        uint32_t entry = i < streams ? size_of_piece(scratch.entries[i]) : 0u;
        ((uint32_t *)(section + parts.directory))[i] = i == streams ? (uint32_t)size : entry;
    }
    for (uint32_t i = threadIdx.x; i < parts.rest - parts.largest; i += KV_THREADS) {
        section[parts.largest + i] = scratch.largest[i];
    }
}

template <int DTYPE> KV_INLINE void place(const Batch &batch, const Place &at) {
    __shared__ uint32_t symbols[KV_SYMBOLS];
    __shared__ Groups groups;
    Scratch scratch = scratch_parts(batch, at);
    Stream stream = stream_of(batch, at);
    uint8_t *section = section_of(batch, at);
    uint64_t size = span_of(batch, at)->size;
    uint32_t filling = prepare_encoder(scratch.frequencies[threadIdx.x], symbols), state;
    if (report_of(batch, at)->broken) {
        place_raw<DTYPE>(batch, stream, section);
        __syncthreads();
        return;
    }
    if (at.part == 0) {
        place_tables<DTYPE>(batch, scratch, size, section);
    }
    uint64_t values = (uint64_t)batch.tokens * batch.width;
    uint8_t *rest = section + parts_of<DTYPE>(batch).rest;
    rest += stream.at.head * rest_planes<DTYPE>() * values;
    const uint8_t *largest = scratch.largest + stream.at.head * batch.width;
    auto source = [&](const Eighth &eighth, uint32_t *eight) {
        if (eighth.is_real) {
            uint32_t bits[8], kept[8];
            load_eighth<DTYPE>(batch, stream, eighth, bits);
            symbols_of<DTYPE>(bits, largest + eighth.channel, eight);
            for (uint32_t plane = 0; plane < rest_planes<DTYPE>(); plane++) {
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    kept[i] = rest_of<DTYPE>(bits[i], plane);
                }
                uint64_t place = (uint64_t)eighth.token * batch.width + eighth.channel;
                store8(rest + plane * values + place, kept);
            }
        }
    };
    if (stream.count > 0) {
        uint32_t entry = scratch.entries[stream.index], last = stream.index + 1;
        uint64_t end = last < streams_of(batch) ? size_of_piece(scratch.entries[last]) : size;
        uint32_t words = words_of(entry, end);
        uint8_t *where = section + size_of_piece(entry);
        uint16_t *words_end = (uint16_t *)(where + KV_STREAM_HEAD) + words;
        encode_stream(batch, stream, groups, symbols, filling, words_end, &state, source);
        close_stream(where, words, state);
    }
    __syncthreads();
}

/* --- decoding --------------------------------------------------------------------------------------------- */

template <int DTYPE>
KV_INLINE void store_eighth(const Batch &batch, const Stream &stream, const Eighth &eighth,
    const uint32_t *symbols, const uint8_t *largest, const uint8_t *rest) {
    uint64_t values = (uint64_t)batch.tokens * batch.width;
    uint64_t place = (uint64_t)eighth.token * batch.width + eighth.channel;
    uint32_t bits[8], most[8], kept[8];
    if (has_exponents<DTYPE>()) {
        load8(largest + eighth.channel, most);
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        bits[i] = bits_of_symbol<DTYPE>(has_exponents<DTYPE>() ? most[i] - symbols[i] : symbols[i]);
    }
    for (uint32_t plane = 0; plane < rest_planes<DTYPE>(); plane++) {
        load8(rest + plane * values + place, kept);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            bits[i] |= bits_of_rest<DTYPE>(kept[i], plane);
        }
    }
    uint8_t *row = row_of(batch, stream.at, eighth.token);
    store_values<DTYPE>(row, eighth.channel, pack8<DTYPE>(bits));
}

/* What a section says of itself is not believed: nothing outside of it is read. */
template <int DTYPE> KV_INLINE void decode(const Batch &batch, const Place &at) {
    __shared__ uint32_t slots[KV_RANS_TOTAL];
    __shared__ Groups groups;
    const uint8_t *section = section_of(batch, at);
    uint64_t size = span_of(batch, at)->size;
    Parts parts = parts_of<DTYPE>(batch);
    uint32_t streams = streams_of(batch), filling = 0, state = 0;
    int is_sound = parts.streams <= size;
    if (is_sound) {
        const uint32_t *directory = (const uint32_t *)(section + parts.directory);
        is_sound = prepare_decoder(((const uint16_t *)section)[threadIdx.x], slots, &filling) &&
                   directory[streams] == size && does_ascend(directory, streams);
        Stream stream = stream_of(batch, at);
        if (is_sound && stream.count > 0) {
            const uint8_t *largest = section + parts.largest + stream.at.head * batch.width;
            const uint8_t *rest = section + parts.rest +
                                  (uint64_t)stream.at.head * rest_planes<DTYPE>() * batch.tokens *
                                      batch.width;
            auto sink = [&](const Eighth &eighth, const uint32_t *eight) {
                if (eighth.is_real) {
                    store_eighth<DTYPE>(batch, stream, eighth, eight, largest, rest);
                }
            };
            Taken from = open_stream(section, directory[stream.index],
                                     directory[stream.index + 1], size, &state);
            is_sound = decode_stream(batch, stream, groups, slots, filling, from, state, sink);
        }
    }
    report_damage(batch, at, !is_sound);
    __syncthreads();
}

#define BOTH(dtype, DTYPE)                                                                         \
    KV_KERNEL(rans_count_##dtype, 1, count<DTYPE>(batch, at))                                      \
    KV_SECTION_KERNEL(rans_normalise_##dtype, 1, normalise(batch, at))                             \
    KV_SECTION_KERNEL(rans_measure_##dtype, groups_of(batch), measure<DTYPE>(batch, at))           \
    KV_SECTION_KERNEL(rans_total_##dtype, 1, total<DTYPE>(batch, at))                              \
    KV_SECTION_KERNEL(rans_place_##dtype, groups_of(batch), place<DTYPE>(batch, at))               \
    KV_SECTION_KERNEL(rans_decode_##dtype, groups_of(batch), decode<DTYPE>(batch, at))

BOTH(bf16, KV_BF16)
BOTH(fp16, KV_FP16)
BOTH(fp32, KV_FP32)
