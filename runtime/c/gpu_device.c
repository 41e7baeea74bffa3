/* libcuda, and what the instances of a version on one GPU share. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gpu.h"

/* All that is global, and the lock that guards it. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static Cuda cuda;
static int opened; /* whether `cuda` is filled; libcuda then stays in the process, which has threads in it */
static GpuDevice *devices;

static int open_cuda(const Model *model, const ModelVersion *version) {
  static const struct {
    const char *name;
    size_t offset;
  } functions[] = {
#define CUDA_ENTRY(name, parameters) {#name, offsetof(Cuda, name)},
      CUDA_FUNCTIONS(CUDA_ENTRY)
#undef CUDA_ENTRY
  };
  if (opened) return 0;
  void *library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (!library)
    return bnncc_fail("%s: compiled for a GPU (%s), but the NVIDIA driver cannot be opened: %s; install the driver, or "
                      "compile for a CPU, as with -t native",
                      model->name, version->name, dlerror());
  for (size_t i = 0; i < sizeof functions / sizeof *functions; i++) {
    void *address = dlsym(library, functions[i].name);
    if (!address) {
      dlclose(library);
      return bnncc_fail("%s: the NVIDIA driver is too old: its libcuda.so.1 has no %s; update it to one for CUDA %d.%d",
                        model->name, functions[i].name, (int)version->device->driver / 1000,
                        (int)version->device->driver % 1000 / 10);
    }
    memcpy((char *)&cuda + functions[i].offset, &address, sizeof address);
  }
  opened = 1;
  return 0;
}

/* "CUDA_ERROR_NO_DEVICE (no CUDA-capable device is detected)" */
static const char *explain(CUresult result, char *text, size_t size) {
  const char *name = NULL, *meaning = NULL;
  cuda.cuGetErrorName(result, &name);
  cuda.cuGetErrorString(result, &meaning);
  if (name)
    snprintf(text, size, "%s (%s)", name, meaning ? meaning : "no explanation");
  else
    snprintf(text, size, "CUDA error %d", result);
  return text;
}

static const char *advice(CUresult result) {
  if (result == CUDA_ERROR_OUT_OF_MEMORY) return "; take a smaller batch, or end what else uses the GPU";
  if (result == CUDA_ERROR_NOT_INITIALIZED)
    return "; CUDA does not survive a fork, start the process anew (in Python: multiprocessing's 'spawn')";
  if (result == CUDA_ERROR_ILLEGAL_ADDRESS || result == CUDA_ERROR_LAUNCH_TIMEOUT || result == CUDA_ERROR_ASSERT ||
      (result >= CUDA_ERROR_HARDWARE_STACK_ERROR && result <= CUDA_ERROR_LAUNCH_FAILED))
    return "; nothing more can run on this GPU in this process, start a new one";
  return "";
}

int gpu_check(const GpuDevice *self, CUresult result, const char *doing) {
  char text[256];
  if (!result) return 0;
  return bnncc_fail("%s: %s on %s failed: %s%s", self->model->name, doing, self->name,
                    explain(result, text, sizeof text), advice(result));
}

int gpu_alloc(const GpuDevice *self, CUdeviceptr *address, size_t bytes, const char *what) {
  size_t available = 0, total = 0;
  CUresult result = cuda.cuMemAlloc_v2(address, bytes ? bytes : 1);
  if (!result) return 0;
  *address = 0;
  if (result != CUDA_ERROR_OUT_OF_MEMORY) return gpu_check(self, result, "allocating memory");
  cuda.cuMemGetInfo_v2(&available, &total);
  return bnncc_fail("%s: out of memory on %s: %s %zu bytes, %zu of %zu are free%s", self->model->name, self->name, what,
                    bytes, available, total, advice(result));
}

int gpu_enter(const GpuDevice *self) {
  return gpu_check(self, cuda.cuCtxPushCurrent_v2(self->context), "entering the context");
}

void gpu_leave(const GpuDevice *self) {
  CUcontext left;
  (void)self;
  cuda.cuCtxPopCurrent_v2(&left);
}

/* The driver's version, and which GPU there is at `index`. */
static int find_gpu(GpuDevice *self) {
  const ModelDevice *code = self->version->device;
  const char *model = self->model->name;
  char text[256], marketed[96] = "";
  int version = 0, count = 0, major = 0, minor = 0;
  CUresult result = cuda.cuInit(0);
  if (!result) result = cuda.cuDeviceGetCount(&count);
  if (result || !count)
    return bnncc_fail("%s: no GPU can be used: %s; see what nvidia-smi lists and whether CUDA_VISIBLE_DEVICES hides it",
                      model, result ? explain(result, text, sizeof text) : "CUDA lists none");
  if (gpu_check(self, cuda.cuDriverGetVersion(&version), "asking for the driver's version")) return -1;
  if (version < code->driver)
    return bnncc_fail("%s: the NVIDIA driver is too old: it supports CUDA %d.%d, the artifact needs %d.%d; update it, "
                      "or compile with an older CUDA compiler",
                      model, version / 1000, version % 1000 / 10, (int)code->driver / 1000,
                      (int)code->driver % 1000 / 10);
  if (self->index >= count)
    return bnncc_fail("%s: there is no cuda:%d; this process sees %d GPU%s, from cuda:0", model, (int)self->index,
                      count, count > 1 ? "s" : "");
  if (gpu_check(self, cuda.cuDeviceGet(&self->device, self->index), "finding the GPU") ||
      gpu_check(self, cuda.cuDeviceGetName(marketed, sizeof marketed, self->device), "asking for the GPU's name") ||
      gpu_check(self,
                cuda.cuDeviceGetAttribute(&major, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, self->device),
                "asking for the GPU's architecture") ||
      gpu_check(self,
                cuda.cuDeviceGetAttribute(&minor, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, self->device),
                "asking for the GPU's architecture"))
    return -1;
  self->architecture = 10 * major + minor;
  snprintf(self->name, sizeof self->name, "cuda:%d (%s, sm_%d)", (int)self->index, marketed, self->architecture);
  int compiled = 10 * code->major + code->minor;
  if (self->architecture < compiled || (code->exact && self->architecture != compiled))
    return bnncc_fail("%s: compiled for %s, which %s cannot run; compile with -t cuda-sm_%d", model,
                      self->version->name, self->name, self->architecture);
  return 0;
}

