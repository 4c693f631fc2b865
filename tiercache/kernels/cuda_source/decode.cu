/* Weights in fp32, bit for bit what planes.decode gives, for products with many tokens. */
#include "planes.cuh"

struct DecodeArguments {
    Matrix matrix;
    RowLists rows;
    float *out; /* [count, padded columns] */
    int first, count; /* of the selection */
};

template <int Q>
static __device__ __forceinline__ void decoded(unsigned a, unsigned b, unsigned low, float lo, float step, float *out) {
    unsigned codes = merged<Q>(a, b, low);
    float shift = 8388607.5f; /* 2^23 - 1/2 */
    if (PLANES < 3) codes = (codes & 0x7f7f7f7fu) << 1, shift = 8388608.0f;
    float w[4]; /* step times the code has at most 20 bits: exact, so the fused sum rounds as the separate one does */
    w[0] = fmaf(step, __int_as_float((int)__byte_perm(codes, 0x4b000000u, 0x7440u)) - shift, lo);
    w[1] = fmaf(step, __int_as_float((int)__byte_perm(codes, 0x4b000000u, 0x7441u)) - shift, lo);
    w[2] = fmaf(step, __int_as_float((int)__byte_perm(codes, 0x4b000000u, 0x7442u)) - shift, lo);
    w[3] = fmaf(step, __int_as_float((int)__byte_perm(codes, 0x4b000000u, 0x7443u)) - shift, lo);
    *(float4 *)out = make_float4(w[0], w[1], w[2], w[3]);
}

static __device__ __forceinline__ void decode_kernel(const DecodeArguments &a) {
    const Matrix &m = a.matrix;
    const int words = m.groups * (m.group >> 4), in_group = m.group >> 4;
    const int word = blockIdx.y * THREADS + threadIdx.x, item = blockIdx.x;
    if (word >= words) return;
    const int group = word / in_group, within = word % in_group, from = a.first + item;
    const byte *tops = m.plane[0] + row_of(a.rows, 0, from) * m.pitch[0];
    const byte *mids = PLANES > 1 ? m.plane[1] + row_of(a.rows, 1, from) * m.pitch[1] : 0;
    const byte *lows = PLANES > 2 ? m.plane[2] + row_of(a.rows, 2, from) * m.pitch[2] : 0;
    if (PLANES > 2) lows += group * (m.group >> 1) + 4 * within;
    const unsigned first = load_word(tops + 4 * word, m.aligned);
    const unsigned second = PLANES > 1 ? load_word(mids + 4 * word, m.aligned) : 0;
    const unsigned even = PLANES > 2 ? load_word(lows, m.aligned) : 0;
    const unsigned odd = PLANES > 2 ? load_word(lows + (m.group >> 2), m.aligned) : 0;
    const unsigned both = load_word(m.scales + row_of(a.rows, 3, from) * m.scales_pitch + 4 * group, m.aligned);
    const float lo = half_to_float((half_bits)(both & 0xffffu)), step = half_to_float((half_bits)(both >> 16));
    float *const out = a.out + (long long)item * m.groups * m.group + group * m.group + 4 * within;
    decoded<0>(first, second, even, lo, step, out);
    decoded<1>(first, second, odd, lo, step, out + (m.group >> 2));
    decoded<2>(first, second, even, lo, step, out + 2 * (m.group >> 2));
    decoded<3>(first, second, odd, lo, step, out + 3 * (m.group >> 2));
}

KERNEL(JOIN(decode, PLANES, 0, 0), DecodeArguments) { decode_kernel(a); }
