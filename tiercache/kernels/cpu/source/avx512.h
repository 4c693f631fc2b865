/* AVX-512 with VNNI: one byte product instruction for 64 codes, activations as two signed bytes.
 *
 * A vector of 64 bytes of a 2-bit plane holds four parts, and the 16 sums of a byte product hold four numbers of each.
 */
#ifndef TIERCACHE_AVX512_H
#define TIERCACHE_AVX512_H

#include "avx512_codes.h"

#define AHEAD 8 /* rows: so far ahead of the four that are multiplied others are fetched; 4 was slower, 16 no faster */

/* sum += products of unsigned codes and signed bytes; gcc copies the sums around its own intrinsic, half of the loop. */
INLINE void accumulate(__m512i *sum, __m512i code, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(code), "v"(x));
}

INLINE void accumulate_from(__m512i *sum, __m512i code, const int8_t *x) { /* the bytes straight from memory */
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(code), "m"(*(const __m512i_u *)x));
}

INLINE __m512 times(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
INLINE __m512 plus(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }

/* Order of 16 (lo, step) pairs, four of each of four rows: all lo, then all steps; a group of 128 counts twice. */
INLINE __m512i halves_apart(int group) {
    _Alignas(64) int16_t order[32];
    for (int i = 0; i < 16; i++) {
        order[i] = (int16_t)(2 * (group == 64 ? i : i / 4 * 4 + i % 4 / 2));
        order[16 + i] = (int16_t)(order[i] + 1);
    }
    return _mm512_load_si512(order);
}

INLINE __m512 lows_of(__m512i apart) { return _mm512_cvtph_ps(_mm512_castsi512_si256(apart)); }
INLINE __m512 steps_of(__m512i apart) { return _mm512_cvtph_ps(_mm512_extracti64x4_epi64(apart, 1)); }

/* s and m, of pairs that were taken apart. */
INLINE void scales16(__m512i apart, int planes, __m512 *s, __m512 *m) {
    *s = steps_of(apart), *m = lows_of(apart);
    if (planes > 2) return; /* unit 1, middle 0 */
    *m = plus(*m, times(*s, _mm512_set1_ps(middle_of(planes))));
    *s = times(*s, _mm512_set1_ps(unit_of(planes)));
}

/* Four vectors of 16 sums -> in each 16-byte lane the four vectors' totals of that lane. */
INLINE __m512i totals(__m512i a0, __m512i a1, __m512i a2, __m512i a3) {
    const __m512i s01 = _mm512_add_epi32(_mm512_unpacklo_epi32(a0, a1), _mm512_unpackhi_epi32(a0, a1));
    const __m512i s23 = _mm512_add_epi32(_mm512_unpacklo_epi32(a2, a3), _mm512_unpackhi_epi32(a2, a3));
    return _mm512_add_epi32(_mm512_unpacklo_epi64(s01, s23), _mm512_unpackhi_epi64(s01, s23));
}

INLINE void transpose4(__m512i v[4]) { /* 4 x 4 numbers in each 16-byte lane */
    const __m512i l01 = _mm512_unpacklo_epi32(v[0], v[1]), h01 = _mm512_unpackhi_epi32(v[0], v[1]);
    const __m512i l23 = _mm512_unpacklo_epi32(v[2], v[3]), h23 = _mm512_unpackhi_epi32(v[2], v[3]);
    v[0] = _mm512_unpacklo_epi64(l01, l23), v[1] = _mm512_unpackhi_epi64(l01, l23);
    v[2] = _mm512_unpacklo_epi64(h01, h23), v[3] = _mm512_unpackhi_epi64(h01, h23);
}

INLINE void transpose_lanes(__m512i v[4]) { /* 4 x 4 lanes of 16 bytes */
    const __m512i a = _mm512_shuffle_i32x4(v[0], v[1], 0x44), b = _mm512_shuffle_i32x4(v[0], v[1], 0xEE);
    const __m512i c = _mm512_shuffle_i32x4(v[2], v[3], 0x44), d = _mm512_shuffle_i32x4(v[2], v[3], 0xEE);
    v[0] = _mm512_shuffle_i32x4(a, c, 0x88), v[1] = _mm512_shuffle_i32x4(a, c, 0xDD);
    v[2] = _mm512_shuffle_i32x4(b, d, 0x88), v[3] = _mm512_shuffle_i32x4(b, d, 0xDD);
}

/* The high and low bytes of |q| <= 32639: q = 256 high + low. */
INLINE __m128i high_bytes(__m512i q) {
    return _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(128)), 8));
}

