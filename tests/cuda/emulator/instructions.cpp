// The instructions of a warp, and cp.async, as the PTX ISA describes them.

#include <stdlib.h>
#include <string.h>

#include "emulated.h"
#include "memory.h"

using namespace emu;

namespace {

template <class F>
void each_lane(uint32_t mask, F f) {
  for (; mask; mask &= mask - 1) f(uint32_t(__builtin_ctz(mask)));
}

// ---- Votes, shuffles, reductions: PTX ISA 9.7.9 (shfl.sync), 9.7.13 (vote.sync, match.sync, redux.sync, bar.warp.sync)

struct Vote {
  bool predicate;
  uint32_t result;
};

void execute_vote(Warp& warp, uint32_t mask) {
  uint32_t ballot = 0;
  each_lane(mask, [&](uint32_t lane) { ballot |= uint32_t(operands_of<Vote>(warp, lane).predicate) << lane; });
  each_lane(mask, [&](uint32_t lane) { operands_of<Vote>(warp, lane).result = ballot; });
}

struct Match {
  uint64_t value;
  uint32_t result;
};

void execute_match(Warp& warp, uint32_t mask) {
  each_lane(mask, [&](uint32_t lane) {
    auto& mine = operands_of<Match>(warp, lane);
    mine.result = 0;
    each_lane(mask, [&](uint32_t other) {
      mine.result |= uint32_t(operands_of<Match>(warp, other).value == mine.value) << other;
    });
  });
}

struct Shuffle {
  int kind;  // up, down, bfly, idx
  uint64_t value, result;
  uint32_t b, c;
};

void execute_shuffle(Warp& warp, uint32_t mask) {
  each_lane(mask, [&](uint32_t lane) {
    auto& mine = operands_of<Shuffle>(warp, lane);
    uint32_t segment = mine.c >> 8 & 31, bound = mine.c & 31, b = mine.b & 31;
    uint32_t most = (lane & segment) | (bound & ~segment), least = lane & segment;
    uint32_t from;
    bool inside;
    switch (mine.kind) {
      case 0: from = lane - b, inside = int32_t(from) >= int32_t(most); break;
      case 1: from = lane + b, inside = from <= most; break;
      case 2: from = lane ^ b, inside = from <= most; break;
      default: from = least | (b & ~segment), inside = from <= most;
    }
    if (!inside) from = lane;
    // The value of a lane that does not take part is undefined: a pattern, not an error, for it may be unused.
    mine.result = mask >> from & 1 ? operands_of<Shuffle>(warp, from).value : 0x7f7f7f7f7f7f7f7fu;
  });
}

struct Reduce {
  int kind;
  uint32_t value, result;
};

void execute_reduce(Warp& warp, uint32_t mask) {
  int kind = operands_of<Reduce>(warp, __builtin_ctz(mask)).kind;
  uint32_t sum = operands_of<Reduce>(warp, __builtin_ctz(mask)).value;
  each_lane(mask & (mask - 1), [&](uint32_t lane) {
    uint32_t v = operands_of<Reduce>(warp, lane).value;
    switch (kind) {
      case 0: sum += v; break;
      case 1: sum = sum < v ? sum : v; break;
      case 2: sum = sum > v ? sum : v; break;
      case 3: sum = int32_t(sum) < int32_t(v) ? sum : v; break;
      case 4: sum = int32_t(sum) > int32_t(v) ? sum : v; break;
      case 5: sum &= v; break;
      case 6: sum |= v; break;
      default: sum ^= v;
    }
  });
  each_lane(mask, [&](uint32_t lane) { operands_of<Reduce>(warp, lane).result = sum; });
}

void execute_syncwarp(Warp& warp, uint32_t mask) { memory_sync_warp(warp, mask); }

// ---- ldmatrix and stmatrix: PTX ISA 9.7.14.5.15 and .16. A matrix is 8 rows of 16 bytes; lane 8 i + r gives the address
// of row r of matrix i; a lane holds the 32-bit word lane % 4 of row lane / 4, or, transposed, rows and columns swapped.

struct Matrices {
  int count;
  bool transposed;
  uint32_t* registers;
  uint32_t address;
};

uint8_t* row(Warp& warp, uint32_t lane, const char* what) {
  current = &threads[warp.first + lane];  // who is blamed
  return at_shared(operands_of<Matrices>(warp, lane).address, 16, 16, what);
}

void execute_ldmatrix(Warp& warp, uint32_t mask) {
  Thread* caller = current;
  auto& mine = operands_of<Matrices>(warp, 0);
  for (int i = 0; i < mine.count; i++) {
    uint16_t matrix[8][8];
    for (uint32_t r = 0; r < 8; r++) {
      uint8_t* at = row(warp, 8 * i + r, "ldmatrix");
      check_read(at, 16);  // by the lane that gives the address
      memcpy(matrix[r], at, 16);
    }
    each_lane(mask, [&](uint32_t lane) {
      uint32_t r = lane / 4, c = lane % 4 * 2;
      uint32_t low = mine.transposed ? matrix[c][r] : matrix[r][c];
      uint32_t high = mine.transposed ? matrix[c + 1][r] : matrix[r][c + 1];
      operands_of<Matrices>(warp, lane).registers[i] = low | high << 16;
    });
  }
  current = caller;
}

void execute_stmatrix(Warp& warp, uint32_t mask) {
  Thread* caller = current;
  auto& mine = operands_of<Matrices>(warp, 0);
  for (int i = 0; i < mine.count; i++) {
    uint16_t matrix[8][8];
    each_lane(mask, [&](uint32_t lane) {
      uint32_t r = lane / 4, c = lane % 4 * 2, value = operands_of<Matrices>(warp, lane).registers[i];
      (mine.transposed ? matrix[c][r] : matrix[r][c]) = uint16_t(value);
      (mine.transposed ? matrix[c + 1][r] : matrix[r][c + 1]) = uint16_t(value >> 16);
    });
    for (uint32_t r = 0; r < 8; r++) {
      uint8_t* at = row(warp, 8 * i + r, "stmatrix");
      check_write(at, 16);
      memcpy(at, matrix[r], 16);
    }
  }
  current = caller;
}

// ---- mma.sync: PTX ISA 9.7.14.5.1 to .14, "Matrix fragments for mma.m…n8k…".
//
// With g = lane / 4 and t = lane % 4, all shapes hold, in 32-bit words along K: of A, register r: row g + 8 (r % 2),
// word t + 4 (r / 2), of shapes with M = 8: row g, word t; of B, register r: column g, word t + 4 r; of C and D with
// 32-bit elements, register r: row g + 8 (r / 2), column 2 t + r % 2; with 16-bit elements two columns share one.

struct Mma {
  uint32_t* d;
  const uint32_t *a, *b, *c;
};

template <int M, int Words>
struct Tiles {
  uint32_t a[M][Words], b[8][Words];

