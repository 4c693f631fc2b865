/* AVX-512 with VNNI: one byte product instruction for 64 codes, activations as two signed bytes.
 *
 * A vector of 64 bytes of a 2-bit plane holds four parts, and the 16 sums of a byte product hold four numbers of each.
 */
#ifndef TIERCACHE_AVX512_H
#define TIERCACHE_AVX512_H

#include "avx512_codes.h"

#define AHEAD 4 /* rows: fetched while as many are multiplied; further ahead and nearer were slower */

/* sum += products of unsigned codes and signed bytes; gcc copies the sums around its own intrinsic, half of the loop. */
INLINE void accumulate(__m512i *sum, __m512i code, __m512i x) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(*sum) : "v"(code), "v"(x));
}

INLINE __m512 halves_low(__m512i pairs) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs)); }
INLINE __m512 halves_high(__m512i pairs) { return halves_low(_mm512_srli_epi32(pairs, 16)); }
INLINE __m512 times(__m512 a, __m512 b) { return _mm512_mul_ps(a, b); }
INLINE __m512 plus(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }

/* s and m of 16 (lo, step) pairs. */
INLINE void scales16(__m512i pairs, int planes, __m512 *s, __m512 *m) {
    const __m512 step = halves_high(pairs);
    *s = times(step, _mm512_set1_ps(unit_of(planes)));
    *m = plus(halves_low(pairs), times(step, _mm512_set1_ps(middle_of(planes))));
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

INLINE __m512i four_scales(const Row r[4], int64_t at, __mmask8 some) {
    __m512i v = _mm512_broadcast_i32x4(_mm_maskz_loadu_epi32(some, r[0].scale + at));
    v = _mm512_mask_broadcast_i32x4(v, 0x00F0, _mm_maskz_loadu_epi32(some, r[1].scale + at));
    v = _mm512_mask_broadcast_i32x4(v, 0x0F00, _mm_maskz_loadu_epi32(some, r[2].scale + at));
    return _mm512_mask_broadcast_i32x4(v, 0xF000, _mm_maskz_loadu_epi32(some, r[3].scale + at));
}

/* What one chunk adds to four rows' results for one token. [lane][row] */
INLINE __m512 dot_chunk(const Row r[4], int planes, int group, int32_t chunk, int64_t left, const int8_t *high,
                        const int8_t *low, const float *scale, const float *sum) {
    const __m512i spread = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    const __m512i order = group == 64 ? _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0)
                                      : _mm512_set_epi32(13, 9, 5, 1, 13, 9, 5, 1, 12, 8, 4, 0, 12, 8, 4, 0);
    const Present here = present(left);
    const int64_t at = (int64_t)chunk * 64;
    __m512i a[4], b[4], c0[4], c1[4], upper[4], lower[4];
    for (int i = 0; i < 4; i++) {
        a[i] = _mm512_maskz_loadu_epi8(here.two, r[i].a + at);
        b[i] = lower_two(r + i, planes, group, at, here);
        c0[i] = planes > 2 ? _mm512_maskz_loadu_epi8(here.low, r[i].c + 2 * at) : a[i];
        c1[i] = planes > 2 ? _mm512_maskz_loadu_epi8(here.high, r[i].c + 2 * at + 64) : a[i];
        upper[i] = lower[i] = _mm512_setzero_si512();
    }
    for (int pass = 0; pass < 2; pass++) {
        const int8_t *h = high + chunk * 256 + pass * 64, *l = low + chunk * 256 + pass * 64;
        const __m512i h0 = _mm512_loadu_si512(h), l0 = _mm512_loadu_si512(l);
        const __m512i h2 = _mm512_loadu_si512(h + 128), l2 = _mm512_loadu_si512(l + 128);
        for (int i = 0; i < 4; i++) {
            const __m512i v = merge(pass, a[i], b[i]);
            const __m512i e = planes > 2 ? nibbles(group, pass, c0[i], c1[i]) : v;
            const __m512i u0 = codes(planes, 0, v, e), u2 = codes(planes, 1, v, e);
            accumulate(&upper[i], u0, h0), accumulate(&lower[i], u0, l0);
            accumulate(&upper[i], u2, h2), accumulate(&lower[i], u2, l2);
        }
    }
    for (int i = 0; i < 4; i++) upper[i] = _mm512_add_epi32(_mm512_slli_epi32(upper[i], 8), lower[i]);
    const __m512 dot = _mm512_cvtepi32_ps(totals(upper[0], upper[1], upper[2], upper[3]));
    const int whole = 256 / group, count = left >= 64 ? whole : (int)left * 4 / group;
    __m512 step, offset;
    const __m512i pairs = four_scales(r, (int64_t)chunk * 4 * whole, (__mmask8)((1u << count) - 1));
    scales16(_mm512_permutexvar_epi32(order, pairs), planes, &step, &offset);
    const __m512 xs = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(_mm_loadu_ps(scale + chunk * 4)));
    const __m512 xt = _mm512_permutexvar_ps(spread, _mm512_castps128_ps512(_mm_loadu_ps(sum + chunk * 4)));
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

