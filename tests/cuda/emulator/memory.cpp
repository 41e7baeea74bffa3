// Sees what a GPU does not: accesses outside the kernel's arguments, reads of shared memory that nobody wrote or whose
// cp.async has not been waited for, and races in shared memory.
//
// The compiler calls the functions __tsan_* before each access to memory that is not provably the thread's own: these
// are the hooks of its thread sanitizer, put in with -fsanitize=thread, with another library behind them.
//
// Races: the clock counts barriers. Two accesses to a byte, one of them a write, by two threads, race unless a barrier
// of the block, or a __syncwarp of both, lies between.

#include "memory.h"

#include <string.h>

#include "emulated.h"

extern "C" const char __ehdr_start[] __attribute__((visibility("hidden")));
extern "C" const char _end[] __attribute__((visibility("hidden")));

namespace emu {

uint32_t now;

namespace {

struct Shadow {  // of shared memory
  uint32_t written, read;  // when: values of the clock
  uint16_t writer, reader;
  bool in_flight;  // a cp.async of `writer` to it is not finished
  bool split;      // of a word: its bytes have shadows of their own
};

// Of words, and of the bytes of those that are not accessed as a whole.
Shadow words[kMostShared / 4], bytes[kMostShared];
uint32_t block_began, last_barrier;
uint32_t checks;
// The first read of a byte that nobody had written. Told at the next barrier: if another thread writes the byte before
// that, then it is a race, which says more.
struct {
  bool seen;
  uint32_t offset, thread;
} unwritten;
const Buffer* buffers;
size_t buffer_count;
Buffer last_hit, stacks;

[[noreturn]] void race(const char* what, const char* before, uint32_t offset, uint16_t who) {
  char other[40];
  if (who == kMany)
    strcpy(other, "several threads");
  else if (who >= kManyOfWarp)
    __builtin_snprintf(other, sizeof other, "several threads of warp %d", who & ~kManyOfWarp);
  else
    __builtin_snprintf(other, sizeof other, "thread %d", who);
  fail("race in shared memory at byte %u: thread %u %s what %s %s, without a barrier between", offset, current->index,
       what, other, before);
}

// offset: of the shadow's first byte.
void read_one(Shadow& s, uint32_t offset) {
  if (s.written < block_began) {
    if (!unwritten.seen) unwritten = {true, offset, current->index};
  } else if (s.in_flight) {
    fail("byte %u of shared memory is read while thread %u's cp.async to it is under way: a wait_group is missing",
         offset, s.writer);
  } else if (s.written >= last_barrier && checks & check_races && !ordered(s.written, s.writer)) {
    race("reads", "wrote", offset, s.writer);
  }
  s.reader = join_readers(s.read, s.reader);
  s.read = now;
}

void check_write_of_one(const Shadow& s, uint32_t offset) {
  if (s.in_flight && s.written >= block_began)
    fail("byte %u of shared memory is written while thread %u's cp.async to it is under way", offset, s.writer);
  if (!(checks & check_races)) return;
  if (s.written >= last_barrier && !ordered(s.written, s.writer)) race("writes", "wrote", offset, s.writer);
  if (s.read >= last_barrier && !ordered(s.read, s.reader)) race("writes", "read", offset, s.reader);
}

// Calls f with the shadow of each word, or of each byte where the access does not take whole words.
template <class F>
void each_shadow(uint32_t offset, size_t size, bool writes, F f) {
  for (uint32_t end = offset + uint32_t(size); offset < end;) {
    Shadow& word = words[offset / 4];
    Shadow* of_bytes = &bytes[offset / 4 * 4];
    uint32_t first = offset % 4, count = end - offset < 4 - first ? end - offset : 4 - first;
    if (count < 4 && !word.split) {
      for (int i = 0; i < 4; i++) of_bytes[i] = word;
      word.split = true;
    }
    if (!word.split) {
      f(word, offset);
    } else {
      for (uint32_t i = first; i < first + count; i++) f(of_bytes[i], offset - first + i);
      if (writes && count == 4) word = of_bytes[0];  // whose `split` is false
    }
    offset += count;
  }
}

void shared_write(uint32_t offset, size_t size, bool in_flight) {
  Shadow written = {now, 0, uint16_t(current->index), kNobody, in_flight, false};
  each_shadow(offset, size, true, [&](Shadow& s, uint32_t at) {
    check_write_of_one(s, at);
    s = written;
  });
}

bool holds(const Buffer& buffer, const void* address, size_t size) {
  size_t offset = static_cast<const uint8_t*>(address) - buffer.base;
  return offset < buffer.size && size <= buffer.size - offset;
}

[[noreturn]] void fail_outside(const void* address, size_t size, const char* what) {
  if (!buffer_count) fail("%s of %zu bytes at %p, but the kernel has no memory", what, size, address);
  fail("%s of %zu bytes at %s", what, size, place_of(address));
}

bool in_a_buffer(const void* address, size_t size) {
  if (holds(last_hit, address, size)) return true;
  for (size_t i = 0; i < buffer_count; i++)
    if (holds(buffers[i], address, size)) {
      last_hit = buffers[i];
      return true;
    }
  return false;
}

void check_elsewhere(const void* address, size_t size, const char* what, bool writes) {
  if (holds(stacks, address, size)) return;
  if (in_a_buffer(address, size)) {
    if (checks & check_global_races) global_access(address, size, writes);
    return;
  }
  if (!(checks & check_bounds)) return;
  if (address >= static_cast<const void*>(__ehdr_start) && address < static_cast<const void*>(_end)) return;
  fail_outside(address, size, what);
}

}  // namespace

const char* place_of(const void* address) {
  static char text[80];
  size_t best = 0;
  ptrdiff_t nearest = PTRDIFF_MAX;
  for (size_t i = 0; i < buffer_count; i++) {
    ptrdiff_t from = static_cast<const uint8_t*>(address) - buffers[i].base;
    ptrdiff_t distance = from < 0 ? -from : from < ptrdiff_t(buffers[i].size) ? 0 : from - ptrdiff_t(buffers[i].size);
    if (distance < nearest) nearest = distance, best = i;
  }
  ptrdiff_t offset = static_cast<const uint8_t*>(address) - buffers[best].base;
  __builtin_snprintf(text, sizeof text, "byte %td of buffer %zu, which has %zu", offset, best, buffers[best].size);
  return text;
}

bool ordered(uint32_t time, uint16_t who) {
  if (time < last_barrier || who == current->index) return true;
  if (who == kMany) return false;
  uint32_t warp = current->index / kLanes;
  if (time >= current->synced) return false;
  if (who >= kManyOfWarp) return who == (kManyOfWarp | warp) && current->synced_with == kFull;
  return who / kLanes == warp && (current->synced_with >> who % kLanes & 1);
}

uint16_t join_readers(uint32_t time, uint16_t who) {
  uint16_t me = uint16_t(current->index);
  if (time < last_barrier || who == me) return me;
  if (who == kMany) return kMany;
  uint32_t warp = who >= kManyOfWarp ? who & ~kManyOfWarp : who / kLanes;
  return warp == me / kLanes ? uint16_t(kManyOfWarp | warp) : kMany;
}

void memory_begin_launch(uint32_t wanted, const Buffer* given, size_t count, Buffer fiber_stacks) {
  checks = wanted;
  buffers = given;
  buffer_count = count;
  last_hit = {};
  stacks = fiber_stacks;
  if (checks & check_global_races) global_begin_launch(given, count);
}

void memory_begin_block() {
  // Nothing of an earlier block counts: what is older than `block_began` was never written.
  block_began = last_barrier = ++now;
  if (now > 0xf0000000u) {
    memset(words, 0, sizeof words);
    memset(bytes, 0, sizeof bytes);
    block_began = last_barrier = now = 1;
  }
  memset(shared, kPoison, shared_size);
  unwritten.seen = false;
}

void memory_end_epoch() {
  last_barrier = ++now;
  global_settle();
  if (!unwritten.seen || !(checks & check_uninitialised)) return;
  current = &threads[unwritten.thread];
  fail("byte %u of shared memory is read before it is written", unwritten.offset);
}

void memory_sync_warp(Warp& warp, uint32_t mask) {
  ++now;
  for (uint32_t lane = 0; lane < kLanes; lane++)
    if (mask >> lane & 1) {
      threads[warp.first + lane].synced = now;
      threads[warp.first + lane].synced_with = mask;
    }
}

static uint32_t in_shared(const void* address, size_t size) {
  size_t offset = static_cast<const uint8_t*>(address) - shared;
  return offset < shared_size && size <= shared_size - offset ? uint32_t(offset) : kFull;
}

void check_read(const void* address, size_t size) {
  uint32_t offset = in_shared(address, size);
  if (offset != kFull) return each_shadow(offset, size, false, read_one);
  check_elsewhere(address, size, "read", false);
}

void check_write(const void* address, size_t size) {
  uint32_t offset = in_shared(address, size);
  if (offset != kFull) return shared_write(offset, size, false);
  check_elsewhere(address, size, "write", true);
}

void check_atomic(const void* address, size_t size) {
  // Atomics do not race with each other; that plain accesses may race with them is not looked at.
  if (in_shared(address, size) == kFull && !in_a_buffer(address, size) && checks & check_bounds)
    fail_outside(address, size, "atomic");
}

void begin_copy(const Copy& copy) {
  uint8_t* to = at_shared(copy.to, copy.bytes, copy.bytes, "cp.async");
  if (copy.filled) check_elsewhere(copy.from, copy.filled, "cp.async", false);
  shared_write(to - shared, copy.bytes, true);
  memset(to, kPoison, copy.bytes);
}

void finish_copy(const Copy& copy) {
  uint8_t* to = at_shared(copy.to, copy.bytes, copy.bytes, "cp.async");
  memcpy(to, copy.from, copy.filled);
  memset(to + copy.filled, 0, copy.bytes - copy.filled);
  Shadow written = {now, 0, uint16_t(current->index), kNobody, false, false};
  each_shadow(uint32_t(to - shared), copy.bytes, true, [&](Shadow& s, uint32_t) { s = written; });
}

}  // namespace emu

