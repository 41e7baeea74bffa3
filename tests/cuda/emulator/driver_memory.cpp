// The stand-in's memory: pages of their own for each allocation, between pages that nobody may touch.

#include <stdio.h>
#include <sys/mman.h>

#include "driver.h"

namespace driver {

List<Memory> memories;
size_t device_bytes, most_device_bytes, allocations, frees;

namespace {

constexpr size_t kPage = 65536, kAlignment = 256;  // as cuMemAlloc gives it; pages of 64 KiB are the largest common ones
constexpr uint8_t kPoison = 0x7f;  // as float 3.4e38, as half NaN, as int8 127

size_t pages(size_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

void protect(int how) {
  for (Memory& m : memories)
    if (m.on_device) {
      auto begin = reinterpret_cast<uintptr_t>(m.base) / kPage * kPage;
      mprotect(reinterpret_cast<void*>(begin), pages(m.bytes + kAlignment), how);
    }
}

}  // namespace

long option(const char* name, long otherwise) {
  const char* text = getenv("BNNCC_EMULATED_GPU");
  size_t length = strlen(name);
  for (; text && *text; text += strcspn(text, " "), text += *text == ' ')
    if (!strncmp(text, name, length) && text[length] == '=') return atol(text + length + 1);
  return otherwise;
}

Memory* allocate(size_t bytes, bool on_device) {
  if (on_device && device_bytes + bytes > size_t(option("memory", 1L << 30))) return nullptr;
  // The end lies at the page that nobody may touch, as far as the alignment lets it.
  size_t whole = pages(bytes + kAlignment);
  void* at = mmap(nullptr, whole + 2 * kPage, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) return nullptr;
  auto begin = (reinterpret_cast<uintptr_t>(at) + kPage - 1) / kPage * kPage;
  auto* first = reinterpret_cast<uint8_t*>(begin);
  mprotect(first, whole, PROT_READ | PROT_WRITE);
  memset(first, kPoison, whole);
  Memory memory = {first + whole - (bytes + kAlignment - 1) / kAlignment * kAlignment, bytes, on_device};
  if (on_device) {
    device_bytes += bytes;
    if (device_bytes > most_device_bytes) most_device_bytes = device_bytes;
    mprotect(first, whole, PROT_NONE);
  }
  allocations++;
  return &memories.add(memory);
}

bool release(const void* base, bool on_device) {
  for (size_t i = 0; i < memories.count; i++) {
    Memory m = memories[i];
    if (m.base != base || m.on_device != on_device) continue;
    // Nobody gets these addresses again: what touches them later is seen.
    auto begin = reinterpret_cast<uintptr_t>(m.base) / kPage * kPage;
    mprotect(reinterpret_cast<void*>(begin), pages(m.bytes + kAlignment), PROT_NONE);
    madvise(reinterpret_cast<void*>(begin), pages(m.bytes + kAlignment), MADV_DONTNEED);
    if (on_device) device_bytes -= m.bytes;
    frees++;
    memories.remove(i);
    return true;
  }
  return false;
}

Memory* find(CUdeviceptr address, size_t bytes) {
  for (Memory& m : memories) {
    size_t offset = address - reinterpret_cast<uintptr_t>(m.base);
    if (offset < m.bytes && bytes <= m.bytes - offset) return &m;
  }
  return nullptr;
}

void open_memory() { protect(PROT_READ | PROT_WRITE); }
void close_memory() { protect(PROT_NONE); }

// At the end of the process: what happened, for the test that started it.
__attribute__((destructor)) static void report() {
  const char* path = getenv("BNNCC_EMULATED_REPORT");
  FILE* file = path ? fopen(path, "w") : nullptr;
  if (!file) return;
  fprintf(file, "allocations %zu\nfrees %zu\nlive_bytes %zu\nmost_bytes %zu\nlaunches %zu\ngraph_launches %zu\ncopies %zu\n",
          allocations, frees, device_bytes, most_device_bytes, launches, graph_launches, copies);
  fclose(file);
}

}  // namespace driver
