/* Running on an NVIDIA GPU: what instances share (gpu_device.c), their launches (gpu_graph.c), and all else (gpu.c).
 *
 * libcuda.so.1 comes with the GPU's driver. It is opened when the first instance is made, never linked, so an artifact
 * can be loaded, and says what is missing, where there is none.
 */
#ifndef BNNCC_GPU_H
#define BNNCC_GPU_H

#include "cuda_abi.h"
#include "driver.h"

/* One version of the model on one GPU of this process: its code and weights there. */
typedef struct GpuDevice GpuDevice;
struct GpuDevice {
  GpuDevice *next;
  int32_t users;
  const Cuda *cuda;
  const Model *model;
  const ModelVersion *version;
  int32_t index;
  char name[128]; /* "cuda:0 (NVIDIA H100, sm_90)" */
  int architecture; /* 90 */
  CUdevice device;
  CUcontext context; /* the device's primary one, which other libraries of the process use, too */
  CUmodule module;
  CUdeviceptr weights;
  CUfunction functions[]; /* of ModelDevice.functions */
};

/* The version on the GPU of that index, made by the first who asks. NULL with bnncc_error. */
GpuDevice *gpu_acquire(const Model *model, const ModelVersion *version, int32_t index);

/* Gives up what gpu_acquire gave; the last one frees it. */
void gpu_release(GpuDevice *self);

/* Makes the context the calling thread's, and takes it back. Returns 0, or -1 with bnncc_error. */
int gpu_enter(const GpuDevice *self);
void gpu_leave(const GpuDevice *self);

/* 0 where the result is 0; else -1, with an error that says what was being done. */
int gpu_check(const GpuDevice *self, CUresult result, const char *doing);

/* Device memory; of none at all, one byte. `what` needs it, for the error. Returns 0, or -1 with bnncc_error. */
int gpu_alloc(const GpuDevice *self, CUdeviceptr *address, size_t bytes, const char *what);

typedef struct {
  Instance head;
  GpuDevice *gpu;
  const Cuda *cuda;
  CUstream stream;        /* of all work but that of bnncc_run_device */
  CUevent done;           /* recorded behind bnncc_run_device, in the caller's stream */
  int pending;            /* whether there may be such work that `stream` has not waited for */
  CUdeviceptr memory;     /* the arena, the persistent space, the homes */
  unsigned char *staging; /* pinned, for every input and output; made when first used */
  CUgraph graph;
  CUgraphExec exec;
  CUgraphNode *nodes;  /* [launches of the steps] */
  CUdeviceptr *homes;  /* [tensors] */
  CUdeviceptr *places; /* [tensors] where the next run finds them: the homes, but for callers' buffers */
  CUdeviceptr *values; /* [ModelDevice.arguments] what the kernels get, in the graph, too */
  void **parameters;   /* [ModelDevice.arguments] into values */
} Gpu;

/* Lays out the memory of an instance from `base`, and returns the bytes it takes. homes: [tensors], or NULL. */
size_t gpu_layout(const ModelVersion *version, CUdeviceptr base, CUdeviceptr weights, CUdeviceptr *homes);

/* Where in it the homes of inputs and outputs begin. */
size_t gpu_homes_begin(const ModelVersion *version);

/* All of these return 0, or -1 with bnncc_error. */

/* Gives the kernels the tensors' places; in the graph, if it is made, only to those for which one changed. */
int gpu_give_places(Gpu *self);

/* The graph of all steps, on the places given. */
int gpu_make_graph(Gpu *self);

/* Launches the kernels of `count` steps from `first` on; init steps count, too. */
int gpu_launch_steps(Gpu *self, int32_t first, int32_t count);

#endif
