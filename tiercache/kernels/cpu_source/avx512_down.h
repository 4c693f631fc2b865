/* AVX-512 with VNNI, neuron-major matrices: four neurons are interleaved in registers so that a byte product sums over
 * them. See planes.h for the arithmetic and avx512.h for the words.
 *
 * An item is a strip of at most four chunks (1024 columns): 64 bytes of scales and 256 of a two-bit plane for each
 * neuron lie in one piece. While a block of neurons is multiplied the next one's bytes are fetched, row by row.
 */
#ifndef TIERCACHE_AVX512_DOWN_H
#define TIERCACHE_AVX512_DOWN_H

#include "avx512.h"

#define WIDE 4 /* chunks of a strip */

typedef struct {
    Row row[BLOCK], ahead[BLOCK];    /* the block's neurons, and the next block's */
    int32_t count, coming;           /* how many of them there are */
    _Alignas(64) float b[16][BLOCK]; /* folded steps by group of the strip */
    _Alignas(64) float c[BLOCK][16]; /* offsets */
    _Alignas(64) float largest[16];  /* Z / 32639 */
} Block;

typedef struct {
    int32_t chunk, chunks, groups; /* first chunk and how many; groups of the strip */
    int64_t scale_at;              /* of its first scale in a row */
} Strip;

INLINE void transpose16(__m512 v[16]) {
    __m512i q[4][4];
    for (int i = 0; i < 4; i++) { /* rows 4 i .. 4 i + 3 */
        for (int k = 0; k < 4; k++) q[i][k] = _mm512_castps_si512(v[4 * i + k]);
        transpose4(q[i]); /* q[i][d], lane L: column 4 L + d of these rows */
    }
    for (int d = 0; d < 4; d++) {
        __m512i l[4] = {q[0][d], q[1][d], q[2][d], q[3][d]};
        transpose_lanes(l); /* l[L]: column 4 L + d of all rows */
        for (int k = 0; k < 4; k++) v[4 * k + d] = _mm512_castsi512_ps(l[k]);
    }
}

INLINE void read_scales(Block *block, const Strip *strip, int planes) {
    const __mmask16 some = (__mmask16)((1u << strip->groups) - 1);
    const float power = power_of(planes);
    __m512 largest = _mm512_setzero_ps();
    _Alignas(64) float steps[BLOCK][16];
    for (int n = 0; n < block->count; n++) {
        __m512 s, c;
        scales16(_mm512_maskz_loadu_epi32(some, block->row[n].scale + strip->scale_at), power, &s, &c);
        largest = _mm512_max_ps(largest, s);
        _mm512_store_ps(steps[n], s), _mm512_store_ps(block->c[n], c);
    }
    const __mmask16 any = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_GT_OQ);
    const __m512 inverse = _mm512_maskz_div_ps(any, _mm512_set1_ps(FULL), largest);
    _mm512_store_ps(block->largest, times(largest, _mm512_set1_ps(1.0f / FULL)));
    for (int first = 0; first < BLOCK; first += 16) {
        __m512 v[16];
        for (int i = 0; i < 16; i++)
            v[i] = first + i < block->count ? times(_mm512_load_ps(steps[first + i]), inverse) : _mm512_setzero_ps();
        transpose16(v);
        for (int g = 0; g < 16; g++) _mm512_store_ps(block->b[g] + first, v[g]);
    }
}

