"""From global to shared memory: the windows and the weights of a tile, step by step of the depth.

Rows lie ``depth + 4`` words apart, an odd number of 16-byte parts, so that the eight rows that an ``ldmatrix`` reads at
once lie in different banks. Where there is ``cp.async``, several steps are under way while one is multiplied; elsewhere
(sm_75) the next step waits in registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
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

    def run(self, shared: Any, thread: Any, row: Any, column: Any, group: Any, multiply: Callable[[Any], None]) -> None:
        """Writes the loop over the depth; `multiply` writes what is done with the step whose words begin at its
        argument."""
        self.shared, self.thread, self.row, self.column, self.group = shared, thread, row, column, group
        self.base = T.bind(T.cuda.cvta_generic_to_shared(shared.data))
        self.windows = as_line(self.gemm.x)
        self.weights = as_line(self.gemm.w)
        self._prepare()
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

    # A thread copies a run of every so many-th row, always that of the same place in the step: what a step changes is
    # one place in the window for all of its runs. Rows and columns beyond the last copy the last one again: nobody
    # looks at their sums.

    @property
    def _runs(self) -> int:
        """Runs of a row in a step."""
        return self.tile.depth // self.run_words

    @property
    def _rows_at_once(self) -> int:
        return self.tile.threads // self._runs

    @property
    def _registers(self) -> int:
        passes = (math.ceil(rows / self._rows_at_once) for rows in (self.window_rows, self.weight_rows))
        return sum(passes) * self.run_words

    def _prepare(self) -> None:
        """Computes what no step changes."""
        gemm, tile, zero = self.gemm, self.tile, tirx.const(0)
        self.k = T.bind(tirx.floormod(self.thread, self._runs) * self.run_words)
        self.r = T.bind(tirx.floordiv(self.thread, self._runs))
        self.own_windows: list[tuple[Any, tuple[Any, ...]]] = []  # the window's first word, pixel
        for r, plane in self._rows(self.window_rows, tile.rows):
            row = tirx.min(self.row + r, gemm.rows - 1) if gemm.rows % tile.rows else self.row + r
            pixel = tuple(T.bind(at) for at in gemm.pixel(row))
            first = gemm.place(pixel, (zero, zero, zero), self.group, plane)
            self.own_windows.append((T.bind(first), pixel))
        self.own_weights: list[Any] = []
        whole = gemm.columns % tile.columns == 0 and gemm.planes[1] == 1
        for number, (r, plane) in enumerate(self._rows(self.weight_rows, tile.columns)):
            if number and whole:
                self.own_weights.append(self.own_weights[0] + number * self._rows_at_once * gemm.total_depth)
                continue
            column = self.column + r if whole else tirx.min(self.column + r, gemm.columns - 1)
            self.own_weights.append(T.bind(gemm.weight(self.group * gemm.columns + column, zero, plane)))

    def _rows(self, rows: int, of_plane: int) -> Iterator[tuple[Any, Any]]:
        """This thread's rows of a matrix: the row within its plane, and the plane."""
        for first in range(0, rows, self._rows_at_once):
            r = self.r + first
            yield (r, 0) if rows == of_plane else (tirx.floormod(r, of_plane), tirx.floordiv(r, of_plane))

    def _copy(self, step: Any, base: Any, one: Callable[..., None]) -> None:
        """Has `one` copy every run of the step that is this thread's; base: where the step lies in shared memory."""
        gemm, depth, zero = self.gemm, self.tile.depth, tirx.const(0)
        at = T.bind(step * depth + self.k)
        place = tuple(T.bind(index) for index in gemm.step(at))
        nowhere = (zero, zero, zero)
        further = T.bind(gemm.place(nowhere, place) - gemm.place(nowhere, nowhere))
        ends = gemm.total_depth % depth != 0
        within = T.bind(at < gemm.total_depth) if ends else tirx.const(True, "bool")
        to = T.bind(base + self.r * self.pitch + self.k)
        runs: list[tuple[Any, Any, Any, Any, int]] = []  # row, memory, place, condition, rows of the matrix
        for number, (first, pixel) in enumerate(self.own_windows):
            image = gemm.inside(pixel, place)
            inside = within if image is None else tirx.all(within, image) if ends else image
            runs.append((number * self._rows_at_once, self.windows, first + further, inside, self.window_rows))
        further = T.bind(gemm.weight(zero, at))
        for number, first in enumerate(self.own_weights):
            runs.append((number * self._rows_at_once, self.weights, first + further, within, self.weight_rows))
        register = 0
        for r, line, where, inside, rows in runs:
            idle = self.tile.threads % self._runs != 0
            last = r + self._rows_at_once > rows
            limit = min(self._rows_at_once, rows - r)
            start = to + r * self.pitch + (self.window_rows * self.pitch if line is self.weights else 0)
            with guarded(self.r < limit, idle or last):
                one(start, line, T.bind(where), T.bind(inside), register)
            register += self.run_words

    def address(self, word: Any) -> Any:
        """The address of a word in the window of shared memory, as instructions take it."""
        return self.base + tirx.Cast("uint32", word * 4)

    def _async(self, to: Any, line: Any, where: Any, inside: Any, _: int) -> None:
        size = 4 * self.run_words
        copy = T.ptx[f"cp.async.{'cg' if size == 16 else 'ca'}.shared.global"]
        taken = tirx.Select(inside, tirx.const(size, "uint32"), tirx.const(0, "uint32"))
        T.evaluate(copy(self.address(to), T.address_of(line[where]), size, taken))

    def _into_registers(self, _: Any, line: Any, where: Any, inside: Any, register: int) -> None:
        count, zero = self.run_words, tirx.const(0, str(line.dtype))
        if count == 1:
            value = tirx.if_then_else(inside, line[where], zero)
            T.buffer_store(self.ahead, tirx.reinterpret("uint32", value), [register])
            return
        # TVM is to see that the run begins at a multiple of its length.
        begin = T.bind(tirx.floordiv(where, count)) * count
        run = tirx.if_then_else(inside, line[tirx.Ramp(begin, 1, count)], tirx.Broadcast(zero, count))
        T.buffer_store(self.ahead, tirx.reinterpret(f"uint32x{count}", run), [tirx.Ramp(register, 1, count)])

    def _from_registers(self, to: Any, line: Any, where: Any, inside: Any, register: int) -> None:
        for word in range(self.run_words):
            value = tirx.reinterpret(str(self.shared.dtype), self.ahead[register + word])
            T.buffer_store(self.shared, value, [to + word])


def as_line(buffer: Any) -> Any:
    """The same memory with one axis; bytes as words."""
    size = math.prod(int(extent) for extent in buffer.shape)
    if str(buffer.dtype) in ("int8", "uint8"):
        return T.decl_buffer((size // 4,), "uint32", data=buffer.data)
    return T.decl_buffer((size,), str(buffer.dtype), data=buffer.data)
