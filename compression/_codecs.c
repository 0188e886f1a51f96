/* Codecs on the CPU: the arithmetic of gpu/cuda/ in loops that compilers vectorise.
 *
 * Loaded with ctypes, so there is no Python in here. One build serves every CPU: the loops are
 * compiled for AVX-512, AVX2 and plain C, and the best are chosen when the library loads. All give
 * the same bytes, which are also NumPy's and the GPU's: docs/codec-format.md.
 *
 * Every entry checks the sizes that it is given against the geometry before it touches memory, and
 * everything that it reads from encoded bytes against the section. Hostile bytes give BAD_BYTES.
 */

#include <float.h>
#include <stddef.h>
#include <stdlib.h>

#include "../gpu/cuda/exp3.cuh"
#include "../gpu/cuda/fp8.cuh"
#include "../gpu/cuda/hadamard.cuh"
#include "../gpu/cuda/int4.cuh"
#include "../gpu/cuda/int8.cuh"
#include "../gpu/cuda/layout.cuh"
#include "../gpu/cuda/nvfp4.cuh"
#include "../gpu/cuda/rans.cuh"

/* BLOCK: the widest head. LANES: tokens beside each other where channels are rows. STRIP: channels
 * of a tile that are summed at a time, so that they stay in the nearest cache. */
enum { BLOCK = 1024, LANES = 16, STRIP = 64 };
enum { SOURCE_BF16 = 1, SOURCE_FP16, SOURCE_FP32, SOURCE_E4M3, SOURCE_E5M2, SOURCE_OPAQUE };
enum { DONE = 0, UNFIT = 1, BAD_BYTES = 2, BAD_REQUEST = 3, NO_MEMORY = 4 };

/* Parts begin anywhere: their readers do not count on alignment. */
typedef uint16_t any16 __attribute__((aligned(1), may_alias));
typedef uint32_t any32 __attribute__((aligned(1), may_alias));

/* A section, as Python describes it (Request in native.py): the fields are known there too. */
typedef struct {
    uint32_t codec, kind, source, layer;
    uint64_t element; /* bytes of a value of the engine */
    uint64_t heads, tokens, width, sinks;
    uint64_t tail; /* channels that follow the coded ones of a token, kept by others */
    uint64_t table;
    int64_t head_stride, token_stride; /* bytes between the engine's heads and tokens */
    const uint16_t *frequencies;       /* ecsq: of its symbols */
    uint64_t bound;                    /* ecsq: the largest code that is no escape */
    float delta;                       /* ecsq: the step in deviations */
} request;

typedef struct {
    double error, energy; /* sums of squares */
    uint64_t size;
} outcome;

typedef struct {
    const request *ask;
    kv_layout at;
    uint8_t *block;  /* the head block */
    uint8_t *values; /* the engine's token 0 */
    uint32_t flips[BLOCK]; /* hq: what is XORed to the channels' bits */
    double error, energy;
    int is_broken;
} head;

static uint8_t *part(const head *h, int index) { return h->block + h->at.part[index]; }

static any16 *part16(const head *h, int index) { return (any16 *)(void *)part(h, index); }

static uint8_t *values_at(const head *h, size_t token) {
    return h->values + (int64_t)token * h->ask->token_stride;
}

static size_t lesser(size_t a, size_t b) { return a < b ? a : b; }

/* The least power of two >= n > 0, and the greatest <= n. */
static size_t power_of_two_from(size_t n) {
    size_t power = 1;
    while (power < n) {
        power *= 2;
    }
    return power;
}

static size_t power_of_two_below(size_t n) {
    size_t power = power_of_two_from(n);
    return power == n ? power : power / 2;
}

/* Sixteen channels beside each other. */
typedef float sixteen __attribute__((vector_size(64)));
typedef int32_t sixteen_bits __attribute__((vector_size(64)));
static const sixteen_bits LANE_NUMBERS = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

/* Every lane's partner in a butterfly. Clang wants the lanes in the code, GCC as a vector. */
#if defined(__clang__)
#define SHUFFLED(v, mask, step)                                                                    \
    ((step) == 0 ? __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14) \
     : (step) == 1 ? __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13) \
     : (step) == 2 ? __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11) \
                   : __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7))
#else
#define SHUFFLED(v, mask, step) __builtin_shuffle(v, mask)
#endif

