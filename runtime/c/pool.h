/* Worker threads behind TVM's parallel loops, and scratch memory for kernels.
 *
 * A pool belongs to one instance. Its threads start at the first parallel loop, no more than there are CPUs. Each
 * always gets the same share of a loop's tasks, so that it finds in its own cache what it wrote in the loop before.
 * The launching thread takes over the share of a worker that does not begin in time: one that the system keeps
 * waiting delays nothing, and a launch also completes in a forked child, where no worker exists.
 */
#ifndef BNNCC_POOL_H
#define BNNCC_POOL_H

#include <pthread.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "tvm_abi.h"

/* A stack of bytes for kernels' workspaces, kept from run to run. */
typedef struct {
  unsigned char *base;
  size_t capacity, used;
  size_t wanted; /* capacity to grow to when the stack is next empty */
} Scratch;

typedef struct Pool Pool;

/* A share of a launch: tasks first … end - 1. */
typedef struct {
  ParallelLambda lambda;
  void *data;
  ParallelEnv env;
  int first, end;
} Share;

/* What two threads write lies in cache lines of its own; some processors fetch pairs of them. */
enum { APART = 128 };

typedef struct {
  Pool *pool;
  pthread_t thread;
  Scratch scratch;
  int in_task; /* a launch from inside a task runs in place */

  /* Written by the launching thread: the share first, then its number, which the worker waits for. */
  _Alignas(APART) _Atomic uint32_t launch;
  Share share;
  /* Number of the last share that was taken: it goes from one to the next, whoever takes it. In the worker's cache. */
  _Alignas(APART) _Atomic uint32_t taken;
  /* Written by the worker: number of the last share that it has finished, and whether it sleeps. */
  _Alignas(APART) _Atomic uint32_t done;
  _Atomic uint32_t asleep;
} Worker;

struct Pool {
  int threads;     /* tasks of a launch that leaves their number open, the launching thread's included */
  int crew;        /* threads that work: no more than CPUs */
  int started;     /* workers running, 0 before the first parallel launch */
  pid_t process;   /* that started them */
  Worker *workers; /* [crew]; the first is the launching thread */

  char error[256]; /* of the first task that failed */
  atomic_int failed;
  atomic_int stop;
  _Atomic uint32_t launcher_sleeps; /* until some worker is done */
};

/* Returns 0, or -1 with bnncc_error set. */
int pool_init(Pool *pool, int threads);
/* The same with so many threads at work, from 1 to `threads`. */
int pool_hire(Pool *pool, int threads, int crew);
/* Ends the threads and frees what the pool holds; a zeroed pool is allowed. */
void pool_destroy(Pool *pool);

/* Makes the calling thread the pool's launching thread; pass the result to pool_leave. */
Worker *pool_enter(Pool *pool);
void pool_leave(Worker *outer);
/* Forgets workspaces that a failed kernel left behind. */
void pool_reset_scratch(Pool *pool);

#endif
