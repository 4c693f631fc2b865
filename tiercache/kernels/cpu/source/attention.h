/* Attention of some tokens over the slots of a KV cache, in fp32: an item is a token, the heads of one key head, and
 * (for few tokens) a slice of the slots.
 *
 * Slots that a token does not attend to are passed over, so the sums are those of the others in a row, in slices of
 * SLICE_SLOTS of them: each slice has its own largest score, and slices are joined in their order (online softmax, Milakov
 * and Gimelshein, arXiv 1805.02867).
 */
#ifndef TIERCACHE_ATTENTION_H
#define TIERCACHE_ATTENTION_H

#include "vectors.h"

#define SLICE_SLOTS 256
#define MOST_DIM 256

typedef struct {
    const void *keys, *values;             /* of slot 0 and head 0 */
    int64_t key_strides[2], value_strides[2]; /* elements from head to head, from slot to slot */
    const uint8_t *mask;                   /* [tokens][slots]: 1 where a token attends; NULL: to all up to itself */
    int64_t mask_stride, slots;
    int32_t kind;
} Slots;

typedef struct {
    const Slots *slots;
    const float *queries; /* [tokens][heads][dim] */
    float *out;           /* the same */
    int64_t tokens;
    int32_t heads, key_heads, dim;
    float scaling;
    int32_t *count;      /* [tokens]: of slots attended to */
    int32_t *prefix;     /* [tokens]: of those, how many are the first slots */
    int32_t *list;       /* [tokens][tail]: the others */
    int64_t tail;
    float *parts;        /* [tokens][heads][slices][2 + dim]: largest score, sum of weights, weighted values */
    int64_t slices;
} Attending;

/* x turned by its position; cos and sin of a kind, at [at, at + dim). */
static void rotate(float *x, int64_t dim, const void *cos, const void *sin, int32_t kind, int64_t at) {
    float turned[MOST_DIM];
    const int64_t half = dim / 2;
    for (int64_t i = 0; i < half; i++) turned[i] = -x[i + half], turned[i + half] = x[i];
    for (int64_t i = 0; i < dim; i += 16) {
        const int64_t left = dim - i;
        const Floats v = read16(x, 0, i, left) * read16(cos, kind, at + i, left) +
                         read16(turned, 0, i, left) * read16(sin, kind, at + i, left);
        memcpy(x + i, &v, left < 16 ? 4 * (size_t)left : sizeof v);
    }
}

#define INLINED static inline __attribute__((always_inline))

/* Row `at` of keys or values: 16 numbers from d on. With `vectors` known, rows are whole vectors and there is no tail. */
INLINED Floats row16(const void *from, const int kind, int64_t at, int d, int dim, const int vectors) {
    return vectors ? whole16(from, kind, at + d) : read16(from, kind, at + d, dim - d);
}

/* Scores of up to 16 slots for a query that is scaled: lane i is that of list[i]. */
INLINED Floats scores(const Attending *job, const float *query, const int32_t *list, int count, int64_t head,
                      const int kind, const int vectors) {
    const Slots *s = job->slots;
    const int dim = vectors ? 16 * vectors : job->dim;
    Floats sums[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) {
        const int64_t at = head * s->key_strides[0] + list[i < count ? i : 0] * s->key_strides[1];
        Floats sum = all16(0.0f);
#pragma GCC unroll 16
        for (int d = 0; d < dim; d += 16) sum += load16(query + d) * row16(s->keys, kind, at, d, dim, vectors);
        sums[i] = sum;
    }
    return sums_of(sums);
}

static inline float largest_of(Floats v) {
    float largest = v[0];
    for (int i = 1; i < 16; i++) largest = v[i] > largest || v[i] != v[i] ? v[i] : largest;
    return largest;
}

