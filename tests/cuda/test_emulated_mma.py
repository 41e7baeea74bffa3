"""Emulated mma.sync against NumPy models, written element by element from the PTX ISA's text."""

from __future__ import annotations

import numpy as np
import pytest
from emulator import EmulatedModule, emulate

# ---- mma.sync: PTX ISA 9.7.14.5, "Matrix Fragments for mma.…". Element i of lane's fragment, and where it lies.


def _fragment_a(shape: str, bits: int, lane: int, i: int) -> tuple[int, int]:
    """(row, column) of element i of A. bits: of an element."""
    group, thread = lane >> 2, lane % 4
    if shape == "m8n8k128":
        return group, thread * 32 + i
    if shape == "m16n8k128":
        return (group if i < 32 else group + 8), thread * 32 + (i & 31)
    if shape == "m16n8k256":
        return (group if i < 32 or 64 <= i < 96 else group + 8), thread * 32 + (i & 31) + (128 if i >= 64 else 0)
    if shape == "m8n8k16":
        return group, thread * 4 + i
    if shape == "m16n8k16" and bits == 8:
        return (group if i < 4 else group + 8), thread * 4 + (i & 3)
    if shape == "m16n8k32":
        return (group if i < 4 or 8 <= i < 12 else group + 8), thread * 4 + (i & 3) + (16 if i >= 8 else 0)
    if shape == "m16n8k8" and bits == 16:
        return (group if i < 2 else group + 8), thread * 2 + (i & 1)
    if shape == "m16n8k16" and bits == 16:
        return (group if i < 2 or 4 <= i < 6 else group + 8), thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    if shape == "m16n8k4":
        return (group if i == 0 else group + 8), thread
    if shape == "m16n8k8" and bits == 32:
        return (group if i in (0, 2) else group + 8), thread + (4 if i >= 2 else 0)
    raise AssertionError(shape)


def _fragment_b(shape: str, bits: int, lane: int, i: int) -> tuple[int, int]:
    """(row, column) of element i of B."""
    group, thread = lane >> 2, lane % 4
    row = {
        "m8n8k128": thread * 32 + i,
        "m16n8k128": thread * 32 + i,
        "m16n8k256": thread * 32 + (i & 31) + (128 if i >= 32 else 0),
        "m8n8k16": thread * 4 + i,
        "m16n8k32": thread * 4 + (i & 3) + (16 if i >= 4 else 0),
        "m16n8k4": thread,
    }.get(shape)
    if shape == "m16n8k16":
        row = thread * 4 + i if bits == 8 else thread * 2 + (i & 1) + (8 if i >= 2 else 0)
    if shape == "m16n8k8":
        row = thread * 2 + i if bits == 16 else thread + (4 if i else 0)
    assert row is not None
    return row, group


def _fragment_c(shape: str, lane: int, i: int) -> tuple[int, int]:
    group, thread = lane >> 2, lane % 4
    return (group if i < 2 else group + 8), thread * 2 + (i & 1)