/* The cubin where the GPU runs it; else the PTX, compiled by the driver. */
static int load_module(GpuDevice *self) {
  const ModelDevice *code = self->version->device;
  CUresult result = CUDA_ERROR_NO_BINARY_FOR_GPU;
  char log[256] = "", text[256];
  if (self->architecture / 10 == code->major)
    result = cuda.cuModuleLoadDataEx(&self->module, code->image, 0, NULL, NULL);
  if (result == CUDA_ERROR_NO_BINARY_FOR_GPU) {
    int options[] = {CU_JIT_ERROR_LOG_BUFFER, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES};
    void *values[] = {log, (void *)(uintptr_t)sizeof log};
    result = cuda.cuModuleLoadDataEx(&self->module, code->ptx, 2, options, values);
  }
  if (!result) return 0;
  self->module = NULL;
  if (result == CUDA_ERROR_OUT_OF_MEMORY) return gpu_check(self, result, "loading the kernels");
  log[sizeof log - 1] = 0;
  for (size_t end = strlen(log); end && log[end - 1] == '\n'; end--) log[end - 1] = 0;
  return bnncc_fail("%s: the NVIDIA driver refuses the kernels for %s: %s%s%s; update it, or compile with "
                    "-t cuda-sm_%d",
                    self->model->name, self->name, explain(result, text, sizeof text), *log ? ": " : "", log,
                    self->architecture);
}

static int load_functions(GpuDevice *self) {
  const ModelDevice *code = self->version->device;
  char doing[160];
  for (int32_t i = 0; i < code->function_count; i++) {
    const ModelFunction *function = &code->functions[i];
    snprintf(doing, sizeof doing, "finding kernel %s", function->name);
    if (gpu_check(self, cuda.cuModuleGetFunction(&self->functions[i], self->module, function->name), doing)) return -1;
    if (!function->shared_bytes) continue;
    /* Blocks of more than 48 KiB must be announced. */
    snprintf(doing, sizeof doing, "giving kernel %s its %u bytes of shared memory", function->name,
             function->shared_bytes);
    if (gpu_check(self,
                  cuda.cuFuncSetAttribute(self->functions[i], CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                          (int)function->shared_bytes),
                  doing))
      return -1;
  }
  return 0;
}

static int upload_weights(GpuDevice *self) {
  const Model *model = self->model;
  if (gpu_alloc(self, &self->weights, model->weights_bytes, "the weights take")) return -1;
  if (!model->weights_bytes) return 0;
  CUresult result =
      cuda.cuMemcpyAsync(self->weights, (CUdeviceptr)(uintptr_t)model->weights, model->weights_bytes, NULL);
  if (!result) result = cuda.cuStreamSynchronize(NULL); /* the instances' streams do not wait for this one */
  return gpu_check(self, result, "uploading the weights");
}

/* Also for what is only half made. */
static void close_device(GpuDevice *self) {
  if (self->context && !gpu_enter(self)) {
    if (self->weights) cuda.cuMemFree_v2(self->weights);
    if (self->module) cuda.cuModuleUnload(self->module);
    gpu_leave(self);
  }
  if (self->context) cuda.cuDevicePrimaryCtxRelease_v2(self->device);
  free(self);
}

static int fill(GpuDevice *self) {
  if (find_gpu(self)) return -1;
  CUresult result = cuda.cuDevicePrimaryCtxRetain(&self->context, self->device);
  if (result) self->context = NULL;
  if (gpu_check(self, result, "making a context") || gpu_enter(self)) return -1;
  int failed = load_module(self) || load_functions(self) || upload_weights(self);
  gpu_leave(self);
  return failed ? -1 : 0;
}

static GpuDevice *open_device(const Model *model, const ModelVersion *version, int32_t index) {
  if (open_cuda(model, version)) return NULL;
  GpuDevice *self = calloc(1, sizeof *self + (size_t)version->device->function_count * sizeof *self->functions);
  if (!self) {
    bnncc_fail("%s: out of memory for %d kernels", model->name, (int)version->device->function_count);
    return NULL;
  }
  self->cuda = &cuda;
  self->model = model;
  self->version = version;
  self->index = index;
  snprintf(self->name, sizeof self->name, "cuda:%d", (int)index);
  if (!fill(self)) return self;
  close_device(self);
  return NULL;
}

GpuDevice *gpu_acquire(const Model *model, const ModelVersion *version, int32_t index) {
  pthread_mutex_lock(&lock);
  GpuDevice *self = devices;
  while (self && (self->version != version || self->index != index)) self = self->next;
  if (!self && (self = open_device(model, version, index))) {
    self->next = devices;
    devices = self;
  }
  if (self) self->users++;
  pthread_mutex_unlock(&lock);
  return self;
}

void gpu_release(GpuDevice *self) {
  pthread_mutex_lock(&lock);
  if (--self->users == 0) {
    GpuDevice **link = &devices;
    while (*link != self) link = &(*link)->next;
    *link = self->next;
    close_device(self);
  }
  pthread_mutex_unlock(&lock);
}
