/* Kernels that look at no plane: activations made ready, slices added up, rows copied. */
#include "numbers.cuh"

struct PrepareArguments {
    const byte *x;
    long long pitch, stride; /* elements from token to token, from column to column */
    float4 *out;             /* [blocks, chunks, T, 8 (word of the lane, quarter), 32 lanes] */
    float *sums;             /* [blocks, chunks, T, groups a chunk] */
    int kind;                /* 0 fp32, 1 fp16, 2 bf16 */
    int columns, group, tokens, padded_tokens, chunks;
};

static __device__ __forceinline__ float element(const PrepareArguments &a, int token, int column) {
    if (token >= a.tokens || column >= a.columns) return 0.0f;
    const long long at = token * a.pitch + column * a.stride;
    if (a.kind == 0) return ((const float *)a.x)[at];
    const half_bits bits = ((const half_bits *)a.x)[at];
    return a.kind == 1 ? half_to_float(bits) : __int_as_float((int)((unsigned)bits << 16));
}

/* Puts x in the order in which lanes read it in rows.cu: neighbours in shared memory, no bank asked twice. */
static __device__ __forceinline__ void prepare_kernel(const PrepareArguments &a) {
    SHARED(float, part); /* [8, 32] sums of four */
    const int lane = threadIdx.x & 31, e = threadIdx.x / 32, chunk = blockIdx.x, slot = blockIdx.y;
    const int block = slot / a.padded_tokens, t = slot % a.padded_tokens;
    const int in_group = a.group >> 4, word = 2 * (chunk * 32 + lane) + e / 4, q = e % 4;
    const int column = word / in_group * a.group + q * (a.group >> 2) + 4 * (word % in_group);
    const long long at = ((long long)block * a.chunks + chunk) * a.padded_tokens + t;
    const float4 v = make_float4(element(a, slot, column), element(a, slot, column + 1), element(a, slot, column + 2),
                                 element(a, slot, column + 3));
    a.out[at * 256 + e * 32 + lane] = v;
    part[e * 32 + lane] = (v.x + v.y) + (v.z + v.w);
    __syncthreads();
    const int lanes = a.group >> 5, groups = 32 / lanes; /* lanes that share a group, groups in the chunk */
    if ((int)threadIdx.x < groups) {
        float sum = 0.0f;
        for (int i = 0; i < 8; ++i)
            for (int l = 0; l < lanes; ++l) sum += part[i * 32 + threadIdx.x * lanes + l];
        a.sums[at * groups + threadIdx.x] = sum;
    }
}

KERNEL(prepare, PrepareArguments) { prepare_kernel(a); }

struct DigitsArguments {
    const byte *x;
    long long pitch, stride; /* elements from token to token, from column to column */
    Packed to;
    int kind, padding; /* 0 fp32, 1 fp16, 2 bf16 */
};

/* x for dots.cu and mma.cu, four columns a thread. */
KERNEL(digits, DigitsArguments) {
    const PrepareArguments from = {a.x, a.pitch, a.stride, 0, 0, a.kind, a.to.columns, 0, a.to.tokens, 0, 0};
    const int column = 4 * (blockIdx.x * THREADS + threadIdx.x), token = blockIdx.y;
    const float4 v = make_float4(element(from, token, column), element(from, token, column + 1),
                                 element(from, token, column + 2), element(from, token, column + 3));
    store_digits(a.to, token, column, v);
}

struct SumArguments {
    const float *partial;      /* [slices, padded tokens, padded columns] */
    float *out;                /* [tokens, columns] */
    long long out_pitch;
    int slices, padded_tokens, padded_columns, columns;
};

/* 32 columns a block; each warp adds up an eighth of the slices, then the eighths are, in order. */
KERNEL(sum, SumArguments) {
    SHARED(float, eighths); /* [WARPS, 32] */
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, column = blockIdx.x * 32 + lane, token = blockIdx.y;
    const int each = (a.slices + WARPS - 1) / WARPS, end = min(a.slices, (warp + 1) * each);
    float total = 0.0f;
    if (column < a.columns) {
#pragma unroll 8
        for (int s = warp * each; s < end; ++s)
            total += a.partial[((long long)s * a.padded_tokens + token) * a.padded_columns + column];
    }
    eighths[warp * 32 + lane] = total;
    __syncthreads();
    if (warp || column >= a.columns) return;
    total = 0.0f;
    for (int i = 0; i < WARPS; ++i) total += eighths[i * 32 + lane];
    a.out[token * a.out_pitch + column] += total;
}

struct HadamardArguments {
    const byte *x;
    long long pitch, stride;      /* elements from token to token, from column to column */
    const float *before, *after;  /* [columns], or null for ones */
    float *out;                   /* [tokens, columns] */
    int kind, columns;            /* 0 fp32, 1 fp16, 2 bf16 */
};

/* 64 columns of one token a block; the order of the sums is that of tiercache/hadamard.py. */
KERNEL(hadamard, HadamardArguments) {
    SHARED(float, v);
    const int i = threadIdx.x, column = blockIdx.y * 64 + i, token = blockIdx.x;
    const bool whole = (int)(blockIdx.y + 1) * 64 <= a.columns;
    const long long at = token * a.pitch + column * a.stride;
    float mine = 0.0f;
    if (column < a.columns) {
        if (a.kind == 0) {
            mine = ((const float *)a.x)[at];
        } else {
            const half_bits bits = ((const half_bits *)a.x)[at];
            mine = a.kind == 1 ? half_to_float(bits) : __int_as_float((int)((unsigned)bits << 16));
        }
        if (a.before) mine = __fmul_rn(mine, a.before[column]); /* not fused with the sum */
    }
    for (int apart = 1; apart < 64; apart *= 2) {
        v[i] = mine;
        __syncthreads();
        const float other = v[i ^ apart];
        mine = whole ? (i & apart ? other - mine : mine + other) : mine;
        __syncthreads();
    }
    if (column >= a.columns) return;
    if (whole) mine *= 0.125f;
    a.out[(long long)token * a.columns + column] = a.after ? __fmul_rn(mine, a.after[column]) : mine;
}

enum { MOST_PIECES = 16 };

struct GatherArguments {
    const byte *piece[MOST_PIECES];
    long long pitch[MOST_PIECES], out_at[MOST_PIECES];
    int width[MOST_PIECES];
    const int *rows;
    byte *out;
};

/* One row of one piece a block; from host memory, 16 bytes a lane are requests as wide as a link knows. */
KERNEL(gather, GatherArguments) {
    const int piece = blockIdx.y, width = a.width[piece];
    const byte *from = a.piece[piece] + a.rows[blockIdx.x] * a.pitch[piece];
    byte *to = a.out + a.out_at[piece] + (long long)blockIdx.x * width;
    const unsigned long long mixed = (unsigned long long)from | (unsigned long long)to | (unsigned long long)width;
    if ((mixed & 15) == 0) {
        for (int i = threadIdx.x; i < width / 16; i += blockDim.x) ((uint4 *)to)[i] = ((const uint4 *)from)[i];
    } else if ((mixed & 3) == 0) {
        for (int i = threadIdx.x; i < width / 4; i += blockDim.x) ((unsigned *)to)[i] = ((const unsigned *)from)[i];
    } else {
        for (int i = threadIdx.x; i < width; i += blockDim.x) to[i] = from[i];
    }
}
