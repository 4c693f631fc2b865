/* What a decoder layer does beside its products and its attention: norms, rotation, residuals.
 *
 * All in fp32. Each kernel begins or ends with what the products want: `layer_enter` and `layer_combine` leave inputs
 * as `prepare` does, `layer_rotate` and `layer_leave` read what rows.cu leaves behind an activation, [blocks, rows, T],
 * and `layer_settle` the slices of down.cu. Nothing that a token gets depends on the others.
 */
#include "attention.cuh"

struct EnterArguments {
    const byte *x;
    long long pitch;      /* elements from token to token */
    const byte *norm;     /* [columns] */
    const float *factors; /* [columns], or null for ones */
    Packed to;
    float eps;
    int kind, norm_kind, padding;
};

/* A thread's share of the sum of squares of a row. Known widths, or no load begins before the last one is there. */
template <bool WIDE, int KIND>
static __device__ __forceinline__ float squares(const byte *x, long long row, int columns) {
    float sum = 0.0f;
#pragma unroll 4
    for (int c = 4 * threadIdx.x; c < columns; c += 4 * THREADS) {
        const float4 v = four(x, row, c, columns, KIND, WIDE);
        sum = fmaf(v.w, v.w, fmaf(v.z, v.z, fmaf(v.y, v.y, fmaf(v.x, v.x, sum))));
    }
    return sum;
}

template <bool WIDE>
static __device__ __forceinline__ float squares(const byte *x, long long row, int columns, int kind) {
    return kind == FLOAT  ? squares<WIDE, FLOAT>(x, row, columns)
           : kind == HALF ? squares<WIDE, HALF>(x, row, columns)
                          : squares<WIDE, BFLOAT>(x, row, columns);
}

/* The RMS norm, the factors, the Hadamard transform. A block does 1,024 columns and sums up the whole row itself. */
KERNEL(layer_enter, EnterArguments) {
    SHARED(float, warps);
    const int token = blockIdx.y, columns = a.to.columns, lane = threadIdx.x & 31;
    const int known = token < a.to.tokens ? columns : 0; /* of padding all is zero */
    const long long row = token * a.pitch;
    const int column = blockIdx.x * CHUNK_COLUMNS + 4 * threadIdx.x;
    const bool whole = wide(a.x, a.pitch, columns, a.kind), norm_whole = wide(a.norm, 0, columns, a.norm_kind);
    float4 v = four(a.x, row, column, known, a.kind, whole);
    const float4 norm = four(a.norm, 0, column, known, a.norm_kind, norm_whole);
    const float4 factors = a.factors ? four_of(a.factors, column, known) : make_float4(1.0f, 1.0f, 1.0f, 1.0f);
    float sum = whole ? squares<true>(a.x, row, known, a.kind) : squares<false>(a.x, row, known, a.kind);
    for (int far = 16; far; far >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, far);
    if (lane == 0) warps[threadIdx.x / 32] = sum;
    __syncthreads();
    sum = 0.0f;
    for (int w = 0; w < WARPS; ++w) sum += warps[w];
    const float scale = 1.0f / sqrtf(sum / (float)columns + a.eps);
    v = times(times(times(v, make_float4(scale, scale, scale, scale)), norm), factors);
    store_packed(a.to, token, column, transformed(v, (column / 64 + 1) * 64 <= columns));
}

struct RotateArguments {
    const float *found[3]; /* queries, keys, values as rows.cu leaves them: [blocks, rows, T] */
    const byte *bias[3];   /* [rows], or null */
    const byte *norm[2];   /* of the heads of queries and keys, or null */
    const byte *cos, *sin; /* [tokens, head_dim] */
    long long cos_pitch, sin_pitch;
    float *queries;        /* [tokens, heads, head_dim] */
    byte *keys, *values;   /* [key_heads, tokens, head_dim] of strides in elements: of keys and of values */
    long long head_pitch[2], token_pitch[2];
    float eps;
    int heads, key_heads, head_dim, tokens, padded_tokens; /* T */
    int kind, weight_kind, turn_kind; /* of keys and values, of biases and norms, of cos and sin */
};

