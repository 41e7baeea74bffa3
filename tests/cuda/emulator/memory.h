// The checks of memory accesses; runtime.cpp tells them what happens to the block.

#pragma once

#include "runtime.h"

namespace emu {

enum Checks : uint32_t { check_bounds = 1, check_races = 2, check_uninitialised = 4, check_global_races = 8 };

void memory_begin_launch(uint32_t checks, const Buffer* buffers, size_t count, Buffer stacks);
void memory_begin_block();
void memory_end_epoch();  // at a barrier of the whole block, and at its end
void memory_sync_warp(Warp&, uint32_t mask);

// Who read: a thread, or several (kManyOfWarp: with the warp's number).
constexpr uint16_t kNobody = 0xffff, kMany = 0xfffe, kManyOfWarp = 0x8000;

extern uint32_t now;                         // counts barriers
bool ordered(uint32_t time, uint16_t who);   // whether what these did then is before what the current thread does
uint16_t join_readers(uint32_t time, uint16_t who);  // these, who read then, and the current thread

const char* place_of(const void* address);  // "byte 12 of buffer 0"

// global.cpp
void global_begin_launch(const Buffer* buffers, size_t count);
void global_access(const void* address, size_t size, bool writes);
void global_settle();
void global_release();

}  // namespace emu
