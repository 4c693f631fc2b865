/* The portable path, also compiled for AVX2: plain loops that a compiler turns into 16-bit multiply-adds. */
#ifndef TIERCACHE_GENERIC_H
#define TIERCACHE_GENERIC_H

#include "planes.h"

/* Quantise `count` <= 64 values: returns the scale, 0 for all zero and NaN where one is not finite. */
static inline float quantise(const float *x, int32_t count, int16_t *q, int32_t *total) {
    float largest = 0.0f, poison = 0.0f;
    for (int32_t i = 0; i < count; i++) {
        const float a = fabsf(x[i]);
        largest = a > largest ? a : largest;
        poison += x[i] * 0.0f; /* NaN as soon as one is not finite */
    }
    const float inverse = largest < TINY || !(largest < INFINITY) ? 0.0f : FULL / largest;
    int32_t sum = 0;
    for (int32_t i = 0; i < count; i++) {
        const float v = x[i] * inverse;
        q[i] = v == v ? (int16_t)rintf(v) : 0;
        sum += q[i];
    }
    *total = sum;
    return poison != poison ? NAN : largest < TINY ? 0.0f : largest * (1.0f / FULL);
}

/* Codes of part `p` as numbers, in the order (j, t): bits 2j of byte t of a 2-bit plane. */
static inline void unpack_part(const uint8_t *const plane[3], int32_t planes, const Shape *s, int32_t p, int16_t *code) {
    const int32_t width = s->part / 4, wide = s->group == 128; /* a part has all bytes of a group, or half of them */
    const uint8_t *a = plane[0] + p * width;
    const int32_t bits = wide ? (p >> 1) * 16 : p * (width / 2); /* the first byte of the single bits */
    const uint8_t *a1 = plane[0] + s->bytes + bits, *b = planes > 1 ? plane[1] + bits : 0;
    const int32_t repeat = wide ? 16 : width / 2; /* of so many bytes: each has an even bit first, then an odd one */
    for (int32_t j = 0; j < 4; j++)
        for (int32_t t = 0; t < width; t++) {
            const int32_t at = t % repeat, shift = 2 * j + (wide ? p & 1 : t / repeat);
            const int32_t last = b ? (b[at] >> shift) & 1 : 0;
            code[j * width + t] = (int16_t)(4 * ((a[t] >> (2 * j)) & 3) + 2 * ((a1[at] >> shift) & 1) + last);
        }
    if (planes < 3) return;
    const uint8_t *c = plane[2] + (wide ? (p >> 1) * 64 + (p & 1) * 16 : p * (s->part / 2));
    const int32_t step = wide ? 32 : width; /* from the bytes of j = 0 to those of j = 1 */
    for (int32_t j = 0; j < 4; j++)
        for (int32_t t = 0; t < width; t++) {
            const int32_t low = (c[(j & 1) * step + t] >> (4 * (j >> 1))) & 15;
            code[j * width + t] = (int16_t)(CELL * code[j * width + t] + low);
        }
}

/* lo and step of a group. */
static inline void scales_of(const uint8_t *row, int32_t group, float *lo, float *step) {
    uint16_t halves[2];
    memcpy(halves, row + 4 * group, 4);
    *lo = half_to_float(halves[0]), *step = half_to_float(halves[1]);
}

static inline float unit_of(int32_t planes) { return planes == 3 ? 1.0f : CELL; }
static inline float middle_of(int32_t planes) { return planes == 1 ? 7.5f + CELL / 2 : planes == 2 ? 7.5f : 0.0f; }

