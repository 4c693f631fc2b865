/* Products of bit planes with activations on a CPU: what all instruction sets share.
 *
 * The packing is that of tiercache/quant/planes.py, and so are its words: w = lo + step * (12 h + c), where h are the first
 * two planes and c the third. With three planes a *code* is 12 h + c, its *unit* is 1 and the *middle* 0; with two or
 * one it is h (its last bit 0 with one), the unit is 12 and the middle 7.5 or 13.5: w = lo + step * (unit * code +
 * middle). The single bits are put in the places of a 2-bit plane first, so that h is twice two bits of the same place.
 *
 * Results are the same bits whatever the instruction set, the number of threads, the number of tokens in the call and
 * the place of a plane: dot products are integers, hence exact, and the few floating-point operations around them are
 * written once per group in a fixed order, without fused multiply-add.
 *
 * product: a *part* is 64 codes of a group that lie in 16 bytes of the 2-bit planes (the whole group of 64, half a
 * group of 128; for groups of 32 a part is the group). Activations are held per part as 16-bit fixed point:
 * x ~ scale * q, |q| <= 32639 = 127 * 256 + 127, so that q splits into two signed bytes. Then, part after part,
 *     sum[lane] += S * (s * scale) + m * (scale * Q),
 * where S = sum of code * q, Q = sum of q, s = step * unit, m = lo + step * middle,
 * and lane = (first byte of the part / 16) % 4; the result is (sum[0] + sum[1]) + (sum[2] + sum[3]).
 *
 * product_down: steps differ along the sum, so they are folded into the activations. For 64 neurons at a time, with
 * X = largest |x| of the block and Z = its largest step in the group,
 *     q = round((x / X) * (step * 32639 / Z)),
 *     sum += S * (X * (Z * unit / 32639)) + (sum of x * lo + (sum of x * step) * middle)
 * Neurons are summed in slices of 256, each from zero. The slices' sums are added to the output in their order.
 */
#ifndef TIERCACHE_PLANES_H
#define TIERCACHE_PLANES_H

#include <math.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define MAX_TOKENS 512
#define CELL 12  /* steps that a unit of h counts */
#define FEW 3    /* up to so many tokens a matrix is walked once for each; measured on Zen 4: 3 even, 4 slower */
#define BLOCK 64 /* neurons whose products are summed as integers; 64 * 195 * 32639 < 2^31 */
#define SLICE 256 /* neurons whose products are summed before they are added to the output; a 135M model has six such */
#define FULL 32639.0f
#define TINY 1e-30f /* below it activations count as zero: their reciprocal would overflow */

typedef struct {
    const uint8_t *plane[3]; /* row 0 of each plane; only the first `planes` are read */
    const uint8_t *scale;    /* row 0 of the scales: fp16 lo, step per group */
    int64_t plane_stride[3], scale_stride;
    const int64_t *index[4]; /* rows to take of each plane and, 3, of the scales, or NULL for all */
    int64_t rows;            /* how many are taken */
    int32_t columns, group, planes;
    int32_t parts;                        /* 2: row i is part i % 2 of stored row i / 2; else 1 */
    int64_t plane_part[3], scale_part;    /* bytes from a part to the next */
} Matrix;

typedef struct {
    const void *data; /* row 0 */
    int64_t stride;   /* elements */
    int32_t kind;     /* 0 fp32, 1 bf16, 2 fp16 */
    int32_t tokens;
} Input;

/* GOMP_parallel of the OpenMP runtime that the process uses already: torch's threads and no others. */
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

typedef struct {
    Parallel parallel;
    int32_t threads, reserved;
} Team;

typedef struct {
    void (*work)(void *, int64_t);
    void *context;
    int64_t items;
    atomic_llong next;
} Queue;

static void drain(void *argument) {
    Queue *queue = argument;
    for (int64_t i; (i = atomic_fetch_add(&queue->next, 1)) < queue->items;) queue->work(queue->context, i);
}

/* Items are taken one by one: a core that others use as well takes fewer. */
static void share(const Team *team, void (*work)(void *, int64_t), void *context, int64_t items) {
    Queue queue = {work, context, items, 0};
    if (team->threads > 1 && items > 1 && team->parallel)
        team->parallel(drain, &queue, (unsigned)(team->threads < items ? team->threads : items), 0);
    else
        drain(&queue);
}

