/* Products across the rows: out[t, c] += sum over i of x[t, i] W[rows[i], c].
 *
 * A block owns a slice of the rows and a strip of columns. Its threads stand in `classes` lines of `wide` threads; a
 * line takes every `classes`-th row of the slice, each of its threads W words of it: for one token a whole group of 64,
 * 16 bytes of 2-bit codes in one load. Of a row of 4096 columns 64 threads take all, 8 lines read 8 rows at once, and
 * the next row's bytes are on their way while this one is multiplied. For more tokens threads own fewer words, so that
 * the sums fit the registers, and more blocks share the columns: slices and lines, and so the order of a sum, stay the
 * same. Lines are added up in shared memory, slices by `sum`, both in a fixed order: no atomics.
 *
 * A weight is base + slope * code, so that a thread multiplies x by the slope once a row and adds x times the base to
 * one sum of its own: a weight costs a byte permutation and a multiply-add a token. For cards without matrix units for
 * bytes; the others have downmma.cu.
 */
#include "down.cuh"

enum { LINE_THREADS = 512 };

template <int W, int GROUP> struct Held { /* W words of a row, as they lie */
    static constexpr int SINGLES = W < GROUP / 32 ? W : GROUP / 32;
    unsigned top[W], mid[SINGLES], bit[SINGLES], even[W], odd[W], scales;
};

struct Unit { /* where a thread's words lie in any row, in bytes */
    int top, mid, bit, low, scales, first; /* first: the group's word that is the first */
};

template <int W, int GROUP> static __device__ __forceinline__ Unit unit_of(const Matrix &m, int unit) {
    constexpr int UNITS = GROUP / 16 / W, SINGLES = GROUP / 32; /* of a group */
    const int group = unit / UNITS, first = unit % UNITS * W;
    Unit at;
    at.top = 4 * W * unit;
    at.bit = 4 * (group * SINGLES + first % SINGLES);
    at.mid = GROUP / 4 * m.groups + at.bit;
    at.low = group * (GROUP / 2) + 4 * first;
    at.scales = 4 * group;
    at.first = first;
    return at;
}

template <int ALIGNED, int W, int GROUP>
static __device__ __forceinline__ void hold(const Row &row, const Unit &at, Held<W, GROUP> &held) {
    constexpr int SINGLES = Held<W, GROUP>::SINGLES;
    const byte *const top = row.top, *const bit = row.bit, *const low = row.low, *const scales = row.scales;
    load_words<ALIGNED, W>(top + at.top, held.top);
    if (PLANES > 2) load_words<ALIGNED, W>(low + at.low, held.even);
    if (PLANES > 2) load_words<ALIGNED, W>(low + at.low + GROUP / 4, held.odd);
    load_words<ALIGNED, SINGLES>(top + at.mid, held.mid);
    if (PLANES > 1) load_words<ALIGNED, SINGLES>(bit + at.bit, held.bit);
    load_words<ALIGNED, 1>(scales + at.scales, &held.scales);
}

template <int T> static __device__ __forceinline__ void spread(unsigned codes, const float *x, float (*sum)[4]) {
    const float w[4] = {code_float<0>(codes), code_float<1>(codes), code_float<2>(codes), code_float<3>(codes)};
#pragma unroll
    for (int t = 0; t < T; ++t)
#pragma unroll
        for (int k = 0; k < 4; ++k) sum[t][k] = fmaf(x[t], w[k], sum[t][k]);
}

/* sum: [word, quarter, token, column]; bases: [token]. */
template <int T, int W, int GROUP>
static __device__ __forceinline__ void add_row(const Held<W, GROUP> &held, int first, const float *x,
                                               float (*sum)[4][T][4], float *bases) {
    const Line line = line_of(held.scales);
    float scaled[T];
#pragma unroll
    for (int t = 0; t < T; ++t) {
        scaled[t] = x[t] * line.slope;
        bases[t] = fmaf(x[t], line.base, bases[t]);
    }
#pragma unroll
    for (int w = 0; w < W; ++w) {
        constexpr int SINGLES = GROUP / 32; /* of a group; with W of them or more, which half is known here */
        const int second = W > SINGLES ? w >= SINGLES : first >= SINGLES, single = W > SINGLES ? w % SINGLES : w;
        const unsigned bit = PLANES > 1 ? held.bit[single] : 0, pairs = lower_pairs(held.mid[single], bit, second);
        const unsigned even = upper_codes(held.top[w], pairs, 0), odd = upper_codes(held.top[w], pairs, 1);
        const unsigned c = PLANES > 2 ? held.even[w] : 0, d = PLANES > 2 ? held.odd[w] : 0;
        spread<T>(merged<false>(even, c), scaled, sum[w][0]);
        spread<T>(merged<false>(odd, d), scaled, sum[w][1]);
        spread<T>(merged<true>(even, c), scaled, sum[w][2]);
        spread<T>(merged<true>(odd, d), scaled, sum[w][3]);
    }
}

/* The rows of a slice, up to X_ROWS at a time, whose places and x lie in shared memory meanwhile. A few rows are
 * on their way while the few before are multiplied. */
