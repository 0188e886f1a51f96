/* rANS streams: 32 lanes, `steps` symbols each; step s of lane l is the symbol at [s * pitch + l].
 *
 * The wide loops need AVX-512; the plain ones are for everything else and for the ends of streams,
 * where a wide read of words would leave the stream. Both give the same bytes.
 */

typedef struct {
    uint32_t slots[KV_RANS_TOTAL];
} rans_decoder;

typedef struct {
    uint32_t frequency[256];
    uint32_t first[256];
    double inverse[256];
} rans_encoder;

/* Return 0 unless the frequencies add up to 4096. */
static int rans_prepare_decoder(rans_decoder *table, const uint16_t *frequencies, size_t count) {
    uint32_t at = 0;
    for (size_t symbol = 0; symbol < count; symbol++) {
        uint32_t frequency = frequencies[symbol];
        if (frequency > KV_RANS_TOTAL - at) {
            return 0;
        }
        for (uint32_t above = 0; above < frequency; above++) {
            table->slots[at++] = kv_rans_slot((uint32_t)symbol, frequency, above);
        }
    }
    return at == KV_RANS_TOTAL;
}

static int rans_prepare_encoder(rans_encoder *table, const uint16_t *frequencies, size_t count) {
    uint32_t at = 0;
    memset(table, 0, sizeof *table);
    for (size_t symbol = 0; symbol < count; symbol++) {
        uint32_t frequency = frequencies[symbol];
        if (frequency > KV_RANS_TOTAL - at) {
            return 0;
        }
        table->frequency[symbol] = frequency;
        table->first[symbol] = at;
        table->inverse[symbol] = frequency > 0 ? 1.0 / frequency : 0.0;
        at += frequency;
    }
    return at == KV_RANS_TOTAL;
}

/* --- one step --------------------------------------------------------------------------------------- */

static int rans_decode_step(
    const rans_decoder *table, uint32_t *states, const any16 *words, size_t count, size_t *at,
    uint8_t *symbols) {
    for (size_t lane = 0; lane < KV_RANS_LANES; lane++) {
        uint32_t slot = table->slots[states[lane] & (KV_RANS_TOTAL - 1u)];
        uint32_t state = kv_rans_advance(states[lane], slot);
        symbols[lane] = (uint8_t)kv_rans_symbol(slot);
        if (kv_rans_needs_word(state)) {
            if (*at >= count) {
                return 0;
            }
            state = (state << 16) | words[(*at)++];
        }
        states[lane] = state;
    }
    return 1;
}

/* Words are written downwards from `at`; return 0 for a symbol that cannot occur. */
static int rans_encode_step(
    const rans_encoder *table, uint32_t *states, any16 *words, size_t *at, const uint8_t *symbols) {
    for (size_t lane = KV_RANS_LANES; lane-- > 0;) {
        uint32_t frequency = table->frequency[symbols[lane]];
        uint32_t state = states[lane];
        if (frequency == 0) {
            return 0;
        }
        if (kv_rans_gives_word(state, frequency)) {
            if (*at == 0) {
                return 0;
            }
            words[--*at] = (uint16_t)state;
            state >>= 16;
        }
        states[lane] = kv_rans_push(state, frequency, table->first[symbols[lane]]);
    }
    return 1;
}

/* --- the wide loops ----------------------------------------------------------------------------------- */

#if defined(__x86_64__)
#define WIDE __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,popcnt")))

/* Decode one half of a step. At least 16 words lie at `words`. */
WIDE static inline __m512i rans_decode_half(
    const rans_decoder *table, __m512i state, const any16 *words, size_t *at, uint8_t *symbols) {
    const __m512i low12 = _mm512_set1_epi32(KV_RANS_TOTAL - 1);
    __m512i slot = _mm512_i32gather_epi32(_mm512_and_si512(state, low12), table->slots, 4);
    __m512i frequency = _mm512_and_si512(_mm512_srli_epi32(slot, 8), low12);
    frequency = _mm512_add_epi32(frequency, _mm512_set1_epi32(1));
    state = _mm512_mullo_epi32(frequency, _mm512_srli_epi32(state, KV_RANS_BITS));
    state = _mm512_add_epi32(state, _mm512_srli_epi32(slot, 20));
    __mmask16 needs = _mm512_cmplt_epu32_mask(state, _mm512_set1_epi32(KV_RANS_LOW));
    __m256i next = _mm256_loadu_si256((const __m256i *)(const void *)(words + *at));
    __m512i given = _mm512_maskz_expand_epi32(needs, _mm512_cvtepu16_epi32(next));
    state = _mm512_mask_or_epi32(state, needs, _mm512_slli_epi32(state, 16), given);
    *at += (size_t)__builtin_popcount(needs);
    _mm_storeu_si128((__m128i *)(void *)symbols, _mm512_cvtepi32_epi8(slot));
    return state;
}

WIDE static size_t rans_decode_wide(
    const rans_decoder *table, uint32_t *states, const any16 *words, size_t count, size_t *at,
    uint8_t *symbols, size_t steps, size_t pitch) {
    __m512i low = _mm512_loadu_si512(states), high = _mm512_loadu_si512(states + 16);
    size_t step = 0, position = *at;
    for (; step < steps && count - position >= KV_RANS_LANES; step++) {
        low = rans_decode_half(table, low, words, &position, symbols + step * pitch);
        high = rans_decode_half(table, high, words, &position, symbols + step * pitch + 16);
    }
    _mm512_storeu_si512(states, low);
    _mm512_storeu_si512(states + 16, high);
    *at = position;
    return step;
}

