/* A stand-in for libcuda.so.1, for testing the driver of artifacts without a GPU.
 *
 * Memory of the GPU is memory of the host, filled with rubbish; kernels are C functions (standin_kernels.h). Streams do
 * nothing until somebody waits for them, and then no more than what he waits for needs: who forgets to wait, or lets
 * a buffer go too early, computes something else. Tests call the functions standin_*: to make any function fail, to be
 * another GPU, and to see what was called, and what is left.
 */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cuda_abi.h"

#define EXPORT __attribute__((visibility("default")))

enum { INVALID_VALUE = 1, NO_DEVICE = 100, INVALID_DEVICE = 101, INVALID_IMAGE = 200, INVALID_CONTEXT = 201 };
enum { INVALID_PTX = 218, UNSUPPORTED_PTX_VERSION = 222, NOT_FOUND = 500 };
enum { HOST = 1, DEVICE = 2 }; /* CUmemorytype */
enum { MOST = 4096, MOST_ARGUMENTS = 8, STATIC_LIMIT = 48 * 1024 };

/* What a test sets. */
static struct {
  int count, major, minor, driver, shared_limit;
  size_t memory;
  const char *log;     /* of the compiler of PTX, which then refuses it */
  char function[64];   /* fails at the call `nth` from now with `code` */
  int nth, code;
  int broken;          /* what every launch ends with */
} gpu = {.count = 2, .major = 9, .minor = 0, .driver = 13000, .shared_limit = 227 * 1024, .memory = (size_t)1 << 30};

static char calls[1 << 20], ran[1 << 16]; /* names of functions called and of kernels run, each after a space */
static size_t calls_used, ran_used;
static int live; /* contexts, modules, memory, streams, events, graphs */
static _Thread_local int depth;

EXPORT void standin_gpu(int count, int major, int minor, int driver) {
  gpu.count = count;
  gpu.major = major;
  gpu.minor = minor;
  gpu.driver = driver;
}
EXPORT void standin_limits(size_t memory, int shared) {
  gpu.memory = memory;
  gpu.shared_limit = shared;
}
EXPORT void standin_refuse_ptx(const char *log) { gpu.log = log; }
EXPORT void standin_break(int code) { gpu.broken = code; }
EXPORT void standin_fail(const char *function, int nth, int code) {
  snprintf(gpu.function, sizeof gpu.function, "%s", function);
  gpu.nth = nth;
  gpu.code = code;
}
EXPORT int standin_live(void) { return live; }
EXPORT int standin_depth(void) { return depth; }
EXPORT const char *standin_calls(void) { return calls; }
EXPORT const char *standin_ran(void) { return ran; }
EXPORT void standin_forget(void) { calls_used = ran_used = calls[0] = ran[0] = 0; }

static int enter(const char *name) {
  if (calls_used < sizeof calls - 64) calls_used += (size_t)sprintf(calls + calls_used, " %s", name);
  return !strcmp(gpu.function, name) && --gpu.nth == 0 ? gpu.code : 0;
}

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void unlock(int *locked) {
  (void)locked;
  pthread_mutex_unlock(&lock);
}

/* What every function begins with. It holds the lock until it returns. */
#define LOCK __attribute__((cleanup(unlock), unused)) int locked = pthread_mutex_lock(&lock)
#define COUNT                     \
  int injected = enter(__func__); \
  if (injected) return injected
#define ENTER LOCK; COUNT
#define IN_CONTEXT \
  ENTER;           \
  if (!depth) return INVALID_CONTEXT

/* Memory. */

static struct Block {
  unsigned char *base;
  size_t bytes;
  int type;
} blocks[MOST];

static const struct Block *block_of(CUdeviceptr address, size_t bytes) {
  for (int i = 0; i < MOST; i++)
    if (blocks[i].base && address >= (uintptr_t)blocks[i].base &&
        address + bytes <= (uintptr_t)blocks[i].base + blocks[i].bytes)
      return &blocks[i];
  return NULL;
}

static size_t taken(void) {
  size_t sum = 0;
  for (int i = 0; i < MOST; i++)
    if (blocks[i].base && blocks[i].type == DEVICE) sum += blocks[i].bytes;
  return sum;
}

static unsigned char *allocate(size_t bytes, int type) {
  struct Block *block = blocks;
  while (block->base) block++;
  *block = (struct Block){aligned_alloc(256, (bytes + 255) / 256 * 256), bytes, type};
  live++;
  return memset(block->base, 0xA5, bytes);
}

/* Streams and events. */

struct Kernel {
  const char *name;
  int arguments;
  void (*run)(float *const *a, size_t threads);
};

