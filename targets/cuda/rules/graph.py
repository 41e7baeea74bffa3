"""A kernel as its stages: what each buffer holds, as an expression of its indices.

Rules that write a kernel anew, thread by thread, read it from here instead of scheduling its loops.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.s_tir import Schedule

from bnncc.dialect.stages import ROLE
from bnncc.targets.rules.base import SPATIAL


class Declined(Exception):
    """Why a rule does not apply, found while it was at work."""


@dataclass(frozen=True)
class Stage:
    """``buffer[axes] = value``, or a reduction: ``init`` first, then `value`, which reads the buffer at `axes`, for
    each point of `reduced`.

    axes, reduced: (variable, extent).
    """

    buffer: Any
    role: str
    axes: tuple[tuple[Any, int], ...]
    reduced: tuple[tuple[Any, int], ...]
    init: Any
    value: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.buffer)

    @property
    def dtype(self) -> str:
        return dtype_of(self.buffer)

    @property
    def steps(self) -> int:
        return math.prod(extent for _, extent in self.reduced)

    def at(self, indices: Sequence[Any], reduced: Sequence[Any] = ()) -> Any:
        """`value` at a point."""
        names = [var for var, _ in (*self.axes, *self.reduced)]
        return substitute(self.value, dict(zip(names, (*indices, *reduced), strict=True)))


class Graph:
    """The stages of an unscheduled function in program order. Raises Declined where one is no expression."""

    def __init__(self, func: tirx.PrimFunc) -> None:
        self.func = func
        self.params = list(func.params)
        sch = Schedule(func)
        blocks = [sch.get(block) for block in sch.get_child_blocks(sch.get_sblock("root"))]
        self.stages = {stage.buffer: stage for stage in map(_stage, blocks)}
        if len(self.stages) != len(blocks):
            raise Declined("two stages write one buffer")
        self.outputs = [self.stages[p] for p in self.params if p in self.stages]
        self._count_uses()

    def piece(self, stage: Stage, kept: Sequence[Any]) -> Graph:
        """The function that computes one stage from the buffers `kept`, and from the parameters."""
        piece = copy.copy(self)
        piece.stages = {b: s for b, s in self.stages.items() if s is stage or not any(b.same_as(k) for k in kept)}
        piece.outputs = [stage]
        behind = piece.behind(stage)
        piece.stages = {s.buffer: s for s in behind}
        read = {load.source: None for s in behind for load in loads(s.value) if load.source not in piece.stages}
        piece.params = [*read, stage.buffer]
        piece._count_uses()
        return piece

    def _count_uses(self) -> None:
        self.uses = dict.fromkeys(self.stages, 0)
        for stage in self.stages.values():
            for load in loads(stage.value):
                if load.source in self.uses and not load.source.same_as(stage.buffer):
                    self.uses[load.source] += 1

    def of(self, *roles: str) -> list[Stage]:
        return [stage for stage in self.stages.values() if stage.role in roles]

    def is_output(self, stage: Stage) -> bool:
        return any(stage is output for output in self.outputs)

    def repeats(self) -> float:
        """How much more is computed if each element of a result computes all that it needs for itself."""
        once = sum(math.prod(s.shape) * s.steps for s in self.stages.values())
        work: dict[Any, float] = {}
        for stage in self.stages.values():
            inner = {load.source for load in loads(stage.value)} - {stage.buffer}
            work[stage.buffer] = stage.steps * (1 + sum(work.get(buffer, 0) for buffer in inner))
        return sum(math.prod(s.shape) * work[s.buffer] for s in self.outputs) / once

    def behind(self, stage: Stage) -> list[Stage]:
        """The stages that `stage` is computed from, itself among them, in program order."""
        wanted = {stage.buffer}
        for other in reversed(self.stages.values()):
            if other.buffer in wanted:
                wanted |= {load.source for load in loads(other.value)}
        return [other for other in self.stages.values() if other.buffer in wanted]


def _stage(block: Any) -> Stage:
    store, name = block.body, block.name_hint
    if not isinstance(store, tirx.BufferStore) or getattr(store, "predicate", None) is not None:
        raise Declined(f"{name} is more than one store")
    if any(int(iv.dom.min) != 0 for iv in block.iter_vars):
        raise Declined(f"the axes of {name} do not begin at 0")
    spatial = [(iv.var, int(iv.dom.extent)) for iv in block.iter_vars if iv.iter_type == SPATIAL]
    reduced = [(iv.var, int(iv.dom.extent)) for iv in block.iter_vars if iv.iter_type != SPATIAL]
    value, init = store.value, block.init.value if block.init is not None else None
    if (init is None) != (not reduced):
        raise Declined(f"{name} reduces without a first value")
    shape = shape_of(store.buffer)
    if math.prod(shape) == 1 and all(extent == 1 for _, extent in spatial):  # perhaps of no dimension
        value = substitute(value, {var: tirx.const(0, var.ty.dtype) for var, _ in spatial})
        spatial = [(tirx.Var(f"unit{i}", "int32"), 1) for i in range(len(shape))]
    elif len(shape) != len(spatial) or not all(
        extent == size and (index.same_as(var) or extent == 1)
        for index, (var, extent), size in zip(store.indices, spatial, shape, strict=True)
    ):
        raise Declined(f"{name} does not write its axes in order")
    narrow = {var: tirx.Var(str(var.name), "int32") for var, _ in (*spatial, *reduced) if str(var.ty.dtype) == "int64"}
    if narrow:
        value = _narrowed(value, narrow)
        spatial, reduced = ([(narrow.get(var, var), e) for var, e in axes] for axes in (spatial, reduced))
    role = str(block.annotations[ROLE]) if ROLE in block.annotations else ""
    return Stage(store.buffer, role, tuple(spatial), tuple(reduced), init, value)


_COMPARISONS = (tirx.EQ, tirx.NE, tirx.LT, tirx.LE, tirx.GT, tirx.GE)


def _narrowed(value: Any, names: Mapping[Any, Any]) -> Any:
    """The expression with axes, indices and their comparisons in 32 bits instead of 64, which TVM's own operators have.

    Axes among the values stay what they are.
    """

    def load(node: Any, mutator: Any) -> Any:
        return node.source[tuple(_index(index, names, mutator) for index in node.indices)]

    def compare(node: Any, mutator: Any) -> Any:
        if str(node.a.ty.dtype) != "int64" or any(True for side in (node.a, node.b) for _ in loads(side)):
            return mutator.default_mutate(node)
        return type(node)(*(_index(side, names, mutator) for side in (node.a, node.b)))

    def axis(node: Any, _: Any) -> Any:
        return tirx.Cast("int64", names[node]) if node in names else node

    callbacks = [(ir.TensorLoad, load), *((kind, compare) for kind in _COMPARISONS), (tirx.Var, axis)]
    return rewrite(value, *callbacks)


def _index(e: Any, names: Mapping[Any, Any], mutator: Any) -> Any:
    """An index in 32 bits."""
    if str(e.ty.dtype) != "int64":
        return mutator.mutate(e)
    if isinstance(e, tirx.IntImm):
        return tirx.const(int(e.value), "int32")
    if isinstance(e, tirx.Var):
        return names.get(e, e)
    if isinstance(e, (tirx.Add, tirx.Sub, tirx.Mul, tirx.FloorDiv, tirx.FloorMod, tirx.Min, tirx.Max)):
        return type(e)(_index(e.a, names, mutator), _index(e.b, names, mutator))
    return tirx.Cast("int32", mutator.mutate(e))


def shape_of(buffer: Any) -> tuple[int, ...]:
    return tuple(int(extent) for extent in buffer.shape)


def dtype_of(buffer: Any) -> str:
    return str(buffer.dtype)


def loads(expr: Any) -> Iterator[Any]:
    """Every read of a buffer in an expression, those in indices as well."""
    found: list[Any] = []
    tvm_ffi.structural_walk(expr, [(ir.TensorLoad, found.append)])
    yield from found


def substitute(expr: Any, values: Mapping[Any, Any]) -> Any:
    """The expression with other values for its variables."""
    known = {var: tirx.const(value, "int32") if isinstance(value, int) else value for var, value in values.items()}
    return tvm_ffi.structural_map(expr, (tirx.Var, lambda var: known.get(var, var)))


def rewrite(expr: Any, *callbacks: tuple[Any, Callable[[Any, Any], Any]]) -> Any:
    """The expression with what callbacks of (node, mutator) make of their nodes; they descend for themselves."""
    return tvm_ffi.structural_mutate(expr, list(callbacks))


__all__ = ["Declined", "Graph", "Stage", "dtype_of", "loads", "rewrite", "shape_of", "substitute"]
