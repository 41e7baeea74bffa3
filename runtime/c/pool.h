/* Worker threads behind TVM's parallel loops, and scratch memory for kernels.
 *
 * A pool belongs to one instance. Its threads start at the first parallel loop. A launch publishes its tasks in one
 * 64-bit ticket; whoever comes takes the next task, the launching thread included. So a worker that the system
 * keeps waiting delays nothing, and a launch also completes in a forked child, where no worker exists.
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

typedef struct {
  Pool *pool;
  pthread_t thread;
  Scratch scratch;
  int in_task; /* a launch from inside a task runs in place */
} Worker;

struct Pool {
  int threads;     /* the launching thread included */
  int started;     /* workers running, 0 before the first parallel launch */
  int spin;        /* whether waiting starts with a spin: no where threads outnumber CPUs */
  pid_t process;   /* that started them */
  Worker *workers; /* [threads]; the first is the launching thread */

  /* The job: written before its ticket is published, read only by those who took one of its tasks. */
  ParallelLambda lambda;
  void *data;
  ParallelEnv env;
  char error[256]; /* of the first task that failed */
  atomic_int failed;
  atomic_int stop;

  /* Each in a cache line of its own. */
  _Alignas(64) _Atomic uint64_t ticket; /* launch number : 32, tasks : 16, next task : 16 */
  _Alignas(64) _Atomic uint32_t done;   /* tasks finished; the launching thread sleeps on it */
  _Atomic uint32_t launcher_sleeps;
  _Alignas(64) _Atomic uint32_t launches; /* workers sleep on it */
  _Atomic uint32_t sleepers;
};

/* Returns 0, or -1 with bnncc_error set. */
int pool_init(Pool *pool, int threads);
/* Ends the threads and frees what the pool holds; a zeroed pool is allowed. */
void pool_destroy(Pool *pool);

/* Makes the calling thread the pool's launching thread; pass the result to pool_leave. */
Worker *pool_enter(Pool *pool);
void pool_leave(Worker *outer);
/* Forgets workspaces that a failed kernel left behind. */
void pool_reset_scratch(Pool *pool);

#endif