static void generic_row(const Matrix *m, const Prepared *x, const Shape *s, int64_t row, float *out, int64_t stride) {
    float sums[MAX_TOKENS][4];
    memset(sums, 0, sizeof(float) * 4 * (size_t)x->tokens);
    const uint8_t *plane[3] = {0};
    for (int32_t p = 0; p < m->planes; p++) plane[p] = row_of(m, p, row);
    const uint8_t *scale = row_of(m, 3, row);
    const float unit = unit_of(m->planes), middle = middle_of(m->planes);
    const int64_t width = (int64_t)s->parts * s->part;
    for (int32_t p = 0; p < s->real_parts; p++) {
        int16_t code[64];
        float step, offset;
        unpack_part(plane, m->planes, s, p, code);
        scales_of(scale, p * s->part / s->group, &offset, &step);
        if (m->planes < 3) offset += step * middle, step *= unit;
        for (int32_t t = 0; t < x->tokens; t++) {
            const int16_t *q = x->whole + t * width + p * s->part;
            int32_t dot = 0;
            for (int32_t i = 0; i < s->part; i++) dot += code[i] * q[i];
            const float scaled = step * x->scale[(int64_t)t * s->parts + p];
            const float term = (float)dot * scaled + offset * x->sum[(int64_t)t * s->parts + p];
            sums[t][p / s->lanes % 4] += term;
        }
    }
    for (int32_t t = 0; t < x->tokens; t++)
        out[t * stride + row] += (sums[t][0] + sums[t][1]) + (sums[t][2] + sums[t][3]);
}

/* a = x / X of one block of neurons, and X; NaN where a value is not finite. */
static inline float normalise(const float *x, int32_t count, float *a) {
    float largest = 0.0f, poison = 0.0f;
    for (int32_t i = 0; i < count; i++) {
        const float v = fabsf(x[i]);
        largest = v > largest ? v : largest;
        poison += x[i] * 0.0f;
    }
    const int zero = largest < TINY || poison != poison;
    const float inverse = zero ? 0.0f : 1.0f / largest;
    for (int32_t i = 0; i < count; i++) a[i] = zero ? 0.0f : x[i] * inverse;
    return poison != poison ? NAN : zero ? 0.0f : largest;
}

/* Adds a block of neurons' products with one part of 32 or 64 columns to sums[tokens][64]. */
static void generic_block(const Matrix *m, const Input *x, const Shape *s, int32_t p, int64_t first, int32_t count,
                          float (*sums)[64]) {
    const float unit = unit_of(m->planes), middle = middle_of(m->planes);
    int16_t codes[BLOCK][64];
    float lo[BLOCK], step[BLOCK], b[BLOCK], largest = 0.0f;
    for (int32_t n = 0; n < count; n++) {
        const uint8_t *plane[3] = {0};
        for (int32_t k = 0; k < m->planes; k++) plane[k] = row_of(m, k, first + n);
        unpack_part(plane, m->planes, s, p, codes[n]);
        scales_of(row_of(m, 3, first + n), p * s->part / s->group, &lo[n], &step[n]);
        largest = step[n] > largest ? step[n] : largest;
    }
    const float inverse = largest > 0.0f ? FULL / largest : 0.0f;
    for (int32_t n = 0; n < count; n++) b[n] = step[n] * inverse;
    for (int32_t t = 0; t < x->tokens; t++) {
        float values[BLOCK], a[BLOCK], low = 0.0f, steps = 0.0f;
        int32_t dot[64] = {0};
        load_row(x, t, first, count, values);
        const float scale = normalise(values, count, a) * (largest * unit * (1.0f / FULL));
        for (int32_t n = 0; n < count; n++) {
            const int32_t q = (int32_t)rintf(a[n] * b[n]);
            for (int32_t i = 0; i < s->part; i++) dot[i] += codes[n][i] * q;
            low += values[n] * lo[n], steps += values[n] * step[n];
        }
        const float sum = low + steps * middle;
        for (int32_t i = 0; i < s->part; i++) sums[t][i] += (float)dot[i] * scale + sum;
    }
}

/* One part of a down matrix, all neurons, all tokens. */
static void generic_down(const Matrix *m, const Input *x, const Shape *s, int32_t p, float *out, int64_t stride) {
    float sums[MAX_TOKENS][64];
    for (int64_t slice = 0; slice < m->rows; slice += SLICE) {
        const int64_t end = slice + SLICE < m->rows ? slice + SLICE : m->rows;
        memset(sums, 0, sizeof(float) * 64 * (size_t)x->tokens);
        for (int64_t first = slice; first < end; first += BLOCK)
            generic_block(m, x, s, p, first, end - first < BLOCK ? (int32_t)(end - first) : BLOCK, sums);
        for (int32_t t = 0; t < x->tokens; t++)
            for (int32_t i = 0; i < s->part; i++) {
                const int32_t column = column_of(s, p, i);
                if (column < m->columns) out[t * stride + column] += sums[t][i];
            }
    }
}

#endif
