// Runs a grid: block after block, the threads of a block as fibers that give way at barriers and warp collectives.

#include "runtime.h"

#include <stdarg.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "emulated.h"
#include "memory.h"

extern "C" void emu_switch(void** save, void* load);

// Saves what a function must keep, and continues where `load` was saved.
#if defined(__x86_64__)
__asm__(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  retq
)");
constexpr size_t kSaved = 6, kReturn = 6;  // words on the stack, and which of them is the return address
#elif defined(__aarch64__)
__asm__(R"(
.text
.globl emu_switch
.hidden emu_switch
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]; stp x21, x22, [sp, #16]; stp x23, x24, [sp, #32]; stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]; stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]; stp d10, d11, [sp, #112]; stp d12, d13, [sp, #128]; stp d14, d15, [sp, #144]
  mov x9, sp; str x9, [x0]; mov sp, x1
  ldp x19, x20, [sp]; ldp x21, x22, [sp, #16]; ldp x23, x24, [sp, #32]; ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]; ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]; ldp d10, d11, [sp, #112]; ldp d12, d13, [sp, #128]; ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");
constexpr size_t kSaved = 20, kReturn = 11;
#else
#error "the emulator knows x86-64 and aarch64"
#endif

namespace emu {

Thread threads[kMostThreads];
Thread* current;
uint8_t* shared;
size_t shared_size;
uint32_t block_number;

namespace {

constexpr size_t kStack = 128 * 1024, kGuard = 4096;

Warp warps[kMostWarps];
uint32_t thread_count, warp_count, alive_count, at_barrier_count;
uint32_t barrier_sum, barrier_result;
uint8_t* stacks;
void* host_stack;
alignas(16) uint8_t landing[16384], signal_stack[16384];

const emu_kernel* kernel;
void** kernel_parameters;
Index grid, block, block_place;
char* message;
size_t message_size;
bool failed;

[[noreturn]] void leave() {
  failed = true;
  void* lost;
  emu_switch(&lost, host_stack);
  __builtin_unreachable();
}

void say(const char* format, ...) __attribute__((format(printf, 1, 2)));
void say(const char* format, ...) {
  size_t used = strlen(message);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + used, message_size - used, format, arguments);
  va_end(arguments);
}

void say_where() {
  say("kernel %s, block (%u, %u, %u): ", kernel->name, block_place.x, block_place.y, block_place.z);
}

// Nobody can run: says where everybody waits.
[[noreturn]] void fail_stuck() {
  message[0] = 0;
  say_where();
  say("threads wait for each other for ever:");
  for (uint32_t w = 0; w < warp_count; w++) {
    uint32_t told = 0;
    uint32_t lanes = thread_count - w * kLanes < kLanes ? (1u << (thread_count % kLanes)) - 1 : kFull;
    for (uint32_t lane = 0; lane < kLanes; lane++) {
      if (!(lanes & ~told) || told >> lane & 1 || !(lanes >> lane & 1)) continue;
      Thread& t = threads[w * kLanes + lane];
      uint32_t same = 0;
      for (uint32_t other = lane; other < kLanes; other++) {
        Thread& o = threads[w * kLanes + other];
        if (lanes >> other & 1 && o.state == t.state &&
            (t.state == State::ended || (o.where == t.where && o.line == t.line && o.mask == t.mask)))
          same |= 1u << other;
      }
      told |= same;
      if (t.state == State::ended)
        say(" warp %u, lanes %08x have ended;", w, same);
      else if (t.state == State::at_barrier)
        say(" warp %u, lanes %08x are at %s (line %d);", w, same, t.where, t.line);
      else
        say(" warp %u, lanes %08x are at %s (line %d) for lanes %08x;", w, same, t.where, t.line, t.mask);
    }
    if (strlen(message) + 300 > message_size) {
      say(" ...;");
      break;
    }
  }
  message[strlen(message) - 1] = 0;
  leave();
}

void release_barrier() {
  const Thread* first = nullptr;
  for (uint32_t i = 0; i < thread_count; i++) {
    Thread& t = threads[i];
    if (t.state != State::at_barrier) continue;
    if (!first) first = &t;
    if (t.line != first->line) {
      current = &t;
      fail("is at %s (line %d) while thread %u is at %s (line %d)", t.where, t.line, first->index, first->where,
           first->line);
    }
    t.state = State::ready;
  }
  for (uint32_t w = 0; w < warp_count; w++) warps[w].ready = warps[w].alive;
  barrier_result = barrier_sum;
  at_barrier_count = barrier_sum = 0;
  memory_end_epoch();
}

// All that can run has run: threads at an __activemask are as converged as they will be.
bool release_activemask() {
  for (uint32_t i = 0; i < thread_count; i++) {
    Thread& t = threads[i];
    if (t.state != State::at_activemask) continue;
    Warp& warp = warps[i / kLanes];
    uint32_t together = 0;
    for (uint32_t lane = 0; lane < kLanes && warp.first + lane < thread_count; lane++) {
      Thread& o = threads[warp.first + lane];
      if (o.state == State::at_activemask && o.line == t.line) together |= 1u << lane;
    }
    for (uint32_t lane = 0; lane < kLanes; lane++)
      if (together >> lane & 1) {
        threads[warp.first + lane].mask = together;
        threads[warp.first + lane].state = State::ready;
      }
    warp.ready |= together;
    return true;
  }
  return false;
}

Thread* next_thread() {
  for (;;) {
    uint32_t w = current ? current->index / kLanes : 0;
    for (uint32_t i = 0; i < warp_count; i++, w = w + 1 == warp_count ? 0 : w + 1)
      if (warps[w].ready) {
        uint32_t lane = __builtin_ctz(warps[w].ready);
        warps[w].ready &= warps[w].ready - 1;
        return &threads[warps[w].first + lane];
      }
    if (at_barrier_count && at_barrier_count == alive_count)
      release_barrier();
    else if (!release_activemask())
      fail_stuck();
  }
}

void enter_thread();

void prepare(Thread& t) {
  // Stacks begin at different lines of the cache, not all at the same.
  uint8_t* top = stacks + (t.index + 1) * kStack - (t.index * 320) % 4096;
  void** words = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(top) & ~uintptr_t(63)) - kSaved - 2;
  memset(words, 0, (kSaved + 2) * sizeof *words);
  words[kReturn] = reinterpret_cast<void*>(enter_thread);
  t.stack = words;
}

void give_way() {
  Thread* from = current;
  Thread* to = next_thread();
  if (to == from) return;
  current = to;
  if (to->state == State::fresh) prepare(*to);
  to->state = State::ready;
  emu_switch(&from->stack, to->stack);
}

void enter_thread() {
  kernel->enter(kernel_parameters);
  Warp& warp = warps[current->index / kLanes];
  warp.alive &= ~(1u << current->index % kLanes);
  current->state = State::ended;
  void* lost;
  if (!--alive_count) {
    memory_end_epoch();
    emu_switch(&lost, host_stack);
  }
  give_way();
  __builtin_unreachable();
}

void run_block() {
  block_number = block_place.x + grid.x * (block_place.y + grid.y * block_place.z);
  memory_begin_block();
  warp_count = (thread_count + kLanes - 1) / kLanes;
  alive_count = thread_count;
  at_barrier_count = barrier_sum = 0;
  for (uint32_t w = 0; w < warp_count; w++) {
    uint32_t lanes = thread_count - w * kLanes < kLanes ? (1u << thread_count % kLanes) - 1 : kFull;
    warps[w] = {w * kLanes, lanes, lanes, 0};
  }
  Index place = {};
  for (uint32_t i = 0; i < thread_count; i++) {
    Thread& t = threads[i];
    t.index = i;
    t.place = place;
    t.state = State::fresh;
    t.synced = t.synced_with = t.copy_count = t.group_count = 0;
    if (++place.x == block.x) place.x = 0, place.y++;
    if (place.y == block.y) place.y = 0, place.z++;
  }
  current = &threads[0];
  warps[0].ready &= ~1u;
  prepare(threads[0]);
  threads[0].state = State::ready;
  emu_switch(&host_stack, threads[0].stack);
}

// After a signal, on a stack of its own.
void land() { leave(); }

void on_signal(int signal, siginfo_t* info, void* context) {
  message[0] = 0;
  say_where();
  if (signal == SIGFPE)
    say("thread %u divides by zero", current->index);
  else
    say("thread %u touches memory at %p, which is nobody's", current->index, info->si_addr);
  auto& machine = static_cast<ucontext_t*>(context)->uc_mcontext;
  auto top = reinterpret_cast<uintptr_t>(landing + sizeof landing);
#if defined(__x86_64__)
  machine.gregs[REG_RIP] = reinterpret_cast<greg_t>(land);
  machine.gregs[REG_RSP] = greg_t(top - 8);
#else
  machine.pc = reinterpret_cast<uintptr_t>(land);
  machine.sp = top;
#endif
}

bool begin() {
  if (stacks) return true;
  auto map = [](size_t size) {
    void* at = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : static_cast<uint8_t*>(at);
  };
  uint8_t* memory = map(kMostShared + kGuard);
  uint8_t* all = map(kMostThreads * kStack);
  if (!memory || !all) return false;
  mprotect(memory + kMostShared, kGuard, PROT_NONE);
  for (uint32_t i = 0; i < kMostThreads; i++) mprotect(all + i * kStack, kGuard, PROT_NONE);
  shared = memory;
  stacks = all;
  return true;
}

}  // namespace

void fail(const char* format, ...) {
  message[0] = 0;
  say_where();
  say("thread %u: ", current->index);
  size_t used = strlen(message);
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message + used, message_size - used, format, arguments);
  va_end(arguments);
  leave();
}

