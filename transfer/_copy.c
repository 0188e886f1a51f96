/* Byte movers: gather scattered pieces into one buffer, scatter them back, and take checksums
 * of 64 KiB blocks in the same pass over memory.
 *
 * Loaded with ctypes, so there is no Python in here. One build serves every CPU: the inner loops
 * are compiled for AVX-512, AVX2 and plain C, and the best one is chosen when the library loads.
 *
 * Why it is fast: one stream of copies waits for memory. Four streams ("lanes") that advance
 * together keep enough lines in flight, prefetching hides the jump from piece to piece, and
 * streaming stores spare the read of the target that an ordinary store costs.
 *
 * Words: the *flat* side is the contiguous buffer; *pieces* are the scattered side; a *lane* is
 * one consecutive part of the flat buffer; a *unit* is 1 KiB, the step in which a lane advances
 * and also the block after which XXH3 scrambles its accumulators; a *span* is a quarter of a unit
 * and the least that moves straight between a piece and the flat side.
 */

#include <stddef.h>
#include <stdint.h>
#include <string.h>

enum { LANES = 4, LINE = 64, SPAN = 256, SPANS = 4, UNIT = SPANS * SPAN, BLOCK = 64 * 1024 };

/* --- XXH3-64, long inputs, seed 0 ------------------------------------------------------------
 *
 * Constants and steps are those of the XXH3 specification (doc/xxhash_spec.md in the xxHash
 * repository), sections "default secret" and "large inputs". A checksum block is 64 units: each
 * is 16 stripes of 64 bytes, and the very last stripe uses its own part of the secret.
 */

enum { ACCUMULATORS = 8, STRIPES = UNIT / LINE };
enum { SCRAMBLE_KEY = 192 - 64, LAST_STRIPE_KEY = 192 - 64 - 7, MERGE_KEY = 11 };

static const uint64_t PRIME32_1 = 0x9E3779B1u, PRIME32_2 = 0x85EBCA77u, PRIME32_3 = 0xC2B2AE3Du;
static const uint64_t PRIME64_1 = 0x9E3779B185EBCA87u, PRIME64_2 = 0xC2B2AE3D27D4EB4Fu;
static const uint64_t PRIME64_3 = 0x165667B19E3779F9u, PRIME64_4 = 0x85EBCA77C2B2AE63u;
static const uint64_t PRIME64_5 = 0x27D4EB2F165667C5u, PRIME_MX1 = 0x165667919E3779F9u;

static const uint8_t SECRET[192] __attribute__((aligned(64))) = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e,
};

static uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

static uint64_t word_at(const uint8_t *bytes) {
    uint64_t word;
    memcpy(&word, bytes, sizeof word);
    return word;
}

static void digest_start(uint64_t *acc) {
    const uint64_t start[ACCUMULATORS] = {
        PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1,
    };
    memcpy(acc, start, sizeof start);
}

static uint64_t digest_finish(const uint64_t *acc) {
    uint64_t result = BLOCK * PRIME64_1;
    for (int i = 0; i < ACCUMULATORS; i += 2) {
        const uint8_t *key = SECRET + MERGE_KEY + 8 * i;
        unsigned __int128 product = (unsigned __int128)(acc[i] ^ word_at(key)) *
                                    (acc[i + 1] ^ word_at(key + 8));
        result += (uint64_t)product ^ (uint64_t)(product >> 64);
    }
    result = (result ^ (result >> 37)) * PRIME_MX1;
    return result ^ (result >> 32);
}

/* --- one round: every lane advances by one unit ---------------------------------------------- */

enum { STORE_NONE, STORE_PLAIN, STORE_STREAM };
enum { NO_DIGEST, DIGEST_FIRST, DIGEST_MIDDLE, DIGEST_LAST };

/* Lines are prefetched this many spans before they are read. */
enum { PREFETCH_SPANS = 2 };