struct CUfunc_st {
  const struct Kernel *kernel;
  unsigned granted; /* dynamic shared memory */
};

typedef struct {
  enum { COPY, LAUNCH, RECORD, WAIT } kind;
  CUdeviceptr to, from;
  size_t bytes;
  CUevent event;
  int serial;
  const struct Kernel *kernel;
  size_t threads;
  CUdeviceptr arguments[MOST_ARGUMENTS];
} Work;

struct CUstream_st {
  Work work[MOST];
  int first, end;
  CUstream next;
};

struct CUevent_st {
  CUstream stream; /* of its last record */
  int recorded, reached;
};

static struct CUstream_st legacy, *streams = &legacy;
static int failed; /* once a kernel failed, nothing works any more */

static CUstream real(CUstream stream) { return (uintptr_t)stream <= 1 ? &legacy : stream; }

static int do_next(CUstream stream);

static int reach(CUevent event, int serial) {
  while (event->reached < serial && !failed && do_next(event->stream)) continue;
  return failed;
}

static int do_next(CUstream stream) {
  if (stream->first == stream->end) return 0;
  Work work = stream->work[stream->first++];
  if (stream->first == stream->end) stream->first = stream->end = 0;
  float *pointers[MOST_ARGUMENTS];
  switch (work.kind) {
    case COPY:
      memcpy((void *)(uintptr_t)work.to, (const void *)(uintptr_t)work.from, work.bytes);
      break;
    case RECORD:
      work.event->reached = work.serial;
      break;
    case WAIT:
      reach(work.event, work.serial);
      break;
    case LAUNCH:
      if (gpu.broken) failed = gpu.broken;
      for (int i = 0; i < work.kernel->arguments && !failed; i++) {
        const struct Block *block = block_of(work.arguments[i], 4);
        if (!block || block->type != DEVICE) failed = CUDA_ERROR_ILLEGAL_ADDRESS;
        pointers[i] = (float *)(uintptr_t)work.arguments[i];
      }
      if (failed) break;
      work.kernel->run(pointers, work.threads);
      if (ran_used < sizeof ran - 64) ran_used += (size_t)sprintf(ran + ran_used, " %s", work.kernel->name);
  }
  return 1;
}

static int drain(CUstream stream) {
  while (!failed && do_next(stream)) continue;
  return failed;
}

static void drain_all(void) {
  for (CUstream stream = streams; stream; stream = stream->next) drain(stream);
}

static CUresult push(CUstream stream, Work work) {
  stream = real(stream);
  if (stream->end == MOST && drain(stream)) return failed;
  stream->work[stream->end++] = work;
  return failed;
}

EXPORT CUresult cuStreamCreate(CUstream *stream, unsigned flags) {
  IN_CONTEXT;
  if (flags != CU_STREAM_NON_BLOCKING) return INVALID_VALUE;
  *stream = calloc(1, sizeof **stream);
  (*stream)->next = streams->next;
  streams->next = *stream;
  live++;
  return 0;
}
EXPORT CUresult cuStreamDestroy_v2(CUstream stream) {
  IN_CONTEXT;
  drain(stream);
  CUstream before = streams;
  while (before->next != stream) before = before->next;
  before->next = stream->next;
  free(stream);
  live--;
  return 0;
}
EXPORT CUresult cuStreamSynchronize(CUstream stream) {
  LOCK;
  if (!depth) return INVALID_CONTEXT;
  drain(real(stream)); /* where waiting fails, nothing is running any more either */
  COUNT;
  return failed;
}
EXPORT CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned flags) {
  IN_CONTEXT;
  return flags ? INVALID_VALUE : push(stream, (Work){.kind = WAIT, .event = event, .serial = event->recorded});
}
EXPORT CUresult cuEventCreate(CUevent *event, unsigned flags) {
  IN_CONTEXT;
  if (flags != CU_EVENT_DISABLE_TIMING) return INVALID_VALUE;
  *event = calloc(1, sizeof **event);
  live++;
  return 0;
}
EXPORT CUresult cuEventDestroy_v2(CUevent event) {
  IN_CONTEXT;
  drain_all(); /* real events live on in the work that names them */
  free(event);
  live--;
  return 0;
}
EXPORT CUresult cuEventRecord(CUevent event, CUstream stream) {
  IN_CONTEXT;
  event->stream = real(stream);
  event->recorded++;
  return push(stream, (Work){.kind = RECORD, .event = event, .serial = event->recorded});
}
EXPORT CUresult cuEventSynchronize(CUevent event) {
  IN_CONTEXT;
  return reach(event, event->recorded);
}

/* Memory, as the API has it. */