// The compiler's checks of alignment and of indices into arrays of known size end here.
struct SourceLocation {
  const char* file;
  uint32_t line, column;
};
struct Misalignment {
  SourceLocation where;
  const void* type;
  uint8_t log_alignment, kind;
};
extern "C" void emu_misaligned(const void* address, size_t alignment, int line) {
  emu::fail("line %d: access at %p, which is not aligned to %zu bytes", line, address, alignment);
}
static void misaligned(const Misalignment* what, const void* address) {
  emu_misaligned(address, size_t(1) << what->log_alignment, int(what->where.line));
}
static void out_of_bounds(const SourceLocation* where, uintptr_t index) {
  emu::fail("line %u: index %td is outside the array", where->line, ptrdiff_t(index));
}
extern "C" void __ubsan_handle_type_mismatch_v1(Misalignment* what, void* address) { misaligned(what, address); }
extern "C" void __ubsan_handle_type_mismatch_v1_abort(Misalignment* what, void* address) { misaligned(what, address); }
extern "C" void __ubsan_handle_out_of_bounds(SourceLocation* where, uintptr_t index) { out_of_bounds(where, index); }
extern "C" void __ubsan_handle_out_of_bounds_abort(SourceLocation* where, uintptr_t index) {
  out_of_bounds(where, index);
}

