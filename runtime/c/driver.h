/* The part of an artifact that is the same for every model.
 *
 * The linker generates model.c: the tables below as constants, and the public functions of model.h, which carry the
 * model's name and forward to the functions here. Everything but those public functions is hidden in the library.
 *
 * A model may have several versions, each for other processors of one architecture: the same inputs and outputs, all
 * else of its own. An instance runs one of them, on this machine's CPU (host.c) or on a GPU (gpu.c).
 *
 * Memory: an instance owns one piece of it: the arena, the persistent space, and a home for every input and output. A
 * home is used for a caller's buffer that cannot be used in place, and by bnncc_run_steps. Running allocates nothing,
 * but for what the first run may add: worker threads, scratch memory where a kernel asks for some (pool.c), pinned
 * memory for copies to a GPU. Instances are independent of each other; one must not be used by two threads at a time,
 * but for giving memory back. The one state of the process is what instances on a GPU share: code and weights there,
 * counted and guarded by a lock (gpu_device.c).
 */
#ifndef BNNCC_DRIVER_H
#define BNNCC_DRIVER_H

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

typedef struct Instance Instance;
typedef struct Model Model;
typedef struct ModelVersion ModelVersion;

/* How the instances of a version work. Each function does what the one of its name below says; its arguments have been
 * checked. `create` gets the device as the caller said it. */
typedef struct {
  Instance *(*create)(const Model *model, const ModelVersion *version, int32_t device);
  void (*destroy)(Instance *self);
  int (*run)(Instance *self, const void *const *inputs, void *const *outputs);
  int (*run_device)(Instance *self, const void *const *inputs, void *const *outputs, void *stream);
  int (*run_steps)(Instance *self, int32_t first, int32_t count);
  int (*set_threads)(Instance *self, int32_t threads);
  void *(*tensor_data)(Instance *self, int32_t tensor);
  int (*copy)(Instance *self, void *to, const void *from, size_t bytes);
  void *(*host_alloc)(Instance *self, size_t bytes);
  void (*host_free)(Instance *self, void *memory);
  void *(*device_alloc)(Instance *self, size_t bytes);
  void (*device_free)(Instance *self, void *memory);
  int32_t (*device)(const Instance *self);
  void *(*stream)(const Instance *self);
  int (*wait)(Instance *self, void *stream);
  int (*synchronize)(Instance *self);
} Backend;

extern const Backend bnncc_host, bnncc_gpu; /* an artifact holds those that its versions name */

typedef struct {
  const char *name;
  uint32_t shared_bytes; /* the most dynamic shared memory that a launch of it asks for */
} ModelFunction;

typedef struct {
  int32_t function; /* into ModelDevice.functions */
  uint32_t grid[3], block[3], shared_bytes;
  int32_t first_argument, argument_count; /* into ModelDevice.arguments */
} ModelLaunch;

/* The device's part of a version for a GPU. */
typedef struct {
  int32_t major, minor, exact; /* the architecture of `image`: sm_90 is 9, 0; exact: it runs on no other (sm_90a) */
  int32_t driver;              /* what cuDriverGetVersion must say at least: 13000 for CUDA 13.0 */
  const unsigned char *image;  /* a cubin */
  const char *ptx;             /* zero-terminated */
  const ModelFunction *functions;
  const ModelLaunch *launches;
  const int32_t *arguments;     /* tensor ids */
  const int32_t *step_launches; /* of the init steps, then of the steps: where each one's launches begin, and the end */
  int32_t function_count, launch_count, argument_count;
} ModelDevice;

struct ModelVersion {
  const char *name;              /* of the target it is compiled for: "x86-64-v3" */
  const char *required_features; /* words of /proc/cpuinfo separated by spaces */
  const Backend *backend;
  const ModelDevice *device; /* NULL for a CPU */
  const ModelTensor *tensors;
  const ModelStep *init, *steps;
  const int32_t *arguments;        /* tensor ids */
  const int32_t *inputs, *outputs; /* tensor ids, in the model's order */
  int32_t tensor_count, init_count, step_count, argument_count;
  size_t arena_bytes, persistent_bytes;
};

