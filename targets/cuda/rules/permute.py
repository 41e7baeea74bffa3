"""Transpositions through shared memory: a block reads a tile along one axis and writes it along the other.

    y[n, p, c] = f(x[n, c, p])    -->    tile[c][p] = x[n, c, p], lanes along p; barrier; lanes along c: y[…] = f(tile)

A row of the tile is one element longer than the tile, so that neither side has two lanes in one bank. Elementwise
stages and padding around the transposition are computed where it writes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .base import Rule, barrier
from .graph import Declined, Graph, dtype_of, shape_of, substitute
from .nests import Uses
from .registers import Kernel, build, everywhere, mentions

#: Elements of a side of a tile, rows that the threads of a block take together, and the shortest axis worth it.
_TILE, _ROWS, _LEAST = 32, 8, 8


class Permute(Rule):
    """Elementwise kernels that read one tensor along another axis than they write."""

    name = "transposition"

    def __call__(self, func: tirx.PrimFunc) -> tirx.PrimFunc | str:
        try:
            graph = Graph(func)
            if len(graph.outputs) != 1 or any(s.reduced for s in graph.stages.values()):
                raise Declined("not elementwise, or several results")
            (out,) = graph.outputs
            source, indices, across = _turned(Uses(graph, out))
            rows, columns = (math.prod(out.shape[axis] for axis in side) for side in across)
            if min(rows, columns) < _LEAST:
                raise Declined("an axis too short for tiles")
            return _written(graph, source, indices, across)
        except Declined as reason:
            return str(reason)


def _turned(uses: Uses) -> tuple[Any, tuple[Any, ...], tuple[list[int], list[int]]]:
    """What is read across, its indices, and the axes of the result: those along which it lies in memory, and those
    behind them."""
    axes = [(axis, var) for axis, (var, extent) in enumerate(uses.stage.axes) if extent > 1]
    found = []
    for source, indices in uses.reads:
        dims = [index for index, extent in zip(indices, shape_of(source), strict=True) if extent > 1]
        along = [axis for axis, var in axes if dims and mentions(dims[-1], [var])]
        if len(along) != 1 or not axes or along[0] == axes[-1][0] or not mentions_any(dims[:-1], axes[-1][1]):
            continue
        last = along[0]
        side = [last]
        for axis, var in reversed([a for a in axes if a[0] < last]):
            if len(dims) > len(side) and mentions(dims[-1 - len(side)], [var]):
                side.insert(0, axis)
            else:
                break
        found.append((source, indices, (side, [axis for axis, _ in axes if axis > last])))
    if len(found) != 1:
        raise Declined("not one tensor that is read across")
    source = found[0][0]
    if sum(buffer.same_as(source) for buffer, _ in uses.reads) != 1:
        raise Declined("a tensor that is read in several places")
    return found[0]


def mentions_any(exprs: Sequence[Any], var: Any) -> bool:
    return any(mentions(e, [var]) for e in exprs)


def _written(graph: Graph, source: Any, indices: Sequence[Any], across: tuple[list[int], list[int]]) -> tirx.PrimFunc:
    (out,) = graph.outputs
    extents = [[out.shape[axis] for axis in side] for side in across]
    rows, columns = map(math.prod, extents)
    outer = [axis for axis, extent in enumerate(out.shape) if extent > 1 and axis not in (*across[0], *across[1])]
    grid = [math.prod(out.shape[axis] for axis in outer), -(-rows // _TILE), -(-columns // _TILE)]

    def body(kernel: Kernel, block: Any, thread: Any) -> None:
        n, row, column = kernel.split(block, grid)
        fast = kernel.bind(tirx.floormod(thread, _TILE), _TILE)
        slow = kernel.bind(tirx.floordiv(thread, _TILE), _ROWS)
        around = kernel.split(n, [out.shape[axis] for axis in outer])
        tile = T.alloc_buffer((_TILE, _TILE + 1), dtype_of(source), scope="shared", layout=None)
        IRBuilder.name("tile", tile)

        def point(r: Any, c: Any) -> list[Any]:
            at: list[Any] = [tirx.const(0, "int32")] * len(out.shape)
            for axes, values in ((outer, around), (across[0], r), (across[1], c)):
                for axis, value in zip(axes, values, strict=True):
                    at[axis] = value
            return at

        for i in range(_TILE // _ROWS):
            r = kernel.bind(row * _TILE + fast, grid[1] * _TILE)
            c = kernel.bind(column * _TILE + slow + i * _ROWS, grid[2] * _TILE)
            with kernel.when(r < rows, c < columns):
                at = point(kernel.split(r, extents[0]), kernel.split(c, extents[1]))
                names = {var: value for (var, _), value in zip(out.axes, at, strict=True)}
                place = [substitute(index, names) for index in indices]
                inside = [f(p) for p, e in zip(place, shape_of(source), strict=True) for f in _bounds(e)]
                with kernel.when(*inside):
                    T.buffer_store(tile, kernel.read(source, place), [slow + i * _ROWS, fast])
        barrier("shared")
        for i in range(_TILE // _ROWS):
            r = kernel.bind(row * _TILE + slow + i * _ROWS, grid[1] * _TILE)
            c = kernel.bind(column * _TILE + fast, grid[2] * _TILE)
            with kernel.when(r < rows, c < columns):
                at = point(kernel.split(r, extents[0]), kernel.split(c, extents[1]))
                kernel.overrides[source] = everywhere(tile[fast, slow + i * _ROWS])
                kernel.store(out.buffer, at, kernel.stage(out, at))

    return build(graph, math.prod(grid), _TILE * _ROWS, body)


def _bounds(extent: int) -> list[Any]:
    return [lambda index: index >= 0, lambda index: index < extent]


__all__ = ["Permute"]
