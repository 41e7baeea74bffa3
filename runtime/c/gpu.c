/* Instances that run on an NVIDIA GPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "gpu.h"

/* Of a copy through staging memory: the GPU fetches one chunk while the CPU fills the next. */
enum { CHUNK_BYTES = 1024 * 1024 };

static int check(const Gpu *self, CUresult result, const char *doing) { return gpu_check(self->gpu, result, doing); }

/* Lets the stream wait for what bnncc_run_device left running: the arena is one. */
static int follow(Gpu *self, CUstream stream) {
  return self->pending ? check(self, self->cuda->cuStreamWaitEvent(stream, self->done, 0), "waiting for the last run")
                       : 0;
}

/* Waits for the instance's own stream; also after a failure, so that nothing touches the caller's memory later. */
static int finish(Gpu *self, int failed) {
  CUresult result = self->cuda->cuStreamSynchronize(self->stream);
  if (failed || check(self, result, "running the network")) return -1;
  self->pending = 0;
  return 0;
}

static int copy(Gpu *self, CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream) {
  return bytes ? check(self, self->cuda->cuMemcpyAsync(to, from, bytes, stream), "copying") : 0;
}

static int launch_graph(Gpu *self, CUstream stream) {
  if (gpu_give_places(self)) return -1;
  return check(self, self->cuda->cuGraphLaunch(self->exec, stream), "launching the network");
}

static CUdeviceptr address(const void *memory) { return (CUdeviceptr)(uintptr_t)memory; }

/* Sets the place of an input or output, of all its tensors. */
static void place_port(Gpu *self, int32_t port, CUdeviceptr place) {
  const ModelVersion *version = self->head.version;
  const ModelTensor *placed = &version->tensors[port];
  if (self->places[port] == place) return;
  for (int32_t i = 0; i < version->tensor_count; i++)
    if (version->tensors[i].space == placed->space && version->tensors[i].offset == placed->offset)
      self->places[i] = place;
}

static void place_homes(Gpu *self) {
  const ModelVersion *version = self->head.version;
  memcpy(self->places, self->homes, (size_t)version->tensor_count * sizeof *self->places);
}

static void *pinned(const Gpu *self, size_t bytes) {
  void *memory = NULL;
  char doing[80];
  CUresult result = self->cuda->cuMemHostAlloc(&memory, bytes ? bytes : 1, CU_MEMHOSTALLOC_PORTABLE);
  snprintf(doing, sizeof doing, "pinning %zu bytes of the host's memory", bytes);
  return check(self, result, doing) ? NULL : memory;
}

/* Whether CUDA copies from or to this memory by itself while the CPU goes on: it is pinned, or the device's. */
static int is_known(const Gpu *self, const void *memory) {
  unsigned type = 0;
  return !self->cuda->cuPointerGetAttribute(&type, CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address(memory)) && type;
}

/* Where an input or output lies in the staging memory, which is laid out as the homes are. NULL with bnncc_error. */
static unsigned char *staging_of(Gpu *self, int32_t port) {
  size_t before = gpu_homes_begin(self->head.version);
  if (!self->staging) self->staging = pinned(self, gpu_layout(self->head.version, 0, 0, NULL) - before);
  return self->staging ? self->staging + (self->homes[port] - self->memory - before) : NULL;
}

static int upload(Gpu *self, int32_t index, const unsigned char *data) {
  int32_t port = self->head.version->inputs[index];
  CUdeviceptr home = self->homes[port];
  size_t bytes = self->head.version->tensors[port].bytes;
  if (is_known(self, data)) return copy(self, home, address(data), bytes, self->stream);
  unsigned char *staging = staging_of(self, port);
  if (!staging) return -1;
  for (size_t at = 0; at < bytes; at += CHUNK_BYTES) {
    size_t part = bytes - at < CHUNK_BYTES ? bytes - at : CHUNK_BYTES;
    memcpy(staging + at, data + at, part);
    if (copy(self, home + at, address(staging + at), part, self->stream)) return -1;
  }
  return 0;
}

/* direct: whether CUDA copies to data by itself; else the output is in the staging memory when the stream is done. */
static int download(Gpu *self, int32_t index, void *data, int direct) {
  int32_t port = self->head.version->outputs[index];
  void *to = direct ? data : staging_of(self, port);
  return to ? copy(self, address(to), self->homes[port], self->head.version->tensors[port].bytes, self->stream) : -1;
}

static int run_from_host(Gpu *self, const void *const *inputs, void *const *outputs) {
  const Model *model = self->head.model;
  const ModelVersion *version = self->head.version;
  unsigned char direct[model->output_count + 1];
  int failed = follow(self, self->stream);
  for (int32_t i = 0; i < model->input_count && !failed; i++) failed = upload(self, i, inputs[i]);
  place_homes(self);
  failed = failed || launch_graph(self, self->stream);
  for (int32_t i = 0; i < model->output_count && !failed; i++) {
    direct[i] = (unsigned char)is_known(self, outputs[i]);
    failed = download(self, i, outputs[i], direct[i]);
  }
  if (finish(self, failed)) return -1;
  for (int32_t i = 0; i < model->output_count; i++) {
    int32_t port = version->outputs[i];
    if (!direct[i]) memcpy(outputs[i], staging_of(self, port), version->tensors[port].bytes);
  }
  return 0;
}