/* a[64] = x / X of the block's neurons (see `normalise`), sums = the offsets' sums by group of the strip; returns X. */
INLINE float read_inputs(const Input *x, int64_t token, int64_t first, const Block *block, float *a, float *sums) {
    _Alignas(64) float values[BLOCK] = {0};
    load_row(x, token, first, block->count, values);
    __m512 sum = _mm512_setzero_ps();
    for (int n = 0; n < block->count; n++)
        sum = plus(sum, times(_mm512_set1_ps(values[n]), _mm512_load_ps(block->c[n])));
    _mm512_store_ps(sums, sum);
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

/* q of 64 neurons in one group, split into bytes; quad n of the neurons lies at dword 4 (n % 4) + n / 4. */
INLINE void fold(const float *a, const float *b, __m512i *high, __m512i *low) {
    __m512i q[4];
    for (int i = 0; i < 4; i++) q[i] = _mm512_cvtps_epi32(times(_mm512_load_ps(a + 16 * i), _mm512_load_ps(b + 16 * i)));
    const __m512i q01 = _mm512_packs_epi32(q[0], q[1]), q23 = _mm512_packs_epi32(q[2], q[3]);
    const __m512i half = _mm512_set1_epi16(128), byte = _mm512_set1_epi16(255);
    *high = _mm512_packs_epi16(_mm512_srai_epi16(_mm512_add_epi16(q01, half), 8),
                               _mm512_srai_epi16(_mm512_add_epi16(q23, half), 8));
    *low = _mm512_packus_epi16(_mm512_and_si512(q01, byte), _mm512_and_si512(q23, byte));
}

/* Bytes [16 columns][4 neurons] of a pass's low (v) or high (w) nibbles of 64 bytes of a chunk. */
INLINE void interleave(__m512i v[4]) {
    const __m512i p0 = _mm512_unpacklo_epi8(v[0], v[1]), p1 = _mm512_unpackhi_epi8(v[0], v[1]);
    const __m512i r0 = _mm512_unpacklo_epi8(v[2], v[3]), r1 = _mm512_unpackhi_epi8(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi16(p0, r0), v[1] = _mm512_unpackhi_epi16(p0, r0);
    v[2] = _mm512_unpacklo_epi16(p1, r1), v[3] = _mm512_unpackhi_epi16(p1, r1);
}

/* v[i], lane k: codes of columns 4 i .. 4 i + 3 of part k, four neurons each, still two to a byte; e likewise. */
INLINE void four_neurons(const Row *r, int planes, int group, int pass, int64_t at, int64_t left, __m512i v[4],
                         __m512i e[4]) {
    const __mmask64 some = left >= 64 ? ~0ull : (1ull << left) - 1;
    const __mmask64 c_low = left >= 32 ? ~0ull : (1ull << (2 * left)) - 1;
    const __mmask64 c_high = left >= 64 ? ~0ull : left > 32 ? (1ull << (2 * left - 64)) - 1 : 0;
    for (int n = 0; n < 4; n++) {
        const __m512i a = _mm512_maskz_loadu_epi8(some, r[n].a + at);
        v[n] = merge(planes, pass, a, planes > 1 ? _mm512_maskz_loadu_epi8(some, r[n].b + at) : a);
        if (planes > 2)
            e[n] = nibbles(group, pass, _mm512_maskz_loadu_epi8(c_low, r[n].c + 2 * at),
                           _mm512_maskz_loadu_epi8(c_high, r[n].c + 2 * at + 64));
    }
    interleave(v);
    if (planes > 2) interleave(e);
}

INLINE void fetch_ahead(const Block *block, const Strip *strip, int planes, int visit) {
    const int n = visit >> 1;
    if (n >= block->coming) return;
    const Row *r = block->ahead + n;
    const int64_t at = (int64_t)strip->chunk * 64;
    for (int i = 0; i < strip->chunks; i++) {
        if (visit & 1) {
            if (planes < 3) continue;
            _mm_prefetch((const char *)r->c + 2 * (at + 64 * i), _MM_HINT_T1);
            _mm_prefetch((const char *)r->c + 2 * (at + 64 * i) + 64, _MM_HINT_T1);
        } else {
            _mm_prefetch((const char *)r->a + at + 64 * i, _MM_HINT_T1);
            if (planes > 1) _mm_prefetch((const char *)r->b + at + 64 * i, _MM_HINT_T1);
        }
    }
    if (visit & 1) _mm_prefetch((const char *)r->scale + strip->scale_at, _MM_HINT_T1);
}

INLINE __m512i groups_of_lanes(int group, int chunk) {
    const __m512i lanes = group == 64 ? _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0)
                                      : _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
    return _mm512_add_epi32(lanes, _mm512_set1_epi32(chunk * (256 / group)));
}

/* One token's products with one chunk of a block; out [pass][high nibble][4][16] in the order of `four_neurons`. */
INLINE void few_chunk(const Block *block, const Strip *strip, int planes, int group, const Shape *s, int chunk,
                      const __m512i *bytes, __m512 scale, __m512 sum, int fetch, float *out) {
    _Alignas(64) uint32_t high[16][4], low[16][4]; /* [quad of neurons][lane] */
    __m512i h[4], l[4];
    for (int k = 0; k < 4; k++) {
        const int g = chunk * (256 / group) + (group == 64 ? k : k >> 1);
        h[k] = bytes[2 * g], l[k] = bytes[2 * g + 1];
    }
    transpose4(h), transpose4(l); /* [d], lane L: quad 4 d + L, see `fold` */
    for (int d = 0; d < 4; d++) _mm512_store_si512(high[4 * d], h[d]), _mm512_store_si512(low[4 * d], l[d]);
    const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const int64_t at = (int64_t)(strip->chunk + chunk) * 64;
    for (int pass = 0; pass < 2; pass++) {
        __m512i upper[8], lower[8];
        for (int i = 0; i < 8; i++) upper[i] = lower[i] = _mm512_setzero_si512();
        for (int quad = 0; quad < 16; quad++) {
            __m512i v[4], e[4] = {0};
            four_neurons(block->row + 4 * quad, planes, group, pass, at, s->bytes - at, v, e);
            const __m512i xh = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(*(__m128i *)high[quad]));
            const __m512i xl = _mm512_permutexvar_epi32(spread, _mm512_castsi128_si512(*(__m128i *)low[quad]));
            for (int i = 0; i < 4; i++)
                for (int nibble = 0; nibble < 2; nibble++) {
                    const __m512i u = codes(planes, nibble, v[i], e[i]);
                    upper[4 * nibble + i] = _mm512_dpbusd_epi32(upper[4 * nibble + i], u, xh);
                    lower[4 * nibble + i] = _mm512_dpbusd_epi32(lower[4 * nibble + i], u, xl);
                }
            if (fetch) fetch_ahead(block, strip, planes, (chunk * 2 + pass) * 16 + quad);
        }
        for (int i = 0; i < 8; i++, out += 16) {
            const __m512i dot = _mm512_add_epi32(_mm512_slli_epi32(upper[i], 8), lower[i]);
            const __m512 term = plus(times(_mm512_cvtepi32_ps(dot), scale), sum);
            _mm512_store_ps(out, plus(_mm512_load_ps(out), term));
        }
    }
}

