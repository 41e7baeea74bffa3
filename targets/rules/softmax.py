"""Softmax: one row after the other, in three passes while it is in the first-level cache.

    top = max(x[:])                             in lanes, folded in the end
    result[:] = exp(x[:] - top)                 their sum likewise, while they are in registers; the result's memory
                                                comes into the cache meanwhile
    result[:] = result[:] * (1 / sum)           and the elementwise stages behind it

The first pass of a row runs in the second one of the row before: the one waits for memory, the other for arithmetic,
and their folds for each other. A vector here is several of the machine's, so that they hide each other's latency. What
a row has beyond whole vectors lies, filled up with −inf, in one of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir.expr import TensorLoad
from tvm.s_tir import Schedule
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from bnncc.dialect.functions import exp_of_negative

from .base import TASK_WORK, Rule, Stages
from .written import over, parts, store, substituted

#: Vector operations, about, for one of the elements: the exponential function and what is around it.
_WORK = 24
#: Rows of a task, at most.
_TOGETHER = 8
#: Where maxima begin: the lowest finite float.
_LOWEST = -3.4028234663852886e38
#: Registers, of those that the target has, for each of the machine's vectors that are computed at once.
_REGISTERS = 8


class Softmax(Rule):
    """Softmax over the rows of a matrix, with the elementwise stages around it."""

    name = "softmax"

    def __call__(self, func: tirx.PrimFunc) -> Schedule | str:
        sch = Schedule(func)
        stages = Stages(sch)
        steps = [b for b in stages.blocks if stages.role(b).startswith("softmax.")]
        if not steps or len(stages.outputs) != 1:
            return "no softmax with one result"
        (main,) = stages.outputs
        stages.inline(main)
        if len(sch.get(main).iter_vars) != 2 or len(stages.blocks) != len(steps) + 1:
            return "not a softmax alone"
        row, powers, scale = (sch.get(stages.of(f"softmax.{step}")[0]) for step in ("row", "exp", "scale"))
        return Schedule(_Kernel(func, row, powers, scale, sch.get(main), self._lanes()).build())

    def _lanes(self) -> int:
        return self.target.float_lanes * self.target.registers // _REGISTERS


def _add(a: Any, b: Any) -> Any:
    return a + b


class _Kernel:
    """The kernel of one softmax, from the blocks that read its rows, give its powers and scale, and what follows."""

    def __init__(self, func: tirx.PrimFunc, row: Any, powers: Any, scale: Any, main: Any, lanes: int) -> None:
        self.func, self.row, self.main = func, row, main
        self.result = main.writes[0].source
        self.of_powers, self.of_scale = powers.writes[0].source, scale.writes[0].source
        self.rows, self.size = (int(iv.dom.extent) for iv in main.iter_vars)
        self.lanes = min(lanes, max(2, 1 << self.size.bit_length() - 1))
        self.whole, self.rest = divmod(self.size, self.lanes)

    def build(self) -> tirx.PrimFunc:
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"tirx.noalias": True})
            for param in self.func.params:
                T.arg(param.name, param)
            work = self.rows * (self.whole + bool(self.rest)) * _WORK
            together = max(g for g in range(1, _TOGETHER + 1) if self.rows % g == 0)
            loop = T.parallel if work >= 2 * TASK_WORK and self.rows > together else T.serial
            with loop(0, self.rows // together) as task:
                first = task * together
                ahead = self._highest(first)
                with T.serial(0, together) as row:
                    n = self.n = first + row
                    self.next = tirx.min(n + 1, first + together - 1)
                    # Floats lie in the result until they are what it is to hold.
                    fits = str(self.result.dtype) == "float32"
                    self.powers = self.result if fits else T.alloc_buffer((1, self.size), "float32", scope="local")
                    self.power_row = n if fits else 0
                    self._fill_rest()
                    top = self._highest_of_all(ahead)
                    total = self._sum_of_powers(top, ahead)
                    T.buffer_store(total, tirx.const(1.0, "float32") / total[0], [0])
                    over(self.size - self.rest, self.lanes, lambda at, size: self._scaled(total, at, size))
                    for at, size in parts(self.rest, self.lanes):
                        self._scaled(total, self.whole * self.lanes + at, size)
        return builder.get()

    def _vector(self, value: float) -> Any:
        return tirx.Broadcast(tirx.const(value, "float32"), self.lanes)

    def _read(self, row: Any, column: Any) -> Any:
        return substituted(self.row.body.value, self.row, (row, column))

    def _fill_rest(self) -> None:
        """The last vector of a row that has no whole number of them."""
        if self.rest:
            self.last = T.alloc_buffer((self.lanes,), "float32", scope="local")
            T.buffer_store(self.last, self._vector(-math.inf), [self._lanes()])
            first = self.whole * self.lanes
            for at, size in parts(self.rest, self.lanes):
                store(self.last, lambda i: self._read(self.n, first + i), lambda i: [i], at, size)

    def _lanes(self, vector: Any = 0) -> Any:
        return tirx.Ramp(vector * self.lanes, 1, self.lanes)

    def _value(self, vector: Any, row: Any) -> Any:
        """One vector of a row, in memory of its own."""
        if isinstance(vector, int) and vector == self.whole:
            return self.last[self._lanes()]
        value = T.alloc_buffer((self.lanes,), "float32", scope="local")
        store(value, lambda i: self._read(row, vector * self.lanes + i), lambda i: [i], 0, self.lanes)
        return value[self._lanes()]

    def _power(self, vector: Any, top: Any) -> Any:
        power = exp_of_negative(self._value(vector, self.n) - tirx.Broadcast(top[0], self.lanes))
        if isinstance(vector, int) and vector == self.whole:
            T.buffer_store(self.last, power, [self._lanes()])
            return self.last[self._lanes()]
        T.buffer_store(self.powers, power, [self.power_row, self._lanes(vector)])
        return self.powers[self.power_row, self._lanes(vector)]

    def _kept(self, start: float) -> Any:
        kept = T.alloc_buffer((self.lanes,), "float32", scope="local")
        T.buffer_store(kept, self._vector(start), [self._lanes()])
        return kept

    def _take(self, kept: Any, fold: Callable[[Any, Any], Any], value: Any) -> None:
        T.buffer_store(kept, fold(kept[self._lanes()], value), [self._lanes()])

    def _highest(self, row: Any) -> Any:
        """The highest values of the whole vectors of a row, lane by lane."""
        kept = self._kept(_LOWEST)
        if self.whole:
            with T.serial(0, self.whole) as vector:
                self._take(kept, tirx.max, self._value(vector, row))
        return kept

    def _highest_of_all(self, ahead: Any) -> Any:
        """A buffer whose first element is the highest value of this row, from its `_highest`, which is reset."""
        kept = T.alloc_buffer((self.lanes,), "float32", scope="local")
        T.buffer_store(kept, ahead[self._lanes()], [self._lanes()])
        T.buffer_store(ahead, self._vector(_LOWEST), [self._lanes()])
        if self.rest:
            self._take(kept, tirx.max, self.last[self._lanes()])
        return self._folded(kept, tirx.max)

    def _sum_of_powers(self, top: Any, ahead: Any) -> Any:
        """A buffer whose first element is the sum of the powers; meanwhile, `ahead` becomes the next row's."""
        kept = self._kept(0.0)
        if self.whole:
            with T.serial(0, self.whole) as vector:
                self._take(kept, _add, self._power(vector, top))
                self._take(ahead, tirx.max, self._value(vector, self.next))
        if self.rest:
            self._take(kept, _add, self._power(self.whole, top))
        return self._folded(kept, _add)

    def _folded(self, kept: Any, fold: Callable[[Any, Any], Any]) -> Any:
        width = self.lanes
        while width > 1:
            width //= 2
            first, second = (tirx.Ramp(at, 1, width) if width > 1 else at for at in (0, width))
            T.buffer_store(kept, fold(kept[first], kept[second]), [first])
        return kept

    def _scaled(self, scale: Any, at: Any, size: int) -> None:
        """Results from column `at` on."""
        rest = isinstance(at, int) and at >= self.whole * self.lanes

        def loaded(load: Any, column: Any) -> Any:
            if load.source.same_as(self.of_powers):
                return self.last[column - self.whole * self.lanes] if rest else self.powers[self.power_row, column]
            return scale[0] if load.source.same_as(self.of_scale) else load

        def result(column: Any) -> Any:
            expr = substituted(self.main.body.value, self.main, (self.n, column))
            return tvm_ffi.structural_map(expr, (TensorLoad, lambda load: loaded(load, column)))

        store(self.result, result, lambda column: [self.n, column], at, size)
