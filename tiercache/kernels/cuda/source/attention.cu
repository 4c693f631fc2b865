/* Attention of a few queries to a slice of slots after another: see attention.cuh for the order of the sums.
 *
 * A block does up to QUERIES queries of one head of keys, over one unit of slots. Four lanes multiply one key: of a row
 * they load 64 bytes at a time, eight rows a warp, from where they lie into registers. Each warp then multiplies the
 * values of eight slots, and the warps are added up in their order. A slot that is not attended to has a weight of
 * exactly 0. Loads of values are begun before the keys are waited for.
 *
 * Compiled once for each dtype of keys and values: PLANES is its number and one.
 */
#include "attention.cuh"

struct AttentionArguments {
    const float *queries;         /* [tokens, heads, head_dim] */
    const byte *keys, *values;    /* [key_heads, slots, head_dim] */
    long long key_head, key_slot; /* strides in elements */
    long long value_head, value_slot;
    const byte *mask;             /* [tokens, slots], or null: what lies before each token, and itself */
    long long mask_pitch;
    float *attended;              /* [units, tokens, heads, head_dim] */
    float *weights;               /* [units, tokens, heads, 2]: top and total */
    float scaling;
    int tokens, heads, key_heads, head_dim, slots;
    int per_unit;                 /* slices: 1, SPAN, or a multiple of it that takes all */
    int aligned;                  /* keys and values, and their strides, to 16 bytes */
};

static constexpr int KIND = PLANES - 1, BYTES = KIND == FLOAT ? 4 : 2, PER_WARP = SLICE / WARPS;

struct Eight { /* numbers as they lie */
    uint4 part[BYTES / 2];
};

static __device__ __forceinline__ void take(const byte *from, int aligned, Eight &taken) {
    if (aligned) {
#pragma unroll
        for (int i = 0; i < BYTES / 2; ++i) taken.part[i] = ((const uint4 *)from)[i];
        return;
    }
#pragma unroll
    for (int i = 0; i < BYTES / 2; ++i) { /* of 16 bytes; a number stands at its own width */
        unsigned w[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const byte *const at = from + 16 * i + 4 * j;
            w[j] = BYTES == 4 ? *(const unsigned *)at : *(const half_bits *)at | (unsigned)*(const half_bits *)(at + 2) << 16;
        }
        taken.part[i].x = w[0], taken.part[i].y = w[1], taken.part[i].z = w[2], taken.part[i].w = w[3];
    }
}

static __device__ __forceinline__ void widen(unsigned word, float *to) {
    to[0] = widened(KIND, (half_bits)(word & 0xffffu)), to[1] = widened(KIND, (half_bits)(word >> 16));
}

static __device__ __forceinline__ void widen(const Eight &taken, float *to) {
#pragma unroll
    for (int i = 0; i < BYTES / 2; ++i) {
        const unsigned w[4] = {taken.part[i].x, taken.part[i].y, taken.part[i].z, taken.part[i].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            if (KIND == FLOAT)
                to[4 * i + j] = __int_as_float((int)w[j]);
            else
                widen(w[j], to + 2 * j);
        }
    }
}

struct Two { /* numbers side by side, as they lie */
    unsigned word[BYTES / 2];
};

static __device__ __forceinline__ void take(const byte *from, int aligned, Two &taken) {
    if (KIND == FLOAT) {
        taken.word[0] = ((const unsigned *)from)[0], taken.word[BYTES / 2 - 1] = ((const unsigned *)from)[1];
    } else if (aligned) {
        taken.word[0] = *(const unsigned *)from;
    } else {
        taken.word[0] = ((const half_bits *)from)[0] | (unsigned)((const half_bits *)from)[1] << 16;
    }
}

static __device__ __forceinline__ float first_of(const Two &taken) {
    if (KIND == FLOAT) return __int_as_float((int)taken.word[0]);
    return widened(KIND, (half_bits)(taken.word[0] & 0xffffu));
}

static __device__ __forceinline__ float second_of(const Two &taken) {
    if (KIND == FLOAT) return __int_as_float((int)taken.word[BYTES / 2 - 1]);
    return widened(KIND, (half_bits)(taken.word[0] >> 16));
}

template <int QUERIES> struct Places { /* in shared memory */
    float *queries, *weights, *sums, *top, *total; /* [QUERIES, head_dim], [QUERIES, SLICE], [WARPS, QUERIES, head_dim] */
    int *token;                                    /* of each query; -1: it is padding */
};

