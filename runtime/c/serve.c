#define _POSIX_C_SOURCE 200809L
#include "serve.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the protocol and .npy files are written as the machine holds them, which must be little-endian"
#endif

typedef struct {
  uint32_t operation, first, count, bytes;
} Request;

double timed_run(Instance *instance) {
  struct timespec start, end;
  clock_gettime(CLOCK_MONOTONIC, &start);
  if (bnncc_run_steps(instance, 0, bnncc_version(instance)->step_count)) return -1;
  clock_gettime(CLOCK_MONOTONIC, &end);
  return (double)(end.tv_sec - start.tv_sec) + 1e-9 * (double)(end.tv_nsec - start.tv_nsec);
}

/* 0, or -1 when the other side is gone. */
static int reply(int failed, const void *data, size_t bytes) {
  uint32_t head[2] = {failed != 0, (uint32_t)bytes};
  return fwrite(head, sizeof head, 1, stdout) == 1 && (!bytes || fwrite(data, bytes, 1, stdout) == 1) &&
                 !fflush(stdout)
             ? 0
             : -1;
}

static int reply_status(int failed) {
  return failed ? reply(1, bnncc_error(), strlen(bnncc_error())) : reply(0, NULL, 0);
}

/* The tensor that a request names and memory of its size, or NULL with bnncc_error. */
static const ModelTensor *tensor_of(Instance *instance, const Request *request, void **data) {
  if (!bnncc_tensor_data(instance, (int32_t)request->first)) return NULL;
  const ModelTensor *tensor = &bnncc_version(instance)->tensors[request->first];
  *data = malloc(tensor->bytes + 1);
  if (*data) return tensor;
  bnncc_fail("out of memory for tensor %d ('%s')", (int)request->first, tensor->name);
  return NULL;
}

static int write_tensor(Instance *instance, const Request *request) {
  void *data = NULL;
  const ModelTensor *tensor = tensor_of(instance, request, &data);
  if (tensor && tensor->space == SPACE_WEIGHTS) {
    bnncc_fail("tensor %d ('%s') is a constant", (int)request->first, tensor->name);
    tensor = NULL;
  } else if (tensor && request->bytes != tensor->bytes) {
    bnncc_fail("tensor %d ('%s') takes %zu bytes, %u were sent", (int)request->first, tensor->name, tensor->bytes,
               (unsigned)request->bytes);
    tensor = NULL;
  }
  int gone = 0, failed = !tensor;
  if (tensor) gone = tensor->bytes && fread(data, tensor->bytes, 1, stdin) != 1;
  else /* the conversation goes on after what was refused */
    for (uint32_t i = 0; i < request->bytes && !gone; i++) gone = getchar() == EOF;
  if (tensor && !gone)
    failed = bnncc_copy(instance, bnncc_tensor_data(instance, (int32_t)request->first), data, tensor->bytes);
  free(data);
  return gone ? -1 : reply_status(failed);
}

static int read_tensor(Instance *instance, const Request *request) {
  void *data = NULL;
  const ModelTensor *tensor = tensor_of(instance, request, &data);
  int failed =
      !tensor || bnncc_copy(instance, data, bnncc_tensor_data(instance, (int32_t)request->first), tensor->bytes);
  int gone = failed ? reply_status(1) : reply(0, data, tensor->bytes);
  free(data);
  return gone;
}

static int bench(Instance *instance, uint32_t count) {
  double *seconds = calloc(count ? count : 1, sizeof *seconds);
  int failed = !seconds;
  if (failed) bnncc_fail("out of memory for %u times", (unsigned)count);
  for (uint32_t i = 0; i < count && !failed; i++) failed = (seconds[i] = timed_run(instance)) < 0;
  int gone = failed ? reply_status(1) : reply(0, seconds, count * sizeof *seconds);
  free(seconds);
  return gone;
}

static int answer(Instance *instance, const Request *request) {
  switch (request->operation) {
    case SERVE_QUIT:
      reply(0, NULL, 0);
      return -1;
    case SERVE_MANIFEST:
      return reply(0, bnncc_model.manifest, strlen(bnncc_model.manifest));
    case SERVE_WRITE:
      return write_tensor(instance, request);
    case SERVE_READ:
      return read_tensor(instance, request);
    case SERVE_RUN_STEPS:
      return reply_status(bnncc_run_steps(instance, (int32_t)request->first, (int32_t)request->count));
    case SERVE_BENCH:
      return bench(instance, request->count);
    case SERVE_THREADS:
      return reply_status(bnncc_set_threads(instance, (int32_t)request->first));
    case SERVE_VERSION:
      return reply(0, bnncc_version(instance)->name, strlen(bnncc_version(instance)->name));
    default:
      return reply_status(bnncc_fail("no operation %u", (unsigned)request->operation));
  }
}

int serve(Instance *instance) {
  Request request;
  while (fread(&request, sizeof request, 1, stdin) == 1 && !answer(instance, &request)) continue;
  return 0;
}
