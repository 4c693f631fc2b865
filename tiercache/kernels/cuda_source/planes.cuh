/* What all kernels share: the arguments, the loads, and the way from plane bytes to codes.
 *
 * No header of CUDA's is needed at run time, and inline assembly stands only where __CUDACC_RTC__ is defined: without
 * it the same text is compiled for the host and run thread by thread, which is how machines without a GPU test it.
 *
 * A row is cut into words: 4 bytes of a 2-bit plane, 16 codes of one group. Word w of group g holds the codes
 * q * group/4 + 4 * (w % (group/16)) + k for q, k in 0..3, as 2 bits at 2q of byte k; the 4-bit plane holds the codes
 * of q = 0 (low nibble) and q = 2 (high) in one word, and those of q = 1 and q = 3 in the word group/4 bytes on.
 */
#ifndef TIERCACHE_PLANES_CUH
#define TIERCACHE_PLANES_CUH

#ifdef __CUDACC_RTC__
#define KERNEL(name, Arguments) extern "C" __global__ void __launch_bounds__(256) name(const Arguments a)
#define SHARED(type, name) extern __shared__ type name[]
#else
#include "shim.h"
#endif

#define JOIN_(a, b, c, d) a##_##b##_##c##_##d
#define JOIN(a, b, c, d) JOIN_(a, b, c, d)

#ifndef PLANES
#define PLANES 3 /* of the kernels that do not look at any */
#endif

typedef unsigned char byte;
typedef unsigned short half_bits;

enum { WARPS = 8, THREADS = 32 * WARPS };
enum { CHUNK_COLUMNS = 1024 }; /* 32 lanes of two words */

struct Matrix {
    const byte *plane[3];
    long long pitch[3]; /* bytes from row to row */
    const byte *scales;
    long long scales_pitch;
    int groups, group; /* groups in a row, columns in a group */
    int aligned;       /* planes and pitches to 8 bytes, scales to 4 */
    int padding;
};

/* Which rows are taken of each plane and, 3, of the scales; null for all. An ordinary selection names one list four
 * times: a load from the cache for each, as all lanes of a warp ask for the same one. */
struct RowLists {
    const int *list[4];
};

static __device__ __forceinline__ long long row_of(const RowLists &rows, int which, int item) {
    return rows.list[which] ? rows.list[which][item] : item;
}

static __device__ __forceinline__ float half_to_float(half_bits bits) {
#ifdef __CUDACC_RTC__
    float value; /* a conversion, not fp16 arithmetic: every card has it */
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    return value;
#else
    return shim_half_to_float(bits);
#endif
}

static __device__ __forceinline__ unsigned word_of_bytes(const byte *at) {
    return at[0] | at[1] << 8 | at[2] << 16 | (unsigned)at[3] << 24;
}

/* Four bytes; bundles may start anywhere, and a word that straddles is taken byte by byte. */
static __device__ __forceinline__ unsigned load_word(const byte *at, int aligned) {
    return aligned ? *(const unsigned *)at : word_of_bytes(at);
}

static __device__ __forceinline__ uint2 load_two(const byte *at, int aligned) {
    if (aligned) return *(const uint2 *)at;
    return make_uint2(word_of_bytes(at), word_of_bytes(at + 4));
}

template <int BITS> static __device__ __forceinline__ unsigned shifted(unsigned word) {
    return BITS >= 0 ? word << (BITS & 31) : word >> (-BITS & 31);
}

/* Codes of quarter Q as four bytes, unknown bits at their middle; `low` is the 4-bit plane's word for this Q.
 * With fewer than three planes the code is even: it comes halved, below a bit 7 that is set (see `code_float`). */
template <int Q> static __device__ __forceinline__ unsigned merged(unsigned a, unsigned b, unsigned low) {
    if (PLANES == 1) return (shifted<5 - 2 * Q>(a) & 0x60606060u) | 0x90909090u;
    if (PLANES == 2) return (shifted<5 - 2 * Q>(a) & 0x60606060u) | (shifted<3 - 2 * Q>(b) & 0x18181818u) | 0x84848484u;
    return (shifted<6 - 2 * Q>(a) & 0xc0c0c0c0u) | (shifted<4 - 2 * Q>(b) & 0x30303030u) |
           (shifted<Q < 2 ? 0 : -4>(low) & 0x0f0f0f0fu);
}

/* Byte K of `merged` as a float, by byte permutation instead of the slow integer conversion.
 * Three planes: code + 1/2 exactly, 2^23 + code less 2^23 - 1/2. Fewer: 1 + code / 256 with no subtraction at all, the
 * halved code being the top of a mantissa and bit 7 the last of the exponent; one instruction less for each weight. */
template <int K> static __device__ __forceinline__ float code_float(unsigned codes) {
    if (PLANES < 3) return __int_as_float((int)__byte_perm(codes, 0x3f000000u, 0x7044u | K << 8));
    return __int_as_float((int)__byte_perm(codes, 0x4b000000u, 0x7440u | K)) - 8388607.5f;
}

struct Line { /* weight = base + slope * code_float */
    float base, slope;
};

static __device__ __forceinline__ Line line_of(const byte *scales, int group, int aligned) {
    const unsigned both = load_word(scales + 4 * group, aligned);
    const float lo = half_to_float((half_bits)(both & 0xffffu)), step = half_to_float((half_bits)(both >> 16));
    Line line;
    line.base = PLANES < 3 ? lo - 256.0f * step : lo; /* code = 256 * (code_float - 1) */
    line.slope = PLANES < 3 ? 256.0f * step : step;
    return line;
}

#endif
