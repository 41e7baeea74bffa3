#pragma once
// bfloat16: stored; computed with in float and rounded to nearest even.
#include "cuda_on_cpu.h"

struct nv_bfloat16 {
  uint16_t bits;
  nv_bfloat16() = default;
  nv_bfloat16(float value) {
    uint32_t wide = emu::pun<uint32_t>(value);
    bits = value != value ? 0x7fff : uint16_t((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
  }
  operator float() const { return emu::pun<float>(uint32_t(bits) << 16); }
};
using __nv_bfloat16 = nv_bfloat16;
struct alignas(4) __nv_bfloat162 {
  nv_bfloat16 x, y;
};
using nv_bfloat162 = __nv_bfloat162;

EMU_INLINE float __bfloat162float(nv_bfloat16 a) { return a; }
EMU_INLINE nv_bfloat16 __float2bfloat16(float a) { return a; }
EMU_INLINE nv_bfloat16 __float2bfloat16_rn(float a) { return a; }
EMU_INLINE unsigned short __bfloat16_as_ushort(nv_bfloat16 a) { return a.bits; }
EMU_INLINE nv_bfloat16 __ushort_as_bfloat16(unsigned short a) { return emu::pun<nv_bfloat16>(a); }
EMU_INLINE bool __hgt(nv_bfloat16 a, nv_bfloat16 b) { return float(a) > float(b); }
EMU_INLINE bool __hlt(nv_bfloat16 a, nv_bfloat16 b) { return float(a) < float(b); }
