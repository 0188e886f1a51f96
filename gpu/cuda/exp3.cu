/* exp3: a part is a tile. K and V are alike, and the only type is bfloat16. A tile takes the shortest
 * of three forms; a section that would be longer than its values is those values. */
#include "exp3.cuh"
#include "spans.cuh"

enum { MODE_EXP3 = 0, MODE_EXP4 = 1, MODE_RAW = 2, MODES = 3 };

#define KV_EXP3_WIDTH_MAX 1024

KV_INLINE uint32_t tiles_of(const Batch &batch) { return (uint32_t)kv_ceil(batch.tokens, KV_TILE); }

KV_INLINE uint32_t pieces_of(const Batch &batch) { return batch.heads * tiles_of(batch); }

KV_INLINE uint64_t raw_bytes_of(const Batch &batch) {
    return (uint64_t)batch.heads * batch.tokens * batch.width * 2;
}

/* Where the parts of a tile lie in it. Widths are multiples of 16, so only escapes are padded. */
struct Tile {
    uint64_t rest, planes, high, count, list;
};

KV_INLINE Tile tile_of(uint32_t mode, uint64_t rows, uint64_t width) {
    Tile made;
    made.rest = width;
    made.planes = made.rest + rows * width;
    made.high = made.planes + kv_plane_rows(rows, mode == MODE_EXP3 ? 4 : 2) * width;
    made.count = made.high + (mode == MODE_EXP3 ? kv_plane_rows(rows, 8) * width : 0);
    made.list = made.count + 16;
    return made;
}

KV_INLINE uint64_t tile_bytes(uint32_t mode, uint64_t rows, uint64_t width, uint64_t escapes) {
    return mode == MODE_RAW ? 2 * rows * width : tile_of(mode, rows, width).list + kv_pad16(escapes);
}

KV_INLINE uint32_t escape_of(uint32_t mode) { return mode == MODE_EXP3 ? 7u : 15u; }

KV_INLINE void load_bits(const Rows &rows, uint32_t t, uint32_t channel, uint32_t *bits) {
    unpack8<KV_BF16>(load_values<KV_BF16>((const uint8_t *)rows[t], channel), bits);
}

/* Find the largest exponent of every channel of a tile; return how many values of this thread lie 7
 * below it or further, and 65536 times how many lie 15 below. */
KV_INLINE void find_largest(
    const Batch &batch, const Rows &rows, uint32_t count, uint8_t *largest, uint32_t *far) {
    __shared__ SlabKeys found;
    uint32_t row = threadIdx.x / KV_LANES, lane = threadIdx.x % KV_LANES * 8;
    far[0] = far[1] = 0;
    for (uint32_t first = 0; first < batch.width; first += KV_SLAB) {
        uint32_t bits[2][8] = {{0, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 0, 0}};
        int32_t keys[8];
        int is_real[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
            uint32_t t = row + k * KV_ROWS;
            is_real[k] = t < count && first + lane < batch.width;
            if (is_real[k]) {
                load_bits(rows, t, first + lane, bits[k]);
            }
        }
#pragma unroll
        for (int i = 0; i < 8; i++) {
            keys[i] = larger_key((int32_t)kv_exp3_exponent(bits[0][i]),
                                 (int32_t)kv_exp3_exponent(bits[1][i]));
        }
        post_largest(keys, found);
        __syncthreads();
        if (threadIdx.x < KV_SLAB && first + threadIdx.x < batch.width) {
            largest[first + threadIdx.x] = (uint8_t)largest_of_channel(found, threadIdx.x);
        }
        __syncthreads();
#pragma unroll
        for (int i = 0; i < 16; i++) {
            if (is_real[i / 8]) {
                uint32_t most = largest[first + lane + i % 8];
                uint32_t below = most - kv_exp3_exponent(bits[i / 8][i % 8]);
                far[0] += below >= 7;
                far[1] += below >= 15;
            }
        }
    }
}

/* --- how long ------------------------------------------------------------------------------------------ */

KV_INLINE void measure(const Batch &batch, const Place &at) {
    __shared__ Rows rows;
    __shared__ uint8_t largest[KV_EXP3_WIDTH_MAX];
    uint32_t count = find_rows(batch, at, at.part * KV_TILE, rows), far[2], escapes[2];
    find_largest(batch, rows, count, largest, far);
    sum_before(far[0], &escapes[MODE_EXP3]);
    sum_before(far[1], &escapes[MODE_EXP4]);
    if (threadIdx.x == 0) {
        uint32_t mode = MODE_EXP3;
        uint64_t size = tile_bytes(mode, count, batch.width, escapes[mode]);
        for (uint32_t other = MODE_EXP4; other < MODES; other++) {
            uint32_t listed = other == MODE_RAW ? 0 : escapes[other];
            uint64_t less = tile_bytes(other, count, batch.width, listed);
            mode = less < size ? other : mode;
            size = less < size ? less : size;
        }
        uint32_t *entries = scratch_of(batch, at, pieces_of(batch));
        entries[at.head * tiles_of(batch) + at.part] = (uint32_t)size | mode;
    }
}