/* Adds `count` slots' values, times their weights, to sum[dim / 16]. */
INLINED void add_values(const Attending *job, const float *weights, const int32_t *list, int count, int64_t head,
                        const int kind, const int vectors, float *to) {
    const Slots *s = job->slots;
    const int dim = vectors ? 16 * vectors : job->dim, many = vectors ? vectors : (dim + 15) / 16;
    Floats sum[MOST_DIM / 16];
#pragma GCC unroll 16
    for (int d = 0; d < many; d++) sum[d] = all16(0.0f);
    for (int i = 0; i < count; i++) {
        const int64_t at = head * s->value_strides[0] + list[i] * s->value_strides[1];
        const Floats weight = all16(weights[i]);
#pragma GCC unroll 16
        for (int d = 0; d < many; d++) sum[d] += weight * row16(s->values, kind, at, 16 * d, dim, vectors);
    }
    for (int d = 0; d < many; d++)
        memcpy(to + 16 * d, &sum[d], dim - 16 * d < 16 ? 4 * (size_t)(dim - 16 * d) : sizeof sum[d]);
}

/* One slice of what a token's head attends to: largest score, sum of weights, weighted values. */
INLINED void slice_as(const Attending *job, int64_t token, int64_t head, int64_t slice, float *to, const int kind,
                      const int vectors) {
    _Alignas(64) float query[MOST_DIM] = {0}, weight[SLICE_SLOTS];
    int32_t list[SLICE_SLOTS];
    const int64_t key_head = head / (job->heads / job->key_heads);
    const int first = (int)slice * SLICE_SLOTS, left = job->count[token] - first, prefix = job->prefix[token];
    const int count = left < SLICE_SLOTS ? left : SLICE_SLOTS;
    for (int i = 0; i < count; i++)
        list[i] = first + i < prefix ? first + i : job->list[token * job->tail + first + i - prefix];
    const float *from = job->queries + (token * job->heads + head) * job->dim;
    for (int d = 0; d < job->dim; d++) query[d] = from[d] * job->scaling;
    Floats tops = all16(-INFINITY), weights = all16(0.0f);
    Ints bad = {0};
    for (int i = 0; i < count; i += 16) {
        Floats found = scores(job, query, list + i, count - i, key_head, kind, vectors);
        for (int l = count - i; l < 16; l++) found[l] = -INFINITY;
        store16(weight + i, found);
        tops = either(found > tops, found, tops);
        bad |= found != found;
    }
    float top = largest_of(tops);
    for (int l = 0; l < 16; l++) top = bad[l] ? NAN : top;
    for (int i = 0; i < count; i += 16) {
        Floats here = exp16(load16(weight + i) - all16(top));
        for (int l = count - i; l < 16; l++) here[l] = 0.0f;
        weights += here;
        store16(weight + i, here);
    }
    to[0] = top, to[1] = sum_of(weights);
    add_values(job, weight, list, count, key_head, kind, vectors, to + 2);
}

/* Kinds and widths of heads that are usual are known to the compiler. */
static void slice_of(const Attending *job, int64_t token, int64_t head, int64_t slice, float *to) {
    switch (job->dim * 4 + job->slots->kind) {
        case 64 * 4 + 1: slice_as(job, token, head, slice, to, 1, 4); break;
        case 128 * 4 + 1: slice_as(job, token, head, slice, to, 1, 8); break;
        case 64 * 4 + 2: slice_as(job, token, head, slice, to, 2, 4); break;
        case 128 * 4 + 2: slice_as(job, token, head, slice, to, 2, 8); break;
        default: slice_as(job, token, head, slice, to, job->slots->kind, 0);
    }
}

/* Joins a slice to those before it. */
static void join(float *all, const float *more, int dim) {
    const float top = more[0] > all[0] || more[0] != more[0] ? more[0] : all[0];
    const Floats old = exp16(all16(all[0] - top)), new = exp16(all16(more[0] - top));
    const float a = all[0] == -INFINITY ? 0.0f : old[0], b = new[0];
    all[0] = top, all[1] = all[1] * a + more[1] * b;
    for (int d = 0; d < dim; d++) all[2 + d] = all[2 + d] * a + more[2 + d] * b;
}

