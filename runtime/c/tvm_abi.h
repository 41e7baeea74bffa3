/* The few structures of the tvm-ffi binary interface that compiled kernels use.
 *
 * An artifact is built without TVM's headers, so they are declared here. The layout is fixed by two stable interfaces:
 * DLPack's DLTensor (dlpack/dlpack.h, unchanged since 0.2) and tvm-ffi's TVMFFIAny and safe-call convention
 * (tvm/ffi/c_api.h of apache-tvm-ffi 0.1); the parallel launch and workspace hooks are those of
 * tvm/runtime/c_backend_api.h. The assertions below fail the build where a compiler lays them out otherwise, and
 * tests/runtime/test_abi.py compares them with the installed headers.
 */
#ifndef BNNCC_TVM_ABI_H
#define BNNCC_TVM_ABI_H

#include <stddef.h>
#include <stdint.h>

enum { DL_CPU = 1 };                                     /* DLDeviceType.kDLCPU */
enum { DL_INT = 0, DL_UINT = 1, DL_FLOAT = 2, DL_BOOL = 6 }; /* DLDataTypeCode */
enum { FFI_NONE = 0, FFI_DLTENSOR_PTR = 7 };             /* TVMFFITypeIndex */

typedef struct {
  int32_t device_type;
  int32_t device_id;
} DLDevice;

typedef struct {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} DLDataType;

typedef struct {
  void *data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  const int64_t *shape;
  const int64_t *strides; /* NULL: contiguous */
  uint64_t byte_offset;
} DLTensor;

typedef struct {
  int32_t type_index;
  uint32_t zero_padding;
  union {
    int64_t v_int64;
    void *v_ptr;
  };
} FFIAny;

/* A kernel: returns 0, or not 0 after TVMFFIErrorSetRaisedFromCStrParts. */
typedef int (*FFIFunction)(void *handle, const FFIAny *args, int32_t count, FFIAny *result);

typedef struct {
  void *sync_handle;
  int32_t num_task;
} ParallelEnv;

/* The body of a parallel loop: handles its share, number task_id of env->num_task. */
typedef int (*ParallelLambda)(int task_id, ParallelEnv *env, void *data);

_Static_assert(sizeof(FFIAny) == 16 && offsetof(FFIAny, v_ptr) == 8, "TVMFFIAny");
_Static_assert(sizeof(DLDataType) == 4 && sizeof(DLDevice) == 8, "DLDataType, DLDevice");
_Static_assert(offsetof(DLTensor, device) == sizeof(void *), "DLTensor.device");
_Static_assert(offsetof(DLTensor, ndim) == sizeof(void *) + 8, "DLTensor.ndim");
_Static_assert(offsetof(DLTensor, dtype) == sizeof(void *) + 12, "DLTensor.dtype");
_Static_assert(offsetof(DLTensor, shape) == sizeof(void *) + 16, "DLTensor.shape");
_Static_assert(offsetof(DLTensor, byte_offset) == (3 * sizeof(void *) + 16 + 7) / 8 * 8, "DLTensor.byte_offset");
_Static_assert(offsetof(ParallelEnv, num_task) == sizeof(void *), "TVMParallelGroupEnv");

#endif