typedef struct {
    const uint8_t *from[LANES][SPANS + PREFETCH_SPANS]; /* then the first spans of the next round */
    uint8_t *to[LANES][SPANS];
    uint64_t acc[LANES][ACCUMULATORS] __attribute__((aligned(64)));
} lanes;

typedef struct {
    const char *name;
    void (*round)(lanes *all, int width, int store, int digest);
    void (*stream)(uint8_t *to, const uint8_t *from, size_t size);
    void (*fence)(void);
} kernel;

/* Each section below gives one CPU's 64-byte vector; _copy_kernel.h turns it into a kernel. */

#if defined(__x86_64__)
#include <immintrin.h>

#define TARGET __attribute__((target("avx512f")))
#define NAME(function) function##_avx512
#define KERNEL_NAME "avx512"
typedef __m512i vec_avx512;
#define VEC vec_avx512

TARGET static inline VEC NAME(load)(const void *from) { return _mm512_loadu_si512(from); }
TARGET static inline void NAME(put)(void *to, VEC v) { _mm512_storeu_si512(to, v); }
TARGET static inline void NAME(put_streaming)(void *to, VEC v) { _mm512_stream_si512(to, v); }
TARGET static inline void NAME(fence)(void) { _mm_sfence(); }

TARGET static inline VEC NAME(accumulate)(VEC acc, VEC stripe, const uint8_t *key) {
    VEC mixed = _mm512_xor_si512(stripe, NAME(load)(key));
    VEC product = _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32));
    VEC swapped = _mm512_shuffle_epi32(stripe, (_MM_PERM_ENUM)0x4E);
    return _mm512_add_epi64(acc, _mm512_add_epi64(product, swapped));
}

TARGET static inline VEC NAME(scramble)(VEC acc) {
    const VEC prime = _mm512_set1_epi64((long long)PRIME32_1);
    VEC mixed = _mm512_xor_si512(acc, _mm512_srli_epi64(acc, 47));
    mixed = _mm512_xor_si512(mixed, NAME(load)(SECRET + SCRAMBLE_KEY));
    VEC high = _mm512_mul_epu32(_mm512_srli_epi64(mixed, 32), prime);
    return _mm512_add_epi64(_mm512_mul_epu32(mixed, prime), _mm512_slli_epi64(high, 32));
}
#include "_copy_kernel.h"

#define TARGET __attribute__((target("avx2")))
#define NAME(function) function##_avx2
#define KERNEL_NAME "avx2"
typedef struct {
    __m256i half[2];
} vec_avx2;
#define VEC vec_avx2

TARGET static inline VEC NAME(load)(const void *from) {
    const __m256i *at = from;
    return (VEC){{_mm256_loadu_si256(at), _mm256_loadu_si256(at + 1)}};
}
TARGET static inline void NAME(put)(void *to, VEC v) {
    _mm256_storeu_si256((__m256i *)to, v.half[0]);
    _mm256_storeu_si256((__m256i *)to + 1, v.half[1]);
}
TARGET static inline void NAME(put_streaming)(void *to, VEC v) {
    _mm256_stream_si256((__m256i *)to, v.half[0]);
    _mm256_stream_si256((__m256i *)to + 1, v.half[1]);
}
TARGET static inline void NAME(fence)(void) { _mm_sfence(); }

TARGET static inline VEC NAME(accumulate)(VEC acc, VEC stripe, const uint8_t *key) {
    VEC keys = NAME(load)(key);
    for (int i = 0; i < 2; i++) {
        __m256i mixed = _mm256_xor_si256(stripe.half[i], keys.half[i]);
        __m256i product = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
        __m256i swapped = _mm256_shuffle_epi32(stripe.half[i], 0x4E);
        acc.half[i] = _mm256_add_epi64(acc.half[i], _mm256_add_epi64(product, swapped));
    }
    return acc;
}

