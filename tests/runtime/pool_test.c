/* Checks of the thread pool that no compiled kernel can make. Prints what is wrong; exits 0 when nothing is. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

#include "cpu.h"
#include "driver.h"
#include "pool.h"

extern int (*__TVMBackendParallelLaunch)(ParallelLambda, void *, int);
extern void *(*__TVMBackendAllocWorkspace)(int, int, uint64_t, int, int);
extern int (*__TVMBackendFreeWorkspace)(int, int, void *);
extern void TVMFFIErrorSetRaisedFromCStrParts(const char *, const char **, int32_t);

const Model bnncc_model; /* the driver wants one */

#define CHECK(condition) \
  if (!(condition)) return printf("line %d: %s\n", __LINE__, #condition), 1

enum { MOST = 1000 };
typedef struct {
  atomic_int ran[MOST], sum, tasks;
} Counts;

static int count(int task, ParallelEnv *env, void *data) {
  Counts *counts = data;
  atomic_store(&counts->tasks, env->num_task);
  atomic_fetch_add(&counts->ran[task], 1);
  return 0;
}

static int launch(ParallelLambda lambda, void *data, int tasks) { return __TVMBackendParallelLaunch(lambda, data, tasks); }

static int every_task_runs_once(Pool *pool) {
  for (int tasks = 0; tasks < 40; tasks++) {
    Counts counts = {0};
    int wanted = tasks ? tasks : pool->threads;
    CHECK(!launch(count, &counts, tasks) && counts.tasks == wanted);
    for (int i = 0; i < MOST; i++) CHECK(counts.ran[i] == (i < wanted));
  }
  return 0;
}

static int quickly_one_after_another(void) {
  Counts counts = {0};
  for (int i = 0; i < 50000; i++) CHECK(!launch(count, &counts, 3));
  CHECK(counts.ran[0] == 50000 && counts.ran[1] == 50000 && counts.ran[2] == 50000 && !counts.ran[3]);
  for (int i = 0; i < 50; i++) { /* with pauses in which the workers fall asleep */
    CHECK(!launch(count, &counts, 3));
    usleep(500);
  }
  return 0;
}

static int nested(int task, ParallelEnv *env, void *data) {
  (void)env;
  Counts inner = {0}; /* a launch inside a task runs here, as one task when the number is open */
  if (launch(count, &inner, 0) || inner.tasks != 1 || inner.ran[0] != 1) return -1;
  if (launch(count, &inner, 5) || inner.ran[4] != 1) return -1;
  atomic_fetch_add(&((Counts *)data)->sum, task);
  return 0;
}

static int fail_at_five(int task, ParallelEnv *env, void *data) {
  (void)env, (void)data;
  const char *parts[] = {"task ", "five\n", "broke"};
  if (task == 5) TVMFFIErrorSetRaisedFromCStrParts("ValueError", parts, 3);
  return task == 5 ? -1 : 0;
}

static int errors_arrive(void) {
  Counts counts = {0};
  for (int i = 0; i < 200; i++) {
    bnncc_fail("%s", "");
    CHECK(launch(fail_at_five, NULL, 12) == -1 && !strcmp(bnncc_error(), "ValueError: task five broke"));
    CHECK(!launch(count, &counts, 2));
  }
  return 0;
}

static int use_workspace(int task, ParallelEnv *env, void *data) {
  (void)env, (void)data;
  size_t sizes[] = {100, 5000, 64, 300000};
  unsigned char *blocks[4];
  for (int i = 0; i < 4; i++) {
    blocks[i] = __TVMBackendAllocWorkspace(1, 0, sizes[i], 2, 32);
    if (!blocks[i] || (uintptr_t)blocks[i] % 64) return -1;
    memset(blocks[i], task + i, sizes[i]);
  }
  for (int i = 3; i >= 0; i--) {
    for (size_t j = 0; j < sizes[i]; j++)
      if (blocks[i][j] != (unsigned char)(task + i)) return -1;
    if (__TVMBackendFreeWorkspace(1, 0, blocks[i])) return -1;
  }
  return 0;
}

static int leak_workspace(int task, ParallelEnv *env, void *data) {
  (void)task, (void)env, (void)data;
  return !__TVMBackendAllocWorkspace(1, 0, 1000, 2, 32);
}

static int workspaces_are_kept(Pool *pool) {
  for (int i = 0; i < 10; i++) CHECK(!launch(use_workspace, NULL, 8));
  if (pool->threads == 1) return 0;
  unsigned char *first = __TVMBackendAllocWorkspace(1, 0, 1000, 2, 32);
  CHECK(!launch(leak_workspace, NULL, 8)); /* what a failed task leaves behind is gone, what lay below it is not */
  CHECK(pool->workers[0].scratch.used == 1024);
  __TVMBackendFreeWorkspace(1, 0, first);
  CHECK(pool->workers[0].scratch.used == 0 && __TVMBackendAllocWorkspace(1, 0, 1000, 2, 32) == first);
  pool_reset_scratch(pool);
  return 0;
}

static int a_fork_goes_on(Pool *pool) {
  Counts counts = {0};
  CHECK(!launch(count, &counts, 4));
  pid_t child = fork();
  if (!child) {
    for (int i = 0; i < 100; i++)
      if (launch(count, &counts, 4)) _exit(1);
    pool_destroy(pool);
    _exit(counts.ran[3] != 101);
  }
  int status;
  CHECK(waitpid(child, &status, 0) == child && !status);
  return 0;
}

static int slow_share(int task, ParallelEnv *env, void *data) {
  if (task >= env->num_task / 2) usleep(20000);
  return count(task, env, data);
}

static int the_launching_thread_sleeps(Pool *pool) {
  Counts counts = {0};
  for (int i = 0; i < 3; i++) { /* workers that are long at work, longer than anyone spins */
    CHECK(!launch(count, &counts, 0));
    CHECK(!launch(slow_share, &counts, pool->threads));
  }
  for (int i = 0; i < pool->threads; i++) CHECK(counts.ran[i] == 6);
  return 0;
}

typedef struct {
  pthread_t by[MOST];
} Runners;

static int note_thread(int task, ParallelEnv *env, void *data) {
  (void)env;
  ((Runners *)data)->by[task] = pthread_self();
  return 0;
}

/* Tasks of one thread follow each other, in the order of the threads, but for those of workers who came too late. */
static int shares_are_runs(Pool *pool) {
  for (int tasks = 2; tasks < 40; tasks++) {
    Runners runners;
    CHECK(!launch(note_thread, &runners, tasks));
    int shares = tasks < pool->crew ? tasks : pool->crew;
    for (int i = 0, task = 0; i < shares; i++)
      for (int end = (i + 1) * tasks / shares; task < end; task++)
        CHECK(pthread_equal(runners.by[task], pthread_self()) ||
              (i && pthread_equal(runners.by[task], pool->workers[i].thread)));
  }
  return 0;
}

/* A pool with workers that never come: every share falls to the launching thread. */
static int nobody_comes(void) {
  Pool pool;
  Counts counts = {0};
  CHECK(!pool_hire(&pool, 4, 4));
  pool.started = 3;
  Worker *outer = pool_enter(&pool);
  for (int i = 0; i < 1000; i++) CHECK(!launch(count, &counts, 0));
  for (int i = 0; i < 4; i++) CHECK(counts.ran[i] == 1000);
  pool_leave(outer);
  pool.started = 0;
  pool_destroy(&pool);
  return 0;
}

static int no_more_workers_than_cpus(void) {
  Pool pool;
  Counts counts = {0};
  CHECK(!pool_init(&pool, 500) && pool.threads == 500 && pool.crew <= cpu_count());
  Worker *outer = pool_enter(&pool);
  CHECK(!launch(count, &counts, 0) && counts.tasks == 500 && pool.started == pool.crew - 1);
  for (int i = 0; i < 500; i++) CHECK(counts.ran[i] == 1);
  pool_leave(outer);
  pool_destroy(&pool);
  return 0;
}

static int check_pool(int threads) {
  Pool pool;
  Counts counts = {0};
  CHECK(!pool_hire(&pool, threads, threads) && !pool.started);
  Worker *outer = pool_enter(&pool);
  if (every_task_runs_once(&pool) || quickly_one_after_another() || errors_arrive() || workspaces_are_kept(&pool) ||
      the_launching_thread_sleeps(&pool) || shares_are_runs(&pool))
    return 1;
  CHECK(pool.started == threads - 1);
  CHECK(!launch(nested, &counts, 10) && counts.sum == 45);
  if (a_fork_goes_on(&pool)) return 1;
  pool_leave(outer);
  pool_destroy(&pool);
  for (int i = 0; i < 200; i++) { /* starting and ending at once */
    CHECK(!pool_hire(&pool, threads, threads));
    outer = pool_enter(&pool);
    if (i % 2) CHECK(!launch(count, &counts, 2));
    pool_leave(outer);
    pool_destroy(&pool);
  }
  return 0;
}

static void *check_in_thread(void *threads) { return (void *)(intptr_t)check_pool((int)(intptr_t)threads); }

int main(void) {
  Counts counts = {0};
  CHECK(!launch(count, &counts, 0) && counts.tasks == 1); /* outside any instance */
  if (nobody_comes() || no_more_workers_than_cpus()) return 1;
  for (int threads = 1; threads <= 5; threads += 2)
    if (check_pool(threads)) return printf("with %d threads\n", threads), 1;
  pthread_t handles[3]; /* pools beside each other */
  for (int i = 0; i < 3; i++) pthread_create(&handles[i], NULL, check_in_thread, (void *)(intptr_t)(i + 1));
  for (int i = 0; i < 3; i++) {
    void *failed;
    pthread_join(handles[i], &failed);
    if (failed) return 1;
  }
  return 0;
}
