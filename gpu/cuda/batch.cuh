/* Where the KV of a batch of chunks lies: in the pages of an engine, and in containers.
 *
 * One launch covers any number of sections (a section is K or V of one layer) of any number of
 * chunks. Blocks walk a list of tiles that is never written down: tile i is found by division.
 * A tile never crosses a head. Values are moved sixteen bytes at a time, so widths are whole
 * vectors and every address is a multiple of sixteen.
 */
#ifndef KVSTORE_BATCH_CUH
#define KVSTORE_BATCH_CUH

#include "layout.cuh"
#include "scales.cuh"

#define KV_THREADS 256
#define KV_LANES 8 /* vectors beside each other: a slab of 64 channels */
#define KV_ROWS 32 /* rows of threads */
#define KV_SLAB 64
#define KV_WARPS (KV_THREADS / 32)

enum { KV_BF16 = 1, KV_FP16 = 2, KV_FP32 = 3 };

struct Section {
    uint64_t plane;  /* where page 0 of this K or V begins */
    uint64_t offset; /* where the section begins in its container */
    uint32_t layer;  /* as the container counts them */
    uint32_t span;   /* which entry of the container's section table it is */
};

/* Where a section lies in its container, from the container's start; like the section table's. */
struct Span {
    uint64_t offset, size;
};

struct Report {
    float error;     /* sum of squares of what was lost */
    float energy;    /* sum of squares of the values */
    uint32_t broken; /* not zero: something is not finite, the section cannot be encoded */
    uint32_t unused;
};

/* Arguments of every kernel, by value; BATCH in gpu/batches.py says the same. */
struct Batch {
    const Section *sections;
    const int32_t *pages;       /* [chunk][page of the chunk] */
    const uint64_t *containers; /* [chunk]: addresses */
    Report *reports;            /* [chunk][section], zero before an encode; unused by decodes */
    int64_t page_stride;        /* bytes, as are the other strides */
    int64_t token_stride;
    int64_t head_stride;
    uint64_t extra; /* bytes of the parts sinks and tail of a head block */
    uint64_t table;
    uint32_t chunk_count, section_count, heads, tokens;
    uint32_t width, sinks, page_tokens, page_count;
    uint32_t first_token; /* of a chunk within its first page */
    uint32_t span_count;
    Span *spans;       /* [chunk][span]: sections are there, not at their offset; null for fixed rates */
    uint32_t *scratch; /* [chunk][section]: what measuring leaves to placing; see spans.cuh */
};

struct Place {
    uint32_t chunk, section, head, part;
};

/* The inverse of numbering: parts (of a head) fastest, then heads, sections, chunks. */
KV_INLINE Place place_of(const Batch &batch, uint32_t index, uint32_t parts) {
    Place at;
    at.part = index % parts;
    index /= parts;
    at.head = index % batch.heads;
    index /= batch.heads;
    at.section = index % batch.section_count;
    at.chunk = index / batch.section_count;
    return at;
}

KV_INLINE uint32_t places_of(const Batch &batch, uint32_t parts) {
    return batch.chunk_count * batch.section_count * batch.heads * parts;
}

KV_INLINE uint8_t *row_of(const Batch &batch, const Place &at, uint32_t token) {
    uint32_t position = batch.first_token + token;
    uint32_t page = position / batch.page_tokens, within = position % batch.page_tokens;
    int64_t number = batch.pages[(uint64_t)at.chunk * batch.page_count + page];
    uint64_t address = batch.sections[at.section].plane;
    address += (uint64_t)(number * batch.page_stride + (int64_t)within * batch.token_stride);
    return (uint8_t *)(address + (uint64_t)((int64_t)at.head * batch.head_stride));
}

KV_INLINE Span *span_of(const Batch &batch, const Place &at) {
    return batch.spans + (uint64_t)at.chunk * batch.span_count + batch.sections[at.section].span;
}

KV_INLINE uint8_t *section_of(const Batch &batch, const Place &at) {
    uint64_t offset = batch.spans == nullptr ? batch.sections[at.section].offset
                                             : span_of(batch, at)->offset;
    return (uint8_t *)(batch.containers[at.chunk] + offset);
}

KV_INLINE uint8_t *block_of(const Batch &batch, const Place &at, uint64_t block_bytes) {
    return section_of(batch, at) + at.head * block_bytes;
}

