/* ecsq: steps of the deviation (of a channel for K, of a token for V), entropy coded with tables that
 * everybody has; what lies too far out is listed. Widths are multiples of 16, up to KV_WIDTH_MAX. */
#include "ecsq.cuh"
#include "means.cuh"
#include "streams.cuh"

#define KV_POWER_MAX 1024 /* the power of two that no width exceeds */

/* What a preset says about K or V: where it lies is the `table` of a batch, whose sections are all of
 * that kind. CODING in gpu/batches.py says the same. */
struct Coding {
    float delta;
    uint32_t bound, kind, unused;
    uint16_t frequencies[KV_SYMBOLS];
};

KV_INLINE const Coding &coding_of(const Batch &batch) { return *(const Coding *)batch.table; }

KV_INLINE int is_keys(const Batch &batch) { return coding_of(batch).kind == KV_KEYS; }

/* --- where things lie ------------------------------------------------------------------------------------ */

/* Stored parameters of a head: means and deviations (K), or deviations (V). */
KV_INLINE uint64_t scales_bytes(const Batch &batch) {
    return is_keys(batch) ? 4 * (uint64_t)batch.width : kv_pad16(2 * (uint64_t)batch.tokens);
}

struct Parts {
    uint64_t before, scales, sides, streams;
};

KV_INLINE Parts parts_of(const Batch &batch) {
    Parts made;
    made.before = directory_bytes(streams_of(batch));
    made.scales = made.before + directory_bytes(batch.heads);
    made.sides = made.scales + batch.heads * scales_bytes(batch);
    made.streams = made.sides + batch.heads * batch.extra;
    return made;
}

/* Scratch of a section: parameters, the streams and their end, their escapes and how many there are. */
struct Scratch {
    uint8_t *scales;
    uint32_t *entries, *escapes;
};

KV_INLINE Scratch scratch_parts(const Batch &batch, const Place &at) {
    uint32_t streams = streams_of(batch) + 1;
    uint64_t scales = batch.heads * larger(batch.width, (uint32_t)kv_pad16(2 * batch.tokens) / 4);
    uint32_t *first = scratch_of(batch, at, scales + 2 * streams);
    return Scratch{(uint8_t *)first, first + scales, first + scales + streams};
}

KV_INLINE uint32_t groups_of(const Batch &batch) {
    return (uint32_t)kv_ceil(streams_of(batch), KV_WARPS);
}

/* --- parameters ------------------------------------------------------------------------------------------- */

KV_INLINE uint8_t *scales_of(const Batch &batch, const Place &at) {
    return scratch_parts(batch, at).scales + at.head * scales_bytes(batch);
}

/* K: a part is a head. */
template <int DTYPE> KV_INLINE void scale_keys(const Batch &batch, const Place &at) {
    __shared__ float means[KV_WIDTH_MAX], sigmas[KV_WIDTH_MAX];
    uint8_t *stored = scales_of(batch, at);
    int broken = take_means<DTYPE>(batch, at, stored, means);
    broken |= take_deviations<DTYPE>(batch, at, stored + 2 * batch.width, means, sigmas);
    if (broken) {
        atomicOr(&report_of(batch, at)->broken, 1u);
    }
}

/* V: a part is a tile, a warp takes one token at a time. */
template <int DTYPE> KV_INLINE void scale_values(const Batch &batch, const Place &at) {
    __shared__ float trees[KV_WARPS][KV_POWER_MAX];
    float *tree = trees[threadIdx.x / 32];
    uint32_t lane = threadIdx.x % 32, first = at.part * KV_TILE, power = 1;
    uint16_t *stored = (uint16_t *)scales_of(batch, at);
    while (power < batch.width) {
        power *= 2;
    }
    for (uint32_t t = first + threadIdx.x / 32; t < smaller(first + KV_TILE, batch.tokens);
         t += KV_WARPS) {
        const uint8_t *row = row_of(batch, at, t);
        for (uint32_t c = lane; c < power; c += 32) {
            float value = c < batch.width && t >= batch.sinks ? read1<DTYPE>(row, c) : 0.0f;
            tree[c] = kv_mul(value, value);
        }
        __syncwarp();
        for (uint32_t half = power / 2; half > 0; half /= 2) {
            for (uint32_t c = lane; c < half; c += 32) {
                tree[c] = kv_add(tree[c], tree[c + half]);
            }
            __syncwarp();
        }
        uint16_t bits = kv_bf16_scale_of_float(kv_sqrt(kv_div(tree[0], (float)batch.width)));
        __syncwarp();
        if (lane == 0) {
            stored[t] = kv_bf16_without_subnormals(bits);
            if (kv_bf16_is_broken(bits)) {
                atomicOr(&report_of(batch, at)->broken, 1u);
            }
        }
    }
}

