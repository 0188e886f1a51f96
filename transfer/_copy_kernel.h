/* One kernel, written once and included by _copy.c for each CPU it is compiled for.
 *
 * Needs TARGET (function attribute), NAME(x) (x with the CPU's suffix), KERNEL_NAME, VEC (64
 * bytes) and the functions load, put, put_streaming, fence, accumulate and scramble on it.
 */

/* Advance `width` lanes by one unit, a line of each lane in turn. All loads of a step come before
 * its stores: lanes lie 64 KiB apart, and a load that follows a store with the same low address
 * bits waits for it. */
TARGET static inline __attribute__((always_inline)) void NAME(advance)(lanes *all, const int width,
                                                                       const int store,
                                                                       const int digest) {
    VEC acc[LANES];
    for (int i = 0; i < width; i++) {
        acc[i] = NAME(load)(all->acc[i]);
        if (digest == DIGEST_MIDDLE || digest == DIGEST_LAST) {
            acc[i] = NAME(scramble)(acc[i]);
        }
    }
    for (int stripe = 0; stripe < STRIPES; stripe++) {
        int is_last = digest == DIGEST_LAST && stripe == STRIPES - 1;
        const uint8_t *key = SECRET + (is_last ? LAST_STRIPE_KEY : 8 * stripe);
        int span = stripe / (SPAN / LINE), at = stripe % (SPAN / LINE) * LINE;
        VEC line[LANES];
        for (int i = 0; i < width; i++) {
            __builtin_prefetch(all->from[i][span + PREFETCH_SPANS] + at);
            line[i] = NAME(load)(all->from[i][span] + at);
        }
        for (int i = 0; i < width; i++) {
            if (store == STORE_STREAM) {
                NAME(put_streaming)(all->to[i][span] + at, line[i]);
            } else if (store == STORE_PLAIN) {
                NAME(put)(all->to[i][span] + at, line[i]);
            }
            if (digest != NO_DIGEST) {
                acc[i] = NAME(accumulate)(acc[i], line[i], key);
            }
        }
    }
    for (int i = 0; i < width; i++) {
        NAME(put)(all->acc[i], acc[i]);
    }
}

TARGET static void NAME(round)(lanes *all, int width, int store, int digest) {
    switch (width) {
    case 4: NAME(advance)(all, 4, store, digest); break;
    case 3: NAME(advance)(all, 3, store, digest); break;
    case 2: NAME(advance)(all, 2, store, digest); break;
    default: NAME(advance)(all, 1, store, digest); break;
    }
}

/* Copy with streaming stores; the partial lines at both ends are stored the ordinary way. */
TARGET static void NAME(stream)(uint8_t *to, const uint8_t *from, size_t size) {
    size_t head = smaller(-(uintptr_t)to % LINE, size);
    memcpy(to, from, head);
    size_t at = head;
    for (; at + LINE <= size; at += LINE) {
        NAME(put_streaming)(to + at, NAME(load)(from + at));
    }
    memcpy(to + at, from + at, size - at);
}

static const kernel NAME(kernel) = {KERNEL_NAME, NAME(round), NAME(stream), NAME(fence)};

#undef TARGET
#undef NAME
#undef KERNEL_NAME
#undef VEC
