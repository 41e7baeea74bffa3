// The checks of memory accesses; runtime.cpp tells them what happens to the block.

#pragma once

#include "runtime.h"

namespace emu {

enum Checks : uint32_t { check_bounds = 1, check_races = 2, check_uninitialised = 4 };

void memory_begin_launch(uint32_t checks, const Buffer* buffers, size_t count, Buffer stacks);
void memory_begin_block();
void memory_end_epoch();  // at a barrier of the whole block, and at its end
void memory_sync_warp(Warp&, uint32_t mask);

}  // namespace emu
