#include "driver.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "cpu.h"

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

void bnncc_forget_error(void) { last_error[0] = 0; }

int bnncc_is_port(const ModelTensor *tensor) {
  return tensor->space == SPACE_INPUT || tensor->space == SPACE_OUTPUT;
}

int32_t bnncc_first_of_memory(const ModelVersion *version, int32_t i) {
  int32_t first = 0;
  while (version->tensors[first].space != version->tensors[i].space ||
         version->tensors[first].offset != version->tensors[i].offset)
    first++;
  return first;
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

Instance *bnncc_create(const Model *model, const char *name, int32_t device) {
  const ModelVersion *version = choose_version(model, name);
  return version ? version->backend->create(model, version, device) : NULL;
}

void bnncc_destroy(Instance *self) {
  if (self) self->version->backend->destroy(self);
}

const ModelVersion *bnncc_version(const Instance *self) { return self->version; }

static int lacks_buffer(const Instance *self, const void *const *inputs, void *const *outputs) {
  const Model *model = self->model;
  for (int32_t i = 0; i < model->input_count; i++)
    if (!inputs[i]) return bnncc_fail("%s: input %d is NULL", model->name, (int)i);
  for (int32_t i = 0; i < model->output_count; i++)
    if (!outputs[i]) return bnncc_fail("%s: output %d is NULL", model->name, (int)i);
  return 0;
}

int bnncc_run(Instance *self, const void *const *inputs, void *const *outputs) {
  return lacks_buffer(self, inputs, outputs) ? -1 : self->version->backend->run(self, inputs, outputs);
}

int bnncc_run_device(Instance *self, const void *const *inputs, void *const *outputs, void *stream) {
  return lacks_buffer(self, inputs, outputs) ? -1 : self->version->backend->run_device(self, inputs, outputs, stream);
}

int bnncc_run_steps(Instance *self, int32_t first, int32_t count) {
  int32_t total = self->version->step_count;
  if (first < 0 || count < 0 || first > total || count > total - first)
    return bnncc_fail("%s: steps %d to %d asked for, the model has %d", self->model->name, (int)first,
                      (int)first + (int)count, (int)total);
  return self->version->backend->run_steps(self, first, count);
}

void *bnncc_tensor_data(Instance *self, int32_t tensor) {
  if (tensor >= 0 && tensor < self->version->tensor_count) return self->version->backend->tensor_data(self, tensor);
  bnncc_fail("%s: no tensor %d; the model has %d", self->model->name, (int)tensor, (int)self->version->tensor_count);
  return NULL;
}

int bnncc_set_threads(Instance *self, int32_t threads) {
  enum { MOST_THREADS = 1024 };
  if (threads < 0 || threads > MOST_THREADS)
    return bnncc_fail("%s: %d threads asked for; 1 to %d are supported, or 0 for one per physical core",
                      self->model->name, (int)threads, MOST_THREADS);
  return self->version->backend->set_threads(self, threads);
}

int bnncc_copy(Instance *self, void *to, const void *from, size_t bytes) {
  return self->version->backend->copy(self, to, from, bytes);
}

void *bnncc_host_alloc(Instance *self, size_t bytes) { return self->version->backend->host_alloc(self, bytes); }

void bnncc_host_free(Instance *self, void *memory) {
  if (memory) self->version->backend->host_free(self, memory);
}

void *bnncc_device_alloc(Instance *self, size_t bytes) { return self->version->backend->device_alloc(self, bytes); }

void bnncc_device_free(Instance *self, void *memory) {
  if (memory) self->version->backend->device_free(self, memory);
}

int32_t bnncc_device(const Instance *self) { return self->version->backend->device(self); }

void *bnncc_stream(const Instance *self) { return self->version->backend->stream(self); }

int bnncc_wait(Instance *self, void *stream) { return self->version->backend->wait(self, stream); }

int bnncc_synchronize(Instance *self) { return self->version->backend->synchronize(self); }
