/* AVX-512 with VNNI, neuron-major matrices: four neurons are interleaved in registers so that a byte product sums over
 * them. See planes.h for the arithmetic and avx512.h for the words.
 *
 * With few tokens memory decides, and memory wants long pieces: reading 256 bytes of each row in turn reached half the
 * rate of 1024. So an item is a slice of neurons times a span of at most 16 chunks (4096 columns, 512 to 2048 bytes of a
 * plane); while a block of its neurons is multiplied, strip by strip of at most 4 chunks, from the second-level cache,
 * the next block's rows are fetched in the order in which they lie.
 */
#ifndef TIERCACHE_AVX512_DOWN_H
#define TIERCACHE_AVX512_DOWN_H

#include "avx512.h"

#define WIDE 4  /* chunks of a strip: 16 groups of 64 */
#define REACH 16 /* chunks of a span */

typedef struct {
    Row row[BLOCK], ahead[BLOCK];    /* the block's neurons, and the next block's */
    int32_t count, coming;           /* how many of them there are */
    _Alignas(64) float lo[BLOCK][16], step[BLOCK][16]; /* by group of the strip; steps beyond the last neuron are 0 */
    _Alignas(64) float inverse[16], largest[16];       /* 32639 / Z, Z * unit / 32639 */
} Block;

typedef struct {
    int32_t chunk, chunks, groups; /* first chunk and how many; groups of the strip */
    int64_t scale_at;              /* of its first scale in a row */
} Strip;

INLINE void transpose16(__m512i v[16]) {
    __m512i q[4][4];
    for (int i = 0; i < 4; i++) { /* rows 4 i .. 4 i + 3 */
        for (int k = 0; k < 4; k++) q[i][k] = v[4 * i + k];
        transpose4(q[i]); /* q[i][d], lane L: column 4 L + d of these rows */
    }
    for (int d = 0; d < 4; d++) {
        __m512i l[4] = {q[0][d], q[1][d], q[2][d], q[3][d]};
        transpose_lanes(l); /* l[L]: column 4 L + d of all rows */
        for (int k = 0; k < 4; k++) v[4 * k + d] = l[k];
    }
}

INLINE void read_scales(Block *block, const Strip *strip, int planes) {
    const uint32_t some = strip->groups == 16 ? ~0u : (1u << (2 * strip->groups)) - 1;
    const __m512i apart = halves_apart(64);
    __m512 top = _mm512_setzero_ps();
    for (int n = 0; n < block->count; n++) {
        const __m512i halves =
            _mm512_permutexvar_epi16(apart, _mm512_maskz_loadu_epi16(some, block->row[n].scale + strip->scale_at));
        const __m512 step = steps_of(halves);
        _mm512_store_ps(block->lo[n], lows_of(halves)), _mm512_store_ps(block->step[n], step);
        top = _mm512_max_ps(top, step);
    }
    for (int n = block->count; n < BLOCK; n++) _mm512_store_ps(block->step[n], _mm512_setzero_ps());
    const __mmask16 some_step = _mm512_cmp_ps_mask(top, _mm512_setzero_ps(), _CMP_GT_OQ);
    _mm512_store_ps(block->inverse, _mm512_maskz_div_ps(some_step, _mm512_set1_ps(FULL), top));
    _mm512_store_ps(block->largest, times(times(top, _mm512_set1_ps(unit_of(planes))), _mm512_set1_ps(1.0f / FULL)));
}

