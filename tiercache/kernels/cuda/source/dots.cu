/* Products along the input for one token, or two one after the other: see products.cuh.
 *
 * A lane owns 64 columns, whose digits stay in its registers, 16 bytes of 2-bit codes a row in one load, and a warp
 * walks down the rows: neighbours in a row lie in neighbouring lanes, so that each load takes whole lines of memory.
 * Several rows are on their way while one is multiplied, by the instruction that adds four products of bytes: at int4
 * 1.9 instructions a weight. Lanes are added up for a batch of rows at once. A block does as many rows as leave each
 * multiprocessor two blocks.
 */
#include "products.cuh"

enum { BATCH = PLANES < 3 ? 4 : 2, LANE_COLUMNS = 64 };

static __device__ __forceinline__ int dot4(unsigned codes, unsigned digits, int sum) {
#ifndef __CUDACC_RTC__
    return shim_dot4(codes, digits, sum);
#elif __CUDA_ARCH__ >= 610
    int total;
    asm("dp4a.u32.s32 %0, %1, %2, %3;" : "=r"(total) : "r"(codes), "r"(digits), "r"(sum));
    return total;
#else
    return sum;
#endif
}

static __device__ __forceinline__ int with_neighbour(int sum) {
    return sum + __float_as_int(__shfl_xor_sync(0xffffffffu, __int_as_float(sum), 1));
}

template <int GROUP> struct Held { /* a lane's 64 columns of a row, as they lie; `low`: even words, then odd ones */
    static constexpr int SINGLES = GROUP == 128 ? 4 : 2, GROUPS = GROUP == 32 ? 2 : 1;
    unsigned top[4], mid[SINGLES], bit[SINGLES], low[8], scales[GROUPS];
};

template <int GROUP> struct Place64 { /* in bytes from the beginnings of planes and scales */
    int top, mid, bit, low, scales;
    int last; /* whether the lane's second group of 32 is none */
};

template <int GROUP> static __device__ __forceinline__ Place64<GROUP> place_of_unit(const Matrix &m, int unit) {
    Place64<GROUP> at;
    at.top = 16 * unit;
    at.bit = GROUP == 128 ? 16 * (unit / 2) : 8 * unit;
    at.mid = GROUP / 4 * m.groups + at.bit;
    at.low = GROUP == 128 ? 64 * (unit / 2) + 16 * (unit % 2) : 32 * unit;
    at.scales = GROUP == 128 ? 4 * (unit / 2) : GROUP == 64 ? 4 * unit : 8 * unit;
    at.last = GROUP == 32 && 2 * unit + 1 >= m.groups;
    return at;
}

/* The rows of a block, gate and up in turn; past the end: computed again, never written. */
static __device__ __forceinline__ void find_rows(const ProductArguments &a, Row *rows) {
    for (int i = threadIdx.x; i < a.per_block; i += blockDim.x) {
        const int item = min((int)blockIdx.y * a.per_block + i, a.count * a.matrices - 1);
        rows[i] = a.matrices == 2 ? row_place(a.matrix[item & 1], a.rows, item >> 1) : row_place(a.matrix[0], a.rows, item);
    }
    __syncthreads();
}

template <int ALIGNED, int GROUP>
static __device__ __forceinline__ void hold(const Row &row, const Place64<GROUP> &at, Held<GROUP> &held) {
    const byte *const top = row.top, *const bit = row.bit + at.bit, *const low = row.low + at.low;
    const byte *const scales = row.scales + at.scales;
    if constexpr (GROUP > 32 || ALIGNED > 0) {
        load_words<ALIGNED, 4>(top + at.top, held.top);
        load_words<ALIGNED, Held<GROUP>::SINGLES>(top + at.mid, held.mid);
        if (PLANES > 1) load_words<ALIGNED, Held<GROUP>::SINGLES>(bit, held.bit);
        if (PLANES > 2) load_words<ALIGNED, 4>(low, held.low);
        if (PLANES > 2) load_words<ALIGNED, 4>(low + (GROUP == 128 ? 32 : 16), held.low + 4);
        held.scales[0] = load_word<ALIGNED>(scales);
        if (GROUP == 32) held.scales[1] = load_word<ALIGNED>(scales + 4);
    } else {
        for (int i = 0; i < 2; ++i) { /* two groups of 32, or the first one twice */
            const int group = at.last ? 0 : i;
            load_words<0, 2>(top + at.top + 8 * group, held.top + 2 * i);
            held.mid[i] = load_word<0>(top + at.mid + 4 * group);
            if (PLANES > 1) held.bit[i] = load_word<0>(bit + 4 * group);
            if (PLANES > 2) load_words<0, 4>(low + 16 * group, held.low + 4 * i);
            held.scales[i] = load_word<0>(scales + 4 * group);
        }
    }
}

