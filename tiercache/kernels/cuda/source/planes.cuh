/* What all kernels share: the arguments, the loads, and the way from plane bytes to codes.
 *
 * No header of CUDA's is needed at run time, and inline assembly stands only where __CUDACC_RTC__ is defined: without
 * it the same text is compiled for the host and run thread by thread, which is how machines without a GPU test it.
 *
 * A weight is lo + step * (12 h + c). Planes: the upper 2 bits of h (`top`) and, behind those of the whole row, its
 * next bit (`mid`); its last bit (`bit`); the 4 bits of c (`low`).
 *
 * A row is cut into words: 4 bytes of 2-bit codes, 16 codes of one group. Word w of group g holds the codes
 * q * group/4 + 4 * (w % (group/16)) + k for q, k in 0..3, as 2 bits at 2q of byte k; the 4-bit plane holds the codes
 * of q = 0 (low nibble) and q = 2 (high) in one word, and those of q = 1 and q = 3 in the word group/4 bytes on. Single
 * bits stand where 2-bit codes have theirs, those of two words in one: of the group's group/32 words of single bits,
 * number i serves word i with its even bits and word i + group/32 with its odd ones.
 */
#ifndef TIERCACHE_PLANES_CUH
#define TIERCACHE_PLANES_CUH

#ifdef __CUDACC_RTC__
/* Holds a pointer in registers: not computed anew where it is used. For addresses that `fetch` reads. */
#define KEEP(pointer) asm("" : "+l"(pointer))
#define KERNEL(name, Arguments) extern "C" __global__ void __launch_bounds__(256) name(const Arguments a)
/* Of blocks of so many threads, that many of which fit a multiprocessor. */
#define SIZED_KERNEL(threads, blocks, name, Arguments) \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const Arguments a)
#define SHARED(type, name) extern __shared__ type name[]
#else
#include "shim.h"
#define KEEP(pointer)
#endif

#define JOIN_(a, b, c, d) a##_##b##_##c##_##d
#define JOIN(a, b, c, d) JOIN_(a, b, c, d)

/* Whether kernels of a group are wanted: those of ONLY_GROUP, or all. */
#ifdef ONLY_GROUP
#define IS_COMPILED(group) (ONLY_GROUP == group)
#else
#define IS_COMPILED(group) 1
#endif

#ifndef PLANES
#define PLANES 3 /* of the kernels that do not look at any */
#endif

typedef unsigned char byte;
typedef unsigned short half_bits;

enum { WARPS = 8, THREADS = 32 * WARPS };
enum { CHUNK_COLUMNS = 1024 }; /* 32 lanes of two words */
enum { CELL = 12 };            /* what h counts, in steps */

struct Matrix {
    const byte *plane[3];
    long long pitch[3]; /* bytes from row to row */
    const byte *scales;
    long long scales_pitch;
    int groups, group; /* groups in a row, columns in a group */
    int aligned;       /* to 16, 8 or 4 bytes, planes and pitches; scales to 4; else 0 */
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

struct alignas(16) Row { /* where it lies: 2-bit codes, single bits, 4-bit codes, scales */
    const byte *top, *bit, *low, *scales;
};

static __device__ __forceinline__ Row row_place(const Matrix &m, const RowLists &rows, int item) {
    Row row;
    row.top = m.plane[0] + row_of(rows, 0, item) * m.pitch[0];
    row.bit = PLANES > 1 ? m.plane[1] + row_of(rows, 1, item) * m.pitch[1] : 0;
    row.low = PLANES > 2 ? m.plane[2] + row_of(rows, 2, item) * m.pitch[2] : 0;
    row.scales = m.scales + row_of(rows, 3, item) * m.scales_pitch;
    return row;
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

/* What no kernel writes meanwhile: 4, 8 or 16 bytes, loaded where the program says so. */
static __device__ __forceinline__ unsigned fetch_word(const byte *at) {
#ifdef __CUDACC_RTC__
    unsigned word;
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(word) : "l"(at));
    return word;
#else
    return *(const unsigned *)at;
#endif
}

static __device__ __forceinline__ uint2 fetch_two(const byte *at) {
#ifdef __CUDACC_RTC__
    uint2 words;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "l"(at));
    return words;
#else
    return *(const uint2 *)at;
#endif
}

static __device__ __forceinline__ uint4 fetch_four(const byte *at) {
#ifdef __CUDACC_RTC__
    uint4 words;
    asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
        : "l"(at));
    return words;