TARGET static inline VEC NAME(scramble)(VEC acc) {
    const __m256i prime = _mm256_set1_epi64x((long long)PRIME32_1);
    VEC keys = NAME(load)(SECRET + SCRAMBLE_KEY);
    for (int i = 0; i < 2; i++) {
        __m256i mixed = _mm256_xor_si256(acc.half[i], _mm256_srli_epi64(acc.half[i], 47));
        mixed = _mm256_xor_si256(mixed, keys.half[i]);
        __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(mixed, 32), prime);
        __m256i low = _mm256_mul_epu32(mixed, prime);
        acc.half[i] = _mm256_add_epi64(low, _mm256_slli_epi64(high, 32));
    }
    return acc;
}
#include "_copy_kernel.h"
#endif /* __x86_64__ */

#define TARGET
#define NAME(function) function##_portable
#define KERNEL_NAME "portable"
typedef struct {
    uint64_t word[ACCUMULATORS];
} vec_portable;
#define VEC vec_portable

static inline VEC NAME(load)(const void *from) {
    VEC v;
    memcpy(&v, from, sizeof v);
    return v;
}
static inline void NAME(put)(void *to, VEC v) { memcpy(to, &v, sizeof v); }
static inline void NAME(put_streaming)(void *to, VEC v) { memcpy(to, &v, sizeof v); }
static inline void NAME(fence)(void) {}

static inline VEC NAME(accumulate)(VEC acc, VEC stripe, const uint8_t *key) {
    VEC keys = NAME(load)(key);
    for (int i = 0; i < ACCUMULATORS; i++) {
        uint64_t mixed = stripe.word[i] ^ keys.word[i];
        acc.word[i] += stripe.word[i ^ 1] + (mixed & 0xFFFFFFFFu) * (mixed >> 32);
    }
    return acc;
}

static inline VEC NAME(scramble)(VEC acc) {
    VEC keys = NAME(load)(SECRET + SCRAMBLE_KEY);
    for (int i = 0; i < ACCUMULATORS; i++) {
        acc.word[i] = (acc.word[i] ^ (acc.word[i] >> 47) ^ keys.word[i]) * PRIME32_1;
    }
    return acc;
}
#include "_copy_kernel.h"

/* --- which kernel ---------------------------------------------------------------------------- */

static const kernel *chosen = &kernel_portable;

__attribute__((constructor)) static void choose_best(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f")) {
        chosen = &kernel_avx512;
    } else if (__builtin_cpu_supports("avx2")) {
        chosen = &kernel_avx2;
    }
#endif
}

const char *kvstore_kernel(void) { return chosen->name; }