static inline float half_to_float(uint16_t h) {
    const uint32_t sign = (uint32_t)(h & 0x8000) << 16, rest = h & 0x7fff;
    union { uint32_t u; float f; } v;
    if (rest >= 0x7c00) v.u = 0x7f800000u | (rest << 13); /* infinity, NaN */
    else { /* the exponent's bias is mended by a multiplication, which handles subnormals as well */
        v.u = rest << 13;
        v.f *= 5.192296858534828e33f; /* 2^112 */
    }
    v.u |= sign;
    return v.f;
}

static inline void load_row(const Input *x, int64_t token, int64_t first, int64_t count, float *to) {
    const int64_t at = token * x->stride + first;
    if (x->kind == 0) {
        memcpy(to, (const float *)x->data + at, (size_t)count * 4);
    } else if (x->kind == 1) {
        const uint16_t *from = (const uint16_t *)x->data + at;
        for (int64_t i = 0; i < count; i++) {
            union { uint32_t u; float f; } v = {(uint32_t)from[i] << 16};
            to[i] = v.f;
        }
    } else {
        const uint16_t *from = (const uint16_t *)x->data + at;
        for (int64_t i = 0; i < count; i++) to[i] = half_to_float(from[i]);
    }
}

/* Layout of one matrix's rows. */
typedef struct {
    int32_t group, part, parts, lanes; /* parts: of a row, whole lanes of 16 bytes x 4 */
    int32_t real_parts, chunks;        /* parts that a row has; pieces of 64 bytes of a 2-bit plane */
    int32_t groups, bytes;             /* bytes of a 2-bit plane in a row: plane 0 has its single bits after so many */
} Shape;

static inline Shape shape_of(int32_t columns, int32_t group) {
    Shape s;
    s.group = group;
    s.part = group < 64 ? 32 : 64;
    s.groups = (columns + group - 1) / group;
    s.real_parts = s.groups * group / s.part;
    s.bytes = s.groups * group / 4;
    s.chunks = (s.bytes + 63) / 64;
    s.lanes = 64 / s.part; /* parts in 16 bytes */
    s.parts = s.chunks * 4 * s.lanes;
    return s;
}

/* Column of code `i` (0 .. part) of part `p`, in the order in which codes lie: (j, t), see below. */
static inline int32_t column_of(const Shape *s, int32_t p, int32_t i) {
    if (s->group <= 64) return p * s->part + i;
    return (p >> 1) * 128 + (i >> 4) * 32 + (p & 1) * 16 + (i & 15);
}

/* Where row i begins in a plane (or, 3, in the scales). */
static inline const uint8_t *row_of(const Matrix *m, int32_t plane, int64_t i) {
    const int64_t stored = m->parts == 2 ? i >> 1 : i, at = m->index[plane] ? m->index[plane][stored] : stored;
    const int64_t part = m->parts == 2 ? i & 1 : 0;
    if (plane == 3) return m->scale + at * m->scale_stride + part * m->scale_part;
    return m->plane[plane] + at * m->plane_stride[plane] + part * m->plane_part[plane];
}

/* What `prepare` leaves: q as two bytes or one 16-bit number (the same size), scales and offsets. */
typedef struct {
    int8_t *high, *low; /* [tokens][parts * part]; order: see `ordered` */
    int16_t *whole;     /* instead of them, for the portable path */
    float *scale, *sum; /* [tokens][parts]: scale, scale * Q */
    int32_t tokens, few; /* few: bytes lie in the order of 64-byte chunks, else part after part */
} Prepared;

static inline Prepared prepared_at(void *memory, int32_t tokens, int32_t few, const Shape *s) {
    const int64_t codes = (int64_t)tokens * s->parts * s->part, parts = (int64_t)tokens * s->parts;
    Prepared p;
    p.high = memory, p.low = p.high + codes, p.whole = memory;
    p.scale = (float *)(p.high + 2 * codes), p.sum = p.scale + parts;
    p.tokens = tokens, p.few = few;
    return p;
}

#endif