#else
    return *(const uint4 *)at;
#endif
}

/* From the one or two aligned words that hold them, neither of which lies wholly outside. */
static __device__ __forceinline__ unsigned word_of_bytes(const byte *at) {
    const unsigned off = (unsigned)(unsigned long long)at & 3;
    return __funnelshift_r(fetch_word(at - off), fetch_word(at + (3 - (off + 3) % 4)), 8 * off);
}

/* Four bytes; bundles may start anywhere, and a word that straddles two is put together. ALIGNED is known when this is
 * compiled: kernels branch on it once for all loads of a step, so that none waits for the one before. */
template <int ALIGNED> static __device__ __forceinline__ unsigned load_word(const byte *at) {
    return ALIGNED ? fetch_word(at) : word_of_bytes(at);
}

template <int ALIGNED> static __device__ __forceinline__ uint2 load_two(const byte *at) {
    if (ALIGNED == 8) return fetch_two(at);
    return make_uint2(load_word<ALIGNED>(at), load_word<ALIGNED>(at + 4));
}

/* N words: 16 bytes a load, or one word. */
template <int ALIGNED, int N> static __device__ __forceinline__ void load_words(const byte *at, unsigned *to) {
    constexpr int WIDTH = ALIGNED < 16 ? 1 : N % 4 ? N : 4;
#pragma unroll
    for (int i = 0; i < N; i += WIDTH) {
        if (WIDTH == 4) {
            const uint4 four = fetch_four(at + 4 * i);
            to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
        } else if (WIDTH == 2) {
            const uint2 two = fetch_two(at + 4 * i);
            to[i] = two.x, to[i + 1] = two.y;
        } else {
            to[i] = load_word<ALIGNED>(at + 4 * i);
        }
    }
}

/* Bits of a where the mask has them, else of b: one instruction, which the compiler would not keep. */
static __device__ __forceinline__ unsigned chosen_bits(unsigned a, unsigned b, unsigned mask) {
#ifdef __CUDACC_RTC__
    unsigned bits;
    asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(bits) : "r"(a), "r"(b), "r"(mask));
    return bits;
#else
    return (a & mask) | (b & ~mask);
#endif
}

/* The lower 2 bits of h, as a 2-bit plane's word: `mid` above `bit`. `second` (0 or 1) says which bits of both are this
 * word's. At one plane the last bit of h is unknown and comes as 0. */
static __device__ __forceinline__ unsigned lower_pairs(unsigned mid, unsigned bit, int second) {
    return PLANES > 1 ? chosen_bits(mid << (1 - second), bit >> second, 0xaaaaaaaau) : mid << (1 - second) & 0xaaaaaaaau;
}

/* h of quarters `odd` (0 or 1) and odd + 2, as the 4-bit plane has c: in the low and in the high nibbles of a word. */
static __device__ __forceinline__ unsigned upper_codes(unsigned top, unsigned pairs, int odd) {
    return chosen_bits(top << (2 - 2 * odd), pairs >> (2 * odd), 0xccccccccu);
}

/* Codes of a quarter as four bytes, from the low or HIGH nibbles of words of h and c. Three planes: 12 h + c, one
 * multiply-add for all four, for no byte exceeds 195. Fewer: 8 h, as `code_float` wants it. */
template <bool HIGH> static __device__ __forceinline__ unsigned merged(unsigned h, unsigned c) {
    if (PLANES < 3) return (HIGH ? h >> 1 : h << 3) & 0x78787878u;
    return CELL * ((HIGH ? h >> 4 : h) & 0x0f0f0f0fu) + ((HIGH ? c >> 4 : c) & 0x0f0f0f0fu);
}

/* Byte K of `merged` as a float, by byte permutation instead of the slow integer conversion.
 * Three planes: the code exactly, 2^23 + code less 2^23. Fewer: 1/2 + h / 32 with no subtraction at all, h being the
 * top of a mantissa; one instruction less for each weight. */
template <int K> static __device__ __forceinline__ float code_float(unsigned codes) {
    if (PLANES < 3) return __int_as_float((int)__byte_perm(codes, 0x3f000000u, 0x7044u | K << 8));
    return __int_as_float((int)__byte_perm(codes, 0x4b000000u, 0x7440u | K)) - 8388608.0f;
}

/* Steps above lo = UNIT * code_float + OFFSET, where unknown bits count as their middle: 13.5, 7.5 or 0. Both products
 * with a step (11 significant bits) are exact in fp32, so fusing their sums changes no bit. */
