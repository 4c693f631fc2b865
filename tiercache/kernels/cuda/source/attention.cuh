/* The order in which attention is summed up, wherever the sums are made.
 *
 * Slots are cut into slices of 64 and spans of 8 slices, counted from slot 0 whatever the tokens: a slice is summed up
 * by itself, the slices of a span one after another, and so are the spans. Blocks do one slice, one span or all of
 * them, and whatever is left to merge is merged in this very order: the bits are the same each time. */
#ifndef TIERCACHE_ATTENTION_CUH
#define TIERCACHE_ATTENTION_CUH

#include "numbers.cuh"

enum { SLICE = 64, SPAN = 8 }; /* slots, slices */

template <int N> struct Attended { /* exponentials less `top`: their sum, and their sums times N numbers of the values */
    float top, total, value[N];
};

template <int N> static __device__ __forceinline__ void clear(Attended<N> &some) {
    some.top = minus_infinity(), some.total = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) some.value[i] = 0.0f;
}

/* The larger one; NaN if one is. */
static __device__ __forceinline__ float larger(float a, float b) { return a > b || a != a ? a : b; }

/* Adds what comes next. Nothing of it was attended to if its top is minus infinity. */
template <int N>
static __device__ __forceinline__ void merge(Attended<N> &into, float top, float total, const float (&value)[N]) {
    if (top == minus_infinity()) return;
    const float both = larger(into.top, top), before = expf(into.top - both), now = expf(top - both);
    into.top = both;
    into.total = fmaf(total, now, __fmul_rn(into.total, before));
#pragma unroll
    for (int i = 0; i < N; ++i) into.value[i] = fmaf(value[i], now, __fmul_rn(into.value[i], before));
}

#endif