  void gather(Warp& warp) {
    for (uint32_t lane = 0; lane < kLanes; lane++) {
      const Mma& o = operands_of<Mma>(warp, lane);
      uint32_t g = lane / 4, t = lane % 4;
      for (int r = 0; r < M / 8 * Words / 4; r++)
        M == 8 ? a[g][t + 4 * r] = o.a[r] : a[g + 8 * (r % 2)][t + 4 * (r / 2)] = o.a[r];
      for (int r = 0; r < Words / 4; r++) b[g][t + 4 * r] = o.b[r];
    }
  }
};

template <int M, class F>
void each_result(Warp& warp, F f) {
  for (uint32_t lane = 0; lane < kLanes; lane++) {
    Mma& o = operands_of<Mma>(warp, lane);
    for (uint32_t r = 0; r < M / 4; r++) o.d[r] = f(lane / 4 + 8 * (r / 2), lane % 4 * 2 + r % 2, o.c[r]);
  }
}

template <int M, int Words, bool And>
void execute_bits(Warp& warp, uint32_t) {
  Tiles<M, Words> tiles;
  tiles.gather(warp);
  uint32_t sums[M][8];
  for (int m = 0; m < M; m++)
    for (int n = 0; n < 8; n++) {
      uint32_t sum = 0;
      for (int k = 0; k < Words; k++)
        sum += __builtin_popcount(And ? tiles.a[m][k] & tiles.b[n][k] : tiles.a[m][k] ^ tiles.b[n][k]);
      sums[m][n] = sum;
    }
  each_result<M>(warp, [&](uint32_t m, uint32_t n, uint32_t c) { return c + sums[m][n]; });
}

template <int M, int Words, class A, class B>
void execute_bytes(Warp& warp, uint32_t) {
  Tiles<M, Words> tiles;
  tiles.gather(warp);
  each_result<M>(warp, [&](uint32_t m, uint32_t n, uint32_t c) {
    auto a = reinterpret_cast<const A*>(tiles.a[m]);
    auto b = reinterpret_cast<const B*>(tiles.b[n]);
    int32_t sum = 0;
    for (int k = 0; k < 4 * Words; k++) sum += a[k] * b[k];
    return c + uint32_t(sum);
  });
}

float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// Element k of a row of words. The products of all three formats are exact in double. How the hardware adds them is
// nowhere said (it truncates); here the sum is as good as exact and rounded once.
struct Half {
  static constexpr int per_word = 2;
  static double at(const uint32_t* words, int k) {
    _Float16 value;
    memcpy(&value, reinterpret_cast<const uint16_t*>(words) + k, 2);
    return float(value);
  }
};
struct Brain {
  static constexpr int per_word = 2;
  static double at(const uint32_t* words, int k) {
    return as_float(uint32_t(reinterpret_cast<const uint16_t*>(words)[k]) << 16);
  }
};
struct Tensor {  // tf32: the low 13 bits are not looked at
  static constexpr int per_word = 1;
  static double at(const uint32_t* words, int k) { return as_float(words[k] & 0xffffe000u); }
};

template <int Words, class Format>
void execute_floats(Warp& warp, uint32_t) {
  Tiles<16, Words> tiles;
  tiles.gather(warp);
  constexpr int K = Words * Format::per_word;
  double a[16][K], b[8][K];
  for (int k = 0; k < K; k++) {
    for (int m = 0; m < 16; m++) a[m][k] = Format::at(tiles.a[m], k);
    for (int n = 0; n < 8; n++) b[n][k] = Format::at(tiles.b[n], k);
  }
  each_result<16>(warp, [&](uint32_t m, uint32_t n, uint32_t c) {
    double sum = as_float(c);
    for (int k = 0; k < K; k++) sum += a[m][k] * b[n][k];
    return as_bits(float(sum));
  });
}

template <int Words>
void execute_half_sums(Warp& warp, uint32_t) {
  Tiles<16, Words> tiles;
  tiles.gather(warp);
  for (uint32_t lane = 0; lane < kLanes; lane++) {
    Mma& o = operands_of<Mma>(warp, lane);
    for (int r = 0; r < 2; r++) {
      _Float16 c[2];
      memcpy(c, &o.c[r], 4);
      for (int j = 0; j < 2; j++) {
        double sum = double(c[j]);
        for (int k = 0; k < 2 * Words; k++)
          sum += Half::at(tiles.a[lane / 4 + 8 * r], k) * Half::at(tiles.b[lane % 4 * 2 + j], k);
        c[j] = _Float16(sum);
      }
      memcpy(&o.d[r], c, 4);
    }
  }
}

struct Kind {
  const char* name;
  Execute execute;
};

// In the order of MMA_KINDS in ptx.py.
const Kind mma_kinds[] = {
    {"mma.m8n8k128.b1.xor", execute_bits<8, 4, false>},
    {"mma.m8n8k128.b1.and", execute_bits<8, 4, true>},
    {"mma.m16n8k128.b1.xor", execute_bits<16, 4, false>},
    {"mma.m16n8k128.b1.and", execute_bits<16, 4, true>},
    {"mma.m16n8k256.b1.xor", execute_bits<16, 8, false>},
    {"mma.m16n8k256.b1.and", execute_bits<16, 8, true>},
    {"mma.m8n8k16.s8.s8", execute_bytes<8, 4, int8_t, int8_t>},
    {"mma.m8n8k16.s8.u8", execute_bytes<8, 4, int8_t, uint8_t>},
    {"mma.m8n8k16.u8.s8", execute_bytes<8, 4, uint8_t, int8_t>},
    {"mma.m8n8k16.u8.u8", execute_bytes<8, 4, uint8_t, uint8_t>},
    {"mma.m16n8k16.s8.s8", execute_bytes<16, 4, int8_t, int8_t>},
    {"mma.m16n8k16.s8.u8", execute_bytes<16, 4, int8_t, uint8_t>},
    {"mma.m16n8k16.u8.s8", execute_bytes<16, 4, uint8_t, int8_t>},
    {"mma.m16n8k16.u8.u8", execute_bytes<16, 4, uint8_t, uint8_t>},
    {"mma.m16n8k32.s8.s8", execute_bytes<16, 8, int8_t, int8_t>},
    {"mma.m16n8k32.s8.u8", execute_bytes<16, 8, int8_t, uint8_t>},
    {"mma.m16n8k32.u8.s8", execute_bytes<16, 8, uint8_t, int8_t>},
    {"mma.m16n8k32.u8.u8", execute_bytes<16, 8, uint8_t, uint8_t>},
    {"mma.m16n8k8.f16.f32", execute_floats<4, Half>},
    {"mma.m16n8k16.f16.f32", execute_floats<8, Half>},
    {"mma.m16n8k8.bf16.f32", execute_floats<4, Brain>},
    {"mma.m16n8k16.bf16.f32", execute_floats<8, Brain>},
    {"mma.m16n8k4.tf32.f32", execute_floats<4, Tensor>},
    {"mma.m16n8k8.tf32.f32", execute_floats<8, Tensor>},
    {"mma.m16n8k8.f16.f16", execute_half_sums<4>},
    {"mma.m16n8k16.f16.f16", execute_half_sums<8>},
};

template <class T>
void grow(T*& items, uint32_t count, uint32_t& room) {
  if (count < room) return;
  room = room ? 2 * room : 16;
  items = static_cast<T*>(realloc(items, room * sizeof(T)));
  if (!items) abort();
}

void finish_groups(Thread& t, uint32_t pending) {
  if (t.group_count <= pending) return;
  uint32_t finished = t.group_count - pending, copies = t.groups[finished - 1].end;
  for (uint32_t i = 0; i < copies; i++) finish_copy(t.copies[i]);
  memmove(t.copies, t.copies + copies, (t.copy_count - copies) * sizeof(Copy));
  t.copy_count -= copies;
  for (uint32_t i = 0; i < pending; i++) t.groups[i].end = t.groups[i + finished].end - copies;
  t.group_count = pending;
}

}  // namespace