/* Use a lesser kernel than the best (tests compare them). Returns 0 when this CPU lacks it. */
int kvstore_use_kernel(const char *name) {
    choose_best();
    if (strcmp(name, chosen->name) == 0) {
        return 1;
    }
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

#include "_copy_cursor.h"

/* --- moving groups of lanes ------------------------------------------------------------------ */

typedef enum { GATHER, SCATTER, DIGEST_ONLY } direction;

typedef struct {
    direction way;
    uint8_t *flat;
    runs pieces;
} move;

/* One group: width lanes of lane_bytes each, consecutive in the flat buffer from position. */
typedef struct {
    const move *of;
    uint64_t position;
    uint64_t lane_bytes;
    int width;
    cursor at[LANES];
    cursor after[LANES]; /* where a lane's cursor stands once its unit was stored directly */
    lanes all;
    uint8_t staging[LANES][UNIT] __attribute__((aligned(64)));
} group;

static int is_line_aligned(const void *address) { return (uintptr_t)address % LINE == 0; }

static void open_group(group *g) {
    for (int lane = 0; lane < g->width; lane++) {
        if (g->of->way != DIGEST_ONLY) {
            g->at[lane] = cursor_at(&g->of->pieces, g->position + lane * g->lane_bytes);
        }
        digest_start(g->all.acc[lane]);
    }
}

/* Where a lane's unit begins on the flat side. */
static uint8_t *flat_unit(const group *g, int lane, uint64_t offset) {
    return g->of->flat + g->position + lane * g->lane_bytes + offset;
}

/* Where the unit after that begins: behind the last of a lane comes the next group's first. */
static uint8_t *flat_unit_after(const group *g, int lane, uint64_t offset) {
    uint64_t jump = offset + UNIT == g->lane_bytes ? (g->width - 1) * g->lane_bytes : 0;
    return flat_unit(g, lane, offset) + UNIT + jump;
}

static void read_from_flat(group *g, int lane, uint64_t offset) {
    uint8_t *here = flat_unit(g, lane, offset);
    uint8_t *after = flat_unit_after(g, lane, offset);
    for (int i = 0; i < SPANS; i++) {
        g->all.from[lane][i] = here + i * SPAN;
    }
    for (int i = 0; i < PREFETCH_SPANS; i++) {
        g->all.from[lane][SPANS + i] = after + i * SPAN;
    }
}

/* Read a span straight from its piece, or put it together from several. */
static const uint8_t *read_span(cursor *at, uint8_t *staging) {
    if (cursor_room(at) < SPAN) {
        read_pieces(at, staging, SPAN);
        return staging;
    }
    const uint8_t *here = cursor_address(at);
    cursor_skip(at, SPAN);
    return here;
}

/* Say where the next round will read, so that this one prefetches it. */
static void look_ahead(cursor at, const uint8_t **spans) {
    for (int i = 0; i < PREFETCH_SPANS && !cursor_ended(&at); i++) {
        if (cursor_room(&at) < SPAN) {
            prefetch_pieces(at, UNIT - i * SPAN);
            return;
        }
        spans[i] = cursor_address(&at);
        cursor_skip(&at, SPAN);
    }
}

static void read_from_pieces(group *g, int lane, uint64_t offset) {
    cursor *at = &g->at[lane];
    const uint8_t **from = g->all.from[lane];
    for (int i = 0; i < SPANS; i++) {
        from[i] = read_span(at, g->staging[lane] + i * SPAN);
    }
    for (int i = 0; i < PREFETCH_SPANS; i++) {
        from[SPANS + i] = from[0]; /* nothing to prefetch, unless look_ahead finds some */
    }
    if (offset + UNIT == g->lane_bytes) {
        *at = cursor_at(at->of, (uint64_t)(flat_unit_after(g, lane, offset) - g->of->flat));
    }
    look_ahead(*at, from + SPANS);
}

static void gather_unit(group *g, uint64_t offset, int digest) {
    for (int lane = 0; lane < g->width; lane++) {
        read_from_pieces(g, lane, offset);
        for (int i = 0; i < SPANS; i++) {
            g->all.to[lane][i] = flat_unit(g, lane, offset) + i * SPAN;
        }
    }
    int store = is_line_aligned(g->of->flat) ? STORE_STREAM : STORE_PLAIN;
    chosen->round(&g->all, g->width, store, digest);
}

/* Let the lane store straight into its pieces; return 0 when they are too small or unaligned. */
static int write_to_pieces(group *g, int lane) {
    cursor at = g->at[lane];
    for (int i = 0; i < SPANS; i++) {
        uint8_t *here = cursor_address(&at);
        if (cursor_room(&at) < SPAN || !is_line_aligned(here)) {
            return 0;
        }
        g->all.to[lane][i] = here;
        cursor_skip(&at, SPAN);
    }
    g->after[lane] = at;
    return 1;
}

static void scatter_unit(group *g, uint64_t offset, int digest) {
    int direct = 1;
    for (int lane = 0; lane < g->width; lane++) {
        read_from_flat(g, lane, offset);
        direct = direct && write_to_pieces(g, lane);
    }
    chosen->round(&g->all, g->width, direct ? STORE_STREAM : STORE_NONE, digest);
    for (int lane = 0; lane < g->width; lane++) {
        if (direct) {
            g->at[lane] = g->after[lane];
        } else { /* the round left the unit in the cache */
            write_pieces(&g->at[lane], g->all.from[lane][0], UNIT);
        }
    }
}

static void digest_unit(group *g, uint64_t offset, int digest) {
    for (int lane = 0; lane < g->width; lane++) {
        read_from_flat(g, lane, offset);
    }
    chosen->round(&g->all, g->width, STORE_NONE, digest);
}

static int digest_step(const group *g, uint64_t offset) {
    if (offset == 0) {
        return DIGEST_FIRST;
    }
    return offset + UNIT == g->lane_bytes ? DIGEST_LAST : DIGEST_MIDDLE;
}

static void move_group(group *g, uint64_t *digests) {
    open_group(g);
    for (uint64_t offset = 0; offset < g->lane_bytes; offset += UNIT) {
        int digest = digests != NULL ? digest_step(g, offset) : NO_DIGEST;
        switch (g->of->way) {
        case GATHER: gather_unit(g, offset, digest); break;
        case SCATTER: scatter_unit(g, offset, digest); break;
        case DIGEST_ONLY: digest_unit(g, offset, digest); break;
        }
    }
    for (int i = 0; digests != NULL && i < g->width; i++) {
        digests[i] = digest_finish(g->all.acc[i]);
    }
}

/* Digest and move all whole checksum blocks; return the position after them. */
static uint64_t move_blocks(const move *m, uint64_t size, uint64_t *digests) {
    group g = {.of = m, .lane_bytes = BLOCK};
    while (size - g.position >= BLOCK) {
        g.width = (int)smaller(LANES, (size - g.position) / BLOCK);
        move_group(&g, digests + g.position / BLOCK);
        g.position += g.width * g.lane_bytes;
    }
    return g.position;
}

/* Move what needs no digests; lanes shrink with what is left, so that there are always four. */
static void move_rest(const move *m, uint64_t position, uint64_t size) {
    group g = {.of = m, .position = position, .width = LANES};
    while (size - g.position >= LANES * UNIT) {
        g.lane_bytes = smaller(BLOCK, (size - g.position) / LANES / UNIT * UNIT);
        move_group(&g, NULL);
        g.position += LANES * g.lane_bytes;
    }
    cursor at = cursor_at(&m->pieces, g.position);
    if (m->way == GATHER) {
        read_pieces(&at, m->flat + g.position, size - g.position);
    } else {
        write_pieces(&at, m->flat + g.position, size - g.position);
    }
}

static void move_all(const move *m, uint64_t *digests) {
    uint64_t size = m->pieces.count * m->pieces.inner_count * m->pieces.piece_bytes;
    if (size == 0) {
        return;
    }
    uint64_t position = digests != NULL ? move_blocks(m, size, digests) : 0;
    move_rest(m, position, size);
    chosen->fence(); /* streaming stores are visible to other CPUs only after this */
}

/* --- what Python calls -----------------------------------------------------------------------
 *
 * digests is NULL, or has room for one word per whole 64 KiB block of the flat buffer. A shorter
 * last block is moved but not digested: its caller does that.
 */

void kvstore_gather(uint8_t *target, const runs *pieces, uint64_t *digests) {
    move m = {GATHER, target, *pieces};
    move_all(&m, digests);
}

void kvstore_scatter(uint8_t *source, const runs *pieces, uint64_t *digests) {
    move m = {SCATTER, source, *pieces};
    move_all(&m, digests);
}

void kvstore_copy(uint8_t *target, const uint8_t *source, uint64_t size, uint64_t *digests) {
    uint64_t address = (uint64_t)(uintptr_t)source;
    runs whole = {&address, size > 0, size, 1, 0};
    kvstore_gather(target, &whole, digests);
}

void kvstore_digest_blocks(uint8_t *source, uint64_t size, uint64_t *digests) {
    move m = {.way = DIGEST_ONLY, .flat = source};
    move_blocks(&m, size, digests);
}