static int run_on_device(Gpu *self, const void *const *inputs, void *const *outputs, CUstream stream) {
  const Model *model = self->head.model;
  const ModelVersion *version = self->head.version;
  size_t alignment = model->io_alignment;
  int failed = follow(self, stream);
  place_homes(self);
  for (int32_t i = 0; i < model->input_count && !failed; i++) {
    int32_t port = version->inputs[i];
    if (address(inputs[i]) % alignment == 0) place_port(self, port, address(inputs[i]));
    else failed = copy(self, self->homes[port], address(inputs[i]), version->tensors[port].bytes, stream);
  }
  for (int32_t i = 0; i < model->output_count; i++)
    if (address(outputs[i]) % alignment == 0) place_port(self, version->outputs[i], address(outputs[i]));
  failed = failed || launch_graph(self, stream);
  for (int32_t i = 0; i < model->output_count && !failed; i++) {
    int32_t port = version->outputs[i];
    if (address(outputs[i]) % alignment)
      failed = copy(self, address(outputs[i]), self->homes[port], version->tensors[port].bytes, stream);
  }
  CUresult marked = self->cuda->cuEventRecord(self->done, stream);
  if (marked) self->cuda->cuStreamSynchronize(stream); /* nobody could wait for it later */
  else self->pending = 1;
  return failed || check(self, marked, "marking the end of the run") ? -1 : 0;
}

static int gpu_run(Instance *instance, const void *const *inputs, void *const *outputs) {
  Gpu *self = (Gpu *)instance;
  if (gpu_enter(self->gpu)) return -1;
  int failed = run_from_host(self, inputs, outputs);
  gpu_leave(self->gpu);
  return failed;
}

static int gpu_run_device(Instance *instance, const void *const *inputs, void *const *outputs, void *stream) {
  Gpu *self = (Gpu *)instance;
  if (gpu_enter(self->gpu)) return -1;
  int failed = run_on_device(self, inputs, outputs, stream);
  gpu_leave(self->gpu);
  return failed;
}

/* All steps: as they run in the graph, which is what is timed this way. */
static int gpu_run_steps(Instance *instance, int32_t first, int32_t count) {
  Gpu *self = (Gpu *)instance;
  if (gpu_enter(self->gpu)) return -1;
  place_homes(self);
  int failed = follow(self, self->stream);
  if (!failed && count == instance->version->step_count) failed = launch_graph(self, self->stream);
  else failed = failed || gpu_give_places(self) || gpu_launch_steps(self, instance->version->init_count + first, count);
  failed = finish(self, failed);
  gpu_leave(self->gpu);
  return failed;
}

static int gpu_set_threads(Instance *self, int32_t threads) {
  (void)self;
  (void)threads;
  return 0;
}

static void *gpu_tensor_data(Instance *self, int32_t tensor) {
  return (void *)(uintptr_t)((Gpu *)self)->homes[tensor];
}

static int gpu_copy(Instance *instance, void *to, const void *from, size_t bytes) {
  Gpu *self = (Gpu *)instance;
  if (gpu_enter(self->gpu)) return -1;
  int failed = follow(self, self->stream);
  failed = finish(self, failed || copy(self, address(to), address(from), bytes, self->stream));
  gpu_leave(self->gpu);
  return failed;
}

static void *gpu_host_alloc(Instance *instance, size_t bytes) {
  Gpu *self = (Gpu *)instance;
  if (gpu_enter(self->gpu)) return NULL;
  void *memory = pinned(self, bytes);
  gpu_leave(self->gpu);
  return memory;
}

static void gpu_host_free(Instance *instance, void *memory) {
  Gpu *self = (Gpu *)instance;
  if (gpu_enter(self->gpu)) return;
  self->cuda->cuMemFreeHost(memory);
  gpu_leave(self->gpu);
}

static void *gpu_device_alloc(Instance *instance, size_t bytes) {
  Gpu *self = (Gpu *)instance;
  CUdeviceptr memory = 0;
  if (gpu_enter(self->gpu)) return NULL;
  gpu_alloc(self->gpu, &memory, bytes, "the buffer takes"); /* leaves 0 where it fails */
  gpu_leave(self->gpu);
  return (void *)(uintptr_t)memory;
}

static void gpu_device_free(Instance *instance, void *memory) {
  Gpu *self = (Gpu *)instance;
  if (gpu_enter(self->gpu)) return;
  self->cuda->cuMemFree_v2(address(memory));
  gpu_leave(self->gpu);
}

static int32_t gpu_device(const Instance *self) { return ((const Gpu *)self)->gpu->index; }

static void *gpu_stream(const Instance *self) { return ((const Gpu *)self)->stream; }