extern "C" void emu_syncwarp(uint32_t mask, int line) {
  collective(execute_syncwarp, "__syncwarp", mask, line, nullptr);
}

extern "C" uint32_t emu_vote(uint32_t mask, int predicate, int line) {
  Vote vote = {predicate != 0, 0};
  collective(execute_vote, "vote", mask, line, &vote);
  return vote.result;
}

extern "C" uint32_t emu_match(uint32_t mask, uint64_t value, int line) {
  Match match = {value, 0};
  collective(execute_match, "match", mask, line, &match);
  return match.result;
}

extern "C" uint64_t emu_shuffle(int kind, uint32_t mask, uint64_t value, uint32_t b, uint32_t c, int line) {
  static const char* const names[] = {"shfl.up", "shfl.down", "shfl.bfly", "shfl.idx"};
  Shuffle shuffle = {kind, value, 0, b, c};
  collective(execute_shuffle, names[kind], mask, line, &shuffle);
  return shuffle.result;
}

extern "C" uint32_t emu_reduce(int kind, uint32_t mask, uint32_t value, int line) {
  Reduce reduce = {kind, value, 0};
  collective(execute_reduce, "redux", mask, line, &reduce);
  return reduce.result;
}

extern "C" void emu_ldmatrix(int count, int transposed, uint32_t* out EMU_OWN, uint32_t address, int line) {
  Matrices matrices = {count, transposed != 0, out, address};
  collective(execute_ldmatrix, "ldmatrix", kFull, line, &matrices);
}

