/* What down.cu (few tokens) and downs.cu (many) share: arguments, and in which order rows are added up. downmma.cu has
 * the same arguments and an order of its own. */
#ifndef TIERCACHE_DOWN_CUH
#define TIERCACHE_DOWN_CUH

#include "planes.cuh"

enum { X_ROWS = 128 }; /* whose places and x a block of down.cu has room for; classes are no more */

struct DownArguments {
    Matrix matrix;
    const byte *x;
    long long block_stride, token_stride, row_stride; /* in elements: between blocks, tokens of a block, rows */
    RowLists rows;
    float *partial; /* [slices, or sums of `merged` of them; padded tokens, padded columns] */
    int kind;       /* of x: 0 fp32, 1 fp16, 2 bf16 */
    int block_shift, tokens, /* a block of x has 1 << block_shift tokens */
        padded_tokens, count, per_slice, wide, classes, merged,
        most; /* rows that a block of down.cu has at once: a multiple of the classes */
};

static __device__ __forceinline__ float given(const DownArguments &a, int token, int item) {
    if (token >= a.tokens) return 0.0f;
    const int within = token & ((1 << a.block_shift) - 1);
    const long long at = (token >> a.block_shift) * a.block_stride + within * a.token_stride;
    const long long i = at + item * a.row_stride;
    if (a.kind == 0) return ((const float *)a.x)[i];
    const half_bits bits = ((const half_bits *)a.x)[i];
    return a.kind == 1 ? half_to_float(bits) : __int_as_float((int)((unsigned)bits << 16));
}

#endif
