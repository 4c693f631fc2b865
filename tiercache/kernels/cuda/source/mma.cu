/* Products along the input by the matrix units of cards from compute capability 8.0 on: what rows.cu computes.
 *
 * Activations come as whole numbers of 23 bits, in steps of a power of two for each token and group, and those as three
 * signed bytes (`digits` of common.cu). A group's sum of codes times digits is then an exact integer, whatever unit adds
 * it up and in whatever order. From there on sums are fp32 in one order, that of shapes alone: the values of 4
 * neighbouring groups (a step) as (0 + 1) + (2 + 3), steps one after another in each of WARPS parts of a row, parts one
 * after another. A token's bits depend neither on its company nor on the grid.
 *
 * A block owns 16 rows, a warp one of the 8 parts of each. In a step lane (g, t), 4 g + t, holds group t of rows g and
 * g + 8, straight from memory: 16 bytes of 2-bit codes of a group of 64 in one load. An instruction of 16 rows x 32 x 8
 * columns takes 8 codes of each of the four groups; they must not be mixed, so the matrix of digits is zero but where
 * a column belongs to the lane's own group. Columns 2 t and 2 t + 1 are the upper two bytes of group t; of a second
 * matrix, the lowest bytes of group t for two tokens. Each lane then finds the sums of its own group in its own
 * registers. At int4 that is 1.3 instructions a weight for one token, where fp32 takes 3.
 */
#include "many.cuh"

template <int W> struct Codes { /* a lane's group of two rows, as it lies */
    unsigned top[2][W], mid[2][W / 2], bit[2][W / 2], low[2][2 * W], scales[2];
};

template <int ALIGNED, int W> static __device__ __forceinline__ void take(const Lines &at, int group, Codes<W> &codes) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        load_words<ALIGNED, W>(at.top[r] + (long long)group * (4 * W), codes.top[r]);
        if (PLANES > 2) load_words<ALIGNED, 2 * W>(at.low[r] + (long long)group * (8 * W), codes.low[r]);
        load_words<ALIGNED, W / 2>(at.mid[r] + (long long)group * (2 * W), codes.mid[r]);
        if (PLANES > 1) load_words<ALIGNED, W / 2>(at.bit[r] + (long long)group * (2 * W), codes.bit[r]);
        load_words<ALIGNED, 1>(at.scales[r] + (long long)group * 4, &codes.scales[r]);
    }
}

/* The codes of word w, a byte each: four quarters. */
template <int W>
static __device__ __forceinline__ void bytes_of(const Codes<W> &codes, int r, int w, unsigned (*quarter)[2]) {
    const int single = w % (W / 2), second = w >= W / 2;
    const unsigned pairs = lower_pairs(codes.mid[r][single], PLANES > 1 ? codes.bit[r][single] : 0, second);
    const unsigned even = upper_codes(codes.top[r][w], pairs, 0), odd = upper_codes(codes.top[r][w], pairs, 1);
    const unsigned c = PLANES > 2 ? codes.low[r][w] : 0, d = PLANES > 2 ? codes.low[r][W + w] : 0;
    quarter[0][r] = code_bytes<false>(even, c), quarter[1][r] = code_bytes<false>(odd, d);
    quarter[2][r] = code_bytes<true>(even, c), quarter[3][r] = code_bytes<true>(odd, d);
}

/* The sums of a lane's group for T tokens: `upper` of the upper two bytes, `lowest` of the lowest, of two tokens. */
template <int T, int W> struct Sums {
    int upper[T][4], lowest[(T + 1) / 2][4];
};

template <int T, int W>
static __device__ __forceinline__ void multiply(const Codes<W> &codes, const byte *upper, const byte *lowest,
                                                int token_bytes, Sums<T, W> &sums) {
#pragma unroll
    for (int w = 0; w < W; ++w) {
        unsigned quarter[4][2];
        bytes_of<W>(codes, 0, w, quarter);
        bytes_of<W>(codes, 1, w, quarter);
#pragma unroll
        for (int t = 0; t < T; ++t) {
            const uint4 x = fetch_four(upper + t * token_bytes + 16 * w);
            mma(sums.upper[t], quarter[0], quarter[1], x.x, x.y);
            mma(sums.upper[t], quarter[2], quarter[3], x.z, x.w);
        }
#pragma unroll
        for (int t = 0; t < (T + 1) / 2; ++t) {
            const uint4 x = fetch_four(lowest + 2 * t * token_bytes + 16 * w);
            mma(sums.lowest[t], quarter[0], quarter[1], x.x, x.y);
            mma(sums.lowest[t], quarter[2], quarter[3], x.z, x.w);
        }
    }
}

/* A lane's totals: of row own % 2 of its two, for every second token from own / 2 on (for one token, of that). */
template <int T> struct Totals {
    float of[(T + 1) / 2];
};

/* Adds a step to the totals, one group a lane; `here` says whether the lane's group is one. */
template <int T, int W>
static __device__ __forceinline__ void add_step(const Codes<W> &codes, const Sums<T, W> &sums, const byte *factors,
                                                int groups, bool here, int own, Totals<T> &totals) {
    Line line[2];
    float both[T]; /* of this lane's group and the next or the one before */
#pragma unroll
    for (int r = 0; r < 2; ++r) line[r] = code_line(codes.scales[r]);
#pragma unroll
    for (int t = 0; t < T; ++t) {
        const uint2 bits = fetch_two(factors + 8ll * t * groups);
        const float size = __int_as_float((int)bits.x), sum = __int_as_float((int)bits.y);
        float value[2];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int *const upper = sums.upper[t] + 2 * r, lowest = sums.lowest[t / 2][2 * r + t % 2];
            const float dot = fmaf((float)upper[0], 65536.0f, fmaf((float)upper[1], 256.0f, (float)lowest));
            value[r] = here ? fmaf(line[r].slope, dot * size, line[r].base * sum) : 0.0f;
        }
        const float given = own % 2 ? value[0] : value[1];
        both[t] = (own % 2 ? value[1] : value[0]) + __shfl_xor_sync(0xffffffffu, given, 1);
    }