extern "C" void emu_stmatrix(int count, int transposed, const uint32_t* in EMU_OWN, uint32_t address, int line) {
  Matrices matrices = {count, transposed != 0, const_cast<uint32_t*>(in), address};
  collective(execute_stmatrix, "stmatrix", kFull, line, &matrices);
}

extern "C" void emu_mma(int kind, uint32_t* d EMU_OWN, const uint32_t* a EMU_OWN, const uint32_t* b EMU_OWN,
                        const uint32_t* c EMU_OWN, int line) {
  Mma mma = {d, a, b, c};
  collective(mma_kinds[kind].execute, mma_kinds[kind].name, kFull, line, &mma);
}

// PTX ISA 9.7.9.25.3 (cp.async): what is copied may be read after cp.async.wait_group of the thread that copies, and by
// others after a barrier behind that.
extern "C" void emu_cp_async(uint32_t to, const void* from, uint32_t bytes, uint32_t filled) {
  if (filled > bytes) fail("cp.async of %u bytes with a source of %u", bytes, filled);
  if (filled && reinterpret_cast<uintptr_t>(from) % bytes)
    fail("cp.async of %u bytes from %p, which is not aligned to them", bytes, from);
  Thread& t = *current;
  Copy copy = {to, bytes, filled, from};
  begin_copy(copy);
  grow(t.copies, t.copy_count, t.copy_room);
  t.copies[t.copy_count++] = copy;
}

extern "C" void emu_cp_async_commit() {
  Thread& t = *current;
  grow(t.groups, t.group_count, t.group_room);
  t.groups[t.group_count++].end = t.copy_count;
}

extern "C" void emu_cp_async_wait(uint32_t pending) { finish_groups(*current, pending); }

extern "C" void emu_cp_async_wait_all() {
  emu_cp_async_commit();
  finish_groups(*current, 0);
}
