/* Products across the rows by the matrix units of cards from compute capability 8.0 on, for any number of tokens.
 *
 * x times the slope of a row's group is what a code is multiplied by; it differs from row to row and from group to group,
 * so it is made whole numbers here: of 23 bits, in steps of a power of two for each token, group and ROWS rows, as three
 * signed bytes. A block of ROWS rows then adds up to exact integers, and from there on sums are fp32 in the order of the
 * rows: blocks of a slice one after another, its bases behind them, then slices. A token's bits depend on the rows and
 * the card's size alone.
 *
 * A block of threads takes a strip of columns and one slice, or several: ROWS rows at a time come to shared memory while
 * those before are multiplied. A warp has 64 columns of one group, or 32. Its lane (g, own) has rows own, own + 4, ...
 * of columns g's word: four rows of four columns, turned, are what the unit wants of a column. The same lane makes the
 * digits of those rows for token g, which the unit wants there as well.
 */
#include "down.cuh"
#include "units.cuh"

enum { ROWS = 64, UNIT_THREADS = 128, PIECE = 16 * ROWS, MAGIC = 0x4b400000 }; /* MAGIC: 1.5 * 2^23 as a float */

#if !defined(__CUDACC_RTC__) || __CUDA_ARCH__ >= 800

/* A strip of columns in shared memory: 16 bytes of each row are a piece, those of all rows lie side by side. */
template <int GROUP> struct Strip {
    static constexpr int OWN = GROUP < 64 ? 32 : 64, COLUMNS = 4 * OWN, GROUPS = COLUMNS / GROUP; /* OWN: of a warp */
    static constexpr int TILES = OWN / 16, TOP = COLUMNS / 64, MID = COLUMNS / 128, LOW = COLUMNS / 32; /* pieces */
    static constexpr int MID_AT = TOP, BIT_AT = MID_AT + MID, LOW_AT = BIT_AT + (PLANES > 1 ? MID : 0),
                         SCALES_AT = LOW_AT + (PLANES > 2 ? LOW : 0), SIZE = (SCALES_AT + 1) * PIECE;
};

/* Odd pieces are turned by 64 bytes: lanes that ask two pieces for the same row ask other banks. */
static __device__ __forceinline__ int piece_at(int piece, int row) {
    return piece * PIECE + ((16 * row) ^ (64 * (piece & 1)));
}

/* COUNT pieces of each row of a plane, SPAN columns each, of which `left` are there. */
template <int ALIGNED, int COUNT, int SPAN>
static __device__ __forceinline__ void copy_plane(const DownArguments &a, int which, int offset, int from, int left,
                                                  byte *to, int piece) {
    constexpr int PARTS = ALIGNED ? COUNT : 4 * COUNT;
#pragma unroll 1
    for (int n = threadIdx.x; n < ROWS * PARTS; n += UNIT_THREADS) {
        const int r = n / PARTS, part = n % PARTS;
        const int item = min(from + r, a.count - 1); /* behind the end x is zero */
        const byte *const row = a.matrix.plane[which] + row_of(a.rows, which, item) * a.matrix.pitch[which] + offset;
        if (ALIGNED) {
            if (SPAN * part < left) copy_16(to + piece_at(piece + part, r), row + 16 * part);
        } else if (SPAN / 4 * part < left) {
            *(unsigned *)(to + piece_at(piece + part / 4, r) + part % 4 * 4) = load_word<0>(row + 4 * part);
        }
    }
}

/* Begins to copy ROWS rows from `from` on. */
template <int ALIGNED, int GROUP>
static __device__ __forceinline__ void copy_rows(const DownArguments &a, int from, byte *to) {
    typedef Strip<GROUP> S;
    const int groups = a.matrix.groups, first = blockIdx.y * S::COLUMNS, left = groups * GROUP - first;
    copy_plane<ALIGNED, S::TOP, 64>(a, 0, first / 4, from, left, to, 0);
    copy_plane<ALIGNED, S::MID, 128>(a, 0, GROUP / 4 * groups + first / 8, from, left, to, S::MID_AT);
    if (PLANES > 1) copy_plane<ALIGNED, S::MID, 128>(a, 1, first / 8, from, left, to, S::BIT_AT);
    if (PLANES > 2) copy_plane<ALIGNED, S::LOW, 32>(a, 2, first / 2, from, left, to, S::LOW_AT);
#pragma unroll 1
    for (int n = threadIdx.x; n < ROWS * S::GROUPS; n += UNIT_THREADS) {
        const int r = n / S::GROUPS, j = n % S::GROUPS;
        const int item = min(from + r, a.count - 1), group = min(first / GROUP + j, groups - 1);
        const byte *const at = a.matrix.scales + row_of(a.rows, 3, item) * a.matrix.scales_pitch + 4 * group;
        byte *const scales = to + piece_at(S::SCALES_AT, r) + 4 * j;
        if (ALIGNED)
            copy_4(scales, at);
        else
            *(unsigned *)scales = load_word<0>(at);
    }
}