/* The centres and steps of eight values of a token. */
KV_INLINE void scales8(const Batch &batch, const uint8_t *scales, const Eighth &eighth, float delta,
    float *means, float *steps) {
    if (is_keys(batch)) {
        widen8<KV_FP16>(load_values<KV_FP16>(scales, eighth.channel), means);
        widen8<KV_BF16>(load_values<KV_BF16>(scales + 2 * batch.width, eighth.channel), steps);
    } else {
        float step = kv_float_of_bf16(((const uint16_t *)scales)[eighth.token]);
#pragma unroll
        for (int i = 0; i < 8; i++) {
            means[i] = -0.0f; /* what changes nothing when added, not even a sign */
            steps[i] = step;
        }
    }
#pragma unroll
    for (int i = 0; i < 8; i++) {
        steps[i] = kv_ecsq_step(steps[i], delta);
    }
}

/* --- symbols ---------------------------------------------------------------------------------------------- */

/* Eight values and their symbols. */
struct Eight {
    float values[8], means[8], steps[8];
    uint32_t far; /* which are escapes */
    int is_sink;
};

template <int DTYPE>
KV_INLINE Eight code_eight(const Batch &batch, const Stream &stream, const Eighth &eighth,
    const uint8_t *scales, const Coding &coding, uint32_t *symbols) {
    Eight made;
    made.far = 0;
    made.is_sink = eighth.token < batch.sinks;
    read8<DTYPE>(batch, stream.at, eighth.token, eighth.channel, made.values);
    scales8(batch, scales, eighth, coding.delta, made.means, made.steps);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        float away = kv_sub(made.values[i], made.means[i]);
        int32_t code = kv_ecsq_code(away, kv_inverse(made.steps[i]), coding.bound);
        symbols[i] = made.is_sink ? coding.bound : kv_ecsq_symbol(code, coding.bound);
        made.far |= (uint32_t)(symbols[i] == 2 * coding.bound + 1) << i;
    }
    return made;
}

KV_INLINE float value_of(const Eight &eight, int i, uint32_t symbol, uint32_t bound) {
    return kv_ecsq_value(symbol, bound, eight.steps[i], eight.means[i]);
}

/* A sum over the lanes before this one; *total* is over all. Nothing to do where there is nothing. */
KV_INLINE uint32_t lanes_before(uint32_t value, uint32_t *total) {
    *total = 0;
    if (__ballot_sync(KV_EVERY_LANE, value != 0) == 0) {
        return 0;
    }
    uint32_t lane = threadIdx.x % 32, upto = value;
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        uint32_t other = __shfl_up_sync(KV_EVERY_LANE, upto, distance);
        upto += lane >= distance ? other : 0u;
    }
    *total = __shfl_sync(KV_EVERY_LANE, upto, 31);
    return upto - value;
}

/* --- encoding --------------------------------------------------------------------------------------------- */

