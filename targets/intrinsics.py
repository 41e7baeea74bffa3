"""Dot products of bytes as the processors have them.

    sums[l] += Σ over q of x[q] · w[l, q]      l = 0 … lanes−1, q = 0 … 3; x and w bytes, sums int32

The four bytes of x are broadcast against a vector of weights. `use_dot` puts the instructions in the place of the two
loops, as `Schedule.tensorize` would: TVM 0.27 crashes there, because it copies intrinsics by way of JSON.
All are exact: nothing saturates, and no 16-bit sum of "smull" or "vmull" overflows unless two weights that it adds are
both −128; then their "wide" forms serve.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target.codegen import llvm_lookup_intrinsic_id

#: Lanes of the narrowest vector.
MIN_LANES = 4


@dataclass(frozen=True)
class Dot:
    """One way to multiply bytes.

    add: (lanes, sums, word of x as int32, weights) → the new sums. weights: registers that a vector of weights takes.
    temporaries: registers for products and for the words, of which LLVM loads some ahead.
    speed: products of bytes in the time of one of floats, over whole convolutions: measured on x86, counted by
        `benchmarks.arm_model` on ARM.
    """

    x_dtype: str
    weights: int
    temporaries: int
    add: Callable[[int, Any, Any, Any], Any]
    speed: float = 1.5


def use_dot(sch: Schedule, update: SBlockRV, lanes_loop: LoopRV, dot: Dot) -> None:
    """Replaces the loops over lanes and over the four bytes of a word, `lanes_loop` and the one inside it, around
    `update`, which from then on is the block of the instructions."""
    lanes = int(sch.get(lanes_loop).extent)
    block = sch.get(sch.blockize(lanes_loop))
    (sums,) = block.writes
    x, w = (
        next(r for r in block.reads if r.source.dtype == dtype and r is not sums) for dtype in (dot.x_dtype, "int8")
    )
    if dot.x_dtype == "int8":
        x, w = (r for r in block.reads if r.source.dtype == "int8")
    word = tirx.reinterpret("int32", vector(x, 4))
    value = dot.add(lanes, vector(sums, lanes), word, vector(w, 4 * lanes))
    replace_body(sch, update, block, tirx.BufferStore(sums.source, value, ramp(sums, lanes)))


def use_mask(sch: Schedule, update: SBlockRV, blocks: SBlockRV) -> None:
    """Replaces the body of `blocks`, a loop over the bits of some bytes around `update`, by one comparison of vectors.

    update: ``bytes[…] += bit``, where bit is not 0 if it is set.
    """
    block = sch.get(blocks)
    (sums,) = block.writes
    loop, realize = block.body, block.body.body
    inner = realize.block
    count = int(loop.extent)
    flags = tirx.decl_buffer((count,), "bool", "flags", scope="local")
    *byte, v = (iv.var for iv in inner.iter_vars)
    at = byte[0] * 8 + v if byte else v
    flag = tirx.BufferStore(flags, _added(inner.body.value) != 0, [at])
    bit = s_tir.SBlock(inner.iter_vars, [r for r in inner.reads if not r.source.same_as(sums.source)], [], "bit", flag)
    comparison = tirx.For(
        loop.loop_var, 0, count, tirx.ForKind.VECTORIZED, s_tir.SBlockRealize(realize.iter_values, True, bit)
    )
    # TVM's types say that a mask of 16 bools and two bytes differ in size; to LLVM they do not.
    lanes = f"x{count // 8}" if count > 8 else ""
    packed = tirx.call_intrin(f"uint8{lanes}", "tirx.reinterpret", tirx.BufferLoad(flags, [tirx.Ramp(0, 1, count)]))
    where = ramp(sums, count // 8) if lanes else [r.min for r in sums.region]
    store = tirx.BufferStore(sums.source, tirx.Cast(f"{sums.source.dtype}{lanes}", packed), where)
    replace_body(sch, update, block, tirx.SeqStmt([comparison, store]), [flags])


def _added(value: Any) -> Any:
    """What ``sum + a + b …`` adds to the sum."""
    return _added(value.a) + value.b if isinstance(value.a, tirx.Add) else value.b


def replace_body(sch: Schedule, update: SBlockRV, block: s_tir.SBlock, body: Any, buffers: Sequence[Any] = ()) -> None:
    """Gives `block`, blockized around `update`, another body; from then on it is what `update` names."""
    fast = s_tir.SBlock(
        block.iter_vars,
        block.reads,
        block.writes,
        block.name_hint,
        body,
        alloc_buffers=list(buffers),
        annotations=block.annotations,
    )
    sch.state.replace(sch.state.get_sref(block), fast, {sch.get(update): fast})


def ramp(region: Any, length: int) -> list[Any]:
    """Where a region begins, and that many elements from there on."""
    *outer, last = (r.min for r in region.region)
    return [*outer, tirx.Ramp(last, 1, length)]


def vector(region: Any, length: int) -> Any:
    return tirx.BufferLoad(region.source, ramp(region, length))


def llvm_pure(intrinsic: str, dtype: str, *args: Any) -> Any:
    return tirx.call_llvm_pure_intrin(dtype, llvm_lookup_intrinsic_id(intrinsic), *args)


def _vnni(lanes: int, sums: Any, word: Any, weights: Any) -> Any:
    """VPDPBUSD: four products to a lane, added to the sum."""
    x = tirx.reinterpret(f"uint8x{4 * lanes}", tirx.Broadcast(word, lanes))
    return llvm_pure(f"llvm.x86.avx512.vpdpbusd.{lanes * 32}", f"int32x{lanes}", sums, x, weights)


_WIDE_MADD = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}


def _maddwd(lanes: int, sums: Any, word: Any, weights: Any) -> Any:
    """PMADDWD on the even and on the odd bytes, widened to 16 bits (PMADDUBSW would saturate)."""
    halves = f"int16x{2 * lanes}"

    def const(value: int) -> Any:
        return tirx.Broadcast(tirx.const(value, "int16"), 2 * lanes)

    x = tirx.reinterpret(halves, tirx.Broadcast(word, lanes))
    w = tirx.reinterpret(halves, weights)
    madd = functools.partial(llvm_pure, _WIDE_MADD[lanes], f"int32x{lanes}")
    even = madd(x & const(255), (w << const(8)) >> const(8))
    return sums + even + madd((x >> const(8)) & const(255), w >> const(8))


def _sdot(lanes: int, sums: Any, word: Any, weights: Any) -> Any:
    """SDOT: four products to a lane, added to the sum."""
    x = tirx.reinterpret(f"int8x{4 * lanes}", tirx.Broadcast(word, lanes))
    return llvm_pure("llvm.aarch64.neon.sdot", f"int32x{lanes}", sums, x, weights)


def _smull(lanes: int, sums: Any, word: Any, weights: Any) -> Any:
    """SMULL; pairs of products added in 16 bits by ADDP, then to the sum by SADALP."""
    pairs = llvm_pure("llvm.aarch64.neon.addp", "int16x8", *_products(word, weights))
    return sums + llvm_pure("llvm.aarch64.neon.saddlp", f"int32x{lanes}", pairs)


def _smull_wide(lanes: int, sums: Any, word: Any, weights: Any) -> Any:
    """SMULL; pairs of products added in 32 bits by SADDLP and ADDP."""
    pairs = [llvm_pure("llvm.aarch64.neon.saddlp", "int32x4", product) for product in _products(word, weights)]
    return sums + llvm_pure("llvm.aarch64.neon.addp", f"int32x{lanes}", *pairs)


def _products(word: Any, weights: Any, instruction: str = "llvm.aarch64.neon.smull") -> list[Any]:
    """The 16 products of a vector, 16 bits each."""
    x = tirx.reinterpret("int8x16", tirx.Broadcast(word, 4))
    halves = [[half("int8x8", v) for v in (x, weights)] for half in (tirx.vectorlow, tirx.vectorhigh)]
    return [llvm_pure(instruction, "int16x8", *pair) for pair in halves]


def vpadd(dtype: str, a: Any, b: Any) -> Any:
    """Sums of neighbouring integers of two vectors of 128 bits, as 32-bit ARM has them: of 64 bits."""
    half = f"{dtype.split('x')[0]}x{int(dtype.split('x')[1]) // 2}"
    sums = [
        llvm_pure("llvm.arm.neon.vpadd", half, tirx.vectorlow(half, vector), tirx.vectorhigh(half, vector))
        for vector in (a, b)
    ]
    return tirx.vectorcombine(dtype, *sums)


def _vmull(lanes: int, sums: Any, word: Any, weights: Any) -> Any:
    """VMULL; pairs of products added in 16 bits by VPADD, then to the sum by VPADAL."""
    pairs = vpadd("int16x8", *_products(word, weights, "llvm.arm.neon.vmulls"))
    return llvm_pure("llvm.arm.neon.vpadals", f"int32x{lanes}", sums, pairs)


def _vmull_wide(lanes: int, sums: Any, word: Any, weights: Any) -> Any:
    """VMULL; pairs of products added in 32 bits by VPADDL and VPADD."""
    products = _products(word, weights, "llvm.arm.neon.vmulls")
    pairs = [llvm_pure("llvm.arm.neon.vpaddls", "int32x4", product) for product in products]
    return sums + vpadd(f"int32x{lanes}", *pairs)


#: By the name that `TargetSpec.dot` gives.
DOTS = {
    "vnni": Dot("uint8", 1, 1, _vnni, speed=3.3),
    "maddwd": Dot("uint8", 2, 5, _maddwd, speed=1.3),
    "sdot": Dot("int8", 1, 6, _sdot, speed=4.0),
    "smull": Dot("int8", 2, 10, _smull, speed=1.6),
    "smull wide": Dot("int8", 2, 10, _smull_wide),
    "vmull": Dot("int8", 2, 8, _vmull),
    "vmull wide": Dot("int8", 2, 8, _vmull_wide),
}
