/* Products along the input, for up to 8 tokens a pass: out[t, i] += W[i] x[t], or hidden = act(gate x) * (up x).
 *
 * A warp owns R rows from end to end, so no choice of grid, alignment or place changes the order of a sum, and a
 * token's result does not depend on how many tokens came with it. Of a row a warp loads 256 bytes of 2-bit codes at a
 * time, 128 of each plane of single bits and 512 of the 4-bit plane, 8 bytes a lane in one load: two lanes share those
 * of the single bits, and of groups of 32 each lane has 4 of its own. R = 4 rows at int4 are 2 KB in flight a warp, 32
 * to 48 KB a multiprocessor, several times what hides the latency of memory (936 GB/s x 600 ns is 7 KB for each of a
 * 3090's): wider loads add nothing.
 *
 * Why fp32 and not dp4a. A weight costs 1 integer operation to merge, 1 to make a float of, and 1 multiply-add a
 * token: at int4 6 operations a byte for one token. A 3090 issues 19 a byte of its memory's bandwidth, a P40 17, an
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

template <int R> struct Rows { /* where R rows lie */
    const byte *top[R], *bit[R], *low[R], *scales[R];
};

template <int R> static __device__ __forceinline__ Rows<R> rows_at(const RowsArguments &a, int first) {
    Rows<R> at;
    for (int r = 0; r < R; ++r) {
        int item = a.matrices == 2 ? (first + r) >> 1 : first + r;
        item = item < a.count ? item : a.count - 1; /* past the end: computed again, never written */
        const Matrix &m = a.matrix[a.matrices == 2 ? r & 1 : 0];
        at.top[r] = m.plane[0] + row_of(a.rows, 0, item) * m.pitch[0];
        at.bit[r] = PLANES > 1 ? m.plane[1] + row_of(a.rows, 1, item) * m.pitch[1] : 0;
        at.low[r] = PLANES > 2 ? m.plane[2] + row_of(a.rows, 2, item) * m.pitch[2] : 0;
        at.scales[r] = m.scales + row_of(a.rows, 3, item) * m.scales_pitch;
    }
    return at;
}

template <int R> struct Taken { /* a lane's two words of R rows, as they lie */
    uint2 top[R], mid[R], bit[R], even[R], odd[R];
    unsigned scales[R];
};

struct Span { /* which two words, the same in every row; groups have 1, 2 or 4 such units (`groups_shift` 0, 1, 2) */
    int unit, units, groups_shift;
};

template <int ALIGNED, int R>
static __device__ __forceinline__ void take(const Rows<R> &at, const Span &span, Taken<R> &taken) {
    const int shift = span.groups_shift, group = span.unit >> shift, within = span.unit & ((1 << shift) - 1);
    const int low_at = (group << (shift + 4)) + 8 * within, other = 8 << shift;
    const uint2 none = make_uint2(0, 0);
#pragma unroll
    for (int r = 0; r < R; ++r) {
        taken.top[r] = load_two<ALIGNED>(at.top[r] + 8 * span.unit);
        taken.even[r] = PLANES > 2 ? load_two<ALIGNED>(at.low[r] + low_at) : none;
        taken.odd[r] = PLANES > 2 ? load_two<ALIGNED>(at.low[r] + low_at + other) : none;
        taken.scales[r] = load_word<ALIGNED>(at.scales[r] + 4 * group);
    }
    const int mid = 8 * span.units; /* single bits begin behind the row's 2-bit codes */
    if (shift == 0) { /* both words have theirs in one, and a group's may start at any 4 bytes */
#pragma unroll
        for (int r = 0; r < R; ++r) {
            taken.mid[r].x = taken.mid[r].y = load_word<ALIGNED>(at.top[r] + mid + 4 * group);
            taken.bit[r] = none;
            if (PLANES > 1) taken.bit[r].x = taken.bit[r].y = load_word<ALIGNED>(at.bit[r] + 4 * group);
        }
    } else { /* two words, shared with the unit half a group away */
        const int bit = 8 * ((group << (shift - 1)) + (within & ((1 << (shift - 1)) - 1)));
#pragma unroll
        for (int r = 0; r < R; ++r) {
            taken.mid[r] = load_two<ALIGNED>(at.top[r] + mid + bit);
            taken.bit[r] = PLANES > 1 ? load_two<ALIGNED>(at.bit[r] + bit) : none;
        }
    }
}

template <int T, int R, int Q>
static __device__ __forceinline__ void quarter(const unsigned *h, const unsigned *c, const float4 *x, float (*dot)[T]) {
    float w[R][4];
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const unsigned codes = merged<(Q > 1)>(h[r], c[r]);
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
static __device__ __forceinline__ void two_words(const Rows<R> &at, const Span &span, int aligned, const float4 *x,
                                                 const float *sums, float (*total)[T]) {
    const int shift = span.groups_shift, within = span.unit & ((1 << shift) - 1);
    Taken<R> taken;
    if (aligned >= 8)
        take<8, R>(at, span, taken);
    else if (aligned == 4)
        take<4, R>(at, span, taken);
    else
        take<0, R>(at, span, taken);
    /* Whether the words share their single bits with a word before them. */
    const int later = within >= (1 << shift) / 2, second[2] = {shift ? later : 0, later};
    unsigned h[2][2][R], c[2][2][R]; /* of two words, of their even and odd quarters */
#pragma unroll
    for (int r = 0; r < R; ++r) {
        const unsigned pairs[2] = {lower_pairs(taken.mid[r].x, taken.bit[r].x, second[0]),
                                   lower_pairs(taken.mid[r].y, taken.bit[r].y, second[1])};
        h[0][0][r] = upper_codes(taken.top[r].x, pairs[0], 0), h[0][1][r] = upper_codes(taken.top[r].x, pairs[0], 1);
        h[1][0][r] = upper_codes(taken.top[r].y, pairs[1], 0), h[1][1][r] = upper_codes(taken.top[r].y, pairs[1], 1);
        c[0][0][r] = taken.even[r].x, c[0][1][r] = taken.odd[r].x;
        c[1][0][r] = taken.even[r].y, c[1][1][r] = taken.odd[r].y;
    }
    float dot[R][T] = {};
#pragma unroll
    for (int s = 0; s < 2; ++s) {
        const float4 *here = x + s * 4 * 32;
        quarter<T, R, 0>(h[s][0], c[s][0], here, dot);
        quarter<T, R, 1>(h[s][1], c[s][1], here, dot);
        quarter<T, R, 2>(h[s][0], c[s][0], here, dot);
        quarter<T, R, 3>(h[s][1], c[s][1], here, dot);
    }
    Line line[R];
#pragma unroll
    for (int r = 0; r < R; ++r) line[r] = line_of(taken.scales[r]);
#pragma unroll
    for (int t = 0; t < T; ++t) { /* a group's sum of x counts once, with its first unit */
        const float sum = within ? 0.0f : sums[t * (32 >> shift) + ((span.unit & 31) >> shift)];
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
    const int aligned = a.matrices == 1 ? a.matrix[0].aligned : min(a.matrix[0].aligned, a.matrix[1].aligned);
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
            const Span span = {(done + c) * 32 + lane, units, groups_shift};
            if (span.unit < units)
                two_words<T, R>(at, span, aligned, tile + c * T * 256 + lane, sums + c * sums_a_chunk, total);
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
