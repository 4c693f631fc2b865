/* Part of mma.cu: 8 tokens, where four lanes share a group. */
#ifndef TIERCACHE_QUADS_CUH
#define TIERCACHE_QUADS_CUH

#include "mma.cuh"

/* For 8 tokens and groups of 64 or 128: the four lanes of a row share a group, each with every fourth of its words, and
 * the instruction's 8 columns are tokens, one byte of theirs after another. Sums of rows g and g + 8 for tokens 2 own
 * and 2 own + 1 are then a lane's. The same values in the same order as above. */
template <int W> struct Quads { /* a lane's words of the four groups of a step, of one row */
    unsigned top[4][W / 4], mid[4][W / 4], bit[4][W / 4], even[4][W / 4], odd[4][W / 4];
    Line line; /* of group `own` */
};

/* `at` of the lane's own first word. */
template <int ALIGNED, int W>
static __device__ __forceinline__ void take_quads(const Lines &at, int r, int first, int groups, int own,
                                                  Quads<W> &codes) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int group = min(first + j, groups - 1);
        const byte *const top = at.top[r] + (long long)group * (4 * W);
        const byte *const mid = at.mid[r] + (long long)group * (2 * W);
        const byte *const bit = PLANES > 1 ? at.bit[r] + (long long)group * (2 * W) : 0;
        const byte *const low = PLANES > 2 ? at.low[r] + (long long)group * (8 * W) : 0;
#pragma unroll
        for (int i = 0; i < W / 4; ++i) { /* of groups of 128, both words have the same single bits */
            codes.top[j][i] = load_word<ALIGNED>(top + 16 * i);
            codes.even[j][i] = PLANES > 2 ? load_word<ALIGNED>(low + 16 * i) : 0;
            codes.odd[j][i] = PLANES > 2 ? load_word<ALIGNED>(low + 16 * i + 4 * W) : 0;
            codes.mid[j][i] = i ? codes.mid[j][0] : load_word<ALIGNED>(mid);
            codes.bit[j][i] = i ? codes.bit[j][0] : PLANES > 1 ? load_word<ALIGNED>(bit) : 0;
        }
    }
    codes.line = code_line(load_word<ALIGNED>(at.scales[r] + 4ll * min(first + own, groups - 1)));
}

template <int W>
static __device__ __forceinline__ void quad_bytes(const Quads<W> &codes, int j, int i, int own, int r,
                                                  unsigned (*quarter)[2]) {
    const int second = own + 4 * i >= W / 2;
    const unsigned pairs = lower_pairs(codes.mid[j][i], codes.bit[j][i], second);
    const unsigned even = upper_codes(codes.top[j][i], pairs, 0), odd = upper_codes(codes.top[j][i], pairs, 1);
    quarter[0][r] = code_bytes<false>(even, codes.even[j][i]), quarter[1][r] = code_bytes<false>(odd, codes.odd[j][i]);
    quarter[2][r] = code_bytes<true>(even, codes.even[j][i]), quarter[3][r] = code_bytes<true>(odd, codes.odd[j][i]);
}

/* Where the lane's own first words lie. */
template <int W> static __device__ __forceinline__ void to_own_words(Lines &at, int own) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        at.top[r] += 4 * own, at.mid[r] += 4 * (own % (W / 2));
        if (PLANES > 1) at.bit[r] += 4 * (own % (W / 2));
        if (PLANES > 2) at.low[r] += 4 * own;
        KEEP(at.top[r]);
        KEEP(at.mid[r]);
        if (PLANES > 1) KEEP(at.bit[r]);
        if (PLANES > 2) KEEP(at.low[r]);
    }
}

/* Codes of the lane's words of a group, of both rows, times the digits of 8 tokens. */
template <int W>
static __device__ __forceinline__ void dots_of(const unsigned (*quarter)[4][2], const byte *x, int (*dots)[4]) {
#pragma unroll
    for (int i = 0; i < W / 4; ++i)
#pragma unroll
        for (int piece = 0; piece < 3; ++piece) {
            const uint4 b = fetch_four(x + piece * 16 * W + 64 * i);
            mma(dots[piece], quarter[i][0], quarter[i][1], b.x, b.y);
            mma(dots[piece], quarter[i][2], quarter[i][3], b.z, b.w);
        }
}

/* What a group adds to the sum of row r and token t of the lane's two; `factor`: bits of its size and sum. */
static __device__ __forceinline__ float value_of(const int (*dots)[4], int r, int t, float slope, float base,
                                                 uint2 factor) {
    const int at = 2 * r + t;
    const float dot = fmaf((float)dots[0][at], 65536.0f, fmaf((float)dots[1][at], 256.0f, (float)dots[2][at]));
    return fmaf(slope, dot * __int_as_float((int)factor.x), base * __int_as_float((int)factor.y));
}

/* `total`: [row, token] of 2 own and the next. */
template <int W, int ALIGNED>
static __device__ __forceinline__ void add_quads(const MmaArguments &a, Lines at, const Span &span,
                                                 float (*total)[2]) {
    constexpr int GROUP = 16 * W;
    const int lane = threadIdx.x & 31, g = lane / 4, own = lane % 4, groups = span.groups;
    to_own_words<W>(at, own);
    const byte *x = a.digits + ((long long)blockIdx.x * 8 + g) * groups * 3 * GROUP + 16 * own;
    const byte *factors = (const byte *)(a.factors + ((long long)blockIdx.x * 8 + 2 * own) * groups);
    const long long apart = 8ll * groups; /* tokens' factors */
    KEEP(x);
    KEEP(factors);
    for (int step = span.first; step < span.end; ++step) {
        Quads<W> codes[2];
        take_quads<ALIGNED, W>(at, 0, 4 * step, groups, own, codes[0]);
        take_quads<ALIGNED, W>(at, 1, 4 * step, groups, own, codes[1]);
        float pair[2][2], sum[2][2] = {};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int group = min(4 * step + j, groups - 1);
            const byte *const here = x + (long long)group * (3 * GROUP);
            unsigned quarter[W / 4][4][2];
#pragma unroll
            for (int i = 0; i < W / 4; ++i) {
                quad_bytes<W>(codes[0], j, i, own, 0, quarter[i]);
                quad_bytes<W>(codes[1], j, i, own, 1, quarter[i]);
            }
            int dots[3][4] = {};
            dots_of<W>(quarter, here, dots);
            const byte *const factor = factors + 8ll * group;
            const uint2 bits[2] = {fetch_two(factor), fetch_two(factor + apart)};
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const float slope = __shfl_sync(0xffffffffu, codes[r].line.slope, (threadIdx.x & 28) + j);
                const float base = __shfl_sync(0xffffffffu, codes[r].line.base, (threadIdx.x & 28) + j);
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    const float value = 4 * step + j < groups ? value_of(dots, r, t, slope, base, bits[t]) : 0.0f;
                    pair[r][t] = j % 2 ? pair[r][t] + value : value;
                    if (j == 1) sum[r][t] = pair[r][t];
                    if (j == 3) total[r][t] += sum[r][t] + pair[r][t];
                }
            }
        }
    }
}

#endif