EXPORT CUresult cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
  IN_CONTEXT;
  *total = gpu.memory;
  *free_bytes = gpu.memory - taken();
  return 0;
}
EXPORT CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t bytes) {
  IN_CONTEXT;
  if (!bytes) return INVALID_VALUE;
  if (bytes > gpu.memory - taken()) return CUDA_ERROR_OUT_OF_MEMORY;
  *address = (uintptr_t)allocate(bytes, DEVICE);
  return 0;
}
EXPORT CUresult cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) {
  IN_CONTEXT;
  if (!bytes || flags != CU_MEMHOSTALLOC_PORTABLE) return INVALID_VALUE;
  *memory = allocate(bytes, HOST);
  return 0;
}
static CUresult release(CUdeviceptr address, int type) {
  drain_all();
  for (int i = 0; i < MOST; i++)
    if (blocks[i].base && (uintptr_t)blocks[i].base == address && blocks[i].type == type) {
      free(blocks[i].base);
      blocks[i].base = NULL;
      live--;
      return 0;
    }
  return INVALID_VALUE;
}
EXPORT CUresult cuMemFree_v2(CUdeviceptr address) {
  IN_CONTEXT;
  return release(address, DEVICE);
}
EXPORT CUresult cuMemFreeHost(void *memory) {
  IN_CONTEXT;
  return release((uintptr_t)memory, HOST);
}
EXPORT CUresult cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  IN_CONTEXT;
  return push(stream, (Work){.kind = COPY, .to = to, .from = from, .bytes = bytes});
}
EXPORT CUresult cuPointerGetAttribute(void *value, int attribute, CUdeviceptr address) {
  IN_CONTEXT;
  const struct Block *block = block_of(address, 1);
  if (!block || attribute != CU_POINTER_ATTRIBUTE_MEMORY_TYPE) return INVALID_VALUE;
  *(unsigned *)value = (unsigned)block->type;
  return 0;
}

/* The GPU, its context, the module. */

EXPORT CUresult cuInit(unsigned flags) {
  ENTER;
  if (flags) return INVALID_VALUE;
  return gpu.count ? 0 : NO_DEVICE;
}
EXPORT CUresult cuDriverGetVersion(int *version) {
  ENTER;
  *version = gpu.driver;
  return 0;
}
static const struct {
  int code;
  const char *name, *meaning;
} errors[] = {
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {CUDA_ERROR_OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {CUDA_ERROR_NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {CUDA_ERROR_NO_BINARY_FOR_GPU, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available"},
    {INVALID_IMAGE, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {INVALID_PTX, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {UNSUPPORTED_PTX_VERSION, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION", "the provided PTX was compiled with an "
     "unsupported toolchain."},
    {CUDA_ERROR_ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {CUDA_ERROR_LAUNCH_FAILED, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
};
EXPORT CUresult cuGetErrorName(CUresult error, const char **text) {
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    if (errors[i].code == error) return *text = errors[i].name, 0;
  return *text = NULL, INVALID_VALUE;
}
EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    if (errors[i].code == error) return *text = errors[i].meaning, 0;
  return *text = NULL, INVALID_VALUE;
}
EXPORT CUresult cuDeviceGetCount(int *count) {
  ENTER;
  *count = gpu.count;
  return 0;
}
EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  ENTER;
  *device = 100 + ordinal; /* a handle, not the ordinal */
  return ordinal < gpu.count ? 0 : INVALID_DEVICE;
}
EXPORT CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
  ENTER;
  snprintf(name, (size_t)size, "Stand-in %d", device - 100);
  return 0;
}
EXPORT CUresult cuDeviceGetAttribute(int *value, int attribute, CUdevice device) {
  ENTER;
  if (device < 100 || (attribute != 75 && attribute != 76)) return INVALID_VALUE;
  *value = attribute == 75 ? gpu.major : gpu.minor;
  return 0;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  ENTER;
  *context = (CUcontext)(uintptr_t)device;
  live++;
  return 0;
}
EXPORT CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  ENTER;
  live--;
  return device < 100;
}
EXPORT CUresult cuCtxPushCurrent_v2(CUcontext context) {
  ENTER;
  depth += (uintptr_t)context >= 100;
  return failed;
}
EXPORT CUresult cuCtxPopCurrent_v2(CUcontext *context) {
  IN_CONTEXT;
  *context = NULL;
  depth--;
  return 0;
}
#include "standin_kernels.h"

struct CUmod_st {
  struct CUfunc_st functions[sizeof kernels / sizeof *kernels];
};

/* Images are texts: "cubin sm_90", or PTX. */
EXPORT CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, int *options, void **values) {
  IN_CONTEXT;
  int major, minor;
  if (sscanf(image, "cubin sm_%1d%1d", &major, &minor) == 2) {
    if (major != gpu.major || minor > gpu.minor) return CUDA_ERROR_NO_BINARY_FOR_GPU;
  } else if (strncmp(image, "//", 2) || count != 2 || options[0] != CU_JIT_ERROR_LOG_BUFFER ||
             options[1] != CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES) {
    return INVALID_IMAGE;
  } else if (gpu.log) {
    snprintf(values[0], (size_t)(uintptr_t)values[1], "%s", gpu.log);
    return INVALID_PTX;
  }
  *module = calloc(1, sizeof **module);
  live++;
  return 0;
}
EXPORT CUresult cuModuleUnload(CUmodule module) {
  IN_CONTEXT;
  free(module);
  live--;
  return 0;
}
EXPORT CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  IN_CONTEXT;
  for (size_t i = 0; i < sizeof kernels / sizeof *kernels; i++)
    if (!strcmp(kernels[i].name, name)) {
      module->functions[i].kernel = &kernels[i];
      return *function = &module->functions[i], 0;
    }
  return NOT_FOUND;
}
EXPORT CUresult cuFuncSetAttribute(CUfunction function, int attribute, int value) {
  IN_CONTEXT;
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value > gpu.shared_limit) return INVALID_VALUE;
  function->granted = (unsigned)value;
  return 0;
}

