"""Float products of a few rows: reading the weights is all the work, and every block reads its columns of them once.

A thread has four columns, of eight lanes beside each other, and every n-th step of the depth; it multiplies the weights
that it reads, 16 bytes at a time, by the same steps of every row. The lanes of a warp that share columns add up their
sums by shuffles, the warps through shared memory: always in the same order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bnncc.dialect.scalars import fma
from bnncc.targets.cuda.descriptor import WARP

from .base import barrier, from_lane_across, guarded, local, sum_of_parts, zeros
from .copies import as_line
from .float_copies import VECTOR, Places, in_vectors
from .gemm import Gemm, Product, Tile, pitch

#: More rows are worth copying to shared memory.
MOST_ROWS = 8
#: Lanes beside each other, whose columns are a block's.
_ACROSS = 8
#: Values of the weights that a thread is to have under way at once, at least.
_AHEAD = 8


class FloatDot(Product):
    """Sums products of 32-bit floats for a few rows."""

    dtype: ClassVar[str] = "float32"

    def __init__(self, gemm: Gemm) -> None:
        self.parts = WARP // _ACROSS
        self.reach = VECTOR if in_vectors(gemm) else 1
        warps = 4
        while warps < 16 and gemm.total_depth >= 2 * warps * self.parts * _AHEAD:
            warps *= 2
        super().__init__(gemm, Tile(gemm.rows, _ACROSS * VECTOR, 1, warps, 0, 0))
        self.warps = warps

    @property
    def shared_words(self) -> int:
        return self.warps * self.tile.rows * pitch(self.tile)

    def run(self, shared: Any, thread: Any, row: Any, column: Any, group: Any) -> Callable[[Any, Any], Any]:
        gemm, rows, self.shared = self.gemm, self.tile.rows, shared
        self.x, self.w = as_line(gemm.x), as_line(gemm.w)
        self.sums = zeros("sums", rows * VECTOR, "float32")
        self.a, self.b = local("a", self.reach, "float32"), local("b", VECTOR * VECTOR, "float32")
        lane, warp = tirx.floormod(thread, WARP), tirx.floordiv(thread, WARP)
        own = tirx.floormod(lane, _ACROSS) * VECTOR
        safe = column + own
        if gemm.columns % self.tile.columns:
            safe = tirx.Select(safe < gemm.columns, safe, tirx.const(0))
        self.weights_from = T.bind(group * (gemm.total_depth * gemm.columns) + safe)
        self.windows_from = [T.bind(gemm.source(tirx.const(r), group, tirx.const(0))[0]) for r in range(rows)]
        self.places = Places.of(gemm)
        each = self.warps * self.parts * self.reach
        first = T.bind((warp * self.parts + tirx.floordiv(lane, _ACROSS)) * self.reach)
        steps, rest = divmod(gemm.total_depth, each)
        together = max((n for n in (4, 2, 1) if steps % n == 0), default=1)
        if steps:
            with T.serial(0, steps // together) as step, T.unroll(0, together) as within:
                self._multiply((step * together + within) * each + first)
        if rest:
            with guarded(steps * each + first < gemm.total_depth, True):
                self._multiply(steps * each + first)
        return self._store(warp, lane, own)

    def _multiply(self, at: Any) -> None:
        """Multiplies `reach` steps of the depth, which begin at `at`."""
        gemm, reach = self.gemm, self.reach
        for q in range(reach):
            weights = self.w[tirx.Ramp(self.weights_from + (at + q) * gemm.columns, 1, VECTOR)]
            T.buffer_store(self.b, weights, [tirx.Ramp(q * VECTOR, 1, VECTOR)])
        for r, first in enumerate(self.windows_from):
            of, to, none = first + self.places(at), tirx.const(0), tirx.const(0.0, "float32")
            if reach > 1:
                of, to, none = tirx.Ramp(of, 1, reach), tirx.Ramp(to, 1, reach), tirx.Broadcast(none, reach)
            inside = gemm.inside(gemm.pixel(tirx.const(r)), gemm.step(at))
            T.buffer_store(self.a, self.x[of] if inside is None else tirx.if_then_else(inside, self.x[of], none), [to])
            for q in range(reach):
                for c in range(VECTOR):
                    i = r * VECTOR + c
                    T.buffer_store(self.sums, fma(self.a[q], self.b[q * VECTOR + c], self.sums[i]), [i])

    def _store(self, warp: Any, lane: Any, own: Any) -> Callable[[Any, Any], Any]:
        rows, line = self.tile.rows, pitch(self.tile)
        distance = WARP // 2
        while distance >= _ACROSS:
            for i in range(rows * VECTOR):
                T.buffer_store(self.sums, self.sums[i] + from_lane_across(self.sums[i], distance), [i])
            distance //= 2
        with T.If(lane < _ACROSS), T.Then():
            for r in range(rows):
                values = self.sums[tirx.Ramp(r * VECTOR, 1, VECTOR)]
                T.buffer_store(self.shared, values, [tirx.Ramp((warp * rows + r) * line + own, 1, VECTOR)])
        barrier()
        return sum_of_parts(self.shared, self.warps, rows * line, line)
