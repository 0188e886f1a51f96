/* rANS streams: 32 lanes, `steps` symbols each; step s of lane l is the symbol at [s * 32 + l].
 *
 * The wide loops need AVX-512; the plain ones are for everything else and for the ends of streams,
 * where a wide read of words would leave the stream. Both give the same bytes.
 *
 * A step waits for the one before it for as long as several take to be computed, so the wide loops
 * work on two streams at a time, which have nothing to do with each other.
 */

/* TOGETHER: streams that are worked on at a time. NARROW: the encoder's registers hold the ranges of
 * symbols below that. FEW: the decoder looks for the symbols themselves when no more occur; a gather
 * from a table of all slots takes longer. */
enum { TOGETHER = 2, NARROW = 128, FEW = 64 };

typedef struct {
    uint32_t slots[KV_RANS_TOTAL];
    uint32_t used[FEW];   /* the first slot of each symbol that occurs, above it where it begins */
    uint16_t firsts[FEW]; /* where it begins; behind the last the end of all slots */
    size_t count;         /* of symbols that occur: only the first FEW are in these */
} rans_decoder;

typedef struct {
    uint32_t ranges[256]; /* a symbol's frequency, and where it begins, shifted by 16 */
    uint64_t inverse[256]; /* 2^44 / frequency, rounded up */
    int is_narrow; /* whether all symbols are below NARROW */
} rans_encoder;

/* A stream while it is written, from its last word downwards, or read. */
typedef struct {
    uint32_t states[KV_RANS_LANES];
    uint8_t *symbols;
    any16 *words;
    size_t at;    /* of the next word to read; of the last that was written */
    size_t count; /* words that there are to read */
    size_t steps;
} rans_stream;

