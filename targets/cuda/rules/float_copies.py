"""From global to shared memory: the windows and the weights of a float product, step by step of the depth.

    windows, channels in fours    [row][depth], 16 bytes at a time, rows ``depth + 4`` values apart
    windows, any channels         [depth][row], value by value: a lane has a row, and the places in its window that a
                                  step reads are constants where a step is whole rows of the window
    weights                       [depth][column], 16 bytes at a time, as they lie in memory

Each way neighbouring lanes write, and the threads of a tile read, 16 bytes in different banks. Rows and columns beyond
the last copy the first one again: nobody looks at their sums. What lies beyond the end of the depth is 0, and so is the
padding around an image, which nobody stored.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T
from tvm.sym import Analyzer

from .base import guarded
from .copies import Copies
from .gemm import Gemm, Tile, flat
from .graph import substitute

#: Values of 16 bytes.
VECTOR = 4
#: Steps that are not whole rows of a window are so deep; whole rows may be at most the second.
_DEPTH, _MOST = 16, 40


@dataclass(frozen=True)
class Places:
    """Where the window of a pixel has its values, from the first: ``ky·down + kx·right + k·along``.

    window: (rows, columns, channels).
    """

    down: int
    right: int
    along: int
    window: tuple[int, int, int]

    @classmethod
    def of(cls, gemm: Gemm) -> Places:
        names = [axis for axis in gemm.axes if axis is not None]
        zeros = {axis: tirx.const(0) for axis in names}

        def at(values: dict[Any, Any]) -> int:
            return int(Analyzer().simplify(flat(gemm.x, [substitute(index, values) for index in gemm.x_indices])))

        first = at(zeros)  # before the image, where there is padding
        down, right, along = (
            0 if axis is None else at({**zeros, axis: tirx.const(1)}) - first for axis in gemm.axes[-3:]
        )
        return cls(down, right, along, (gemm.window_height, gemm.window_width, gemm.depth))

    def __call__(self, at: Any) -> Any:
        """Of a place in the depth, a number or an expression."""
        _, columns, channels = self.window
        divide, rest = (int.__floordiv__, int.__mod__) if isinstance(at, int) else (tirx.floordiv, tirx.floormod)
        position = divide(at, channels)
        places = divide(position, columns) * self.down + rest(position, columns) * self.right
        return places + rest(at, channels) * self.along

    def whole_rows(self) -> int:
        """The depth of a step of whole rows of the window, 0 if a row is too deep for one."""
        rows, columns, channels = self.window
        fitting = [n for n in range(1, rows + 1) if rows % n == 0 and n * columns * channels <= _MOST]
        return max(fitting, default=0) * columns * channels


def in_vectors(gemm: Gemm) -> bool:
    """Whether the windows' values lie in fours beside each other, wherever they begin."""
    return gemm.depth % VECTOR == 0 and int(gemm.x.shape[-1]) % VECTOR == 0


def depth_of(gemm: Gemm, deepest: int = _DEPTH) -> int:
    """How deep a step is."""
    if in_vectors(gemm):
        return min(deepest, gemm.total_depth)
    return Places.of(gemm).whole_rows() or min(deepest, gemm.total_depth)