void collective(Execute execute, const char* name, uint32_t mask, int line, void* operands) {
  Thread& t = *current;
  Warp& warp = warps[t.index / kLanes];
  uint32_t lane = t.index % kLanes;
  t.where = name;
  t.line = line;
  t.mask = mask;
  t.execute = execute;
  t.operands = operands;
  if (!(mask >> lane & 1)) fail("is not in the mask %08x of %s (line %d)", mask, name, line);
  warp.parked |= 1u << lane;
  bool complete = (warp.parked & mask) == mask;
  for (uint32_t rest = complete ? mask : 0; rest; rest &= rest - 1) {
    const Thread& o = threads[warp.first + __builtin_ctz(rest)];
    complete &= o.execute == execute && o.mask == mask && o.where == name;
  }
  if (!complete) {
    t.state = State::at_collective;
    return give_way();
  }
  execute(warp, mask);
  warp.parked &= ~mask;
  warp.ready |= mask & ~(1u << lane);
}

uint8_t* at_shared(uint32_t address, size_t size, size_t alignment, const char* what) {
  uint32_t offset = address - kSharedWindow;
  if (offset >= shared_size || size > shared_size - offset)
    fail("%s of %zu bytes at address %#x of shared memory, which holds %zu bytes from %#x on", what, size, address,
         shared_size, kSharedWindow);
  if (offset % alignment) fail("%s at byte %u of shared memory is not aligned to %zu bytes", what, offset, alignment);
  return shared + offset;
}

}  // namespace emu

