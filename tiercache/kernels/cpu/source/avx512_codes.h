/* AVX-512: from planes to codes, for groups of 64 and 128, where 16 bytes of a 2-bit plane belong to one group.
 *
 * The planes of h are merged before they are taken apart: X holds the h of the codes j = 0 (low nibbles) and j = 2
 * (high), Y those of j = 1 and j = 3. The single bits take part as a second 2-bit plane, the lower two bits of h.
 */
#ifndef TIERCACHE_AVX512_CODES_H
#define TIERCACHE_AVX512_CODES_H

#include <immintrin.h>

#include "generic.h"

#define INLINE static inline __attribute__((always_inline))

typedef struct { /* a: the top two bits of h, a1 and b: its other two, bit by bit */
    const uint8_t *a, *a1, *b, *c, *scale;
} Row;

INLINE Row row_at(const Matrix *m, const Shape *s, int64_t i) {
    const uint8_t *a = row_of(m, 0, i);
    Row r = {a, a + s->bytes, m->planes > 1 ? row_of(m, 1, i) : NULL, m->planes > 2 ? row_of(m, 2, i) : NULL,
             row_of(m, 3, i)};
    return r;
}

/* Constants that stay in registers: a compiler that sees their values makes them anew wherever it lacks registers, and
 * turns a product by 12 into shifts and sums. */
typedef struct {
    __m512i upper, nibble, cell, high_cell, order;
    __m256i odd;
} Fixed;

INLINE Fixed fixed(int group) {
    Fixed k = {_mm512_set1_epi8((char)0xCC), _mm512_set1_epi8(15), _mm512_set1_epi16(CELL),
               _mm512_set1_epi16((short)(CELL << 12)),
               group == 64 ? _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0) : _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0),
               _mm256_set1_epi8((char)0xAA)};
    __asm__("" : "+v"(k.upper), "+v"(k.nibble), "+v"(k.cell), "+v"(k.high_cell), "+v"(k.order), "+v"(k.odd));
    return k;
}

INLINE __m512i pick(__m512i where, __m512i one, __m512i other) { /* bits of `one` where `where` has ones */
    return _mm512_ternarylogic_epi32(one, where, other, 0xE2);
}

/* Which bytes of a chunk are there: of a two-bit plane, of single bits, and of both halves of the four-bit plane. */
typedef struct {
    __mmask64 two, low, high;
    __mmask32 one;
} Present;

INLINE Present present(int64_t left) {
    Present here = {~0ull, ~0ull, ~0ull, ~0u};
    if (left < 64) {
        here.two = (1ull << left) - 1;
        here.one = (1u << (left / 2)) - 1;
        here.low = left >= 32 ? ~0ull : (1ull << (2 * left)) - 1;
        here.high = left > 32 ? (1ull << (2 * left - 64)) - 1 : 0;
    }
    return here;
}

/* Bytes that may end within. Whole ones are read again where registers are scarce, masked ones are kept on the stack. */
INLINE __m512i load64(__mmask64 some, const uint8_t *from) {
    if (__builtin_constant_p(some) && some == ~0ull) return _mm512_loadu_si512(from);
    return _mm512_maskz_loadu_epi8(some, from);
}

INLINE __m256i load32(__mmask32 some, const uint8_t *from) {
    if (__builtin_constant_p(some) && some == ~0u) return _mm256_loadu_si256((const __m256i *)from);
    return _mm256_maskz_loadu_epi8(some, from);
}

/* The lower two bits of h as 64 bytes of a two-bit plane, from 32 bytes of single bits of plane 0 and of plane 1. */
INLINE __m512i spread_bits(int planes, const Fixed *k, __m256i a1, __m256i b) {
    const __m256i raised = _mm256_add_epi8(a1, a1); /* plane 0's belong to odd places, plane 1's to even ones */
    __m256i even = _mm256_and_si256(raised, k->odd), odd = _mm256_and_si256(a1, k->odd);
    if (planes > 1) {
        even = _mm256_ternarylogic_epi32(raised, k->odd, b, 0xE2);
        odd = _mm256_ternarylogic_epi32(a1, k->odd, _mm256_srli_epi16(b, 1), 0xE2);
    }
    return _mm512_permutex2var_epi64(_mm512_castsi256_si512(even), k->order, _mm512_castsi256_si512(odd));
}

/* The same, beside the 64 bytes that begin at byte `at` of the two-bit plane. */
INLINE __m512i lower_two(const Row *r, int planes, const Fixed *k, int64_t at, Present here) {
    const __m256i a1 = load32(here.one, r->a1 + at / 2);
    return spread_bits(planes, k, a1, planes > 1 ? load32(here.one, r->b + at / 2) : a1);
}

/* Two nibbles a byte: h of j = 0, 2 (pass 0) or j = 1, 3 (pass 1), from their upper and lower two bits. */
INLINE __m512i merge(int pass, const Fixed *k, __m512i a, __m512i lower) {
    return pass ? pick(k->upper, a, _mm512_srli_epi16(lower, 2)) : pick(k->upper, _mm512_slli_epi16(a, 2), lower);
}

/* Codes of the low (high = 0) or high nibbles; `e` holds the four-bit plane's nibbles of the same codes. A 16-bit
 * product multiplies both its bytes by 12, for neither carries into the other; its upper half, of high nibbles, by
 * 12 / 16. */
INLINE __m512i codes(int planes, int high, const Fixed *k, __m512i x, __m512i e) {
    const __m512i own = planes > 2 ? e : x, c = _mm512_and_si512(high ? _mm512_srli_epi16(own, 4) : own, k->nibble);
    if (planes < 3) return c;
    return _mm512_add_epi8(c, high ? _mm512_mulhi_epu16(_mm512_andnot_si512(k->nibble, x), k->high_cell)
                                   : _mm512_mullo_epi16(_mm512_and_si512(k->nibble, x), k->cell));
}

/* Of the 128 bytes of the four-bit plane beside 64 bytes of a two-bit plane: those of pass 0 or 1, lane beside lane. */
INLINE __m512i nibbles(int group, int pass, __m512i c0, __m512i c1) {
    if (group == 64) return pass ? _mm512_shuffle_i32x4(c0, c1, 0xDD) : _mm512_shuffle_i32x4(c0, c1, 0x88);
    return pass ? _mm512_shuffle_i32x4(c0, c1, 0xEE) : _mm512_shuffle_i32x4(c0, c1, 0x44);
}

INLINE __m512i lower_nibbles(const Row *r, int group, int pass, int64_t at, Present here) {
    return nibbles(group, pass, load64(here.low, r->c + 2 * at), load64(here.high, r->c + 2 * at + 64));
}

#endif
