#include "driver.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

enum { ALIGNMENT = 64 };

struct Instance {
  const Model *model;
  const ModelVersion *version;
  DLTensor *tensors; /* in the plan's order */
  FFIAny *arguments; /* one per ModelVersion.arguments, each pointing into tensors */
  Pool pool;
};

static _Thread_local char last_error[512];

const char *bnncc_error(void) { return last_error; }

int bnncc_fail(const char *format, ...) {
  char text[sizeof last_error]; /* the arguments may point into last_error */
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  for (char *c = text; *c; c++)
    if (*c == '\n') *c = ' ';
  memcpy(last_error, text, sizeof text);
  return -1;
}

/* The kernels' way to explain a failure, here and in pool.c's hooks: fixed names of the tvm-ffi interface. */
void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count) {
  char text[sizeof last_error];
  size_t used = (size_t)snprintf(text, sizeof text, "%s: ", kind);
  for (int32_t i = 0; i < count && used < sizeof text; i++)
    if (parts[i]) used += (size_t)snprintf(text + used, sizeof text - used, "%s", parts[i]);
  bnncc_fail("%s", text);
}

void TVMFFIErrorSetRaisedFromCStr(const char *kind, const char *message) { bnncc_fail("%s: %s", kind, message); }

static size_t aligned(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static int is_caller_memory(Space space) { return space == SPACE_INPUT || space == SPACE_OUTPUT; }

/* The first tensor that lies in the same input or output as tensor `i`: a reshape is another tensor in its memory. */
static int32_t first_of_memory(const ModelVersion *version, int32_t i) {
  int32_t first = 0;
  while (version->tensors[first].space != version->tensors[i].space ||
         version->tensors[first].offset != version->tensors[i].offset)
    first++;
  return first;
}

/* Lays out an instance from `base` (NULL: only measure) and returns the bytes it takes. */
static size_t layout(const Model *model, const ModelVersion *version, unsigned char *base) {
  size_t tensors = aligned(sizeof(Instance));
  size_t arguments = tensors + aligned((size_t)version->tensor_count * sizeof(DLTensor));
  size_t arena = arguments + aligned((size_t)version->argument_count * sizeof(FFIAny));
  size_t persistent = arena + aligned(version->arena_bytes);
  size_t home = persistent + aligned(version->persistent_bytes);
  if (base) {
    Instance *self = (Instance *)base;
    memset(base, 0, arena);
    self->model = model;
    self->version = version;
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
      ((Instance *)base)->tensors[i] = (DLTensor){.data = data,
                                                  .device = {DL_CPU, 0},
                                                  .ndim = info->ndim,
                                                  .dtype = info->type,
                                                  .shape = info->shape};
    }
    if (is_caller_memory(info->space)) {
      int32_t first = first_of_memory(version, i);
      if (first == i) home += aligned(info->bytes);
      else if (base) ((Instance *)base)->tensors[i].data = ((Instance *)base)->tensors[first].data;
    }
  }
  return home;
}

/* Points every tensor that lies in an input or output (`offset` says which) to `data`; `port` is one of them. */
static void bind(Instance *self, int32_t port, void *data) {
  const ModelVersion *version = self->version;
  const ModelTensor *bound = &version->tensors[port];
  for (int32_t i = 0; i < version->tensor_count; i++)
    if (version->tensors[i].space == bound->space && version->tensors[i].offset == bound->offset)
      self->tensors[i].data = data;
}

static int execute(Instance *self, const ModelStep *steps, int32_t count) {
  int failed = 0;
  Worker *outer = pool_enter(&self->pool);
  for (int32_t i = 0; i < count && !failed; i++) {
    FFIAny result = {.type_index = FFI_NONE};
    pool_reset_scratch(&self->pool);
    last_error[0] = 0;
    failed = steps[i].call(NULL, self->arguments + steps[i].first_argument, steps[i].argument_count, &result);
    if (failed) bnncc_fail("kernel %s failed: %s", steps[i].name, last_error[0] ? last_error : "no reason given");
  }
  pool_leave(outer);
  return failed ? -1 : 0;
}

