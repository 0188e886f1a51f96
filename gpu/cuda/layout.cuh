/* Where the parts of a head block lie: docs/codec-format.md, section 4. */
#ifndef KVSTORE_LAYOUT_CUH
#define KVSTORE_LAYOUT_CUH

#include "dialect.cuh"

#define KV_TILE 64u
#define KV_INT8_GROUP 256u
#define KV_INT4_CHANNELS 64u

enum { KV_KEYS = 0, KV_VALUES = 1 };
enum { KV_RAW = 0, KV_FP8 = 1, KV_INT8 = 2, KV_INT4 = 3, KV_NVFP4 = 5, KV_HQ4 = 6, KV_HQ3 = 7 };
enum { KV_EXP3 = 8, KV_RANS = 9, KV_ECSQ = 10, KV_COMPAT = 13 };
enum { KV_PARTS = 5 };

KV_INLINE uint64_t kv_pad16(uint64_t size) { return (size + 15u) & ~(uint64_t)15u; }

KV_INLINE uint64_t kv_ceil(uint64_t count, uint64_t step) { return (count + step - 1u) / step; }

/* Byte rows of a tile of *rows* tokens, *per_byte* of them to a byte. */
KV_INLINE uint64_t kv_plane_rows(uint64_t rows, uint64_t per_byte) { return kv_ceil(rows, per_byte); }

/* Byte rows of all tiles of a head. */
KV_INLINE uint64_t kv_planes(uint64_t tokens, uint64_t per_byte) {
    return tokens / KV_TILE * (KV_TILE / per_byte) + kv_ceil(tokens % KV_TILE, per_byte);
}

/* Bytes of the codes of a token in the V layout of int4kv. */
KV_INLINE uint64_t kv_int4_row_bytes(uint64_t width) {
    uint64_t rest = width % KV_INT4_CHANNELS;
    return width / KV_INT4_CHANNELS * (KV_INT4_CHANNELS / 2u) + (rest + 1u) / 2u;
}

/* Offsets of codes and parameters in a head block; *end* is where sinks begin, *bytes* its length. */
typedef struct {
    uint64_t part[KV_PARTS];
    uint64_t size[KV_PARTS];
    uint64_t end;
    uint64_t bytes;
} kv_layout;

KV_INLINE void kv_layout_sizes(
    uint64_t *size, uint32_t codec, uint32_t kind, uint64_t tokens, uint64_t width) {
    uint64_t tiles = kv_ceil(tokens, KV_TILE), is_keys = kind == KV_KEYS;
    switch (codec) {
    case KV_FP8:
        size[0] = tokens * width;
        size[1] = 16;
        break;
    case KV_INT8:
        size[0] = tokens * width;
        size[1] = 2 * (is_keys ? kv_ceil(tokens, KV_INT8_GROUP) * width : tokens);
        break;
    case KV_INT4:
        size[0] = is_keys ? kv_planes(tokens, 2) * width : tokens * kv_int4_row_bytes(width);
        size[1] = 4 * (is_keys ? tiles * width : tokens * kv_ceil(width, KV_INT4_CHANNELS));
        break;
    case KV_NVFP4:
        size[0] = kv_planes(tokens, 2) * width;
        size[1] = is_keys ? kv_ceil(tokens, 16) * width : tokens * kv_ceil(width, 16);
        size[2] = is_keys ? 2 * width : 0;
        size[3] = 16;
        break;
    case KV_HQ4:
        size[0] = kv_planes(tokens, 2) * width;
        size[2] = 2 * tokens;
        size[3] = size[4] = is_keys ? 2 * width : 0;
        break;
    case KV_HQ3:
        size[0] = kv_planes(tokens, 4) * width;
        size[1] = kv_planes(tokens, 8) * width;
        size[2] = 2 * tokens;
        size[3] = size[4] = is_keys ? 2 * width : 0;
        break;
    case KV_COMPAT:
        size[0] = tokens * width / 2;
        size[1] = tokens * width / 16;
        size[2] = 16;
        break;
    default: break;
    }
}

/* The layout of a lossy fixed-rate codec's head block. *extra* is sinks and tail, padded. */
KV_INLINE kv_layout kv_layout_of(
    uint32_t codec, uint32_t kind, uint64_t tokens, uint64_t width, uint64_t extra) {
    kv_layout made = {{0, 0, 0, 0, 0}, {0, 0, 0, 0, 0}, 0, 0};
    kv_layout_sizes(made.size, codec, kind, tokens, width);
    for (int i = 0; i < KV_PARTS; i++) {
        made.part[i] = made.end;
        made.end += kv_pad16(made.size[i]);
    }
    made.bytes = made.end + extra;
    return made;
}

#endif