/* A thread's numbers of x for ROWS rows from `from` on, and where they go: [tile of 8 tokens, row, token]. */
template <int TILES> static __device__ __forceinline__ void look_up(const DownArguments &a, int from, float *x) {
#pragma unroll
    for (int i = 0; i < 4 * TILES; ++i) {
        const int n = i * UNIT_THREADS + threadIdx.x, token = ((int)blockIdx.x * TILES + i / 4) * 8 + n % 8;
        const int item = from + n / 8 % ROWS;
        x[i] = item < a.count ? given(a, token, item) : 0.0f;
    }
}

template <int TILES> static __device__ __forceinline__ void put_down(const float *x, float *to) {
#pragma unroll
    for (int i = 0; i < 4 * TILES; ++i) to[i * UNIT_THREADS + threadIdx.x] = x[i];
}

/* Where a lane's words lie in a row of the strip: piece and bytes for each plane. */
template <int GROUP> struct Lane {
    int top, mid, low, second, odd, high, group, own, g;

    __device__ __forceinline__ Lane() {
        typedef Strip<GROUP> S;
        const int lane = threadIdx.x & 31, warp = threadIdx.x / 32;
        g = lane / 4, own = lane % 4;
        group = GROUP == 128 ? warp / 2 : warp;
        const int word = GROUP == 32 ? g / 4 : GROUP == 64 ? g / 2 : g;
        odd = GROUP == 128 ? warp % 2 : g % 2; /* which quarters: `odd` and odd + 2, or of groups of 32 one of them */
        high = GROUP == 32 ? 4 * (g / 2 % 2) : 0;
        second = word >= GROUP / 32;
        const int top_byte = group * (GROUP / 4) + 4 * word, mid_byte = group * (GROUP / 8) + word % (GROUP / 32) * 4;
        const int low_byte = group * (GROUP / 2) + odd * (GROUP / 4) + 4 * word;
        top = place(0, top_byte), mid = place(S::MID_AT, mid_byte), low = place(S::LOW_AT, low_byte);
    }

    /* Of row own; the row 4 i further on lies 64 i bytes on, if the turn of odd pieces is applied to i. */
    __device__ __forceinline__ int place(int first, int at) const {
        const int piece = first + at / 16;
        return piece * PIECE + 16 * own + at % 16 + (piece & 1); /* bit 0: whether it is turned */
    }

    static __device__ __forceinline__ unsigned word(const byte *stage, int place, int i) {
        return *(const unsigned *)(stage + (place & ~1) + 64 * (i ^ (place & 1)));
    }
};

/* Four words of four bytes, rows and columns exchanged. */
static __device__ __forceinline__ void turn(unsigned *v) {
    const unsigned a = __byte_perm(v[0], v[1], 0x5140), b = __byte_perm(v[0], v[1], 0x7362);
    const unsigned c = __byte_perm(v[2], v[3], 0x5140), d = __byte_perm(v[2], v[3], 0x7362);
    v[0] = __byte_perm(a, c, 0x5410), v[1] = __byte_perm(a, c, 0x7632);
    v[2] = __byte_perm(b, d, 0x5410), v[3] = __byte_perm(b, d, 0x7632);
}

/* Codes of a lane's 16 rows: [half of the rows, tile of 16 columns, as `mma` wants them]. */
template <int GROUP>
static __device__ __forceinline__ void codes_of(const byte *stage, const Lane<GROUP> &at,
                                                unsigned (*codes)[Strip<GROUP>::TILES][4]) {
    typedef Lane<GROUP> L;
#pragma unroll
    for (int four = 0; four < 4; ++four) {
        unsigned first[4], next[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int i = 4 * four + j;
            const unsigned bit = PLANES > 1 ? L::word(stage + (Strip<GROUP>::BIT_AT - Strip<GROUP>::MID_AT) * PIECE,
                                                      at.mid ^ ((Strip<GROUP>::BIT_AT - Strip<GROUP>::MID_AT) & 1), i)
                                            : 0;
            const unsigned pairs = lower_pairs(L::word(stage, at.mid, i), bit, at.second);
            const unsigned h = upper_codes(L::word(stage, at.top, i), pairs, at.odd) >> at.high;
            const unsigned c = PLANES > 2 ? L::word(stage, at.low, i) >> at.high : 0;
            first[j] = code_bytes<false>(h, c), next[j] = GROUP == 32 ? 0 : code_bytes<true>(h, c);
        }
        turn(first);
        if (GROUP > 32) turn(next);
#pragma unroll
        for (int tile = 0; tile < Strip<GROUP>::TILES; ++tile) {
            codes[four / 2][tile][four % 2 * 2] = first[tile];
            codes[four / 2][tile][four % 2 * 2 + 1] = GROUP == 32 ? first[tile + 2] : next[tile];
        }
    }
}