/* A part is a stream for each warp: how long they are, how many escapes they have, what is lost. */
template <int DTYPE> KV_INLINE void measure(const Batch &batch, const Place &at) {
    __shared__ uint32_t symbols[KV_SYMBOLS];
    __shared__ Groups groups;
    const Coding &coding = coding_of(batch);
    Scratch scratch = scratch_parts(batch, at);
    uint32_t filling = prepare_encoder(coding.frequencies[threadIdx.x], symbols), state;
    Stream stream = stream_of(batch, at);
    const uint8_t *scales = scales_of(batch, stream.at);
    float error = 0.0f, energy = 0.0f;
    uint32_t far = 0, all;
    int broken = 0;
    auto source = [&](const Eighth &eighth, uint32_t *eight) {
        if (eighth.is_real) {
            Eight found = code_eight<DTYPE>(batch, stream, eighth, scales, coding, eight);
            far += (uint32_t)__popc(found.far);
            energy = kv_add(energy, energy8(found.values));
#pragma unroll
            for (int i = 0; i < 8; i++) {
                uint16_t listed = kv_bf16_scale_of_float(found.values[i]);
                int is_far = found.far >> i & 1u;
                broken |= kv_size_bits(found.values[i]) >= KV_INFINITE_BITS ||
                          (is_far && kv_bf16_is_broken(listed));
                float value = is_far ? kv_float_of_bf16(listed)
                                     : value_of(found, i, eight[i], coding.bound);
                float missed = found.is_sink ? 0.0f : kv_sub(found.values[i], value);
                error = kv_add(error, kv_mul(missed, missed));
            }
        }
    };
    uint32_t words = encode_stream(batch, stream, groups, symbols, filling, nullptr, &state, source);
    lanes_before(far, &all);
    if (stream.count > 0 && threadIdx.x % 32 == 0) {
        scratch.entries[stream.index] = stream_entry(words);
        scratch.escapes[stream.index] = all;
    }
    report(batch, at, error, energy, broken);
}

KV_INLINE void total(const Batch &batch, const Place &at) {
    Scratch scratch = scratch_parts(batch, at);
    uint32_t streams = streams_of(batch);
    uint32_t kind = coding_of(batch).kind;
    kv_layout instead = kv_layout_of(KV_INT8, kind, batch.tokens, batch.width, batch.extra);
    uint64_t end = lay_pieces(scratch.entries, streams, parts_of(batch).streams);
    uint32_t escapes = lay_counts(scratch.escapes, streams);
    if (threadIdx.x == 0) {
        scratch.entries[streams] = (uint32_t)end;
        scratch.escapes[streams] = escapes;
    }
    close_section(batch, at, end + kv_pad16(2 * (uint64_t)escapes), batch.heads * instead.bytes);
}

/* What stands before the sinks; one block of the section writes it. */
KV_INLINE void place_tables(const Batch &batch, const Scratch &scratch, uint8_t *section) {
    Parts parts = parts_of(batch);
    uint32_t streams = streams_of(batch), each = head_streams(batch);
    for (uint32_t i = threadIdx.x; i < parts.before / 4; i += KV_THREADS) {
        ((uint32_t *)section)[i] = i > streams ? 0u : size_of_piece(scratch.entries[i]);
    }
    for (uint32_t i = threadIdx.x; i < directory_bytes(batch.heads) / 4; i += KV_THREADS) {
        uint32_t before = i > batch.heads ? 0u : scratch.escapes[i * each];
        ((uint32_t *)(section + parts.before))[i] = before;
    }
    uint32_t values = (uint32_t)scales_bytes(batch) / 2;
    uint32_t held = is_keys(batch) ? values : batch.tokens;
    for (uint32_t i = threadIdx.x; i < batch.heads * values; i += KV_THREADS) {
        uint16_t stored = ((const uint16_t *)scratch.scales)[i];
        ((uint16_t *)(section + parts.scales))[i] = i % values < held ? stored : (uint16_t)0;
    }
    pad_part(section + scratch.entries[streams], 2 * (uint64_t)scratch.escapes[streams]);
}