/* Column of number `i` (0 .. 256) of a chunk in the order of `few_chunk`'s output. */
INLINE int32_t column_in_order(const Shape *s, int32_t chunk, int32_t i) {
    const int32_t lane = (i >> 2) & 3, four = (i >> 4) & 3, j = (i >> 7) + 2 * ((i >> 6) & 1);
    return column_of(s, chunk * 4 + lane, 16 * j + 4 * four + (i & 3));
}

INLINE void next_block(const Matrix *m, int64_t first, Block *block) {
    const int64_t left = m->rows - first, more = left - BLOCK;
    block->count = left < BLOCK ? (int32_t)left : BLOCK;
    block->coming = more <= 0 ? 0 : more < BLOCK ? (int32_t)more : BLOCK;
    for (int n = 0; n < BLOCK; n++) block->row[n] = row_at(m, first + (n < block->count ? n : block->count - 1));
    for (int n = 0; n < block->coming; n++) block->ahead[n] = row_at(m, first + BLOCK + n);
}

INLINE Strip strip_at(const Shape *s, int64_t item, int chunks) {
    Strip strip;
    strip.chunk = (int32_t)item * chunks;
    strip.chunks = s->chunks - strip.chunk < chunks ? s->chunks - strip.chunk : chunks;
    const int32_t first = strip.chunk * 256 / s->group, last = (strip.chunk + strip.chunks) * 256 / s->group;
    strip.groups = (last < s->groups ? last : s->groups) - first;
    strip.scale_at = 4 * (int64_t)first;
    return strip;
}