INLINE void fetch_ahead(Fetch *fetch, int planes, int group) {
    const Row *r = fetch->row;
    if (r == fetch->end) return;
    const int64_t at = fetch->at;
    for (int64_t i = at; i < at + 128; i += 64) _mm_prefetch((const char *)r->a + i, _MM_HINT_T1);
    _mm_prefetch((const char *)r->a1 + at / 2, _MM_HINT_T1);
    if (planes > 1) _mm_prefetch((const char *)r->b + at / 2, _MM_HINT_T1);
    if (planes > 2)
        for (int64_t i = 2 * at; i < 2 * at + 256; i += 64) _mm_prefetch((const char *)r->c + i, _MM_HINT_T1);
    _mm_prefetch((const char *)r->scale + at * 16 / group, _MM_HINT_T1);
    fetch->at += 128;
    if (fetch->at >= fetch->last) fetch->at -= fetch->step, fetch->row++;
}

/* The results of four rows for one token; `next` are the rows whose bytes will be wanted afterwards, or NULL. */
INLINE __m128 dot_rows(const Row r[4], const Row *next, int planes, int group, const Shape *s, const Prepared *x,
                       int64_t token) {
    const int8_t *high = x->high + token * s->parts * 64, *low = x->low + token * s->parts * 64;
    const float *scale = x->scale + token * s->parts, *sum = x->sum + token * s->parts;
    __m512 result = _mm512_setzero_ps();
    const int32_t whole = s->bytes / 64;
    Fetch fetch = fetch_from(next, next ? 4 : 0, 0, s->chunks);
    for (int32_t chunk = 0; chunk < whole; chunk++) {
        fetch_ahead(&fetch, planes, group), fetch_ahead(&fetch, planes, group); /* four rows while four are multiplied */
        result = plus(result, dot_chunk(r, planes, group, chunk, 64, high, low, scale, sum));
    }
    if (whole < s->chunks)
        result = plus(result, dot_chunk(r, planes, group, whole, s->bytes - whole * 64, high, low, scale, sum));
    return _mm_add_ps(_mm_add_ps(_mm512_castps512_ps128(result), _mm512_extractf32x4_ps(result, 1)),
                      _mm_add_ps(_mm512_extractf32x4_ps(result, 2), _mm512_extractf32x4_ps(result, 3)));
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

INLINE __m512i four_rows(const uint8_t *p0, const uint8_t *p1, const uint8_t *p2, const uint8_t *p3) {
    __m512i v = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i *)p0));
    v = _mm512_mask_broadcast_i32x4(v, 0x00F0, _mm_loadu_si128((const __m128i *)p1));
    v = _mm512_mask_broadcast_i32x4(v, 0x0F00, _mm_loadu_si128((const __m128i *)p2));
    return _mm512_mask_broadcast_i32x4(v, 0xF000, _mm_loadu_si128((const __m128i *)p3));
}

