// The stand-in's memory, streams and images; driver.cpp has the functions of libcuda.so.1 on top of them.

#pragma once

#include <stdlib.h>
#include <string.h>

#include "cuda_abi.h"
#include "emulated.h"

namespace driver {

enum : CUresult {
  kInvalidValue = 1,
  kOutOfMemory = CUDA_ERROR_OUT_OF_MEMORY,
  kNotInitialized = CUDA_ERROR_NOT_INITIALIZED,
  kNoDevice = 100,
  kInvalidDevice = 101,
  kInvalidImage = 200,
  kInvalidContext = 201,
  kNoBinary = CUDA_ERROR_NO_BINARY_FOR_GPU,
  kInvalidPtx = 218,
  kUnsupportedPtx = 222,
  kInvalidHandle = 400,
  kNotFound = 500,
  kIllegalAddress = CUDA_ERROR_ILLEGAL_ADDRESS,
  kLaunchFailed = CUDA_ERROR_LAUNCH_FAILED,
};

// A list that grows; what it holds is moved as bytes. No library of C++ is linked.
template <class T>
struct List {
  T* items = nullptr;
  size_t count = 0, room = 0;

  T* begin() { return items; }
  T* end() { return items + count; }
  T& operator[](size_t i) { return items[i]; }
  T& add(const T& item) {
    if (count == room) {
      room = room ? 2 * room : 16;
      items = static_cast<T*>(realloc(static_cast<void*>(items), room * sizeof(T)));
      if (!items) abort();
    }
    memcpy(static_cast<void*>(items + count), &item, sizeof(T));
    return items[count++];
  }
  void remove(size_t i) {
    memmove(static_cast<void*>(items + i), items + i + 1, (count - i - 1) * sizeof(T));
    count--;
  }
  void release() {
    free(static_cast<void*>(items));
    *this = {};
  }
};

// What the environment variable BNNCC_EMULATED_GPU says of a word: "capability=9.0 memory=1000000".
long option(const char* name, long otherwise);

// ---- Memory (driver_memory.cpp). Device memory can be touched only while the stand-in itself works on it.

struct Memory {
  uint8_t* base;
  size_t bytes;
  bool on_device;
};

extern List<Memory> memories;
extern size_t device_bytes, most_device_bytes, allocations, frees;

Memory* allocate(size_t bytes, bool on_device);  // nullptr where there is no more
bool release(const void* base, bool on_device);
Memory* find(CUdeviceptr address, size_t bytes);
void open_memory();
void close_memory();

// ---- Images (driver_images.cpp).

struct Module;

struct Function {
  Module* module;
  const char* name;
  uint32_t parameters, static_shared, dynamic_shared;  // the last: as cuFuncSetAttribute allowed
};

struct Module {
  decltype(&emu_launch) launch;
  List<Function*> functions;
  uint32_t most_shared;
};

// The module that an image stands for, by the table that the environment variable BNNCC_EMULATED names.
CUresult load(const void* image, int capability, Module** out);

// ---- Work (driver_streams.cpp). Nothing runs before somebody waits for it.

struct Launch {
  Function* function;
  uint32_t grid[3], block[3], shared;
  uint64_t* values;  // of the parameters
};

Launch make_launch(Function*, const unsigned* grid, const unsigned* block, unsigned shared, void** parameters);
CUresult check_launch(const Launch&);

struct Graph;
struct Node {
  Graph* graph;
  size_t index;
};
struct GraphNode {
  Launch launch;
  List<size_t> after;
};
struct Graph {
  List<GraphNode> nodes;
  List<Node*> handles;
};

struct Stream;
struct Event {
  Stream* stream;
  size_t position;  // how much of the stream's work it stands behind
};

enum class Kind { copy, launch, graph, wait };
struct Work {
  Kind kind;
  CUdeviceptr to, from;
  size_t bytes;
  void* staged;  // the copy of pageable memory that was made at once
  Launch launch;
  Graph* graph;  // a copy
  Event event;
};

struct Stream {
  List<Work> work;
  size_t done;  // how much of it has run
};

extern List<Stream*> streams;
extern Stream legacy;
extern CUresult sticky;  // the error after which nothing runs any more
extern size_t launches, graph_launches, copies;

Graph* copy_graph(Graph*);
void free_graph(Graph*);
Stream* stream_of(CUstream);  // nullptr for one that is not there
CUresult enqueue(Stream*, const Work&);
CUresult finish(Stream*, size_t position = SIZE_MAX);
CUresult finish_all();

}  // namespace driver
