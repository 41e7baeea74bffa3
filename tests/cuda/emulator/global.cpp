// Races in global memory within one launch: blocks run one after another here, so a kernel that reads what another of
// its threads writes would seem to work. Two accesses race as in shared memory (memory.cpp); between blocks always.
//
// Two writes race only if they differ: tiles that overlap may store an element twice. For every word of 32 bits there is
// kept who wrote and who read which of its bytes; where several threads did, of different bytes, nothing is said.

#include <string.h>
#include <sys/mman.h>

#include "memory.h"

namespace emu {
namespace {

constexpr uint32_t kManyBlocks = 0xffffffffu;

struct Side {
  uint32_t launch, block, time;
  uint16_t who;
  uint8_t bytes;
  bool mixed;
};
struct Word {
  Side write, read;
};
struct Region {  // of memory that one or several arguments lie in
  uint8_t *base, *end;
  Word* words;
};

// Kept while they are few and small: what is kept of a region takes eight times its size.
constexpr size_t kMostRegions = 256, kMostKept = 64 << 20;
Region regions[kMostRegions];
size_t region_count;
Region* last_region;
uint32_t launch;

// A store that has yet to happen when it is told: whether it changes what another thread wrote is seen later.
struct {
  uint8_t* address;
  size_t size;
  uint8_t before[16];
  Thread* thread;
  uint32_t other_block, other_thread;
} second;

bool fresh(const Side& side) { return side.launch == launch; }

bool conflicts(const Side& side, uint32_t bytes) {
  if (!fresh(side) || side.mixed || !(side.bytes & bytes)) return false;
  return side.block != block_number || !ordered(side.time, side.who);
}

[[noreturn]] void race(const char* does, const char* did, const void* address, const Side& side) {
  char other[80];
  if (side.block == kManyBlocks)
    strcpy(other, "threads of several blocks");
  else if (side.who >= kManyOfWarp)
    __builtin_snprintf(other, sizeof other, "several threads of block number %u", side.block);
  else
    __builtin_snprintf(other, sizeof other, "thread %u of block number %u", side.who, side.block);
  fail("race in global memory at %s: it %s what %s %s, and nothing orders them", place_of(address), does, other, did);
}

void note_read(Side& side, uint32_t bytes) {
  uint16_t me = uint16_t(current->index);
  // What is read again and again: all has been noted.
  if (fresh(side) && side.block == block_number && side.who == kMany && side.bytes == bytes) {
    side.time = now;
    return;
  }
  if (!fresh(side)) {
    side = {launch, block_number, now, me, uint8_t(bytes), false};
    return;
  }
  bool same = side.block == block_number && side.who == me;
  side.mixed |= !same && side.bytes != bytes;
  side.bytes |= uint8_t(bytes);
  if (side.block != block_number)
    side.block = kManyBlocks;
  else
    side.who = join_readers(side.time, side.who);
  side.time = now;
}

void note_write(Side& side, uint32_t bytes) {
  uint16_t me = uint16_t(current->index);
  bool others = fresh(side) && (side.bytes & ~bytes);
  bool same = side.block == block_number && side.who == me;
  bool mixed = others && (side.mixed || !same);
  side = {launch, block_number, now, me, uint8_t(others ? side.bytes | bytes : bytes), mixed};
}

Region* find(const uint8_t* address) {
  if (last_region && address >= last_region->base && address < last_region->end) return last_region;
  for (size_t i = 0; i < region_count; i++)
    if (address >= regions[i].base && address < regions[i].end) return last_region = &regions[i];
  return nullptr;
}

void drop(size_t i) {
  munmap(regions[i].words, (size_t(regions[i].end - regions[i].base) / 4 + 2) * sizeof(Word));
  regions[i] = regions[--region_count];
}

}  // namespace

// The buffers' regions; those of earlier launches are kept, for the same memory is used again and again.
void global_begin_launch(const Buffer* buffers, size_t count) {
  launch++;
  last_region = nullptr;
  second.size = 0;
  size_t kept = 0;
  for (size_t i = 0; i < region_count; i++) kept += size_t(regions[i].end - regions[i].base);
  if (kept > kMostKept || region_count + count > kMostRegions) global_release();
  for (size_t i = 0; i < count && region_count < kMostRegions; i++) {
    auto base = reinterpret_cast<uint8_t*>(reinterpret_cast<uintptr_t>(buffers[i].base) & ~uintptr_t(3));
    uint8_t* end = buffers[i].base + buffers[i].size;
    bool known = false;
    for (size_t j = 0; j < region_count; j++) known |= regions[j].base <= base && regions[j].end >= end;
    if (known) continue;
    for (size_t j = region_count; j-- > 0;)
      if (regions[j].base < end && base < regions[j].end) {
        if (regions[j].base < base) base = regions[j].base;
        if (regions[j].end > end) end = regions[j].end;
        drop(j);
        j = region_count;  // the region has grown: it may overlap more
      }
    size_t bytes = (size_t(end - base) / 4 + 2) * sizeof(Word);
    void* words = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (words != MAP_FAILED) regions[region_count++] = {base, end, static_cast<Word*>(words)};
  }
}

void global_release() {
  while (region_count) drop(region_count - 1);
}

static void settle() {
  size_t size = second.size;
  second.size = 0;
  if (!memcmp(second.before, second.address, size)) return;
  current = second.thread;
  fail("race in global memory at %s: it writes another value than thread %u of block number %u wrote, and nothing "
       "orders them",
       place_of(second.address), second.other_thread, second.other_block);
}

void global_settle() {
  if (second.size) settle();
}

void global_access(const void* address, size_t size, bool writes) {
  if (second.size) settle();
  auto* at = static_cast<uint8_t*>(const_cast<void*>(address));
  Region* region = find(at);
  if (!region) return;
  for (uint8_t* end = at + size; at < end;) {
    size_t offset = size_t(at - region->base), first = offset % 4;
    size_t count = size_t(end - at) < 4 - first ? size_t(end - at) : 4 - first;
    uint32_t bytes = ((1u << count) - 1) << first;
    Word& word = region->words[offset / 4];
    if (writes) {
      if (conflicts(word.read, bytes)) race("writes", "read", at, word.read);
      if (conflicts(word.write, bytes) && size <= sizeof second.before && !second.size) {
        second.address = static_cast<uint8_t*>(const_cast<void*>(address));
        second.size = size;
        memcpy(second.before, address, size);
        second.thread = current;
        second.other_block = word.write.block;
        second.other_thread = word.write.who;
      }
      note_write(word.write, bytes);
    } else {
      if (conflicts(word.write, bytes)) race("reads", "wrote", at, word.write);
      note_read(word.read, bytes);
    }
    at += count;
  }
}

}  // namespace emu