/* floor(state / frequency): a half added keeps the product off whole numbers, so that the rounding
 * of the inverse, 2^-53, can never carry it across one. */
WIDE static inline __m256i rans_divide(__m256i state, __m256i symbol, const rans_encoder *table) {
    __m512d exact = _mm512_add_pd(_mm512_cvtepu32_pd(state), _mm512_set1_pd(0.5));
    __m512d inverse = _mm512_i32gather_pd(symbol, table->inverse, 8);
    return _mm512_cvttpd_epu32(_mm512_mul_pd(exact, inverse));
}

WIDE static inline __m512i rans_encode_half(
    const rans_encoder *table, __m512i state, any16 *words, size_t *at, const uint8_t *symbols,
    __mmask16 *impossible) {
    __m512i symbol = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)symbols));
    __m512i frequency = _mm512_i32gather_epi32(symbol, table->frequency, 4);
    __m512i first = _mm512_i32gather_epi32(symbol, table->first, 4);
    *impossible |= _mm512_testn_epi32_mask(frequency, frequency);
    __mmask16 gives = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(state, 20), frequency);
    __m256i given = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(gives, state));
    unsigned count = (unsigned)__builtin_popcount(gives);
    *at -= count;
    __mmask16 kept = (__mmask16)((1u << count) - 1u);
    _mm256_mask_storeu_epi16(words + *at, kept, given);
    state = _mm512_mask_srli_epi32(state, gives, state, 16);
    __m256i below = rans_divide(_mm512_castsi512_si256(state), _mm512_castsi512_si256(symbol), table);
    __m256i above = rans_divide(
        _mm512_extracti64x4_epi64(state, 1), _mm512_extracti64x4_epi64(symbol, 1), table);
    __m512i whole = _mm512_inserti64x4(_mm512_castsi256_si512(below), above, 1);
    __m512i rest = _mm512_sub_epi32(state, _mm512_mullo_epi32(whole, frequency));
    return _mm512_add_epi32(_mm512_add_epi32(_mm512_slli_epi32(whole, KV_RANS_BITS), rest), first);
}

/* Encode steps from the last downwards while 32 words of room are left; return how many remain. */
WIDE static size_t rans_encode_wide(
    const rans_encoder *table, uint32_t *states, any16 *words, size_t *at, const uint8_t *symbols,
    size_t steps, size_t pitch, int *is_possible) {
    __m512i low = _mm512_loadu_si512(states), high = _mm512_loadu_si512(states + 16);
    __mmask16 impossible = 0;
    for (; steps > 0 && *at >= KV_RANS_LANES; steps--) {
        const uint8_t *row = symbols + (steps - 1) * pitch;
        high = rans_encode_half(table, high, words, at, row + 16, &impossible);
        low = rans_encode_half(table, low, words, at, row, &impossible);
    }
    _mm512_storeu_si512(states, low);
    _mm512_storeu_si512(states + 16, high);
    *is_possible = impossible == 0;
    return steps;
}
#endif

/* --- streams ----------------------------------------------------------------------------------------- */

/* Decode a stream of `count` words; return 0 when it ends early, is not used up, or leaves a state
 * that no encoder begins with. */
static int rans_decode_stream(
    const rans_decoder *table, const any32 *first, const any16 *words, size_t count,
    uint8_t *symbols, size_t steps, size_t pitch) {
    uint32_t states[KV_RANS_LANES];
    size_t at = 0, step = 0;
    memcpy(states, first, sizeof states);
#if defined(__x86_64__)
    if (has_wide_rans) {
        step = rans_decode_wide(table, states, words, count, &at, symbols, steps, pitch);
    }
#endif
    for (; step < steps; step++) {
        if (!rans_decode_step(table, states, words, count, &at, symbols + step * pitch)) {
            return 0;
        }
    }
    for (size_t lane = 0; lane < KV_RANS_LANES; lane++) {
        if (states[lane] != KV_RANS_LOW) {
            return 0;
        }
    }
    return at == count;
}

/* Encode a stream into the end of `room` words; return how many it took, or room + 1 when they do
 * not suffice or a symbol has no place in the table. */
static size_t rans_encode_stream(
    const rans_encoder *table, uint32_t *states, any16 *words, size_t room, const uint8_t *symbols,
    size_t steps, size_t pitch) {
    size_t at = room;
    int is_possible = 1;
    for (size_t lane = 0; lane < KV_RANS_LANES; lane++) {
        states[lane] = KV_RANS_LOW;
    }
#if defined(__x86_64__)
    if (has_wide_rans) {
        steps = rans_encode_wide(table, states, words, &at, symbols, steps, pitch, &is_possible);
    }
#endif
    for (; steps > 0 && is_possible; steps--) {
        is_possible = rans_encode_step(table, states, words, &at, symbols + (steps - 1) * pitch);
    }
    return is_possible ? room - at : room + 1;
}
