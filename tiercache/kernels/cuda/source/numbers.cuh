/* Numbers of the three dtypes, and what layer.cu and attention.cu make of fp32: transformed, and packed for rows.cu. */
#ifndef TIERCACHE_NUMBERS_CUH
#define TIERCACHE_NUMBERS_CUH

#include "planes.cuh"

enum { FLOAT, HALF, BFLOAT }; /* as backend.py numbers dtypes */

static __device__ __forceinline__ float minus_infinity() { return __int_as_float((int)0xff800000u); }

static __device__ __forceinline__ half_bits float_to_half(float v) {
#ifdef __CUDACC_RTC__
    half_bits bits; /* a conversion, not fp16 arithmetic: every card has it */
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(v));
    return bits;
#else
    return shim_float_to_half(v);
#endif
}

static __device__ __forceinline__ float bfloat_to_float(unsigned bits) { return __int_as_float((int)(bits << 16)); }

static __device__ __forceinline__ half_bits float_to_bfloat(float v) {
    const unsigned bits = (unsigned)__float_as_int(v);
    if (v != v) return 0x7fc0;
    return (half_bits)((bits + 0x7fffu + (bits >> 16 & 1)) >> 16); /* to the nearest, ties to even */
}

/* A 16-bit number as a float. */
static __device__ __forceinline__ float widened(int kind, half_bits bits) {
    return kind == HALF ? half_to_float(bits) : bfloat_to_float(bits);
}

static __device__ __forceinline__ float number(const byte *x, long long at, int kind) {
    return kind == FLOAT ? ((const float *)x)[at] : widened(kind, ((const half_bits *)x)[at]);
}

static __device__ __forceinline__ void put(byte *x, long long at, int kind, float v) {
    if (kind == FLOAT) {
        ((float *)x)[at] = v;
    } else {
        ((half_bits *)x)[at] = kind == HALF ? float_to_half(v) : float_to_bfloat(v);
    }
}

/* Whether all rows begin where loads of four numbers may: for all threads alike. */
static __device__ __forceinline__ bool wide(const byte *x, long long pitch, int columns, int kind) {
    const int bytes = kind == FLOAT ? 4 : 2;
    return columns % 4 == 0 && (((unsigned long long)x | pitch * bytes) & (4 * bytes - 1)) == 0;
}

/* Four numbers from `column` of a row of so many columns; zeros behind its end. */
static __device__ __forceinline__ float4 four(const byte *x, long long row, int column, int columns, int kind,
                                              bool wide) {
    const long long at = row + column;
    if (wide) {
        if (column >= columns) return make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (kind == FLOAT) return *(const float4 *)((const float *)x + at);
        const uint2 bits = *(const uint2 *)((const half_bits *)x + at);
        return make_float4(widened(kind, (half_bits)(bits.x & 0xffffu)), widened(kind, (half_bits)(bits.x >> 16)),
                           widened(kind, (half_bits)(bits.y & 0xffffu)), widened(kind, (half_bits)(bits.y >> 16)));
    }
    return make_float4(column < columns ? number(x, at, kind) : 0.0f,
                       column + 1 < columns ? number(x, at + 1, kind) : 0.0f,
                       column + 2 < columns ? number(x, at + 2, kind) : 0.0f,
                       column + 3 < columns ? number(x, at + 3, kind) : 0.0f);
}

static __device__ __forceinline__ float4 four_of(const float *row, int column, int columns) {
    return four((const byte *)row, 0, column, columns, FLOAT, wide((const byte *)row, 0, columns, FLOAT));
}

/* Products that are not fused with a sum behind them. */
static __device__ __forceinline__ float4 times(float4 v, float4 w) {
    return make_float4(__fmul_rn(v.x, w.x), __fmul_rn(v.y, w.y), __fmul_rn(v.z, w.z), __fmul_rn(v.w, w.w));
}

static __device__ __forceinline__ float with_far(float mine, int far, int lane) {
    const float other = __shfl_xor_sync(0xffffffffu, mine, far);
    return lane & far ? other - mine : mine + other;
}

/* The Hadamard transform of quant/hadamard.py in its order of sums: lanes hold four columns each, 16 lanes a block. A
 * block that is not `whole` stays as it is. All lanes of the warp call it. */
static __device__ __forceinline__ float4 transformed(float4 v, bool whole) {
    const int lane = threadIdx.x & 31;
    const float a = v.x + v.y, b = v.x - v.y, c = v.z + v.w, d = v.z - v.w;
    float4 w = make_float4(a + c, b + d, a - c, b - d);
    for (int far = 1; far < 16; far *= 2) {
        w.x = with_far(w.x, far, lane), w.y = with_far(w.y, far, lane);
        w.z = with_far(w.z, far, lane), w.w = with_far(w.w, far, lane);
    }
    if (!whole) return v;
    return make_float4(0.125f * w.x, 0.125f * w.y, 0.125f * w.z, 0.125f * w.w);
}

