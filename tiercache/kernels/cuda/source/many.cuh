/* Part of mma.cu: up to 32 tokens a block, so that a weight is decoded once for all of them.
 *
 * A warp owns 16 rows and goes through their parts one after another (`sharers` 1), or four warps share the parts of 16
 * rows (`sharers` 4), where the grid would be too small. The digits of 8 tokens after another come by way of the cache
 * from memory: all warps of a block ask for the same ones. The order of sums is that of mma.cu.
 */
#ifndef TIERCACHE_MANY_CUH
#define TIERCACHE_MANY_CUH

#include "quads.cuh"

enum { MANY = 32, TILES = MANY / 8 };

/* One step: its four groups decoded, then all tokens. `sums`: [tile, row, token] of the part. */
template <int W, int ALIGNED>
static __device__ __forceinline__ void add_many(const Lines &at, int step, int groups, const byte *x,
                                                const byte *factors, int tiles, float (*sums)[2][2]) {
    const int own = threadIdx.x & 3;
    unsigned quarter[4][W / 4][4][2];
    Line line[2];
    {
        Quads<W> codes[2];
        take_quads<ALIGNED, W>(at, 0, 4 * step, groups, own, codes[0]);
        take_quads<ALIGNED, W>(at, 1, 4 * step, groups, own, codes[1]);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int i = 0; i < W / 4; ++i) {
                quad_bytes<W>(codes[0], j, i, own, 0, quarter[j][i]);
                quad_bytes<W>(codes[1], j, i, own, 1, quarter[j][i]);
            }
        line[0] = codes[0].line, line[1] = codes[1].line;
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        if (tile >= tiles) break; /* the same for all lanes */
        float pair[2][2], sum[2][2] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int group = min(4 * step + j, groups - 1);
            const byte *const factor = factors + 8ll * (tile * 8 * groups + group);
            const uint2 bits[2] = {fetch_two(factor), fetch_two(factor + 8ll * groups)};
            int dots[3][4] = {};
            dots_of<W>(quarter[j], x + (long long)(tile * 8 * groups + group) * (48 * W), dots);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float slope = __shfl_sync(0xffffffffu, line[r].slope, (threadIdx.x & 28) + j);
                const float base = __shfl_sync(0xffffffffu, line[r].base, (threadIdx.x & 28) + j);
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    const float value = 4 * step + j < groups ? value_of(dots, r, t, slope, base, bits[t]) : 0.0f;
                    pair[r][t] = j % 2 ? pair[r][t] + value : value;
                    if (j == 1) sum[r][t] = pair[r][t];
                    if (j == 3) sums[tile][r][t] += sum[r][t] + pair[r][t];
                }
            }
        }
    }
}

/* `slots`: [16 rows, MANY], of the warp or of its rows' first part. */
template <int W, int ALIGNED>
static __device__ __forceinline__ void add_parts(const MmaArguments &a, Lines at, int tiles, float *slots) {
    const int lane = threadIdx.x & 31, g = lane / 4, own = lane % 4, groups = a.matrix[0].groups;
    const int share = threadIdx.x / 32 % a.sharers, parts = WARPS / a.sharers;
    const int steps = (groups + 3) / 4, each = (steps + WARPS - 1) / WARPS;
    to_own_words<W>(at, own);
    const byte *x = a.digits + ((long long)blockIdx.x * MANY + g) * groups * (48 * W) + 16 * own;
    const byte *factors = (const byte *)(a.factors + ((long long)blockIdx.x * MANY + 2 * own) * groups);
    KEEP(x);
    KEEP(factors);
    for (int part = share * parts; part < (share + 1) * parts; ++part) {
        float sums[TILES][2][2] = {};
        const int first = min(steps, part * each), end = min(steps, first + each);
#pragma unroll 1
        for (int step = first; step < end; ++step) add_many<W, ALIGNED>(at, step, groups, x, factors, tiles, sums);
        float *const slot = a.sharers == 1 ? slots : slots + part * 16 * MANY;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    float *const to = slot + (g + 8 * r) * MANY + tile * 8 + 2 * own + t;
                    *to = part && a.sharers == 1 ? *to + sums[tile][r][t] : sums[tile][r][t] + 0.0f;
                }
    }
}

/* Adds up the parts of 16 rows, if they are apart, and writes them: a warp does a quarter of them, or all. */
static __device__ __forceinline__ void finish_many(const MmaArguments &a, const float *slots, int first) {
    const int lane = threadIdx.x & 31, share = threadIdx.x / 32 % a.sharers, token = (int)blockIdx.x * MANY + lane;
    const int rows = a.matrices == 2 ? 8 : 16;
    for (int row = share; row < rows; row += a.sharers) {
        float sum[2] = {0.0f, 0.0f};
        for (int part = 0; part < (a.sharers == 1 ? 1 : WARPS); ++part)
            for (int r = 0; r < a.matrices; ++r) sum[r] += slots[(part * 16 + row + 8 * r) * MANY + lane];
        if (first + row >= a.count) continue;
        if (a.activation >= 0)
            a.out[((long long)blockIdx.x * a.count + first + row) * MANY + lane] =
                activated(sum[0], a.activation) * (a.matrices == 2 ? sum[1] : 1.0f);
        else if (token < a.tokens)
            a.out[token * a.out_pitch + first + row] += sum[0];
    }
}

template <int GROUP> static __device__ __forceinline__ void many_kernel(const MmaArguments &a) {
    SHARED(float, shared); /* [WARPS, 16, MANY], or [tiles of rows, WARPS, 16, MANY] */
    const int warp = threadIdx.x / 32, tile = warp / a.sharers, high = a.matrices == 2 ? 8 : 16;
    const int first = ((int)blockIdx.y * (WARPS / a.sharers) + tile) * high;
    const int tiles = (min(a.tokens - (int)blockIdx.x * MANY, MANY) + 7) / 8;
    const int aligned = a.matrices == 1 ? a.matrix[0].aligned : min(a.matrix[0].aligned, a.matrix[1].aligned);
    float *const slots = shared + tile * (a.sharers == 1 ? 1 : WARPS) * 16 * MANY;
    const Lines at = lines_at(a, first + (threadIdx.x & 31) / 4);
    if (aligned == 16)
        add_parts<GROUP / 16, 16>(a, at, tiles, slots);
    else
        add_parts<GROUP / 16, 0>(a, at, tiles, slots);
    __syncthreads();
    finish_many(a, slots, first);
}

#endif