template <int QUERIES>
static __device__ __forceinline__ Places<QUERIES> places(float *shared, const AttentionArguments &a) {
    Places<QUERIES> at;
    at.queries = shared;
    at.weights = at.queries + QUERIES * a.head_dim;
    at.sums = at.weights + QUERIES * SLICE;
    at.top = at.sums + WARPS * QUERIES * a.head_dim;
    at.total = at.top + QUERIES;
    at.token = (int *)(at.total + QUERIES);
    const int group = a.heads / a.key_heads, first = blockIdx.z * QUERIES;
    for (int i = threadIdx.x; i < QUERIES * a.head_dim; i += THREADS) {
        const int query = first + i / a.head_dim, token = query / group, head = blockIdx.y * group + query % group;
        at.queries[i] =
            token < a.tokens ? a.queries[((long long)token * a.heads + head) * a.head_dim + i % a.head_dim] : 0.0f;
    }
    if (threadIdx.x < QUERIES) {
        const int token = (first + (int)threadIdx.x) / group;
        at.token[threadIdx.x] = token < a.tokens ? token : -1;
    }
    return at;
}

/* What the queries are times one key, for a quarter of its numbers: four lanes add up to all. */
template <int QUERIES, int PAIRS>
static __device__ __forceinline__ void score(const AttentionArguments &a, const Places<QUERIES> &at, int first,
                                             const Eight (&keys)[2 * PAIRS]) {
    const int part = threadIdx.x & 3, within = threadIdx.x / 4, slot = first + within;
    float dot[QUERIES] = {};
#pragma unroll
    for (int j = 0; j < 2 * PAIRS; ++j) {
        const int number = 8 * (part + 4 * j);
        if (number >= a.head_dim) continue;
        float key[8];
        widen(keys[j], key);
#pragma unroll
        for (int q = 0; q < QUERIES; ++q) {
            const float4 *const query = (const float4 *)(at.queries + q * a.head_dim + number);
            const float4 u = query[0], v = query[1];
            dot[q] = fmaf(key[3], u.w, fmaf(key[2], u.z, fmaf(key[1], u.y, fmaf(key[0], u.x, dot[q]))));
            dot[q] = fmaf(key[7], v.w, fmaf(key[6], v.z, fmaf(key[5], v.y, fmaf(key[4], v.x, dot[q]))));
        }
    }
#pragma unroll
    for (int q = 0; q < QUERIES; ++q) {
        dot[q] += __shfl_xor_sync(0xffffffffu, dot[q], 1);
        dot[q] += __shfl_xor_sync(0xffffffffu, dot[q], 2);
        if (part != (q & 3)) continue;
        const int token = at.token[q];
        bool wanted = token >= 0 && slot < a.slots;
        if (wanted) wanted = a.mask ? a.mask[token * a.mask_pitch + slot] != 0 : slot <= a.slots - a.tokens + token;
        at.weights[q * SLICE + within] = wanted ? dot[q] * a.scaling : minus_infinity();
    }
}

/* Scores to exponentials, a warp a query. */
template <int QUERIES> static __device__ __forceinline__ void exponentials(const Places<QUERIES> &at) {
    const int lane = threadIdx.x & 31, q = threadIdx.x / 32;
    if (q >= QUERIES) return;
    float *const weights = at.weights + q * SLICE;
    float u = weights[lane], v = weights[lane + 32], top = larger(u, v);
    for (int far = 16; far; far >>= 1) top = larger(top, __shfl_xor_sync(0xffffffffu, top, far));
    const bool none = top == minus_infinity();
    u = none ? 0.0f : expf(u - top), v = none ? 0.0f : expf(v - top);
    weights[lane] = u, weights[lane + 32] = v;
    float total = u + v;
    for (int far = 16; far; far >>= 1) total += __shfl_xor_sync(0xffffffffu, total, far);
    if (lane == 0) at.top[q] = top, at.total[q] = total;
}

/* The values of a warp's slots, times their weights. */
template <int QUERIES, int PAIRS>
static __device__ __forceinline__ void add_values(const AttentionArguments &a, const Places<QUERIES> &at,
                                                  const Two (&values)[PER_WARP][PAIRS]) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
#pragma unroll
    for (int j = 0; j < PAIRS; ++j) {
        const int number = 2 * lane + 64 * j;
        float x[PER_WARP], y[PER_WARP];
#pragma unroll
        for (int i = 0; i < PER_WARP; ++i) x[i] = first_of(values[i][j]), y[i] = second_of(values[i][j]);
#pragma unroll
        for (int q = 0; q < QUERIES; ++q) {
            const float4 *const from = (const float4 *)(at.weights + q * SLICE + PER_WARP * warp);
            const float4 u = from[0], v = from[1];
            const float weight[PER_WARP] = {u.x, u.y, u.z, u.w, v.x, v.y, v.z, v.w};
            float first = 0.0f, second = 0.0f;
#pragma unroll
            for (int i = 0; i < PER_WARP; ++i) {
                first = fmaf(weight[i], x[i], first);
                second = fmaf(weight[i], y[i], second);
            }
            float2 *const to = (float2 *)(at.sums + (warp * QUERIES + q) * a.head_dim + number);
            if (number < a.head_dim) *to = make_float2(first, second);
        }
    }
}