/* A section that is broken is left to whoever stores something else. */
template <int DTYPE> KV_INLINE void place(const Batch &batch, const Place &at) {
    __shared__ uint32_t symbols[KV_SYMBOLS];
    __shared__ Groups groups;
    const Coding &coding = coding_of(batch);
    Scratch scratch = scratch_parts(batch, at);
    uint8_t *section = section_of(batch, at);
    uint32_t filling = prepare_encoder(coding.frequencies[threadIdx.x], symbols), state;
    Stream stream = stream_of(batch, at);
    int is_broken = report_of(batch, at)->broken != 0;
    if (at.part == 0 && !is_broken) {
        place_tables(batch, scratch, section);
    }
    if (stream.count > 0 && !is_broken) {
        const uint8_t *scales = scales_of(batch, stream.at);
        uint16_t *list = (uint16_t *)(section + scratch.entries[streams_of(batch)]);
        uint32_t left = scratch.escapes[stream.index + 1];
        auto source = [&](const Eighth &eighth, uint32_t *eight) {
            Eight found;
            uint32_t far = 0, all;
            if (eighth.is_real) {
                found = code_eight<DTYPE>(batch, stream, eighth, scales, coding, eight);
                far = found.far;
            }
            uint32_t at_list = lanes_before((uint32_t)__popc(far), &all);
            left -= all;
            for (int i = 0; far >> i != 0; i++) {
                if (far >> i & 1u) {
                    list[left + at_list++] = kv_bf16_scale_of_float(found.values[i]);
                }
            }
        };
        uint32_t entry = scratch.entries[stream.index];
        uint32_t words = words_of(entry, size_of_piece(scratch.entries[stream.index + 1]));
        uint8_t *where = section + size_of_piece(entry);
        uint16_t *end = (uint16_t *)(where + KV_STREAM_HEAD) + words;
        encode_stream(batch, stream, groups, symbols, filling, end, &state, source);
        close_stream(where, words, state);
    }
    __syncthreads();
}

/* --- decoding --------------------------------------------------------------------------------------------- */

/* Whether what a section says of itself lies within it. */
KV_INLINE int is_within(const Batch &batch, const uint8_t *section, uint64_t size) {
    Parts parts = parts_of(batch);
    if (parts.streams > size) {
        return 0;
    }
    const uint32_t *directory = (const uint32_t *)section;
    const uint32_t *before = (const uint32_t *)(section + parts.before);
    uint32_t streams = streams_of(batch);
    uint64_t end = directory[streams];
    return does_ascend(directory, streams) && does_ascend(before, batch.heads) && before[0] == 0 &&
           end % 16 == 0 && end + kv_pad16(2 * (uint64_t)before[batch.heads]) == size;
}

/* Decode all streams, but for escapes, which are counted. */
template <int DTYPE> KV_INLINE void decode(const Batch &batch, const Place &at) {
    __shared__ uint32_t slots[KV_RANS_TOTAL];
    __shared__ Groups groups;
    const Coding &coding = coding_of(batch);
    const uint8_t *section = section_of(batch, at);
    uint64_t size = span_of(batch, at)->size;
    uint32_t filling = 0, state = 0, far = 0, all, bound = coding.bound;
    int is_sound = is_within(batch, section, size) &&
                   prepare_decoder(coding.frequencies[threadIdx.x], slots, &filling);
    Stream stream = stream_of(batch, at);
    if (is_sound && stream.count > 0) {
        const uint32_t *directory = (const uint32_t *)section + stream.index;
        const uint8_t *scales = section + parts_of(batch).scales;
        scales += stream.at.head * scales_bytes(batch);
        auto sink = [&](const Eighth &eighth, const uint32_t *symbols) {
            if (eighth.is_real) {
                Eight eight;
                scales8(batch, scales, eighth, coding.delta, eight.means, eight.steps);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    eight.values[i] = value_of(eight, i, symbols[i], bound);
                    far += symbols[i] == 2 * bound + 1;
                }
                write8<DTYPE>(batch, stream.at, eighth.token, eighth.channel, eight.values);
            }
        };
        Taken from = open_stream(section, directory[0], directory[1], size, &state);
        is_sound = decode_stream(batch, stream, groups, slots, filling, from, state, sink);
        lanes_before(far, &all);
        if (threadIdx.x % 32 == 0) {
            scratch_parts(batch, at).escapes[stream.index] = all;
        }
    }
    report_damage(batch, at, !is_sound);
    __syncthreads();
}

