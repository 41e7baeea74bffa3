/* A libcuda.so.1 in front of another, the one that the environment variable BNNCC_BEHIND names: it counts calls, makes
 * them fail where a test says so, and knows what was made and not yet given back. driver_proxy.py adds the functions of
 * cuda_abi.h themselves, which begin with `arrive` and end with `leave`. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_abi.h"

#define EXPORT __attribute__((visibility("default")))

static Cuda behind;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char calls[1 << 20]; /* names, each after a space */
static size_t calls_used;
static char failing[64];
static int failing_call, failing_code;
static int live;
static _Thread_local int depth;

static const char *const making[] = {"cuDevicePrimaryCtxRetain", "cuModuleLoadDataEx", "cuMemAlloc_v2",
                                     "cuMemHostAlloc",           "cuStreamCreate",     "cuEventCreate",
                                     "cuGraphCreate",            "cuGraphInstantiateWithFlags"};
static const char *const freeing[] = {"cuDevicePrimaryCtxRelease_v2", "cuModuleUnload",     "cuMemFree_v2",
                                      "cuMemFreeHost",                "cuStreamDestroy_v2", "cuEventDestroy_v2",
                                      "cuGraphDestroy",               "cuGraphExecDestroy"};

/* Calls since proxy_forget. */
EXPORT const char *proxy_calls(void) { return calls; }
EXPORT void proxy_forget(void) { calls_used = calls[0] = 0; }

/* Contexts, modules, memory, streams, events and graphs that are there. */
EXPORT int proxy_live(void) { return live; }

/* Contexts that the calling thread has entered and not left. */
EXPORT int proxy_depth(void) { return depth; }

/* Lets the call of this number from now, the next one being 1, return `code`. */
EXPORT void proxy_fail(const char *function, int call, int code) {
  snprintf(failing, sizeof failing, "%s", function);
  failing_call = call;
  failing_code = code;
}

static int is_among(const char *name, const char *const *names, size_t count) {
  for (size_t i = 0; i < count; i++)
    if (!strcmp(names[i], name)) return 1;
  return 0;
}

static int arrive(const char *name) {
  pthread_mutex_lock(&lock);
  if (calls_used < sizeof calls - 64) calls_used += (size_t)sprintf(calls + calls_used, " %s", name);
  int code = !strcmp(failing, name) && --failing_call == 0 ? failing_code : 0;
  pthread_mutex_unlock(&lock);
  return code;
}

static int leave(const char *name, int result) {
  if (result) return result;
  pthread_mutex_lock(&lock);
  live += is_among(name, making, sizeof making / sizeof *making);
  live -= is_among(name, freeing, sizeof freeing / sizeof *freeing);
  pthread_mutex_unlock(&lock);
  depth += !strcmp(name, "cuCtxPushCurrent_v2");
  depth -= !strcmp(name, "cuCtxPopCurrent_v2");
  return 0;
}

__attribute__((constructor)) static void open_behind(void) {
  void *library = dlopen(getenv("BNNCC_BEHIND"), RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    fprintf(stderr, "BNNCC_BEHIND: %s\n", dlerror());
    abort();
  }
#define FIND(name, parameters) behind.name = (CUresult(*) parameters)dlsym(library, #name);
  CUDA_FUNCTIONS(FIND)
}