/* a[64] = x / X of the block's neurons (see `normalise`), sums = the offsets' sums by group of the strip; returns X. */
INLINE float read_inputs(const Input *x, int64_t token, int64_t first, const Block *block, int planes, float *a,
                         float *sums) {
    _Alignas(64) float values[BLOCK] = {0};
    load_row(x, token, first, block->count, values);
    __m512 lo = _mm512_setzero_ps(), step = _mm512_setzero_ps();
    for (int n = 0; n < block->count; n++) {
        lo = plus(lo, times(_mm512_set1_ps(values[n]), _mm512_load_ps(block->lo[n])));
        step = plus(step, times(_mm512_set1_ps(values[n]), _mm512_load_ps(block->step[n])));
    }
    _mm512_store_ps(sums, plus(lo, times(step, _mm512_set1_ps(middle_of(planes)))));
    __m512 v[4], largest = _mm512_setzero_ps();
    __mmask16 bad = 0;
    for (int i = 0; i < 4; i++) {
        v[i] = _mm512_load_ps(values + 16 * i);
        bad |= _mm512_cmp_ps_mask(_mm512_abs_ps(v[i]), _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
        largest = _mm512_max_ps(largest, _mm512_abs_ps(v[i]));
    }
    const float top = bad ? 0.0f : _mm512_reduce_max_ps(largest);
    const __mmask16 some = top < TINY ? 0 : 0xFFFF;
    const __m512 inverse = _mm512_set1_ps(some ? 1.0f / top : 0.0f);
    for (int i = 0; i < 4; i++) _mm512_store_ps(a + 16 * i, _mm512_maskz_mul_ps(some, v[i], inverse));
    return bad ? NAN : some ? top : 0.0f;
}

/* q of a quad of neurons (in the order 0, 2, 1, 3) in 16 groups, split into bytes. [group][neuron] */
INLINE void fold_quad(const Block *block, const float *a, int quad, __m512i *high, __m512i *low) {
    const __m512i half = _mm512_set1_epi16(128), even = _mm512_set1_epi16(255);
    const __m512 inverse = _mm512_load_ps(block->inverse);
    __m512i q[4];
    for (int i = 0; i < 4; i++) {
        const __m512 b = times(_mm512_load_ps(block->step[4 * quad + i]), inverse);
        q[i] = _mm512_cvtps_epi32(times(_mm512_set1_ps(a[4 * quad + i]), b));
    }
    const __m512i first = _mm512_mask_blend_epi16(0xAAAAAAAA, q[0], _mm512_slli_epi32(q[1], 16));
    const __m512i second = _mm512_mask_blend_epi16(0xAAAAAAAA, q[2], _mm512_slli_epi32(q[3], 16));
    *low = _mm512_ternarylogic_epi32(even, first, _mm512_slli_epi16(second, 8), 0xCA);
    *high = _mm512_ternarylogic_epi32(even, _mm512_srli_epi16(_mm512_add_epi16(first, half), 8),
                                      _mm512_add_epi16(second, half), 0xCA);
}

/* Four neurons' bytes, one for each column -> by column, in the order 0, 2, 1, 3 that comes free in `fold_quad`. */
INLINE void interleave(__m512i v[4]) {
    const __m512i p0 = _mm512_unpacklo_epi8(v[0], v[2]), p1 = _mm512_unpackhi_epi8(v[0], v[2]);
    const __m512i r0 = _mm512_unpacklo_epi8(v[1], v[3]), r1 = _mm512_unpackhi_epi8(v[1], v[3]);
    v[0] = _mm512_unpacklo_epi16(p0, r0), v[1] = _mm512_unpackhi_epi16(p0, r0);
    v[2] = _mm512_unpacklo_epi16(p1, r1), v[3] = _mm512_unpackhi_epi16(p1, r1);
}

/* v[pass][i], lane k: h of columns 4 i .. 4 i + 3 of part k, four neurons each, still two to a byte; e: c likewise. */
INLINE void four_neurons(const Row *r, int planes, int group, const Fixed *k, int64_t at, Present here, __m512i v[2][4],
                         __m512i e[2][4]) {
    for (int n = 0; n < 4; n++) {
        const __m512i a = load64(here.two, r[n].a + at), lower = lower_two(r + n, planes, k, at, here);
        for (int pass = 0; pass < 2; pass++) v[pass][n] = merge(pass, k, a, lower);
        if (planes > 2) {
            const __m512i c0 = load64(here.low, r[n].c + 2 * at), c1 = load64(here.high, r[n].c + 2 * at + 64);
            for (int pass = 0; pass < 2; pass++) e[pass][n] = nibbles(group, pass, c0, c1);
        }
    }
    for (int pass = 0; pass < 2; pass++) {
        interleave(v[pass]);
        if (planes > 2) interleave(e[pass]);
    }
}

INLINE __m512i groups_of_lanes(int group, int chunk) {
    const __m512i lanes = group == 64 ? _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0)
                                      : _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_add_epi32(lanes, _mm512_set1_epi32(chunk * (256 / group)));
}