static void finish_head(const Attending *job, int64_t token, int64_t head, const float *all) {
    float *out = job->out + (token * job->heads + head) * job->dim;
    for (int d = 0; d < job->dim; d++) out[d] = job->count[token] ? all[2 + d] / all[1] : 0.0f;
}

static void attend_slice(void *context, int64_t item) { /* items: [tokens][slices][heads] */
    const Attending *job = context;
    const int64_t head = item % job->heads, slice = item / job->heads % job->slices;
    const int64_t token = item / job->heads / job->slices;
    if (slice * SLICE_SLOTS >= job->count[token]) return;
    slice_of(job, token, head, slice, job->parts + ((token * job->heads + head) * job->slices + slice) * (2 + job->dim));
}

static void join_head(void *context, int64_t item) { /* items: [tokens][heads] */
    const Attending *job = context;
    const int64_t token = item / job->heads, slices = (job->count[token] + SLICE_SLOTS - 1) / SLICE_SLOTS;
    float *all = job->parts + item * job->slices * (2 + job->dim);
    for (int64_t slice = 1; slice < slices; slice++) join(all, all + slice * (2 + job->dim), job->dim);
    finish_head(job, token, item % job->heads, all);
}

static void attend_head(void *context, int64_t item) { /* items: [heads][tokens] */
    const Attending *job = context;
    const int64_t head = item / job->tokens, token = item % job->tokens;
    float all[2 + MOST_DIM], more[2 + MOST_DIM];
    slice_of(job, token, head, 0, all);
    for (int64_t slice = 1; slice * SLICE_SLOTS < job->count[token]; slice++) {
        slice_of(job, token, head, slice, more);
        join(all, more, job->dim);
    }
    finish_head(job, token, head, all);
}

/* Which slots each token attends to; `memory` takes the list. */
static void list_slots(Attending *job, int32_t *memory) {
    const Slots *s = job->slots;
    int64_t least = s->slots;
    for (int64_t token = 0; token < job->tokens; token++) {
        int64_t prefix = s->slots - job->tokens + token + 1;
        if (s->mask)
            for (prefix = 0; prefix < s->slots && s->mask[token * s->mask_stride + prefix];) prefix++;
        job->count[token] = job->prefix[token] = (int32_t)prefix;
        least = prefix < least ? prefix : least;
    }
    job->list = memory, job->tail = s->slots - least;
    for (int64_t token = 0; s->mask && token < job->tokens; token++) {
        int32_t *list = job->list + token * job->tail, more = 0;
        const uint8_t *mask = s->mask + token * s->mask_stride;
        for (int64_t slot = job->prefix[token]; slot < s->slots; slot++)
            if (mask[slot]) list[more++] = (int32_t)slot;
        job->count[token] += more;
    }
}

static int64_t slices_of(int64_t slots) { return (slots + SLICE_SLOTS - 1) / SLICE_SLOTS; }

/* Bytes of scratch; a multiple of 64. */
static int64_t attention_bytes(int32_t heads, int32_t dim, int64_t tokens, int64_t slots) {
    const int64_t parts = tokens == 1 ? heads * slices_of(slots) * (2 + dim) : 0;
    return (4 * (tokens * (slots + 2) + parts) + 63) / 64 * 64;
}

/* Attention of all tokens; the scratch behind what it takes. */
static uint8_t *attend(Attending *job, uint8_t *scratch, const Team *team) {
    const int64_t slots = job->slots->slots, tokens = job->tokens;
    job->count = (int32_t *)scratch, job->prefix = job->count + tokens;
    job->parts = (float *)(job->prefix + tokens * (slots + 1)), job->slices = slices_of(slots);
    list_slots(job, job->prefix + tokens);
    Team some = *team;
    if (tokens * slots * job->heads * job->dim < 1 << 16) some.threads = 1;
    if (tokens == 1) {
        share(&some, attend_slice, job, job->heads * job->slices);
        for (int64_t head = 0; head < job->heads; head++) join_head(job, head);
    } else {
        share(&some, attend_head, job, tokens * job->heads);
    }
    return scratch + attention_bytes(job->heads, job->dim, tokens, slots);
}

#endif