/* --- activations ------------------------------------------------------------------------------------------------- */

INLINE void prepare_part(const float *x, const Shape *s, int32_t p, int64_t token, const Prepared *out) {
    const int32_t step = s->group == 128 ? 32 : 16;
    __m512 v[4], largest = _mm512_setzero_ps();
    __mmask16 bad = 0;
    for (int j = 0; j < 4; j++) {
        v[j] = _mm512_loadu_ps(x + column_of(s, p, 0) + j * step);
        const __m512 size = _mm512_abs_ps(v[j]);
        bad |= _mm512_cmp_ps_mask(size, _mm512_set1_ps(INFINITY), _CMP_NLT_UQ);
        largest = _mm512_max_ps(largest, size);
    }
    const float top = bad ? 0.0f : _mm512_reduce_max_ps(largest);
    const __m512 inverse = _mm512_set1_ps(top < TINY ? 0.0f : FULL / top);
    __m512i total = _mm512_setzero_si512();
    const int64_t width = (int64_t)s->parts * 64, base = token * width;
    for (int j = 0; j < 4; j++) {
        const __m512i q = bad ? _mm512_setzero_si512() : _mm512_cvtps_epi32(times(v[j], inverse));
        const int64_t at = base + (out->few ? (p >> 2) * 256 + j * 64 + (p & 3) * 16 : p * 64 + j * 16);
        _mm_storeu_si128((__m128i *)(out->high + at), high_bytes(q));
        _mm_storeu_si128((__m128i *)(out->low + at), _mm512_cvtepi32_epi8(q));
        total = _mm512_add_epi32(total, q);
    }
    const float scale = bad ? NAN : top < TINY ? 0.0f : top * (1.0f / FULL);
    out->scale[token * s->parts + p] = scale;
    out->sum[token * s->parts + p] = scale * (float)_mm512_reduce_add_epi32(total);
}

/* --- product, few tokens: four rows at a time --------------------------------------------------------------------- */

INLINE __m128i row_scales(const Row *r, int group, int64_t at, int64_t left) { /* of a chunk */
    const uint8_t *from = r->scale + at;
    if (left < 64) return _mm_maskz_loadu_epi32((__mmask8)((1u << (left * 4 / group)) - 1), from);
    return group == 64 ? _mm_loadu_si128((const __m128i *)from) : _mm_loadl_epi64((const __m128i *)from);
}

INLINE __m256i two_scales(const Row r[2], int group, int64_t at, int64_t left) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(row_scales(r, group, at, left)),
                                   row_scales(r + 1, group, at, left), 1);
}

