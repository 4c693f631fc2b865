/* Threads that share work: they spin for some microseconds and then sleep, and nobody waits for one that got no core.
 *
 * A job is drained from a queue by whoever comes (see `share`). The caller drains it too, and closes the job when the
 * queue is empty: a thread that has not come by then has nothing to do with it. So on a machine whose cores others hold,
 * a job takes as long as one thread takes, at worst plus one item that was cut off in its middle. When that happens the
 * next jobs are done alone for ten times as long as was waited.
 *
 * Who does an item changes no bit of a result. Jobs of several callers at once: the second is done by its caller alone.
 */
#ifndef TIERCACHE_POOL_H
#define TIERCACHE_POOL_H

#include "planes.h"

#ifdef __linux__

#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MOST_THREADS 256
#define SPIN_NS 50000      /* between two jobs of a pass less time passes */
#define CUT_OFF_NS 400000  /* a thread that was taken off its core is away for longer: the kernel's slices are */
#define ALONE 10           /* waits; see above */

typedef struct {
    void (*work)(void *);
    void *context;
    int64_t alone_until;
    int32_t threads;            /* that exist, without callers */
    _Atomic int32_t number;     /* of the job; changes wake sleepers */
    _Atomic int32_t sleeping;
    _Atomic int32_t seats;      /* open ones; less than zero: the job is closed */
    _Atomic int32_t inside;     /* threads that work on the job, without the caller */
    _Atomic int32_t waited_for; /* the caller sleeps until nobody is inside */
    _Atomic int32_t cut_off;    /* a thread inside was taken off its core */
    pthread_mutex_t busy;
} Pool;

static Pool pool = {.busy = PTHREAD_MUTEX_INITIALIZER};

static int64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

static void sleep_while(_Atomic int32_t *at, int32_t value) {
    syscall(SYS_futex, at, FUTEX_WAIT_PRIVATE, value, NULL, NULL, 0);
}

static void wake(_Atomic int32_t *at) { syscall(SYS_futex, at, FUTEX_WAKE_PRIVATE, MOST_THREADS, NULL, NULL, 0); }

/* Whether a thread has a seat in the job. It is inside from now on: the caller must know before it closes the job. */
static int take_seat(void) {
    atomic_fetch_add(&pool.inside, 1);
    int32_t seats = pool.seats;
    while (seats > 0)
        if (atomic_compare_exchange_weak(&pool.seats, &seats, seats - 1)) return 1;
    return 0;
}

/* How often this thread was taken off its core so far. */
static long times_cut_off(void) {
    struct rusage usage;
    return getrusage(RUSAGE_THREAD, &usage) ? 0 : usage.ru_nivcsw;
}

static void leave(void) {
    if (atomic_fetch_sub(&pool.inside, 1) == 1 && pool.waited_for) wake(&pool.inside);
}

static void *helper(void *argument) {
    int32_t seen = (int32_t)(intptr_t)argument;
    long cut_off = 0;
    for (;;) {
        const int64_t begin = now_ns();
        for (int turn = 0; pool.number == seen; turn++) {
            relax();
            if (turn % 64 == 63 && now_ns() - begin > SPIN_NS) {
                atomic_fetch_add(&pool.sleeping, 1);
                sleep_while(&pool.number, seen);
                atomic_fetch_sub(&pool.sleeping, 1);
            }
        }
        seen = pool.number;
        if (take_seat()) {
            const int64_t came = now_ns();
            pool.work(pool.context);
            if (now_ns() - came > CUT_OFF_NS) {
                const long times = times_cut_off();
                if (times != cut_off) pool.cut_off = 1;
                cut_off = times;
            }
        }
        leave();
    }
    return NULL;
}

/* A child of fork() has no threads but the one that called it. */
static void forget_threads(void) {
    const Pool fresh = {.busy = PTHREAD_MUTEX_INITIALIZER};
    memcpy(&pool, &fresh, sizeof pool);
}

static void start_threads(int32_t wanted) {
    if (!pool.threads && wanted) pthread_atfork(NULL, NULL, forget_threads);
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before); /* signals are the program's own threads' */
    while (pool.threads < wanted) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, helper, (void *)(intptr_t)pool.number)) break; /* fewer, then */
        pthread_detach(thread);
        pool.threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
}

/* Wait until nobody is inside; how long that took. */
static int64_t wait_for_all(void) {
    if (!pool.inside) return 0;
    const int64_t begin = now_ns();
    for (int turn = 0; pool.inside; turn++) {
        relax();
        if (turn % 64 == 63 && now_ns() - begin > SPIN_NS) {
            pool.waited_for = 1;
            const int32_t inside = pool.inside;
            if (inside) sleep_while(&pool.inside, inside);
            pool.waited_for = 0;
        }
    }
    return now_ns() - begin;
}

/* `work(context)`, by this thread and up to `threads` - 1 others; see `Parallel`. */
static void run_together(void (*work)(void *), void *context, unsigned threads, unsigned flags) {
    (void)flags;
    if (threads > MOST_THREADS) threads = MOST_THREADS;
    if (threads < 2 || pthread_mutex_trylock(&pool.busy)) {
        work(context);
        return;
    }
    if (pool.alone_until && now_ns() < pool.alone_until) {
        pthread_mutex_unlock(&pool.busy);
        work(context);
        return;
    }
    pool.alone_until = 0;
    start_threads((int32_t)threads - 1);
    pool.work = work, pool.context = context;
    pool.cut_off = 0;
    pool.seats = (int32_t)threads - 1;
    atomic_fetch_add(&pool.number, 1);
    if (pool.sleeping) wake(&pool.number);
    work(context);
    pool.seats = 0;
    const int64_t waited = wait_for_all();
    if (waited > CUT_OFF_NS && pool.cut_off) pool.alone_until = now_ns() + ALONE * waited;
    pthread_mutex_unlock(&pool.busy);
}

/* The address of `run_together`, for `Team`; NULL where the system has no such sleep: then the program has OpenMP's. */
EXPORT void *tc_pool(void) { return (void *)run_together; }

#else
EXPORT void *tc_pool(void) { return NULL; }
#endif

#endif
