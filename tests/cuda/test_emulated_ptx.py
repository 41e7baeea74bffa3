"""Single PTX instructions against what the PTX ISA says of them."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import EmulatedModule, EmulationError, emulate

A, B, C = 0x9ABCDEF1, 0x12345678, 0x0F0FF0F0
SIGNED = A - 2**32
X, Y, Z = (np.float32(v) for v in (1.1, -2.3, 0.7))


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def _fused(a, b, c) -> np.float32:
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))  # the product is exact, the sum nearly


# Text with %1, %2, %3 for A, B, C (of those that end in f: for the floats X, Y, Z); what %0 holds then.
_INTEGERS = {
    "add.u32 %0, %1, %2;": A + B,
    "sub.s32 %0, %1, %2;": A - B,
    "mul.lo.s32 %0, %1, %2;": A * B,
    "mad.lo.u32 %0, %1, %2, %3;": A * B + C,
    "and.b32 %0, %1, %2;": A & B,
    "or.b32 %0, %1, %2;": A | B,
    "xor.b32 %0, %1, %2;": A ^ B,
    "not.b32 %0, %1;": ~A,
    "neg.s32 %0, %1;": -A,
    "abs.s32 %0, %1;": -SIGNED,
    "min.s32 %0, %1, %2;": A,
    "max.u32 %0, %1, %2;": A,
    "max.s32 %0, %1, %2;": B,
    "shl.b32 %0, %1, 5;": A << 5,
    "shl.b32 %0, %1, 32;": 0,
    "shr.u32 %0, %1, 5;": A >> 5,
    "shr.s32 %0, %1, 5;": SIGNED >> 5,
    "shr.s32 %0, %1, 40;": -1,
    "popc.b32 %0, %1;": A.bit_count(),
    "clz.b32 %0, %2;": 3,
    "brev.b32 %0, %1;": int(f"{A:032b}"[::-1], 2),
    # Selectors 9, 4, 1, 6: the sign of byte 1 of A, byte 0 of B, byte 1 of A, byte 2 of B.
    "prmt.b32 %0, %1, %2, 0x6149;": 0x34DE78FF,
    "lop3.b32 %0, %1, %2, %3, 0x96;": A ^ B ^ C,
    "lop3.b32 %0, %1, %2, %3, 0xE8;": (A & B) | (A & C) | (B & C),
    "shf.l.wrap.b32 %0, %1, %2, 7;": (B << 32 | A) << 7 >> 32,
    "shf.r.wrap.b32 %0, %1, %2, 7;": (B << 32 | A) >> 7,
    "dp4a.u32.u32 %0, %1, %2, %3;": 0xF1 * 0x78 + 0xDE * 0x56 + 0xBC * 0x34 + 0x9A * 0x12 + C,
    "dp4a.s32.u32 %0, %1, %2, %3;": -0x0F * 0x78 - 0x22 * 0x56 - 0x44 * 0x34 - 0x66 * 0x12 + C,
    "cvt.s32.s8 %0, %1;": -15,
    "cvt.u32.u16 %0, %1;": A & 0xFFFF,
    "mov.b32 %0, %2;": B,
    "mov.u32 %0, %laneid;": 0,
    "mov.u32 %0, %ntid.x;": 32,
    "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, %1; mov.b32 %0, {hi, lo}; }": (A >> 16) | (A & 0xFFFF) << 16,
    "{ .reg .pred p; setp.lt.s32 p, %1, %2; selp.b32 %0, %3, 7, p; }": C,
    "{ .reg .pred p; setp.lt.u32 p, %1, %2; selp.b32 %0, %3, 7, p; }": 7,
    "{ .reg .pred p; setp.ne.b32 p, %1, 0; mov.b32 %0, %2; @p mov.b32 %0, %3; @!p mov.b32 %0, 1; }": C,
    "vote.sync.ballot.b32 %0, 1, 0xffffffff;": 0xFFFFFFFF,
    "shfl.sync.idx.b32 %0, %1, 3, 0x1f, 0xffffffff;": A,
    "redux.sync.add.u32 %0, %2, 0xffffffff;": 32 * B,
    "match.any.sync.b32 %0, %1, 0xffffffff;": 0xFFFFFFFF,
    "activemask.b32 %0;": 0xFFFFFFFF,
}
_FLOATS = {
    "add.rn.f32 %0, %1, %2;": X + Y,
    "sub.rn.f32 %0, %1, %2;": X - Y,
    "mul.rn.f32 %0, %1, %2;": X * Y,
    "div.rn.f32 %0, %1, %2;": X / Y,
    "fma.rn.f32 %0, %1, %2, %3;": _fused(X, Y, Z),
    "sqrt.rn.f32 %0, %1;": np.sqrt(X),
    "max.f32 %0, %1, %2;": X,
    "neg.f32 %0, %1;": -X,
    "mov.f32 %0, 0f3F800000;": np.float32(1),
}
_CONVERSIONS = {
    "cvt.rni.s32.f32 %0, %2;": -2,
    "cvt.rmi.s32.f32 %0, %2;": -3,
    "cvt.rzi.u32.f32 %0, %2;": 0,  # saturates
    "cvt.rna.tf32.f32 %0, %1;": (_bits(X) + 0x1000) & 0xFFFFE000,
    "mov.b32 %0, %3;": _bits(Z),
}


def _kernel(name: str, texts: list[str], out: str, ins: str) -> str:
    letters = {"float": "f", "uint32_t": "r"}
    lines = []
    for i, text in enumerate(texts):
        bindings = ", ".join(f'"{letters[ins]}"(x[{j}])' for j in range(3))
        lines.append(
            f'  {{ {out} y; asm volatile("{text}" : "={letters[out]}"(y) : {bindings}); if (!lane) o[{i}] = y; }}'
        )
    body = "\n".join(lines)
    return f'extern "C" __global__ void {name}({ins}* x, {out}* o) {{\n  int lane = threadIdx.x;\n{body}\n}}'


_MEMORY = r"""
extern "C" __global__ void memory(uint32_t* x, uint32_t* out) {
  __shared__ alignas(16) uint32_t tile[128];
  uint32_t at = __cvta_generic_to_shared(&tile[threadIdx.x * 4]), a, b, c, d, e;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "l"(x + threadIdx.x * 4));
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" :: "r"(at), "r"(d), "r"(c), "r"(b), "r"(a) : "memory");
  asm volatile("bar.sync 0;" ::: "memory");
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2+8];" : "=r"(a), "=r"(b) : "r"(at ^ 16) : "memory");
  asm volatile("ld.shared.u8 %0, [%1];" : "=r"(e) : "r"(at) : "memory");
  asm volatile("st.global.u32 [%0+4], %1;" :: "l"(out + threadIdx.x * 4), "r"(a) : "memory");
  asm volatile("st.global.b32 [%0], %1;" :: "l"(out + threadIdx.x * 4), "r"(b) : "memory");
  out[threadIdx.x * 4 + 2] = e;
}
extern "C" __global__ void guarded(uint32_t* x, uint32_t* out) {
  __shared__ alignas(16) uint32_t tile[128];
  for (int i = 0; i < 4; i++) tile[threadIdx.x * 4 + i] = 9;
  uint32_t at = __cvta_generic_to_shared(&tile[threadIdx.x * 4]);
  const void* from = x + threadIdx.x * 4;
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; @p cp.async.ca.shared.global.L2::128B [%0], [%1], 8; }"
      :: "r"(at), "l"(from), "r"(threadIdx.x % 2) : "memory");
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %2, 0; cp.async.ca.shared.global [%0+8], [%1], 8, p; }"
      :: "r"(at), "l"(from), "r"(threadIdx.x % 2) : "memory");
  asm volatile("cp.async.commit_group;\n" "cp.async.wait_group 0;" ::: "memory");
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = tile[threadIdx.x * 4 + i];
}"""


@pytest.fixture(scope="module")
def kernels() -> EmulatedModule:
    parts = [
        _kernel("integers", list(_INTEGERS), "uint32_t", "uint32_t"),
        _kernel("floats", list(_FLOATS), "float", "float"),
        _kernel("conversions", list(_CONVERSIONS), "uint32_t", "float"),
    ]
    return emulate("\n".join([*parts, _MEMORY]))


@pytest.mark.parametrize(
    ("kernel", "table", "inputs", "dtype"),
    [
        ("integers", _INTEGERS, np.array([A, B, C], np.uint32), np.uint32),
        ("floats", _FLOATS, np.array([X, Y, Z]), np.float32),
        ("conversions", _CONVERSIONS, np.array([X, Y, Z]), np.uint32),
    ],
)
def test_instructions(kernels, kernel, table, inputs, dtype):
    out = np.zeros(len(table), dtype)
    kernels.launch(kernel, (1,), (32,), 0, inputs, out)
    wanted = np.array([v & 0xFFFFFFFF if dtype is np.uint32 else v for v in table.values()], dtype)
    wrong = [text for text, got, want in zip(table, out, wanted, strict=True) if got != want]
    assert not wrong


def test_loads_and_stores(kernels):
    x, out = np.arange(1000, 1128, dtype=np.uint32).reshape(32, 4), np.zeros((32, 4), np.uint32)
    kernels.launch("memory", (1,), (32,), 0, x, out)
    other = x[np.arange(32) ^ 1]
    assert np.array_equal(out[:, :3], np.stack([other[:, 0], other[:, 1], x[:, 3] & 0xFF], 1))


def test_copies_under_a_predicate(kernels):
    x, out = np.arange(1000, 1128, dtype=np.uint32).reshape(32, 4), np.zeros((32, 4), np.uint32)
    kernels.launch("guarded", (1,), (32,), 0, x, out)
    odd = np.arange(32)[:, None] % 2 == 1
    assert np.array_equal(out[:, :2], np.where(odd, x[:, :2], 9))  # not done where the guard is false
    assert np.array_equal(out[:, 2:], np.where(odd, 0, x[:, :2]))  # zeros where the source is ignored


@pytest.mark.parametrize(
    "text",
    [
        "mma.sync.aligned.m8n8k16.row.col.satfinite.s32.s8.s8.s32 {%0, %0}, {%0}, {%0}, {%0, %0};",
        "bar.sync 1;",
        "ld.f32 %0, [%0];",
        "cp.async.bulk.commit_group;",
        "add.sat.s32 %0, %0, %0;",
        "add.s32 %0, %0, unknown;",
        "max.NaN.s32 %0, %0, %0;",
        "fma.rn.ftz.f32 %0, %0, %0, %0;",
        "setp.lt.and.s32 %0, %0, %0;",
        "shf.l.clamp.b32 %0, %0, %0, %0;",
        "cvt.rn.relu.f16.f32 %0, %0;",
        "ld.shared.acquire.u32 %0, [%0];",
        "LOOP: bra LOOP;",
    ],
)
def test_what_is_not_emulated_is_refused(text):
    source = f'extern "C" __global__ void k(uint32_t* x) {{ asm volatile("{text}" : "+r"(x[0])); }}'
    with pytest.raises(EmulationError, match="of the asm statement"):
        emulate(source)