/* S of four rows in one chunk: [part][row]. */
INLINE __m512i dot_chunk(const Row r[4], int planes, int group, const Fixed *k, int32_t chunk, int64_t left,
                         const int8_t *high, const int8_t *low) {
    const int64_t at = (int64_t)chunk * 64;
    const Present here = present(left);
    __m512i v[2][4], upper[4], lower[4];
    for (int i = 0; i < 4; i++) {
        __m512i a = load64(here.two, r[i].a + at), b = lower_two(r + i, planes, k, at, here);
        __asm__("" : "+v"(a), "+v"(b)); /* or they are kept on the stack, which takes longer than their use */
        for (int pass = 0; pass < 2; pass++) v[pass][i] = merge(pass, k, a, b);
        upper[i] = lower[i] = _mm512_setzero_si512();
    }
    for (int pass = 0; pass < 2; pass++) {
        const int8_t *h = high + chunk * 256 + 64 * pass, *l = low + chunk * 256 + 64 * pass;
        const __m512i h0 = _mm512_loadu_si512(h), h2 = _mm512_loadu_si512(h + 128);
        for (int i = 0; i < 4; i++) {
            const __m512i e = planes > 2 ? lower_nibbles(r + i, group, pass, at, here) : v[pass][i];
            const __m512i u0 = codes(planes, 0, k, v[pass][i], e), u2 = codes(planes, 1, k, v[pass][i], e);
            accumulate(&upper[i], u0, h0), accumulate_from(&lower[i], u0, l);
            accumulate(&upper[i], u2, h2), accumulate_from(&lower[i], u2, l + 128);
        }
    }
    for (int i = 0; i < 4; i++) upper[i] = _mm512_add_epi32(_mm512_slli_epi32(upper[i], 8), lower[i]);
    return totals(upper[0], upper[1], upper[2], upper[3]);
}

/* What one chunk, with the sums [part][row], adds to four rows' results for one token. [row][part] */
INLINE __m512 scaled(__m512i sums, const Row r[4], int planes, int group, __m512i apart, int32_t chunk, int64_t left,
                     const float *scale, const float *sum) {
    const __m512i by_row = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512 dot = _mm512_cvtepi32_ps(_mm512_permutexvar_epi32(by_row, sums));
    const int64_t at = (int64_t)chunk * (1024 / group);
    const __m512i pairs = _mm512_inserti64x4(_mm512_castsi256_si512(two_scales(r, group, at, left)),
                                             two_scales(r + 2, group, at, left), 1);
    __m512 step, offset;
    scales16(_mm512_permutexvar_epi16(apart, pairs), planes, &step, &offset);
    const __m512 xs = _mm512_broadcast_f32x4(_mm_loadu_ps(scale + chunk * 4));
    const __m512 xt = _mm512_broadcast_f32x4(_mm_loadu_ps(sum + chunk * 4));
    return plus(times(dot, times(step, xs)), times(offset, xt));
}

/* The rows being fetched: every visit takes two chunks of a row, then the next row's. */
typedef struct {
    const Row *row, *end;
    int64_t at, last, step; /* bytes of a two-bit plane: the next, beyond the span, back to its start */
} Fetch;

INLINE Fetch fetch_from(const Row *rows, int count, int32_t begin, int32_t end) { /* of these chunks */
    Fetch fetch = {rows, rows + count, 64 * (int64_t)begin, 64 * (int64_t)end, (end - begin + 1) / 2 * 128};
    return fetch;
}

INLINE void fetch_lines(const uint8_t *from, const int count) {
#pragma GCC unroll 4
    for (int i = 0; i < count; i++) _mm_prefetch((const char *)from + 64 * i, _MM_HINT_T1);
}

INLINE void fetch_ahead(Fetch *fetch, int planes, int group) {
    const Row *r = fetch->row;
    if (r == fetch->end) return;
    const int64_t at = fetch->at;
    fetch_lines(r->a + at, 2), fetch_lines(r->a1 + (at >> 1), 1);
    if (planes > 1) fetch_lines(r->b + (at >> 1), 1);
    if (planes > 2) fetch_lines(r->c + 2 * at, 4);
    if (!(at & 128)) fetch_lines(r->scale + (at >> (group == 64 ? 2 : 3)), 1); /* a line is of four chunks or eight */
    fetch->at += 128;
    if (fetch->at >= fetch->last) fetch->at -= fetch->step, fetch->row++;
}

