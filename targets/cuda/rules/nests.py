"""Kernels without tensor cores: every thread computes some elements of the result that lie beside each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm import ir, tirx
from tvm.s_tir import Schedule

from bnncc.targets.rules.base import Stages

from .base import THREADS, Rule, bind_threads
from .graph import Declined, Graph, Stage, dtype_of, loads, rewrite, shape_of, substitute
from .registers import VECTOR_BYTES, Kernel, build, bytes_of, mentions

#: Pixels beside each other that a thread of a depthwise convolution computes: their windows overlap.
_PIXELS = 4
#: How many times as much may be computed in one launch as in one for every stage.
REPEATS = 8
#: Threads of a multiprocessor below which there are too few to give any of them more to do.
_BUSY = 512


class Elements(Rule):
    """Elementwise chains, padding, pooling, means, and whatever else has no rule of its own, in one launch."""

    name = "elements"

    def __call__(self, func: tirx.PrimFunc) -> tirx.PrimFunc | list[tirx.PrimFunc] | str:
        try:
            graph = Graph(func)
            if graph.repeats() <= REPEATS:
                return self.written(graph)
            # Threads would compute the same values again and again: reductions go through memory.
            results = [s.buffer for s in graph.stages.values() if s.reduced or graph.is_output(s)]
            return [self.written(graph.piece(graph.stages[buffer], results)) for buffer in results]
        except Declined as reason:
            return str(reason)

    def written(self, graph: Graph) -> tirx.PrimFunc:
        """One launch that computes all results of a graph."""
        parts = [Part(graph, outputs, self.target.gpu.sms) for outputs in _by_shape(graph.outputs)]
        threads = self.block_of(max(part.threads for part in parts))
        blocks = max(-(-part.threads // threads) for part in parts)

        def body(kernel: Kernel, block: Any, thread: Any) -> None:
            at = kernel.bind(block * threads + thread, blocks * threads)
            for part in parts:
                with kernel.when(at < part.threads):
                    part.write(kernel, at)

        return build(graph, blocks, threads, body)

    def block_of(self, threads: int) -> int:
        """Threads of a block: fewer where there would not be a block for every multiprocessor."""
        size = THREADS
        while size > 64 and -(-threads // size) < self.target.gpu.sms:
            size //= 2
        return size


def _by_shape(outputs: Sequence[Stage]) -> list[list[Stage]]:
    groups: dict[tuple[int, ...], list[Stage]] = {}
    for stage in outputs:
        groups.setdefault(stage.shape, []).append(stage)
    return list(groups.values())


class Part:
    """Results of one shape, and who computes which of their elements.

    threads: how many there are. lanes: elements of one of them beside each other.
    """

    def __init__(self, graph: Graph, outputs: Sequence[Stage], sms: int) -> None:
        self.graph, self.outputs, self.shape = graph, outputs, outputs[0].shape
        uses = [Uses(graph, stage) for stage in outputs]
        self.runs = merged_axes(self.shape, uses)
        last = math.prod(self.shape[axis] for axis in self.runs[-1]) if self.runs else 1
        widest = max(bytes_of(d) for use in uses for d in use.innermost())
        self.lanes = VECTOR_BYTES // widest
        while last % self.lanes:
            self.lanes //= 2
        total = math.prod(self.shape)
        if total >= 1 << 31:
            raise Declined("more elements than 32 bits can count")
        self.threads = total // self.lanes
        self.window = self._window()
        self.pixels = 1
        if self.window is not None:
            width = self.shape[-2]
            fits = [p for p in range(1, _PIXELS + 1) if width % p == 0 and self.threads // p >= sms * _BUSY]
            self.pixels = max(fits, default=1)
            self.threads //= self.pixels

    def _window(self) -> Stage | None:
        """The reduction whose windows overlap, where the results have its shape and pixels beside each other."""
        found = [s for s in self.graph.of("depthwise") if s.shape == self.shape]
        apart = [-2 % len(self.shape)] in self.runs if len(self.shape) > 1 else False
        return found[0] if len(found) == 1 and apart else None

    def write(self, kernel: Kernel, at: Any) -> None:
        lane = kernel.over(self.lanes)
        row = len(self.shape) - 2  # the axis of pixels beside each other
        sizes = [math.prod(self.shape[axis] for axis in run) for run in self.runs]
        if sizes:
            sizes[-1] //= self.lanes
            sizes = [s // self.pixels if run == [row] else s for s, run in zip(sizes, self.runs, strict=True)]
        coordinates = kernel.split(at, sizes)
        points = []
        for pixel in range(self.pixels):
            point: list[Any] = [tirx.const(0, "int32")] * len(self.shape)
            for run, index in zip(self.runs, coordinates, strict=True):
                if run is self.runs[-1] and self.lanes > 1:
                    index = index * self.lanes + lane
                if run == [row] and self.pixels > 1:
                    index = index * self.pixels + pixel
                # Axes that every access has whole are one row: its index may stand on the last of them.
                point[run[-1]] = index
            points.append(point)
        if self.window is not None and self.pixels > 1:
            kernel.reduce(self.window, points)
        for point in points:
            for stage in self.outputs:
                kernel.store(stage.buffer, point, kernel.stage(stage, point))


class Uses:
    """What the elements of a stage are computed from: reads of parameters, and what else depends on its axes.

    reads: (buffer, indices); free: expressions outside of reads; all in the variables of the stage's axes.
    """

    def __init__(self, graph: Graph, stage: Stage) -> None:
        self.stage = stage
        self._graph = graph
        self._of: dict[Any, tuple[list[tuple[Any, tuple[Any, ...]]], list[Any]]] = {}
        self.reads, self.free = self._collect(stage)

    def _collect(self, stage: Stage) -> tuple[list[tuple[Any, tuple[Any, ...]]], list[Any]]:
        if stage.buffer in self._of:
            return self._of[stage.buffer]
        reads: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        free: dict[str, Any] = {}

        def add_read(buffer: Any, indices: tuple[Any, ...]) -> None:
            reads.setdefault(f"{buffer.name}{[str(i) for i in indices]}", (buffer, indices))

        for load in loads(stage.value):
            if load.source.same_as(stage.buffer):
                continue
            inner = self._graph.stages.get(load.source)
            if inner is None:
                add_read(load.source, tuple(load.indices))
                continue
            names = {var: index for (var, _), index in zip(inner.axes, load.indices, strict=True)}
            inner_reads, inner_free = self._collect(inner)
            for buffer, indices in inner_reads:
                add_read(buffer, tuple(substitute(i, names) for i in indices))
            for e in inner_free:
                free.setdefault(str(substitute(e, names)), substitute(e, names))
        outside = rewrite(stage.value, (ir.TensorLoad, lambda node, _: tirx.const(0, node.ty.dtype)))
        for var, _ in stage.axes:
            if mentions(outside, [var]):
                free.setdefault(str(var), var)
        self._of[stage.buffer] = list(reads.values()), list(free.values())
        return self._of[stage.buffer]

    def innermost(self) -> list[str]:
        """Types of the result and of what is read along its last axis."""
        last = [var for var, extent in self.stage.axes if extent > 1][-1:]
        found = [dtype_of(buffer) for buffer, indices in self.reads if any(mentions(i, last) for i in indices)]
        return [self.stage.dtype, *found]

    def together(self, a: int, b: int) -> bool:
        """Whether every access has the axes a and b, b whole, in one place and in order, or neither."""
        first, second = self.stage.axes[a][0], self.stage.axes[b][0]
        both = [first, second]
        if any(mentions(e, both) for e in self.free):
            return False
        return all(self._beside(shape_of(buffer), indices, a, b) for buffer, indices in self.reads)

    def _beside(self, shape: Sequence[int], indices: Sequence[Any], a: int, b: int) -> bool:
        (first, _), (second, extent) = self.stage.axes[a], self.stage.axes[b]
        at = [i for i, size in zip(indices, shape, strict=True) if size > 1]
        sizes = [size for size in shape if size > 1]
        having = [d for d, index in enumerate(at) if mentions(index, [first, second])]
        if not having:
            return True
        if len(having) != 2 or having[1] != having[0] + 1:
            return False
        d, e = having
        return bool(at[d].same_as(first) and at[e].same_as(second) and sizes[e] == extent)


def merged_axes(shape: Sequence[int], uses: Sequence[Uses]) -> list[list[int]]:
    """The axes of more than one element, those together that every access takes as one."""
    runs: list[list[int]] = []
    for axis, extent in enumerate(shape):
        if extent == 1:
            continue
        if runs and all(use.together(runs[-1][-1], axis) for use in uses):
            runs[-1].append(axis)
        else:
            runs.append([axis])
    return runs


class LoopNests(Rule):
    """Anything, as the loops it is written in; every stage that is not inlined is a kernel of its own."""

    name = "loop nests"

    def __call__(self, func: tirx.PrimFunc) -> tirx.PrimFunc | str:
        sch = Schedule(func)
        stages = Stages(sch)
        stages.inline(roles=("", "permute", "concat", "pack", "pad", "levels"))
        for block in stages.blocks:
            axes, loops = sch.get(block).iter_vars, sch.get_loops(block)
            spatial = [loop for loop, iv in zip(loops, axes, strict=True) if iv.iter_type == 0]
            if not spatial:
                spatial = [sch.add_unit_loop(block)]
            sch.reorder(*spatial, *[loop for loop in loops if all(not loop.same_as(s) for s in spatial)])
            thread = bind_threads(sch, spatial)
            if len(loops) > len(spatial):
                sch.decompose_reduction(block, sch.get_loops(block)[2])
            del thread
        return sch.mod["main"]
