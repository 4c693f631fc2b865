/* CUDA's words for a host compiler: a block is a set of fibers, one a thread; blocks run one after another.
 *
 * Shared memory starts as NaN for every block and ends in canaries; fibers take turns in an order that is reversed
 * after each round, so that a missing barrier shows; a barrier that not all reach is an error, not a hang, and so is an
 * address that a card would refuse.
 */
#ifndef SHIM_H
#define SHIM_H

#include <cmath>
#include <cstring>

struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct uint3 { unsigned x, y, z; };

extern uint3 threadIdx, blockIdx, blockDim, gridDim;
extern unsigned char *shim_shared;
void shim_block_barrier();
void shim_warp_barrier();
float shim_shuffle_xor(float value, int far);
float shim_shuffle(float value, int from);
void shim_mma(int *sums, const unsigned *first, const unsigned *second, unsigned x, unsigned y);

#define __device__
#define __forceinline__ inline
#define __restrict__
#define SHARED(type, name) type *const name = (type *)shim_shared
#define KERNEL(name, Arguments) SHIM_KERNEL(name, Arguments)
#define SIZED_KERNEL(threads, blocks, name, Arguments) SHIM_KERNEL(name, Arguments)
#define SHIM_KERNEL(name, Arguments) \
    static void name##_body(const Arguments &a); \
    extern "C" void name(const void *a) { name##_body(*(const Arguments *)a); } \
    extern "C" unsigned name##_bytes() { return sizeof(Arguments); } \
    static void name##_body(const Arguments &a)

static inline void __syncthreads() { shim_block_barrier(); }
static inline void __syncwarp() { shim_warp_barrier(); }
static inline float __shfl_xor_sync(unsigned, float value, int far) { return shim_shuffle_xor(value, far); }
static inline float __shfl_sync(unsigned, float value, int from) { return shim_shuffle(value, from); }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline int min(int a, int b) { return a < b ? a : b; }
static inline int max(int a, int b) { return a > b ? a : b; }
static inline int __float2int_rn(float value) { return (int)lrintf(value); }

static inline int __float_as_int(float value) {
    int bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float __int_as_float(int bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return (unsigned)(((unsigned long long)high << 32 | low) >> (by & 31));
}

/* sum + codes * digits, of four unsigned and four signed bytes. */
static inline int shim_dot4(unsigned codes, unsigned digits, int sum) {
    for (int i = 0; i < 32; i += 8) sum += (int)(codes >> i & 255) * (int)(signed char)(digits >> i & 255);
    return sum;
}

static inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const unsigned long long both = (unsigned long long)y << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) result |= (unsigned)(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
    return result;
}

static inline float shim_half_to_float(unsigned short bits) {
    const int sign = bits >> 15, exponent = bits >> 10 & 31, mantissa = bits & 1023;
    float value = ldexpf((float)(exponent ? mantissa + 1024 : mantissa), (exponent ? exponent : 1) - 25);
    if (exponent == 31) value = mantissa ? NAN : INFINITY;
    return sign ? -value : value;
}

static inline unsigned short shim_float_to_half(float value) { /* to the nearest, ties to even */
    const unsigned bits = (unsigned)__float_as_int(value), sign = bits >> 16 & 0x8000u;
    const float size = fabsf(value);
    if (size != size) return 0x7fff;
    if (size >= 65520.0f) return (unsigned short)(sign | 0x7c00u);
    if (size < ldexpf(1.0f, -14)) return (unsigned short)(sign | (unsigned)nearbyintf(ldexpf(size, 24)));
    const unsigned kept = (bits & 0x7fffffffu) - (112u << 23);
    return (unsigned short)(sign | (kept + 0xfffu + (kept >> 13 & 1)) >> 13);
}

#endif
