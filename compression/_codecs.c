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

#include "../gpu/cuda/ecsq.cuh"
#include "../gpu/cuda/exp3.cuh"
#include "../gpu/cuda/fp8.cuh"
#include "../gpu/cuda/hadamard.cuh"
#include "../gpu/cuda/int4.cuh"
#include "../gpu/cuda/int8.cuh"
#include "../gpu/cuda/layout.cuh"
#include "../gpu/cuda/nvfp4.cuh"
#include "../gpu/cuda/rans.cuh"

/* BLOCK: the widest head. GROUP: tokens that are turned together, so that each becomes a column.
 * APART: floats between the rows that are turned. STRIP: channels of a tile that are summed at a
 * time, so that they stay in the nearest cache. TAKEN_AT_ONCE: of 64 bytes few are marked, but how
 * few cannot be foretold, so this many are taken without asking. */
enum { BLOCK = 1024, GROUP = 16, APART = 16, STRIP = 64, TAKEN_AT_ONCE = 4 };
enum { MODERATE = 0x7a000000 }; /* the bits of 2^117: see is_moderate */
enum { SOURCE_BF16 = 1, SOURCE_FP16, SOURCE_FP32, SOURCE_E4M3, SOURCE_E5M2, SOURCE_OPAQUE };
enum { DONE = 0, UNFIT = 1, BAD_BYTES = 2, BAD_REQUEST = 3, NO_MEMORY = 4 };

/* Parts begin anywhere: their readers do not count on alignment. */
typedef uint16_t any16 __attribute__((aligned(1), may_alias));
typedef uint32_t any32 __attribute__((aligned(1), may_alias));
typedef uint64_t any64 __attribute__((aligned(1), may_alias));

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

typedef struct {
    const char *name;
    void (*encode[2][KV_HQ3 + 1])(head *h); /* by kind and codec */
    void (*decode[2][KV_HQ3 + 1])(head *h);
    void (*largest_exponents)(const uint8_t *values, int64_t stride, size_t rows, uint8_t *largest,
                              size_t n);
    void (*split_row)(const any16 *bits, const uint8_t *largest, uint8_t escape, uint8_t *rest,
                      uint8_t *exponents, uint8_t *offsets, size_t n);
    size_t (*mark_bytes)(const uint8_t *bytes, size_t count, uint8_t wanted, uint64_t *marks);
    uint8_t *(*gather_marked)(const uint8_t *bytes, const uint64_t *marks, size_t count,
                              uint8_t *list);
    void (*scatter_marked)(uint8_t *bytes, const uint64_t *marks, size_t count,
                           const uint8_t *list, size_t listed);
    void (*below_largest)(const uint8_t *largest, uint8_t *offsets, size_t n);
    void (*raise_largest)(uint8_t *largest, const uint8_t *symbols, size_t n);
    void (*split_values)(uint32_t source, const uint8_t *values, uint8_t *symbols,
                         uint8_t *const *rest, size_t n);
    void (*merge_values)(uint32_t source, const uint8_t *symbols, uint8_t *const *rest,
                         uint8_t *values, size_t n);
    void (*merge_row)(const uint8_t *rest, const uint8_t *exponents, any16 *bits, size_t n);
    void (*pack_plane)(const uint8_t *codes, size_t rows, unsigned width, unsigned shift,
                       uint8_t *plane, size_t n);
    void (*unpack_plane)(const uint8_t *plane, size_t rows, unsigned width, unsigned shift,
                         uint8_t *codes, size_t n);
    size_t (*ecsq_encode)(head *h, uint8_t *symbols, any16 *list);
    int (*ecsq_decode)(head *h, const uint8_t *symbols, const any16 *list, size_t held);
} kernel;

static void turn_rows_portable(
    const float *from, size_t pitch, float *to, size_t to_pitch) {
    for (size_t r = 0; r < 16; r++) {
        for (size_t lane = 0; lane < 16; lane++) {
            to[lane * to_pitch + r] = from[r * pitch + lane];
        }
    }
}

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
#define NAME(function) function##_avx512
#define KERNEL_NAME "avx512"
TARGET static inline uint64_t mark_64_avx512(const uint8_t *bytes, uint8_t wanted) {
    return _mm512_cmpeq_epi8_mask(_mm512_loadu_si512(bytes), _mm512_set1_epi8((char)wanted));
}
/* Sixteen rows of sixteen floats, rows becoming columns: at each step lanes that differ in one bit
 * of their number change places with rows that do. */
TARGET static inline void turn_rows_avx512(
    const float *from, size_t pitch, float *to, size_t to_pitch) {
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512 rows[16];
    for (int r = 0; r < 16; r++) {
        rows[r] = _mm512_loadu_ps(from + (size_t)r * pitch);
    }
#pragma GCC unroll 4
    for (int step = 1; step < 16; step *= 2) {
        __m512i bit = _mm512_set1_epi32(step);
        __mmask16 upper = _mm512_test_epi32_mask(lanes, bit);
        /* 16 and more are lanes of the second row. */
        __m512i low = _mm512_mask_add_epi32(
            lanes, upper, lanes, _mm512_set1_epi32(16 - step));
        __m512i high = _mm512_mask_add_epi32(
            _mm512_add_epi32(lanes, bit), upper, lanes, _mm512_set1_epi32(16));
#pragma GCC unroll 16
        for (int r = 0; r < 16; r++) {
            if ((r & step) == 0) {
                __m512 a = rows[r], b = rows[r + step];
                rows[r] = _mm512_permutex2var_ps(a, low, b);
                rows[r + step] = _mm512_permutex2var_ps(a, high, b);
            }
        }
    }
    for (int r = 0; r < 16; r++) {
        _mm512_storeu_ps(to + (size_t)r * to_pitch, rows[r]);
    }
}
#include "_codecs_table.h"
#undef TARGET
#undef NAME
#undef KERNEL_NAME

#define TARGET __attribute__((target("avx2")))
#define turn_rows_avx2 turn_rows_portable
#define NAME(function) function##_avx2
#define KERNEL_NAME "avx2"
TARGET static inline uint64_t mark_64_avx2(const uint8_t *bytes, uint8_t wanted) {
    const __m256i *at = (const __m256i *)(const void *)bytes, all = _mm256_set1_epi8((char)wanted);
    __m256i low = _mm256_cmpeq_epi8(_mm256_loadu_si256(at), all);
    __m256i high = _mm256_cmpeq_epi8(_mm256_loadu_si256(at + 1), all);
    return (uint64_t)(uint32_t)_mm256_movemask_epi8(high) << 32 |
           (uint32_t)_mm256_movemask_epi8(low);
}
#include "_codecs_table.h"
#undef TARGET
#undef NAME
#undef KERNEL_NAME
#endif

#define TARGET
#define NAME(function) function##_portable
#define KERNEL_NAME "portable"
static inline uint64_t mark_64_portable(const uint8_t *bytes, uint8_t wanted) {
    uint64_t marks = 0;
    for (int i = 0; i < 64; i++) {
        marks |= (uint64_t)(bytes[i] == wanted) << i;
    }
    return marks;
}
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
#include "_codecs_exp3.h"
#include "_codecs_variable.h"

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