#pragma unroll
    for (int t = 0; t < T; t += 2) {
        const float second = both[t + (T > 1)], given = own / 2 ? both[t] : second, kept = own / 2 ? second : both[t];
        totals.of[t / 2] += kept + __shfl_xor_sync(0xffffffffu, given, 2);
    }
}

/* All steps of a warp; a path of its own for each alignment, so that the rarer one costs the other no registers. */
template <int T, int GROUP, int ALIGNED>
static __device__ __forceinline__ void add_steps(const MmaArguments &a, const Lines &at, const Span &span,
                                                 Totals<T> &totals) {
    constexpr int W = GROUP / 16;
    const int lane = threadIdx.x & 31, g = lane / 4, own = lane % 4, groups = span.groups;
    const bool holds = own == g / 2, holds_lowest = holds && (T > 1 || g % 2 == 0); /* a column of its own group */
    const int token_bytes = groups * 3 * GROUP, apart = holds ? token_bytes : 0;
    const byte *const x = a.digits + (long long)blockIdx.x * T * token_bytes;
    const byte *const zeros = a.digits + (long long)gridDim.x * T * token_bytes;
    const byte *upper = holds ? x + (g % 2) * GROUP : zeros;
    const byte *lowest = holds_lowest ? x + 2 * GROUP + (T > 1 ? g % 2 * token_bytes : 0) : zeros;
    const byte *factors = (const byte *)(a.factors + (long long)blockIdx.x * T * groups);
    KEEP(upper);
    KEEP(lowest);
    KEEP(factors);
    for (int step = span.first; step < span.end; ++step) {
        const int group = min(4 * step + own, groups - 1);
        Codes<W> codes;
        take<ALIGNED, W>(at, group, codes);
        Sums<T, W> sums = {};
        multiply<T, W>(codes, upper + (long long)group * (holds ? 3 * GROUP : 0),
                       lowest + (long long)group * (holds_lowest ? 3 * GROUP : 0), apart, sums);
        add_step<T, W>(codes, sums, factors + 8ll * group, groups, 4 * step + own < groups, own, totals);
    }
}

template <int T, int GROUP, int ALIGNED>
static __device__ __forceinline__ void add_part(const MmaArguments &a, const Lines &at, const Span &span,
                                                float *part) {
    const int lane = threadIdx.x & 31, g = lane / 4, own = lane % 4;
    if (T == 8 && GROUP > 32) {
        float total[2][2] = {};
        add_quads<(GROUP > 32 ? GROUP / 16 : 4), ALIGNED>(a, at, span, total);
#pragma unroll
        for (int r = 0; r < 2; ++r)
#pragma unroll
            for (int t = 0; t < 2; ++t) part[(g + 8 * r) * T + 2 * own + t] = total[r][t];
    } else {
        Totals<T> totals = {};
        add_steps<T, GROUP, ALIGNED>(a, at, span, totals);
        if (T > 1 || own < 2)
#pragma unroll
            for (int i = 0; i < (T + 1) / 2; ++i)
                part[(g + 8 * (own % 2)) * T + 2 * i + (T > 1 ? own / 2 : 0)] = totals.of[i];
    }
}

template <int T, int GROUP> static __device__ __forceinline__ void mma_kernel(const MmaArguments &a) {
    SHARED(float, parts); /* [WARPS, 16, T] */
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, block = blockIdx.x;
    const int groups = a.matrix[0].groups, steps = (groups + 3) / 4, each = (steps + WARPS - 1) / WARPS;
    const int aligned = a.matrices == 1 ? a.matrix[0].aligned : min(a.matrix[0].aligned, a.matrix[1].aligned);
    const int first = min(steps, warp * each);
    const Span span = {first, min(steps, first + each), groups};
    const Lines at = lines_at(a, (int)blockIdx.y * (a.matrices == 2 ? 8 : 16) + g);
    if (aligned == 16)
        add_part<T, GROUP, 16>(a, at, span, parts + warp * 16 * T);
    else
        add_part<T, GROUP, 0>(a, at, span, parts + warp * 16 * T);
    __syncthreads();
    finish<T>(a, parts, block, blockIdx.y);
}

#define MMA(T, GROUP, BLOCKS) \
    KERNEL_OF(BLOCKS, JOIN(mma, PLANES, T, GROUP), MmaArguments) { mma_kernel<T, GROUP>(a); }
#define MMA_MANY(GROUP, BLOCKS) \
    KERNEL_OF(BLOCKS, JOIN(mma, PLANES, 32, GROUP), MmaArguments) { many_kernel<GROUP>(a); }
#define MMAS(GROUP, FEW, MORE) MMA(1, GROUP, FEW) MMA(2, GROUP, FEW) MMA(4, GROUP, MORE) MMA(8, GROUP, 2)
#if IS_COMPILED(32)
MMAS(32, 3, 2)
#endif
#if IS_COMPILED(64) && PLANES < 3
MMAS(64, 3, 2) MMA_MANY(64, 2)
#elif IS_COMPILED(64)
MMAS(64, 2, 1) MMA_MANY(64, 2)
#endif
#if IS_COMPILED(128) && PLANES < 3
MMAS(128, 2, 1) MMA_MANY(128, 1)
#elif IS_COMPILED(128)
MMAS(128, 1, 1) MMA_MANY(128, 1)
#endif
