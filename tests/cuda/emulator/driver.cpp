// A libcuda.so.1 without a GPU: the functions that the driver of an artifact calls, on top of emulated kernels.
//
// It keeps to what CUDA's manual says where that catches mistakes: work is asynchronous, device memory is not the
// host's, calls need a current context, big shared memory has to be announced, an error in a kernel is the end. What it
// is like, and how it misbehaves, is said in the environment variable BNNCC_EMULATED_GPU (`option`): devices, driver
// (13000), capability (90), memory (bytes), ptx (0: too new for the driver), fail_launch (of all launches the one that
// fails), checks (of the emulator).

#include <pthread.h>
#include <stdio.h>
#include <unistd.h>

#include "driver.h"

using namespace driver;

// What follows has these names and signatures, or does not compile.
#define DECLARE(name, parameters) extern "C" EMU_EXPORT CUresult name parameters;
CUDA_FUNCTIONS(DECLARE)

// What the benchmarks call and the driver of an artifact does not (cuda.h of CUDA 13.0).
extern "C" EMU_EXPORT CUresult cuEventElapsedTime(float* milliseconds, CUevent begin, CUevent end);
enum { kMultiprocessors = 16, kPciBus = 33, kPciDevice = 34, kPciDomain = 50 };

namespace {

pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
pid_t initialised_by;  // after a fork nothing is
int primary_users[16];
thread_local List<CUcontext> contexts;

struct Lock {
  Lock() { pthread_mutex_lock(&mutex); }
  ~Lock() { pthread_mutex_unlock(&mutex); }
};

int device_count() {
  const char* visible = getenv("CUDA_VISIBLE_DEVICES");
  return visible && !*visible ? 0 : int(option("devices", 1));
}
CUcontext context_of(int device) { return reinterpret_cast<CUcontext>(&primary_users[device]); }
CUresult initialised() { return initialised_by == getpid() ? 0 : kNotInitialized; }
CUresult in_context() {
  if (CUresult error = initialised()) return error;
  if (!contexts.count || *reinterpret_cast<int*>(contexts[contexts.count - 1]) <= 0) return kInvalidContext;
  return sticky;
}

template <class T>
T* made() {
  return static_cast<T*>(calloc(1, sizeof(T)));
}

const struct {
  CUresult error;
  const char *name, *text;
} errors[] = {
    {0, "CUDA_SUCCESS", "no error"},
    {kInvalidValue, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {kNoDevice, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {kInvalidDevice, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {kInvalidImage, "CUDA_ERROR_INVALID_IMAGE", "device kernel image is invalid"},
    {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {kNoBinary, "CUDA_ERROR_NO_BINARY_FOR_GPU", "no kernel image is available for execution on the device"},
    {kInvalidPtx, "CUDA_ERROR_INVALID_PTX", "a PTX JIT compilation failed"},
    {kUnsupportedPtx, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION",
     "the provided PTX was compiled with an unsupported toolchain."},
    {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE", "invalid resource handle"},
    {kNotFound, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {kIllegalAddress, "CUDA_ERROR_ILLEGAL_ADDRESS", "an illegal memory access was encountered"},
    {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED", "unspecified launch failure"},
};

}  // namespace

// The first lines of most functions. IN_CONTEXT: a context has to be current, and nothing may have failed.
#define API extern "C" EMU_EXPORT CUresult
#define INITIALISED \
  Lock lock;        \
  if (CUresult error = initialised()) return error
#define IN_CONTEXT \
  Lock lock;       \
  if (CUresult error = in_context()) return error

API cuInit(unsigned flags) {
  Lock lock;
  if (flags) return kInvalidValue;
  if (device_count() < 1) return kNoDevice;
  initialised_by = getpid();
  return 0;
}

// NVRTC asks a libcuda that is in the process for this, and takes what it gets: a table of nothing but its size.
API cuGetExportTable(const void** table, const void*) {
  static const size_t nothing[] = {sizeof(size_t)};
  return *table = nothing, 0;
}

API cuDriverGetVersion(int* version) { return *version = int(option("driver", 13000)), 0; }

API cuGetErrorName(CUresult error, const char** text) {
  for (auto& e : errors)
    if (e.error == error) return *text = e.name, 0;
  return *text = nullptr, kInvalidValue;
}

API cuGetErrorString(CUresult error, const char** text) {
  for (auto& e : errors)
    if (e.error == error) return *text = e.text, 0;
  return *text = nullptr, kInvalidValue;
}

API cuDeviceGetCount(int* count) {
  INITIALISED;
  return *count = device_count(), 0;
}

API cuDeviceGet(CUdevice* device, int ordinal) {
  INITIALISED;
  if (ordinal < 0 || ordinal >= device_count()) return kInvalidDevice;
  return *device = ordinal, 0;
}

API cuDeviceGetName(char* name, int size, CUdevice device) {
  INITIALISED;
  if (device < 0 || device >= device_count()) return kInvalidDevice;
  snprintf(name, size_t(size), "Emulated GPU");
  return 0;
}

API cuDeviceGetAttribute(int* value, int attribute, CUdevice device) {
  INITIALISED;
  if (device < 0 || device >= device_count()) return kInvalidDevice;
  int capability = int(option("capability", 90));
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return *value = capability / 10, 0;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return *value = capability % 10, 0;
    case kMultiprocessors: return *value = 1, 0;
    case kPciBus: case kPciDevice: case kPciDomain: return *value = 0, 0;
    default: return kInvalidValue;
  }
}

API cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  INITIALISED;
  if (device < 0 || device >= device_count()) return kInvalidDevice;
  primary_users[device]++;
  return *context = context_of(device), 0;
}

API cuDevicePrimaryCtxRelease_v2(CUdevice device) {
  INITIALISED;
  if (device < 0 || device >= device_count() || primary_users[device] <= 0) return kInvalidContext;
  if (--primary_users[device] == 0) finish_all();
  return 0;
}

API cuCtxPushCurrent_v2(CUcontext context) {
  INITIALISED;
  if (!context || *reinterpret_cast<int*>(context) <= 0) return kInvalidContext;
  contexts.add(context);
  return 0;
}

API cuCtxPopCurrent_v2(CUcontext* context) {
  INITIALISED;
  if (!contexts.count) return kInvalidContext;
  CUcontext popped = contexts[--contexts.count];
  if (context) *context = popped;
  return 0;
}

API cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned count, int* options, void** values) {
  IN_CONTEXT;
  Module* loaded = nullptr;
  CUresult result = load(image, int(option("capability", 90)), &loaded);
  for (unsigned i = 0; result && i < count; i++)
    if (options[i] == CU_JIT_ERROR_LOG_BUFFER) strcpy(static_cast<char*>(values[i]), "emulated log");
  if (!result) *module = reinterpret_cast<CUmodule>(loaded);
  return result;
}

API cuModuleUnload(CUmodule) {
  IN_CONTEXT;
  return finish_all();  // the library stays: it is a file of the test's
}

API cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  IN_CONTEXT;
  for (Function* f : reinterpret_cast<Module*>(module)->functions)
    if (!strcmp(f->name, name)) return *function = reinterpret_cast<CUfunction>(f), 0;
  return kNotFound;
}

API cuFuncSetAttribute(CUfunction function, int attribute, int value) {
  IN_CONTEXT;
  auto* f = reinterpret_cast<Function*>(function);
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES || value < 0) return kInvalidValue;
  if (uint32_t(value) + f->static_shared > f->module->most_shared) return kInvalidValue;
  f->dynamic_shared = uint32_t(value);
  return 0;
}

API cuMemGetInfo_v2(size_t* available, size_t* total) {
  IN_CONTEXT;
  *total = size_t(option("memory", 1L << 30));
  *available = *total - device_bytes;
  return 0;
}

API cuMemAlloc_v2(CUdeviceptr* address, size_t bytes) {
  IN_CONTEXT;
  if (!bytes) return kInvalidValue;
  Memory* memory = allocate(bytes, true);
  if (!memory) return kOutOfMemory;
  return *address = reinterpret_cast<uintptr_t>(memory->base), 0;
}

API cuMemFree_v2(CUdeviceptr address) {
  IN_CONTEXT;
  finish_all();
  return release(reinterpret_cast<void*>(address), true) ? sticky : kInvalidValue;
}

API cuMemHostAlloc(void** memory, size_t bytes, unsigned) {
  IN_CONTEXT;
  if (!bytes) return kInvalidValue;
  Memory* made = allocate(bytes, false);
  if (!made) return kOutOfMemory;
  return *memory = made->base, 0;
}

API cuMemFreeHost(void* memory) {
  IN_CONTEXT;
  finish_all();
  return release(memory, false) ? sticky : kInvalidValue;
}

// Pageable memory is copied from at once, and to before the call returns (CUDA driver API, "API synchronization
// behavior"); all else when the stream gets there.
API cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t bytes, CUstream handle) {
  IN_CONTEXT;
  Stream* stream = stream_of(handle);
  if (!stream) return kInvalidHandle;
  Memory *target = find(to, bytes), *source = find(from, bytes);
  // An address in one of the allocations, but not all of the bytes.
  if ((!target && find(to, 1)) || (!source && find(from, 1))) return kInvalidValue;
  Work work = {};
  work.kind = Kind::copy;
  work.to = to;
  work.from = from;
  work.bytes = bytes;
  if (!source) {
    work.staged = malloc(bytes + 1);
    memcpy(work.staged, reinterpret_cast<void*>(from), bytes);
  }
  enqueue(stream, work);
  return target ? 0 : finish(stream);
}

API cuPointerGetAttribute(void* value, int attribute, CUdeviceptr address) {
  INITIALISED;
  Memory* memory = find(address, 1);
  if (!memory || attribute != CU_POINTER_ATTRIBUTE_MEMORY_TYPE) return kInvalidValue;
  return *static_cast<unsigned*>(value) = memory->on_device ? 2 : 1, 0;
}

API cuStreamCreate(CUstream* stream, unsigned) {
  IN_CONTEXT;
  return *stream = reinterpret_cast<CUstream>(streams.add(made<Stream>())), 0;
}

API cuStreamDestroy_v2(CUstream handle) {
  IN_CONTEXT;
  for (size_t i = 0; handle && i < streams.count; i++)
    if (streams[i] == reinterpret_cast<Stream*>(handle)) {
      finish(streams[i]);
      streams.remove(i);  // the stream itself stays, for events that stand in it
      return sticky;
    }
  return kInvalidHandle;
}

API cuStreamSynchronize(CUstream handle) {
  IN_CONTEXT;
  Stream* stream = stream_of(handle);
  return stream ? finish(stream) : kInvalidHandle;
}

API cuStreamWaitEvent(CUstream handle, CUevent event, unsigned) {
  IN_CONTEXT;
  Stream* stream = stream_of(handle);
  if (!stream || !event) return kInvalidHandle;
  Work work = {};
  work.kind = Kind::wait;
  work.event = *reinterpret_cast<Event*>(event);
  return enqueue(stream, work);
}

API cuEventCreate(CUevent* event, unsigned) {
  IN_CONTEXT;
  return *event = reinterpret_cast<CUevent>(made<Event>()), 0;
}

API cuEventDestroy_v2(CUevent event) {
  IN_CONTEXT;
  free(event);
  return 0;
}

API cuEventRecord(CUevent event, CUstream handle) {
  IN_CONTEXT;
  Stream* stream = stream_of(handle);
  if (!stream || !event) return kInvalidHandle;
  *reinterpret_cast<Event*>(event) = {stream, stream->work.count};
  return 0;
}

API cuEventSynchronize(CUevent event) {
  IN_CONTEXT;
  if (!event) return kInvalidHandle;
  auto* e = reinterpret_cast<Event*>(event);
  return e->stream ? finish(e->stream, e->position) : 0;
}

// No time passes here: as many milliseconds as there was work between the two.
API cuEventElapsedTime(float* milliseconds, CUevent begin, CUevent end) {
  IN_CONTEXT;
  auto *first = reinterpret_cast<Event*>(begin), *last = reinterpret_cast<Event*>(end);
  if (!first || !last || !last->stream || first->stream != last->stream) return kInvalidHandle;
  if (last->stream->done < last->position) return 600;  // CUDA_ERROR_NOT_READY
  return *milliseconds = float(last->position - first->position), 0;
}

API cuLaunchKernel(CUfunction function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, CUstream handle, void** parameters, void**) {
  IN_CONTEXT;
  Stream* stream = stream_of(handle);
  if (!stream || !function) return kInvalidHandle;
  const unsigned grid[] = {gx, gy, gz}, block[] = {bx, by, bz};
  Work work = {};
  work.kind = Kind::launch;
  work.launch = make_launch(reinterpret_cast<Function*>(function), grid, block, shared, parameters);
  if (CUresult error = check_launch(work.launch)) return error;
  return enqueue(stream, work);
}

API cuGraphCreate(CUgraph* graph, unsigned) {
  IN_CONTEXT;
  return *graph = reinterpret_cast<CUgraph>(made<Graph>()), 0;
}

API cuGraphDestroy(CUgraph graph) {
  IN_CONTEXT;
  free_graph(reinterpret_cast<Graph*>(graph));
  return 0;
}

static Launch node_launch(const CUDA_KERNEL_NODE_PARAMS_v1* p) {
  const unsigned grid[] = {p->gridDimX, p->gridDimY, p->gridDimZ}, block[] = {p->blockDimX, p->blockDimY, p->blockDimZ};
  return make_launch(reinterpret_cast<Function*>(p->func), grid, block, p->sharedMemBytes, p->kernelParams);
}

API cuGraphAddKernelNode(CUgraphNode* node, CUgraph handle, const CUgraphNode* dependencies, size_t dependency_count,
                         const CUDA_KERNEL_NODE_PARAMS_v1* parameters) {
  IN_CONTEXT;
  auto* graph = reinterpret_cast<Graph*>(handle);
  GraphNode added = {node_launch(parameters), {}};
  if (CUresult error = check_launch(added.launch)) return error;
  for (size_t i = 0; i < dependency_count; i++) {
    auto* before = reinterpret_cast<Node*>(dependencies[i]);
    if (before->graph != graph) return kInvalidValue;
    added.after.add(before->index);
  }
  auto* made_node = made<Node>();
  *made_node = {graph, graph->nodes.count};
  graph->nodes.add(added);
  graph->handles.add(made_node);
  return *node = reinterpret_cast<CUgraphNode>(made_node), 0;
}

API cuGraphInstantiateWithFlags(CUgraphExec* exec, CUgraph graph, unsigned long long) {
  IN_CONTEXT;
  return *exec = reinterpret_cast<CUgraphExec>(copy_graph(reinterpret_cast<Graph*>(graph))), 0;
}

API cuGraphExecKernelNodeSetParams(CUgraphExec exec, CUgraphNode handle, const CUDA_KERNEL_NODE_PARAMS_v1* parameters) {
  IN_CONTEXT;
  auto* graph = reinterpret_cast<Graph*>(exec);
  auto* node = reinterpret_cast<Node*>(handle);
  if (node->index >= graph->nodes.count) return kInvalidValue;
  Launch changed = node_launch(parameters);
  if (CUresult error = check_launch(changed)) return error;
  free(graph->nodes[node->index].launch.values);
  graph->nodes[node->index].launch = changed;
  return 0;
}

API cuGraphExecDestroy(CUgraphExec exec) {
  IN_CONTEXT;
  free_graph(reinterpret_cast<Graph*>(exec));
  return 0;
}

API cuGraphLaunch(CUgraphExec exec, CUstream handle) {
  IN_CONTEXT;
  Stream* stream = stream_of(handle);
  if (!stream) return kInvalidHandle;
  Work work = {};
  work.kind = Kind::graph;
  work.graph = copy_graph(reinterpret_cast<Graph*>(exec));  // as it is now: later changes are for later launches
  return enqueue(stream, work);
}
