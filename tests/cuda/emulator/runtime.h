// What the parts of the emulator's runtime share: the threads of the block that runs, as fibers of one host thread, and
// the memory they may touch.
//
// All state is static: one host thread per loaded library. To run on several, load copies of the file.

#pragma once

#include <stddef.h>
#include <stdint.h>

namespace emu {

constexpr uint32_t kLanes = 32, kMostThreads = 1024, kMostWarps = kMostThreads / kLanes;
constexpr uint32_t kFull = 0xffffffffu;

// Where a shared-memory address, as 32-bit PTX operands hold it, begins. Not 0, so that a null address is seen.
constexpr uint32_t kSharedWindow = 1024;
constexpr size_t kMostShared = 228 * 1024;

// What memory holds before it is written: as float 3.4e38, as half NaN, as int8 127.
constexpr uint8_t kPoison = 0x7f;

struct Index {
  uint32_t x, y, z;
};

enum class State : uint8_t { fresh, ready, at_barrier, at_collective, at_activemask, ended };

struct Copy {  // one cp.async: `filled` bytes from `from`, then zeros, into `bytes` bytes of shared memory at `to`
  uint32_t to;
  uint32_t bytes, filled;
  const void* from;
};

struct Group {  // of cp.async, by its end in the thread's list of copies
  uint32_t end;
};

struct Warp;
using Execute = void (*)(Warp&, uint32_t mask);

struct Thread {
  void* stack;  // its pointer, while the thread does not run
  uint32_t index;
  Index place;
  State state;
  // Where it waits.
  const char* where;
  int line;
  uint32_t mask;
  Execute execute;
  void* operands;
  // The last __syncwarp it took part in: what lanes of its mask did before is ordered before what it does now.
  uint32_t synced, synced_with;
  // cp.async: copies under way, and how many of them were committed as groups.
  Copy* copies;
  Group* groups;
  uint32_t copy_count, copy_room, group_count, group_room;
};

struct Warp {
  uint32_t first;   // index of its lane 0
  uint32_t alive;   // lanes that have not ended
  uint32_t ready;   // lanes that can run
  uint32_t parked;  // lanes that wait at a collective
};

struct Buffer {
  uint8_t* base;
  size_t size;
};

extern Thread threads[kMostThreads];
extern Thread* current;
extern uint8_t* shared;       // the block's shared memory: static part, then dynamic part
extern size_t shared_size;

extern uint32_t block_number;  // of the block that runs: x, then y, then z

// Lanes of a warp that take part in one operation meet here; the last to come executes it for all.
void collective(Execute execute, const char* name, uint32_t mask, int line, void* operands);

// Ends the launch with an error; adds the kernel, the block and the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Reports an access of the thread in kernel `current`; these see what is wrong with it and fail.
void check_read(const void* address, size_t size);
void check_write(const void* address, size_t size);
void check_atomic(const void* address, size_t size);
void begin_copy(const Copy& copy);   // poisons the target
void finish_copy(const Copy& copy);  // puts the data there

// The memory behind a 32-bit address of shared memory.
uint8_t* at_shared(uint32_t address, size_t size, size_t alignment, const char* what);

template <class T>
T& operands_of(const Warp& warp, uint32_t lane) {
  return *static_cast<T*>(threads[warp.first + lane].operands);
}

}  // namespace emu