def _registers(matrix: np.ndarray, place, shape: str, bits: int, count: int) -> np.ndarray:
    """The 32-bit registers (lane, register) of a matrix of unsigned integers of so many bits."""
    registers = np.zeros((32, count), np.uint32)
    for lane in range(32):
        for i in range(count * 32 // bits):
            value = int(matrix[place(shape, bits, lane, i)])
            registers[lane, i * bits // 32] |= np.uint32(value << i * bits % 32)
    return registers


_BITS = [
    (f"{shape}.row.col.s32.b1.b1.s32.{op}.popc", 1)
    for shape in ("m8n8k128", "m16n8k128", "m16n8k256")
    for op in ("xor", "and")
]
_BYTES = [
    (f"{shape}.row.col.s32.{a}.{b}.s32", 8)
    for shape in ("m8n8k16", "m16n8k16", "m16n8k32")
    for a, b in (("s8", "s8"), ("u8", "s8"), ("s8", "u8"), ("u8", "u8"))
]
_FLOATS = [
    ("m16n8k8.row.col.f32.f16.f16.f32", 16),
    ("m16n8k16.row.col.f32.f16.f16.f32", 16),
    ("m16n8k8.row.col.f32.bf16.bf16.f32", 16),
    ("m16n8k16.row.col.f32.bf16.bf16.f32", 16),
    ("m16n8k4.row.col.f32.tf32.tf32.f32", 32),
    ("m16n8k8.row.col.f32.tf32.tf32.f32", 32),
]
_HALVES = [("m16n8k8.row.col.f16.f16.f16.f16", 16), ("m16n8k16.row.col.f16.f16.f16.f16", 16)]


def _counts(opcode: str, bits: int) -> tuple[int, int, int, int, int]:
    """M, K, and the registers of A, B and C."""
    shape = opcode.split(".")[0]
    m, k = int(shape[1 : shape.index("n")]), int(shape.split("k")[1])
    return m, k, m * k * bits // 1024, 8 * k * bits // 1024, m * 8 // 32 // (2 if ".f16.f16.f16.f16" in opcode else 1)


def _mma_kernel(opcode: str, bits: int) -> str:
    *_, a, b, c = _counts(opcode, bits)
    kind, letter = ("float", "f") if ".f32." in opcode else ("uint32_t", "r")
    groups, at = [], 0
    for count in (c, a, b, c):
        groups.append("{" + ", ".join(f"%{at + i}" for i in range(count)) + "}")
        at += count
    outs = ", ".join(f'"={letter}"(d[{i}])' for i in range(c))
    ins = [f'"r"(a[{i}])' for i in range(a)] + [f'"r"(b[{i}])' for i in range(b)]
    ins += [f'"{letter}"(c[{i}])' for i in range(c)]
    name = opcode.replace(".", "_")
    return f"""
extern "C" __global__ void __launch_bounds__(32) {name}(uint32_t* a, uint32_t* b, {kind}* c, {kind}* d) {{
  a += threadIdx.x * {a}; b += threadIdx.x * {b}; c += threadIdx.x * {c}; d += threadIdx.x * {c};
  asm volatile("mma.sync.aligned.{opcode} {", ".join(groups)};" : {outs} : {", ".join(ins)});
}}"""


@pytest.fixture(scope="module")
def kernels() -> EmulatedModule:
    return emulate("\n".join(_mma_kernel(*k) for k in _BITS + _BYTES + _FLOATS + _HALVES))


def _run_mma(kernels: EmulatedModule, opcode: str, bits: int, a, b, c) -> np.ndarray:
    """D (M, 8) of raw A (M, K) and B (K, 8), unsigned integers of so many bits, and C (M, 8)."""
    shape = opcode.split(".")[0]
    m, _, count_a, count_b, count_c = _counts(opcode, bits)
    ins = _registers(a, _fragment_a, shape, bits, count_a), _registers(b, _fragment_b, shape, bits, count_b)
    places = [[_fragment_c(shape, lane, i) for i in range(m * 8 // 32)] for lane in range(32)]
    fragment = np.array([[c[p] for p in row] for row in places], c.dtype)
    out = np.zeros_like(fragment)
    views = [x.view(np.uint32) for x in (fragment, out)] if c.dtype != np.float32 else [fragment, out]
    assert views[0].shape == (32, count_c)
    kernels.launch(opcode.replace(".", "_"), (1,), (32,), 0, *ins, *views)
    result = np.zeros_like(c)
    for lane in range(32):
        for i, place in enumerate(places[lane]):
            result[place] = out[lane, i]
    return result


@pytest.mark.parametrize(("opcode", "bits"), _BITS)
def test_bit_mma_counts(kernels, opcode, bits):
    rng = np.random.default_rng(3)
    m, k, *_ = _counts(opcode, bits)
    a, b = rng.integers(0, 2, (m, k)), rng.integers(0, 2, (k, 8))
    c = rng.integers(-99, 99, (m, 8)).astype(np.int32)
    expected = c + (a @ b if ".and." in opcode else a @ (1 - b) + (1 - a) @ b)
    assert np.array_equal(_run_mma(kernels, opcode, bits, a, b, c), expected)


@pytest.mark.parametrize(("opcode", "bits"), _BYTES)
def test_byte_mma_multiplies(kernels, opcode, bits):
    rng = np.random.default_rng(4)
    m, k, *_ = _counts(opcode, bits)
    kinds = [np.dtype(f"{'u' * (word[0] == 'u')}int8") for word in opcode.split(".")[4:6]]
    a, b = rng.integers(0, 256, (m, k)).astype(np.uint8), rng.integers(0, 256, (k, 8)).astype(np.uint8)
    c = rng.integers(-(2**30), 2**30, (m, 8)).astype(np.int32)
    expected = c + a.view(kinds[0]).astype(np.int32) @ b.view(kinds[1]).astype(np.int32)
    assert np.array_equal(_run_mma(kernels, opcode, bits, a, b, c), expected)


def _float_operands(opcode: str, bits: int, rng: np.random.Generator, shape: tuple[int, int]):
    """Raw bits, and the values that the instruction reads in them."""
    if ".f16." in opcode:
        values = rng.standard_normal(shape).astype(np.float16)
        return values.view(np.uint16), values.astype(np.float64)
    raw = rng.standard_normal(shape).astype(np.float32).view(np.uint32)
    if ".bf16." in opcode:
        return raw >> 16, (raw & 0xFFFF0000).view(np.float32).astype(np.float64)
    return raw, (raw & 0xFFFFE000).view(np.float32).astype(np.float64)  # tf32: 10 bits of mantissa are read


@pytest.mark.parametrize(("opcode", "bits"), _FLOATS + _HALVES)
def test_float_mma_multiplies(kernels, opcode, bits):
    rng = np.random.default_rng(5)
    m, k, *_ = _counts(opcode, bits)
    (a, wide_a), (b, wide_b) = (_float_operands(opcode, bits, rng, s) for s in ((m, k), (k, 8)))
    c = rng.standard_normal((m, 8)).astype(np.float32 if ".f32." in opcode else np.float16)
    got = _run_mma(kernels, opcode, bits, a, b, c)
    # Products are exact in float64; the sum of 17 is off by an ulp of it at most, and then rounded.
    assert np.allclose(got, c + wide_a @ wide_b, rtol=2 * np.finfo(c.dtype).eps, atol=np.finfo(c.dtype).eps)
