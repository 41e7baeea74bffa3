"""Counts of the bits of words where two byte shuffles look them up: AVX2.

LLVM counts the bits of every word by itself: it looks up those of its bytes and adds these up across the word. Here
the bytes of a vector of words stay apart over all steps of a sum that a byte can hold:

    bytes[l] += counts of the bytes of x ^ w[l]      `_count_bytes`; words of 64 bits, seen as eight bytes
    sums[l] += the eight bytes of bytes[l]           `_add_bytes`
"""

from __future__ import annotations

from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad
from tvm.s_tir import SBlock, Schedule
from tvm.s_tir.schedule import SBlockRV

from bnncc.targets.intrinsics import llvm_pure, ramp, replace_body, vector

from .base import dtype_bits, extent
from .written import placed

#: VPSADBW by the bits of its vector: sums of the eight bytes of each word of 64 bits.
_SUMS_OF_BYTES = {128: "llvm.x86.sse2.psad.bw", 256: "llvm.x86.avx2.psad.bw"}


def use_byte_counts(sch: Schedule, counted: SBlockRV, total: SBlockRV) -> None:
    """Puts vectors of bytes in the place of the innermost loops around both, which are over lanes. Vectorises the loops
    where there are no instructions for as many words, or for words of as many bits."""
    loops = [sch.get_loops(block)[-1] for block in (counted, total)]
    bits = dtype_bits(sch.get(total).writes[0].source.dtype)
    if bits == 64 and all(bits * extent(sch, loop) in _SUMS_OF_BYTES for loop in loops):
        _count_bytes(sch, counted)
        _add_bytes(sch, total)
    else:
        for loop in loops:
            sch.vectorize(loop)


def _count_bytes(sch: Schedule, update: SBlockRV) -> None:
    """Replaces the innermost loop around `update`, ``sums[l] += popcount(…)``, by vectors of bytes."""
    block, lanes = _lanes_of(sch, update)
    (sums,) = block.writes
    realize = block.body.body
    inner = realize.block
    bound = dict(zip((iv.var for iv in inner.iter_vars), realize.iter_values, strict=True))
    counts = _Lanes(block.body.loop_var, lanes).counts(placed(inner.body.value.b, bound))
    before = tirx.reinterpret(f"uint8x{8 * lanes}", vector(sums, lanes))
    value = tirx.reinterpret(f"uint64x{lanes}", before + counts)
    replace_body(sch, update, block, tirx.BufferStore(sums.source, value, ramp(sums, lanes)))


def _add_bytes(sch: Schedule, update: SBlockRV) -> None:
    """Replaces the innermost loop around `update`, ``total[l] += sums[l]`` of sums that `_count_bytes` made."""
    block, lanes = _lanes_of(sch, update)
    (total,) = block.writes
    (sums,) = (region for region in block.reads if not region.source.same_as(total.source))
    counts = tirx.reinterpret(f"int8x{8 * lanes}", vector(sums, lanes))
    zero = tirx.Broadcast(tirx.const(0, "int8"), 8 * lanes)
    added = tirx.reinterpret(f"uint64x{lanes}", llvm_pure(_SUMS_OF_BYTES[64 * lanes], f"int64x{lanes}", counts, zero))
    value = vector(total, lanes) + added
    replace_body(sch, update, block, tirx.BufferStore(total.source, value, ramp(total, lanes)))


def _lanes_of(sch: Schedule, update: SBlockRV) -> tuple[SBlock, int]:
    """The block of the innermost loop around `update`, and how often that runs."""
    loop = sch.get_loops(update)[-1]
    lanes = extent(sch, loop)
    return sch.get(sch.blockize(loop)), lanes


class _Lanes:
    """An expression of one lane, for all lanes."""

    def __init__(self, lane: Any, lanes: int) -> None:
        self._lane, self._lanes = lane, lanes

    def counts(self, value: Any) -> Any:
        """Of a popcount, or of one or nothing, in the bytes of the words."""
        dtype = f"uint8x{8 * self._lanes}"
        if value.op.name == "tirx.popcount":
            return tirx.popcount(tirx.reinterpret(dtype, self._words(value.args[0])))
        inside, count, _ = value.args
        return tirx.if_then_else(inside, self.counts(count), tirx.Broadcast(tirx.const(0, "uint8"), 8 * self._lanes))

    def _words(self, value: Any) -> Any:
        if not isinstance(value, TensorLoad):
            return self._words(value.a) ^ self._words(value.b)
        *outer, last = value.indices
        first = placed(last, {self._lane: tirx.const(0, "int32")})
        if tvm_ffi.structural_equal(first, last):
            return tirx.Broadcast(value, self._lanes)
        return tirx.BufferLoad(value.source, [*outer, tirx.Ramp(first, 1, self._lanes)])