typedef struct {
    const char *name;
    void (*encode[2][KV_HQ3 + 1])(head *h); /* by kind and codec */
    void (*decode[2][KV_HQ3 + 1])(head *h);
    void (*widen_exponents)(const any16 *bits, uint8_t *largest, size_t n);
    void (*split_row)(const any16 *bits, const uint8_t *largest, uint8_t escape, uint8_t *rest,
                      uint8_t *offsets, size_t n);
    void (*below_largest)(const uint8_t *largest, uint8_t *offsets, size_t n);
    void (*merge_row)(const uint8_t *rest, const uint8_t *exponents, any16 *bits, size_t n);
    void (*pack_plane)(const uint8_t *codes, size_t rows, unsigned width, unsigned shift,
                       uint8_t *plane, size_t n);
    void (*unpack_plane)(const uint8_t *plane, size_t rows, unsigned width, unsigned shift,
                         uint8_t *codes, size_t n);
    size_t (*ecsq_encode)(head *h, uint8_t *symbols, any16 *list);
    int (*ecsq_decode)(head *h, const uint8_t *symbols, const any16 *list, size_t held);
} kernel;

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define NAME(function) function##_avx512
#define KERNEL_NAME "avx512"
#include "_codecs_kernel.h"
#include "_codecs_heads.h"
#include "_codecs_table.h"
#undef TARGET
#undef NAME
#undef KERNEL_NAME

#define TARGET __attribute__((target("avx2")))
#define NAME(function) function##_avx2
#define KERNEL_NAME "avx2"
#include "_codecs_kernel.h"
#include "_codecs_heads.h"
#include "_codecs_table.h"
#undef TARGET
#undef NAME
#undef KERNEL_NAME
#endif

#define TARGET
#define NAME(function) function##_portable
#define KERNEL_NAME "portable"
#include "_codecs_kernel.h"
#include "_codecs_heads.h"
#include "_codecs_table.h"

/* --- which kernel ---------------------------------------------------------------------------------- */

static const kernel *chosen = &kernel_portable;
static int has_wide_rans;

static int has_avx512(void) {
#if defined(__x86_64__)
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
    return 0;
#endif
}

__attribute__((constructor)) static void choose_best(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    has_wide_rans = has_avx512();
    if (has_avx512()) {
        chosen = &kernel_avx512;
    } else if (__builtin_cpu_supports("avx2")) {
        chosen = &kernel_avx2;
    }
#endif
}

const char *kvstore_codecs_kernel(void) { return chosen->name; }

/* Use a lesser kernel than the best (tests compare them). Returns 0 when this CPU lacks it. */
int kvstore_codecs_use_kernel(const char *name) {
    choose_best();
    if (strcmp(name, chosen->name) == 0) {
        return 1;
    }
    has_wide_rans = 0;
#if defined(__x86_64__)
    if (strcmp(name, "avx2") == 0 && __builtin_cpu_supports("avx2")) {
        chosen = &kernel_avx2;
        return 1;
    }
#endif
    if (strcmp(name, "portable") == 0) {
        chosen = &kernel_portable;
        return 1;
    }
    return 0;
}

static uint64_t sinks_bytes(const request *ask) { return ask->sinks * ask->width * ask->element; }
static uint64_t tail_bytes(const request *ask) { return ask->tokens * ask->tail * ask->element; }

/* Bytes of the parts sinks and tail of a head. */
static uint64_t extra_bytes(const request *ask) {
    return kv_pad16(sinks_bytes(ask)) + kv_pad16(tail_bytes(ask));
}

#include "_codecs_rans.h"
#include "_codecs_sections.h"

/* --- fixed rate ------------------------------------------------------------------------------------- */

static int is_fixed_rate(uint32_t codec) {
    return codec == KV_FP8 || codec == KV_INT8 || codec == KV_INT4 || codec == KV_NVFP4 ||
           codec == KV_HQ4 || codec == KV_HQ3;
}

/* What holds for every request. The limits keep every product of sizes far below 2^63. */
static int is_sound(const request *ask) {
    static const uint64_t elements[] = {0, 2, 2, 4, 1, 1, 1};
    return ask->kind <= KV_VALUES && ask->source >= SOURCE_BF16 && ask->source <= SOURCE_OPAQUE &&
           ask->element == elements[ask->source] && ask->heads > 0 && ask->heads <= 65535 &&
           ask->tokens > 0 && ask->tokens <= 1u << 30 && ask->width > 0 && ask->width <= BLOCK &&
           ask->sinks <= ask->tokens && ask->tail <= 1u << 16;
}

static void open_head(head *h, const request *ask, const kv_layout *at) {
    h->ask = ask;
    h->at = *at;
    h->error = h->energy = 0.0;
    h->is_broken = 0;
    uint64_t state = kv_hq_sign_state(ask->table, ask->layer, ask->kind);
    for (uint32_t c = 0; c < ask->width; c++) {
        h->flips[c] = kv_hq_signs(state, c / 64) >> (c % 64) & 1u ? 0x80000000u : 0u;
    }
}

