/* Instances that run on this machine's CPU. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"
#include "driver.h"
#include "pool.h"

enum { ALIGNMENT = 64 };

typedef struct {
  Instance head;
  DLTensor *tensors; /* in the plan's order */
  FFIAny *arguments; /* one per ModelVersion.arguments, each pointing into tensors */
  Pool pool;
} Host;

/* The kernels' way to explain a failure, here and in pool.c's hooks: fixed names of the tvm-ffi interface. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  char text[512];
  size_t used = (size_t)snprintf(text, sizeof text, "%s: ", kind);
  for (int32_t i = 0; i < count && used < sizeof text; i++)
    if (parts[i]) used += (size_t)snprintf(text + used, sizeof text - used, "%s", parts[i]);
  bnncc_fail("%s", text);
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) { bnncc_fail("%s: %s", kind, message); }

static size_t aligned(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

/* Lays out an instance from `base` (NULL: only measure) and returns the bytes it takes. */
static size_t layout(const Model *model, const ModelVersion *version, unsigned char *base) {
  size_t tensors = aligned(sizeof(Host));
  size_t arguments = tensors + aligned((size_t)version->tensor_count * sizeof(DLTensor));
  size_t arena = arguments + aligned((size_t)version->argument_count * sizeof(FFIAny));
  size_t persistent = arena + aligned(version->arena_bytes);
  size_t home = persistent + aligned(version->persistent_bytes);
  Host *self = (Host *)base;
  if (base) {
    memset(base, 0, arena);
    self->head = (Instance){model, version};
    self->tensors = (DLTensor *)(base + tensors);
    self->arguments = (FFIAny *)(base + arguments);
  }
  for (int32_t i = 0; i < version->tensor_count; i++) {
    const ModelTensor *info = &version->tensors[i];
    if (base) {
      unsigned char *data = base + home;
      if (info->space == SPACE_ARENA) data = base + arena + info->offset;
      if (info->space == SPACE_PERSISTENT) data = base + persistent + info->offset;
      /* Kernels take weights as inputs only, so casting const away is safe; the pages are read-only. */
      if (info->space == SPACE_WEIGHTS) data = (unsigned char *)(uintptr_t)(model->weights + info->offset);
      self->tensors[i] = (DLTensor){
          .data = data, .device = {DL_CPU, 0}, .ndim = info->ndim, .dtype = info->type, .shape = info->shape};
    }
    if (bnncc_is_port(info)) {
      int32_t first = bnncc_first_of_memory(version, i);
      if (first == i) home += aligned(info->bytes);
      else if (base) self->tensors[i].data = self->tensors[first].data;
    }
  }
  return home;
}

/* Points every tensor that lies in an input or output (`offset` says which) to `data`; `port` is one of them. */
static void bind(Host *self, int32_t port, void *data) {
  const ModelVersion *version = self->head.version;
  const ModelTensor *bound = &version->tensors[port];
  for (int32_t i = 0; i < version->tensor_count; i++)
    if (version->tensors[i].space == bound->space && version->tensors[i].offset == bound->offset)
      self->tensors[i].data = data;
}

static int execute(Host *self, const ModelStep *steps, int32_t count) {
  int failed = 0;
  Worker *outer = pool_enter(&self->pool);
  bnncc_forget_error();
  for (int32_t i = 0; i < count && !failed; i++) {
    FFIAny result = {.type_index = FFI_NONE};
    pool_reset_scratch(&self->pool);
    failed = steps[i].call(NULL, self->arguments + steps[i].first_argument, steps[i].argument_count, &result);
    if (failed) bnncc_fail("kernel %s failed: %s", steps[i].name, *bnncc_error() ? bnncc_error() : "no reason given");
  }
  pool_leave(outer);
  return failed ? -1 : 0;
}

static int host_set_threads(Instance *instance, int32_t threads) {
  Host *self = (Host *)instance;
  int count = threads ? threads : cpu_default_threads();
  if (count == self->pool.threads) return 0;
  pool_destroy(&self->pool);
  return pool_init(&self->pool, count);
}

static void host_destroy(Instance *instance) {
  pool_destroy(&((Host *)instance)->pool);
  free(instance);
}

