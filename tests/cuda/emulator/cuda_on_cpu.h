// The CUDA language for the host's compiler, as far as generated kernels speak it. What more than one thread takes part
// in is in the runtime; the rest stands here, each function with the rounding that the CUDA math API gives it.

#pragma once

#include <float.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "emulated.h"

#define __global__ __attribute__((noinline))
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) alignas(n)
#define __launch_bounds__(...)
#define __grid_constant__
// A block's threads are one thread here: what one of them wrote through another pointer may be read through this one.
#define __restrict__

#define EMU_INLINE static inline __attribute__((always_inline, unused))

// ---- Indices. Kernels have constants of these names; helper functions ask.

#define EMU_INDEX(name, get)                                         \
  static const struct {                                              \
    struct {                                                         \
      operator unsigned() const { return get().x; }                  \
    } x;                                                             \
    struct {                                                         \
      operator unsigned() const { return get().y; }                  \
    } y;                                                             \
    struct {                                                         \
      operator unsigned() const { return get().z; }                  \
    } z;                                                             \
  } name __attribute__((unused)) = {};
EMU_INDEX(threadIdx, emu_thread_index)
EMU_INDEX(blockIdx, emu_block_index)
EMU_INDEX(blockDim, emu_block_dim)
EMU_INDEX(gridDim, emu_grid_dim)
#define EMU_KERNEL_BEGIN                                   \
  const emu_index threadIdx = emu_thread_index();          \
  const emu_index blockIdx = emu_block_index();            \
  const emu_index blockDim = emu_block_dim();              \
  const emu_index gridDim = emu_grid_dim();                \
  (void)threadIdx, (void)blockIdx, (void)blockDim, (void)gridDim;
// The line of the caller, in helper functions that wrap one instruction.
static const int emu_line __attribute__((unused)) = 0;
static const int warpSize __attribute__((unused)) = 32;

// ---- Vectors, aligned as in CUDA (programming guide, "Built-in vector types").

#define EMU_VECTORS(type, name, a1, a2, a3, a4)                                                             \
  struct alignas(a1) name##1 { type x; };                                                                   \
  struct alignas(a2) name##2 { type x, y; };                                                                \
  struct alignas(a3) name##3 { type x, y, z; };                                                             \
  struct alignas(a4) name##4 { type x, y, z, w; };                                                          \
  EMU_INLINE name##1 make_##name##1(type x) { return {x}; }                                                 \
  EMU_INLINE name##2 make_##name##2(type x, type y) { return {x, y}; }                                      \
  EMU_INLINE name##3 make_##name##3(type x, type y, type z) { return {x, y, z}; }                           \
  EMU_INLINE name##4 make_##name##4(type x, type y, type z, type w) { return {x, y, z, w}; }
EMU_VECTORS(signed char, char, 1, 2, 1, 4)
EMU_VECTORS(unsigned char, uchar, 1, 2, 1, 4)
EMU_VECTORS(short, short, 2, 4, 2, 8)
EMU_VECTORS(unsigned short, ushort, 2, 4, 2, 8)
EMU_VECTORS(int, int, 4, 8, 4, 16)
EMU_VECTORS(unsigned, uint, 4, 8, 4, 16)
EMU_VECTORS(long, long, 8, 16, 8, 16)
EMU_VECTORS(unsigned long, ulong, 8, 16, 8, 16)
EMU_VECTORS(long long, longlong, 8, 16, 8, 16)
EMU_VECTORS(unsigned long long, ulonglong, 8, 16, 8, 16)
EMU_VECTORS(float, float, 4, 8, 4, 16)
EMU_VECTORS(double, double, 8, 16, 8, 16)
using dim3 = uint3;

