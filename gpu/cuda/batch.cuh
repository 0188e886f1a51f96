/* Where the KV of a batch of chunks lies: in the pages of an engine, and in containers.
 *
 * One launch covers any number of sections (a section is K or V of one layer) of any number of
 * chunks. Blocks walk a list of tiles that is never written down: tile i is found by division.
 * A tile never crosses a head. Values are moved sixteen bytes at a time, so widths are whole
 * vectors and every address is a multiple of sixteen.
 */
#ifndef KVSTORE_BATCH_CUH
#define KVSTORE_BATCH_CUH

#include "numbers.cuh"

#define KV_THREADS 256
#define KV_LANES 8   /* vectors side by side: a slab of 64 channels */
#define KV_ROWS 32   /* threads above each other */
#define KV_SLAB 64

#define KV_BF16 0
#define KV_FP16 1

struct Section {
    uint64_t plane;  /* where page 0 of this K or V begins */
    uint64_t offset; /* where the section begins in its container */
};

struct Report {
    float error;     /* sum of squares of what was lost */
    float energy;    /* sum of squares of the values */
    uint32_t broken; /* not zero: there is an infinity or a NaN, the section cannot be encoded */
    uint32_t unused;
};

struct Batch {
    const Section *sections;
    const int32_t *pages;      /* [chunk][page of the chunk] */
    const uint64_t *containers; /* [chunk] */
    Report *reports;           /* [chunk][section], zero before an encode; none for a decode */
    int64_t page_stride;       /* bytes, as are the other strides */
    int64_t token_stride;
    int64_t head_stride;
    uint32_t chunk_count, section_count, heads, tokens, width, page_tokens, page_count;
    uint32_t first_token;      /* of the chunk within its first page */
};

struct Place {
    uint32_t chunk, section, head, part, slab;
};

/* The inverse of numbering: slabs fastest, then parts (of the tokens), heads, sections, chunks. */
KV_INLINE Place place_of(const Batch &batch, uint32_t index, uint32_t parts, uint32_t slabs) {
    Place at;
    at.slab = index % slabs;
    index /= slabs;
    at.part = index % parts;
    index /= parts;
    at.head = index % batch.heads;
    index /= batch.heads;
    at.section = index % batch.section_count;
    at.chunk = index / batch.section_count;
    return at;
}

KV_INLINE uint32_t tiles_of(const Batch &batch, uint32_t parts, uint32_t slabs) {
    return batch.chunk_count * batch.section_count * batch.heads * parts * slabs;
}

KV_INLINE uint8_t *row_of(const Batch &batch, const Place &at, uint32_t token) {
    uint32_t position = batch.first_token + token;
    uint32_t page = position / batch.page_tokens, within = position % batch.page_tokens;
    int64_t number = batch.pages[(uint64_t)at.chunk * batch.page_count + page];
    uint64_t address = batch.sections[at.section].plane;
    address += (uint64_t)(number * batch.page_stride + within * batch.token_stride);
    return (uint8_t *)(address + (uint64_t)(at.head * batch.head_stride));
}

KV_INLINE uint8_t *section_of(const Batch &batch, const Place &at) {
    return (uint8_t *)(batch.containers[at.chunk] + batch.sections[at.section].offset);
}

KV_INLINE Report *report_of(const Batch &batch, const Place &at) {
    return batch.reports + (uint64_t)at.chunk * batch.section_count + at.section;
}

/* --- eight values at a time ---------------------------------------------------------------------- */

template <int DTYPE> KV_INLINE float widen(uint32_t bits) {
    return DTYPE == KV_BF16 ? kv_float_of_bf16((uint16_t)bits) : kv_float_of_half((uint16_t)bits);
}

template <int DTYPE> KV_INLINE uint32_t narrow(float value) {
    return DTYPE == KV_BF16 ? kv_bf16_of_float(value) : kv_half_of_float(value);
}

template <int DTYPE> KV_INLINE void widen8(const uint4 &packed, float *values) {
    const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        values[2 * i] = widen<DTYPE>(words[i] & 0xffffu);
        values[2 * i + 1] = widen<DTYPE>(words[i] >> 16);
    }
}

template <int DTYPE> KV_INLINE uint4 narrow8(const float *values) {
    uint32_t words[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        words[i] = narrow<DTYPE>(values[2 * i]) | narrow<DTYPE>(values[2 * i + 1]) << 16;
    }
    return uint4{words[0], words[1], words[2], words[3]};
}

KV_INLINE uint4 load16(const uint8_t *at) { return *(const uint4 *)at; }
KV_INLINE void store16(uint8_t *at, const uint4 &vector) { *(uint4 *)at = vector; }

/* --- reductions ------------------------------------------------------------------------------------ */

KV_INLINE float shuffled(float value, int mask) {
    return kv_float_of_bits(__shfl_xor_sync(0xffffffffu, kv_bits_of_float(value), mask));
}

KV_INLINE int32_t shuffled(int32_t value, int mask) {
    return (int32_t)__shfl_xor_sync(0xffffffffu, (uint32_t)value, mask);
}

/* Add what the threads of the block found to the report of its tile's section, once. */
KV_INLINE void report(const Batch &batch, const Place &at, float error, float energy, int broken) {
    __shared__ float errors[KV_THREADS / 32], energies[KV_THREADS / 32];
    for (int mask = 16; mask > 0; mask >>= 1) {
        error = kv_add(error, shuffled(error, mask));
        energy = kv_add(energy, shuffled(energy, mask));
    }
    uint32_t votes = __ballot_sync(0xffffffffu, broken);
    if (threadIdx.x % 32 == 0) {
        errors[threadIdx.x / 32] = error;
        energies[threadIdx.x / 32] = energy;
        if (votes != 0) {
            atomicOr(&report_of(batch, at)->broken, 1u);
        }
    }
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int i = 1; i < KV_THREADS / 32; i++) {
            error = kv_add(error, errors[i]);
            energy = kv_add(energy, energies[i]);
        }
        atomicAdd(&report_of(batch, at)->error, error);
        atomicAdd(&report_of(batch, at)->energy, energy);
    }
    __syncthreads();
}

#endif
