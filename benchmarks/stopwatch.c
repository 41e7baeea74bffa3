/* Times the steps of an artifact without Python between them: a step may take less than a call through ctypes. */
#include <stdint.h>
#include <time.h>

typedef int (*RunSteps)(void *instance, int32_t first, int32_t count);

static double now(clockid_t clock) {
  struct timespec t;
  clock_gettime(clock, &t);
  return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* Runs `count` steps from `first`, `times` times. */
int repeat(RunSteps run, void *instance, int32_t first, int32_t count, long times) {
  for (long i = 0; i < times; i++)
    if (run(instance, first, count)) return -1;
  return 0;
}

/* Runs the steps 0 … count − 1 in order, as the network does, and writes what each took, in seconds, reading the
 * clock included; the last one of `seconds` [count + 1] is what reading the clock twice takes. */
int lap(RunSteps run, void *instance, int32_t count, int wall, double *seconds) {
  clockid_t clock = wall ? CLOCK_MONOTONIC : CLOCK_PROCESS_CPUTIME_ID;
  double before = now(clock);
  for (int32_t i = 0; i < count; i++) {
    if (run(instance, i, 1)) return -1;
    double after = now(clock);
    seconds[i] = after - before;
    before = after;
  }
  seconds[count] = now(clock) - before;
  return 0;
}
