"""What one thread computes, in registers: the values of stages at some point, written into the kernel being built.

A thread computes `lanes` elements beside each other. Every expression here may hold the variable `lane`; reads that
follow it become loads of vectors, and what is computed from them stands in a loop over the lanes that is unrolled:

    y[p] = max(x[p] * a[c], 0)    -->    float v[4]; *(float4*)v = *(float4*)(x + p0);
                                         for lane in 0 … 3: y_[lane] = max(v[lane] * a[c], 0)

A stage that is read more than once is computed once. Reductions run in the thread that needs them. What is read under a
condition (padding) is loaded under it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import tvm_ffi
from tvm import ir, tirx
from tvm.ir import Op
from tvm.script.ir_builder import IRBuilder
from tvm.sym import Analyzer
from tvm.tirx.script.builder import ir as T

from .base import IF_THEN_ELSE
from .graph import Declined, Graph, Stage, dtype_of, rewrite, shape_of, substitute

#: Steps of a reduction that are written one after the other, and those of the innermost axis of a longer one.
_UNROLLED, _INNER = 36, 8
#: Bytes of the widest load.
VECTOR_BYTES = 16
_VECTORS = ("float32", "int32", "uint32", "uint8", "int8")


def build(graph: Graph, blocks: int, threads: int, body: Callable[[Kernel, Any, Any], None]) -> tirx.PrimFunc:
    """The function with the parameters of `graph` whose threads do what `body` writes, of (kernel, block, thread)."""
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        for param in graph.params:
            T.arg(str(param.name), param)
        kernel = Kernel(graph)
        with (
            T.thread_binding(0, blocks, thread="blockIdx.x") as block,
            T.thread_binding(0, threads, thread="threadIdx.x") as thread,
        ):
            kernel.bound(block, blocks)
            kernel.bound(thread, threads)
            body(kernel, block, thread)
    return builder.get()


def bytes_of(dtype: str) -> int:
    return 1 if dtype == "bool" else int("".join(c for c in dtype if c.isdigit())) // 8


def everywhere(value: Any) -> Callable[[Sequence[Any]], Any]:
    """An override (`Registers.overrides`) that is the same for all indices."""
    return lambda _: value


class Kernel:
    """The kernel that is being written.

    lanes: elements that the thread computes. overrides: buffers whose values are something else, by their indices.
    """

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known = Analyzer()
        self.overrides: dict[Any, Callable[[Sequence[Any]], Any]] = {}
        self.also: dict[Any, Callable[[Sequence[Any], Any], None]] = {}
        self._views: dict[tuple[Any, str], Any] = {}
        self._guards: list[Any] = []
        self._memo: dict[Any, Any] = {}
        self.over(1)

    def over(self, lanes: int) -> Any:
        """From here on the thread computes so many elements; returns the variable that counts them."""
        self.lanes = lanes
        self.lane = tirx.Var("lane", "int32") if lanes > 1 else tirx.const(0, "int32")
        if lanes > 1:
            self.bound(self.lane, lanes)
        return self.lane

    def bound(self, var: Any, extent: int) -> None:
        """Lets proofs know that a variable counts from 0."""
        self.known.bind(var, ir.Range(0, extent))

    def view(self, buffer: Any, dtype: str | None = None) -> Any:
        """A parameter's buffer as one row of elements of a type."""
        own = dtype_of(buffer)
        dtype = dtype or own
        if (buffer, dtype) not in self._views:
            size = math.prod(shape_of(buffer)) * bytes_of(own) // bytes_of(dtype)
            row = T.decl_buffer((size,), dtype, data=buffer.data, layout=None)
            # The argument of the launch is called after it.
            self._views[buffer, dtype] = IRBuilder.name(str(buffer.name), row)
        return self._views[buffer, dtype]

    # -- statements ------------------------------------------------------------------------------------------------

    @contextmanager
    def when(self, *conditions: Any) -> Iterator[None]:
        """Statements that run where all conditions hold."""
        open_ = [c for c in map(self.known.simplify, conditions) if not _is_true(c)]
        if not open_:
            yield
            return
        with self.scope(), T.If(tirx.all(*open_)), T.Then():
            yield

    @contextmanager
    def scope(self) -> Iterator[None]:
        """What is computed or declared inside is known inside alone: code that never runs is dropped."""
        memo, views = dict(self._memo), dict(self._views)
        yield
        self._memo, self._views = memo, views

    def bind(self, value: Any, extent: int) -> Any:
        """A name for an integer between 0 and `extent`."""
        value = self.known.simplify(value)
        if isinstance(value, (tirx.IntImm, tirx.Var)):
            return value
        var = T.Bind(value)
        self.bound(var, extent)
        return var

    def split(self, index: Any, extents: Sequence[int]) -> list[Any]:
        """The coordinates of a row's index, which lies inside."""
        result: list[Any] = []
        rest, left = index, math.prod(extents)
        for extent in extents:
            left //= extent
            result.append(self.bind(tirx.floordiv(rest, left), extent) if extent > 1 else tirx.const(0, "int32"))
            rest = tirx.floormod(rest, left) if left > 1 else tirx.const(0, "int32")
        return result

    def local(self, dtype: str, name: str = "v", size: int = 0) -> Any:
        """Registers for the thread's elements, or for `size` of another kind."""
        return IRBuilder.name(name, T.alloc_buffer((size or self.lanes,), dtype, scope="local", layout=None))

    def each_lane(self, write: Callable[[Callable[[Any], Any]], None]) -> None:
        """Writes statements for every lane; they get a function that puts the lane into an expression."""
        if self.lanes == 1:
            write(lambda e: e)
            return
        with T.unroll(0, self.lanes) as at:
            write(lambda e: substitute(e, {self.lane: at}))

    def keep(self, value: Any, dtype: str, name: str = "v") -> Any:
        """Computes a value now; returns what reads it."""
        if any(self._follows(guard) for guard in self._guards):
            return value
        local = self.local(dtype, name)
        with self._guarded():
            self._into(local, value)
        return local[self.lane]

    def store(self, buffer: Any, indices: Sequence[Any], value: Any) -> None:
        """Writes a value of every lane to a parameter's buffer."""
        flat, offset = self.view(buffer), self.offset(buffer, indices)
        base = self.vector_base(buffer, offset)
        if base is None:
            self.each_lane(lambda at: T.buffer_store(flat, at(value), [at(offset)]))
            return
        local = self.local(dtype_of(buffer))
        self._into(local, value)
        ramp = tirx.Ramp(base, 1, self.lanes)
        T.buffer_store(flat, local[tirx.Ramp(tirx.const(0, "int32"), 1, self.lanes)], [ramp])

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """The conditions under which an expression is computed, as those of statements."""
        if not self._guards:
            yield
            return
        with T.If(tirx.all(*self._guards)), T.Then():
            yield

    # -- values ----------------------------------------------------------------------------------------------------

    def value(self, expr: Any) -> Any:
        """The expression with what it reads: elements of parameters, values of stages."""

        def load(node: Any, mutator: Any) -> Any:
            indices = [mutator.mutate(index) for index in node.indices]
            if node.source in self.overrides:
                return self.overrides[node.source](indices)
            stage = self.graph.stages.get(node.source)
            return self.read(node.source, indices) if stage is None else self.stage(stage, indices)

        def call(node: Any, mutator: Any) -> Any:
            if not is_choice(node):
                return mutator.default_mutate(node)
            condition = self._condition(mutator.mutate(node.args[0]))
            if isinstance(condition, tirx.IntImm):
                return mutator.mutate(node.args[1 if int(condition) else 2])
            parts = []
            for arm, when in ((node.args[1], condition), (node.args[2], tirx.Not(condition))):
                self._guards.append(self._condition(when))
                parts.append(mutator.mutate(arm))
                self._guards.pop()
            return tirx.if_then_else(condition, *parts)

        return rewrite(expr, (ir.TensorLoad, load), (ir.Call, call))

    def stage(self, stage: Stage, indices: Sequence[Any]) -> Any:
        """The value of a stage at a point."""
        point = self._point(stage, indices)
        key = self._key(stage.buffer, *point)
        if key not in self._memo:
            if stage.reduced:
                (value,) = self.reduce(stage, [point])
            else:
                value = self.value(stage.at(point))
                # CUDA C says an operand twice for a maximum, often for exp: what it is must stand in a register.
                if not isinstance(value, (ir.TensorLoad, tirx.Cast)) or self.graph.is_output(stage):
                    value = self.keep(value, stage.dtype, str(stage.buffer.name) + "_")
            self._memo[key] = value
            if stage.buffer in self.also:
                with self._guarded():
                    self.also[stage.buffer](point, value)
        return self._memo[key]

    def reduce(self, stage: Stage, points: Sequence[Sequence[Any]]) -> list[Any]:
        """The values of a reduction at some points, step by step for all of them."""
        if any(self._follows(guard) for guard in self._guards):
            raise Declined(f"{stage.buffer.name} is reduced for some lanes of a thread only")
        sums = [self.local(stage.dtype, str(stage.buffer.name) + "_") for _ in points]
        with self._guarded(), self.scope():
            guards, self._guards = self._guards, []
            for local in sums:
                self._into(local, stage.init)
            self._steps(stage, points, sums)
            self._guards = guards
        values = [local[self.lane] for local in sums]
        for point, value in zip(points, values, strict=True):
            self._memo[self._key(stage.buffer, *self._point(stage, point))] = value
        return values

    def _steps(self, stage: Stage, points: Sequence[Sequence[Any]], sums: Sequence[Any]) -> None:
        extents = [extent for _, extent in stage.reduced]
        written = len(extents)
        while written and math.prod(extents[len(extents) - written :]) > _UNROLLED:
            written -= 1
        loops, inner = extents[: len(extents) - written], extents[len(extents) - written :]
        part = max((d for d in range(1, _INNER + 1) if loops[-1] % d == 0), default=1) if loops and not inner else 1

        def step(at: Sequence[Any]) -> None:
            for point, local in zip(points, sums, strict=True):

                def element(_: Sequence[Any], local: Any = local) -> Any:
                    return local[self.lane]

                self.overrides[stage.buffer] = element
                term = self.value(stage.at(point, at))
                del self.overrides[stage.buffer]
                self._into(local, term)

        def nest(outer: list[Any], left: Sequence[int]) -> None:
            if left:
                last = part if len(left) == 1 else 1
                with T.serial(0, left[0] // last) as i, self.scope():
                    self.bound(i, left[0] // last)
                    if part > 1 and len(left) == 1:
                        for j in range(part):
                            nest([*outer, i * part + j], [])
                    else:
                        nest([*outer, i], left[1:])
                return
            for at in itertools.product(*map(range, inner)):
                step([*outer, *at])

        nest([], loops)

    def _into(self, local: Any, value: Any) -> None:
        if self.lanes > 1 and is_choice(value) and not self._follows(value.args[0]):
            with T.If(value.args[0]):
                for frame, arm in ((T.Then, value.args[1]), (T.Else, value.args[2])):
                    with frame():
                        self._into(local, arm)
            return
        self.each_lane(lambda at: T.buffer_store(local, at(value), [at(self.lane)]))

    def read(self, buffer: Any, indices: Sequence[Any]) -> Any:
        """An element of a parameter."""
        flat, offset = self.view(buffer), self.offset(buffer, indices)
        base = self.vector_base(buffer, offset)
        if base is None or any(self._follows(guard) for guard in self._guards):
            return flat[offset]
        key = self._key(buffer, base)
        if key not in self._memo:
            local = self.local(dtype_of(buffer), str(buffer.name) + "_")
            with self._guarded():
                value = flat[tirx.Ramp(base, 1, self.lanes)]
                T.buffer_store(local, value, [tirx.Ramp(tirx.const(0, "int32"), 1, self.lanes)])
            self._memo[key] = local[self.lane]
        return self._memo[key]

    def offset(self, buffer: Any, indices: Sequence[Any]) -> Any:
        """Where an element lies in a buffer that is one row."""
        total: Any = tirx.const(0, "int32")
        for index, extent in zip(indices, shape_of(buffer), strict=True):
            total = total * extent + index
        return self.known.simplify(total)

    def vector_base(self, buffer: Any, offset: Any) -> Any:
        """Where the lanes begin if they lie beside each other and a vector's load may begin there, else None."""
        if self.lanes == 1 or dtype_of(buffer) not in _VECTORS:
            return None
        if self.lanes * bytes_of(dtype_of(buffer)) > VECTOR_BYTES:
            return None
        base = self.known.simplify(substitute(offset, {self.lane: 0}))
        if not self.known.simplify(offset - base).same_as(self.lane):
            return None
        at = self.known.modular_set(base)
        whole = int(at.coeff) % self.lanes == 0 and int(at.base) % self.lanes == 0
        return base if whole else None

    def _point(self, stage: Stage, indices: Sequence[Any]) -> list[Any]:
        """Simplified; a position on an axis of one element is 0."""
        zero = tirx.const(0, "int32")
        return [
            zero if extent == 1 else self.known.simplify(_expr(index))
            for index, extent in zip(indices, stage.shape, strict=True)
        ]

    def _key(self, buffer: Any, *exprs: Any) -> Any:
        return buffer, *(tvm_ffi.structural_hash(e) for e in (*exprs, *self._guards))

    def _condition(self, condition: Any) -> Any:
        """Simplified, without the lane where all lanes agree. TVM folds comparisons of floats that NaN tells apart."""
        floats: list[Any] = []
        tvm_ffi.structural_walk(condition, [(ir.TensorLoad, lambda e: _note(e, floats))])
        if floats:
            return condition
        condition = self.known.simplify(condition)
        if mentions(condition, [self.lane]) and not self._follows(condition):
            return self.known.simplify(substitute(condition, {self.lane: 0}))
        return condition

    def _follows(self, expr: Any) -> bool:
        """Whether lanes differ in an expression."""
        if not mentions(expr, [self.lane]):
            return False
        first = substitute(expr, {self.lane: 0})
        return not tvm_ffi.structural_equal(self.known.simplify(expr), self.known.simplify(first))


def is_choice(expr: Any) -> bool:
    """Whether an expression computes one of two others, and not both."""
    return isinstance(expr, ir.Call) and isinstance(expr.op, Op) and expr.op.same_as(IF_THEN_ELSE)


def mentions(expr: Any, names: Sequence[Any]) -> bool:
    """Whether an expression holds one of these variables."""
    found: list[Any] = []

    def seen(var: Any) -> None:
        if any(var.same_as(name) for name in names):
            found.append(var)

    tvm_ffi.structural_walk(expr, [(tirx.Var, seen)])
    return bool(found)


def _note(load: Any, floats: list[Any]) -> None:
    if "float" in str(load.ty.dtype):
        floats.append(load)


def _expr(value: Any) -> Any:
    return tirx.const(value, "int32") if isinstance(value, int) else value


def _is_true(condition: Any) -> bool:
    return isinstance(condition, tirx.IntImm) and bool(int(condition))


__all__ = ["VECTOR_BYTES", "Kernel", "build", "bytes_of", "is_choice", "mentions"]