/* One token's products with one chunk of a block; out [pass][high nibble][4][16] in the order of `four_neurons`. */
INLINE void few_chunk(const Block *block, int planes, int group, const Fixed *k, int64_t at, Present here,
                      __m512i lanes, const __m512i (*bytes)[2], __m512 scale, __m512 sum, Fetch *fetch, float *out) {
    scale = _mm512_permutexvar_ps(lanes, scale), sum = _mm512_permutexvar_ps(lanes, sum);
    _Alignas(64) uint8_t nibble[2][16][8][64]; /* of the chunk, so that the sums have the registers to themselves */
    for (int quad = 0; quad < 16; quad++) {
        __m512i v[2][4], e[2][4];
        if (fetch) fetch_ahead(fetch, planes, group);
        four_neurons(block->row + 4 * quad, planes, group, k, at, here, v, e);
        for (int pass = 0; pass < 2; pass++)
            for (int i = 0; i < 4; i++) {
                _mm512_store_si512(nibble[pass][quad][i], v[pass][i]);
                if (planes > 2) _mm512_store_si512(nibble[pass][quad][4 + i], e[pass][i]);
            }
    }
    for (int pass = 0; pass < 2; pass++) {
        __m512i upper[8], lower[8];
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) upper[i] = lower[i] = _mm512_setzero_si512();
        for (int quad = 0; quad < 16; quad++) {
            const __m512i xh = _mm512_permutexvar_epi32(lanes, bytes[quad][0]);
            const __m512i xl = _mm512_permutexvar_epi32(lanes, bytes[quad][1]);
            if (fetch && quad & 1) fetch_ahead(fetch, planes, group);
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
                const __m512i v = _mm512_load_si512(nibble[pass][quad][i]);
                const __m512i e = planes > 2 ? _mm512_load_si512(nibble[pass][quad][4 + i]) : v;
                const __m512i low = codes(planes, 0, k, v, e), high = codes(planes, 1, k, v, e);
                accumulate(&upper[i], low, xh), accumulate(&lower[i], low, xl);
                accumulate(&upper[4 + i], high, xh), accumulate(&lower[4 + i], high, xl);
            }
        }
#pragma GCC unroll 8 /* or the sums live in memory throughout */
        for (int i = 0; i < 8; i++) {
            const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(upper[i], 8), lower[i]);
            const __m512 term = plus(times(_mm512_cvtepi32_ps(dot), scale), sum);
            float *to = out + pass * 128 + i * 16;
            _mm512_store_ps(to, plus(_mm512_load_ps(to), term));
        }
    }
}

/* Column of number `i` (0 .. 256) of a chunk in the order of `few_chunk`'s output. */
INLINE int32_t column_in_order(const Shape *s, int32_t chunk, int32_t i) {
    const int32_t lane = (i >> 2) & 3, four = (i >> 4) & 3, j = (i >> 7) + 2 * ((i >> 6) & 1);
    return column_of(s, chunk * 4 + lane, 16 * j + 4 * four + (i & 3));
}