/* x times slopes as digits: [piece, half of the rows, as `mma` wants them]; the size of their steps. `carried`: x times
 * bases, added up. */
static __device__ __forceinline__ float digits_of(const float *x, const Line *lines, unsigned (*digits)[2][2],
                                                  float &carried) {
    float y[16], largest = 0.0f;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        const float given = x[32 * i];
        y[i] = given * lines[i].slope;
        largest = fmaxf(largest, fabsf(y[i]));
        carried = fmaf(given, lines[i].base, carried); /* NaN, if x is: the digits do not tell */
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const int exponent = max(__float_as_int(largest) >> 23, 22);
    const float inverse = __int_as_float((275 - exponent) << 23); /* 2^21 over the power of two below the largest */
#pragma unroll
    for (int four = 0; four < 4; ++four) {
        unsigned v[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) { /* to the nearest; 128 more in each byte, so that bytes are digits and 128 */
            const float whole = fmaf(y[4 * four + j], inverse, 12582912.0f);
            v[j] = (unsigned)__float_as_int(whole) - MAGIC + 0x808080u;
        }
        const unsigned a = __byte_perm(v[0], v[1], 0x5140), b = __byte_perm(v[2], v[3], 0x5140);
        const unsigned c = __byte_perm(v[0], v[1], 0x0062), d = __byte_perm(v[2], v[3], 0x0062);
        digits[2][four / 2][four % 2] = __byte_perm(a, b, 0x5410) ^ 0x80808080u;
        digits[1][four / 2][four % 2] = __byte_perm(a, b, 0x7632) ^ 0x80808080u;
        digits[0][four / 2][four % 2] = __byte_perm(c, d, 0x5410) ^ 0x80808080u;
    }
    return __int_as_float(exponent < 255 ? (exponent - 21) << 23 : 0x7fc00000);
}

static __device__ __forceinline__ float from_magic(int bits) { return __int_as_float(bits) - 12582912.0f; }

/* ROWS rows: total [tile of tokens, tile of columns, as `mma` has its sums]. */
template <int TILES, int GROUP>
static __device__ __forceinline__ void multiply(const byte *stage, const float *x, const Lane<GROUP> &at,
                                                float (*total)[Strip<GROUP>::TILES][4], float *carried) {
    unsigned codes[2][Strip<GROUP>::TILES][4];
    codes_of<GROUP>(stage, at, codes);
    Line lines[16];
#pragma unroll
    for (int i = 0; i < 16; ++i)
        lines[i] = code_line(*(const unsigned *)(stage + piece_at(Strip<GROUP>::SCALES_AT, at.own + 4 * i) + 4 * at.group));
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        unsigned digits[3][2][2];
        const float size = digits_of(x + (tile * ROWS + at.own) * 8 + at.g, lines, digits, carried[tile]);
        const float sizes[2] = {__shfl_sync(0xffffffffu, size, 8 * at.own), __shfl_sync(0xffffffffu, size, 8 * at.own + 4)};
#pragma unroll
        for (int m = 0; m < Strip<GROUP>::TILES; ++m) {
            int sums[3][4];
#pragma unroll
            for (int piece = 0; piece < 3; ++piece) {
                sums[piece][0] = sums[piece][1] = sums[piece][2] = sums[piece][3] = MAGIC; /* below 2^21: floats as well */
#pragma unroll
                for (int half = 0; half < 2; ++half)
                    mma(sums[piece], codes[half][m], digits[piece][half][0], digits[piece][half][1]);
            }
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const float lower = fmaf(from_magic(sums[1][e]), 256.0f, from_magic(sums[2][e]));
                total[tile][m][e] = fmaf(fmaf(from_magic(sums[0][e]), 65536.0f, lower), sizes[e % 2], total[tile][m][e]);
            }
        }
    }
}

/* A slice has ended: its bases to its sums, those to `merged`. */
template <int TILES, int GROUP>
static __device__ __forceinline__ void end_slice(float (*total)[Strip<GROUP>::TILES][4], float *carried,
                                                 float (*merged)[Strip<GROUP>::TILES][4]) {
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile) {
        float base = carried[tile];
        base += __shfl_xor_sync(0xffffffffu, base, 1);
        base += __shfl_xor_sync(0xffffffffu, base, 2);
        const int own = threadIdx.x % 4;
        const float bases[2] = {__shfl_sync(0xffffffffu, base, 8 * own), __shfl_sync(0xffffffffu, base, 8 * own + 4)};
#pragma unroll
        for (int m = 0; m < Strip<GROUP>::TILES; ++m)
#pragma unroll
            for (int e = 0; e < 4; ++e) merged[tile][m][e] += total[tile][m][e] + bases[e % 2], total[tile][m][e] = 0.0f;
        carried[tile] = 0.0f;
    }
}

