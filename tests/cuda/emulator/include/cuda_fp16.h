#pragma once
// Half precision: the host compiler's _Float16, each operation rounded as CUDA rounds it.
#include "cuda_on_cpu.h"

using half = _Float16;
using __half = _Float16;
struct alignas(4) __half2 {
  half x, y;
};
using half2 = __half2;
#define __CUDA_FP16_TYPES_EXIST__

EMU_INLINE float __half2float(half a) { return float(a); }
EMU_INLINE half __float2half(float a) { return half(a); }
EMU_INLINE half __float2half_rn(float a) { return half(a); }
EMU_INLINE unsigned short __half_as_ushort(half a) { return emu::pun<unsigned short>(a); }
EMU_INLINE half __ushort_as_half(unsigned short a) { return emu::pun<half>(a); }
EMU_INLINE half2 __floats2half2_rn(float a, float b) { return {half(a), half(b)}; }
EMU_INLINE half2 __float22half2_rn(float2 a) { return {half(a.x), half(a.y)}; }
EMU_INLINE half2 make_half2(half x, half y) { return {x, y}; }
EMU_INLINE half2 __halves2half2(half x, half y) { return {x, y}; }
EMU_INLINE float2 __half22float2(half2 a) { return {float(a.x), float(a.y)}; }
EMU_INLINE half __low2half(half2 a) { return a.x; }
EMU_INLINE half __high2half(half2 a) { return a.y; }
EMU_INLINE bool __hgt(half a, half b) { return a > b; }
EMU_INLINE bool __hlt(half a, half b) { return a < b; }
EMU_INLINE bool __hge(half a, half b) { return a >= b; }
EMU_INLINE bool __hle(half a, half b) { return a <= b; }
EMU_INLINE bool __heq(half a, half b) { return a == b; }
EMU_INLINE bool __hisnan(half a) { return a != a; }
EMU_INLINE half __hadd(half a, half b) { return a + b; }
EMU_INLINE half __hsub(half a, half b) { return a - b; }
EMU_INLINE half __hmul(half a, half b) { return a * b; }
EMU_INLINE half __hdiv(half a, half b) { return a / b; }
EMU_INLINE half __hneg(half a) { return -a; }
EMU_INLINE half __habs(half a) { return a < 0 ? -a : a; }
// The exact product fits a double, and so does its sum with c as far as the rounding to half goes.
EMU_INLINE half __hfma(half a, half b, half c) { return half(double(a) * double(b) + double(c)); }
EMU_INLINE half2 __hadd2(half2 a, half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
EMU_INLINE half2 __hmul2(half2 a, half2 b) { return {__hmul(a.x, b.x), __hmul(a.y, b.y)}; }
EMU_INLINE half2 __hfma2(half2 a, half2 b, half2 c) { return {__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y)}; }
EMU_INLINE half hexp(half a) { return half(expf(a)); }
EMU_INLINE half hlog(half a) { return half(logf(a)); }
EMU_INLINE half hsqrt(half a) { return half(sqrtf(a)); }
EMU_INLINE half hrsqrt(half a) { return half(1.0f / sqrtf(a)); }
EMU_INLINE half hfloor(half a) { return half(floorf(a)); }
EMU_INLINE half hceil(half a) { return half(ceilf(a)); }
EMU_INLINE half htrunc(half a) { return half(truncf(a)); }
EMU_INLINE half hrint(half a) { return half(rintf(a)); }
