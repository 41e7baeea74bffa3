"""From global to shared memory: the windows and the weights of a tile, step by step of the depth.

Rows lie ``depth + 4`` words apart, an odd number of 16-byte parts, so that the eight rows that an ``ldmatrix`` reads at
once lie in different banks. Where there is ``cp.async``, several steps are under way while one is multiplied; elsewhere
(sm_75) the next step waits in registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from .base import barrier, guarded
from .gemm import Gemm, Tile

_SKEW = 4


class Copies:
    """The copies of one kernel: of each step the 32-bit words of the windows, then of the weights, plane by plane."""

    def __init__(self, gemm: Gemm, tile: Tile, asynchronous: bool) -> None:
        self.gemm, self.tile, self.asynchronous = gemm, tile, asynchronous
        self.pitch = tile.depth + _SKEW
        #: Rows of both matrices in shared memory.
        self.window_rows, self.weight_rows = tile.rows * gemm.planes[0], tile.columns * gemm.planes[1]
        self.stage_words = (self.window_rows + self.weight_rows) * self.pitch
        self.steps = math.ceil(gemm.total_depth / tile.depth) if tile.depth else 0
        #: Words that lie beside each other in both matrices wherever a copy begins.
        self.run_words = math.gcd(gemm.run, tile.depth, 4) if tile.depth else 1

    @property
    def words(self) -> int:
        """Of shared memory."""
        return self.tile.stages * self.stage_words

    def run(
        self, shared: Any, thread: Any, row: Any, column: Any, group: Any, multiply: Callable[[Any], None]
    ) -> None:
        """Writes the loop over the depth; `multiply` writes what is done with the step whose words begin at its
        argument."""
        self.shared, self.thread, self.row, self.column, self.group = shared, thread, row, column, group
        self.base = T.bind(T.cuda.cvta_generic_to_shared(shared.data))
        self.windows = as_line(self.gemm.x)
        self.weights = as_line(self.gemm.w)
        if self.asynchronous:
            self._pipelined(multiply)
        else:
            self._ahead_in_registers(multiply)

    def _pipelined(self, multiply: Callable[[Any], None]) -> None:
        stages, commit = self.tile.stages, T.ptx["cp.async.commit_group"]
        for step in range(stages - 1):
            self._copy(tirx.const(step), tirx.const(step * self.stage_words), self._async)
            T.evaluate(commit())
        with T.serial(0, self.steps) as step:
            if stages == 1:
                self._copy(step, tirx.const(0), self._async)
                T.evaluate(commit())
            T.evaluate(T.ptx["cp.async.wait_group"](max(stages - 2, 0)))
            barrier()
            if stages > 1:
                ahead = step + (stages - 1)
                with T.If(ahead < self.steps), T.Then():
                    self._copy(ahead, tirx.floormod(ahead, stages) * self.stage_words, self._async)
                T.evaluate(commit())  # of nothing at the end, so that the count of groups stays
            multiply(tirx.floormod(step, stages) * self.stage_words)

    def _ahead_in_registers(self, multiply: Callable[[Any], None]) -> None:
        self.ahead = T.alloc_buffer((self._registers,), "uint32", scope="local")
        IRBuilder.name("ahead", self.ahead)
        self._copy(tirx.const(0), tirx.const(0), self._into_registers)
        self._copy(tirx.const(0), tirx.const(0), self._from_registers)
        with T.serial(0, self.steps) as step:
            barrier()
            with T.If(step + 1 < self.steps), T.Then():
                self._copy(step + 1, tirx.const(0), self._into_registers)
            multiply(tirx.floormod(step, 2) * self.stage_words)
            with T.If(step + 1 < self.steps), T.Then():
                self._copy(step + 1, tirx.floormod(step + 1, 2) * self.stage_words, self._from_registers)

    # -- the words of a step -----------------------------------------------------------------------------------------

    def _runs(self, rows: int) -> int:
        """Runs that a thread copies of a matrix with so many rows."""
        return math.ceil(rows * self.tile.depth / self.run_words / self.tile.threads)

    @property
    def _registers(self) -> int:
        return (self._runs(self.window_rows) + self._runs(self.weight_rows)) * self.run_words

    def _copy(self, step: Any, base: Any, one: Callable[..., None]) -> None:
        """Has `one` copy every run of the step that is this thread's; base: where the step lies in shared memory."""
        tile, gemm = self.tile, self.gemm

        def window(r: Any, at: Any) -> tuple[Any, Any]:
            plane, r = (0, r) if gemm.planes[0] == 1 else (tirx.floordiv(r, tile.rows), tirx.floormod(r, tile.rows))
            where, inside = gemm.source(self.row + r, self.group, at, plane)
            inside = tirx.const(True, "bool") if inside is None else inside
            if gemm.rows % tile.rows:
                inside = tirx.all(inside, self.row + r < gemm.rows)
            return where, inside

        def weight(r: Any, at: Any) -> tuple[Any, Any]:
            plane = 0
            if gemm.planes[1] > 1:
                plane, r = tirx.floordiv(r, tile.columns), tirx.floormod(r, tile.columns)
            channel = self.group * gemm.columns + self.column + r
            inside: Any = tirx.const(True, "bool")
            if gemm.columns % tile.columns:
                inside = self.column + r < gemm.columns
            return gemm.weight(channel, at, plane), inside

        self._matrix(self.window_rows, step, base, window, self.windows, 0, one)
        first = self._runs(self.window_rows) * self.run_words
        self._matrix(self.weight_rows, step, base + self.window_rows * self.pitch, weight, self.weights, first, one)

    def _matrix(
        self, rows: int, step: Any, base: Any, source: Callable[..., tuple[Any, Any]], line: Any, first: int, one: Any
    ) -> None:
        tile, runs = self.tile, self.tile.depth // self.run_words
        for number in range(self._runs(rows)):
            run = number * tile.threads + self.thread
            r, k = tirx.floordiv(run, runs), tirx.floormod(run, runs) * self.run_words
            at = step * tile.depth + k
            where, inside = source(r, at)
            if self.gemm.total_depth % tile.depth:
                inside = tirx.all(inside, at < self.gemm.total_depth)
            inside = T.bind(inside)
            where = T.bind(tirx.Select(inside, where, tirx.const(0)))
            with guarded(run < rows * runs, rows * runs % tile.threads != 0):
                one(base + r * self.pitch + k, line, where, inside, first + number * self.run_words)

    def address(self, word: Any) -> Any:
        """The address of a word in the window of shared memory, as instructions take it."""
        return self.base + tirx.Cast("uint32", word * 4)

    def _async(self, to: Any, line: Any, where: Any, inside: Any, _: int) -> None:
        size = 4 * self.run_words
        copy = T.ptx[f"cp.async.{'cg' if size == 16 else 'ca'}.shared.global"]
        taken = tirx.Select(inside, tirx.const(size, "uint32"), tirx.const(0, "uint32"))
        T.evaluate(copy(self.address(to), T.address_of(line[where]), size, taken))

    def _into_registers(self, _: Any, line: Any, where: Any, inside: Any, register: int) -> None:
        for word in range(self.run_words):
            value = tirx.if_then_else(inside, line[where + word], tirx.const(0, str(line.dtype)))
            T.buffer_store(self.ahead, tirx.reinterpret("uint32", value), [register + word])

    def _from_registers(self, to: Any, line: Any, where: Any, inside: Any, register: int) -> None:
        for word in range(self.run_words):
            T.buffer_store(self.shared, tirx.reinterpret("int32", self.ahead[register + word]), [to + word])


def as_line(buffer: Any) -> Any:
    """The same memory with one axis; bytes as words."""
    size = math.prod(int(extent) for extent in buffer.shape)
    if str(buffer.dtype) in ("int8", "uint8"):
        return T.decl_buffer((size // 4,), "uint32", data=buffer.data)
    return T.decl_buffer((size,), str(buffer.dtype), data=buffer.data)