/* The results of four rows for one token; `next` are the rows whose bytes will be wanted afterwards, or NULL. */
INLINE __m128 dot_rows(const Row r[4], const Row *next, int planes, int group, const Shape *s, const Prepared *x,
                       int64_t token) {
    const int8_t *high = x->high + token * s->parts * 64, *low = x->low + token * s->parts * 64;
    const float *scale = x->scale + token * s->parts, *sum = x->sum + token * s->parts;
    const Fixed k = fixed(group);
    const __m512i apart = halves_apart(group);
    Fetch fetch = fetch_from(next, next ? 4 : 0, 0, s->chunks);
    __m512 result = _mm512_setzero_ps();
    __m512i dots = _mm512_setzero_si512();
    const int32_t whole = s->bytes / 64;
    for (int32_t chunk = 0; chunk < whole; chunk++) { /* four rows are fetched while four are multiplied */
        fetch_ahead(&fetch, planes, group);
        if (chunk) /* here its long chain of operations holds up none */
            result = plus(result, scaled(dots, r, planes, group, apart, chunk - 1, 64, scale, sum));
        fetch_ahead(&fetch, planes, group);
        dots = dot_chunk(r, planes, group, &k, chunk, 64, high, low);
    }
    if (whole) result = plus(result, scaled(dots, r, planes, group, apart, whole - 1, 64, scale, sum));
    if (whole < s->chunks) {
        const int64_t left = s->bytes - whole * 64;
        dots = dot_chunk(r, planes, group, &k, whole, left, high, low);
        result = plus(result, scaled(dots, r, planes, group, apart, whole, left, scale, sum));
    }
    result = plus(result, _mm512_permute_ps(result, 0xB1)); /* parts 0 and 1, 2 and 3 */
    result = plus(result, _mm512_permute_ps(result, 0x4E));
    const __m512i first = _mm512_set_epi32(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 12, 8, 4, 0);
    return _mm512_castps512_ps128(_mm512_permutexvar_ps(first, result));
}

/* Rows [first, last) for all tokens; `skip` rows after them are expected to be another thread's. */
INLINE void few_rows(const Matrix *m, int planes, int group, const Prepared *x, const Shape *s, int64_t first,
                     int64_t last, int64_t skip, float *out, int64_t stride) {
    Row r[4], next[4];
    for (int64_t row = first; row < last; row += 4) {
        const int64_t ahead = row + AHEAD < last ? row + AHEAD : row + AHEAD + skip;
        for (int i = 0; i < 4; i++) {
            r[i] = row_at(m, s, row + i < last ? row + i : last - 1);
            next[i] = row_at(m, s, ahead + i < m->rows ? ahead + i : m->rows - 1);
        }
        const int count = last - row < 4 ? (int)(last - row) : 4;
        const __mmask8 some = (__mmask8)((1u << count) - 1);
        for (int32_t t = 0; t < x->tokens; t++) {
            const __m128 sum = dot_rows(r, t ? NULL : next, planes, group, s, x, t);
            float *to = out + t * stride + row;
            _mm_mask_storeu_ps(to, some, _mm_add_ps(_mm_maskz_loadu_ps(some, to), sum));
        }
    }
}

/* --- many tokens: tiles of bytes [sixteen quads][16 results][4 terms] ---------------------------------------------- */

#define TOKENS 8 /* tokens x 2 vectors of sums stay in registers */

/* sums[t] = S of 32 results (two tiles) and `count` tokens over 64 terms; x: high and low bytes, `stride` apart. */
INLINE void multiply_tile(const uint8_t *tile, const int8_t *high, const int8_t *low, int64_t stride, const int count,
                          __m512i sums[TOKENS][2]) {
    for (int t = 0; t < count; t++) sums[t][0] = sums[t][1] = _mm512_setzero_si512();
    for (int half = 0; half < 2; half++) {
        const int8_t *x = half ? low : high;
        for (int q = 0; q < 16; q++) {
            const __m512i w0 = _mm512_load_si512(tile + q * 64), w1 = _mm512_load_si512(tile + 1024 + q * 64);
            for (int t = 0; t < count; t++) {
                int32_t four;
                memcpy(&four, x + t * stride + q * 4, 4);
                const __m512i v = _mm512_set1_epi32(four);
                accumulate(&sums[t][0], w0, v), accumulate(&sums[t][1], w1, v);
            }
        }
        if (!half)
            for (int t = 0; t < count; t++)
                for (int i = 0; i < 2; i++) sums[t][i] = _mm512_slli_epi32(sums[t][i], 8);
    }
}

