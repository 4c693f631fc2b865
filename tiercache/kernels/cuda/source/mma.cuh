/* What the kernels for matrix units share: their arguments, the instruction, and what becomes of a block's sums. */
#ifndef TIERCACHE_MMA_CUH
#define TIERCACHE_MMA_CUH

#include "planes.cuh"

struct MmaArguments {
    Matrix matrix[2];      /* gate and up, or one */
    const byte *digits;    /* [blocks, T, groups, 3, group], 128 zeros at the end */
    const float2 *factors; /* [blocks, T, groups]: size of a step, and the group's sum */
    RowLists rows;         /* of both matrices */
    float *out;            /* [tokens, count], or hidden [blocks, count, T] */
    long long out_pitch;
    int count, tokens, matrices, activation; /* -1: add sums to out */
    int sharers, padding;                    /* warps that share the parts of 16 rows, in many.cuh */
};

struct Lines { /* where two rows lie */
    const byte *top[2], *mid[2], *bit[2], *low[2], *scales[2];
};

static __device__ __forceinline__ Lines lines_at(const MmaArguments &a, int first) {
    Lines at;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        int item = a.matrices == 2 ? first : first + 8 * r;
        item = item < a.count ? item : a.count - 1; /* past the end: computed again, never written */
        const Matrix &m = a.matrix[a.matrices == 2 ? r : 0];
        at.top[r] = m.plane[0] + row_of(a.rows, 0, item) * m.pitch[0];
        at.mid[r] = at.top[r] + (m.group >> 2) * m.groups;
        at.bit[r] = PLANES > 1 ? m.plane[1] + row_of(a.rows, 1, item) * m.pitch[1] : 0;
        at.low[r] = PLANES > 2 ? m.plane[2] + row_of(a.rows, 2, item) * m.pitch[2] : 0;
        at.scales[r] = m.scales + row_of(a.rows, 3, item) * m.scales_pitch;
        KEEP(at.top[r]);
        KEEP(at.mid[r]);
        KEEP(at.scales[r]);
        if (PLANES > 1) KEEP(at.bit[r]);
        if (PLANES > 2) KEEP(at.low[r]);
    }
    return at;
}

struct Span { /* steps of a warp, groups of a row */
    int first, end, groups;
};

/* sums += codes * digits, 16 x 32 x 8: `first` has columns 4 (lane % 4) of rows lane / 4 and lane / 4 + 8, `second`
 * those 16 further on; x and y the same columns of the digits' column lane / 4; sums are of columns 2 (lane % 4) and
 * the next, of both rows. */
static __device__ __forceinline__ void mma(int *sums, const unsigned *first, const unsigned *second, unsigned x,
                                           unsigned y) {
#ifdef __CUDACC_RTC__
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
        : "r"(first[0]), "r"(first[1]), "r"(second[0]), "r"(second[1]), "r"(x), "r"(y));
#else
    shim_mma(sums, first, second, x, y);
#endif
}

/* Adds up the parts of 16 rows and writes them. */
template <int T>
static __device__ __forceinline__ void finish(const MmaArguments &a, const float *parts, int block, int tile) {
    const int rows = a.matrices == 2 ? 8 : 16, i = threadIdx.x, row = i / T, t = i % T;
    const int item = tile * rows + row, token = block * T + t;
    if (row >= rows || item >= a.count) return;
    float sum[2] = {0.0f, 0.0f};
#pragma unroll
    for (int part = 0; part < WARPS; ++part) {
        sum[0] += parts[(part * 16 + row) * T + t];
        if (a.matrices == 2) sum[1] += parts[(part * 16 + row + 8) * T + t];
    }
    if (a.activation >= 0)
        a.out[((long long)block * a.count + item) * T + t] =
            activated(sum[0], a.activation) * (a.matrices == 2 ? sum[1] : 1.0f);
    else if (token < a.tokens)
        a.out[token * a.out_pitch + item] += sum[0];
}

#endif
