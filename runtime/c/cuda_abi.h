/* The part of the CUDA driver API that the driver of an artifact uses.
 *
 * An artifact is built without the CUDA toolkit, so it is declared here: types, numbers and signatures as in cuda.h of
 * CUDA 13.0, whose names with a version (`#define cuMemAlloc cuMemAlloc_v2`) are the real ones. Names without one are
 * of the first version: cuGraphAddKernelNode takes CUDA_KERNEL_NODE_PARAMS_v1, which all drivers know. The newest
 * function is cuGraphInstantiateWithFlags, of CUDA 11.4. tests/cuda/test_driver_abi.py compares all of it with an
 * installed cuda.h.
 */
#ifndef BNNCC_CUDA_ABI_H
#define BNNCC_CUDA_ABI_H

#include <stddef.h>
#include <stdint.h>

typedef int CUresult; /* an enumeration; 0 is success */
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUmod_st *CUmodule;
typedef struct CUfunc_st *CUfunction;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphNode_st *CUgraphNode;
typedef struct CUgraphExec_st *CUgraphExec;

enum {
  CUDA_ERROR_OUT_OF_MEMORY = 2,
  CUDA_ERROR_NOT_INITIALIZED = 3,
  CUDA_ERROR_NO_BINARY_FOR_GPU = 209,
  CUDA_ERROR_ILLEGAL_ADDRESS = 700,
  CUDA_ERROR_LAUNCH_TIMEOUT = 702,
  CUDA_ERROR_ASSERT = 710,
  CUDA_ERROR_HARDWARE_STACK_ERROR = 714,
  CUDA_ERROR_LAUNCH_FAILED = 719
};
enum { /* CUdevice_attribute */
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75,
  CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR = 76
};
enum { CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8 }; /* CUfunction_attribute */
enum { CU_JIT_ERROR_LOG_BUFFER = 5, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES = 6 }; /* CUjit_option */
enum { CU_POINTER_ATTRIBUTE_MEMORY_TYPE = 2 }; /* CUpointer_attribute */
enum { CU_STREAM_NON_BLOCKING = 1 };
enum { CU_EVENT_DISABLE_TIMING = 2 };
enum { CU_MEMHOSTALLOC_PORTABLE = 1 };

typedef struct {
  CUfunction func;
  unsigned gridDimX, gridDimY, gridDimZ;
  unsigned blockDimX, blockDimY, blockDimZ;
  unsigned sharedMemBytes;
  void **kernelParams; /* one pointer to each argument, copied when a node is made or changed */
  void **extra;
} CUDA_KERNEL_NODE_PARAMS_v1;

/* F(name, parameters) for every function. */
#define CUDA_FUNCTIONS(F)                                                                                         \
  F(cuInit, (unsigned flags))                                                                                     \
  F(cuDriverGetVersion, (int *version))                                                                           \
  F(cuGetErrorName, (CUresult error, const char **text))                                                          \
  F(cuGetErrorString, (CUresult error, const char **text))                                                        \
  F(cuDeviceGetCount, (int *count))                                                                               \
  F(cuDeviceGet, (CUdevice *device, int ordinal))                                                                 \
  F(cuDeviceGetName, (char *name, int size, CUdevice device))                                                     \
  F(cuDeviceGetAttribute, (int *value, int attribute, CUdevice device))                                           \
  F(cuDevicePrimaryCtxRetain, (CUcontext *context, CUdevice device))                                              \
  F(cuDevicePrimaryCtxRelease_v2, (CUdevice device))                                                              \
  F(cuCtxPushCurrent_v2, (CUcontext context))                                                                     \
  F(cuCtxPopCurrent_v2, (CUcontext *context))                                                                     \
  F(cuModuleLoadDataEx,                                                                                           \
    (CUmodule *module, const void *image, unsigned option_count, int *options, void **option_values))             \
  F(cuModuleUnload, (CUmodule module))                                                                            \
  F(cuModuleGetFunction, (CUfunction *function, CUmodule module, const char *name))                               \
  F(cuFuncSetAttribute, (CUfunction function, int attribute, int value))                                          \
  F(cuMemGetInfo_v2, (size_t *free, size_t *total))                                                               \
  F(cuMemAlloc_v2, (CUdeviceptr *address, size_t bytes))                                                          \
  F(cuMemFree_v2, (CUdeviceptr address))                                                                          \
  F(cuMemHostAlloc, (void **memory, size_t bytes, unsigned flags))                                                \
  F(cuMemFreeHost, (void *memory))                                                                                \
  F(cuMemcpyAsync, (CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream stream))                             \
  F(cuPointerGetAttribute, (void *value, int attribute, CUdeviceptr address))                                     \
  F(cuStreamCreate, (CUstream *stream, unsigned flags))                                                           \
  F(cuStreamDestroy_v2, (CUstream stream))                                                                        \
  F(cuStreamSynchronize, (CUstream stream))                                                                       \
  F(cuStreamWaitEvent, (CUstream stream, CUevent event, unsigned flags))                                          \
  F(cuEventCreate, (CUevent *event, unsigned flags))                                                              \
  F(cuEventDestroy_v2, (CUevent event))                                                                           \
  F(cuEventRecord, (CUevent event, CUstream stream))                                                              \
  F(cuEventSynchronize, (CUevent event))                                                                          \
  F(cuLaunchKernel,                                                                                               \
    (CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,  \
     unsigned block_z, unsigned shared_bytes, CUstream stream, void **parameters, void **extra))                  \
  F(cuGraphCreate, (CUgraph *graph, unsigned flags))                                                              \
  F(cuGraphDestroy, (CUgraph graph))                                                                              \
  F(cuGraphAddKernelNode,                                                                                         \
    (CUgraphNode *node, CUgraph graph, const CUgraphNode *dependencies, size_t dependency_count,                  \
     const CUDA_KERNEL_NODE_PARAMS_v1 *parameters))                                                               \
  F(cuGraphInstantiateWithFlags, (CUgraphExec *exec, CUgraph graph, unsigned long long flags))                    \
  F(cuGraphExecKernelNodeSetParams,                                                                               \
    (CUgraphExec exec, CUgraphNode node, const CUDA_KERNEL_NODE_PARAMS_v1 *parameters))                           \
  F(cuGraphExecDestroy, (CUgraphExec exec))                                                                       \
  F(cuGraphLaunch, (CUgraphExec exec, CUstream stream))

/* What libcuda.so.1 has under these names. */
typedef struct {
#define CUDA_MEMBER(name, parameters) CUresult(*name) parameters;
  CUDA_FUNCTIONS(CUDA_MEMBER)
#undef CUDA_MEMBER
} Cuda;

#endif