#define BY_COUNT(count, call)                                   \
    switch (count) {                                            \
        case 1: { enum { N = 1 }; call; break; }                \
        case 2: { enum { N = 2 }; call; break; }                \
        case 3: { enum { N = 3 }; call; break; }                \
        case 4: { enum { N = 4 }; call; break; }                \
        case 5: { enum { N = 5 }; call; break; }                \
        case 6: { enum { N = 6 }; call; break; }                \
        case 7: { enum { N = 7 }; call; break; }                \
        default: { enum { N = 8 }; call; break; }               \
    }

INLINE __m256i two_rows(const uint8_t *p0, const uint8_t *p1) {
    return _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)p0)),
                                   _mm_loadu_si128((const __m128i *)p1), 1);
}

/* 16 bytes of each of four rows, four rows apart, that begin at the same place of a plane. */
#define FOUR_ROWS(r, plane, at)                                                                         \
    _mm512_inserti64x4(_mm512_castsi256_si512(two_rows((r)[0].plane + (at), (r)[4].plane + (at))),       \
                       two_rows((r)[8].plane + (at), (r)[12].plane + (at)), 1)

INLINE __m256i four_halves(const uint8_t *p0, const uint8_t *p1, const uint8_t *p2, const uint8_t *p3) {
    int64_t v[4];
    memcpy(v, p0, 8), memcpy(v + 1, p1, 8), memcpy(v + 2, p2, 8), memcpy(v + 3, p3, 8);
    return _mm256_set_epi64x(v[3], v[2], v[1], v[0]);
}

#define FOUR_HALVES(r, plane, at) \
    four_halves((r)[0].plane + (at), (r)[4].plane + (at), (r)[8].plane + (at), (r)[12].plane + (at))

/* The lower two bits of h in part `p` of four rows: the 16 bytes beside those of the two-bit plane. */
INLINE __m512i lower_of_rows(const Row *r, int planes, int group, const Fixed *k, int32_t p) {
    if (group == 64) {
        const int64_t at = (int64_t)p * 8;
        const __m256i a1 = FOUR_HALVES(r, a1, at);
        return spread_bits(planes, k, a1, planes > 1 ? FOUR_HALVES(r, b, at) : a1);
    }
    const int64_t at = (int64_t)(p >> 1) * 16; /* the first half of a group has the even bits, the second the odd */
    __m512i a1 = FOUR_ROWS(r, a1, at), b = planes > 1 ? FOUR_ROWS(r, b, at) : _mm512_setzero_si512();
    if (p & 1) b = _mm512_srli_epi16(b, 1);
    else a1 = _mm512_add_epi8(a1, a1);
    return pick(_mm512_set1_epi8((char)0xAA), a1, b);
}

/* Part `p` of 32 rows as two tiles; row 4 r + i of a tile lies in lane r of vector i before the transposition. */
INLINE void tile_rows(const Row *rows, int planes, int group, int32_t p, uint8_t *tile) {
    const Fixed made = fixed(group), *k = &made; /* here, for the products want all registers */
    const int64_t at = (int64_t)p * 16, c = group == 64 ? (int64_t)p * 32 : (p >> 1) * 64 + (p & 1) * 16;
    for (int half = 0; half < 2; half++, rows += 16, tile += 1024) {
        __m512i v[2][4];
        for (int i = 0; i < 4; i++) {
            const __m512i a = FOUR_ROWS(rows + i, a, at), lower = lower_of_rows(rows + i, planes, group, k, p);
            for (int pass = 0; pass < 2; pass++) v[pass][i] = merge(pass, k, a, lower);
        }
        for (int pass = 0; pass < 2; pass++) {
            const int64_t c_at = c + (pass ? group / 4 : 0);
            __m512i low[4], high[4];
            for (int i = 0; i < 4; i++) {
                const __m512i e = planes > 2 ? FOUR_ROWS(rows + i, c, c_at) : v[pass][i];
                low[i] = codes(planes, 0, k, v[pass][i], e), high[i] = codes(planes, 1, k, v[pass][i], e);
            }
            transpose4(low), transpose4(high);
            for (int d = 0; d < 4; d++) {
                _mm512_store_si512(tile + (4 * pass + d) * 64, low[d]);
                _mm512_store_si512(tile + (4 * (pass + 2) + d) * 64, high[d]);
            }
        }
    }
}

