/* Where the tensors lie on the GPU, and the launches that read them: one by one, or all in one CUDA graph.
 *
 * The graph is made of explicit kernel nodes, not by capturing a stream: so the nodes are at hand, and where a caller's
 * buffers in the GPU's memory are used in place, the parameters of just those kernels that take them are changed in it.
 * Each node follows the one before it, since the plan's arena holds many tensors one after another in one place.
 */
#include <stdio.h>

#include "gpu.h"

enum { ALIGNMENT = 256 }; /* of every space and home, as cuMemAlloc gives it */

static size_t aligned(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

size_t gpu_homes_begin(const ModelVersion *version) {
  return aligned(version->arena_bytes) + aligned(version->persistent_bytes);
}

size_t gpu_layout(const ModelVersion *version, CUdeviceptr base, CUdeviceptr weights, CUdeviceptr *homes) {
  size_t persistent = aligned(version->arena_bytes);
  size_t home = gpu_homes_begin(version);
  for (int32_t i = 0; i < version->tensor_count; i++) {
    const ModelTensor *info = &version->tensors[i];
    CUdeviceptr place = base + home;
    if (info->space == SPACE_ARENA) place = base + info->offset;
    if (info->space == SPACE_PERSISTENT) place = base + persistent + info->offset;
    if (info->space == SPACE_WEIGHTS) place = weights + info->offset;
    int32_t first = bnncc_is_port(info) ? bnncc_first_of_memory(version, i) : i;
    if (homes) homes[i] = first == i ? place : homes[first];
    if (bnncc_is_port(info) && first == i) home += aligned(info->bytes);
  }
  return home;
}

static int32_t first_launch(const Gpu *self) {
  const ModelVersion *version = self->head.version;
  return version->device->step_launches[version->init_count];
}

static CUDA_KERNEL_NODE_PARAMS_v1 node_parameters(const Gpu *self, const ModelLaunch *launch) {
  return (CUDA_KERNEL_NODE_PARAMS_v1){
      .func = self->gpu->functions[launch->function],
      .gridDimX = launch->grid[0],
      .gridDimY = launch->grid[1],
      .gridDimZ = launch->grid[2],
      .blockDimX = launch->block[0],
      .blockDimY = launch->block[1],
      .blockDimZ = launch->block[2],
      .sharedMemBytes = launch->shared_bytes,
      .kernelParams = self->parameters + launch->first_argument,
  };
}

int gpu_give_places(Gpu *self) {
  const ModelDevice *code = self->head.version->device;
  for (int32_t i = 0; i < code->launch_count; i++) {
    const ModelLaunch *launch = &code->launches[i];
    int changed = 0;
    for (int32_t j = launch->first_argument; j < launch->first_argument + launch->argument_count; j++) {
      CUdeviceptr place = self->places[code->arguments[j]];
      changed |= self->values[j] != place;
      self->values[j] = place;
    }
    if (!changed || !self->exec || i < first_launch(self)) continue;
    CUDA_KERNEL_NODE_PARAMS_v1 parameters = node_parameters(self, launch);
    CUgraphNode node = self->nodes[i - first_launch(self)];
    CUresult result = self->cuda->cuGraphExecKernelNodeSetParams(self->exec, node, &parameters);
    if (gpu_check(self->gpu, result, "changing the graph")) {
      self->values[launch->first_argument] = 0; /* so that the next run tries again */
      return -1;
    }
  }
  return 0;
}

int gpu_make_graph(Gpu *self) {
  const ModelDevice *code = self->head.version->device;
  const Cuda *cu = self->cuda;
  if (gpu_check(self->gpu, cu->cuGraphCreate(&self->graph, 0), "making the graph")) return -1;
  for (int32_t i = first_launch(self), made = 0; i < code->launch_count; i++, made++) {
    CUDA_KERNEL_NODE_PARAMS_v1 parameters = node_parameters(self, &code->launches[i]);
    CUgraphNode *node = &self->nodes[made];
    CUresult result = cu->cuGraphAddKernelNode(node, self->graph, made ? node - 1 : NULL, made ? 1 : 0, &parameters);
    if (gpu_check(self->gpu, result, "adding a kernel to the graph")) return -1;
  }
  return gpu_check(self->gpu, cu->cuGraphInstantiateWithFlags(&self->exec, self->graph, 0), "instantiating the graph");
}

int gpu_launch_steps(Gpu *self, int32_t first, int32_t count) {
  const ModelDevice *code = self->head.version->device;
  for (int32_t i = code->step_launches[first]; i < code->step_launches[first + count]; i++) {
    CUDA_KERNEL_NODE_PARAMS_v1 p = node_parameters(self, &code->launches[i]);
    CUresult result =
        self->cuda->cuLaunchKernel(p.func, p.gridDimX, p.gridDimY, p.gridDimZ, p.blockDimX, p.blockDimY, p.blockDimZ,
                                   p.sharedMemBytes, self->stream, p.kernelParams, NULL);
    if (result) {
      char doing[160];
      snprintf(doing, sizeof doing, "launching kernel %s", code->functions[code->launches[i].function].name);
      return gpu_check(self->gpu, result, doing);
    }
  }
  return 0;
}
