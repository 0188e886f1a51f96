/* Sections that are as long as what they hold: measured first, laid one behind the other, then placed.
 *
 * Measuring leaves the size of every piece of a section (a tile, a stream) in scratch memory and
 * adds them up to its span; spans.cu lays the spans of a container; placing writes each piece where
 * it belongs. Nobody waits for the host, and no byte is moved twice. The low four bits of a size,
 * a multiple of 16, are free for what else is to be known of a piece.
 */
#ifndef KVSTORE_SPANS_CUH
#define KVSTORE_SPANS_CUH

#include "batch.cuh"

#define KV_PIECE_MARKS 15u

/* The scratch of a section, which has *words* words there, and begins at a multiple of sixteen bytes:
 * parameters are read in vectors. */
KV_INLINE uint32_t *scratch_of(const Batch &batch, const Place &at, uint64_t words) {
    uint64_t section = (uint64_t)at.chunk * batch.section_count + at.section;
    return batch.scratch + section * (kv_pad16(4 * words) / 4);
}

KV_INLINE uint32_t size_of_piece(uint32_t entry) { return entry & ~KV_PIECE_MARKS; }

/* Bytes of a directory of so many pieces, with its end. */
KV_INLINE uint64_t directory_bytes(uint64_t pieces) { return kv_pad16(4 * (pieces + 1)); }

/* Turn sizes of pieces into their places, the first at *first*; return where the last ends. */
KV_CALL uint64_t lay_pieces(uint32_t *entries, uint32_t count, uint64_t first) {
    for (uint32_t base = 0; base < count; base += KV_THREADS) {
        uint32_t i = base + threadIdx.x, entry = i < count ? entries[i] : 0u, total;
        uint64_t place = first + sum_before(size_of_piece(entry), &total);
        if (i < count) {
            entries[i] = (uint32_t)place | (entry & KV_PIECE_MARKS);
        }
        first += total;
    }
    return first;
}

/* Turn numbers into the sums of those before them; return the sum of all. */
KV_CALL uint32_t lay_counts(uint32_t *counts, uint32_t count) {
    uint32_t before = 0;
    for (uint32_t base = 0; base < count; base += KV_THREADS) {
        uint32_t i = base + threadIdx.x, total;
        uint32_t place = before + sum_before(i < count ? counts[i] : 0u, &total);
        if (i < count) {
            counts[i] = place;
        }
        before += total;
    }
    return before;
}

/* Say how long a section is that ends at *end*. What exceeds *cap* is broken, and *cap* long: that
 * is how much room it has for what is stored instead. */
KV_INLINE void close_section(const Batch &batch, const Place &at, uint64_t end, uint64_t cap) {
    if (threadIdx.x == 0) {
        Report *found = report_of(batch, at);
        if (end > cap) {
            found->broken = 1;
        }
        span_of(batch, at)->size = found->broken ? cap : end;
    }
}

/* Write one entry of a section's directory; the first piece's block adds its end and padding. */
KV_INLINE void write_entry(
    uint32_t *directory, uint32_t piece, uint32_t count, uint32_t entry, uint64_t end) {
    uint32_t padding = (uint32_t)(directory_bytes(count) / 4 - count);
    if (threadIdx.x == 0) {
        directory[piece] = entry;
    }
    if (piece == 0 && threadIdx.x < padding) {
        directory[count + threadIdx.x] = threadIdx.x == 0 ? (uint32_t)end : 0u;
    }
}

/* Zeros from *size* to the next multiple of 16. */
KV_INLINE void pad_part(uint8_t *part, uint64_t size) {
    uint64_t at = size + threadIdx.x;
    if (at < kv_pad16(size)) {
        part[at] = 0;
    }
}

/* --- rows of a tile ---------------------------------------------------------------------------------- */

/* Where the rows of a tile are in the engine's pages: found once, used often. */
typedef uint64_t Rows[KV_TILE];

KV_INLINE uint32_t find_rows(const Batch &batch, const Place &at, uint32_t first, Rows &rows) {
    uint32_t count = smaller(KV_TILE, batch.tokens - first);
    if (threadIdx.x < count) {
        rows[threadIdx.x] = (uint64_t)row_of(batch, at, first + threadIdx.x);
    }
    __syncthreads();
    return count;
}

/* Move a tile as it is: *row_bytes* of every row, from its pages to *flat* or back. */
template <int TO_PAGES>
KV_INLINE void copy_rows(const Rows &rows, uint32_t count, uint32_t row_bytes, uint8_t *flat) {
    uint32_t vectors = row_bytes / 16;
    for (uint32_t i = threadIdx.x; i < count * vectors; i += KV_THREADS) {
        uint8_t *row = (uint8_t *)rows[i / vectors] + i % vectors * 16;
        if (TO_PAGES) {
            store16(row, load16(flat + (uint64_t)i * 16));
        } else {
            store16(flat + (uint64_t)i * 16, load16(row));
        }
    }
}

#endif