/* The neurons [first, end), at most BLOCK, which were wanted next before if `known`; now those of [then, ...) are. */
INLINE void next_block(const Matrix *m, const Shape *s, int64_t first, int64_t end, int64_t then, int known,
                       Block *block) {
    block->count = end - first < BLOCK ? (int32_t)(end - first) : BLOCK;
    for (int n = 0; n < block->count; n++) block->row[n] = known ? block->ahead[n] : row_at(m, s, first + n);
    for (int n = block->count; n < BLOCK; n++) block->row[n] = block->row[block->count - 1];
    const int64_t more = m->rows - then;
    block->coming = more <= 0 ? 0 : more < BLOCK ? (int32_t)more : BLOCK;
    for (int n = 0; n < block->coming; n++) block->ahead[n] = row_at(m, s, then + n);
}

INLINE Strip strip_at(const Shape *s, int32_t chunk, int32_t end) {
    Strip strip;
    strip.chunk = chunk;
    strip.chunks = end - chunk < WIDE ? end - chunk : WIDE;
    const int32_t first = chunk * 256 / s->group, last = (chunk + strip.chunks) * 256 / s->group;
    strip.groups = (last < s->groups ? last : s->groups) - first;
    strip.scale_at = 4 * (int64_t)first;
    return strip;
}

/* One strip of a block for all tokens; sums [token][chunk of the span][256]. */
INLINE void few_strip(Block *block, const Strip *strip, int planes, int group, const Input *x, const Shape *s,
                      int64_t first, Fetch *fetch, float (*sums)[REACH][256], int32_t chunk) {
    const Fixed k = fixed(group);
    read_scales(block, strip, planes);
    for (int32_t t = 0; t < x->tokens; t++) {
        _Alignas(64) float a[BLOCK], offsets[16];
        __m512i bytes[16][2];
        const __m512 largest = _mm512_set1_ps(read_inputs(x, t, first, block, planes, a, offsets));
        const __m512 scale = times(largest, _mm512_load_ps(block->largest)), offset = _mm512_load_ps(offsets);
        for (int quad = 0; quad < 16; quad++) fold_quad(block, a, quad, &bytes[quad][0], &bytes[quad][1]);
        for (int c = 0; c < strip->chunks; c++) {
            const int64_t at = (int64_t)(strip->chunk + c) * 64;
            few_chunk(block, planes, group, &k, at, present(s->bytes - at), groups_of_lanes(group, c), bytes, scale,
                      offset, t ? NULL : fetch, sums[t][chunk + c]);
        }
    }
}

/* A slice of neurons times the chunks [begin, end); `to` gets the sums, [token][columns]. `then`: see `next_block`. */
INLINE void few_down(const Matrix *m, int planes, int group, const Input *x, const Shape *s, int64_t slice, int64_t then,
                     int32_t begin, int32_t end, float *to) {
    _Alignas(64) float sums[FEW][REACH][256];
    Block block;
    const int64_t stop = slice + SLICE < m->rows ? slice + SLICE : m->rows;
    memset(sums, 0, sizeof sums[0] * (size_t)x->tokens);
    for (int64_t first = slice; first < stop; first += BLOCK) {
        next_block(m, s, first, stop, first + BLOCK < stop ? first + BLOCK : then, first > slice, &block);
        Fetch fetch = fetch_from(block.ahead, block.coming, begin, end);
        for (int32_t chunk = begin; chunk < end; chunk += WIDE) {
            const Strip strip = strip_at(s, chunk, end);
            few_strip(&block, &strip, planes, group, x, s, first, &fetch, sums, chunk - begin);
        }
    }
    for (int32_t t = 0; t < x->tokens; t++)
        for (int32_t c = begin; c < end; c++)
            for (int i = 0; i < 256; i++) {
                const int32_t column = column_in_order(s, c, i);
                if (column < m->columns) to[(int64_t)t * m->columns + column] = sums[t][c - begin][i];
            }
}

/* --- many tokens --------------------------------------------------------------------------------------------------- */

#define SPAN 64 /* tokens of one item */