INLINE __m256i four_halves(const uint8_t *p0, const uint8_t *p1, const uint8_t *p2, const uint8_t *p3) { /* 8 bytes each */
    int64_t v[4];
    memcpy(v, p0, 8), memcpy(v + 1, p1, 8), memcpy(v + 2, p2, 8), memcpy(v + 3, p3, 8);
    return _mm256_set_epi64x(v[3], v[2], v[1], v[0]);
}

/* The lower two bits of h in part `p` of four rows, four rows apart: the 16 bytes beside those of the two-bit plane. */
INLINE __m512i lower_of_rows(const Row *r, int planes, int group, int32_t p) {
    if (group == 64) {
        const int64_t at = (int64_t)p * 8;
        const __m256i a1 = four_halves(r[0].a1 + at, r[4].a1 + at, r[8].a1 + at, r[12].a1 + at);
        return spread_bits(planes, group, a1,
                           planes > 1 ? four_halves(r[0].b + at, r[4].b + at, r[8].b + at, r[12].b + at) : a1);
    }
    const int64_t at = (int64_t)(p >> 1) * 16; /* the first half of a group has the even bits, the second the odd */
    __m512i a1 = four_rows(r[0].a1 + at, r[4].a1 + at, r[8].a1 + at, r[12].a1 + at), b = _mm512_setzero_si512();
    if (planes > 1) b = four_rows(r[0].b + at, r[4].b + at, r[8].b + at, r[12].b + at);
    if (p & 1) b = _mm512_srli_epi16(b, 1);
    else a1 = _mm512_add_epi8(a1, a1);
    return pick(0xAA, a1, b);
}

/* Part `p` of 32 rows as two tiles; row 4 r + i of a tile lies in lane r of vector i before the transposition. */
INLINE void tile_rows(const Row *rows, int planes, int group, int32_t p, uint8_t *tile) {
    const int64_t at = (int64_t)p * 16, c = group == 64 ? (int64_t)p * 32 : (p >> 1) * 64 + (p & 1) * 16;
    for (int half = 0; half < 2; half++, rows += 16, tile += 1024)
        for (int pass = 0; pass < 2; pass++) {
            const int64_t c_at = c + (pass ? group / 4 : 0);
            __m512i low[4], high[4];
            for (int i = 0; i < 4; i++) {
                const Row *r = rows + i;
                const __m512i a = four_rows(r[0].a + at, r[4].a + at, r[8].a + at, r[12].a + at);
                const __m512i v = merge(pass, a, lower_of_rows(r, planes, group, p));
                const __m512i e =
                    planes > 2 ? four_rows(r[0].c + c_at, r[4].c + c_at, r[8].c + c_at, r[12].c + c_at) : v;
                low[i] = codes(planes, 0, v, e), high[i] = codes(planes, 1, v, e);
            }
            transpose4(low), transpose4(high);
            for (int d = 0; d < 4; d++) {
                _mm512_store_si512(tile + (4 * pass + d) * 64, low[d]);
                _mm512_store_si512(tile + (4 * (pass + 2) + d) * 64, high[d]);
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
    for (int k = 0; k < 4; k++) memset(sums[k], 0, sizeof(float) * 32 * (size_t)tokens);
    for (int32_t p = 0; p < s->real_parts; p++) {
        _Alignas(64) uint32_t pairs[32];
        __m512 step[2], offset[2];
        for (int i = 0; i < 4; i++) fetch_ahead(&fetch, planes, group); /* 32 rows, 128 of 16 bytes a part */
        tile_rows(rows, planes, group, p, tile);
        for (int i = 0; i < 32; i++) memcpy(pairs + i, rows[i].scale + 4 * (int64_t)(p * 64 / group), 4);
        for (int i = 0; i < 2; i++) scales16(_mm512_load_si512(pairs + 16 * i), planes, &step[i], &offset[i]);
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
