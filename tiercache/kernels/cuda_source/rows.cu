/* Products along the input, for up to 8 tokens a pass: out[t, i] += W[i] x[t], or hidden = act(gate x) * (up x).
 *
 * A warp owns R rows from end to end, so no choice of grid, alignment or place changes the order of a sum, and a
 * token's result does not depend on how many tokens came with it. A lane takes 8 bytes of each 2-bit plane (and 2 x 8
 * of the 4-bit one) at a time; R rows at int4 are 64 bytes in flight a lane, 32 to 48 KB a multiprocessor, several
 * times what hides the latency of memory (936 GB/s x 600 ns is 7 KB for each of a 3090's): wider loads add nothing.
 *
 * Why fp32 and not dp4a. A weight costs 1.25 integer operations to merge, 1 to make a float of, and 1 multiply-add a
 * token: at int4 6.5 operations a byte for one token. A 3090 issues 19 a byte of its memory's bandwidth, a P40 17, an
 * M40 12: bound by memory to 2 or 4 tokens, and streamed over PCIe to far more than 8. dp4a on activations in two
 * bytes would gain a factor of two where that is not so (int4 on an H200, 8 tokens elsewhere), at a fixed-point
 * rounding of x.
 */
#include "planes.cuh"

struct RowsArguments {
    Matrix matrix[2];   /* gate and up, or one */
    const float4 *x;    /* [blocks, chunks, T, 8, 32] float4: see prepare.cu */
    const float *sums;  /* [blocks, chunks, T, groups a chunk] */
    RowLists rows;      /* of both matrices */
    float *out;         /* [tokens, count], or hidden [blocks, count, T] */
    long long out_pitch;
    int count, tokens, matrices, chunks, tile_chunks;
    int activation;     /* -1: add sums to out */
};

static __device__ __forceinline__ float activated(float v, int activation) {
    switch (activation) { /* the order of contract.ACTIVATIONS; NaN stays NaN */
    case 0: return v / (1.0f + expf(-v));
    case 1: return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case 2: return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case 3: return v < 0.0f ? 0.0f : v;
    case 4: return v < 0.0f ? 0.0f : v * v;
    default: return v;
    }
}

template <int R> struct Rows { /* where R rows lie */
    const byte *a[R], *b[R], *low[R], *scales[R];
};

template <int R> static __device__ __forceinline__ Rows<R> rows_at(const RowsArguments &a, int first) {
    Rows<R> at;
    for (int r = 0; r < R; ++r) {
        int item = a.matrices == 2 ? (first + r) >> 1 : first + r;
        item = item < a.count ? item : a.count - 1; /* past the end: computed again, never written */
        const Matrix &m = a.matrix[a.matrices == 2 ? r & 1 : 0];
        at.a[r] = m.plane[0] + row_of(a.rows, 0, item) * m.pitch[0];
        at.b[r] = PLANES > 1 ? m.plane[1] + row_of(a.rows, 1, item) * m.pitch[1] : 0;
        at.low[r] = PLANES > 2 ? m.plane[2] + row_of(a.rows, 2, item) * m.pitch[2] : 0;
        at.scales[r] = m.scales + row_of(a.rows, 3, item) * m.scales_pitch;
    }
    return at;
}

template <int T, int R, int Q>
static __device__ __forceinline__ void quarter(const unsigned *a, const unsigned *b, const unsigned *low,
                                               const float4 *x, float (*dot)[T]) {
    float w[R][4];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const unsigned codes = merged<Q>(a[r], b[r], low[r]);
        w[r][0] = code_float<0>(codes), w[r][1] = code_float<1>(codes);
        w[r][2] = code_float<2>(codes), w[r][3] = code_float<3>(codes);
    }
#pragma unroll
    for (int t = 0; t < T; ++t) {
        const float4 v = x[(t * 8 + Q) * 32];
#pragma unroll
        for (int r = 0; r < R; ++r)
            dot[r][t] = fmaf(w[r][3], v.w, fmaf(w[r][2], v.z, fmaf(w[r][1], v.y, fmaf(w[r][0], v.x, dot[r][t]))));
    }
}