/* One slice: leaves the sums of the warps, tops and totals in shared memory, for all threads to read. */
template <int QUERIES, int PAIRS>
static __device__ __forceinline__ void slice(const AttentionArguments &a, const Places<QUERIES> &at, int first) {
    const int part = threadIdx.x & 3, slot = first + threadIdx.x / 4;
    const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
    const byte *const key = a.keys + (blockIdx.y * a.key_head + slot * a.key_slot) * BYTES;
    const byte *const value = a.values + blockIdx.y * a.value_head * BYTES;
    Eight keys[2 * PAIRS] = {};
#pragma unroll
    for (int j = 0; j < 2 * PAIRS; ++j) {
        const int number = 8 * (part + 4 * j);
        if (slot < a.slots && number < a.head_dim) take(key + number * BYTES, a.aligned, keys[j]);
    }
    Two values[PER_WARP][PAIRS] = {};
#pragma unroll
    for (int i = 0; i < PER_WARP; ++i)
#pragma unroll
        for (int j = 0; j < PAIRS; ++j) {
            const int row = first + PER_WARP * warp + i, number = 2 * lane + 64 * j;
            if (row < a.slots && number < a.head_dim)
                take(value + (row * a.value_slot + number) * BYTES, a.aligned, values[i][j]);
        }
    score<QUERIES, PAIRS>(a, at, first, keys);
    __syncthreads();
    exponentials<QUERIES>(at);
    __syncthreads();
    add_values<QUERIES, PAIRS>(a, at, values);
    __syncthreads();
}

template <int QUERIES, int PAIRS> static __device__ __forceinline__ void attention_kernel(const AttentionArguments &a) {
    constexpr int OUTS = QUERIES * PAIRS > 4 ? QUERIES * PAIRS / 4 : 1; /* numbers of a thread */
    SHARED(float, shared);
    const Places<QUERIES> at = places<QUERIES>(shared, a);
    const int numbers = QUERIES * a.head_dim, slices = (a.slots + SLICE - 1) / SLICE;
    const int begin = blockIdx.x * a.per_unit, end = min(begin + a.per_unit, slices);
    const int last = min(a.tokens - 1, (int)(blockIdx.z + 1) * QUERIES * a.key_heads / a.heads);
    const int reach = a.mask ? a.slots : a.slots - a.tokens + last + 1; /* slots that a query may attend to */
    Attended<1> span[OUTS], all[OUTS];
#pragma unroll
    for (int i = 0; i < OUTS; ++i) clear(span[i]), clear(all[i]);
    __syncthreads();
    for (int s = begin; s < end; ++s) {
        if (s * SLICE < reach) {
            slice<QUERIES, PAIRS>(a, at, s * SLICE);
#pragma unroll
            for (int i = 0; i < OUTS; ++i) {
                const int number = threadIdx.x + THREADS * i;
                if (number >= numbers) continue;
                float sum[1] = {0.0f};
                for (int w = 0; w < WARPS; ++w) sum[0] += at.sums[w * numbers + number];
                merge(span[i], at.top[number / a.head_dim], at.total[number / a.head_dim], sum);
            }
        }
        if ((s + 1) % SPAN && s + 1 < end) continue;
#pragma unroll
        for (int i = 0; i < OUTS; ++i) merge(all[i], span[i].top, span[i].total, span[i].value), clear(span[i]);
    }
#pragma unroll
    for (int i = 0; i < OUTS; ++i) {
        const int number = threadIdx.x + THREADS * i, q = number / a.head_dim;
        if (number >= numbers || at.token[q] < 0) continue;
        const int group = a.heads / a.key_heads, head = blockIdx.y * group + ((int)blockIdx.z * QUERIES + q) % group;
        const long long row = ((long long)blockIdx.x * a.tokens + at.token[q]) * a.heads + head;
        a.attended[row * a.head_dim + number % a.head_dim] = all[i].value[0];
        if (number % a.head_dim == 0) a.weights[2 * row] = all[i].top, a.weights[2 * row + 1] = all[i].total;
    }
}

#define ATTENTION(QUERIES, PAIRS) \
    KERNEL(JOIN(attention, PLANES, QUERIES, PAIRS), AttentionArguments) { attention_kernel<QUERIES, PAIRS>(a); }
ATTENTION(1, 1) ATTENTION(4, 1) ATTENTION(8, 1)
ATTENTION(1, 2) ATTENTION(4, 2) ATTENTION(8, 2)
ATTENTION(1, 4) ATTENTION(4, 4)