template <int T, int W, int GROUP, int ALIGNED>
static __device__ __forceinline__ void add_rows(const DownArguments &a, const Unit &at, bool takes, Row *rows,
                                                float (*sum)[4][T][4], float *bases) {
    constexpr int FEW = (W == 1 ? 4 : 2) / (PLANES < 3 ? 1 : 2);
    float *const shared = (float *)(rows + X_ROWS);
    const int line = threadIdx.x / a.wide, start = blockIdx.y * a.per_slice, end = min(a.count, start + a.per_slice);
#pragma unroll 1
    for (int from = start; from < end; from += a.most) { /* a line goes on where it was */
        const int high = min(end - from, a.most);
        __syncthreads(); /* everyone has left x before */
        for (int i = threadIdx.x; i < high; i += LINE_THREADS) rows[i] = row_place(a.matrix, a.rows, from + i);
#pragma unroll 1
        for (int i = threadIdx.x; i < high * T; i += LINE_THREADS)
            shared[i] = given(a, (int)blockIdx.z * T + i % T, from + i / T);
        __syncthreads();
        if (!takes || line >= high) continue;
        Held<W, GROUP> held[FEW], next[FEW];
#pragma unroll
        for (int i = 0; i < FEW; ++i)
            hold<ALIGNED, W, GROUP>(rows[min(line + i * a.classes, high - 1)], at, held[i]);
#pragma unroll 1
        for (int row = line; row < high; row += FEW * a.classes) {
#pragma unroll
            for (int i = 0; i < FEW; ++i) /* behind the end, the last one once more */
                hold<ALIGNED, W, GROUP>(rows[min(row + (FEW + i) * a.classes, high - 1)], at, next[i]);
#pragma unroll
            for (int i = 0; i < FEW; ++i) {
                const int here = row + i * a.classes;
                if (here < high) add_row<T, W, GROUP>(held[i], at.first, shared + here * T, sum, bases);
                held[i] = next[i];
            }
        }
    }
}

/* Adds up the lines, four times four neighbouring sums a thread at once, and writes them. */
template <int T, int W, int GROUP>
static __device__ __forceinline__ void finish(const DownArguments &a, int unit, int units, float4 *shared,
                                              const float (*sum)[4][T][4], const float *bases) {
    constexpr int UNITS = GROUP / 16 / W; /* of a group */
    const int line = threadIdx.x / a.wide, place = threadIdx.x % a.wide, group = unit / UNITS;
    const int first = group * GROUP + unit % UNITS * W * 4;
#pragma unroll
    for (int round = 0; round < W * T; ++round) {
        __syncthreads();
        if (line < a.classes)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int e = 4 * round + j, t = e % T, q = e / T % 4, w = e / (4 * T);
                const float *const four = sum[w][q][t], base = bases[t];
                shared[(line * 4 + j) * a.wide + place] =
                    make_float4(four[0] + base, four[1] + base, four[2] + base, four[3] + base);
            }
        __syncthreads();
        if (unit >= units) continue;
#pragma unroll 1
        for (int j = line; j < 4; j += a.classes) {
            const int e = 4 * round + j, t = e % T, q = e / T % 4, w = e / (4 * T), token = (int)blockIdx.z * T + t;
            if (line >= a.classes || token >= a.padded_tokens) continue;
            float4 total = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 2
            for (int other = 0; other < a.classes; ++other) {
                const float4 more = shared[(other * 4 + j) * a.wide + place];
                total.x += more.x, total.y += more.y, total.z += more.z, total.w += more.w;
            }
            const long long row = (long long)blockIdx.y * a.padded_tokens + token;
            *(float4 *)(a.partial + row * a.matrix.groups * GROUP + first + q * (GROUP / 4) + 4 * w) = total;
        }
    }
}

template <int T, int GROUP> static __device__ __forceinline__ void down_kernel(const DownArguments &a) {
    constexpr int MOST = GROUP / 16, W = 4 / T < MOST ? 4 / T : MOST;
    SHARED(Row, shared); /* [X_ROWS] and float [X_ROWS, T], then float4 [classes, 4, wide] */
    const int units = a.matrix.groups * (GROUP / 16 / W), place = threadIdx.x % a.wide;
    const int unit = blockIdx.x * a.wide + place;
    const bool takes = (int)threadIdx.x < a.wide * a.classes && unit < units;
    const Unit at = unit_of<W, GROUP>(a.matrix, unit < units ? unit : 0);
    float sum[W][4][T][4] = {}, bases[T] = {};
    if (a.matrix.aligned == 16)
        add_rows<T, W, GROUP, 16>(a, at, takes, shared, sum, bases);
    else
        add_rows<T, W, GROUP, 0>(a, at, takes, shared, sum, bases);
    finish<T, W, GROUP>(a, unit, units, (float4 *)shared, sum, bases);
}

#define DOWN(T, GROUP) \
    SIZED_KERNEL(512, 1, JOIN(down, PLANES, T, GROUP), DownArguments) { down_kernel<T, GROUP>(a); }
#define DOWNS(GROUP) DOWN(1, GROUP) DOWN(2, GROUP) DOWN(4, GROUP)
#if IS_COMPILED(32)
DOWNS(32)
#endif
#if IS_COMPILED(64)
DOWNS(64)
#endif
#if IS_COMPILED(128)
DOWNS(128)
#endif