KV_INLINE Report *report_of(const Batch &batch, const Place &at) {
    return batch.reports + (uint64_t)at.chunk * batch.section_count + at.section;
}

KV_INLINE uint32_t smaller(uint32_t a, uint32_t b) { return a < b ? a : b; }
KV_INLINE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

/* --- eight values at a time ---------------------------------------------------------------------- */

template <int DTYPE> KV_INLINE constexpr uint32_t bytes_of() { return DTYPE == KV_FP32 ? 4 : 2; }

template <int DTYPE> KV_INLINE float widen(uint32_t bits) {
    return DTYPE == KV_BF16   ? kv_float_of_bf16((uint16_t)bits)
           : DTYPE == KV_FP16 ? kv_float_of_half((uint16_t)bits)
                              : kv_float_of_bits(bits);
}

template <int DTYPE> KV_INLINE uint32_t narrow(float value) {
    return DTYPE == KV_BF16   ? kv_bf16_of_float(value)
           : DTYPE == KV_FP16 ? kv_half_value_of_float(value)
                              : kv_bits_of_float(kv_finite(value));
}

KV_INLINE uint4 load16(const uint8_t *at) { return *(const uint4 *)at; }
KV_INLINE void store16(uint8_t *at, const uint4 &vector) { *(uint4 *)at = vector; }

/* Eight values as an engine has them: one vector, or two. */
template <int DTYPE> struct Packed {
    uint4 vectors[bytes_of<DTYPE>() / 2];
};

template <int DTYPE> KV_INLINE Packed<DTYPE> no_values() {
    Packed<DTYPE> made;
#pragma unroll
    for (uint32_t i = 0; i < bytes_of<DTYPE>() / 2; i++) {
        made.vectors[i] = uint4{0, 0, 0, 0};
    }
    return made;
}

template <int DTYPE> KV_INLINE Packed<DTYPE> load_values(const uint8_t *row, uint32_t channel) {
    Packed<DTYPE> made;
#pragma unroll
    for (uint32_t i = 0; i < bytes_of<DTYPE>() / 2; i++) {
        made.vectors[i] = load16(row + channel * bytes_of<DTYPE>() + i * 16);
    }
    return made;
}

template <int DTYPE>
KV_INLINE void store_values(uint8_t *row, uint32_t channel, const Packed<DTYPE> &values) {
#pragma unroll
    for (uint32_t i = 0; i < bytes_of<DTYPE>() / 2; i++) {
        store16(row + channel * bytes_of<DTYPE>() + i * 16, values.vectors[i]);
    }
}

/* Their bits, a word each, and back. */
template <int DTYPE> KV_INLINE void unpack8(const Packed<DTYPE> &packed, uint32_t *bits) {
#pragma unroll
    for (uint32_t i = 0; i < bytes_of<DTYPE>() / 2; i++) {
        const uint4 &vector = packed.vectors[i];
        const uint32_t words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if (DTYPE == KV_FP32) {
                bits[i * 4 + j] = words[j];
            } else {
                bits[2 * j] = words[j] & 0xffffu;
                bits[2 * j + 1] = words[j] >> 16;
            }
        }
    }
}

template <int DTYPE> KV_INLINE Packed<DTYPE> pack8(const uint32_t *bits) {
    Packed<DTYPE> made;
#pragma unroll
    for (uint32_t i = 0; i < bytes_of<DTYPE>() / 2; i++) {
        const uint32_t *from = bits + i * 4;
        made.vectors[i] = DTYPE == KV_FP32
                              ? uint4{from[0], from[1], from[2], from[3]}
                              : uint4{bits[0] | bits[1] << 16, bits[2] | bits[3] << 16,
                                      bits[4] | bits[5] << 16, bits[6] | bits[7] << 16};
    }
    return made;
}

template <int DTYPE> KV_INLINE void widen8(const Packed<DTYPE> &packed, float *values) {
    uint32_t bits[8];
    unpack8<DTYPE>(packed, bits);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        values[i] = widen<DTYPE>(bits[i]);
    }
}

template <int DTYPE> KV_INLINE Packed<DTYPE> narrow8(const float *values) {
    uint32_t bits[8];
#pragma unroll
    for (int i = 0; i < 8; i++) {
        bits[i] = narrow<DTYPE>(values[i]);
    }
    return pack8<DTYPE>(bits);
}