static constexpr float UNIT = PLANES < 3 ? 32.0f * CELL : 1.0f;
static constexpr float OFFSET = PLANES == 1 ? 13.5f - UNIT / 2 : PLANES == 2 ? 7.5f - UNIT / 2 : 0.0f;

struct Line { /* weight = base + slope * code_float */
    float base, slope;
};

/* Of a group's lo and step, fp16 both. */
static __device__ __forceinline__ Line line_of(unsigned scales) {
    const float lo = half_to_float((half_bits)(scales & 0xffffu)), step = half_to_float((half_bits)(scales >> 16));
    Line line;
    line.base = lo + OFFSET * step;
    line.slope = UNIT * step;
    return line;
}

/* Codes of a quarter as four bytes, whole: 12 h + c, or h where c is not known. */
template <bool HIGH> static __device__ __forceinline__ unsigned code_bytes(unsigned h, unsigned c) {
    return PLANES < 3 ? (HIGH ? h >> 4 : h) & 0x0f0f0f0fu : merged<HIGH>(h, c);
}

/* The same line for whole codes: weight = base + slope * code. */
static __device__ __forceinline__ Line code_line(unsigned scales) {
    const float lo = half_to_float((half_bits)(scales & 0xffffu)), step = half_to_float((half_bits)(scales >> 16));
    Line line;
    line.base = lo + (PLANES == 1 ? 13.5f : PLANES == 2 ? 7.5f : 0.0f) * step;
    line.slope = (PLANES < 3 ? CELL : 1) * step;
    return line;
}

static __device__ __forceinline__ float activated(float v, int activation) {
    switch (activation) { /* the order of contract.ACTIVATIONS; NaN stays NaN */
    case 0: return v / (1.0f + expf(-v));
    case 1: return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
    case 2: return 0.5f * v * (1.0f + tanhf(0.79788456080286536f * (v + 0.044715f * v * v * v)));
    case 3: return v < 0.0f ? 0.0f : v;
    case 4: return v < 0.0f ? 0.0f : v * v;
    default: return v;
    }
}

struct Place { /* of a word in any row: in bytes from the beginnings of planes and scales */
    int top, mid, bit, low, scales;
    int second; /* whether it shares its single bits with a word before it */
};

static __device__ __forceinline__ Place place_of(const Matrix &m, int word) {
    const int words = m.group >> 4, half = words >> 1, group = word / words, within = word % words;
    Place place;
    place.top = 4 * word;
    place.bit = 4 * (group * half + within % half);
    place.mid = 4 * m.groups * words + place.bit; /* behind the row's 2-bit codes */
    place.low = group * (m.group >> 1) + 4 * within;
    place.scales = 4 * group;
    place.second = within >= half;
    return place;
}

struct Word { /* all that is known of 16 weights of a row */
    unsigned top, mid, bit, even, odd, scales; /* even, odd: the 4-bit plane's of quarters 0 and 2, 1 and 3 */
};

template <int ALIGNED>
static __device__ __forceinline__ Word word_at(const Matrix &m, const RowLists &rows, int item, const Place &place) {
    const byte *const top = m.plane[0] + row_of(rows, 0, item) * m.pitch[0];
    const byte *const bit = PLANES > 1 ? m.plane[1] + row_of(rows, 1, item) * m.pitch[1] : 0;
    const byte *const low = PLANES > 2 ? m.plane[2] + row_of(rows, 2, item) * m.pitch[2] + place.low : 0;
    const byte *const scales = m.scales + row_of(rows, 3, item) * m.scales_pitch;
    Word word;
    word.top = load_word<ALIGNED>(top + place.top);
    word.mid = load_word<ALIGNED>(top + place.mid);
    word.bit = PLANES > 1 ? load_word<ALIGNED>(bit + place.bit) : 0;
    word.even = PLANES > 2 ? load_word<ALIGNED>(low) : 0;
    word.odd = PLANES > 2 ? load_word<ALIGNED>(low + (m.group >> 2)) : 0;
    word.scales = load_word<ALIGNED>(scales + place.scales);
    return word;
}

static __device__ __forceinline__ Word word_of(const Matrix &m, const RowLists &rows, int item, const Place &place) {
    return m.aligned ? word_at<4>(m, rows, item, place) : word_at<0>(m, rows, item, place);
}

#endif
