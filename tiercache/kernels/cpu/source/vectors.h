/* Sixteen floats at a time in the compiler's own vectors: the same sums in the same order on every processor. */
#ifndef TIERCACHE_VECTORS_H
#define TIERCACHE_VECTORS_H

#include "planes.h"

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

static inline Floats load16(const float *from) {
    Floats v;
    memcpy(&v, from, sizeof v);
    return v;
}

static inline void store16(float *to, Floats v) { memcpy(to, &v, sizeof v); }

static inline Floats all16(float x) { return (Floats){x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }

/* 16 numbers of a kind (see `Input`). */
static inline __attribute__((always_inline)) Floats whole16(const void *from, const int32_t kind, int64_t at) {
    if (kind == 0) return load16((const float *)from + at);
    Halves bits;
    memcpy(&bits, (const uint16_t *)from + at, sizeof bits);
    if (kind == 1) return (Floats)(__builtin_convertvector(bits, Ints) << 16);
#if defined(__AVX512F__)
    __m256i raw;
    memcpy(&raw, &bits, sizeof raw);
    return (Floats)_mm512_cvtph_ps(raw); /* exact, as is the way below */
#else
    Floats v;
    for (int i = 0; i < 16; i++) v[i] = half_to_float(bits[i]);
    return v;
#endif
}

/* The same where only `left` of them are there, if fewer; zeros behind. */
static inline Floats read16(const void *from, int32_t kind, int64_t at, int64_t left) {
    if (left >= 16) return whole16(from, kind, at);
    _Alignas(64) uint8_t rest[64] = {0};
    const size_t size = kind ? 2 : 4;
    memcpy(rest, (const uint8_t *)from + (size_t)at * size, (size_t)left * size);
    return whole16(rest, kind, 0);
}

static inline uint16_t to_bf16(float x) { /* to the nearest, ties to even */
    union { float f; uint32_t u; } v = {x};
    if (x != x) return 0x7fc0;
    return (uint16_t)((v.u + 0x7fff + (v.u >> 16 & 1)) >> 16);
}

static inline uint16_t to_half(float x) { /* the same */
    union { float f; uint32_t u; } v = {x}, scaled;
    const uint16_t sign = (uint16_t)(v.u >> 16 & 0x8000);
    if (x != x) return sign | 0x7e00;
    v.u &= 0x7fffffff;
    if (v.f >= 65520.0f) return sign | 0x7c00;
    if (v.f < 6.103515625e-05f) { /* subnormal: adding 0.5 leaves units of 2^-24 in the last places */
        scaled.f = v.f + 0.5f;
        return (uint16_t)(sign | (scaled.u - 0x3f000000));
    }
    v.u += 0xfff + (v.u >> 13 & 1);
    return (uint16_t)(sign | ((v.u >> 13) - (112 << 10)));
}

/* One number rounded to a kind. */
static inline void write_number(void *to, int32_t kind, int64_t at, float x) {
    if (kind == 0)
        ((float *)to)[at] = x;
    else
        ((uint16_t *)to)[at] = kind == 1 ? to_bf16(x) : to_half(x);
}

static inline void write_numbers(void *to, int32_t kind, int64_t at, const float *from, int64_t count) {
    if (kind == 0)
        memcpy((float *)to + at, from, 4 * (size_t)count);
    else if (kind == 1)
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[at + i] = to_bf16(from[i]);
    else
        for (int64_t i = 0; i < count; i++) ((uint16_t *)to)[at + i] = to_half(from[i]);
}

/* Lanes of a (0 to 15) and b (16 to 31). */
#ifdef __clang__
#define SHUFFLED2(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLED2(a, b, ...) __builtin_shuffle(a, b, (Ints){__VA_ARGS__})
#endif
#define SHUFFLED(v, ...) SHUFFLED2(v, v, __VA_ARGS__)

#define EVEN(a, b) SHUFFLED2(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30)
#define ODD(a, b) SHUFFLED2(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)

/* Of each lane a where `chosen` is all ones, b where it is 0. */
static inline Floats either(Ints chosen, Floats a, Floats b) {
    return (Floats)((chosen & (Ints)a) | (~chosen & (Ints)b));
}

/* Sum of 16 numbers: those 8 apart first, then 4, 2, 1. */
static inline float sum_of(Floats v) {
    v += SHUFFLED(v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    v += SHUFFLED(v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    v += SHUFFLED(v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    v += SHUFFLED(v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return v[0];
}

/* `sum_of` of 16 vectors, the same bits: lane i is vector i's. */
static inline Floats sums_of(Floats v[16]) {
    for (int i = 0; i < 8; i++) /* of vectors i and i + 8: halves of 8 */
        v[i] = SHUFFLED2(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLED2(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    for (int i = 0; i < 4; i++) /* i, i + 4, i + 8, i + 12: quarters of 4 */
        v[i] = SHUFFLED2(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLED2(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int i = 0; i < 2; i++)
        v[i] = SHUFFLED2(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLED2(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    return SHUFFLED2(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
           SHUFFLED2(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

/* 64 numbers times H / 8; the order of the sums is that of tiercache/quant/hadamard.py. */
static inline void transform_block(float *numbers) {
    Floats v[4];
    for (int i = 0; i < 4; i++) {
        Floats x = load16(numbers + 16 * i);
        const Floats one = SHUFFLED(x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
        const Ints odd = {0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1, 0, -1};
        x = either(odd, one - x, x + one);
        const Floats two = SHUFFLED(x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
        const Ints pairs = {0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1, 0, 0, -1, -1};
        x = either(pairs, two - x, x + two);
        const Floats four = SHUFFLED(x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
        const Ints fours = {0, 0, 0, 0, -1, -1, -1, -1, 0, 0, 0, 0, -1, -1, -1, -1};
        x = either(fours, four - x, x + four);
        const Floats eight = SHUFFLED(x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
        const Ints eights = {0, 0, 0, 0, 0, 0, 0, 0, -1, -1, -1, -1, -1, -1, -1, -1};
        v[i] = either(eights, eight - x, x + eight);
    }
    const Floats a = v[0] + v[1], b = v[0] - v[1], c = v[2] + v[3], d = v[2] - v[3], part = all16(0.125f);
    store16(numbers, (a + c) * part), store16(numbers + 16, (b + d) * part);
    store16(numbers + 32, (a - c) * part), store16(numbers + 48, (b - d) * part);
}

/* e^x to within two units in the last place (Cephes, expf); the same bits everywhere. NaN stays NaN. */
static inline Floats exp16(Floats x) {
    const Floats round = all16(12582912.0f); /* 1.5 * 2^23: adding it leaves whole numbers */
    x = either(x > all16(88.0f), all16(88.0f), x);
    x = either(x < all16(-87.0f), all16(-87.0f), x);
    const Floats shifted = x * all16(1.44269504088896341f) + round, n = shifted - round;
    const Floats r = x - n * all16(0.693359375f) - n * all16(-2.12194440e-4f);
    Floats p = all16(1.9875691500e-4f) * r + all16(1.3981999507e-3f);
    p = p * r + all16(8.3334519073e-3f);
    p = p * r + all16(4.1665795894e-2f);
    p = p * r + all16(1.6666665459e-1f);
    p = p * r + all16(5.0000001201e-1f);
    p = p * (r * r) + r + all16(1.0f);
    const Ints power = ((Ints)shifted - (Ints)round + 127) << 23;
    return p * (Floats)power;
}

#endif