// The hooks. With __tsan_memcpy and its like comes the copying itself.
#define HOOKS(size)                                                                                           \
  extern "C" void __tsan_read##size(void* a) { emu::check_read(a, size); }                                    \
  extern "C" void __tsan_write##size(void* a) { emu::check_write(a, size); }                                  \
  extern "C" void __tsan_unaligned_read##size(void* a) { emu::check_read(a, size); }                          \
  extern "C" void __tsan_unaligned_write##size(void* a) { emu::check_write(a, size); }                        \
  extern "C" void __tsan_read_write##size(void* a) { emu::check_read(a, size), emu::check_write(a, size); }   \
  extern "C" void __tsan_unaligned_read_write##size(void* a) { emu::check_read(a, size), emu::check_write(a, size); }
HOOKS(1) HOOKS(2) HOOKS(4) HOOKS(8) HOOKS(16)

extern "C" void __tsan_init() {}

extern "C" void* __tsan_memcpy(void* to, const void* from, size_t size) {
  emu::check_read(from, size);
  emu::check_write(to, size);
  return memcpy(to, from, size);
}

extern "C" void* __tsan_memmove(void* to, const void* from, size_t size) {
  emu::check_read(from, size);
  emu::check_write(to, size);
  return memmove(to, from, size);
}

extern "C" void* __tsan_memset(void* to, int value, size_t size) {
  emu::check_write(to, size);
  return memset(to, value, size);
}
