"""Puts assembler in the place of the innermost loops of a binary convolution in lanes, see `bnncc.targets.in_order`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Call, Range, StringImm, TensorLoad
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV
from tvm.sym import Analyzer

from bnncc.targets.in_order import Loop, Place, Step, can_reach, llvm_function

#: Steps of the reduction in one iteration: what a loop costs is little beside them.
_STEPS = 8


def use_assembler(sch: Schedule, outer: LoopRV) -> None:
    """Replaces the loops from `outer` inwards: those over the reduction, then those over a tile and its lanes.

    They stay where they sum no bits of two tensors, or where the registers do not hold a tile. Nothing can be scheduled
    around them any more: at the end of a row the tile depends on loops outside.
    """
    body = _Loops(sch.get(outer)).assembled()
    if body is not None:
        sch.state.replace(sch.get_sref(outer), body)


class _Loops:
    """Loops around the update of sums, and that in terms of these loops and of those outside."""

    def __init__(self, outer: Any) -> None:
        self.loops: list[Any] = []
        inside = outer
        while isinstance(inside, tirx.For):
            self.loops.append(inside)
            inside = inside.body
        axes = dict(zip((iv.var for iv in inside.block.iter_vars), inside.iter_values, strict=True))
        self.update = _replaced(inside.block.body, axes)
        self.predicate = inside.predicate
        rows, columns, words, _, self.row, self.column, *_, self.channel, self.lane = self.loops
        # Steps along the window's width come behind each other: they share pixels.
        self.reduced = [rows, words, columns]

    def assembled(self) -> Any:
        """A block that does the same, for a whole tile or for what there is of it at the end of a row; None: no."""
        operands = self._operands()
        if operands is None:
            return None
        self.x, self.w = operands
        columns = int(self.column.extent)
        size = int(self.row.extent) * columns * int(self.channel.extent)
        sums = tirx.decl_buffer((size, int(self.lane.extent)), "uint8", "sums", scope="local")
        chosen = whole = self._call(sums, columns)
        if whole is None:
            return None
        if not isinstance(self.predicate, tirx.IntImm):
            chosen = self._call(sums, 1)
            for there in range(2, columns + 1):
                last = self._at(self.predicate, {self.column.loop_var: there - 1})
                chosen = tirx.IfThenElse(last, self._call(sums, there), chosen)
        reads, writes = (
            [tirx.BufferRegion(b, [Range(0, extent) for extent in b.shape]) for b in buffers]
            for buffers in ((self.update.buffer, self.x.load.source, self.w.load.source), (self.update.buffer,))
        )
        block = s_tir.SBlock([], reads, writes, "binary_products", chosen, alloc_buffers=[sums])
        return s_tir.SBlockRealize([], True, block)

    def _operands(self) -> tuple[_Operand, _Operand] | None:
        """Input and weights, if that is what the loops multiply, and if vectors of them lie in one piece."""
        count = self.update.value.b if isinstance(self.update.value, tirx.Add) else None
        differing = count.args[0] if isinstance(count, Call) else None
        sides = (differing.a, differing.b) if isinstance(differing, tirx.BitwiseXor) else ()
        if not sides or not all(isinstance(side, TensorLoad) for side in sides):
            return None
        x, w = (_Operand(side, self._strides(side)) for side in sides)
        plain = all(
            None not in operand.strides.values() and operand.strides[self.lane.loop_var] == 1 for operand in (x, w)
        )
        return (x, w) if plain else None

    def _strides(self, load: Any) -> dict[Any, Any]:
        """Bytes from one iteration of a loop to the next, by its variable; None where iterations differ in that."""
        shape = [int(e) for e in load.source.shape]
        found = {}
        for variable in (loop.loop_var for loop in self.loops):
            terms = [
                (_replaced(index, {variable: variable + 1}) - index) * math.prod(shape[n + 1 :])
                for n, index in enumerate(load.indices)
            ]
            stride = Analyzer().simplify(sum(terms[1:], terms[0]))
            found[variable] = int(stride) if isinstance(stride, tirx.IntImm) else None
        return found

    def _call(self, sums: Any, columns: int) -> Any:
        """The statement for so many pixels of a row; None if the registers do not hold them."""
        outer, inner = self._parts()
        pixels = [
            {self.row.loop_var: y, self.column.loop_var: x}
            for y, x in itertools.product(range(int(self.row.extent)), range(columns))
        ]
        channels = [{self.channel.loop_var: c} for c in range(int(self.channel.extent))]
        pointers = _Pointers()
        steps = []
        for step in inner:
            of_x = tuple(pointers.place(self.x, step | pixel) for pixel in pixels)
            of_w = tuple(pointers.place(self.w, step | channel) for channel in channels)
            steps.append(Step(of_x, of_w))
        loops = [
            Loop(iterations, tuple(operand.strides[variable] * by for operand, _ in pointers.bases))
            for variable, iterations, by in outer
        ]
        function = llvm_function(loops, steps, len(pointers.bases))
        if function is None:
            return None
        name, text = function
        loads = [sums[0, 0], *(self._load(operand.load, at) for operand, at in pointers.bases)]
        call = tirx.call_extern("int32", name, *map(tirx.address_of, loads))
        work = tirx.AttrStmt(tirx.const(0, "int32"), "pragma_import_llvm", StringImm(text), tirx.Evaluate(call))
        tile = [pixel | channel for pixel in pixels for channel in channels]
        return tirx.SeqStmt(
            [
                *(self._copy(sums, n, at, back=False) for n, at in enumerate(tile)),
                work,
                *(self._copy(sums, n, at, back=True) for n, at in enumerate(tile)),
            ]
        )

    def _copy(self, sums: Any, n: int, at: Mapping[Any, int], *, back: bool) -> Any:
        """One of the tile's sums into `sums`, or back: of a tensor that is handed to a function TVM keeps all of it."""
        lane = tirx.Var("lane", "int32")
        own, tile = (
            (sums, [n, lane]),
            (self.update.buffer, self._indices(self.update, {**at, self.lane.loop_var: lane})),
        )
        (source, read), (goal, written) = (own, tile) if back else (tile, own)
        store = tirx.BufferStore(goal, tirx.BufferLoad(source, read), written)
        return tirx.For(lane, 0, self.lane.extent, tirx.ForKind.VECTORIZED, store)

    def _parts(self) -> tuple[list[tuple[Any, int, int]], list[dict[Any, int]]]:
        """The loops that stay loops (variable, iterations, its values from one to the next), and the steps inside."""
        room = _STEPS
        outer: list[tuple[Any, int, int]] = []
        inner: list[range] = []
        for loop in reversed(self.reduced):
            whole = int(loop.extent)
            part = max(d for d in range(1, min(whole, room) + 1) if whole % d == 0)
            room = room // part if part == whole else 1
            inner.insert(0, range(part))
            if part < whole:
                outer.insert(0, (loop.loop_var, whole // part, part))
        variables = [loop.loop_var for loop in self.reduced]
        return outer, [dict(zip(variables, at, strict=True)) for at in itertools.product(*inner)]

    def _load(self, load: Any, at: Mapping[Any, Any]) -> Any:
        return tirx.BufferLoad(load.source, self._indices(load, at))

    def _indices(self, access: Any, at: Mapping[Any, Any]) -> list[Any]:
        return [self._at(index, at) for index in access.indices]

    def _at(self, expr: Any, at: Mapping[Any, Any]) -> Any:
        """An expression in some iteration; loops that are not named are in their first one."""
        first = {loop.loop_var: 0 for loop in self.loops}
        values = {v: tirx.const(i, "int32") if isinstance(i, int) else i for v, i in (first | dict(at)).items()}
        return _replaced(expr, values)


class _Operand:
    """A tensor's access in the loops. strides: by loop variable, in bytes."""

    def __init__(self, load: Any, strides: dict[Any, Any]) -> None:
        self.load, self.strides = load, strides

    def distance(self, a: Mapping[Any, int], b: Mapping[Any, int]) -> int:
        """Bytes from one iteration's element to another's."""
        return sum(self.strides[v] * i for v, i in b.items()) - sum(self.strides[v] * i for v, i in a.items())


class _Pointers:
    """Addresses: operands in some iterations, and others as distances from them."""

    def __init__(self) -> None:
        self.bases: list[tuple[_Operand, Mapping[Any, int]]] = []

    def place(self, operand: _Operand, at: Mapping[Any, int]) -> Place:
        for number, (base, first) in enumerate(self.bases):
            if base is operand and can_reach(offset := operand.distance(first, at)):
                return number, offset
        self.bases.append((operand, at))
        return len(self.bases) - 1, 0


def _replaced(expr: Any, values: Mapping[Any, Any]) -> Any:
    return tvm_ffi.structural_map(expr, (tirx.Var, lambda var: values.get(var, var)))