struct Model {
  const char *name;
  const char *manifest;         /* JSON, zero-terminated */
  const unsigned char *weights; /* of all versions */
  size_t weights_bytes;
  const Description *input_descriptions, *output_descriptions;
  int32_t input_count, output_count;
  size_t io_alignment;
  const ModelVersion *versions; /* the most demanding first */
  int32_t version_count;
};

/* What every backend's instance begins with. */
struct Instance {
  const Model *model;
  const ModelVersion *version;
};

extern const Model bnncc_model; /* in the generated model.c */

/* A new instance with its init steps run, or NULL (see bnncc_error).
 * version: the name of the version to run. NULL: that of the environment variable BNNCC_VERSION; where it is not set or
 * empty, the first version whose features this machine's CPU has.
 * device: which GPU, counted as CUDA counts. Negative: what the environment variable BNNCC_DEVICE says ("1", "cuda:1"),
 * else the first; a version for the CPU takes nothing else. */
Instance *bnncc_create(const Model *model, const char *version, int32_t device);
void bnncc_destroy(Instance *self);

/* The version that the instance runs. */
const ModelVersion *bnncc_version(const Instance *self);

/* Runs the whole model; buffers in the order of the model's inputs and outputs, contiguous, not overlapping.
 * Returns 0, or -1 with the reason in bnncc_error. */
int bnncc_run(Instance *self, const void *const *inputs, void *const *outputs);

/* The same on buffers in the device's memory, without waiting for the GPU: in the order of the caller's stream, a
 * CUstream, where NULL is CUDA's default stream. On a CPU it is bnncc_run, and the stream must be NULL. */
int bnncc_run_device(Instance *self, const void *const *inputs, void *const *outputs, void *stream);

/* Runs `count` steps from `first` on the homes of the inputs and outputs (bnncc_tensor_data). */
int bnncc_run_steps(Instance *self, int32_t first, int32_t count);

/* Where a tensor of the plan lives, in the device's memory: the home for inputs and outputs. NULL for an unknown id. */
void *bnncc_tensor_data(Instance *self, int32_t tensor);

/* Copies between any two places in the host's or the device's memory, behind all that the instance was asked to do;
 * returns when it is done. 0, or -1 with bnncc_error. */
int bnncc_copy(Instance *self, void *to, const void *from, size_t bytes);

/* Memory for inputs and outputs that is used in place: of the host (pinned, for a GPU), and of the device. NULL with
 * bnncc_error. What was not given back when the instance is destroyed is lost. */
void *bnncc_host_alloc(Instance *self, size_t bytes);
void bnncc_host_free(Instance *self, void *memory);
void *bnncc_device_alloc(Instance *self, size_t bytes);
void bnncc_device_free(Instance *self, void *memory);

/* The GPU that the instance runs on, or -1 on a CPU. */
int32_t bnncc_device(const Instance *self);

/* The instance's own CUstream; NULL on a CPU. */
void *bnncc_stream(const Instance *self);

/* Work given to the stream from now on waits for all that the instance was asked to do. */
int bnncc_wait(Instance *self, void *stream);

/* Waits for all that the instance was asked to do. */
int bnncc_synchronize(Instance *self);

/* 0: one thread per physical core that this process may use. On a GPU it changes nothing. */
int bnncc_set_threads(Instance *self, int32_t threads);

/* The last error of the calling thread, one line. */
const char *bnncc_error(void);

/* Sets it; printf-like. Returns -1. */
int bnncc_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* For backends. Forgets the last error, before work that may fail without a reason. */
void bnncc_forget_error(void);

/* Whether a tensor lies in the memory of an input or output, and the first that lies in the same one as
 * tensor `i` does: a reshape is another tensor in its memory. */
int bnncc_is_port(const ModelTensor *tensor);
int32_t bnncc_first_of_memory(const ModelVersion *version, int32_t i);

#endif