static const ModelVersion *version_named(const Model *model, const char *name) {
  char names[256] = "";
  size_t used = 0;
  for (int32_t i = 0; i < model->version_count; i++) {
    const ModelVersion *version = &model->versions[i];
    if (!strcmp(version->name, name)) return version;
    if (used < sizeof names)
      used += (size_t)snprintf(names + used, sizeof names - used, "%s%s", i ? ", " : "", version->name);
  }
  bnncc_fail("%s: no version '%s'; the artifact holds %s", model->name, name, names);
  return NULL;
}

static const ModelVersion *choose_version(const Model *model, const char *name) {
  char missing[64];
  if (!name) name = getenv("BNNCC_VERSION");
  if (name && *name) {
    const ModelVersion *version = version_named(model, name);
    if (!version || !cpu_lacks(version->required_features, missing, sizeof missing)) return version;
    bnncc_fail("%s: this CPU lacks '%s', which version %s was compiled for", model->name, missing, name);
    return NULL;
  }
  for (int32_t i = 0; i < model->version_count; i++)
    if (!cpu_lacks(model->versions[i].required_features, missing, sizeof missing)) return &model->versions[i];
  bnncc_fail("%s: this CPU lacks '%s', which the artifact was compiled for", model->name, missing);
  return NULL;
}

Instance *bnncc_create(const Model *model, const char *name) {
  const ModelVersion *version = choose_version(model, name);
  if (!version) return NULL;
  size_t bytes = layout(model, version, NULL);
  unsigned char *base = aligned_alloc(ALIGNMENT, bytes);
  if (!base) {
    bnncc_fail("%s: out of memory: an instance needs %zu bytes", model->name, bytes);
    return NULL;
  }
  layout(model, version, base);
  Instance *self = (Instance *)base;
  for (int32_t i = 0; i < version->argument_count; i++)
    self->arguments[i] = (FFIAny){.type_index = FFI_DLTENSOR_PTR, .v_ptr = &self->tensors[version->arguments[i]]};
  /* One thread for the init steps: a caller who wants one thread shall not pay for starting others. */
  if (pool_init(&self->pool, 1) || execute(self, version->init, version->init_count) || bnncc_set_threads(self, 0)) {
    pool_destroy(&self->pool);
    free(base);
    return NULL;
  }
  return self;
}

void bnncc_destroy(Instance *self) {
  if (!self) return;
  pool_destroy(&self->pool);
  free(self);
}

const ModelVersion *bnncc_version(const Instance *self) { return self->version; }

int bnncc_set_threads(Instance *self, int32_t threads) {
  enum { MOST_THREADS = 1024 };
  if (threads < 0 || threads > MOST_THREADS)
    return bnncc_fail("%s: %d threads asked for; 1 to %d are supported, or 0 for one per physical core",
                      self->model->name, (int)threads, MOST_THREADS);
  int count = threads ? threads : cpu_default_threads();
  if (count == self->pool.threads) return 0;
  pool_destroy(&self->pool);
  return pool_init(&self->pool, count);
}

static int is_aligned(const Instance *self, const void *data) {
  return (uintptr_t)data % self->model->io_alignment == 0;
}

int bnncc_run(Instance *self, const void *const *inputs, void *const *outputs) {
  const Model *model = self->model;
  const ModelVersion *version = self->version;
  for (int32_t i = 0; i < model->input_count; i++)
    if (!inputs[i]) return bnncc_fail("%s: input %d is NULL", model->name, (int)i);
  for (int32_t i = 0; i < model->output_count; i++)
    if (!outputs[i]) return bnncc_fail("%s: output %d is NULL", model->name, (int)i);
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

int bnncc_run_steps(Instance *self, int32_t first, int32_t count) {
  int32_t total = self->version->step_count;
  if (first < 0 || count < 0 || first > total || count > total - first)
    return bnncc_fail("%s: steps %d to %d asked for, the model has %d", self->model->name, (int)first,
                      (int)first + (int)count, (int)total);
  return execute(self, self->version->steps + first, count);
}

void *bnncc_tensor_data(Instance *self, int32_t tensor) {
  if (tensor >= 0 && tensor < self->version->tensor_count) return self->tensors[tensor].data;
  bnncc_fail("%s: no tensor %d; the model has %d", self->model->name, (int)tensor, (int)self->version->tensor_count);
  return NULL;
}