/* Tiles [part][j][quad, in the order of `Folded`][16 columns][4 neurons] of one chunk of a block. */
INLINE void tile_neurons(const Block *block, int planes, int group, int64_t at, Present here, uint8_t *tile) {
    const Fixed made = fixed(group), *k = &made; /* here, for the products want all registers */
    for (int quad = 0; quad < 16; quad++) {
        const Row *r = block->row + 4 * quad, ordered[4] = {r[0], r[2], r[1], r[3]}; /* `interleave` swaps back */
        __m512i v[2][4], e[2][4];
        four_neurons(ordered, planes, group, k, at, here, v, e);
        for (int j = 0; j < 4; j++) {
            __m512i u[4];
            for (int i = 0; i < 4; i++) u[i] = codes(planes, j >> 1, k, v[j & 1][i], e[j & 1][i]);
            transpose_lanes(u);
            for (int p = 0; p < 4; p++)
                _mm512_store_si512(tile + ((p * 4 + j) * 16 + 4 * (quad & 3) + (quad >> 2)) * 64, u[p]);
        }
    }
}

INLINE void add_columns(const uint8_t *tile, const int8_t *high, const int8_t *low, const float *scale,
                        const float *sum, const int count, float *const out[2], const __mmask16 some[2],
                        int64_t stride) {
    __m512i dot[TOKENS][2];
    multiply_tile(tile, high, low, BLOCK, count, dot);
    for (int t = 0; t < count; t++)
        for (int i = 0; i < 2; i++) {
            const __m512 scaled = times(_mm512_cvtepi32_ps(dot[t][i]), _mm512_set1_ps(scale[t]));
            float *to = out[i] + t * stride;
            const __m512 before = _mm512_maskz_loadu_ps(some[i], to);
            _mm512_mask_storeu_ps(to, some[i], plus(before, plus(scaled, _mm512_set1_ps(sum[t * 16]))));
        }
}

/* Activations of a block and what folds them, for many tokens. */
typedef struct {
    _Alignas(64) float b[16][BLOCK]; /* by group of the strip */
    _Alignas(64) float a[SPAN][BLOCK], offset[SPAN][16];
    _Alignas(64) int8_t high[SPAN][BLOCK], low[SPAN][BLOCK]; /* q of one group; quad n lies at dword 4 (n % 4) + n / 4 */
    float largest[SPAN], scale[SPAN];
} Folded;

INLINE void read_block(Block *block, int planes, const Input *x, int64_t first, int64_t token, int tokens, Folded *to) {
    const __m512 inverse = _mm512_load_ps(block->inverse);
    for (int n = 0; n < BLOCK; n += 16) {
        __m512i v[16];
        for (int i = 0; i < 16; i++) v[i] = _mm512_castps_si512(times(_mm512_load_ps(block->step[n + i]), inverse));
        transpose16(v);
        for (int g = 0; g < 16; g++) _mm512_store_si512(to->b[g] + n, v[g]);
    }
    for (int t = 0; t < tokens; t++)
        to->largest[t] = read_inputs(x, token + t, first, block, planes, to->a[t], to->offset[t]);
}

INLINE void fold_group(Folded *x, const Block *block, int g, int tokens) {
    const __m512i half = _mm512_set1_epi16(128), byte = _mm512_set1_epi16(255);
    for (int t = 0; t < tokens; t++) {
        __m512i q[4];
        for (int i = 0; i < 4; i++)
            q[i] = _mm512_cvtps_epi32(times(_mm512_load_ps(x->a[t] + 16 * i), _mm512_load_ps(x->b[g] + 16 * i)));
        const __m512i q01 = _mm512_packs_epi32(q[0], q[1]), q23 = _mm512_packs_epi32(q[2], q[3]);
        const __m512i h01 = _mm512_srai_epi16(_mm512_add_epi16(q01, half), 8);
        const __m512i h23 = _mm512_srai_epi16(_mm512_add_epi16(q23, half), 8);
        _mm512_store_si512(x->high[t], _mm512_packs_epi16(h01, h23));
        _mm512_store_si512(x->low[t],
                           _mm512_packus_epi16(_mm512_and_si512(q01, byte), _mm512_and_si512(q23, byte)));
        x->scale[t] = x->largest[t] * block->largest[g];
    }
}

