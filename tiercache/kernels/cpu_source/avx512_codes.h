/* AVX-512: from planes to codes, for groups of 64 and 128, where 16 bytes of a 2-bit plane belong to one group.
 *
 * The planes of h are merged before they are taken apart: X holds the h of the codes j = 0 (low nibbles) and j = 2 (high),
 * Y those of j = 1 and j = 3. The single bits take part as a second 2-bit plane, the lower two bits of h.
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

INLINE __m512i pick(uint8_t where, __m512i one, __m512i other) { /* bits of `one` where `where` has ones */
    return _mm512_ternarylogic_epi32(one, _mm512_set1_epi8((char)where), other, 0xE2);
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

/* Where single bits have an even place: these of plane 0 at odd places, and of plane 1, at even ones. */
INLINE __m256i even_bits(int planes, __m256i a1, __m256i b) {
    const __m256i odd = _mm256_set1_epi8((char)0xAA), raised = _mm256_add_epi8(a1, a1);
    return planes > 1 ? _mm256_ternarylogic_epi32(raised, odd, b, 0xE2) : _mm256_and_si256(raised, odd);
}

INLINE __m256i odd_bits(int planes, __m256i a1, __m256i b) { /* the same of bits that have an odd place */
    const __m256i odd = _mm256_set1_epi8((char)0xAA);
    return planes > 1 ? _mm256_ternarylogic_epi32(a1, odd, _mm256_srli_epi16(b, 1), 0xE2) : _mm256_and_si256(a1, odd);
}

/* The lower two bits of h as 64 bytes of a two-bit plane, from 32 bytes of single bits of either plane. */
INLINE __m512i spread_bits(int planes, int group, __m256i a1, __m256i b) {
    const __m512i order = group == 64 ? _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0) : _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
    return _mm512_permutex2var_epi64(_mm512_castsi256_si512(even_bits(planes, a1, b)), order,
                                     _mm512_castsi256_si512(odd_bits(planes, a1, b)));
}

/* The same, beside the 64 bytes that begin at byte `at` of the two-bit plane. */
INLINE __m512i lower_two(const Row *r, int planes, int group, int64_t at, Present here) {
    const __m256i a1 = _mm256_maskz_loadu_epi8(here.one, r->a1 + at / 2);
    return spread_bits(planes, group, a1, planes > 1 ? _mm256_maskz_loadu_epi8(here.one, r->b + at / 2) : a1);
}

/* Two nibbles a byte: h of j = 0, 2 (pass 0) or j = 1, 3 (pass 1), from their upper and lower two bits. */
INLINE __m512i merge(int pass, __m512i a, __m512i lower) {
    return pass ? pick(0xCC, a, _mm512_srli_epi16(lower, 2)) : pick(0xCC, _mm512_slli_epi16(a, 2), lower);
}

/* Codes of the low (high = 0) or high nibbles; `e` holds the four-bit plane's nibbles of the same codes. A 16-bit product
 * multiplies both its bytes by 12, for neither carries into the other; of high nibbles its upper half, by 12 / 16. */
INLINE __m512i codes(int planes, int high, __m512i x, __m512i e) {
    const __m512i nibble = _mm512_set1_epi8(15);
    const __m512i own = _mm512_and_si512(high ? _mm512_srli_epi16(planes > 2 ? e : x, 4) : planes > 2 ? e : x, nibble);
    if (planes < 3) return own;
    const __m512i upper = high ? _mm512_mulhi_epu16(_mm512_andnot_si512(nibble, x), _mm512_set1_epi16((short)(CELL << 12)))
                               : _mm512_mullo_epi16(_mm512_and_si512(nibble, x), _mm512_set1_epi16(CELL));
    return _mm512_add_epi8(upper, own);
}

/* Of the 128 bytes of the four-bit plane beside 64 bytes of a two-bit plane: those of pass 0 or 1, lane beside lane. */
INLINE __m512i nibbles(int group, int pass, __m512i c0, __m512i c1) {
    if (group == 64) return pass ? _mm512_shuffle_i32x4(c0, c1, 0xDD) : _mm512_shuffle_i32x4(c0, c1, 0x88);
    return pass ? _mm512_shuffle_i32x4(c0, c1, 0xEE) : _mm512_shuffle_i32x4(c0, c1, 0x44);
}

#endif
