"""Transpositions between NHWC and NCHW: square tiles turned over inside vector registers.

Eight vectors of eight floats become their eight columns by log₂ 8 rounds of shuffles of two vectors (four of four on
vectors of 128 bits). A tile that would reach over the edge begins early instead and writes some elements again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from bnncc.targets.descriptor import TargetSpec

from .base import TASK_WORK, Rule, Stages, dtype_bits

#: Elements of a cache line, and of a page: what lies pages apart shares sets of the first-level cache.
_LINE, _PAGE = 16, 1024


def square(target: TargetSpec) -> int:
    """Rows and columns of a tile of elements of 32 bits."""
    return 8 if target.vector_bits >= 256 else 4


def transposed(rows: Sequence[Any]) -> list[Any]:
    """The columns of a square of vectors (4 of 4 lanes or 8 of 8), as expressions of shuffles."""
    size = len(rows)

    def interleave(a: Any, b: Any, unit: int) -> tuple[Any, Any]:
        """The low and high halves of each 128 bits of a and b, in turns of `unit` lanes: x86's unpck, ARM's zip."""
        low: list[int] = []
        high: list[int] = []
        for base in range(0, size, 4):
            for half, lanes in ((0, low), (2, high)):
                for first in range(base + half, base + half + 2, unit):
                    lanes += [*range(first, first + unit), *range(size + first, size + first + unit)]
        return tirx.Shuffle([a, b], low), tirx.Shuffle([a, b], high)

    pairs: list[Any] = [None] * size
    for i in range(0, size, 2):
        pairs[i], pairs[i + 1] = interleave(rows[i], rows[i + 1], 1)
    quads: list[Any] = [None] * size
    for i in range(0, size, 4):
        quads[i], quads[i + 1] = interleave(pairs[i], pairs[i + 2], 2)
        quads[i + 2], quads[i + 3] = interleave(pairs[i + 1], pairs[i + 3], 2)
    if size == 4:
        return quads
    low, high = [*range(4), *range(8, 12)], [*range(4, 8), *range(12, 16)]
    both = list(zip(quads[:4], quads[4:], strict=True))
    return [tirx.Shuffle(list(p), low) for p in both] + [tirx.Shuffle(list(p), high) for p in both]


def swapped_axes(shape: Sequence[int], order: Sequence[int]) -> tuple[int, int, int] | None:
    """(batch, A, B) where the permutation is [batch, A, B] → [batch, B, A] once axes that stay beside each other are
    merged; None for any other."""
    runs: list[list[int]] = []
    for axis in order:
        if shape[axis] == 1:
            continue
        if runs and _next_real(shape, runs[-1][-1]) == axis:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    extents = {run[0]: _product(shape[a] for a in run) for run in runs}
    ranked = sorted(extents)
    positions = [ranked.index(run[0]) for run in runs]
    sizes = [extents[first] for first in ranked]
    if positions == [1, 0]:
        return 1, sizes[0], sizes[1]
    if positions == [0, 2, 1]:
        return sizes[0], sizes[1], sizes[2]
    return None


def _next_real(shape: Sequence[int], axis: int) -> int:
    axis += 1
    while axis < len(shape) and shape[axis] == 1:
        axis += 1
    return axis


def _product(extents: Any) -> int:
    total = 1
    for extent in extents:
        total *= extent
    return total


class Permute(Rule):
    """Kernels that only transpose a tensor of 32-bit elements between NHWC and NCHW."""

    name = "transposition"

    def __call__(self, func: tirx.PrimFunc) -> Schedule | str:
        sch = Schedule(func)
        stages = Stages(sch)
        if len(stages.blocks) != 1 or stages.role(stages.blocks[0]) != "permute":
            return "not a transposition alone"
        block = sch.get(stages.blocks[0])
        source, result = block.reads[0].source, block.writes[0].source
        shape = [int(e) for e in source.shape]
        order = order_of(block)
        swap = swapped_axes(shape, order) if order else None
        size = square(self.target)
        if swap is None or dtype_bits(source.dtype) != 32:
            return "no exchange of two runs of axes of 32-bit elements"
        if min(swap[1:]) < size:
            return f"shorter than a tile of {size}"
        return Schedule(_transposition(func, source, result, swap, size))


def order_of(block: Any) -> list[int] | None:
    """Axis i of the result of a transposition is axis order[i] of its source."""
    axes = [iv.var for iv in block.iter_vars]
    at = [r.min for r in block.reads[0].region]
    found = [[i for i, index in enumerate(at) if index.same_as(var)] for var in axes]
    return [f[0] for f in found] if all(len(f) == 1 for f in found) else None


def _transposition(func: tirx.PrimFunc, source: Any, result: Any, swap: tuple[int, int, int], size: int) -> Any:
    """The kernel on the merged axes, which alias the parameters' memory."""
    batch, rows, cols = swap
    dtype = str(source.dtype)

    # The longer axis outside, so that the tiles of the shorter one share cache lines of both tensors; but not where the
    # columns that this writes to share sets of the cache. Elsewhere several tiles together use whole lines at once.
    aliased = rows % _PAGE == 0
    by_rows = rows >= cols and not aliased
    together = _LINE // size if (rows if by_rows else cols) % _LINE == 0 and not aliased else 1

    def tile(index: Any, extent: int) -> Any:
        return index * size if extent % size == 0 else tirx.min(index * size, extent - size)

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        a = T.arg(source.name, source)
        b = T.arg(result.name, result)
        merged_a = T.decl_buffer((batch, rows, cols), dtype, data=a.data, layout=None)
        merged_b = T.decl_buffer((batch, cols, rows), dtype, data=b.data, layout=None)
        tiles_r, tiles_c = -(-rows // size), -(-cols // size)
        outside, inside = (tiles_r // together, tiles_c) if by_rows else (tiles_c // together, tiles_r)
        loop = T.parallel if batch * rows * cols > 2 * size * TASK_WORK else T.serial
        with loop(0, batch * outside) as task, T.serial(0, inside) as at:
            n, slow = tirx.floordiv(task, outside), tirx.floormod(task, outside)
            for i in range(together):
                part = slow * together + i
                r, c = (tile(part, rows), tile(at, cols)) if by_rows else (tile(at, rows), tile(part, cols))
                loaded = [merged_a[n, r + j, tirx.Ramp(c, 1, size)] for j in range(size)]
                for j, column in enumerate(transposed(loaded)):
                    T.buffer_store(merged_b, column, [n, c + j, tirx.Ramp(r, 1, size)])
    return builder.get()
