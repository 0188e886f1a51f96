/* rANS with 32 bits of state, 16-bit words and probabilities in 4096ths.
 *
 * A stream is 32 lanes that share one sequence of words: in every step the lanes that need a word
 * take the next ones in lane order. The encoder walks the same steps backwards.
 */
#ifndef KVSTORE_RANS_CUH
#define KVSTORE_RANS_CUH

#include "dialect.cuh"

#define KV_RANS_LANES 32
#define KV_RANS_BITS 12
#define KV_RANS_TOTAL 4096u
#define KV_RANS_LOW 65536u

/* A slot of the decoder's table: symbol in the low byte, its frequency less one, and how far the
 * slot lies above the symbol's first. */
KV_INLINE uint32_t kv_rans_slot(uint32_t symbol, uint32_t frequency, uint32_t above) {
    return symbol | (frequency - 1u) << 8 | above << 20;
}

KV_INLINE uint32_t kv_rans_symbol(uint32_t slot) { return slot & 0xffu; }

/* The state after the symbol of *slot*, before it takes a word. */
KV_INLINE uint32_t kv_rans_advance(uint32_t state, uint32_t slot) {
    uint32_t frequency = ((slot >> 8) & 0xfffu) + 1u;
    return frequency * (state >> KV_RANS_BITS) + (slot >> 20);
}

KV_INLINE int kv_rans_needs_word(uint32_t state) { return state < KV_RANS_LOW; }

/* Whether the encoder gives away a word before a symbol of this frequency. */
KV_INLINE int kv_rans_gives_word(uint32_t state, uint32_t frequency) {
    return (state >> 20) >= frequency;
}

/* The state with the symbol that begins at *first* pushed. */
KV_INLINE uint32_t kv_rans_push(uint32_t state, uint32_t frequency, uint32_t first) {
    uint32_t whole = state / frequency;
    return (whole << KV_RANS_BITS) + (state - whole * frequency) + first;
}

#endif
