/* Part of mma.cu: 16 rows of STAGE columns on their way from memory to the matrix units, by way of shared memory.
 *
 * A warp copies whole lines of memory, 16 bytes a lane, and needs no registers for what is on its way. A row's pieces of
 * 16 bytes lie where an exclusive or with the row's number puts them, so that eight rows ask eight sets of banks. An
 * instruction takes 16 rows and 32 columns: lane (g, own), 4 g + own, gives 8 codes of rows g and g + 8 each. Four lanes
 * share a group; which of its words are whose, and in which order columns come, `digits` knows as well.
 */
#ifndef TIERCACHE_STAGED_CUH
#define TIERCACHE_STAGED_CUH

#include "products.cuh"
#include "units.cuh"

template <int GROUP> struct Staged { /* where planes and lines begin, in bytes */
    static constexpr int GROUPS = STAGE / GROUP, MID = 2048, BIT = MID + 1024, LOW = BIT + (PLANES > 1 ? 1024 : 0),
                         LINES = LOW + (PLANES > 2 ? 4096 : 0), SIZE = LINES + 16 * 8 * (GROUPS + 1);
};

/* Row r, 0 to 15, of the warp's: rows of one matrix, or 8 of gate and the same of up. */
static __device__ __forceinline__ const byte *row_at(const ProductArguments &a, int first, int r, int which) {
    const Matrix &m = a.matrix[a.matrices == 2 ? r >> 3 : 0];
    const int item = min(first + (a.matrices == 2 ? r & 7 : r), a.count - 1); /* past the end: computed, never written */
    const byte *const from = which == 3 ? m.scales : m.plane[which];
    return from + row_of(a.rows, which, item) * (which == 3 ? m.scales_pitch : m.pitch[which]);
}

/* Pieces of a plane, of 16 bytes or, unaligned, word by word. PIECES of a row, one for SPAN columns; `turn` rows lie in
 * 128 bytes. */
template <int ALIGNED, int PIECES, int TURN>
static __device__ __forceinline__ void copy_plane(const ProductArguments &a, int first, int which, int offset, int left,
                                                  byte *to) {
    constexpr int SPAN = STAGE / PIECES;
    const int lane = threadIdx.x & 31;
    if (ALIGNED) {
#pragma unroll
        for (int i = 0; i < PIECES / 2; ++i) {
            const int r = (lane + 32 * i) / PIECES, c = (lane + 32 * i) % PIECES;
            if (SPAN * c < left)
                copy_16(to + r * 16 * PIECES + ((c ^ (r / TURN & (PIECES < 8 ? 3 : 7))) << 4),
                        row_at(a, first, r, which) + offset + 16 * c);
        }
        return;
    }
#pragma unroll 1
    for (int i = lane; i < 64 * PIECES; i += 32) {
        const int r = i / (4 * PIECES), word = i % (4 * PIECES), c = word / 4;
        if (SPAN / 4 * word < left)
            *(unsigned *)(to + r * 16 * PIECES + ((c ^ (r / TURN & (PIECES < 8 ? 3 : 7))) << 4) + 4 * (word % 4)) =
                load_word<0>(row_at(a, first, r, which) + offset + 4 * word);
    }
}

/* Begins to copy stage `number` of the row. */
template <int ALIGNED, int GROUP>
static __device__ __forceinline__ void copy_stage(const ProductArguments &a, int first, int number, byte *to) {
    typedef Staged<GROUP> S;
    const int lane = threadIdx.x & 31, groups = a.matrix[0].groups, left = groups * GROUP - number * STAGE;
    copy_plane<ALIGNED, 8, 1>(a, first, 0, 128 * number, left, to);
    copy_plane<ALIGNED, 4, 2>(a, first, 0, GROUP / 4 * groups + 64 * number, left, to + S::MID);
    if (PLANES > 1) copy_plane<ALIGNED, 4, 2>(a, first, 1, 64 * number, left, to + S::BIT);
    if (PLANES > 2) copy_plane<ALIGNED, 16, 1>(a, first, 2, 256 * number, left, to + S::LOW);
    unsigned scales[S::GROUPS / 2];
#pragma unroll
    for (int i = 0; i < S::GROUPS / 2; ++i) {
        const int r = (lane + 32 * i) / S::GROUPS, group = number * S::GROUPS + (lane + 32 * i) % S::GROUPS;
        scales[i] = load_word<ALIGNED>(row_at(a, first, r, 3) + 4 * min(group, groups - 1));
    }
#pragma unroll
    for (int i = 0; i < S::GROUPS / 2; ++i) {
        const int r = (lane + 32 * i) / S::GROUPS, j = (lane + 32 * i) % S::GROUPS;
        const Line line = code_line(scales[i]);
        *(float2 *)(to + S::LINES + 8 * (r * (S::GROUPS + 1) + j)) = make_float2(line.base, line.slope);
    }
}

