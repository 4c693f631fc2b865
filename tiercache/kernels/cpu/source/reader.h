/* The fastest plain read of memory that there is: what products are held against. Included by planes.c. */
#include "vectors.h"

#define STREAMS 8    /* places read from at once: each keeps a prefetcher of its own busy */
#define FETCHED 4096 /* bytes ahead; the processor's own prefetching ends at a page of that size */

/* All bytes [0, bytes) or-ed together, so that every one is loaded once. */
EXPORT int32_t tc_read(const uint8_t *memory, int64_t bytes) {
    const int64_t each = bytes / STREAMS / 256 * 256;
    Ints found[4] = {{0}, {0}, {0}, {0}};
    for (int64_t at = 0; at < each; at += 256)
        for (int stream = 0; stream < STREAMS; stream++) {
            const uint8_t *from = memory + stream * each + at;
            for (int i = 0; i < 4; i++) {
                Ints v;
                memcpy(&v, from + 64 * i, sizeof v);
                __builtin_prefetch(from + 64 * i + FETCHED);
                found[i] |= v;
            }
        }
    uint8_t all = 0;
    for (int64_t at = STREAMS * each; at < bytes; at++) all |= memory[at];
    const Ints both = found[0] | found[1] | found[2] | found[3];
    for (int i = 0; i < 16; i++) {
        const uint32_t word = (uint32_t)both[i];
        all |= (uint8_t)(word | word >> 8 | word >> 16 | word >> 24);
    }
    return all;
}