/* Return 0 unless the frequencies add up to 4096. */
static int rans_prepare_decoder(rans_decoder *table, const uint16_t *frequencies, size_t count) {
    uint32_t at = 0;
    memset(table->used, 0, sizeof table->used);
    for (size_t i = 0; i < FEW; i++) {
        table->firsts[i] = KV_RANS_TOTAL;
    }
    table->count = 0;
    for (size_t symbol = 0; symbol < count; symbol++) {
        uint32_t frequency = frequencies[symbol];
        if (frequency > KV_RANS_TOTAL - at) {
            return 0;
        }
        if (frequency > 0 && table->count++ < FEW) {
            table->used[table->count - 1] = kv_rans_slot((uint32_t)symbol, frequency, at);
            table->firsts[table->count - 1] = (uint16_t)at;
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
    table->is_narrow = 1;
    for (size_t symbol = 0; symbol < count; symbol++) {
        uint32_t frequency = frequencies[symbol];
        if (frequency > KV_RANS_TOTAL - at) {
            return 0;
        }
        if (frequency > 0) {
            table->ranges[symbol] = frequency | at << 16;
            table->inverse[symbol] = kv_ceil((uint64_t)1 << 44, frequency);
            table->is_narrow &= symbol < NARROW;
        }
        at += frequency;
    }
    return at == KV_RANS_TOTAL;
}

/* --- one step --------------------------------------------------------------------------------------- */

static int rans_decode_step(const rans_decoder *table, rans_stream *s, uint8_t *symbols) {
    for (size_t lane = 0; lane < KV_RANS_LANES; lane++) {
        uint32_t slot = table->slots[s->states[lane] & (KV_RANS_TOTAL - 1u)];
        uint32_t state = kv_rans_advance(s->states[lane], slot);
        symbols[lane] = (uint8_t)kv_rans_symbol(slot);
        if (kv_rans_needs_word(state)) {
            if (s->at >= s->count) {
                return 0;
            }
            state = (state << 16) | s->words[s->at++];
        }
        s->states[lane] = state;
    }
    return 1;
}

/* kv_rans_push without a division: for state < frequency * 2^20 the product is below 2^64, and what
 * the inverse is too large by adds less than 1 / frequency to the quotient. */
static uint32_t rans_push(const rans_encoder *table, uint32_t state, uint8_t symbol) {
    uint32_t range = table->ranges[symbol], frequency = range & 0xffffu;
    uint32_t whole = (uint32_t)(state * table->inverse[symbol] >> 44);
    return state + whole * (KV_RANS_TOTAL - frequency) + (range >> 16);
}

/* Return 0 for a symbol that cannot occur, or when there is no room. */
static int rans_encode_step(const rans_encoder *table, rans_stream *s, const uint8_t *symbols) {
    for (size_t lane = KV_RANS_LANES; lane-- > 0;) {
        uint32_t frequency = table->ranges[symbols[lane]] & 0xffffu, state = s->states[lane];
        if (frequency == 0) {
            return 0;
        }
        if (kv_rans_gives_word(state, frequency)) {
            if (s->at == 0) {
                return 0;
            }
            s->words[--s->at] = (uint16_t)state;
            state >>= 16;
        }
        s->states[lane] = rans_push(table, state, symbols[lane]);
    }
    return 1;
}

/* --- the wide loops ----------------------------------------------------------------------------------- */

#if defined(__x86_64__)
#define WIDE_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,popcnt")))
#define WIDE WIDE_TARGET static inline __attribute__((always_inline))
#define ROUND_DOWN (_MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)

/* The state after a symbol, *above* slots above where that begins, and its word if it needs one: the
 * next of *words*, of which 16 can be read. */
WIDE __m512i rans_advance(
    __m512i state, __m512i slot, __m512i above, const any16 *words, size_t *at, uint8_t *symbols) {
    const __m512i low12 = _mm512_set1_epi32(KV_RANS_TOTAL - 1);
    __m512i frequency = _mm512_and_si512(_mm512_srli_epi32(slot, 8), low12);
    frequency = _mm512_add_epi32(frequency, _mm512_set1_epi32(1));
    state = _mm512_mullo_epi32(frequency, _mm512_srli_epi32(state, KV_RANS_BITS));
    state = _mm512_add_epi32(state, above);
    __mmask16 needs = _mm512_cmplt_epu32_mask(state, _mm512_set1_epi32(KV_RANS_LOW));
    __m256i next = _mm256_loadu_si256((const __m256i *)(const void *)(words + *at));
    __m512i given = _mm512_maskz_expand_epi32(needs, _mm512_cvtepu16_epi32(next));
    state = _mm512_mask_or_epi32(state, needs, _mm512_slli_epi32(state, 16), given);
    *at += (size_t)__builtin_popcount(needs);
    _mm_storeu_si128((__m128i *)(void *)symbols, _mm512_cvtepi32_epi8(slot));
    return state;
}

/* What a search among FEW symbols needs. Every eighth begins at one of *edges*; the one in the middle
 * of those eight, of four and of two, by how far the search has come, at one of *halves*. */
typedef struct {
    __m512i edges[FEW / 8], halves[3], used[FEW / 16];
    size_t count; /* of edges */
} rans_search;

WIDE void rans_prepare_search(const rans_decoder *table, rans_search *search) {
    search->count = kv_ceil(table->count, 8);
    for (size_t i = 0; i < FEW / 8; i++) {
        search->edges[i] = _mm512_set1_epi16((short)table->firsts[8 * i]);
    }
    for (size_t level = 0; level < 3; level++) {
        size_t step = 8u >> level;
        uint16_t middles[32] = {0};
        for (size_t i = 0; i < FEW / step; i++) {
            middles[i] = table->firsts[i * step + step / 2];
        }
        search->halves[level] = _mm512_loadu_si512(middles);
    }
    for (size_t i = 0; i < FEW / 16; i++) {
        search->used[i] = _mm512_loadu_si512(table->used + 16 * i);
    }
}

/* Which of the symbols each of 32 slots belongs to, as words of 16 bits. */
WIDE __m512i rans_find(const rans_search *search, __m512i slots) {
    const __m512i one = _mm512_set1_epi16(1);
    __m512i place = _mm512_setzero_si512();
    for (size_t i = 1; i < search->count; i++) {
        __mmask32 is_above = _mm512_cmpge_epu16_mask(slots, search->edges[i]);
        place = _mm512_mask_add_epi16(place, is_above, place, one);
    }
#pragma GCC unroll 3
    for (int level = 0; level < 3; level++) {
        __m512i middle = _mm512_permutexvar_epi16(place, search->halves[level]);
        __mmask32 is_above = _mm512_cmpge_epu16_mask(slots, middle);
        place = _mm512_add_epi16(place, place);
        place = _mm512_mask_add_epi16(place, is_above, place, one);
    }
    return place;
}

/* The first slots of the symbols at sixteen places. */
WIDE __m512i rans_pick(const rans_search *search, __m512i place) {
    __mmask16 upper = _mm512_test_epi32_mask(place, _mm512_set1_epi32(32));
    return _mm512_mask_blend_epi32(upper,
        _mm512_permutex2var_epi32(search->used[0], place, search->used[1]),
        _mm512_permutex2var_epi32(search->used[2], place, search->used[3]));
}

/* A step of `streams` streams. Slots of both halves are searched for as one, side by side. */
WIDE void rans_decode_by_search(const rans_search *search, __m512i *low, __m512i *high,
    rans_stream *s, size_t streams, size_t step) {
    const __m512i low12 = _mm512_set1_epi32(KV_RANS_TOTAL - 1), low16 = _mm512_set1_epi32(0xffff);
    __m512i places[TOGETHER];
    for (size_t k = 0; k < streams; k++) {
        __m512i below = _mm512_and_si512(low[k], low12), above = _mm512_and_si512(high[k], low12);
        places[k] = rans_find(search, _mm512_or_si512(below, _mm512_slli_epi32(above, 16)));
    }
    for (size_t k = 0; k < streams; k++) {
        uint8_t *to = s[k].symbols + step * KV_RANS_LANES;
        __m512i slot = rans_pick(search, _mm512_and_si512(places[k], low16));
        __m512i above = _mm512_sub_epi32(
            _mm512_and_si512(low[k], low12), _mm512_srli_epi32(slot, 20));
        low[k] = rans_advance(low[k], slot, above, s[k].words, &s[k].at, to);
        slot = rans_pick(search, _mm512_srli_epi32(places[k], 16));
        above = _mm512_sub_epi32(_mm512_and_si512(high[k], low12), _mm512_srli_epi32(slot, 20));
        high[k] = rans_advance(high[k], slot, above, s[k].words, &s[k].at, to + 16);
    }
}

WIDE __m512i rans_decode_by_table(
    const rans_decoder *table, __m512i state, rans_stream *s, uint8_t *symbols) {
    __m512i slot = _mm512_and_si512(state, _mm512_set1_epi32(KV_RANS_TOTAL - 1));
    /* Into zeros: it would wait for what the register held before. */
    slot = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), 0xffff, slot, table->slots, 4);
    return rans_advance(
        state, slot, _mm512_srli_epi32(slot, 20), s->words, &s->at, symbols);
}