INLINE void few_down(const Matrix *m, int planes, int group, const Input *x, const Shape *s, Strip strip, float *out,
                     int64_t stride) {
    Block block;
    float results[8][WIDE][256] __attribute__((aligned(64)));
    for (int32_t t = 0; t < x->tokens; t++)
        for (int c = 0; c < strip.chunks; c++)
            for (int i = 0; i < 256; i++) {
                const int32_t column = column_in_order(s, strip.chunk + c, i);
                results[t][c][i] = column < m->columns ? out[t * stride + column] : 0.0f;
            }
    for (int64_t first = 0; first < m->rows; first += BLOCK) {
        next_block(m, first, &block);
        read_scales(&block, &strip, planes);
        for (int32_t t = 0; t < x->tokens; t++) {
            _Alignas(64) float a[BLOCK], sums[16];
            __m512i bytes[32];
            const __m512 largest = _mm512_set1_ps(read_inputs(x, t, first, &block, a, sums));
            const __m512 scale = times(largest, _mm512_load_ps(block.largest)), sum = _mm512_load_ps(sums);
            for (int g = 0; g < strip.groups; g++) fold(a, block.b[g], bytes + 2 * g, bytes + 2 * g + 1);
            for (int g = strip.groups; g < strip.chunks * 256 / group; g++)
                bytes[2 * g] = bytes[2 * g + 1] = _mm512_setzero_si512();
            for (int c = 0; c < strip.chunks; c++) {
                const __m512i lanes = groups_of_lanes(group, c);
                few_chunk(&block, &strip, planes, group, s, c, bytes, _mm512_permutexvar_ps(lanes, scale),
                          _mm512_permutexvar_ps(lanes, sum), t == 0, results[t][c]);
            }
        }
    }
    for (int32_t t = 0; t < x->tokens; t++)
        for (int c = 0; c < strip.chunks; c++)
            for (int i = 0; i < 256; i++) {
                const int32_t column = column_in_order(s, strip.chunk + c, i);
                if (column < m->columns) out[t * stride + column] = results[t][c][i];
            }
}

/* --- many tokens --------------------------------------------------------------------------------------------------- */

#define SPAN 64 /* tokens of one item */

/* Tiles [part][j][quad, in `fold`'s order][16 columns][4 neurons] of one chunk of a block. */
INLINE void tile_neurons(const Block *block, int planes, int group, int64_t at, int64_t left, uint8_t *tile) {
    for (int quad = 0; quad < 16; quad++)
        for (int pass = 0; pass < 2; pass++) {
            __m512i v[4], e[4] = {0};
            four_neurons(block->row + 4 * quad, planes, group, pass, at, left, v, e);
            for (int nibble = 0; nibble < 2; nibble++) {
                __m512i u[4];
                for (int i = 0; i < 4; i++) u[i] = codes(planes, nibble, v[i], e[i]);
                transpose_lanes(u);
                for (int k = 0; k < 4; k++)
                    _mm512_store_si512(tile + ((k * 4 + pass + 2 * nibble) * 16 + 4 * (quad & 3) + (quad >> 2)) * 64,
                                       u[k]);
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

/* All tokens of a span with one part (four vectors of 16 columns) of a block. */
INLINE void many_part(const uint8_t *tile, const Shape *s, int32_t p, int32_t columns, const int8_t (*high)[BLOCK],
                      const int8_t (*low)[BLOCK], const float *scale, const float *sum, int tokens, float *out,
                      int64_t stride) {
    for (int j = 0; j < 4; j += 2) {
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
            BY_COUNT(n, add_columns(tile + j * 1024, high[t], low[t], scale + t, sum + t * 16, N, at, some, stride))
        }
    }
}

INLINE void many_down(const Matrix *m, int planes, int group, const Input *x, const Shape *s, Strip strip,
                      int64_t token, int tokens, float *out, int64_t stride) {
    Block block;
    _Alignas(64) uint8_t tile[16 * 16 * 64];
    _Alignas(64) float a[SPAN][BLOCK], sums[SPAN][16];
    _Alignas(64) int8_t high[SPAN][BLOCK], low[SPAN][BLOCK];
    float largest[SPAN], scale[SPAN];
    for (int64_t first = 0; first < m->rows; first += BLOCK) {
        next_block(m, first, &block);
        read_scales(&block, &strip, planes);
        for (int t = 0; t < tokens; t++) largest[t] = read_inputs(x, token + t, first, &block, a[t], sums[t]);
        for (int c = 0; c < strip.chunks; c++) {
            const int64_t at = (int64_t)(strip.chunk + c) * 64;
            tile_neurons(&block, planes, group, at, s->bytes - at, tile);
            for (int k = 0; k < 4; k++) {
                const int32_t p = (strip.chunk + c) * 4 + k;
                if (p >= s->real_parts) break;
                const int g = p * 64 / group - (int)(strip.scale_at / 4);
                for (int t = 0; t < tokens; t++) {
                    __m512i h, l;
                    fold(a[t], block.b[g], &h, &l);
                    _mm512_store_si512(high[t], h), _mm512_store_si512(low[t], l);
                    scale[t] = largest[t] * block.largest[g];
                }
                many_part(tile + k * 4096, s, p, m->columns, high, low, scale, &sums[0][g], tokens,
                          out + token * stride, stride);
            }
        }
    }
}

#endif
