/* Matrix units of cards from compute capability 8.0 on, and copies to shared memory that go on by themselves. */
#ifndef TIERCACHE_UNITS_CUH
#define TIERCACHE_UNITS_CUH

#include "planes.cuh"

#if !defined(__CUDACC_RTC__) || __CUDA_ARCH__ >= 800
/* sums += codes * digits, of 16 lines x 32 by 32 x 8 tokens. Lane (g, own), 4 g + own, gives the codes 4 own and the next
 * three of lines g and g + 8, and those 16 further on; in x and y the same digits of token g. It has the sums of lines g
 * (0, 1) and g + 8 (2, 3) for tokens 2 own and the next. */
static __device__ __forceinline__ void mma(int *sums, const unsigned *codes, unsigned x, unsigned y) {
#ifdef __CUDACC_RTC__
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+r"(sums[0]), "+r"(sums[1]), "+r"(sums[2]), "+r"(sums[3])
                 : "r"(codes[0]), "r"(codes[1]), "r"(codes[2]), "r"(codes[3]), "r"(x), "r"(y));
#else
    shim_mma(sums, codes, codes + 2, x, y);
#endif
}
#endif

/* 16 bytes, both at such places. */
static __device__ __forceinline__ void copy_16(byte *to, const byte *from) {
#ifndef __CUDACC_RTC__
    *(uint4 *)to = *(const uint4 *)from;
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
#endif
}

static __device__ __forceinline__ void copy_4(byte *to, const byte *from) {
#ifndef __CUDACC_RTC__
    *(unsigned *)to = *(const unsigned *)from;
#elif __CUDA_ARCH__ >= 800
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
#endif
}

/* What this lane has begun to copy is there. */
static __device__ __forceinline__ void copies_are_there() {
#if defined(__CUDACC_RTC__) && __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

#endif