/* Eight values of a token, zeros for a sink and outside of the chunk or the head. */
template <int DTYPE>
KV_INLINE Packed<DTYPE> load_real(
    const Batch &batch, const Place &at, uint32_t token, uint32_t channel) {
    int is_real = token >= batch.sinks && token < batch.tokens && channel < batch.width;
    return is_real ? load_values<DTYPE>(row_of(batch, at, token), channel) : no_values<DTYPE>();
}

template <int DTYPE>
KV_INLINE void read8(
    const Batch &batch, const Place &at, uint32_t token, uint32_t channel, float *values) {
    widen8<DTYPE>(load_real<DTYPE>(batch, at, token, channel), values);
}

template <int DTYPE>
KV_INLINE void write8(
    const Batch &batch, const Place &at, uint32_t token, uint32_t channel, const float *values) {
    if (token < batch.tokens && channel < batch.width) {
        store_values<DTYPE>(row_of(batch, at, token), channel, narrow8<DTYPE>(values));
    }
}

/* One value of a row. */
template <int DTYPE> KV_INLINE float read1(const uint8_t *row, uint32_t channel) {
    return DTYPE == KV_FP32 ? widen<DTYPE>(((const uint32_t *)row)[channel])
                            : widen<DTYPE>(((const uint16_t *)row)[channel]);
}

template <int DTYPE> KV_INLINE void write1(uint8_t *row, uint32_t channel, float value) {
    if (DTYPE == KV_FP32) {
        ((uint32_t *)row)[channel] = narrow<DTYPE>(value);
    } else {
        ((uint16_t *)row)[channel] = (uint16_t)narrow<DTYPE>(value);
    }
}

/* The low bytes of four words as one. */
KV_INLINE uint32_t bytes4(const uint32_t *codes) {
    return (codes[0] & 0xffu) | (codes[1] & 0xffu) << 8 | (codes[2] & 0xffu) << 16 |
           codes[3] << 24;
}

KV_INLINE void store8(uint8_t *at, const uint32_t *codes) {
    *(uint2 *)at = uint2{bytes4(codes), bytes4(codes + 4)};
}

KV_INLINE void load8(const uint8_t *at, uint32_t *codes) {
    uint2 packed = *(const uint2 *)at;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        codes[i] = packed.x >> (8 * i) & 0xffu;
        codes[i + 4] = packed.y >> (8 * i) & 0xffu;
    }
}

KV_INLINE float energy8(const float *values) {
    float energy = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        energy = kv_add(energy, kv_mul(values[i], values[i]));
    }
    return energy;
}

/* Zero what pads the parts of a head block; one thread block of the head does it. */
KV_INLINE void zero_padding(const kv_layout &layout, uint8_t *block) {
    for (int i = 0; i < KV_PARTS; i++) {
        uint64_t at = layout.size[i] + threadIdx.x;
        if (at < kv_pad16(layout.size[i])) {
            block[layout.part[i] + at] = 0;
        }
    }
}

/* --- reductions ------------------------------------------------------------------------------------ */

#define KV_EVERY_LANE 0xffffffffu

KV_INLINE float shuffled(float value, int mask) {
    return kv_float_of_bits(__shfl_xor_sync(KV_EVERY_LANE, kv_bits_of_float(value), mask));
}

KV_INLINE int32_t shuffled(int32_t value, int mask) {
    return (int32_t)__shfl_xor_sync(KV_EVERY_LANE, (uint32_t)value, mask);
}

KV_INLINE int32_t larger_key(int32_t a, int32_t b) { return a > b ? a : b; }
KV_INLINE int32_t smaller_key(int32_t a, int32_t b) { return a < b ? a : b; }

/* The greatest of a value of every thread, for every thread. */
KV_INLINE int32_t largest_of_block(int32_t value) {
    __shared__ int32_t found[KV_WARPS];
    for (int mask = 16; mask > 0; mask >>= 1) {
        value = larger_key(value, shuffled(value, mask));
    }
    if (threadIdx.x % 32 == 0) {
        found[threadIdx.x / 32] = value;
    }
    __syncthreads();
    for (int i = 0; i < KV_WARPS; i++) {
        value = larger_key(value, found[i]);
    }
    __syncthreads();
    return value;
}

