/* Products across the rows for more tokens than down.cu holds in registers: each weight is decoded once for TOKENS.
 *
 * A block does TOKENS tokens and UNITS words of 16 columns, over one slice of the rows or several one after another. A
 * few rows at a time, its threads leave in shared memory the rows' codes as floats and x times their slopes; then each
 * multiplies 8 tokens with 4 neighbouring columns. The order of every sum is that of down.cu, so that a token gets the
 * same bits from both: rows of a class in their order, then its base times x; the classes of a slice in theirs. Slices
 * that `sum` and `settle` would add up at one go may be added up here before: `merged` of them.
 */
#include "down.cuh"

enum { DOWNS_THREADS = 128, AT_ONCE = 8 };

template <int TOKENS, int GROUP> struct Tile {
    static constexpr int UNITS = 256 / TOKENS;           /* words; four times as many threads side by side */
    static constexpr int ROWS = TOKENS < 32 ? 8 : 16;    /* at a time */
    static constexpr int WORDS = GROUP / 16;             /* of a group */
    static constexpr int GROUPS = UNITS < WORDS ? 1 : UNITS / WORDS;
    float4 codes[ROWS][4 * UNITS];                       /* [row][word, quarter] */
    float scaled[ROWS][GROUPS][TOKENS];                  /* x times the slope */
    float bases[ROWS][GROUPS][TOKENS];                   /* x times the base, added up: of each class that ends here */
    float4 merged[8][DOWNS_THREADS];                     /* [token of a thread][thread]: the slices before */
};

struct Slice { /* rows of a slice, class by class */
    int first, rows, classes, each, more; /* each: rows of a class, one more for `more` of them */

    __device__ __forceinline__ int size(int which) const { return each + (which < more); }

    /* The class of the row at a place in that order, and its rows before. */
    __device__ __forceinline__ int class_at(int place, int &before) const {
        const int longer = more * (each + 1);
        if (place < longer) return before = place % (each + 1), place / (each + 1);
        return before = (place - longer) % each, more + (place - longer) / each;
    }
};

static __device__ __forceinline__ Slice slice_at(const DownArguments &a, int which) {
    Slice s;
    s.first = which * a.per_slice;
    s.rows = min(a.per_slice, a.count - s.first);
    s.classes = a.classes, s.each = s.rows / s.classes, s.more = s.rows % s.classes;
    return s;
}

/* Codes of rows from the `from`-th on, and x times slopes and bases; `carried`: a pair's base sum of the class so far. */
template <int TOKENS, int GROUP>
static __device__ __forceinline__ void fill(const DownArguments &a, Tile<TOKENS, GROUP> &tile, const Slice &slice,
                                            int from, int rows, float &carried) {
    typedef Tile<TOKENS, GROUP> Of;
    const int first = blockIdx.x * Of::UNITS, words = a.matrix.groups * Of::WORDS;
#pragma unroll 1
    for (int i = threadIdx.x; i < rows * Of::UNITS; i += DOWNS_THREADS) {
        const int row = i / Of::UNITS, unit = i % Of::UNITS;
        if (first + unit >= words) continue;
        int before;
        const int which = slice.class_at(from + row, before);
        const Place place = place_of(a.matrix, first + unit);
        const Word word = word_of(a.matrix, a.rows, slice.first + which + before * slice.classes, place);
        const unsigned pairs = lower_pairs(word.mid, word.bit, place.second);
        const unsigned even = upper_codes(word.top, pairs, 0), odd = upper_codes(word.top, pairs, 1);
        const unsigned codes[4] = {merged<false>(even, word.even), merged<false>(odd, word.odd),
                                   merged<true>(even, word.even), merged<true>(odd, word.odd)};
#pragma unroll
        for (int q = 0; q < 4; ++q)
            tile.codes[row][4 * unit + q] = make_float4(code_float<0>(codes[q]), code_float<1>(codes[q]),
                                                        code_float<2>(codes[q]), code_float<3>(codes[q]));
    }
    const int pair = DOWNS_THREADS - 1 - (int)threadIdx.x; /* of a group and a token: other warps than have most words */
    const int group = first / Of::WORDS + pair / TOKENS, token = (int)blockIdx.z * TOKENS + pair % TOKENS;
    if (pair >= Of::GROUPS * TOKENS || group >= a.matrix.groups) return;
    int before, which = slice.class_at(from, before), ended = 0;
#pragma unroll 1
    for (int part = 0; part < rows; part += AT_ONCE) { /* all loads of a part are on their way before one is waited for */
        int items[AT_ONCE], left[AT_ONCE]; /* left: rows of the class, this one with them */
        float x[AT_ONCE];
        unsigned scales[AT_ONCE];
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            items[i] = slice.first + which + before * slice.classes, left[i] = slice.size(which) - before;
            if (left[i] > 1)
                ++before;
            else if (part + i + 1 < rows)
                before = 0, ++which;
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            const byte *const at = a.matrix.scales + row_of(a.rows, 3, items[i]) * a.matrix.scales_pitch + 4 * group;
            scales[i] = a.matrix.aligned ? load_word<4>(at) : load_word<0>(at);
            x[i] = given(a, token, items[i]);
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; ++i) {
            if (part + i >= rows) break;
            const Line line = line_of(scales[i]);
            tile.scaled[part + i][pair / TOKENS][pair % TOKENS] = x[i] * line.slope;
            carried = fmaf(x[i], line.base, carried);
            if (left[i] > 1) continue;
            tile.bases[ended++][pair / TOKENS][pair % TOKENS] = carried;
            carried = 0.0f;
        }
    }
}