/* Decode `streams` streams of as many steps while each has 32 words left; return how many steps. */
WIDE size_t rans_decode_some(const rans_decoder *table, rans_stream *from, size_t streams) {
    __m512i low[TOGETHER], high[TOGETHER];
    rans_stream s[TOGETHER];
    rans_search search;
    size_t step = 0;
    rans_prepare_search(table, &search);
    for (size_t k = 0; k < streams; k++) {
        s[k] = from[k];
        low[k] = _mm512_loadu_si512(s[k].states);
        high[k] = _mm512_loadu_si512(s[k].states + 16);
    }
    for (; step < s[0].steps; step++) {
        int is_near_end = 0;
        for (size_t k = 0; k < streams; k++) {
            is_near_end |= s[k].count - s[k].at < KV_RANS_LANES;
        }
        if (is_near_end) {
            break;
        }
        if (table->count <= FEW) {
            rans_decode_by_search(&search, low, high, s, streams, step);
            continue;
        }
        for (size_t k = 0; k < streams; k++) {
            uint8_t *to = s[k].symbols + step * KV_RANS_LANES;
            low[k] = rans_decode_by_table(table, low[k], &s[k], to);
            high[k] = rans_decode_by_table(table, high[k], &s[k], to + 16);
        }
    }
    for (size_t k = 0; k < streams; k++) {
        _mm512_storeu_si512(from[k].states, low[k]);
        _mm512_storeu_si512(from[k].states + 16, high[k]);
        from[k].at = s[k].at;
    }
    return step;
}

