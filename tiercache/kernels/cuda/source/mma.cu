/* Products along the input for 3 tokens and more, by the matrix units of cards from compute capability 8.0 on: see
 * products.cuh.
 *
 * The instruction multiplies 16 rows x 32 columns by 32 columns x 8 tokens, one byte of the activations at a time. A
 * warp takes 16 rows, STAGE columns after STAGE columns (staged.cuh), for up to 16 tokens: a lane then has the sums of
 * rows g and g + 8 for tokens 2 own and the next. Four warps share the parts of 16 rows where blocks would be few, else
 * each has rows of its own. The digits come by way of the cache, in the order in which lanes want them.
 */
#include "staged.cuh"

enum { TILE = 8, MMA_THREADS = 128, MMA_WARPS = MMA_THREADS / 32 };

#if !defined(__CUDACC_RTC__) || __CUDA_ARCH__ >= 800
/* Sums two by two: `value` number j of GROUPS; true when the last has come and `value` is the sum of all. */
template <int COUNT> static __device__ __forceinline__ bool pair_up(int j, float &value, float *waiting) {
#pragma unroll
    for (int level = 0; 1 << level < COUNT; ++level) {
        if (!(j >> level & 1)) {
            waiting[level] = value;
            return false;
        }
        value = waiting[level] + value;
    }
    return true;
}

struct Input { /* of a block of tokens, for this lane */
    const byte *digits, *factors;
    int tiles, steps, groups;
};

/* One step for one tile of tokens: sums of all its groups, [row, token]. */
template <int GROUP>
static __device__ __forceinline__ void multiply(const unsigned (*codes)[4], const byte *lines, const Input &x, int tile,
                                                int step, float (*found)[2]) {
    constexpr int GROUPS = STEP / GROUP, PIECES = GROUP == 32 ? 8 : 4; /* of digits in a step, of 4 words or half */
    const int lane = threadIdx.x & 31, g = lane / 4, own = lane % 4;
    const byte *const digits = x.digits + (long long)(tile * x.steps + step) * 12 * 512;
    float waiting[2][2][3];
#pragma unroll
    for (int j = 0; j < GROUPS; ++j) {
        int sums[3][4] = {};
#pragma unroll
        for (int i = j * PIECES / GROUPS; i < (j + 1) * PIECES / GROUPS; ++i)
#pragma unroll
            for (int piece = 0; piece < 3; ++piece) {
                if (GROUP == 32) {
                    const int at = 64 * g + 32 * (i & 1) + 8 * own; /* own / 2: a word; own % 2: its half */
                    const uint2 two = fetch_two(digits + (i / 2 * 3 + piece) * 512 + at);
                    mma(sums[piece], codes[i], two.x, two.y);
                } else {
                    const uint4 four = fetch_four(digits + (i * 3 + piece) * 512 + 16 * lane);
                    mma(sums[piece], codes[2 * i % 8], four.x, four.y);
                    mma(sums[piece], codes[(2 * i + 1) % 8], four.z, four.w);
                }
            }
        const int group = min(step * GROUPS + j, x.groups - 1);
        const uint4 factor = fetch_four(x.factors + 64ll * (tile * x.groups + group) + 16 * own);
        const float size[2] = {__int_as_float((int)factor.x), __int_as_float((int)factor.z)};
        const float sum[2] = {__int_as_float((int)factor.y), __int_as_float((int)factor.w)};
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const float2 two = *(const float2 *)(lines + 8 * ((g + 8 * r) * (Staged<GROUP>::GROUPS + 1) + j));
            const Line line = {two.x, two.y};
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                const int at = 2 * r + t;
                float value = value_of(sums[0][at], sums[1][at], sums[2][at], line, size[t], sum[t]);
                value = step * GROUPS + j < x.groups ? value : 0.0f;
                if (pair_up<GROUPS>(j, value, waiting[r][t])) found[r][t] = value;
            }
        }
    }
}

/* A stage for all tiles: `found` [tile, row, token]. */
template <int TILES, int GROUP>
static __device__ __forceinline__ void multiply_stage(const byte *stage, const Input &x, int number,
                                                      float (*found)[2][2]) {
    float first[TILES][2][2] = {};
#pragma unroll 1
    for (int s = 0; s < 2; ++s) {
        const int step = 2 * number + s;
        unsigned codes[8][4];
        codes_of<GROUP>(stage, s, codes);
        const byte *const lines = stage + Staged<GROUP>::LINES + 8 * s * (STEP / GROUP);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile) {
            float sums[2][2] = {};
            if (tile < x.tiles && step < x.steps) multiply<GROUP>(codes, lines, x, tile, step, sums);
#pragma unroll
            for (int r = 0; r < 2; ++r)
#pragma unroll
                for (int t = 0; t < 2; ++t) {
                    found[tile][r][t] = first[tile][r][t] + sums[r][t];
                    first[tile][r][t] = sums[r][t];
                }
        }
    }
}