/* sum: [token of the thread, column]. */
static __device__ __forceinline__ void multiply(const float4 &code, const float *x, float (*sum)[4]) {
    const float4 u = ((const float4 *)x)[0], v = ((const float4 *)x)[1];
    const float all[8] = {u.x, u.y, u.z, u.w, v.x, v.y, v.z, v.w};
#pragma unroll
    for (int t = 0; t < 8; ++t) {
        sum[t][0] = fmaf(all[t], code.x, sum[t][0]), sum[t][1] = fmaf(all[t], code.y, sum[t][1]);
        sum[t][2] = fmaf(all[t], code.z, sum[t][2]), sum[t][3] = fmaf(all[t], code.w, sum[t][3]);
    }
}

/* A class has ended: its sums and bases to those of the slice. */
static __device__ __forceinline__ void end_class(const float *bases, float (*sum)[4], float (*total)[4]) {
    const float4 u = ((const float4 *)bases)[0], v = ((const float4 *)bases)[1];
    const float all[8] = {u.x, u.y, u.z, u.w, v.x, v.y, v.z, v.w};
#pragma unroll
    for (int t = 0; t < 8; ++t)
#pragma unroll
        for (int k = 0; k < 4; ++k) total[t][k] += sum[t][k] + all[t], sum[t][k] = 0.0f;
}

/* What a slice gives to each of a thread's tokens and columns. */
template <int TOKENS, int GROUP>
static __device__ __forceinline__ void add_slice(const DownArguments &a, Tile<TOKENS, GROUP> &tile, const Slice &slice,
                                                 float (*total)[4]) {
    typedef Tile<TOKENS, GROUP> Of;
    const int across = threadIdx.x % (4 * Of::UNITS), first = threadIdx.x / (4 * Of::UNITS) * 8;
    const int group = Of::GROUPS == 1 ? 0 : across / (4 * Of::WORDS);
    float sum[8][4] = {}, carried = 0.0f;
    int which = 0, left = slice.size(0);
#pragma unroll 1
    for (int from = 0; from < slice.rows; from += Of::ROWS) {
        const int rows = min(slice.rows - from, (int)Of::ROWS);
        __syncthreads(); /* everyone has left the rows before */
        fill<TOKENS, GROUP>(a, tile, slice, from, rows, carried);
        __syncthreads();
        int ended = 0;
#pragma unroll 1
        for (int row = 0; row < rows; ++row) {
            multiply(tile.codes[row][across], &tile.scaled[row][group][first], sum);
            if (--left) continue;
            end_class(&tile.bases[ended++][group][first], sum, total);
            left = slice.size(++which);
        }
    }
}

template <int TOKENS, int GROUP> static __device__ __forceinline__ void downs_kernel(const DownArguments &a) {
    typedef Tile<TOKENS, GROUP> Of;
    SHARED(float4, shared);
    Of &tile = *(Of *)shared;
    const int begin = blockIdx.y * a.merged, slices = (a.count + a.per_slice - 1) / a.per_slice;
    const int end = min(begin + a.merged, slices);
    float total[8][4];
#pragma unroll
    for (int t = 0; t < 8; ++t) tile.merged[t][threadIdx.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll 1
    for (int s = begin; s < end; ++s) {
#pragma unroll
        for (int t = 0; t < 8; ++t) total[t][0] = total[t][1] = total[t][2] = total[t][3] = 0.0f;
        add_slice<TOKENS, GROUP>(a, tile, slice_at(a, s), total);
#pragma unroll
        for (int t = 0; t < 8; ++t) {
            float4 &so_far = tile.merged[t][threadIdx.x];
            so_far = make_float4(so_far.x + total[t][0], so_far.y + total[t][1], so_far.z + total[t][2],
                                 so_far.w + total[t][3]);
        }
    }
    const int across = threadIdx.x % (4 * Of::UNITS), word = blockIdx.x * Of::UNITS + across / 4;
    if (word >= a.matrix.groups * Of::WORDS) return;
    const int column = word / Of::WORDS * GROUP + across % 4 * (GROUP / 4) + word % Of::WORDS * 4;
    const long long token = (int)blockIdx.z * TOKENS + threadIdx.x / (4 * Of::UNITS) * 8;
    const long long row = (long long)blockIdx.y * a.padded_tokens + token;
    float *const to = a.partial + row * a.matrix.groups * GROUP + column;
#pragma unroll
    for (int t = 0; t < 8; ++t) *(float4 *)(to + (long long)t * a.matrix.groups * GROUP) = tile.merged[t][threadIdx.x];
}

#define TILE(TOKENS, GROUP) \
    SIZED_KERNEL(128, 4, JOIN(downs, PLANES, TOKENS, GROUP), DownArguments) { downs_kernel<TOKENS, GROUP>(a); }
#define TILES(GROUP) TILE(8, GROUP) TILE(16, GROUP) TILE(32, GROUP) TILE(64, GROUP)
#if IS_COMPILED(32)
TILES(32)
#endif
#if IS_COMPILED(64)
TILES(64)
#endif
#if IS_COMPILED(128)
TILES(128)
#endif