/* A warp a head of a token: biases, the norms of heads, the rotation. */
KERNEL(layer_rotate, RotateArguments) {
    enum { MOST = 4 }; /* pairs of a lane: heads of 256 */
    const int lane = threadIdx.x & 31, token = blockIdx.y, half = a.head_dim / 2;
    const int which = (int)blockIdx.x < a.heads ? 0 : (int)blockIdx.x < a.heads + a.key_heads ? 1 : 2;
    const int head = (int)blockIdx.x - (which == 0 ? 0 : which == 1 ? a.heads : a.heads + a.key_heads);
    const int rows = (which ? a.key_heads : a.heads) * a.head_dim, first = head * a.head_dim;
    const float *const found =
        a.found[which] + (long long)(token / a.padded_tokens) * rows * a.padded_tokens + token % a.padded_tokens;
    const byte *const bias = a.bias[which], *const norm = which < 2 ? a.norm[which] : 0;
    float v[MOST][2], sum = 0.0f;
#pragma unroll
    for (int j = 0; j < MOST; ++j)
#pragma unroll
        for (int end = 0; end < 2; ++end) {
            const int i = lane + 32 * j, row = first + i + end * half;
            v[j][end] = 0.0f;
            if (i >= half) continue;
            v[j][end] = found[(long long)row * a.padded_tokens];
            if (bias) v[j][end] += number(bias, row, a.weight_kind);
            sum = fmaf(v[j][end], v[j][end], sum);
        }
    if (norm) {
        for (int far = 16; far; far >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, far);
        const float scale = 1.0f / sqrtf(sum / (float)a.head_dim + a.eps);
#pragma unroll
        for (int j = 0; j < MOST; ++j)
#pragma unroll
            for (int end = 0; end < 2; ++end) {
                const int i = lane + 32 * j;
                if (i < half) v[j][end] = __fmul_rn(v[j][end] * scale, number(norm, i + end * half, a.weight_kind));
            }
    }
#pragma unroll
    for (int j = 0; j < MOST; ++j) {
        const int i = lane + 32 * j;
        if (i >= half) continue;
        float low = v[j][0], high = v[j][1];
        if (which < 2) {
            const long long cos = token * a.cos_pitch + i, sin = token * a.sin_pitch + i;
            low = fmaf(v[j][0], number(a.cos, cos, a.turn_kind), __fmul_rn(-v[j][1], number(a.sin, sin, a.turn_kind)));
            high = fmaf(v[j][1], number(a.cos, cos + half, a.turn_kind),
                        __fmul_rn(v[j][0], number(a.sin, sin + half, a.turn_kind)));
        }
        if (which == 0) {
            float *const to = a.queries + ((long long)token * a.heads + head) * a.head_dim + i;
            to[0] = low, to[half] = high;
        } else {
            const long long to = head * a.head_pitch[which - 1] + token * a.token_pitch[which - 1] + i;
            put(which == 1 ? a.keys : a.values, to, a.kind, low);
            put(which == 1 ? a.keys : a.values, to + half, a.kind, high);
        }
    }
}

struct CombineArguments {
    const float *attended; /* [units, tokens, heads, head_dim] */
    const float *weights;  /* [units, tokens, heads, 2] */
    const float *factors;  /* [heads * head_dim], or null for ones */
    Packed to;
    int units, per_span;   /* units of slots, and how many make a span */
    int head_dim, padding;
};