static int gpu_wait(Instance *instance, void *stream) {
  Gpu *self = (Gpu *)instance;
  if (gpu_enter(self->gpu)) return -1;
  int failed = follow(self, stream);
  gpu_leave(self->gpu);
  return failed;
}

static int gpu_synchronize(Instance *instance) {
  Gpu *self = (Gpu *)instance;
  if (gpu_enter(self->gpu)) return -1;
  int failed = finish(self, follow(self, self->stream));
  gpu_leave(self->gpu);
  return failed;
}

static void gpu_destroy(Instance *instance) {
  Gpu *self = (Gpu *)instance;
  const Cuda *cu = self->cuda;
  if (!gpu_enter(self->gpu)) { /* frees also what is only half made */
    if (self->pending) cu->cuEventSynchronize(self->done);
    if (self->exec) cu->cuGraphExecDestroy(self->exec);
    if (self->graph) cu->cuGraphDestroy(self->graph);
    if (self->staging) cu->cuMemFreeHost(self->staging);
    if (self->memory) cu->cuMemFree_v2(self->memory);
    if (self->done) cu->cuEventDestroy_v2(self->done);
    if (self->stream) cu->cuStreamDestroy_v2(self->stream);
    gpu_leave(self->gpu);
  }
  gpu_release(self->gpu);
  free(self);
}

static int start(Gpu *self) {
  const Cuda *cu = self->cuda;
  const ModelVersion *version = self->head.version;
  if (check(self, cu->cuStreamCreate(&self->stream, CU_STREAM_NON_BLOCKING), "making a stream") ||
      check(self, cu->cuEventCreate(&self->done, CU_EVENT_DISABLE_TIMING), "making an event") ||
      gpu_alloc(self->gpu, &self->memory, gpu_layout(version, 0, 0, NULL), "an instance takes"))
    return -1;
  gpu_layout(version, self->memory, self->gpu->weights, self->homes);
  place_homes(self);
  if (gpu_give_places(self) || finish(self, gpu_launch_steps(self, 0, version->init_count))) return -1;
  return gpu_make_graph(self);
}

/* The index that BNNCC_DEVICE holds, 0 where it is not set; or -1 with bnncc_error. */
static int32_t default_device(const Model *model) {
  const char *text = getenv("BNNCC_DEVICE");
  if (!text || !*text) return 0;
  const char *number = strncmp(text, "cuda:", 5) ? text : text + 5;
  char *end;
  long index = strtol(number, &end, 10);
  if (end != number && !*end && index >= 0 && index < 1024) return (int32_t)index;
  return bnncc_fail("%s: BNNCC_DEVICE is '%s'; a GPU is expected, as in 0 or cuda:0", model->name, text);
}

/* The bookkeeping: one piece of memory. */
static Gpu *allocate(const Model *model, const ModelVersion *version) {
  const ModelDevice *code = version->device;
  size_t tensors = (size_t)version->tensor_count, arguments = (size_t)code->argument_count;
  size_t launches = (size_t)code->launch_count;
  Gpu *self = calloc(1, sizeof *self + (2 * tensors + arguments) * sizeof(CUdeviceptr) +
                            (arguments + launches) * sizeof(void *));
  if (!self) {
    bnncc_fail("%s: out of memory for an instance of %d launches", model->name, (int)code->launch_count);
    return NULL;
  }
  self->head = (Instance){model, version};
  self->homes = (CUdeviceptr *)(self + 1);
  self->places = self->homes + tensors;
  self->values = self->places + tensors;
  self->parameters = (void **)(self->values + arguments);
  self->nodes = (CUgraphNode *)(self->parameters + arguments);
  for (size_t i = 0; i < arguments; i++) self->parameters[i] = &self->values[i];
  return self;
}

static Instance *gpu_create(const Model *model, const ModelVersion *version, int32_t device) {
  int32_t index = device < 0 ? default_device(model) : device;
  Gpu *self = index < 0 ? NULL : allocate(model, version);
  if (!self) return NULL;
  self->gpu = gpu_acquire(model, version, index);
  if (!self->gpu) {
    free(self);
    return NULL;
  }
  self->cuda = self->gpu->cuda;
  int failed = gpu_enter(self->gpu);
  if (!failed) {
    failed = start(self);
    gpu_leave(self->gpu);
  }
  if (!failed) return &self->head;
  gpu_destroy(&self->head);
  return NULL;
}

const Backend bnncc_gpu = {
    .create = gpu_create,
    .destroy = gpu_destroy,
    .run = gpu_run,
    .run_device = gpu_run_device,
    .run_steps = gpu_run_steps,
    .set_threads = gpu_set_threads,
    .tensor_data = gpu_tensor_data,
    .copy = gpu_copy,
    .host_alloc = gpu_host_alloc,
    .host_free = gpu_host_free,
    .device_alloc = gpu_device_alloc,
    .device_free = gpu_device_free,
    .device = gpu_device,
    .stream = gpu_stream,
    .wait = gpu_wait,
    .synchronize = gpu_synchronize,
};