template <int TILES, int GROUP>
static __device__ __forceinline__ void write(const DownArguments &a, const Lane<GROUP> &at,
                                             const float (*merged)[Strip<GROUP>::TILES][4]) {
    const int group = blockIdx.y * Strip<GROUP>::GROUPS + at.group;
    if (group >= a.matrix.groups) return;
#pragma unroll
    for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            const int token = ((int)blockIdx.x * TILES + tile) * 8 + 2 * at.own + t;
            if (token >= a.tokens) continue;
            const float(*const of)[4] = merged[tile];
            float *const row = a.partial + ((long long)blockIdx.z * a.padded_tokens + token) * a.matrix.groups * GROUP;
            if (GROUP == 32) {
                float *const to = row + group * GROUP + (at.odd + at.high / 2) * 8 + at.g / 4 * 4;
                *(float4 *)to = make_float4(of[0][t], of[1][t], of[0][2 + t], of[1][2 + t]);
            } else {
                const int word = GROUP == 64 ? at.g / 2 : at.g;
                float *const to = row + group * GROUP + at.odd * (GROUP / 4) + 4 * word;
                constexpr int A = Strip<GROUP>::TILES > 2 ? 2 : 0, B = Strip<GROUP>::TILES > 2 ? 3 : 0;
                *(float4 *)to = make_float4(of[0][t], of[1][t], of[A][t], of[B][t]);
                *(float4 *)(to + GROUP / 2) = make_float4(of[0][2 + t], of[1][2 + t], of[A][2 + t], of[B][2 + t]);
            }
        }
}

template <int TILES, int GROUP, int ALIGNED>
static __device__ __forceinline__ void downmma_kernel(const DownArguments &a, byte *stages) {
    typedef Strip<GROUP> S;
    float *const inputs = (float *)(stages + 2 * S::SIZE); /* [2, TILES, ROWS, 8] */
    const Lane<GROUP> at;
    const bool takes = (int)blockIdx.y * S::GROUPS + at.group < a.matrix.groups;
    const int begin = blockIdx.z * a.merged * a.per_slice, end = min(begin + a.merged * a.per_slice, a.count);
    float total[TILES][S::TILES][4] = {}, merged[TILES][S::TILES][4] = {}, carried[TILES] = {}, next[4 * TILES];
    copy_rows<ALIGNED, GROUP>(a, begin, stages);
    look_up<TILES>(a, begin, next);
    int left = a.per_slice;
#pragma unroll 1
    for (int from = begin, turn = 0; from < end; from += ROWS, turn ^= 1) {
        byte *const stage = stages + turn * S::SIZE;
        float *const x = inputs + turn * TILES * ROWS * 8;
        put_down<TILES>(next, x);
        copies_are_there();
        __syncthreads(); /* all that was copied is there, and everyone has left what the next copies go to */
        if (from + ROWS < end) {
            copy_rows<ALIGNED, GROUP>(a, from + ROWS, stages + (turn ^ 1) * S::SIZE);
            look_up<TILES>(a, from + ROWS, next);
        }
        if (takes) multiply<TILES, GROUP>(stage, x, at, total, carried);
        left -= ROWS;
        if (takes && (left <= 0 || from + ROWS >= end)) end_slice<TILES, GROUP>(total, carried, merged);
        if (left <= 0) left = a.per_slice;
    }
    write<TILES, GROUP>(a, at, merged);
}

template <int TILES, int GROUP> static __device__ __forceinline__ void downmma_kernel(const DownArguments &a) {
    SHARED(uint4, shared); /* two stages, then float [2, TILES, ROWS, 8] */
    if (a.matrix.aligned == 16 && a.matrix.groups * GROUP % 128 == 0)
        downmma_kernel<TILES, GROUP, 16>(a, (byte *)shared);
    else
        downmma_kernel<TILES, GROUP, 0>(a, (byte *)shared);
}

#define DOWNMMA(TILES, GROUP, BLOCKS) \
    SIZED_KERNEL(128, BLOCKS, JOIN(downmma, PLANES, TILES, GROUP), DownArguments) { downmma_kernel<TILES, GROUP>(a); }
#if IS_COMPILED(32)
DOWNMMA(1, 32, 4) DOWNMMA(2, 32, 3)
#endif
#if IS_COMPILED(64)
DOWNMMA(1, 64, 3) DOWNMMA(2, 64, 2)
#endif
#if IS_COMPILED(128)
DOWNMMA(1, 128, 3) DOWNMMA(2, 128, 2)
#endif
#endif