/* What all units of slots come to, times the factors, transformed. Zeros for a token that attends to nothing. */
KERNEL(layer_combine, CombineArguments) {
    enum { BATCH = 8 };
    const int token = blockIdx.y, columns = a.to.columns, column = 4 * (blockIdx.x * blockDim.x + threadIdx.x);
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    if (token < a.to.tokens && column < columns) {
        const int heads = columns / a.head_dim;
        Attended<4> span, all;
        clear(span), clear(all);
        const float2 *const weights = (const float2 *)a.weights + token * heads + column / a.head_dim;
        const float *const found = a.attended + (long long)token * columns + column;
        for (int first = 0; first < a.units; first += BATCH) {
            float2 weight[BATCH];
            float4 values[BATCH];
#pragma unroll
            for (int i = 0; i < BATCH; ++i) { /* all loads before the first sum */
                const long long unit = min(first + i, a.units - 1), rows = unit * a.to.tokens;
                weight[i] = weights[rows * heads], values[i] = *(const float4 *)(found + rows * columns);
            }
#pragma unroll
            for (int i = 0; i < BATCH; ++i) {
                const int unit = first + i;
                if (unit >= a.units) break;
                const float value[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
                merge(span, weight[i].x, weight[i].y, value);
                if ((unit + 1) % a.per_span && unit + 1 < a.units) continue;
                merge(all, span.top, span.total, span.value), clear(span);
            }
        }
        if (all.top != minus_infinity())
            v = make_float4(all.value[0] / all.total, all.value[1] / all.total, all.value[2] / all.total,
                            all.value[3] / all.total);
        if (a.factors) v = times(v, four_of(a.factors, column, columns));
    }
    store_packed(a.to, token, column, transformed(v, (column / 64 + 1) * 64 <= columns));
}

struct LeaveArguments {
    const byte *x, *bias; /* the residual stream; [columns], or null */
    long long pitch;      /* elements of x from token to token */
    const float *found;   /* as rows.cu leaves it: [blocks, columns, T] */
    byte *out;            /* [tokens, columns] */
    int kind, bias_kind, tokens, columns, padded_tokens, padding;
};

/* out = x + found + bias, rounded once. */
KERNEL(layer_leave, LeaveArguments) {
    const int column = blockIdx.x * THREADS + threadIdx.x, first = blockIdx.y * a.padded_tokens;
    if (column >= a.columns) return;
    const float bias = a.bias ? number(a.bias, column, a.bias_kind) : 0.0f;
    const float *const found = a.found + ((long long)blockIdx.y * a.columns + column) * a.padded_tokens;
    for (int t = 0; t < a.padded_tokens && first + t < a.tokens; ++t) {
        const float sum = a.bias ? found[t] + bias : found[t];
        const float x = number(a.x, (first + t) * a.pitch + column, a.kind);
        put(a.out, (long long)(first + t) * a.columns + column, a.kind, x + sum);
    }
}

struct SettleArguments {
    const byte *x;        /* the residual stream */
    long long pitch;      /* elements of x from token to token */
    const float *partial; /* [slices, padded tokens, padded columns] */
    const float *factors; /* [columns] */
    byte *out;            /* [tokens, columns] */
    int slices, padded_tokens, padded_columns, kind, columns, padding;
};

/* Four columns of a slice after another from `first`, added up. */
template <bool WIDE>
static __device__ __forceinline__ float4 slices(const SettleArguments &a, long long at, int column, int first,
                                                int end) {
    const long long apart = (long long)a.padded_tokens * a.padded_columns;
    float4 v = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 8
    for (int s = first; s < end; ++s) {
        const float4 w = four((const byte *)a.partial, at + s * apart, column, a.padded_columns, FLOAT, WIDE);
        v = make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w);
    }
    return v;
}

/* out = x + the sum of the slices, transformed, times the factors, rounded once. A block does 128 columns; each warp
 * adds up an eighth of the slices, then the eighths are, in order. */
KERNEL(layer_settle, SettleArguments) {
    SHARED(float4, eighths); /* [WARPS, 32] */
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, token = blockIdx.y;
    const int column = 4 * (blockIdx.x * 32 + lane), each = (a.slices + WARPS - 1) / WARPS;
    const int first = warp * each, end = min(a.slices, first + each);
    const long long at = (long long)token * a.padded_columns;
    const bool known = wide((const byte *)a.partial, a.padded_columns, a.padded_columns, FLOAT);
    eighths[threadIdx.x] = known ? slices<true>(a, at, column, first, end) : slices<false>(a, at, column, first, end);
    const float4 x = four(a.x, token * a.pitch, column, a.columns, a.kind, wide(a.x, a.pitch, a.columns, a.kind));
    __syncthreads();
    if (warp) return;
    float4 v = eighths[lane];
    for (int i = 1; i < WARPS; ++i) {
        const float4 w = eighths[32 * i + lane];
        v = make_float4(v.x + w.x, v.y + w.y, v.z + w.z, v.w + w.w);
    }
    v = transformed(v, (column / 64 + 1) * 64 <= a.columns);
    v = times(v, four_of(a.factors, column, a.columns));
    const float sum[4] = {x.x + v.x, x.y + v.y, x.z + v.z, x.w + v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i)
        if (column + i < a.columns) put(a.out, (long long)token * a.columns + column + i, a.kind, sum[i]);
}