static Instance *host_create(const Model *model, const ModelVersion *version, int32_t device) {
  if (device >= 0) {
    bnncc_fail("%s: version %s runs on the CPU and takes no device; compile with -t cuda-sm_90 or the like for a GPU",
               model->name, version->name);
    return NULL;
  }
  size_t bytes = layout(model, version, NULL);
  unsigned char *base = aligned_alloc(ALIGNMENT, bytes);
  if (!base) {
    bnncc_fail("%s: out of memory: an instance needs %zu bytes", model->name, bytes);
    return NULL;
  }
  layout(model, version, base);
  Host *self = (Host *)base;
  for (int32_t i = 0; i < version->argument_count; i++)
    self->arguments[i] = (FFIAny){.type_index = FFI_DLTENSOR_PTR, .v_ptr = &self->tensors[version->arguments[i]]};
  /* One thread for the init steps: a caller who wants one thread shall not pay for starting others. */
  if (!pool_init(&self->pool, 1) && !execute(self, version->init, version->init_count) &&
      !host_set_threads(&self->head, 0))
    return &self->head;
  host_destroy(&self->head);
  return NULL;
}

static int is_aligned(const Host *self, const void *data) {
  return (uintptr_t)data % self->head.model->io_alignment == 0;
}

static int host_run(Instance *instance, const void *const *inputs, void *const *outputs) {
  Host *self = (Host *)instance;
  const Model *model = instance->model;
  const ModelVersion *version = instance->version;
  /* A binding swaps the home for the caller's buffer; bnncc_run_steps finds the homes again afterwards. */
  void *homes[model->input_count + model->output_count + 1];
  for (int32_t i = 0; i < model->input_count; i++) {
    int32_t port = version->inputs[i];
    homes[i] = self->tensors[port].data;
    if (is_aligned(self, inputs[i]))
      bind(self, port, (void *)(uintptr_t)inputs[i]);
    else
      memcpy(homes[i], inputs[i], version->tensors[port].bytes);
  }
  for (int32_t i = 0; i < model->output_count; i++) {
    int32_t port = version->outputs[i];
    homes[model->input_count + i] = self->tensors[port].data;
    if (is_aligned(self, outputs[i])) bind(self, port, outputs[i]);
  }
  int failed = execute(self, version->steps, version->step_count);
  for (int32_t i = 0; i < model->input_count; i++) bind(self, version->inputs[i], homes[i]);
  for (int32_t i = 0; i < model->output_count; i++) {
    void *home = homes[model->input_count + i];
    bind(self, version->outputs[i], home);
    if (!failed && !is_aligned(self, outputs[i])) memcpy(outputs[i], home, version->tensors[version->outputs[i]].bytes);
  }
  return failed;
}

static int host_wait(Instance *self, void *stream) {
  if (!stream) return 0;
  return bnncc_fail("%s: version %s runs on the CPU, which has no streams", self->model->name, self->version->name);
}

static int host_run_device(Instance *self, const void *const *inputs, void *const *outputs, void *stream) {
  return host_wait(self, stream) ? -1 : host_run(self, inputs, outputs);
}

static int host_run_steps(Instance *self, int32_t first, int32_t count) {
  return execute((Host *)self, self->version->steps + first, count);
}

static void *host_tensor_data(Instance *self, int32_t tensor) { return ((Host *)self)->tensors[tensor].data; }

static int host_copy(Instance *self, void *to, const void *from, size_t bytes) {
  (void)self;
  memcpy(to, from, bytes);
  return 0;
}

static void *host_alloc(Instance *self, size_t bytes) {
  void *memory = aligned_alloc(ALIGNMENT, aligned(bytes ? bytes : 1));
  if (!memory) bnncc_fail("%s: out of memory: %zu bytes asked for", self->model->name, bytes);
  return memory;
}

static void host_free(Instance *self, void *memory) {
  (void)self;
  free(memory);
}

static int32_t host_device(const Instance *self) {
  (void)self;
  return -1;
}

static void *host_stream(const Instance *self) {
  (void)self;
  return NULL;
}

static int host_synchronize(Instance *self) {
  (void)self;
  return 0;
}

const Backend bnncc_host = {
    .create = host_create,
    .destroy = host_destroy,
    .run = host_run,
    .run_device = host_run_device,
    .run_steps = host_run_steps,
    .set_threads = host_set_threads,
    .tensor_data = host_tensor_data,
    .copy = host_copy,
    .host_alloc = host_alloc,
    .host_free = host_free,
    .device_alloc = host_alloc,
    .device_free = host_free,
    .device = host_device,
    .stream = host_stream,
    .wait = host_wait,
    .synchronize = host_synchronize,
};
