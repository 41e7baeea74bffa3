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

enum { SPIN_NANOSECONDS = 100000, STACK_BYTES = 1 << 20 };
/* How long the launching thread waits for a worker before it looks whether that has begun at all: to look costs the
 * worker a transfer between caches. */
enum { PATIENCE_NANOSECONDS = 2000 };

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

/* Spins until *word differs from `seen`, for a while at most; returns whether it does. */
static int spin_while(_Atomic uint32_t *word, uint32_t seen, int64_t nanoseconds) {
  int64_t deadline = now() + nanoseconds;
  do {
    for (int i = 0; i < 64; i++) {
      if (atomic_load_explicit(word, memory_order_acquire) != seen) return 1;
      cpu_relax();
    }
  } while (now() < deadline);
  return 0;
}

/* Runs a share on the thread of `self`. */
static void run_share(Pool *pool, Worker *self, Share *share) {
  for (int task = share->first; task < share->end; task++) {
    size_t mark = self->scratch.used;
    if (share->lambda(task, &share->env, share->data) && !atomic_exchange(&pool->failed, 1))
      strncpy(pool->error, bnncc_error(), sizeof pool->error - 1);
    self->scratch.used = mark;
  }
}

/* Whether share number `launch` of a worker is the caller's now. Until it is taken and done, no next one is given out;
 * so its number and its content stay, and whoever comes too late finds it taken. */
static int take(Worker *worker, uint32_t launch) {
  uint32_t before = launch - 1;
  return atomic_compare_exchange_strong(&worker->taken, &before, launch);
}

static void *work(void *argument) {
  Worker *self = current = argument;
  Pool *pool = self->pool;
  self->in_task = 1;
  for (uint32_t seen = 0;;) {
    if (!spin_while(&self->launch, seen, SPIN_NANOSECONDS)) {
      atomic_store(&self->asleep, 1);
      while (atomic_load(&self->launch) == seen) futex_wait(&self->launch, seen);
      atomic_store(&self->asleep, 0);
    }
    seen = atomic_load_explicit(&self->launch, memory_order_acquire);
    if (atomic_load(&pool->stop)) return NULL;
    if (!take(self, seen)) continue;
    run_share(pool, self, &self->share);
    atomic_store(&self->done, seen);
    if (atomic_load(&pool->launcher_sleeps)) futex_wake(&self->done, 1);
  }
}

/* Waits until the worker's share is done; does it here if the worker has not begun. */
static void finish_share(Pool *pool, Worker *worker) {
  uint32_t launch = atomic_load_explicit(&worker->launch, memory_order_relaxed), done;
  /* What `done` says now: an older launch where this thread did the last ones. */
  if ((done = atomic_load_explicit(&worker->done, memory_order_acquire)) == launch) return;
  if (spin_while(&worker->done, done, PATIENCE_NANOSECONDS)) return;
  if (atomic_load_explicit(&worker->taken, memory_order_acquire) != launch && take(worker, launch)) {
    run_share(pool, &pool->workers[0], &worker->share);
    return;
  }
  if (spin_while(&worker->done, done, SPIN_NANOSECONDS)) return;
  atomic_store(&pool->launcher_sleeps, 1);
  while ((done = atomic_load(&worker->done)) != launch) futex_wait(&worker->done, done);
  atomic_store(&pool->launcher_sleeps, 0);
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
  while (count < pool->crew && !pthread_create(&pool->workers[count].thread, &attributes, work, &pool->workers[count]))
    count++;
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  pthread_attr_destroy(&attributes);
  pool->crew = count;
  pool->started = count - 1;
}

int pool_init(Pool *pool, int threads) {
  int cpus = cpu_count();
  return pool_hire(pool, threads, threads < cpus ? threads : cpus);
}

int pool_hire(Pool *pool, int threads, int crew) {
  memset(pool, 0, sizeof *pool);
  pool->workers = aligned_alloc(APART, (size_t)crew * sizeof(Worker));
  if (!pool->workers) return bnncc_fail("out of memory for %d threads", threads);
  memset(pool->workers, 0, (size_t)crew * sizeof(Worker));
  pool->threads = threads;
  pool->crew = crew;
  for (int i = 0; i < crew; i++) pool->workers[i].pool = pool;
  return 0;
}

void pool_destroy(Pool *pool) {
  if (!pool->workers) return;
  atomic_store(&pool->stop, 1);
  for (int i = 1; i <= pool->started; i++) {
    atomic_fetch_add(&pool->workers[i].launch, 1);
    futex_wake(&pool->workers[i].launch, 1);
  }
  /* A forked child has the pool's memory but not its threads. */
  if (pool->started && pool->process == getpid())
    for (int i = 1; i <= pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
  for (int i = 0; i < pool->crew; i++) free(pool->workers[i].scratch.base);
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
  if (!pool || self->in_task || pool->threads == 1 || num_task == 1) {
    ParallelEnv env = {.num_task = num_task > 0 ? num_task : 1};
    int failed = 0;
    for (int task = 0; task < env.num_task && !failed; task++) failed = lambda(task, &env, data);
    return failed;
  }
  if (!pool->started && pool->crew > 1) start(pool);
  int tasks = num_task > 0 ? num_task : pool->threads;
  int shares = tasks < pool->crew ? tasks : pool->crew;
  for (int i = 0, first = 0; i < shares; i++) {
    Worker *worker = &pool->workers[i];
    int end = (int)((int64_t)(i + 1) * tasks / shares);
    worker->share = (Share){lambda, data, {.num_task = tasks}, first, end};
    first = end;
    if (!i) continue;
    /* Without a fence, which would wait for the worker's cache line: one that falls asleep right now may stay so, and
     * the launching thread does its share. */
    uint32_t asleep = atomic_load_explicit(&worker->asleep, memory_order_relaxed);
    uint32_t launch = atomic_load_explicit(&worker->launch, memory_order_relaxed);
    atomic_store_explicit(&worker->launch, launch + 1, memory_order_release);
    if (asleep) futex_wake(&worker->launch, 1);
  }
  self->in_task = 1;
  run_share(pool, self, &self->share);
  for (int i = 1; i < shares; i++) finish_share(pool, &pool->workers[i]);
  self->in_task = 0;
  if (!atomic_load_explicit(&pool->failed, memory_order_relaxed)) return 0;
  atomic_store_explicit(&pool->failed, 0, memory_order_relaxed);
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