#define STRIP 128 /* tokens of one item */

INLINE void add_tile(const uint8_t *tile, const Prepared *x, const Shape *s, int32_t p, int64_t token, const int count,
                     const __m512 step[2], const __m512 offset[2], float *sums) {
    __m512i dot[TOKENS][2];
    const int64_t width = (int64_t)s->parts * 64, at = token * width + (int64_t)p * 64;
    multiply_tile(tile, x->high + at, x->low + at, width, count, dot);
    for (int t = 0; t < count; t++) {
        const __m512 xs = _mm512_set1_ps(x->scale[(token + t) * s->parts + p]);
        const __m512 xt = _mm512_set1_ps(x->sum[(token + t) * s->parts + p]);
        for (int i = 0; i < 2; i++) {
            const __m512 scaled = times(_mm512_cvtepi32_ps(dot[t][i]), times(step[i], xs));
            float *to = sums + t * 32 + i * 16;
            _mm512_store_ps(to, plus(_mm512_load_ps(to), plus(scaled, times(offset[i], xt))));
        }
    }
}

INLINE void many_rows(const Matrix *m, int planes, int group, const Prepared *x, const Shape *s, int64_t first,
                      int64_t skip, int64_t token, int tokens, float *out, int64_t stride) {
    _Alignas(64) float sums[4][STRIP][32];
    _Alignas(64) uint8_t tile[2048];
    Row rows[32], ahead[32];
    const int64_t then = first + 32 + skip, more = m->rows - then;
    const int coming = more <= 0 ? 0 : more < 32 ? (int)more : 32;
    for (int i = 0; i < coming; i++) ahead[i] = row_at(m, s, then + i);
    Fetch fetch = fetch_from(ahead, coming, 0, s->chunks);
    const int count = m->rows - first < 32 ? (int)(m->rows - first) : 32;
    for (int i = 0; i < 32; i++) rows[i] = row_at(m, s, first + (i < count ? i : count - 1));
    for (int i = 0; i < 4; i++) memset(sums[i], 0, sizeof(float) * 32 * (size_t)tokens);
    for (int32_t p = 0; p < s->real_parts; p++) {
        _Alignas(64) uint32_t pairs[32];
        __m512 step[2], offset[2];
        for (int i = 0; i < 4; i++) fetch_ahead(&fetch, planes, group); /* 32 rows, 128 of 16 bytes a part */
        tile_rows(rows, planes, group, p, tile);
        for (int i = 0; i < 32; i++) memcpy(pairs + i, rows[i].scale + 4 * (int64_t)(p * 64 / group), 4);
        const __m512i apart = halves_apart(64);
        for (int i = 0; i < 2; i++) {
            const __m512i both = _mm512_permutexvar_epi16(apart, _mm512_load_si512(pairs + 16 * i));
            scales16(both, planes, &step[i], &offset[i]);
        }
        for (int t = 0; t < tokens; t += TOKENS) {
            const int n = tokens - t < TOKENS ? tokens - t : TOKENS;
            BY_COUNT(n, add_tile(tile, x, s, p, token + t, N, step, offset, sums[p & 3][t]))
        }
    }
    for (int t = 0; t < tokens; t++)
        for (int i = 0; i < count; i++)
            out[(token + t) * stride + first + i] += (sums[0][t][i] + sums[1][t][i]) + (sums[2][t][i] + sums[3][t][i]);
}

#endif