/* Ranges of sixteen symbols. */
WIDE __m512i rans_ranges(
    const rans_encoder *table, const __m512i *held, __m512i symbol, int is_narrow) {
    if (!is_narrow) {
        return _mm512_mask_i32gather_epi32(
            _mm512_setzero_si512(), 0xffff, symbol, table->ranges, 4);
    }
    __mmask16 odd = _mm512_test_epi32_mask(symbol, _mm512_set1_epi32(32));
    __mmask16 upper = _mm512_test_epi32_mask(symbol, _mm512_set1_epi32(64));
    __m512i found[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; k++) {
        found[k] = _mm512_permutex2var_epi32(held[2 * k], symbol, held[2 * k + 1]);
    }
    return _mm512_mask_blend_epi32(
        upper, _mm512_mask_blend_epi32(odd, found[0], found[1]),
        _mm512_mask_blend_epi32(odd, found[2], found[3]));
}

/* State / frequency, or one less. Both are below 2^32 and the quotient below 2^20, so that floats
 * are as good as whole numbers; rounding down all the way, it is never more than that. */
WIDE __m512i rans_divide(__m512i state, __m512i frequency) {
    __m512 from = _mm512_cvt_roundepu32_ps(state, ROUND_DOWN);
    return _mm512_cvttps_epu32(_mm512_div_round_ps(from, _mm512_cvtepi32_ps(frequency), ROUND_DOWN));
}

WIDE __m512i rans_encode_half(const rans_encoder *table, const __m512i *held, __m512i state,
    any16 *words, size_t *at, const uint8_t *symbols, __mmask16 *impossible, int is_narrow) {
    __m512i symbol = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)(const void *)symbols));
    __m512i range = rans_ranges(table, held, symbol, is_narrow);
    __m512i frequency = _mm512_and_si512(range, _mm512_set1_epi32(0xffff));
    __m512i rest = _mm512_sub_epi32(_mm512_set1_epi32(KV_RANS_TOTAL), frequency);
    *impossible |= _mm512_testn_epi32_mask(frequency, frequency);
    __mmask16 gives = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(state, 20), frequency);
    __m256i given = _mm512_cvtepi32_epi16(_mm512_maskz_compress_epi32(gives, state));
    unsigned count = (unsigned)__builtin_popcount(gives);
    *at -= count;
    _mm256_mask_storeu_epi16(words + *at, (__mmask16)((1u << count) - 1u), given);
    state = _mm512_mask_srli_epi32(state, gives, state, 16);
    __m512i whole = rans_divide(state, frequency);
    __m512i left = _mm512_sub_epi32(state, _mm512_mullo_epi32(whole, frequency));
    __mmask16 short_by_one = _mm512_cmpge_epu32_mask(left, frequency);
    state = _mm512_add_epi32(_mm512_slli_epi32(whole, KV_RANS_BITS), left);
    state = _mm512_add_epi32(state, _mm512_srli_epi32(range, 16));
    return _mm512_mask_add_epi32(state, short_by_one, state, rest);
}

/* Encode `streams` streams of as many steps from the last downwards while each has room for 32 words;
 * return how many steps remain. */