/* One key a warp and channel of the slab, before they are put together. */
typedef int32_t SlabKeys[KV_WARPS][KV_SLAB];

/* The greatest of each of a thread's eight channels within its warp, for the whole block to see. */
KV_INLINE void post_largest(int32_t *keys, SlabKeys &found) {
    uint32_t lane = threadIdx.x % KV_LANES, warp = threadIdx.x / 32;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        keys[i] = larger_key(keys[i], shuffled(keys[i], 8));
        keys[i] = larger_key(keys[i], shuffled(keys[i], 16));
    }
    if (threadIdx.x % 32 < KV_LANES) {
#pragma unroll
        for (int i = 0; i < 8; i++) {
            found[warp][lane * 8 + i] = keys[i];
        }
    }
}

/* The greatest of one channel of the slab. */
KV_INLINE int32_t largest_of_channel(const SlabKeys &found, uint32_t channel) {
    int32_t key = found[0][channel];
#pragma unroll
    for (int i = 1; i < KV_WARPS; i++) {
        key = larger_key(key, found[i][channel]);
    }
    return key;
}

/* The sum over the threads before this one; *total* is that over all. */
KV_INLINE uint32_t sum_before(uint32_t value, uint32_t *total) {
    __shared__ uint32_t sums[KV_WARPS];
    uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, upto = value, before = 0;
    for (uint32_t distance = 1; distance < 32; distance *= 2) {
        uint32_t other = __shfl_up_sync(KV_EVERY_LANE, upto, distance);
        upto += lane >= distance ? other : 0u;
    }
    if (lane == 31) {
        sums[warp] = upto;
    }
    __syncthreads();
    *total = 0;
    for (uint32_t i = 0; i < KV_WARPS; i++) {
        before += i < warp ? sums[i] : 0u;
        *total += sums[i];
    }
    __syncthreads();
    return before + upto - value;
}

/* Add what the threads of a block found to the report of its section, in one go. */
KV_INLINE void report(const Batch &batch, const Place &at, float error, float energy, int broken) {
    __shared__ float errors[KV_WARPS], energies[KV_WARPS];
    for (int mask = 16; mask > 0; mask >>= 1) {
        error = kv_add(error, shuffled(error, mask));
        energy = kv_add(energy, shuffled(energy, mask));
    }
    uint32_t votes = __ballot_sync(KV_EVERY_LANE, broken);
    if (threadIdx.x % 32 == 0) {
        errors[threadIdx.x / 32] = error;
        energies[threadIdx.x / 32] = energy;
        if (votes != 0) {
            atomicOr(&report_of(batch, at)->broken, 1u);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < KV_WARPS; i++) {
            error = kv_add(error, errors[i]);
            energy = kv_add(energy, energies[i]);
        }
        atomicAdd(&report_of(batch, at)->error, error);
        atomicAdd(&report_of(batch, at)->energy, energy);
    }
    __syncthreads();
}

/* --- kernels ----------------------------------------------------------------------------------------- */

/* Threads of a block; a source may add how many blocks a multiprocessor must hold. */
#ifndef KV_BOUNDS
#define KV_BOUNDS KV_THREADS
#endif

/* Blocks take the parts of heads in turn, however many blocks there are. */
#define KV_KERNEL(name, parts, work)                                                               \
    extern "C" __global__ void __launch_bounds__(KV_BOUNDS) name(const Batch batch) {              \
        uint32_t part_count = (uint32_t)(parts);                                                   \
        for (uint32_t i = blockIdx.x; i < places_of(batch, part_count); i += gridDim.x) {          \
            Place at = place_of(batch, i, part_count);                                             \
            work;                                                                                  \
        }                                                                                          \
    }

/* The same for parts of sections: heads are the work's own matter. */
#define KV_SECTION_KERNEL(name, parts, work)                                                       \
    extern "C" __global__ void __launch_bounds__(KV_BOUNDS) name(const Batch batch) {              \
        uint32_t part_count = (uint32_t)(parts), sections = batch.section_count;                   \
        for (uint32_t i = blockIdx.x; i < batch.chunk_count * sections * part_count;               \
             i += gridDim.x) {                                                                     \
            Place at = {i / part_count / sections, i / part_count % sections, 0, i % part_count};  \
            work;                                                                                  \
        }                                                                                          \
    }

#endif