/* What word w adds to three sums. */
template <int GROUP>
static __device__ __forceinline__ void add_word(const Held<GROUP> &held, int w, int unit, const uint4 *x, int *sums) {
    const int single = GROUP == 32 ? w / 2 : GROUP == 64 ? w % 2 : w;
    const int second = GROUP == 32 ? w % 2 : GROUP == 64 ? w / 2 : unit % 2;
    const int even_at = GROUP == 32 ? w / 2 * 4 + w % 2 : w, odd_at = GROUP == 32 ? even_at + 2 : w + 4;
    const unsigned pairs = lower_pairs(held.mid[single], PLANES > 1 ? held.bit[single] : 0, second);
    const unsigned even = upper_codes(held.top[w], pairs, 0), odd = upper_codes(held.top[w], pairs, 1);
    const unsigned c = PLANES > 2 ? held.low[even_at] : 0, d = PLANES > 2 ? held.low[odd_at] : 0;
    const unsigned first = code_bytes<false>(even, c), next = code_bytes<false>(odd, d);
    const unsigned third = code_bytes<true>(even, c), last = code_bytes<true>(odd, d);
#pragma unroll
    for (int piece = 0; piece < 3; ++piece) {
        const uint4 digits = x[4 * piece + w];
        sums[piece] = dot4(first, digits.x, dot4(next, digits.y, sums[piece]));
        sums[piece] = dot4(third, digits.z, dot4(last, digits.w, sums[piece]));
    }
}

struct Factor {
    float size, sum;
    bool here; /* whether the group is one */
};

template <int GROUP>
static __device__ __forceinline__ float lane_value(const Held<GROUP> &held, int unit, const uint4 *x,
                                                   const Factor *factor) {
    int sums[2][3] = {};
#pragma unroll
    for (int w = 0; w < 4; ++w) add_word<GROUP>(held, w, unit, x, sums[GROUP == 32 ? w / 2 : 0]);
    float value[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < Held<GROUP>::GROUPS; ++i) {
#pragma unroll
        for (int piece = 0; piece < (GROUP == 128 ? 3 : 0); ++piece) /* two lanes have a group */
            sums[0][piece] = with_neighbour(sums[0][piece]);
        const float found = value_of(sums[i][0], sums[i][1], sums[i][2], code_line(held.scales[i]), factor[i].size,
                                     factor[i].sum);
        value[i] = factor[i].here ? found : 0.0f;
    }
    return GROUP == 32 ? value[0] + value[1] : value[0];
}

/* Adds up all lanes for each row of the batch; row i is then in lane i. */
template <int GROUP> static __device__ __forceinline__ float added_up(const float *value, int lane) {
    float half[BATCH / 2];
#pragma unroll
    for (int i = 0; i < BATCH; i += 2) {
        const float kept = lane & 1 ? value[i + 1] : value[i], given = lane & 1 ? value[i] : value[i + 1];
        half[i / 2] = GROUP == 128 ? kept : kept + __shfl_xor_sync(0xffffffffu, given, 1);
    }
    const float kept = lane & 2 ? half[BATCH / 2 - 1] : half[0], given = lane & 2 ? half[0] : half[BATCH / 2 - 1];
    float sum = kept + __shfl_xor_sync(0xffffffffu, given, 2);
    for (int far = 4; far < 32; far *= 2) sum += __shfl_xor_sync(0xffffffffu, sum, far);
    return sum;
}