WIDE size_t rans_encode_some(
    const rans_encoder *table, rans_stream *s, size_t streams, int is_narrow, int *is_possible) {
    __m512i low[TOGETHER], high[TOGETHER], held[NARROW / 16];
    __mmask16 impossible = 0;
    size_t steps = s[0].steps, at[TOGETHER];
#pragma GCC unroll 8
    for (size_t k = 0; k < NARROW / 16; k++) {
        held[k] = _mm512_loadu_si512(table->ranges + 16 * k);
    }
    for (size_t k = 0; k < streams; k++) {
        low[k] = _mm512_loadu_si512(s[k].states);
        high[k] = _mm512_loadu_si512(s[k].states + 16);
        at[k] = s[k].at;
    }
    for (; steps > 0; steps--) {
        int is_near_end = 0;
        for (size_t k = 0; k < streams; k++) {
            is_near_end |= at[k] < KV_RANS_LANES;
        }
        if (is_near_end) {
            break;
        }
        for (size_t k = 0; k < streams; k++) {
            const uint8_t *row = s[k].symbols + (steps - 1) * KV_RANS_LANES;
            high[k] = rans_encode_half(
                table, held, high[k], s[k].words, &at[k], row + 16, &impossible, is_narrow);
            low[k] = rans_encode_half(
                table, held, low[k], s[k].words, &at[k], row, &impossible, is_narrow);
        }
    }
    for (size_t k = 0; k < streams; k++) {
        _mm512_storeu_si512(s[k].states, low[k]);
        _mm512_storeu_si512(s[k].states + 16, high[k]);
        s[k].at = at[k];
    }
    *is_possible = impossible == 0;
    return steps;
}

WIDE_TARGET static size_t rans_decode_wide(
    const rans_decoder *table, rans_stream *s, size_t streams) {
    return streams == TOGETHER ? rans_decode_some(table, s, TOGETHER) : rans_decode_some(table, s, 1);
}

WIDE_TARGET static size_t rans_encode_wide(
    const rans_encoder *table, rans_stream *s, size_t streams, int *is_possible) {
    if (streams == TOGETHER) {
        return table->is_narrow ? rans_encode_some(table, s, TOGETHER, 1, is_possible)
                                : rans_encode_some(table, s, TOGETHER, 0, is_possible);
    }
    return table->is_narrow ? rans_encode_some(table, s, 1, 1, is_possible)
                            : rans_encode_some(table, s, 1, 0, is_possible);
}
#endif

/* --- streams ----------------------------------------------------------------------------------------- */

/* Decode up to TOGETHER streams of as many steps; return 0 when one ends early, is not used up, or
 * leaves a state that no encoder begins with. */
static int rans_decode_streams(const rans_decoder *table, rans_stream *s, size_t streams) {
    size_t done = 0;
#if defined(__x86_64__)
    if (has_wide_rans) {
        done = rans_decode_wide(table, s, streams);
    }
#endif
    for (size_t k = 0; k < streams; k++) {
        for (size_t step = done; step < s[k].steps; step++) {
            if (!rans_decode_step(table, &s[k], s[k].symbols + step * KV_RANS_LANES)) {
                return 0;
            }
        }
        for (size_t lane = 0; lane < KV_RANS_LANES; lane++) {
            if (s[k].states[lane] != KV_RANS_LOW) {
                return 0;
            }
        }
        if (s[k].at != s[k].count) {
            return 0;
        }
    }
    return 1;
}

/* Encode up to TOGETHER streams of as many steps; return 0 when the words that each has room for do
 * not suffice or a symbol has no place in the table. */
static int rans_encode_streams(const rans_encoder *table, rans_stream *s, size_t streams) {
    size_t left = s[0].steps;
    int is_possible = 1;
#if defined(__x86_64__)
    if (has_wide_rans) {
        left = rans_encode_wide(table, s, streams, &is_possible);
    }
#endif
    for (size_t k = 0; k < streams; k++) {
        for (size_t step = left; step > 0 && is_possible; step--) {
            const uint8_t *row = s[k].symbols + (step - 1) * KV_RANS_LANES;
            is_possible = rans_encode_step(table, &s[k], row);
        }
    }
    return is_possible;
}