static __device__ __forceinline__ unsigned word_in(const byte *at) { return *(const unsigned *)at; }

/* Where word `own` of piece c lies in a row of 128 bytes or 256, and in one of 64. */
static __device__ __forceinline__ int piece_of_8(int c, int g, int word) { return ((c ^ g) << 4) + 4 * word; }
static __device__ __forceinline__ int piece_of_4(int c, int g, int word) { return ((c ^ (g >> 1 & 3)) << 4) + 4 * word; }

/* Codes of step s of the stage, for 8 instructions: [instruction, first 16 columns of row g, of g + 8, next 16 ...]. */
template <int GROUP> static __device__ __forceinline__ void codes_of(const byte *from, int s, unsigned (*codes)[4]) {
    typedef Staged<GROUP> S;
    const int lane = threadIdx.x & 31, g = lane / 4, own = lane % 4;
#pragma unroll
    for (int i = 0; i < (GROUP == 32 ? 8 : 4); ++i) {
        /* of groups of 32, lanes share words two by two; else lane `own` has every fourth */
        const int j = GROUP == 32 ? 8 * s + i : GROUP == 64 ? 4 * s + i : 2 * s + i / 2; /* group of the stage */
        const int top_at = GROUP == 32 ? piece_of_8(j >> 1, g, 2 * (j & 1) + own / 2) : piece_of_8(4 * s + i, g, own);
        const int mid_at = GROUP == 32   ? piece_of_4(j >> 2, g, j & 3)
                           : GROUP == 64 ? piece_of_4(j >> 1, g, 2 * (j & 1) + own % 2)
                                         : piece_of_4(j, g, own);
        const int second = GROUP == 128 ? i & 1 : own / 2;
        const int even_at = GROUP == 32   ? piece_of_8(j, g, own / 2)
                            : GROUP == 64 ? piece_of_8(2 * j, g, own)
                                          : piece_of_8(4 * j + (i & 1), g, own);
        const int odd_at = GROUP == 32   ? piece_of_8(j, g, 2 + own / 2)
                           : GROUP == 64 ? piece_of_8(2 * j + 1, g, own)
                                         : piece_of_8(4 * j + 2 + (i & 1), g, own);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = g + 8 * r;
            const unsigned top = word_in(from + 128 * row + top_at), mid = word_in(from + S::MID + 64 * row + mid_at);
            const unsigned bit = PLANES > 1 ? word_in(from + S::BIT + 64 * row + mid_at) : 0;
            const unsigned c = PLANES > 2 ? word_in(from + S::LOW + 256 * row + even_at) : 0;
            const unsigned d = PLANES > 2 ? word_in(from + S::LOW + 256 * row + odd_at) : 0;
            const unsigned pairs = lower_pairs(mid, bit, second);
            const unsigned even = upper_codes(top, pairs, 0), odd = upper_codes(top, pairs, 1);
            if (GROUP == 32) { /* lanes that share a word take its halves */
                const int high = 4 * (own & 1);
                codes[i][r] = code_bytes<false>(even >> high, c >> high);
                codes[i][2 + r] = code_bytes<false>(odd >> high, d >> high);
            } else {
                codes[2 * i % 8][r] = code_bytes<false>(even, c), codes[2 * i % 8][2 + r] = code_bytes<false>(odd, d);
                codes[(2 * i + 1) % 8][r] = code_bytes<true>(even, c);
                codes[(2 * i + 1) % 8][2 + r] = code_bytes<true>(odd, d);
            }
        }
    }
}

#endif
