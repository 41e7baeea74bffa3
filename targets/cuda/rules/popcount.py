"""Sums over planes of bits without tensor cores: LOP3 and POPC.

A warp has a few output channels and all rows of the tile. Its lanes lie along the depth, four words each, so that a
step reads 512 bytes of every channel's weights side by side; at the end the lanes' sums are added up by shuffles.

It is for products of few rows, dense layers of small batches above all. Tensor cores multiply sixteen rows at once,
whether there are as many or not, and pass each word through shared memory first; a product of few rows is bound by the
reading of its weights. POPC counts 16 words a cycle and multiprocessor, so r rows use up 512 / r bits of weights a
cycle. The memory of the fastest GPU (H200, 4.8 TB/s, 132 multiprocessors at 1.8 GHz) brings about 160: from four rows
on the popcounts would be what it waits for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bnncc.targets.cuda.descriptor import WARP

from .base import barrier, from_lane_across, local, zeros
from .bilinear import Bilinear
from .copies import as_line
from .gemm import Gemm, Product, Tile, pitch

#: Rows of a product that this is for.
MOST_ROWS = 3
#: Warps of a block, which share the 32 channels of its tile.
_WARPS = 8


class Popcounts(Product):
    """Sums over planes of bits, by popcounts of words."""

    def __init__(self, gemm: Gemm, form: Bilinear, rows: int = MOST_ROWS) -> None:
        super().__init__(gemm, Tile(min(rows, gemm.rows), WARP, 1, _WARPS, 0, 0))
        # xor and and cost the same here: they are part of one LOP3.
        self.counts = min(form.by_xor(), form.by_and(), key=lambda counts: counts.popcounts)
        self.channels = WARP // _WARPS
        #: Words that a lane reads at once.
        self.run_words = math.gcd(gemm.run, 4)

    @property
    def shared_words(self) -> int:
        return 0

    def run(self, shared: Any, thread: Any, row: Any, column: Any, group: Any) -> Callable[[Any, Any], Any]:
        gemm, tile, width = self.gemm, self.tile, pitch(self.tile)
        lane, warp = tirx.floormod(thread, WARP), tirx.floordiv(thread, WARP)
        windows, weights = as_line(gemm.x), as_line(gemm.w)
        planes, run = gemm.planes, self.run_words
        sums = zeros("sums", tile.rows * self.channels)
        a = local("a", tile.rows * planes[0] * run)
        b = local("b", planes[1] * run)
        with T.serial(0, math.ceil(gemm.total_depth / (WARP * run))) as step:
            at = T.bind((step * WARP + lane) * run)
            within = at < gemm.total_depth
            for r in range(tile.rows):
                for p in range(planes[0]):
                    where, inside = gemm.source(row + r, group, at, p)
                    conditions = [within, *([] if inside is None else [inside])]
                    conditions += [row + r < gemm.rows] if gemm.rows % tile.rows else []
                    self._load(a, (r * planes[0] + p) * run, windows, where, conditions)
            with T.unroll(0, self.channels) as c:
                own = column + warp * self.channels + c
                conditions = [within, *([own < gemm.columns] if gemm.columns % WARP else [])]
                for q in range(planes[1]):
                    where = gemm.weight(group * gemm.columns + own, at, q)
                    self._load(b, q * run, weights, where, conditions)
                for r in range(tile.rows):
                    total = sums[r * self.channels + c]
                    for word in range(run):
                        own_a = [a[(r * planes[0] + p) * run + word] for p in range(planes[0])]
                        total = total + self._sum(own_a, [b[q * run + word] for q in range(planes[1])])
                    T.buffer_store(sums, total, [r * self.channels + c])
        # Each lane's sums, of lanes further and further away.
        with T.unroll(0, tile.rows * self.channels) as i:
            for distance in (16, 8, 4, 2, 1):
                T.buffer_store(sums, sums[i] + from_lane_across(sums[i], distance), [i])
        with T.If(lane == 0), T.Then():
            for r in range(tile.rows):
                for c in range(self.channels):
                    total = tirx.reinterpret("int32", sums[r * self.channels + c])
                    T.buffer_store(shared, total >> self.counts.shift, [r * width + warp * self.channels + c])
        barrier()
        return lambda r, c: tirx.Cast(str(gemm.sums.dtype), shared[r * width + c])

    def _load(self, registers: Any, first: int, line: Any, where: Any, conditions: list[Any]) -> None:
        """A lane's words of a row; zeros where the conditions do not hold."""
        inside = T.bind(tirx.all(*conditions)) if len(conditions) > 1 else conditions[0]
        at, run = T.bind(tirx.Select(inside, where, tirx.const(0))), self.run_words
        for word in range(run):
            T.buffer_store(registers, tirx.const(0, "uint32"), [first + word])
        with T.If(inside), T.Then():
            T.buffer_store(registers, line[tirx.Ramp(at, 1, run)] if run > 1 else line[at], _lanes(first, run))

    def _sum(self, a: list[Any], b: list[Any]) -> Any:
        """The weighted popcounts of a word of all planes, as uint32: sums modulo 2^32 are sums of int32."""
        counts = self.counts
        terms = [(c, x) for c, x in zip((*counts.rows, *counts.columns), (*a, *b), strict=True)]
        for i, row in enumerate(counts.pairs):
            terms += [(c, a[i] ^ w if counts.operation == "xor" else a[i] & w) for c, w in zip(row, b, strict=True)]
        total: Any = None
        for c, word in terms:
            if c:
                count = tirx.popcount(word)
                value = count if c == 1 else count * tirx.const(c & 0xFFFFFFFF, "uint32")
                total = value if total is None else total + value
        return total


def _lanes(first: int, run: int) -> list[Any]:
    return [tirx.Ramp(first, 1, run)] if run > 1 else [first]