KV_INLINE void total(const Batch &batch, const Place &at) {
    uint32_t pieces = pieces_of(batch);
    uint32_t *entries = scratch_of(batch, at, pieces);
    uint64_t end = lay_pieces(entries, pieces, directory_bytes(pieces));
    close_section(batch, at, end, raw_bytes_of(batch));
}

/* --- writing ------------------------------------------------------------------------------------------- */

/* Write what is kept of every value, and the list of escapes in order; return how many. */
KV_INLINE uint32_t place_values(const Rows &rows, uint32_t count, uint32_t width,
    const uint8_t *largest, uint32_t escape, uint8_t *rest, uint8_t *list) {
    uint32_t vectors = width / 8, listed = 0;
    for (uint32_t base = 0; base < count * vectors; base += KV_THREADS) {
        uint32_t i = base + threadIdx.x, bits[8], kept[8], far = 0, all;
        if (i < count * vectors) {
            uint32_t c = i % vectors * 8;
            load_bits(rows, i / vectors, c, bits);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                kept[j] = kv_exp3_rest(bits[j]);
                bits[j] = kv_exp3_exponent(bits[j]);
                far |= (uint32_t)(largest[c + j] - bits[j] >= escape) << j;
            }
            store8(rest + (uint64_t)i * 8, kept);
        }
        uint32_t place = listed + sum_before((uint32_t)__popc(far), &all);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            if (far >> j & 1u) {
                list[place++] = (uint8_t)bits[j];
            }
        }
        listed += all;
    }
    return listed;
}

/* Write one plane: *width* bits of each offset from bit *shift* on, rows q, q + rows ... in a byte. */
template <int BITS, int SHIFT>
KV_INLINE void place_plane(const Rows &rows, uint32_t count, uint32_t width,
    const uint8_t *largest, uint32_t escape, uint8_t *plane) {
    uint32_t vectors = width / 8, planes = (uint32_t)kv_plane_rows(count, 8 / BITS);
    for (uint32_t i = threadIdx.x; i < planes * vectors; i += KV_THREADS) {
        uint32_t c = i % vectors * 8, packed[8] = {0, 0, 0, 0, 0, 0, 0, 0}, bits[8];
#pragma unroll
        for (uint32_t k = 0; k < 8 / BITS; k++) {
            uint32_t t = i / vectors + k * planes;
            if (t < count) {
                load_bits(rows, t, c, bits);
#pragma unroll
                for (int j = 0; j < 8; j++) {
                    uint32_t exponent = kv_exp3_exponent(bits[j]);
                    uint32_t offset = kv_exp3_offset(largest[c + j], exponent, escape);
                    packed[j] |= (offset >> SHIFT & ((1u << BITS) - 1u)) << (k * BITS);
                }
            }
        }
        store8(plane + (uint64_t)i * 8, packed);
    }
}

KV_INLINE void place_tile(const Batch &batch, const Rows &rows, uint32_t count, uint32_t mode,
    uint8_t *tile) {
    __shared__ uint8_t largest[KV_EXP3_WIDTH_MAX];
    Tile parts = tile_of(mode, count, batch.width);
    uint32_t escape = escape_of(mode), far[2];
    find_largest(batch, rows, count, largest, far);
    for (uint32_t c = threadIdx.x; c < batch.width; c += KV_THREADS) {
        tile[c] = largest[c];
    }
    uint32_t listed = place_values(
        rows, count, batch.width, largest, escape, tile + parts.rest, tile + parts.list);
    if (mode == MODE_EXP3) {
        place_plane<2, 0>(rows, count, batch.width, largest, escape, tile + parts.planes);
        place_plane<1, 2>(rows, count, batch.width, largest, escape, tile + parts.high);
    } else {
        place_plane<4, 0>(rows, count, batch.width, largest, escape, tile + parts.planes);
    }
    if (threadIdx.x < 4) {
        ((uint32_t *)(tile + parts.count))[threadIdx.x] = threadIdx.x == 0 ? listed : 0u;
    }
    pad_part(tile + parts.list, listed);
}

KV_INLINE void place(const Batch &batch, const Place &at) {
    __shared__ Rows rows;
    uint32_t first = at.part * KV_TILE, count = find_rows(batch, at, first, rows);
    uint32_t pieces = pieces_of(batch), piece = at.head * tiles_of(batch) + at.part;
    uint8_t *section = section_of(batch, at);
    if (report_of(batch, at)->broken) {
        uint64_t row = ((uint64_t)at.head * batch.tokens + first) * batch.width * 2;
        copy_rows<0>(rows, count, batch.width * 2, section + row);
    } else {
        uint32_t entry = scratch_of(batch, at, pieces)[piece];
        uint8_t *tile = section + size_of_piece(entry);
        write_entry((uint32_t *)section, piece, pieces, entry, span_of(batch, at)->size);
        if ((entry & KV_PIECE_MARKS) == MODE_RAW) {
            copy_rows<0>(rows, count, batch.width * 2, tile);
        } else {
            place_tile(batch, rows, count, entry & KV_PIECE_MARKS, tile);
        }
    }
    __syncthreads();
}