namespace emu {

template <class To, class From>
EMU_INLINE To pun(From from) {
  static_assert(sizeof(To) == sizeof(From), "of one size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// The low bits of any value, for shuffles and for operands of PTX instructions.
template <class From>
EMU_INLINE uint64_t widen(From from) {
  uint64_t to = 0;
  static_assert(sizeof from <= 8, "a register");
  __builtin_memcpy(&to, &from, sizeof from);
  return to;
}
template <class To>
EMU_INLINE To narrow(uint64_t from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// The pointer, which the GPU takes only if it is aligned to what it points to.
template <class T>
EMU_INLINE T* at(const volatile void* pointer, int line = __builtin_LINE()) {
  if (reinterpret_cast<uintptr_t>(pointer) % alignof(T)) emu_misaligned(const_cast<void*>(pointer), alignof(T), line);
  return reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(pointer));
}

// A value for a register: its bits; of integers the value, so that a wider register gets the sign.
template <class To, class From>
EMU_INLINE To put(From from) {
  if constexpr (__is_integral(To) && __is_integral(From))
    return To(from);
  else
    return narrow<To>(widen(from));
}

// Multiplications, additions: rounded one by one, whatever the compiler may contract elsewhere.
#define EMU_ROUNDED(type, name, operator)                \
  EMU_INLINE type name(type a, type b) {                 \
    _Pragma("clang fp contract(off)") return a operator b; \
  }
EMU_ROUNDED(float, fmul, *)
EMU_ROUNDED(float, fadd, +)
EMU_ROUNDED(float, fsub, -)
EMU_ROUNDED(double, dmul, *)
EMU_ROUNDED(double, dadd, +)

EMU_INLINE uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, int table) {  // PTX ISA 9.7.8.6
  uint32_t result = 0;
  for (int i = 0; i < 8; i++)
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return result;
}

EMU_INLINE uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {  // PTX ISA 9.7.9.7, without a mode
  uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) {
    uint32_t pick = selector >> 4 * i & 15, byte = uint32_t(bytes >> 8 * (pick & 7)) & 255;
    if (pick & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << 8 * i;
  }
  return result;
}

template <class A, class B>
EMU_INLINE int dp4a(uint32_t a, uint32_t b, int c) {  // PTX ISA 9.7.1.24
  uint32_t sum = c;
  for (int i = 0; i < 4; i++) sum += uint32_t(int(A(a >> 8 * i)) * int(B(b >> 8 * i)));
  return int(sum);
}

}  // namespace emu

// ---- Threads together.

#define __syncthreads() emu_barrier(0, 0, __LINE__)
#define __syncthreads_count(p) (emu_barrier(1, (p), __LINE__), emu_barrier_count())
#define __syncthreads_or(p) (emu_barrier(1, (p), __LINE__), emu_barrier_count() != 0)
#define __syncthreads_and(p) (emu_barrier(1, (p), __LINE__), emu_barrier_count() == emu_block_threads())
EMU_INLINE void __syncwarp(uint32_t mask = ~0u, int line = __builtin_LINE()) { emu_syncwarp(mask, line); }
EMU_INLINE uint32_t __activemask(int line = __builtin_LINE()) { return emu_activemask(line); }
EMU_INLINE uint32_t __ballot_sync(uint32_t mask, int p, int line = __builtin_LINE()) { return emu_vote(mask, p, line); }
EMU_INLINE int __any_sync(uint32_t mask, int p, int line = __builtin_LINE()) { return emu_vote(mask, p, line) != 0; }
EMU_INLINE int __all_sync(uint32_t mask, int p, int line = __builtin_LINE()) { return emu_vote(mask, p, line) == mask; }
template <class T>
EMU_INLINE uint32_t __match_any_sync(uint32_t mask, T value, int line = __builtin_LINE()) {
  return emu_match(mask, emu::widen(value), line);
}
#define EMU_SHUFFLE(name, kind, bound)                                                                              \
  template <class T>                                                                                                \
  EMU_INLINE T name(uint32_t mask, T value, int b, int width = 32, int line = __builtin_LINE()) {                   \
    return emu::narrow<T>(emu_shuffle(kind, mask, emu::widen(value), b, (32 - width) << 8 | bound, line));          \
  }
EMU_SHUFFLE(__shfl_up_sync, 0, 0)
EMU_SHUFFLE(__shfl_down_sync, 1, 31)
EMU_SHUFFLE(__shfl_xor_sync, 2, 31)
EMU_SHUFFLE(__shfl_sync, 3, 31)
#define EMU_REDUCE(name, type, kind)                                                                                \
  EMU_INLINE type name(uint32_t mask, type value, int line = __builtin_LINE()) {                                    \
    return type(emu_reduce(kind, mask, uint32_t(value), line));                                                     \
  }
EMU_REDUCE(__reduce_add_sync, uint32_t, 0)
EMU_REDUCE(__reduce_add_sync, int, 0)
EMU_REDUCE(__reduce_min_sync, uint32_t, 1)
EMU_REDUCE(__reduce_max_sync, uint32_t, 2)
EMU_REDUCE(__reduce_min_sync, int, 3)
EMU_REDUCE(__reduce_max_sync, int, 4)
EMU_REDUCE(__reduce_and_sync, uint32_t, 5)
EMU_REDUCE(__reduce_or_sync, uint32_t, 6)
EMU_REDUCE(__reduce_xor_sync, uint32_t, 7)
// One thread of the host: what is written is seen.
EMU_INLINE void __threadfence() {}
EMU_INLINE void __threadfence_block() {}
EMU_INLINE void __threadfence_system() {}
EMU_INLINE void __trap(int line = __builtin_LINE()) { emu_trap(line); }

EMU_INLINE size_t __cvta_generic_to_shared(const void* pointer) { return emu_to_shared(pointer); }
template <class T>
EMU_INLINE T __ldg(const T* pointer) {
  return *pointer;
}

#define EMU_ATOMIC(name, expression)                                                                                \
  template <class T>                                                                                                \
  EMU_INLINE T name(T* pointer, T value) {                                                                          \
    emu_check_atomic(pointer, sizeof *pointer);                                                                     \
    T old;                                                                                                          \
    __atomic_load(pointer, &old, __ATOMIC_RELAXED);                                                                 \
    T next = expression;                                                                                            \
    __atomic_store(pointer, &next, __ATOMIC_RELAXED);                                                               \
    return old;                                                                                                     \
  }
EMU_ATOMIC(atomicAdd, T(old + value))
EMU_ATOMIC(atomicSub, T(old - value))
EMU_ATOMIC(atomicMax, (old > value ? old : value))
EMU_ATOMIC(atomicMin, (old < value ? old : value))
EMU_ATOMIC(atomicAnd, (old & value))
EMU_ATOMIC(atomicOr, (old | value))
EMU_ATOMIC(atomicXor, (old ^ value))
EMU_ATOMIC(atomicExch, value)

// ---- Integers.

EMU_INLINE int __popc(unsigned v) { return __builtin_popcount(v); }
EMU_INLINE int __popcll(unsigned long long v) { return __builtin_popcountll(v); }
EMU_INLINE int __clz(int v) { return v ? __builtin_clz(unsigned(v)) : 32; }
EMU_INLINE int __clzll(long long v) { return v ? __builtin_clzll((unsigned long long)v) : 64; }
EMU_INLINE int __ffs(int v) { return __builtin_ffs(v); }
EMU_INLINE int __ffsll(long long v) { return __builtin_ffsll(v); }
EMU_INLINE unsigned __brev(unsigned v) { return __builtin_bitreverse32(v); }
EMU_INLINE unsigned long long __brevll(unsigned long long v) { return __builtin_bitreverse64(v); }
EMU_INLINE unsigned __byte_perm(unsigned a, unsigned b, unsigned s) { return emu::prmt(a, b, s & 0x7777); }
EMU_INLINE unsigned __funnelshift_l(unsigned lo, unsigned hi, unsigned shift) {
  return unsigned((uint64_t(hi) << 32 | lo) << (shift & 31) >> 32);
}
EMU_INLINE unsigned __funnelshift_r(unsigned lo, unsigned hi, unsigned shift) {
  return unsigned((uint64_t(hi) << 32 | lo) >> (shift & 31));
}
EMU_INLINE int __mulhi(int a, int b) { return int(int64_t(a) * b >> 32); }
EMU_INLINE unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
EMU_INLINE int __dp4a(int a, int b, int c) { return emu::dp4a<int8_t, int8_t>(a, b, c); }
EMU_INLINE unsigned __dp4a(unsigned a, unsigned b, unsigned c) { return emu::dp4a<uint8_t, uint8_t>(a, b, c); }
EMU_INLINE int max(int a, int b) { return a > b ? a : b; }
EMU_INLINE int min(int a, int b) { return a < b ? a : b; }
EMU_INLINE unsigned max(unsigned a, unsigned b) { return a > b ? a : b; }
EMU_INLINE unsigned min(unsigned a, unsigned b) { return a < b ? a : b; }
EMU_INLINE long max(long a, long b) { return a > b ? a : b; }
EMU_INLINE long min(long a, long b) { return a < b ? a : b; }
EMU_INLINE long long max(long long a, long long b) { return a > b ? a : b; }
EMU_INLINE long long min(long long a, long long b) { return a < b ? a : b; }
EMU_INLINE unsigned long max(unsigned long a, unsigned long b) { return a > b ? a : b; }
EMU_INLINE unsigned long min(unsigned long a, unsigned long b) { return a < b ? a : b; }

// ---- Floats. The functions of <math.h> are the host's: correctly rounded where CUDA's are (sqrtf, fmaf, rintf, …),
// else not bit-equal to CUDA's.

EMU_INLINE float max(float a, float b) { return fmaxf(a, b); }  // with one NaN, the other operand: as CUDA's
EMU_INLINE float min(float a, float b) { return fminf(a, b); }
EMU_INLINE double max(double a, double b) { return fmax(a, b); }
EMU_INLINE double min(double a, double b) { return fmin(a, b); }
EMU_INLINE float __fmul_rn(float a, float b) { return emu::fmul(a, b); }
EMU_INLINE float __fadd_rn(float a, float b) { return emu::fadd(a, b); }
EMU_INLINE float __fsub_rn(float a, float b) { return emu::fsub(a, b); }
EMU_INLINE float __fmaf_rn(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
EMU_INLINE float __fdiv_rn(float a, float b) { return a / b; }
EMU_INLINE float __frcp_rn(float a) { return 1.0f / a; }
EMU_INLINE float __fsqrt_rn(float a) { return sqrtf(a); }
EMU_INLINE float __frsqrt_rn(float a) { return float(1.0 / sqrt(double(a))); }
EMU_INLINE double __dmul_rn(double a, double b) { return emu::dmul(a, b); }
EMU_INLINE double __dadd_rn(double a, double b) { return emu::dadd(a, b); }
EMU_INLINE double __fma_rn(double a, double b, double c) { return __builtin_fma(a, b, c); }
EMU_INLINE float rsqrtf(float a) { return 1.0f / sqrtf(a); }
EMU_INLINE float rsqrt(float a) { return rsqrtf(a); }
EMU_INLINE float __saturatef(float a) { return a > 0 ? a < 1 ? a : 1 : 0; }
// The approximate ones: 2 units in the last place or so away from these.
// Macros, for the host's library has these names for itself.
#define __expf expf
#define __exp10f(a) powf(10.0f, a)
#define __logf logf
#define __log2f log2f
#define __log10f log10f
#define __powf powf
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf
EMU_INLINE float __fdividef(float a, float b) { return a / b; }

EMU_INLINE int __float_as_int(float a) { return emu::pun<int>(a); }
EMU_INLINE unsigned __float_as_uint(float a) { return emu::pun<unsigned>(a); }
EMU_INLINE float __int_as_float(int a) { return emu::pun<float>(a); }
EMU_INLINE float __uint_as_float(unsigned a) { return emu::pun<float>(a); }
EMU_INLINE long long __double_as_longlong(double a) { return emu::pun<long long>(a); }
EMU_INLINE double __longlong_as_double(long long a) { return emu::pun<double>(a); }

namespace emu {
// Conversions saturate, and NaN becomes 0 (PTX ISA 9.7.9.21).
EMU_INLINE int to_int(float a) {
  return a >= 2147483648.0f ? INT32_MAX : a >= -2147483648.0f ? int(a) : a != a ? 0 : INT32_MIN;
}
EMU_INLINE unsigned to_uint(float a) { return a >= 4294967296.0f ? UINT32_MAX : a > 0 ? unsigned(a) : 0; }
}  // namespace emu
EMU_INLINE int __float2int_rn(float a) { return emu::to_int(rintf(a)); }
EMU_INLINE int __float2int_rz(float a) { return emu::to_int(truncf(a)); }
EMU_INLINE int __float2int_rd(float a) { return emu::to_int(floorf(a)); }
EMU_INLINE int __float2int_ru(float a) { return emu::to_int(ceilf(a)); }
EMU_INLINE unsigned __float2uint_rn(float a) { return emu::to_uint(rintf(a)); }
EMU_INLINE unsigned __float2uint_rz(float a) { return emu::to_uint(truncf(a)); }
EMU_INLINE float __int2float_rn(int a) { return float(a); }
EMU_INLINE float __uint2float_rn(unsigned a) { return float(a); }

#define CUDART_INF_F __builtin_inff()
#define CUDART_NAN_F __int_as_float(0x7fffffff)
#define CUDART_INF __builtin_inf()
#define CUDART_NAN __builtin_nan("")