/* All tokens of a span with one part (four vectors of 16 columns) of a block. */
INLINE void many_part(const uint8_t *tile, int planes, int group, const Shape *s, int32_t p, int32_t columns,
                      const Folded *x, const float *sum, int tokens, Fetch *fetch, float *out, int64_t stride) {
    for (int j = 0; j < 4; j += 2) {
        for (int i = 0; i < 4; i++) fetch_ahead(fetch, planes, group); /* a 32nd of the next block */
        float *to[2];
        __mmask16 some[2];
        for (int i = 0; i < 2; i++) {
            const int32_t column = column_of(s, p, 16 * (j + i)), left = columns - column;
            to[i] = out + (left > 0 ? column : 0);
            some[i] = left >= 16 ? 0xFFFF : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
        }
        for (int t = 0; t < tokens; t += TOKENS) {
            const int n = tokens - t < TOKENS ? tokens - t : TOKENS;
            float *at[2] = {to[0] + t * stride, to[1] + t * stride};
            const int8_t *high = x->high[t], *low = x->low[t];
            BY_COUNT(n, add_columns(tile + j * 1024, high, low, x->scale + t, sum + t * 16, N, at, some, stride))
        }
    }
}

/* A strip of columns for a span of tokens; `sums` holds tokens * 1024 floats. */
INLINE void many_block(Block *block, const Strip *strip, int planes, int group, const Shape *s, Folded *x, int tokens,
                       int32_t columns, Fetch *fetch, float *sums) {
    _Alignas(64) uint8_t tile[16 * 16 * 64];
    for (int c = 0; c < strip->chunks; c++) {
        const int64_t at = (int64_t)(strip->chunk + c) * 64;
        tile_neurons(block, planes, group, at, present(s->bytes - at), tile);
        for (int i = 0; i < 4; i++) {
            const int32_t p = (strip->chunk + c) * 4 + i;
            if (p >= s->real_parts) break;
            const int g = p * 64 / group - (int)(strip->scale_at / 4);
            fold_group(x, block, g, tokens);
            many_part(tile + i * 4096, planes, group, s, p, columns, x, &x->offset[0][g], tokens, fetch,
                      sums - (int64_t)strip->chunk * 256, WIDE * 256);
        }
    }
}

INLINE void many_down(const Matrix *m, int planes, int group, const Input *x, const Shape *s, Strip strip,
                      int64_t token, int tokens, float *out, int64_t stride) {
    Block block;
    Folded folded;
    _Alignas(64) float sums[SPAN][WIDE * 256];
    const int32_t begin = strip.chunk * 256, left = m->columns - begin, width = left < WIDE * 256 ? left : WIDE * 256;
    for (int64_t slice = 0; slice < m->rows; slice += SLICE) {
        const int64_t stop = slice + SLICE < m->rows ? slice + SLICE : m->rows;
        memset(sums, 0, sizeof sums[0] * (size_t)tokens);
        for (int64_t first = slice; first < stop; first += BLOCK) {
            next_block(m, s, first, stop, first + BLOCK, first > 0, &block);
            Fetch fetch = fetch_from(block.ahead, block.coming, strip.chunk, strip.chunk + strip.chunks);
            read_scales(&block, &strip, planes);
            read_block(&block, planes, x, first, token, tokens, &folded);
            many_block(&block, &strip, planes, group, s, &folded, tokens, m->columns, &fetch, sums[0]);
        }
        for (int t = 0; t < tokens; t++)
            for (int32_t i = 0; i < width; i++) {
                const int64_t column = begin + i;
                out[(token + t) * stride + column] += sums[t][i];
            }
    }
}

#endif