/* One lane's two words of R rows; x and sums are those of the chunk. */
template <int T, int R>
static __device__ __forceinline__ void two_words(const Rows<R> &at, int unit, int groups_shift, int aligned,
                                                 const float4 *x, const float *sums, float (*total)[T]) {
    const int group = unit >> groups_shift, within = unit & ((1 << groups_shift) - 1); /* 1, 2 or 4 units a group */
    const int low_at = (group << (groups_shift + 4)) + 8 * within, other = 8 << groups_shift;
    unsigned a[2][R], b[2][R], even[2][R], odd[2][R];
    Line line[R];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const uint2 none = make_uint2(0, 0);
        const uint2 first = load_two(at.a[r] + 8 * unit, aligned);
        const uint2 second = PLANES > 1 ? load_two(at.b[r] + 8 * unit, aligned) : none;
        const uint2 third = PLANES > 2 ? load_two(at.low[r] + low_at, aligned) : none;
        const uint2 fourth = PLANES > 2 ? load_two(at.low[r] + low_at + other, aligned) : none;
        a[0][r] = first.x, a[1][r] = first.y, b[0][r] = second.x, b[1][r] = second.y;
        even[0][r] = third.x, even[1][r] = third.y, odd[0][r] = fourth.x, odd[1][r] = fourth.y;
        line[r] = line_of(at.scales[r], group, aligned);
    }
    float dot[R][T] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const float4 *here = x + s * 4 * 32;
        quarter<T, R, 0>(a[s], b[s], even[s], here, dot);
        quarter<T, R, 1>(a[s], b[s], odd[s], here, dot);
        quarter<T, R, 2>(a[s], b[s], even[s], here, dot);
        quarter<T, R, 3>(a[s], b[s], odd[s], here, dot);
    }
#pragma unroll
    for (int t = 0; t < T; ++t) { /* a group's sum of x counts once, with its first unit */
        const float sum = within ? 0.0f : sums[t * (32 >> groups_shift) + ((unit & 31) >> groups_shift)];
#pragma unroll
        for (int r = 0; r < R; ++r)
            total[r][t] = fmaf(line[r].slope, dot[r][t], fmaf(line[r].base, sum, total[r][t]));
    }
}

template <int T, int R>
static __device__ __forceinline__ void finish(const RowsArguments &a, int first, int block, const float (*total)[T]) {
#pragma unroll
    for (int t = 0; t < T; ++t) {
#pragma unroll
        for (int r = 0; r < R; ++r) { /* known indices all: registers have no others */
            const int item = a.matrices == 2 ? (first + r) >> 1 : first + r, token = block * T + t;
            if (item >= a.count || (a.matrices == 2 && r % 2)) continue;
            const float up = a.matrices == 2 ? total[r | 1][t] : 1.0f;
            if (a.activation >= 0)
                a.out[((long long)block * a.count + item) * T + t] = activated(total[r][t], a.activation) * up;
            else if (token < a.tokens)
                a.out[token * a.out_pitch + item] += total[r][t];
        }
    }
}

template <int T, int R> static __device__ __forceinline__ void rows_kernel(const RowsArguments &a) {
    SHARED(float4, tile);
    const int lane = threadIdx.x & 31, block = blockIdx.x, group = a.matrix[0].group;
    const int first = (int)(blockIdx.y * WARPS + threadIdx.x / 32) * R;
    const int groups_shift = group == 32 ? 0 : group == 64 ? 1 : 2, sums_a_chunk = T * (32 >> groups_shift);
    const int units = a.matrix[0].groups << groups_shift;
    const int aligned = a.matrix[0].aligned && (a.matrices == 1 || a.matrix[1].aligned);
    float *const sums = (float *)(tile + a.tile_chunks * T * 256);
    const Rows<R> at = rows_at<R>(a, first);
    float total[R][T] = {};
    for (int done = 0; done < a.chunks; done += a.tile_chunks) {
        const int chunks = min(a.tile_chunks, a.chunks - done), before = block * a.chunks + done;
        __syncthreads(); /* everyone has left the tile before */
        for (int i = threadIdx.x; i < chunks * T * 256; i += THREADS) tile[i] = a.x[(long long)before * T * 256 + i];
        for (int i = threadIdx.x; i < chunks * sums_a_chunk; i += THREADS)
            sums[i] = a.sums[(long long)before * sums_a_chunk + i];
        __syncthreads();
        for (int c = 0; c < chunks; ++c) {
            const int unit = (done + c) * 32 + lane;
            if (unit < units)
                two_words<T, R>(at, unit, groups_shift, aligned, tile + c * T * 256 + lane, sums + c * sums_a_chunk,
                                total);
        }
    }
#pragma unroll
    for (int r = 0; r < R; ++r)
#pragma unroll
        for (int t = 0; t < T; ++t)
            for (int far = 16; far; far >>= 1) total[r][t] += __shfl_xor_sync(0xffffffffu, total[r][t], far);
    if (lane == 0) finish<T, R>(a, first, block, total);
}

#define ROWS(T, R) \
    KERNEL(JOIN(rows, PLANES, T, R), RowsArguments) { rows_kernel<T, R>(a); }
ROWS(1, 2) ROWS(1, 4) ROWS(2, 2) ROWS(2, 4) ROWS(4, 2) ROWS(4, 4) ROWS(8, 2) ROWS(8, 4)