/* Launches and graphs. */

static int work_of(const CUDA_KERNEL_NODE_PARAMS_v1 *p, Work *work) {
  *work = (Work){.kind = LAUNCH, .kernel = p->func->kernel};
  work->threads = (size_t)p->gridDimX * p->gridDimY * p->gridDimZ * p->blockDimX * p->blockDimY * p->blockDimZ;
  if (p->sharedMemBytes > (p->func->granted > STATIC_LIMIT ? p->func->granted : STATIC_LIMIT) || p->extra)
    return INVALID_VALUE;
  for (int i = 0; i < work->kernel->arguments; i++) work->arguments[i] = *(CUdeviceptr *)p->kernelParams[i];
  return 0;
}

EXPORT CUresult cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                               unsigned bz, unsigned shared, CUstream stream, void **parameters, void **extra) {
  IN_CONTEXT;
  CUDA_KERNEL_NODE_PARAMS_v1 p = {function, gx, gy, gz, bx, by, bz, shared, parameters, extra};
  Work work;
  return work_of(&p, &work) ? INVALID_VALUE : push(stream, work);
}

struct CUgraphNode_st {
  Work work;
};
struct CUgraph_st {
  struct CUgraphNode_st nodes[64];
  int count;
};
struct CUgraphExec_st {
  struct CUgraph_st graph, *original;
};

EXPORT CUresult cuGraphCreate(CUgraph *graph, unsigned flags) {
  IN_CONTEXT;
  if (flags) return INVALID_VALUE;
  *graph = calloc(1, sizeof **graph);
  live++;
  return 0;
}
EXPORT CUresult cuGraphDestroy(CUgraph graph) {
  IN_CONTEXT;
  free(graph);
  live--;
  return 0;
}
EXPORT CUresult cuGraphAddKernelNode(CUgraphNode *node, CUgraph graph, const CUgraphNode *before, size_t count,
                                     const CUDA_KERNEL_NODE_PARAMS_v1 *parameters) {
  IN_CONTEXT;
  *node = &graph->nodes[graph->count];
  if (graph->count ? count != 1 || *before != *node - 1 : count != 0) return INVALID_VALUE; /* a chain is expected */
  graph->count++;
  return work_of(parameters, &(*node)->work);
}
EXPORT CUresult cuGraphInstantiateWithFlags(CUgraphExec *exec, CUgraph graph, unsigned long long flags) {
  IN_CONTEXT;
  if (flags) return INVALID_VALUE;
  *exec = malloc(sizeof **exec);
  **exec = (struct CUgraphExec_st){*graph, graph};
  live++;
  return 0;
}
EXPORT CUresult cuGraphExecKernelNodeSetParams(CUgraphExec exec, CUgraphNode node,
                                               const CUDA_KERNEL_NODE_PARAMS_v1 *parameters) {
  IN_CONTEXT;
  return work_of(parameters, &exec->graph.nodes[node - exec->original->nodes].work);
}
EXPORT CUresult cuGraphExecDestroy(CUgraphExec exec) {
  IN_CONTEXT;
  free(exec);
  live--;
  return 0;
}
EXPORT CUresult cuGraphLaunch(CUgraphExec exec, CUstream stream) {
  IN_CONTEXT;
  for (int i = 0; i < exec->graph.count; i++)
    if (push(stream, exec->graph.nodes[i].work)) return failed;
  return failed;
}