struct Packed { /* where inputs of products go */
    void *out;   /* as `prepare` or `digits` leave them, or plain [tokens, columns] */
    void *sums;  /* [blocks, chunks, T, groups a chunk], or the factors of `digits` */
    int group;   /* 0: plain */
    int digits;  /* whether they are for dots.cu and mma.cu */
    int padded_tokens, chunks, tokens, columns;
};

static __device__ __forceinline__ int larger_bits(float a, float b) {
    return max(__float_as_int(a) & 0x7fffffff, __float_as_int(b) & 0x7fffffff);
}

/* Where the digits of a word lie, the first byte of those of quarter 0; 16 bytes for four quarters. dots.cu wants
 * [token, 2048 columns, piece, word of a lane, lane] for one token or two, mma.cu for more [8 tokens, 64 columns, piece,
 * token, word]. */
static __device__ __forceinline__ long long digit_place(const Packed &p, int token, int word, int piece) {
    if (p.padded_tokens <= 2) {
        const int chunks = (p.columns + 2047) / 2048;
        return (((long long)token * chunks + word / 128) * 12 + piece * 4 + word % 4) * 512 + word / 4 % 32 * 16;
    }
    const int steps = (p.columns + 255) / 256;
    return (((long long)(token / 8) * steps * 4 + word / 4) * 3 + piece) * 512 + token % 8 * 64 + word % 4 * 16;
}

/* Four columns as whole numbers below 2^22, in steps of the power of two that the group's largest allows, and those as
 * three bytes. A group with NaN or infinity has a step of NaN. */
static __device__ __forceinline__ void store_digits(const Packed &p, int token, int column, float4 v) {
    const int threads = p.group >> 2, groups = (p.columns + p.group - 1) / p.group, group = column / p.group;
    int largest = max(larger_bits(v.x, v.y), larger_bits(v.z, v.w));
    for (int far = 1; far < threads; far *= 2)
        largest = max(largest, __float_as_int(__shfl_xor_sync(0xffffffffu, __int_as_float(largest), far)));
    const int exponent = max(largest >> 23, 22), finite = exponent != 255;
    const float inverse = __int_as_float((275 - exponent) << 23); /* 2^21 over the power of two below the largest */
    const float x[4] = {v.x, v.y, v.z, v.w};
    int sum = 0;
    unsigned bytes[3] = {0, 0, 0};
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        const int whole = finite ? __float2int_rn(x[k] * inverse) : 0;
        const int lowest = ((whole + 128) & 255) - 128, rest = (whole - lowest) / 256;
        const int middle = ((rest + 128) & 255) - 128, high = (rest - middle) / 256;
        sum += whole;
        bytes[0] |= (unsigned)(high & 255) << 8 * k, bytes[1] |= (unsigned)(middle & 255) << 8 * k;
        bytes[2] |= (unsigned)(lowest & 255) << 8 * k;
    }
    for (int far = 1; far < threads; far *= 2)
        sum += __float_as_int(__shfl_xor_sync(0xffffffffu, __int_as_float(sum), far));
    if (group >= groups) return;
    const int within = column % p.group, word = group * (p.group >> 4) + within % threads / 4;
#pragma unroll
    for (int piece = 0; piece < 3; ++piece)
        *(unsigned *)((byte *)p.out + digit_place(p, token, word, piece) + 4 * (within / threads)) = bytes[piece];
    if (within) return;
    const long long cell = p.padded_tokens <= 2 ? (long long)token * groups + group
                                                : ((long long)(token / 8) * groups + group) * 8 + token % 8;
    const float step = __int_as_float(finite ? (exponent - 21) << 23 : 0x7fc00000);
    ((float2 *)p.sums)[cell] = make_float2(step, step * (float)sum);
}

/* Stores a lane's four columns of a token. All lanes of the warp call it; lanes lie side by side. */
static __device__ __forceinline__ void store_packed(const Packed &p, int token, int column, float4 v) {
    if (p.group == 0) {
        if (token >= p.tokens) return;
        float *const to = (float *)p.out + (long long)token * p.columns + column;
        const float w[4] = {v.x, v.y, v.z, v.w};
        for (int i = 0; i < 4; ++i)
            if (column + i < p.columns) to[i] = w[i];
        return;
    }
    if (p.digits) return store_digits(p, token, column, v);
    float sum = (v.x + v.y) + (v.z + v.w);
    for (int far = 1; far < p.group / 4; far *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far);
    const int chunk = column / CHUNK_COLUMNS;
    if (chunk >= p.chunks) return;
    const int group = column / p.group, within = column % p.group, quarter = p.group >> 2;
    const int word = group * (p.group >> 4) + within % quarter / 4, e = 4 * (word & 1) + within / quarter;
    const int block = token / p.padded_tokens, t = token % p.padded_tokens, groups = CHUNK_COLUMNS / p.group;
    const long long at = ((long long)block * p.chunks + chunk) * p.padded_tokens + t;
    ((float4 *)p.out)[at * 256 + e * 32 + (word >> 1 & 31)] = v;
    if (within == 0) ((float *)p.sums)[at * groups + group % groups] = sum;
}

#endif
