// What the compiled kernels and the runtime know of each other, and what callers of the library call.

#pragma once

#include <stddef.h>
#include <stdint.h>

#define EMU_EXPORT __attribute__((visibility("default")))
// The callee keeps no such pointer: what it points to stays the thread's own, and is not watched.
#define EMU_OWN __attribute__((noescape))

extern "C" {

struct emu_index {
  uint32_t x, y, z;
};

// A kernel: what the source says of it. most_threads: of __launch_bounds__, 0 without. enter: calls it with parameters
// whose values lie where the pointers point, as cuLaunchKernel has them.
struct emu_kernel {
  const char* name;
  void (*enter)(void** parameters);
  uint32_t static_shared, most_threads, parameters;
};

struct emu_buffer {
  void* base;
  size_t size;
};

// Defined by the compiled kernels.
extern const emu_kernel emu_kernels[];
extern const uint32_t emu_kernel_count;
extern const uint32_t emu_most_shared;  // bytes that a block may have on the architecture

// Called by them. line: in the CUDA source, for messages.
emu_index emu_thread_index();
emu_index emu_block_index();
emu_index emu_block_dim();
emu_index emu_grid_dim();
void* emu_shared(size_t offset);
void* emu_dynamic_shared();
uint32_t emu_to_shared(const void*);
void* emu_at_shared(uint32_t address, uint32_t size);  // aligned to its size
void emu_barrier(int kind, int predicate, int line);  // kind: 0 plain, 1 counts those whose predicate holds
int emu_barrier_count();
int emu_block_threads();
uint32_t emu_activemask(int line);
void emu_syncwarp(uint32_t mask, int line);
uint32_t emu_vote(uint32_t mask, int predicate, int line);
uint32_t emu_match(uint32_t mask, uint64_t value, int line);
uint64_t emu_shuffle(int kind, uint32_t mask, uint64_t value, uint32_t b, uint32_t c, int line);
uint32_t emu_reduce(int kind, uint32_t mask, uint32_t value, int line);
void emu_trap(int line);
[[noreturn]] void emu_misaligned(const void*, size_t alignment, int line);
void emu_check_atomic(const void*, size_t);
void emu_ldmatrix(int count, int transposed, uint32_t* out EMU_OWN, uint32_t address, int line);
void emu_stmatrix(int count, int transposed, const uint32_t* in EMU_OWN, uint32_t address, int line);
void emu_cp_async(uint32_t to, const void* from, uint32_t bytes, uint32_t filled);
void emu_cp_async_commit();
void emu_cp_async_wait(uint32_t pending);
void emu_cp_async_wait_all();
// kind: see mma_kinds in instructions.cpp.
void emu_mma(int kind, uint32_t* d EMU_OWN, const uint32_t* a EMU_OWN, const uint32_t* b EMU_OWN,
             const uint32_t* c EMU_OWN, int line);

// Called from outside. Each returns 0, or 1 with a message.
EMU_EXPORT void emu_release();  // gives back what launches took
EMU_EXPORT uint32_t emu_shared_limit();  // bytes that a block may have
EMU_EXPORT int emu_kernel_at(uint32_t index, emu_kernel* out);
EMU_EXPORT int emu_launch(const char* function, const uint32_t grid[3], const uint32_t block[3], uint32_t dynamic_shared,
                          void** parameters, const emu_buffer* buffers, size_t buffer_count, uint32_t checks,
                          char* message, size_t message_size);

}  // extern "C"