using namespace emu;

extern "C" emu_index emu_thread_index() { return {current->place.x, current->place.y, current->place.z}; }
extern "C" emu_index emu_block_index() { return {block_place.x, block_place.y, block_place.z}; }
extern "C" emu_index emu_block_dim() { return {block.x, block.y, block.z}; }
extern "C" emu_index emu_grid_dim() { return {grid.x, grid.y, grid.z}; }

extern "C" void* emu_shared(size_t offset) { return shared + offset; }
extern "C" void* emu_dynamic_shared() { return shared + (kernel->static_shared + 1023) / 1024 * 1024; }

extern "C" uint32_t emu_to_shared(const void* pointer) {
  size_t offset = static_cast<const uint8_t*>(pointer) - shared;
  if (offset > shared_size) fail("the address of %p in shared memory is asked for, but it does not lie there", pointer);
  return uint32_t(offset) + kSharedWindow;
}

extern "C" void* emu_at_shared(uint32_t address, uint32_t size) { return at_shared(address, size, size, "access"); }

extern "C" void emu_barrier(int kind, int predicate, int line) {
  current->where = "__syncthreads";
  current->line = line;
  current->mask = kFull;
  current->state = State::at_barrier;
  barrier_sum += kind == 0 ? 0 : predicate != 0;
  at_barrier_count++;
  if (at_barrier_count == alive_count) {
    release_barrier();
    Warp& warp = warps[current->index / kLanes];
    warp.ready &= ~(1u << current->index % kLanes);
    return;
  }
  give_way();
}

