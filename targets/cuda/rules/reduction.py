"""Long sums with few results, such as a global mean: the threads of a block share the terms of each.

Where the terms of one sum lie beside each other in memory, a warp adds up one sum; where those of neighbouring sums do,
lanes are neighbouring sums and the warps of a block share their terms. The order of the sum is another than eager's.
"""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from bnncc.targets.cuda.descriptor import WARP

from .base import Rule, barrier
from .graph import Declined, Graph, Stage, loads, shape_of
from .registers import Kernel, build, mentions
from .softmax import accumulate, fold_lanes

#: Warps of a block, terms from which on threads share them, and terms that a thread loads together.
_WARPS, _LONG, _TOGETHER = 8, 32, 4
#: Threads of a multiprocessor that are kept busy without any of this.
_BUSY = 1024


class Means(Rule):
    """Sums of floats over many elements, with the elementwise stages around them."""

    name = "means"

    def __call__(self, func: tirx.PrimFunc) -> tirx.PrimFunc | str:
        try:
            graph = Graph(func)
            reductions = [s for s in graph.stages.values() if s.reduced]
            if len(reductions) != 1 or reductions[0].role != "reduction" or not _is_sum(reductions[0]):
                raise Declined("not one sum of floats")
            (sums,) = reductions
            count = math.prod(sums.shape)
            if sums.steps < _LONG or count >= 4 * _BUSY * self.target.gpu.sms:
                raise Declined("short sums, or enough of them")
            if any(_places(s) != _places(sums) for s in graph.outputs):
                raise Declined("results of another shape than the sums")
            return _by_warps(graph, sums) if _along_terms(sums) else _by_lanes(graph, sums)
        except Declined as reason:
            return str(reason)


def _is_sum(stage: Stage) -> bool:
    return stage.dtype == "float32" and isinstance(stage.value, tirx.Add) and stage.init.value == 0


def _places(stage: Stage) -> list[int]:
    return [extent for extent in stage.shape if extent > 1]


def _along_terms(sums: Stage) -> bool:
    """Whether the last axis of what is read is one of the reduction's."""
    names = [var for var, _ in sums.reduced]
    ends = [
        [index for index, extent in zip(load.indices, shape_of(load.source), strict=True) if extent > 1][-1:]
        for load in loads(sums.value)
        if not load.source.same_as(sums.buffer)
    ]
    return any(mentions(index, names) for end in ends for index in end)


def _partial(kernel: Kernel, sums: Stage, point: list[Any], first: Any, stride: int) -> Any:
    """The sum of every `stride`-th term from `first` on, in a register."""
    total = kernel.local("float32", "total", 1)
    T.buffer_store(total, sums.init, [0])
    extents = [extent for _, extent in sums.reduced]
    kernel.overrides[sums.buffer] = lambda _: total[0]
    whole = sums.steps // (stride * _TOGETHER)

    def add(term: Any) -> None:
        T.buffer_store(total, kernel.value(sums.at(point, kernel.split(term, extents))), [0])

    if whole:
        with T.serial(0, whole) as i, kernel.scope():
            kernel.bound(i, whole)
            for j in range(_TOGETHER):
                add(first + (i * _TOGETHER + j) * stride)
    for start in range(whole * _TOGETHER * stride, sums.steps, stride):
        with kernel.when(first + start < sums.steps):
            add(first + start)
    del kernel.overrides[sums.buffer]
    return total


def _finish(kernel: Kernel, graph: Graph, sums: Stage, total: Any, at: Any) -> None:
    """Stores the results of a sum."""
    kernel.overrides[sums.buffer] = lambda _: total[0]
    for stage in graph.outputs:
        point = kernel.split(at, stage.shape)
        kernel.store(stage.buffer, point, kernel.stage(stage, point))


def _by_warps(graph: Graph, sums: Stage) -> tirx.PrimFunc:
    count = math.prod(sums.shape)

    def body(kernel: Kernel, block: Any, thread: Any) -> None:
        warp, lane = tirx.floordiv(thread, WARP), kernel.bind(tirx.floormod(thread, WARP), WARP)
        at = kernel.bind(block * _WARPS + warp, -(-count // _WARPS) * _WARPS)
        with kernel.when(at < count):  # all of a warp
            total = _partial(kernel, sums, kernel.split(at, sums.shape), lane, WARP)
            fold_lanes(kernel, total, lambda a, b: a + b)
            with kernel.when(lane < 1):
                _finish(kernel, graph, sums, total, at)

    return build(graph, -(-count // _WARPS), _WARPS * WARP, body)


def _by_lanes(graph: Graph, sums: Stage) -> tirx.PrimFunc:
    count = math.prod(sums.shape)

    def body(kernel: Kernel, block: Any, thread: Any) -> None:
        warp = kernel.bind(tirx.floordiv(thread, WARP), _WARPS)
        lane = kernel.bind(tirx.floormod(thread, WARP), WARP)
        at = kernel.bind(block * WARP + lane, -(-count // WARP) * WARP)
        shared = IRBuilder.name("parts", T.alloc_buffer((_WARPS, WARP), "float32", scope="shared", layout=None))
        with kernel.when(at < count):
            total = _partial(kernel, sums, kernel.split(at, sums.shape), warp, _WARPS)
            T.buffer_store(shared, total[0], [warp, lane])
        barrier("shared")
        with kernel.when(warp < 1, at < count):
            whole = kernel.local("float32", "whole", 1)
            accumulate(whole, [shared[w, lane] for w in range(_WARPS)], lambda a, b: a + b)
            _finish(kernel, graph, sums, whole, at)

    return build(graph, -(-count // WARP), _WARPS * WARP, body)


__all__ = ["Means"]