/* Write the escapes of a stream whose symbols are known to be sound. */
template <int DTYPE>
KV_INLINE void write_escapes(const Batch &batch, const Stream &stream, const Eighth &eighth,
    const uint32_t *symbols, uint32_t escape, const uint16_t *list, uint32_t *used) {
    uint32_t far = 0, all;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        far |= (uint32_t)(eighth.is_real && symbols[i] == escape) << i;
    }
    uint32_t place = *used + lanes_before((uint32_t)__popc(far), &all);
    *used += all;
    if (far != 0) {
        uint8_t *row = row_of(batch, stream.at, eighth.token);
        for (int i = 0; i < 8; i++) {
            if (far >> i & 1u) {
                write1<DTYPE>(row, eighth.channel + i, kv_float_of_bf16(list[place++]));
            }
        }
    }
}

/* The streams that have escapes are read once more, now that it is known whose are where. */
template <int DTYPE> KV_INLINE void escapes(const Batch &batch, const Place &at) {
    __shared__ uint32_t slots[KV_RANS_TOTAL];
    __shared__ Groups groups;
    /* Other blocks may just be finding out: no two threads of this one may go different ways. */
    if (largest_of_block((int32_t)report_of(batch, at)->broken) != 0) {
        return;
    }
    const Coding &coding = coding_of(batch);
    const uint8_t *section = section_of(batch, at);
    uint32_t filling, state, each = head_streams(batch), place = 0, mine = 0;
    const uint32_t *counts = scratch_parts(batch, at).escapes;
    prepare_decoder(coding.frequencies[threadIdx.x], slots, &filling);
    Stream stream = stream_of(batch, at);
    int is_sound = 1;
    if (stream.count > 0) {
        const uint32_t *directory = (const uint32_t *)section + stream.index;
        const uint32_t *before = (const uint32_t *)(section + parts_of(batch).before);
        place = before[stream.at.head];
        for (uint32_t i = stream.index / each * each; i < stream.index; i++) {
            place += counts[i];
        }
        mine = counts[stream.index];
        uint32_t end = before[stream.at.head + 1];
        is_sound = place <= end && mine <= end - place &&
                   ((stream.index + 1) % each != 0 || place + mine == end);
        if (is_sound && mine > 0) {
            const uint8_t *listed = section + ((const uint32_t *)section)[streams_of(batch)];
            auto sink = [&](const Eighth &eighth, const uint32_t *symbols) {
                write_escapes<DTYPE>(batch, stream, eighth, symbols, 2 * coding.bound + 1,
                                     (const uint16_t *)listed, &place);
            };
            Taken from = open_stream(
                section, directory[0], directory[1], span_of(batch, at)->size, &state);
            decode_stream(batch, stream, groups, slots, filling, from, state, sink);
        }
    }
    report_damage(batch, at, !is_sound);
    __syncthreads();
}

KV_INLINE uint32_t scale_parts(const Batch &batch) {
    return is_keys(batch) ? 1u : (uint32_t)kv_ceil(batch.tokens, KV_TILE);
}

template <int DTYPE> KV_INLINE void scale(const Batch &batch, const Place &at) {
    if (is_keys(batch)) {
        scale_keys<DTYPE>(batch, at);
    } else {
        scale_values<DTYPE>(batch, at);
    }
}

#define BOTH(dtype, DTYPE)                                                                         \
    KV_KERNEL(ecsq_scale_##dtype, scale_parts(batch), scale<DTYPE>(batch, at))                     \
    KV_SECTION_KERNEL(ecsq_measure_##dtype, groups_of(batch), measure<DTYPE>(batch, at))           \
    KV_SECTION_KERNEL(ecsq_total_##dtype, 1, total(batch, at))                                     \
    KV_SECTION_KERNEL(ecsq_place_##dtype, groups_of(batch), place<DTYPE>(batch, at))               \
    KV_SECTION_KERNEL(ecsq_decode_##dtype, groups_of(batch), decode<DTYPE>(batch, at))             \
    KV_SECTION_KERNEL(ecsq_escapes_##dtype, groups_of(batch), escapes<DTYPE>(batch, at))

BOTH(bf16, KV_BF16)
BOTH(fp16, KV_FP16)
