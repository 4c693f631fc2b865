#include "shim.h"

#include <csetjmp>
#include <cstdlib>
#include <ucontext.h>
#include <vector>

uint3 threadIdx, blockIdx, blockDim, gridDim;
unsigned char *shim_shared;

namespace {

bool misaligned; /* since the launch */

enum State { RUNS, AT_BLOCK_BARRIER, AT_WARP_BARRIER, DONE };
enum { STACK_BYTES = 64 << 10, MOST_THREADS = 1024, CANARIES = 256 };

struct Fiber {
    ucontext_t context; /* for the first entry only: jumps, unlike swaps, cost no system call */
    jmp_buf place;
    bool entered;
    State state;
    unsigned shuffles;
};

Fiber fibers[MOST_THREADS];
float slots[2][MOST_THREADS]; /* two: a fast lane is at most one shuffle ahead */
unsigned operands[2][MOST_THREADS][6]; /* of a matrix instruction, likewise */
ucontext_t unused;
jmp_buf scheduler;
void (*kernel)(const void *);
const void *arguments;

void wait_at(State barrier) {
    Fiber &self = fibers[threadIdx.x];
    self.state = barrier;
    if (!_setjmp(self.place)) _longjmp(scheduler, 1);
}

void run_thread() {
    kernel(arguments);
    fibers[threadIdx.x].state = DONE;
    _longjmp(scheduler, 1);
}

void run(unsigned i) {
    threadIdx.x = i;
    if (_setjmp(scheduler)) return;
    if (fibers[i].entered) _longjmp(fibers[i].place, 1);
    fibers[i].entered = true;
    swapcontext(&unused, &fibers[i].context);
}

void start(unsigned i, unsigned char *stack) {
    Fiber &fiber = fibers[i];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stack;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.entered = false;
    fiber.state = RUNS, fiber.shuffles = 0;
    makecontext(&fiber.context, run_thread, 0);
}

unsigned release(unsigned first, unsigned end, State barrier) {
    for (unsigned i = first; i < end; ++i)
        if (fibers[i].state != barrier) return 0;
    for (unsigned i = first; i < end; ++i) fibers[i].state = RUNS;
    return end - first;
}

bool run_block(unsigned threads, unsigned char *stacks) {
    for (unsigned i = 0; i < threads; ++i) start(i, stacks + (size_t)i * STACK_BYTES);
    for (bool backwards = false;; backwards = !backwards) {
        unsigned done = 0;
        for (unsigned turn = 0; turn < threads; ++turn) {
            const unsigned i = backwards ? threads - 1 - turn : turn;
            if (fibers[i].state == RUNS) run(i);
            done += fibers[i].state == DONE;
        }
        if (done == threads) return true;
        unsigned freed = release(0, threads, AT_BLOCK_BARRIER);
        for (unsigned w = 0; w + 32 <= threads; w += 32) freed += release(w, w + 32, AT_WARP_BARRIER);
        if (!freed) return false;
    }
}

} // namespace

void shim_block_barrier() { wait_at(AT_BLOCK_BARRIER); }
void shim_warp_barrier() { wait_at(AT_WARP_BARRIER); }

float shim_shuffle(float value, int from) {
    float *slot = slots[fibers[threadIdx.x].shuffles++ & 1];
    slot[threadIdx.x] = value;
    wait_at(AT_WARP_BARRIER);
    return slot[(threadIdx.x & ~31u) + from];
}

float shim_shuffle_xor(float value, int far) { return shim_shuffle(value, (threadIdx.x & 31) ^ far); }

/* sums[16 x 8] += a[16 x 32] b[32 x 8], of unsigned and of signed bytes, as lanes hold them on a card. */
void shim_mma(int *sums, const unsigned *first, const unsigned *second, unsigned x, unsigned y) {
    const unsigned self = threadIdx.x, warp = self & ~31u, lane = self & 31;
    unsigned(*const all)[6] = operands[fibers[self].shuffles++ & 1];
    const unsigned own[6] = {first[0], first[1], second[0], second[1], x, y};
    memcpy(all[self], own, sizeof own);
    wait_at(AT_WARP_BARRIER);
    for (unsigned i = 0; i < 4; ++i) /* rows lane / 4, and 8 on; columns 2 (lane % 4), and the next */
        for (unsigned k = 0; k < 32; ++k) {
            const unsigned *const a = all[warp + lane / 4 * 4 + k % 16 / 4];
            const unsigned *const b = all[warp + (lane % 4 * 2 + i % 2) * 4 + k % 16 / 4];
            const unsigned code = a[k / 16 * 2 + i / 2] >> k % 4 * 8 & 255, digit = b[4 + k / 16] >> k % 4 * 8 & 255;
            sums[i] += (int)code * (int)(signed char)digit;
        }
}

/* Called before an access whose address its width does not allow: a host forgives it, a card does not. */
extern "C" void __ubsan_handle_type_mismatch_v1(void *, unsigned long) { misaligned = true; }

/* 0; 1: a barrier not all threads reach; 2: a write past the shared memory asked for; 3: an access not aligned. */
extern "C" int shim_launch(void (*what)(const void *), const unsigned *grid, unsigned threads, unsigned shared_bytes,
                           const void *with) {
    kernel = what, arguments = with;
    gridDim = {grid[0], grid[1], grid[2]}, blockDim = {threads, 1, 1}, threadIdx = {0, 0, 0};
    static std::vector<unsigned char> stacks((size_t)MOST_THREADS * STACK_BYTES);
    shim_shared = (unsigned char *)aligned_alloc(256, (shared_bytes + CANARIES + 255) / 256 * 256);
    int result = 0;
    misaligned = false;
    for (unsigned z = 0; z < grid[2] && !result; ++z)
        for (unsigned y = 0; y < grid[1] && !result; ++y)
            for (unsigned x = 0; x < grid[0] && !result; ++x) {
                blockIdx = {x, y, z};
                memset(shim_shared, 0xff, shared_bytes + CANARIES);
                if (!run_block(threads, stacks.data())) result = 1;
                for (int i = 0; i < CANARIES && !result; ++i)
                    if (shim_shared[shared_bytes + i] != 0xff) result = 2;
            }
    free(shim_shared);
    return result ? result : misaligned ? 3 : 0;
}