/* The rows of a block, for a chunk of columns, into sums [per_block, chunks]. */
template <int GROUP, int ALIGNED>
static __device__ __forceinline__ void walk(const ProductArguments &a, int chunk, int chunks, const Row *rows,
                                            float *sums) {
    const int lane = threadIdx.x & 31, turns = blockDim.x / 32 / a.across, turn = threadIdx.x / 32 / a.across;
    const int groups = a.matrix[0].groups, units = (groups * GROUP + LANE_COLUMNS - 1) / LANE_COLUMNS;
    const int wanted = chunk * 32 + lane, unit = min(wanted, units - 1), token = blockIdx.x;
    const Place64<GROUP> at = place_of_unit<GROUP>(a.matrix[0], unit);
    uint4 x[12];
    Factor factor[2];
    const byte *const digits = a.digits + ((long long)token * chunks + chunk) * 12 * 512 + 16 * lane;
#pragma unroll
    for (int i = 0; i < 12; ++i) x[i] = fetch_four(digits + 512 * i);
#pragma unroll
    for (int i = 0; i < Held<GROUP>::GROUPS; ++i) {
        const int group = GROUP == 128 ? unit / 2 : Held<GROUP>::GROUPS * unit + i;
        const uint2 bits = fetch_two(a.factors + 8 * ((long long)token * groups + min(group, groups - 1)));
        factor[i].size = __int_as_float((int)bits.x), factor[i].sum = __int_as_float((int)bits.y);
        factor[i].here = wanted < units && group < groups;
    }
    const int stride = turns * BATCH, end = a.per_block - 1;
    Held<GROUP> held[BATCH];
#pragma unroll
    for (int i = 0; i < BATCH; ++i) hold<ALIGNED>(rows[min(turn * BATCH + i, end)], at, held[i]);
#pragma unroll 1
    for (int row = turn * BATCH; row < a.per_block; row += stride) {
        float value[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            value[i] = lane_value<GROUP>(held[i], unit, x, factor);
            if (row + stride < a.per_block) hold<ALIGNED>(rows[min(row + stride + i, end)], at, held[i]);
        }
        const float sum = added_up<GROUP>(value, lane);
        if (lane < BATCH && row + lane < a.per_block) sums[(row + lane) * chunks + chunk] = sum;
    }
}

template <int GROUP> static __device__ __forceinline__ void dots_kernel(const ProductArguments &a) {
    SHARED(Row, rows); /* [per_block], then float [per_block, chunks] */
    float *const sums = (float *)(rows + a.per_block);
    const int groups = a.matrix[0].groups, chunks = (groups * GROUP + CHUNK - 1) / CHUNK;
    const int aligned = a.matrices == 1 ? a.matrix[0].aligned : min(a.matrix[0].aligned, a.matrix[1].aligned);
    find_rows(a, rows);
    for (int chunk = threadIdx.x / 32 % a.across; chunk < chunks; chunk += a.across) {
        if (aligned == 16 && groups * GROUP % LANE_COLUMNS == 0)
            walk<GROUP, 16>(a, chunk, chunks, rows, sums);
        else
            walk<GROUP, 0>(a, chunk, chunks, rows, sums);
    }
    __syncthreads();
    const int high = a.per_block / a.matrices, first = blockIdx.y * high;
    for (int i = threadIdx.x; i < high; i += blockDim.x) {
        float found[2] = {0.0f, 0.0f};
        for (int chunk = 0; chunk < chunks; ++chunk) {
            found[0] += sums[i * a.matrices * chunks + chunk];
            if (a.matrices == 2) found[1] += sums[(2 * i + 1) * chunks + chunk];
        }
        put_result(a, first + i, blockIdx.x, found[0], found[1]);
    }
}

#define DOTS(GROUP) \
    SIZED_KERNEL(256, 2, JOIN(dots, PLANES, 1, GROUP), ProductArguments) { dots_kernel<GROUP>(a); }
#if IS_COMPILED(32)
DOTS(32)
#endif
#if IS_COMPILED(64)
DOTS(64)
#endif
#if IS_COMPILED(128)
DOTS(128)
#endif