static void zero_padding(const head *h) {
    for (int i = 0; i < KV_PARTS; i++) {
        memset(part(h, i) + h->at.size[i], 0, kv_pad16(h->at.size[i]) - h->at.size[i]);
    }
}

/* The variable-rate codecs: *size* is the cap, found->size what it came to. Offsets are 32 bits. */
static int encode_variable(
    const request *ask, const uint8_t *values, uint8_t *section, uint64_t size, outcome *found) {
    head h;
    kv_layout none = {{0}, {0}, 0, 0};
    room out = {section, lesser(size, UINT32_MAX), 0};
    uint8_t *from = (uint8_t *)(uintptr_t)values;
    int status = BAD_REQUEST;
    open_head(&h, ask, &none);
    if (ask->codec == KV_EXP3 && ask->source == SOURCE_BF16) {
        status = exp3_encode(&h, &out, from);
    } else if (ask->codec == KV_RANS) {
        status = rans_encode(&h, &out, from);
    } else if (ask->codec == KV_ECSQ && ask->source != SOURCE_OPAQUE) {
        status = ecsq_encode(&h, &out, from);
    }
    *found = (outcome){h.error, h.energy, out.at};
    return status == DONE && !(h.error <= FLT_MAX) ? UNFIT : status;
}

static int decode_variable(const request *ask, const uint8_t *section, uint64_t size,
    uint8_t *values, uint64_t first, uint64_t end) {
    head h;
    kv_layout none = {{0}, {0}, 0, 0};
    room in = {(uint8_t *)(uintptr_t)section, size, 0};
    open_head(&h, ask, &none);
    if (ask->codec == KV_EXP3 && ask->source == SOURCE_BF16) {
        return exp3_decode(&h, &in, values, first, end);
    }
    if (ask->codec == KV_RANS) {
        return rans_decode(&h, &in, values, first, end);
    }
    if (ask->codec == KV_ECSQ && ask->source != SOURCE_OPAQUE) {
        return ecsq_decode(&h, &in, values, first, end);
    }
    return BAD_REQUEST;
}

/* Encode all heads of the engine's *values* into the *size* bytes at *section*. */
int kvstore_codecs_encode(
    const request *ask, const uint8_t *values, uint8_t *section, uint64_t size, outcome *found) {
    if (!is_sound(ask)) {
        return BAD_REQUEST;
    }
    if (!is_fixed_rate(ask->codec)) {
        return encode_variable(ask, values, section, size, found);
    }
    if (ask->source == SOURCE_OPAQUE) {
        return BAD_REQUEST;
    }
    kv_layout at = kv_layout_of(ask->codec, ask->kind, ask->tokens, ask->width, extra_bytes(ask));
    if (size != ask->heads * at.bytes) {
        return BAD_REQUEST;
    }
    head h;
    *found = (outcome){0.0, 0.0, size};
    for (uint64_t i = 0; i < ask->heads; i++) {
        open_head(&h, ask, &at);
        h.block = section + i * at.bytes;
        h.values = (uint8_t *)(uintptr_t)values + (int64_t)i * ask->head_stride;
        if (ask->codec == KV_FP8 || ask->codec == KV_NVFP4) {
            memset(part(&h, ask->codec == KV_FP8 ? 1 : 3), 0, 16);
        }
        chosen->encode[ask->kind][ask->codec](&h);
        if (h.is_broken || !(h.error <= FLT_MAX)) {
            return UNFIT;
        }
        zero_padding(&h);
        found->error += h.error;
        found->energy += h.energy;
    }
    return DONE;
}

/* Decode heads [first, end) of the *size* bytes at *section*; *values* is where head first goes. */
int kvstore_codecs_decode(
    const request *ask, const uint8_t *section, uint64_t size, uint8_t *values, uint64_t first,
    uint64_t end) {
    if (!is_sound(ask) || first > end || end > ask->heads) {
        return BAD_REQUEST;
    }
    if (!is_fixed_rate(ask->codec)) {
        return decode_variable(ask, section, size, values, first, end);
    }
    if (ask->source == SOURCE_OPAQUE) {
        return BAD_REQUEST;
    }
    kv_layout at = kv_layout_of(ask->codec, ask->kind, ask->tokens, ask->width, extra_bytes(ask));
    if (size != ask->heads * at.bytes) {
        return BAD_BYTES;
    }
    head h;
    for (uint64_t i = first; i < end; i++) {
        open_head(&h, ask, &at);
        h.block = (uint8_t *)(uintptr_t)section + i * at.bytes;
        h.values = values + (int64_t)(i - first) * ask->head_stride;
        chosen->decode[ask->kind][ask->codec](&h);
    }
    return DONE;
}