/* --- reading ------------------------------------------------------------------------------------------- */

/* The offsets of eight values of row *t*, from its planes. */
KV_INLINE void take_offsets(uint32_t mode, const uint8_t *tile, const Tile &parts, uint32_t t,
    uint32_t c, uint32_t count, uint32_t width, uint32_t *offsets) {
    uint32_t bits = mode == MODE_EXP3 ? 2 : 4, high[8];
    uint32_t planes = (uint32_t)kv_plane_rows(count, 8 / bits);
    load8(tile + parts.planes + (uint64_t)(t % planes) * width + c, offsets);
#pragma unroll
    for (int j = 0; j < 8; j++) {
        offsets[j] = offsets[j] >> (t / planes * bits) & ((1u << bits) - 1u);
    }
    if (mode == MODE_EXP3) {
        planes = (uint32_t)kv_plane_rows(count, 8);
        load8(tile + parts.high + (uint64_t)(t % planes) * width + c, high);
#pragma unroll
        for (int j = 0; j < 8; j++) {
            offsets[j] |= (high[j] >> (t / planes) & 1u) << 2;
        }
    }
}

/* Decode a tile whose parts lie within its section; return whether it lists the escapes it has. */
KV_INLINE int take_tile(const Batch &batch, const Rows &rows, uint32_t count, uint32_t mode,
    const uint8_t *tile, uint32_t listed) {
    Tile parts = tile_of(mode, count, batch.width);
    uint32_t vectors = batch.width / 8, escape = escape_of(mode), used = 0;
    for (uint32_t base = 0; base < count * vectors; base += KV_THREADS) {
        uint32_t i = base + threadIdx.x, c = i % vectors * 8, far = 0, all;
        uint32_t largest[8], rest[8], offsets[8];
        if (i < count * vectors) {
            load8(tile + c, largest);
            load8(tile + parts.rest + (uint64_t)i * 8, rest);
            take_offsets(mode, tile, parts, i / vectors, c, count, batch.width, offsets);
#pragma unroll
            for (int j = 0; j < 8; j++) {
                far |= (uint32_t)(offsets[j] == escape) << j;
            }
        }
        uint32_t place = used + sum_before((uint32_t)__popc(far), &all);
        used += all;
        if (i < count * vectors) {
#pragma unroll
            for (int j = 0; j < 8; j++) {
                uint32_t exponent = largest[j] - offsets[j];
                if (far >> j & 1u) {
                    exponent = place < listed ? tile[parts.list + place] : 0u;
                    place++;
                }
                offsets[j] = kv_exp3_bits(exponent, rest[j]);
            }
            store_values<KV_BF16>((uint8_t *)rows[i / vectors], c, pack8<KV_BF16>(offsets));
        }
    }
    return used == listed;
}

/* What a section says of itself is not believed: nothing outside of it is read. */
KV_INLINE void decode(const Batch &batch, const Place &at) {
    __shared__ Rows rows;
    uint32_t first = at.part * KV_TILE, count = find_rows(batch, at, first, rows);
    uint32_t pieces = pieces_of(batch), piece = at.head * tiles_of(batch) + at.part;
    const uint8_t *section = section_of(batch, at);
    uint64_t size = span_of(batch, at)->size;
    int is_sound = directory_bytes(pieces) <= size;
    if (is_sound) {
        const uint32_t *directory = (const uint32_t *)section;
        uint32_t entry = directory[piece], mode = entry & KV_PIECE_MARKS;
        uint64_t from = size_of_piece(entry);
        is_sound = directory[pieces] == size && mode < MODES && from <= size &&
                   tile_bytes(mode, count, batch.width, 0) <= size - from;
        if (is_sound && mode == MODE_RAW) {
            copy_rows<1>(rows, count, batch.width * 2, (uint8_t *)section + from);
        } else if (is_sound) {
            const uint8_t *tile = section + from;
            uint32_t listed = *(const uint32_t *)(tile + tile_of(mode, count, batch.width).count);
            is_sound = tile_bytes(mode, count, batch.width, listed) <= size - from;
            if (is_sound) {
                is_sound = take_tile(batch, rows, count, mode, tile, listed);
            }
        }
    }
    if (!is_sound && threadIdx.x == 0) {
        atomicOr(&report_of(batch, at)->broken, 1u);
    }
    __syncthreads();
}

KV_KERNEL(exp3_measure_bf16, tiles_of(batch), measure(batch, at))
KV_SECTION_KERNEL(exp3_total_bf16, 1, total(batch, at))
KV_KERNEL(exp3_place_bf16, tiles_of(batch), place(batch, at))
KV_KERNEL(exp3_decode_bf16, tiles_of(batch), decode(batch, at))
