/* What the kernels for whole numbers share (dots.cu, mma.cu): products along the input.
 *
 * Activations come as whole numbers of 23 bits, in steps of a power of two for each token and group, and those as three
 * signed bytes (`digits`). A group's sum of codes times digits is then an exact integer, whatever unit adds it up and in
 * whatever order. From there on sums are fp32 in one order, that of columns alone: groups two by two up to CHUNK
 * columns, chunks one after another. A token's bits depend neither on its company, nor on the grid, nor on the kernel.
 */
#ifndef TIERCACHE_PRODUCTS_CUH
#define TIERCACHE_PRODUCTS_CUH

#include "planes.cuh"

enum { CHUNK = 2048, STAGE = 512, STEP = 256 }; /* columns */

struct ProductArguments {
    Matrix matrix[2];    /* gate and up, or one */
    const byte *digits;  /* in the order of `digit_place` */
    const byte *factors; /* for each token and group the size of a step and the group's sum, two floats */
    RowLists rows;       /* of both matrices */
    float *out;          /* [tokens, count], or hidden [blocks, count, block] */
    long long out_pitch;
    int count, tokens, matrices, activation; /* -1: add sums to out */
    int block;                               /* tokens of a block of hidden */
    int per_block, across;                   /* dots.cu: rows of a block; its warps beside one another */
    int sharers;                             /* mma.cu: warps that share 16 rows */
};

/* What three sums of codes times digits and the group's line come to. */
static __device__ __forceinline__ float value_of(int upper, int middle, int lowest, Line line, float size, float sum) {
    const float dot = fmaf((float)upper, 65536.0f, fmaf((float)middle, 256.0f, (float)lowest));
    return fmaf(line.slope, dot * size, line.base * sum);
}

/* Writes a result; `up` is that of the second matrix. */
static __device__ __forceinline__ void put_result(const ProductArguments &a, int item, int token, float found, float up) {
    if (item >= a.count || token >= a.tokens) return;
    if (a.activation >= 0) {
        const long long row = (long long)(token / a.block) * a.count + item;
        a.out[row * a.block + token % a.block] = activated(found, a.activation) * (a.matrices == 2 ? up : 1.0f);
    } else {
        a.out[token * a.out_pitch + item] += found;
    }
}

#endif
