/* Products across the rows, for up to 8 tokens a pass: out[t, c] += sum over i of x[t, i] W[rows[i], c].
 *
 * A block owns a strip of columns and a slice of the rows; its warps take the slice's rows in turn, each lane the
 * columns of one word (for 8 tokens: of half a word, or the sums would not fit the registers). Of a row a warp loads
 * 128 bytes of 2-bit codes, one full request over a link, 64 of each plane of single bits, whose words two lanes share,
 * and 256 of the 4-bit plane (for 8 tokens half of each). Warps are added up in shared memory, slices by `sum`, both in
 * a fixed order: no atomics, the same bits each time. fp32 for the reason given in rows.cu.
 */
#include "planes.cuh"

struct DownArguments {
    Matrix matrix;
    const float *x;   /* [blocks, count, T] */
    RowLists rows;
    float *partial;   /* [slices, blocks, T, padded columns] */
    int count, per_slice;
};

template <int T, int INDEX, int QUARTERS>
static __device__ __forceinline__ void spread(unsigned codes, Line line, const float *x, float (*sum)[QUARTERS][4]) {
    const float w[4] = {
        fmaf(line.slope, code_float<0>(codes), line.base), fmaf(line.slope, code_float<1>(codes), line.base),
        fmaf(line.slope, code_float<2>(codes), line.base), fmaf(line.slope, code_float<3>(codes), line.base)};
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[t][INDEX][k] = fmaf(x[t], w[k], sum[t][INDEX][k]);
}

/* Adds row `item` of the selection, times x, to a lane's sums. `half` picks the quarters half, half + SPLIT, ... */
template <int T, int SPLIT>
static __device__ __forceinline__ void add_row(const DownArguments &given, int item, const Place &place, int half,
                                               const float *from, float (*sum)[4 / SPLIT][4]) {
    const Word word = word_of(given.matrix, given.rows, item, place);
    const Line line = line_of(word.scales);
    const unsigned pairs = lower_pairs(word.mid, word.bit, place.second);
    float x[T];
#pragma unroll
    for (int t = 0; t < T; ++t) x[t] = from[t];
    if (SPLIT == 1) {
        const unsigned even = upper_codes(word.top, pairs, 0), odd = upper_codes(word.top, pairs, 1);
        spread<T, 0, 4 / SPLIT>(merged<false>(even, word.even), line, x, sum);
        spread<T, 1, 4 / SPLIT>(merged<false>(odd, word.odd), line, x, sum);
        spread<T, 4 / SPLIT - 2, 4 / SPLIT>(merged<true>(even, word.even), line, x, sum);
        spread<T, 4 / SPLIT - 1, 4 / SPLIT>(merged<true>(odd, word.odd), line, x, sum);
    } else {
        const unsigned h = upper_codes(word.top, pairs, half), c = half ? word.odd : word.even;
        spread<T, 0, 4 / SPLIT>(merged<false>(h, c), line, x, sum);
        spread<T, 1, 4 / SPLIT>(merged<true>(h, c), line, x, sum);
    }
}

template <int T> static __device__ __forceinline__ void down_kernel(const DownArguments &a) {
    constexpr int SPLIT = T > 4 ? 2 : 1, QUARTERS = 4 / SPLIT, SUMS = T * QUARTERS * 4;
    SHARED(float, shared); /* [WARPS / 2, SUMS, 32] */
    const Matrix &m = a.matrix;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, unit = blockIdx.x * 32 + lane;
    const int word = unit / SPLIT, half = unit % SPLIT, words = m.groups * (m.group >> 4);
    const int start = blockIdx.y * a.per_slice, end = min(a.count, start + a.per_slice);
    const float *const x = a.x + (long long)blockIdx.z * a.count * T;
    float sum[T][QUARTERS][4] = {};
    if (word < words) {
        const Place place = place_of(m, word);
#pragma unroll 2
        for (int i = start + warp; i < end; i += WARPS)
            add_row<T, SPLIT>(a, i, place, half, x + (long long)i * T, sum);
    }
    float *const flat = &sum[0][0][0];
    for (int left = WARPS / 2; left; left /= 2) { /* the upper half of the warps hands over to the lower */
        float *const slot = shared + (warp % left) * SUMS * 32 + lane;
        if (warp >= left && warp < 2 * left)
#pragma unroll
            for (int e = 0; e < SUMS; ++e) slot[e * 32] = flat[e];
        __syncthreads();
        if (warp < left)
#pragma unroll
            for (int e = 0; e < SUMS; ++e) flat[e] += slot[e * 32];
        __syncthreads();
    }
    if (warp != 0 || word >= words) return;
    const int padded = m.groups * m.group, in_group = m.group >> 4;
    const long long block = (long long)blockIdx.y * gridDim.z + blockIdx.z;
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
        for (int i = 0; i < QUARTERS; ++i) {
            const int q = half + SPLIT * i;
            const int column = word / in_group * m.group + q * (m.group >> 2) + 4 * (word % in_group);
            *(float4 *)(a.partial + (block * T + t) * padded + column) =
                make_float4(sum[t][i][0], sum[t][i][1], sum[t][i][2], sum[t][i][3]);
        }
}

#define DOWN(T) \
    KERNEL(JOIN(down, PLANES, T, 1), DownArguments) { down_kernel<T>(a); }
DOWN(1) DOWN(2) DOWN(4) DOWN(8)
