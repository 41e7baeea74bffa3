#define _GNU_SOURCE
#include "pool.h"

#include <linux/futex.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "cpu.h"
#include "driver.h"

enum { SPIN_NANOSECONDS = 100000, STACK_BYTES = 1 << 20, MOST_TASKS = 0xffff };

/* The pool that a parallel loop on this thread belongs to; TVM's hook has no argument that could carry it. */
static _Thread_local Worker *current;

static void futex_wait(_Atomic uint32_t *word, uint32_t seen) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word, int threads) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, threads, NULL, NULL, 0);
}

static inline void cpu_relax(void) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__) || defined(__arm__)
  __asm__ volatile("yield" ::: "memory");
#endif
}

static int64_t now(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

/* Spins until *word differs from `seen`, for a while at most. */
static void spin_while(const Pool *pool, _Atomic uint32_t *word, uint32_t seen) {
  if (!pool->spin) return;
  int64_t deadline = now() + SPIN_NANOSECONDS;
  do {
    for (int i = 0; i < 64; i++) {
      if (atomic_load_explicit(word, memory_order_acquire) != seen) return;
      cpu_relax();
    }
  } while (now() < deadline);
}

/* The next task of the launch in progress, or -1. */
static int take_task(Pool *pool) {
  uint64_t ticket = atomic_load_explicit(&pool->ticket, memory_order_acquire);
  do {
    if ((ticket & 0xffff) >= (ticket >> 16 & 0xffff)) return -1;
  } while (!atomic_compare_exchange_weak_explicit(&pool->ticket, &ticket, ticket + 1, memory_order_acq_rel,
                                                  memory_order_acquire));
  return (int)(ticket & 0xffff);
}

static void run_tasks(Pool *pool, Worker *self) {
  for (int task; (task = take_task(pool)) >= 0;) {
    uint32_t tasks = (uint32_t)pool->env.num_task;
    size_t mark = self->scratch.used;
    if (pool->lambda(task, &pool->env, pool->data) && !atomic_exchange(&pool->failed, 1))
      strncpy(pool->error, bnncc_error(), sizeof pool->error - 1);
    self->scratch.used = mark;
    /* After the last increment the launching thread may go on at once: the job is not ours any more. */
    if (atomic_fetch_add(&pool->done, 1) + 1 == tasks && atomic_load(&pool->launcher_sleeps))
      futex_wake(&pool->done, 1);
  }
}

static void *work(void *argument) {
  Worker *self = current = argument;
  Pool *pool = self->pool;
  self->in_task = 1;
  for (;;) {
    uint32_t seen = atomic_load(&pool->launches); /* first of all: whatever comes later must end the wait */
    if (atomic_load(&pool->stop)) return NULL;
    run_tasks(pool, self);
    spin_while(pool, &pool->launches, seen);
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(&pool->launches) == seen) futex_wait(&pool->launches, seen);
    atomic_fetch_sub(&pool->sleepers, 1);
  }
}

static void announce(Pool *pool) {
  atomic_fetch_add(&pool->launches, 1);
  if (atomic_load(&pool->sleepers)) futex_wake(&pool->launches, pool->threads);
}

/* Starts the workers; where the system refuses some, the pool works with those it got. */
static void start(Pool *pool) {
  pthread_attr_t attributes;
  sigset_t all, before;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, STACK_BYTES);
  sigfillset(&all); /* signals are for the threads of the program, not for ours */
  pthread_sigmask(SIG_SETMASK, &all, &before);
  pool->process = getpid();
  int count = 1;
  while (count < pool->threads &&
         !pthread_create(&pool->workers[count].thread, &attributes, work, &pool->workers[count]))
    count++;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  pool->threads = count;
  pool->started = count - 1;
}

int pool_init(Pool *pool, int threads) {
  memset(pool, 0, sizeof *pool);
  pool->workers = calloc((size_t)threads, sizeof(Worker));
  if (!pool->workers) return bnncc_fail("out of memory for %d threads", threads);
  pool->threads = threads;
  pool->spin = threads <= cpu_count();
  for (int i = 0; i < threads; i++) pool->workers[i].pool = pool;
  return 0;
}