extern "C" int emu_barrier_count() { return int(barrier_result); }
extern "C" int emu_block_threads() { return int(thread_count); }

extern "C" uint32_t emu_activemask(int line) {
  current->where = "__activemask";
  current->line = line;
  current->mask = 0;
  current->state = State::at_activemask;
  give_way();
  return current->mask;
}

extern "C" void emu_trap(int line) { fail("trap at line %d", line); }
extern "C" void emu_check_atomic(const void* address, size_t size) { check_atomic(address, size); }

extern "C" void emu_release() {
  global_release();
  if (!stacks) return;
  munmap(stacks, kMostThreads * kStack);
  munmap(shared, kMostShared + kGuard);
  stacks = nullptr;
  for (Thread& t : threads) {
    free(t.copies);
    free(t.groups);
    t = {};
  }
}

extern "C" uint32_t emu_shared_limit() { return emu_most_shared; }

extern "C" int emu_kernel_at(uint32_t index, emu_kernel* out) {
  if (index >= emu_kernel_count) return 1;
  *out = emu_kernels[index];
  return 0;
}

extern "C" int emu_launch(const char* function, const uint32_t* grid_dim, const uint32_t* block_dim,
                          uint32_t dynamic_shared, void** parameters, const emu_buffer* buffers, size_t buffer_count,
                          uint32_t checks, char* text, size_t text_size) {
  message = text;
  message_size = text_size;
  message[0] = 0;
  kernel = nullptr;
  for (uint32_t i = 0; i < emu_kernel_count; i++)
    if (!strcmp(emu_kernels[i].name, function)) kernel = &emu_kernels[i];
  if (!kernel) return say("there is no kernel %s", function), 1;
  if (!begin()) return say("no memory for the stacks of the threads"), 1;
  grid = {grid_dim[0], grid_dim[1], grid_dim[2]};
  block = {block_dim[0], block_dim[1], block_dim[2]};
  uint64_t wanted = uint64_t(block.x) * block.y * block.z;
  // CUDA programming guide, technical specifications per compute capability.
  if (!wanted || wanted > kMostThreads || block.z > 64 || !grid.x || !grid.y || !grid.z || grid.y > 65535 ||
      grid.z > 65535 || grid.x > 0x7fffffffu)
    return say("kernel %s: no GPU runs blocks of (%u, %u, %u) in a grid of (%u, %u, %u)", function, block.x, block.y,
               block.z, grid.x, grid.y, grid.z), 1;
  if (kernel->most_threads && wanted > kernel->most_threads)
    return say("kernel %s: %u threads, but __launch_bounds__(%u)", function, uint32_t(wanted), kernel->most_threads), 1;
  size_t dynamic_begin = (kernel->static_shared + 1023) / 1024 * 1024;
  shared_size = dynamic_shared ? dynamic_begin + dynamic_shared : kernel->static_shared;
  if (kernel->static_shared > 48 * 1024 || kernel->static_shared + dynamic_shared > emu_most_shared)
    return say("kernel %s: %u bytes of static and %u of dynamic shared memory; at most 49152, and together %u",
               function, kernel->static_shared, dynamic_shared, emu_most_shared), 1;
  kernel_parameters = parameters;
  thread_count = uint32_t(wanted);
  failed = false;
  static_assert(sizeof(Buffer) == sizeof(emu_buffer), "one layout");
  memory_begin_launch(checks, reinterpret_cast<const Buffer*>(buffers), buffer_count, {stacks, kMostThreads * kStack});

  stack_t alternative = {}, old_stack;
  alternative.ss_sp = signal_stack;
  alternative.ss_size = sizeof signal_stack;
  sigaltstack(&alternative, &old_stack);
  struct sigaction action = {}, old_segv, old_bus, old_fpe;
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);
  sigaction(SIGFPE, &action, &old_fpe);
  for (block_place.z = 0; block_place.z < grid.z && !failed; block_place.z++)
    for (block_place.y = 0; block_place.y < grid.y && !failed; block_place.y++)
      for (block_place.x = 0; block_place.x < grid.x && !failed; block_place.x++) run_block();
  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  sigaction(SIGFPE, &old_fpe, nullptr);
  sigaltstack(&old_stack, nullptr);
  return failed;
}