class FloatCopies(Copies):
    """The copies of one kernel of 32-bit floats."""

    def __init__(self, gemm: Gemm, tile: Tile, asynchronous: bool) -> None:
        super().__init__(gemm, tile, asynchronous)
        self.places = Places.of(gemm)
        self.vectors = in_vectors(gemm)
        self.windows_words = tile.rows * (tile.depth + VECTOR) if self.vectors else tile.depth * tile.rows
        self.stage_words = self.windows_words + tile.depth * tile.columns
        self.weights_line = gemm.columns

    # -- what no step changes ----------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        tile, gemm, thread = self.tile, self.gemm, self.thread
        each = tile.depth // VECTOR
        # Run, row in the tile, depth in the step, first value, pixel.
        self.window_runs: list[tuple[Any, Any, Any, Any, tuple[Any, ...]]] = []
        if self.vectors:
            for number in range(math.ceil(tile.rows * each / tile.threads)):
                run = number * tile.threads + thread
                r, k = tirx.floordiv(run, each), tirx.floormod(run, each) * VECTOR
                self.window_runs.append((run, r, k, *self._first(r)))
        else:
            self.down = min(tile.rows, tile.threads)
            self.apart = tile.threads // self.down
            for number in range(tile.rows // self.down):
                r = tirx.floormod(thread, self.down) + number * self.down
                self.window_runs.append((None, r, None, *self._first(r)))
        across = tile.columns // VECTOR
        self.weight_runs: list[
            tuple[Any, Any, Any, Any]
        ] = []  # run, depth in the step, column in the tile, first value
        for number in range(math.ceil(tile.depth * across / tile.threads)):
            run = number * tile.threads + thread
            k, c = tirx.floordiv(run, across), tirx.floormod(run, across) * VECTOR
            column = self.column + c
            if gemm.columns % tile.columns:
                column = tirx.Select(column < gemm.columns, column, tirx.const(0))
            first = (self.group * gemm.total_depth + k) * self.weights_line + column
            self.weight_runs.append((run, k, c, T.bind(first)))

    def _first(self, r: Any) -> tuple[Any, tuple[Any, ...]]:
        """Where the window of a row of the tile begins, and the row's pixel if anybody asks for it."""
        row = self.row + r
        if self.gemm.rows % self.tile.rows:
            row = tirx.Select(row < self.gemm.rows, row, tirx.const(0))
        where, _ = self.gemm.source(row, self.group, tirx.const(0))
        return T.bind(where), tuple(T.bind(at) for at in self.gemm.pixel(row)) if self.gemm.guards else ()

    # -- a step ------------------------------------------------------------------------------------------------------

    @property
    def _registers(self) -> int:
        return self._window_registers + VECTOR * len(self.weight_runs)

    @property
    def _window_registers(self) -> int:
        """Whole vectors, for the sake of those behind them."""
        if self.vectors:
            return VECTOR * len(self.window_runs)
        return -(-len(self.window_runs) * math.ceil(self.tile.depth / self.apart) // VECTOR) * VECTOR

    def _copy(self, step: Any, base: Any, one: Callable[..., None]) -> None:
        if self.vectors:
            self._copy_vectors(step, base, one)
        else:
            self._copy_values(step, base, one)
        tile, base, register = self.tile, base + self.windows_words, self._window_registers
        self.run_words = VECTOR
        for run, k, c, first in self.weight_runs:
            where, inside = self._within(step * tile.depth + k, first + step * (tile.depth * self.weights_line))
            with guarded(run < tile.depth * (tile.columns // VECTOR), self._uneven(tile.depth * tile.columns)):
                one(base + k * tile.columns + c, self.weights, where, inside, register)
            register += VECTOR

    def _copy_vectors(self, step: Any, base: Any, one: Callable[..., None]) -> None:
        tile, register = self.tile, 0
        self.run_words = VECTOR
        for run, r, k, first, pixel in self.window_runs:
            at = step * tile.depth + k
            where, inside = self._within(at, first + self.places(at), pixel)
            with guarded(run < tile.rows * (tile.depth // VECTOR), self._uneven(tile.rows * tile.depth)):
                one(base + r * (tile.depth + VECTOR) + k, self.windows, where, inside, register)
            register += VECTOR

    def _copy_values(self, step: Any, base: Any, one: Callable[..., None]) -> None:
        tile, register = self.tile, 0
        self.run_words = 1
        part = tirx.floordiv(self.thread, self.down)
        rows = self.places.whole_rows()
        for first_k in range(0, tile.depth, self.apart):
            k = first_k + part
            at = step * tile.depth + k
            if rows == tile.depth:
                _, columns, channels = self.places.window
                place = step * (rows // (columns * channels) * self.places.down) + self._of_part(first_k, part)
            else:
                place = self.places(at)
            for _, r, _, first, pixel in self.window_runs:
                where, inside = self._within(at, first + place, pixel)
                with guarded(k < tile.depth, first_k + self.apart > tile.depth):
                    one(base + k * tile.rows + r, self.windows, where, inside, register)
                register += 1

    def _of_part(self, first: int, part: Any) -> Any:
        """The place of the value at depth ``first + part`` of a step."""
        places = [self.places(min(first + n, self.tile.depth - 1)) for n in range(self.apart)]
        place: Any = tirx.const(places[-1])
        for n in range(self.apart - 2, -1, -1):
            place = tirx.Select(part == n, tirx.const(places[n]), place)
        return place

    def _within(self, at: Any, where: Any, pixel: tuple[Any, ...] = ()) -> tuple[Any, Any]:
        """The place of a value and whether it is one: beyond the depth and around a pixel's image there is none."""
        conditions = [] if self.gemm.total_depth % self.tile.depth == 0 else [at < self.gemm.total_depth]
        if pixel:
            conditions.append(self.gemm.inside(pixel, self.gemm.step(at)))
        if not conditions:
            return where, tirx.const(True, "bool")
        inside = T.bind(functools.reduce(tirx.all, conditions))
        return T.bind(tirx.Select(inside, where, tirx.const(0))), inside

    def _uneven(self, values: int) -> bool:
        return values // VECTOR % self.tile.threads != 0
