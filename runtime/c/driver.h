/* The part of an artifact that is the same for every model.
 *
 * The linker generates model.c: the tables below as constants, and the public functions of model.h, which carry the
 * model's name and forward to the functions here. Everything but those public functions is hidden in the library.
 *
 * A model may have several versions, each for other processors of one architecture: the same inputs and outputs, all
 * else of its own. An instance runs one of them.
 *
 * Memory: an instance is one allocation, 64-byte aligned: its bookkeeping, the arena, the persistent space, and a home
 * for every input and output. A home is used for a caller's buffer that is not aligned to `io_alignment`, and by
 * bnncc_run_steps. Running allocates nothing, but for what the first run may add: worker threads, and scratch memory
 * where a kernel asks for some (pool.c). No state is global, so instances are independent; one instance must not
 * be used by two threads at a time.
 */
#ifndef BNNCC_DRIVER_H
#define BNNCC_DRIVER_H

#include "pool.h"
#include "tvm_abi.h"

typedef enum { SPACE_INPUT, SPACE_OUTPUT, SPACE_ARENA, SPACE_PERSISTENT, SPACE_WEIGHTS } Space;

typedef struct {
  const char *name;
  const char *dtype; /* as NumPy spells it: "float32" */
  const int64_t *shape;
  int32_t ndim;
  DLDataType type;
  Space space;
  size_t offset; /* in bytes from the start of the space; of inputs and outputs, which one */
  size_t bytes;
} ModelTensor;

typedef struct {
  const char *name;
  FFIFunction call;
  int32_t first_argument; /* into ModelVersion.arguments */
  int32_t argument_count;
} ModelStep;

/* What bnncc_input and bnncc_output describe; model.h declares the same structure under the model's name. */
typedef struct {
  const char *name;
  const char *dtype;
  int32_t ndim;
  const int64_t *shape;
  size_t bytes;
} Description;

typedef struct {
  const char *name;              /* of the target it is compiled for: "x86-64-v3" */
  const char *required_features; /* words of /proc/cpuinfo separated by spaces */
  const ModelTensor *tensors;
  const ModelStep *init, *steps;
  const int32_t *arguments;        /* tensor ids */
  const int32_t *inputs, *outputs; /* tensor ids, in the model's order */
  int32_t tensor_count, init_count, step_count, argument_count;
  size_t arena_bytes, persistent_bytes;
} ModelVersion;

typedef struct {
  const char *name;
  const char *manifest;         /* JSON, zero-terminated */
  const unsigned char *weights; /* of all versions */
  const Description *input_descriptions, *output_descriptions;
  int32_t input_count, output_count;
  size_t io_alignment;
  const ModelVersion *versions; /* the most demanding first */
  int32_t version_count;
} Model;

typedef struct Instance Instance;

extern const Model bnncc_model; /* in the generated model.c */

/* A new instance with its init steps run, or NULL (see bnncc_error).
 * version: the name of the version to run. NULL: that of the environment variable BNNCC_VERSION; where it is not set or
 * empty, the first version whose features this machine has. */
Instance *bnncc_create(const Model *model, const char *version);
void bnncc_destroy(Instance *self);

/* The version that the instance runs. */
const ModelVersion *bnncc_version(const Instance *self);

/* Runs the whole model; buffers in the order of the model's inputs and outputs, contiguous, not overlapping.
 * Returns 0, or -1 with the reason in bnncc_error. */
int bnncc_run(Instance *self, const void *const *inputs, void *const *outputs);

/* Runs `count` steps from `first` on the homes of the inputs and outputs (bnncc_tensor_data). */
int bnncc_run_steps(Instance *self, int32_t first, int32_t count);

/* Where a tensor of the plan lives: the home for inputs and outputs. NULL for an unknown id. */
void *bnncc_tensor_data(Instance *self, int32_t tensor);

/* 0: one thread per physical core that this process may use. */
int bnncc_set_threads(Instance *self, int32_t threads);

/* The last error of the calling thread, one line. */
const char *bnncc_error(void);

/* Sets it; printf-like. Returns -1. */
int bnncc_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

#endif