/* Four warps share 16 rows: a chunk at a time, whose stages are then added up in shared memory. */
template <int TILES, int GROUP, int ALIGNED>
static __device__ __forceinline__ void share_rows(const ProductArguments &a, const Input &x, int first, byte *stage,
                                                  float *slots) {
    constexpr int TOKENS = TILE * TILES, VALUES = 16 * TOKENS;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32, g = lane / 4, own = lane % 4;
    const int stages = (x.steps + 1) / 2, chunks = (stages + MMA_WARPS - 1) / MMA_WARPS;
    float total[TILES] = {};
    if (warp < stages) copy_stage<ALIGNED, GROUP>(a, first, warp, stage);
    for (int chunk = 0; chunk < chunks; ++chunk) {
        const int number = chunk * MMA_WARPS + warp;
        float found[TILES][2][2] = {};
        copies_are_there();
        __syncwarp();
        if (number < stages) multiply_stage<TILES, GROUP>(stage, x, number, found);
        __syncwarp();
        if (number + MMA_WARPS < stages) copy_stage<ALIGNED, GROUP>(a, first, number + MMA_WARPS, stage);
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int r = 0; r < 2; ++r)
                *(float2 *)(slots + warp * VALUES + (g + 8 * r) * TOKENS + tile * TILE + 2 * own) =
                    make_float2(found[tile][r][0], found[tile][r][1]);
        __syncthreads();
#pragma unroll
        for (int i = 0; i < TILES; ++i) {
            const float *const of = slots + threadIdx.x + i * MMA_THREADS;
            total[i] += (of[0] + of[VALUES]) + (of[2 * VALUES] + of[3 * VALUES]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < TILES; ++i) slots[threadIdx.x + i * MMA_THREADS] = total[i];
    __syncthreads();
    for (int i = threadIdx.x; i < VALUES / a.matrices; i += MMA_THREADS) {
        const int row = i / TOKENS, token = i % TOKENS;
        put_result(a, first + row, (int)blockIdx.x * TOKENS + token, slots[i], a.matrices == 2 ? slots[i + VALUES / 2] : 0);
    }
}

/* A warp has 16 rows for itself. */
template <int TILES, int GROUP, int ALIGNED>
static __device__ __forceinline__ void own_rows(const ProductArguments &a, const Input &x, int first, byte *stage) {
    const int lane = threadIdx.x & 31, g = lane / 4, own = lane % 4, stages = (x.steps + 1) / 2;
    float total[TILES][2][2] = {}, waiting[TILES][2][2][2] = {};
    copy_stage<ALIGNED, GROUP>(a, first, 0, stage);
#pragma unroll 1
    for (int number = 0; number < stages; ++number) {
        float found[TILES][2][2];
        copies_are_there();
        __syncthreads(); /* in step, so that the digits which one warp fetches lie near for the others */
        multiply_stage<TILES, GROUP>(stage, x, number, found);
        __syncwarp();
        if (number + 1 < stages) copy_stage<ALIGNED, GROUP>(a, first, number + 1, stage);
        const bool last = number + 1 == stages;
#pragma unroll
        for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
            for (int at = 0; at < 4; ++at) {
                float &value = found[tile][at / 2][at % 2];
                bool whole = pair_up<4>(number & 3, value, waiting[tile][at / 2][at % 2]);
                for (int none = number + 1; last && !whole; ++none) { /* behind the end, stages of zeros */
                    value = 0.0f;
                    whole = pair_up<4>(none & 3, value, waiting[tile][at / 2][at % 2]);
                }
                if (whole) total[tile][at / 2][at % 2] += value;
            }
    }
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const int token = ((int)blockIdx.x * TILES + tile) * TILE + 2 * own + t;
            put_result(a, first + g, token, total[tile][0][t], total[tile][1][t]);
            if (a.matrices == 1) put_result(a, first + g + 8, token, total[tile][1][t], 0.0f);
        }
}

template <int TILES, int GROUP, int ALIGNED>
static __device__ __forceinline__ void mma_kernel(const ProductArguments &a, byte *shared) {
    const int warp = threadIdx.x / 32, groups = a.matrix[0].groups, steps = (groups * GROUP + STEP - 1) / STEP;
    const int left = a.tokens - (int)blockIdx.x * TILES * TILE, high = a.matrices == 2 ? 8 : 16;
    byte *const stage = shared + warp * Staged<GROUP>::SIZE;
    Input x = {a.digits, a.factors, min(TILES, (left + TILE - 1) / TILE), steps, groups};
    x.digits += (long long)blockIdx.x * TILES * steps * 12 * 512;
    x.factors += 64ll * blockIdx.x * TILES * groups;
    KEEP(x.digits);
    KEEP(x.factors);
    if (TILES > 1 && a.sharers == 1) /* with few tokens, blocks are few */
        own_rows<TILES, GROUP, ALIGNED>(a, x, ((int)blockIdx.y * MMA_WARPS + warp) * high, stage);
    else
        share_rows<TILES, GROUP, ALIGNED>(a, x, (int)blockIdx.y * high, stage,
                                          (float *)(shared + MMA_WARPS * Staged<GROUP>::SIZE));
}

template <int TILES, int GROUP> static __device__ __forceinline__ void mma_kernel(const ProductArguments &a) {
    SHARED(uint4, shared); /* a stage a warp, then float [MMA_WARPS, 16, TILE TILES] */
    const int aligned = a.matrices == 1 ? a.matrix[0].aligned : min(a.matrix[0].aligned, a.matrix[1].aligned);
    if (aligned == 16 && a.matrix[0].groups * GROUP % 128 == 0)
        mma_kernel<TILES, GROUP, 16>(a, (byte *)shared);
    else
        mma_kernel<TILES, GROUP, 0>(a, (byte *)shared);
}

#define MMA(TILES, GROUP, BLOCKS) \
    SIZED_KERNEL(128, BLOCKS, JOIN(mma, PLANES, TILES, GROUP), ProductArguments) { mma_kernel<TILES, GROUP>(a); }
#if IS_COMPILED(32)
MMA(1, 32, 4) MMA(2, 32, 3)
#endif
#if IS_COMPILED(64)
MMA(1, 64, 4) MMA(2, 64, 3)
#endif
#if IS_COMPILED(128)
MMA(1, 128, 4) MMA(2, 128, 3)
#endif
#endif