void pool_destroy(Pool *pool) {
  if (!pool->workers) return;
  atomic_store(&pool->stop, 1);
  announce(pool);
  /* A forked child has the pool's memory but not its threads. */
  if (pool->started && pool->process == getpid())
    for (int i = 1; i <= pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
  for (int i = 0; i < pool->threads; i++) free(pool->workers[i].scratch.base);
  free(pool->workers);
  memset(pool, 0, sizeof *pool);
}

Worker *pool_enter(Pool *pool) {
  Worker *outer = current;
  current = &pool->workers[0];
  return outer;
}

void pool_leave(Worker *outer) { current = outer; }

void pool_reset_scratch(Pool *pool) { pool->workers[0].scratch.used = 0; }

/* TVMBackendParallelLaunch: runs lambda for each of num_task tasks, 0 meaning as many as the pool has threads. */
static int parallel_launch(ParallelLambda lambda, void *data, int num_task) {
  Worker *self = current;
  Pool *pool = self ? self->pool : NULL;
  if (!pool || self->in_task || pool->threads == 1 || num_task == 1 || num_task > MOST_TASKS) {
    ParallelEnv env = {.num_task = num_task > 0 ? num_task : 1};
    int failed = 0;
    for (int task = 0; task < env.num_task && !failed; task++) failed = lambda(task, &env, data);
    return failed;
  }
  if (!pool->started) start(pool);
  uint32_t tasks = (uint32_t)(num_task > 0 ? num_task : pool->threads);
  pool->lambda = lambda;
  pool->data = data;
  pool->env = (ParallelEnv){.num_task = (int32_t)tasks};
  atomic_store_explicit(&pool->failed, 0, memory_order_relaxed);
  atomic_store_explicit(&pool->done, 0, memory_order_relaxed);
  uint64_t launch = (atomic_load_explicit(&pool->ticket, memory_order_relaxed) >> 32) + 1;
  atomic_store_explicit(&pool->ticket, launch << 32 | tasks << 16, memory_order_release);
  announce(pool);

  self->in_task = 1;
  run_tasks(pool, self);
  self->in_task = 0;
  for (uint32_t done; (done = atomic_load_explicit(&pool->done, memory_order_acquire)) < tasks;) {
    spin_while(pool, &pool->done, done);
    atomic_store(&pool->launcher_sleeps, 1);
    if ((done = atomic_load(&pool->done)) < tasks) futex_wait(&pool->done, done);
    atomic_store(&pool->launcher_sleeps, 0);
  }
  if (!atomic_load_explicit(&pool->failed, memory_order_relaxed)) return 0;
  return bnncc_fail("%s", pool->error);
}

/* TVMBackendAllocWorkspace: 64-byte aligned. Kernels free in the reverse order of allocation. */
static void *workspace_alloc(int device, int id, uint64_t bytes, int code, int bits) {
  (void)device, (void)id, (void)code, (void)bits;
  size_t size = ((size_t)bytes + 63) / 64 * 64;
  if (!current) return aligned_alloc(64, size);
  Scratch *scratch = &current->scratch;
  if (scratch->wanted < size) scratch->wanted = size;
  if (!scratch->used && scratch->wanted > scratch->capacity) {
    free(scratch->base);
    scratch->base = aligned_alloc(64, scratch->wanted);
    scratch->capacity = scratch->base ? scratch->wanted : 0;
  }
  if (size > scratch->capacity - scratch->used) { /* this once from the system; the stack grows when it is empty */
    scratch->wanted = (scratch->wanted > scratch->capacity ? scratch->wanted : scratch->capacity) + size;
    return aligned_alloc(64, size);
  }
  void *workspace = scratch->base + scratch->used;
  scratch->used += size;
  return workspace;
}

static int workspace_free(int device, int id, void *workspace) {
  (void)device, (void)id;
  Scratch *scratch = current ? &current->scratch : NULL;
  uintptr_t base = scratch ? (uintptr_t)scratch->base : 0, at = (uintptr_t)workspace;
  if (scratch && at >= base && at < base + scratch->capacity)
    scratch->used = at - base;
  else
    free(workspace);
  return 0;
}

/* The names are TVM's; objects hold weak null definitions of them, which these override at link time. */
int (*__TVMBackendParallelLaunch)(ParallelLambda, void *, int) = parallel_launch;
void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int) = workspace_alloc;
int (*__TVMBackendFreeWorkspace)(int, int, void *) = workspace_free;
