/* Weights in fp32, bit for bit what planes.decode gives, for products with many tokens. */
#include "planes.cuh"

struct DecodeArguments {
    Matrix matrix;
    RowLists rows;
    float *out;                /* [count, padded columns] */
    int columns, count;
};

static __device__ __forceinline__ void decoded(const DecodeArguments &a, unsigned codes, unsigned scales, int column,
                                               float *row) {
    const float lo = half_to_float((half_bits)(scales & 0xffffu)), step = half_to_float((half_bits)(scales >> 16));
    float w[4] = {code_float<0>(codes), code_float<1>(codes), code_float<2>(codes), code_float<3>(codes)};
#pragma unroll
    for (int k = 0; k < 4; ++k) { /* step times the bracket has at most 20 bits: the fused sum rounds as two do */
        w[k] = fmaf(step, fmaf(UNIT, w[k], OFFSET), lo);
    }
    *(float4 *)(row + column) = make_float4(w[0], w[1], w[2], w[3]);
}

static __device__ __forceinline__ void decode_kernel(const DecodeArguments &a) {
    const Matrix &m = a.matrix;
    const int words = m.group >> 4, at = blockIdx.y * THREADS + threadIdx.x, item = blockIdx.x;
    if (at >= m.groups * words) return;
    const Place place = place_of(m, at);
    const Word word = word_of(m, a.rows, item, place);
    const unsigned pairs = lower_pairs(word.mid, word.bit, place.second);
    const unsigned even = upper_codes(word.top, pairs, 0), odd = upper_codes(word.top, pairs, 1);
    float *const row = a.out + (long long)item * m.groups * m.group;
    const int column = at / words * m.group + 4 * (at % words), next = m.group >> 2;
    decoded(a, merged<false>(even, word.even), word.scales, column, row);
    decoded(a, merged<false>(odd, word.odd), word.scales, column + next, row);
    decoded(a, merged<true>(even, word.even), word.scales, column + 2 * next, row);
    decoded(a, merged<true>(odd, word.odd), word.scales, column + 3 * next, row);
}

KERNEL(JOIN(decode, PLANES, 0, 0), DecodeArguments) { decode_kernel(a); }
