"""Float convolutions and dense layers without tensor cores: sums of 32-bit floats by fused multiply-adds.

A thread sums ``down`` × ``across`` elements, in rows and columns that it reads from shared memory 16 bytes at a time.
Of a warp's lanes four lie below each other and eight beside each other; the lanes that share a row differ in bits 1 to
3, so that each half of a warp reads 16 bytes from each bank once. Where a tile is small, warps share its depth, and the
epilogue adds what they have: always in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bnncc.dialect.scalars import fma
from bnncc.targets.cuda.descriptor import WARP, Architecture

from .base import barrier, local, sum_of_parts, zeros
from .float_copies import VECTOR, FloatCopies, depth_of, in_vectors
from .float_dot import MOST_ROWS, FloatDot
from .gemm import Gemm, ImplicitGemm, Product, Tile, pitch

#: Lanes of a warp below and beside each other.
_DOWN, _ACROSS = 4, 8
#: Threads that a multiprocessor is to hold: four warps for each scheduler.
_THREADS = 512
#: Bytes of shared memory that a block takes for itself.
_RESERVED = 1024
#: Values of a row that a thread reads at once where the depth lies beside each other: two vectors' worth of all rows
#: would leave registers for one block of a multiprocessor only.
REACH = 2


@dataclass(frozen=True)
class FloatTile(Tile):
    """slices: parts of each step's depth that groups of warps multiply by themselves."""

    slices: int = 1

    @property
    def threads(self) -> int:
        return super().threads * self.slices

    @property
    def down(self) -> int:
        """Rows of a thread."""
        return self.rows // self.warps_down // _DOWN

    @property
    def across(self) -> int:
        """Columns of a thread."""
        return self.columns // self.warps_across // _ACROSS

    @property
    def shared_for_sums(self) -> int:
        return self.slices * self.rows * pitch(self)


_TILES = (
    FloatTile(128, 128, 4, 2, 0, 0),
    FloatTile(128, 64, 4, 1, 0, 0),
    FloatTile(64, 64, 2, 1, 0, 0),
    FloatTile(128, 32, 4, 1, 0, 0),
    FloatTile(64, 32, 2, 1, 0, 0),
    FloatTile(32, 32, 2, 1, 0, 0),
    FloatTile(32, 32, 2, 1, 0, 0, slices=4),
)


class FloatProduct(Product):
    """Sums products of 32-bit floats."""

    dtype: ClassVar[str] = "float32"
    tile: FloatTile

    def __init__(self, gemm: Gemm, tile: FloatTile, gpu: Architecture) -> None:
        super().__init__(gemm, tile)
        self.gpu = gpu
        self.copies = FloatCopies(gemm, tile, gpu.async_copies)

    @property
    def blocks_per_sm(self) -> int:
        """As many as have `_THREADS` threads, if shared memory holds them: each then has up to 128 registers."""
        shared = self.shared_words * 4 + _RESERVED
        return max(1, min(_THREADS // self.tile.threads, self.gpu.shared_per_sm // shared))

    @property
    def shared_words(self) -> int:
        return max(self.copies.words, self.tile.shared_for_sums)

    def run(self, shared: Any, thread: Any, row: Any, column: Any, group: Any) -> Callable[[Any, Any], Any]:
        tile, self.shared = self.tile, shared
        lane, warp = tirx.floormod(thread, WARP), tirx.floordiv(thread, WARP)
        low = tirx.floormod(lane, 2)
        self.lane_down = low + tirx.floordiv(lane, 16) * 2
        self.lane_across = tirx.floormod(tirx.floordiv(lane, 2), _ACROSS)
        own = tirx.floormod(warp, tile.warps_down * tile.warps_across)
        self.first_row = tirx.floordiv(own, tile.warps_across) * (tile.down * _DOWN)
        self.first_column = tirx.floormod(own, tile.warps_across) * (tile.across * _ACROSS)
        self.slice = tirx.floordiv(warp, tile.warps_down * tile.warps_across)
        self.sums = zeros("sums", tile.down * tile.across, "float32")
        self.a = local("a", tile.down * (REACH if self.copies.vectors else 1), "float32")
        self.from_ = local("from", 2)
        self.b = local("b", tile.across, "float32")
        self.copies.run(shared, thread, row, column, group, self._multiply)
        return self._store()

    def _row(self, i: Any) -> Any:
        """The row in the tile of a thread's row: any four neighbours lie 16 bytes apart where they are read."""
        if self.copies.vectors:
            return self.first_row + self.lane_down + i * _DOWN
        return self.first_row + tirx.floordiv(i, VECTOR) * (_DOWN * VECTOR) + self.lane_down * VECTOR + i % VECTOR

    def _column(self, vector: Any) -> Any:
        """The first column of a vector of a thread's columns."""
        return self.first_column + self.lane_across * VECTOR + vector * (_ACROSS * VECTOR)

    def _multiply(self, base: Any) -> None:
        tile = self.tile
        depth = tile.depth // tile.slices
        first = self.slice * depth
        if self.copies.vectors:
            line = tile.depth + VECTOR
            a_from = self._opaque(0, base + self._row(0) * line + first, REACH)
            b_from = self._opaque(1, base + self.copies.windows_words + first * tile.columns + self._column(0))
            with T.unroll(0, depth // REACH) as k:
                with T.unroll(0, tile.down) as i:
                    self._load(self.a, i * REACH, a_from + i * (_DOWN * line) + k * REACH, REACH)
                with T.unroll(0, REACH) as within:
                    self._multiply_add(b_from + (k * REACH + within) * tile.columns, lambda i: i * REACH + within)
            return
        a_from = self._opaque(0, base + first * tile.rows + self._row(0))
        b_from = self._opaque(1, base + self.copies.windows_words + first * tile.columns + self._column(0))
        with T.unroll(0, depth) as k:
            with T.unroll(0, tile.down // VECTOR) as i:
                self._load(self.a, i * VECTOR, a_from + i * (_DOWN * VECTOR) + k * tile.rows)
            self._multiply_add(b_from + k * tile.columns, lambda i: i)

    def _multiply_add(self, b_from: Any, a_at: Callable[[Any], Any]) -> None:
        """Multiplies one step of the depth: a thread's columns, which lie from `b_from` on, by its rows."""
        tile = self.tile
        with T.unroll(0, tile.across // VECTOR) as j:
            self._load(self.b, j * VECTOR, b_from + j * (_ACROSS * VECTOR))
        with T.unroll(0, tile.down) as i, T.unroll(0, tile.across) as j:
            at = i * tile.across + j
            T.buffer_store(self.sums, fma(self.a[a_at(i)], self.b[j], self.sums[at]), [at])

    def _opaque(self, number: int, value: Any, unit: int = VECTOR) -> Any:
        """A position that neither TVM nor the compiler takes apart, so that each load has a constant added to it.

        unit: of which they see that it is a multiple. Of loads that could be one load the compiler makes one, and with
        that doubles the registers that a thread's rows take.
        """
        units = tirx.Cast("uint32", tirx.floordiv(value, unit))
        T.evaluate(T.ptx["lop3.b32"](self.from_[number], units, *[tirx.const(0, "uint32")] * 2, 0xF0))
        return tirx.Cast("int32", self.from_[number]) * unit

    def _load(self, registers: Any, first: Any, at: Any, count: int = VECTOR) -> None:
        T.buffer_store(registers, self.shared[tirx.Ramp(at, 1, count)], [tirx.Ramp(first, 1, count)])

    def _store(self) -> Callable[[Any, Any], Any]:
        tile, line = self.tile, pitch(self.tile)
        barrier()
        area = tile.rows * line
        for i in range(tile.down):
            for j in range(tile.across // VECTOR):
                at = self.slice * area + self._row(i) * line + self._column(j)
                values = self.sums[tirx.Ramp(i * tile.across + j * VECTOR, 1, VECTOR)]
                T.buffer_store(self.shared, values, [tirx.Ramp(at, 1, VECTOR)])
        barrier()
        return sum_of_parts(self.shared, tile.slices, area, line)


class FloatConv(ImplicitGemm):
    """Float convolutions."""

    name = "float convolution by fused multiply-adds"
    anchor_role: ClassVar[str] = "conv2d"

    def product(self, gemm: Gemm) -> Product | str:
        if str(gemm.x.dtype) != "float32" or str(gemm.w.dtype) != "float32":
            return "its operands are no 32-bit floats"
        if gemm.lanes != gemm.columns:
            return "its weights are no matrix"
        if gemm.rows <= MOST_ROWS:
            return FloatDot(gemm)
        gpu = self.target.gpu
        products = [product for product in (_staged(gemm, tile, gpu) for tile in _TILES) if product is not None]
        return min(products, key=_clocks)


class FloatDense(FloatConv):
    """Float dense layers."""

    name = "float dense layer by fused multiply-adds"
    anchor_role: ClassVar[str] = "dense"


def _staged(gemm: Gemm, tile: FloatTile, gpu: Architecture) -> FloatProduct | None:
    """The product with as many steps in shared memory as leave room for as many blocks as any number of them."""
    depth = depth_of(gemm, 32 if tile.slices > 1 else 16)
    if in_vectors(gemm):
        depth = -(-depth // (VECTOR * tile.slices)) * VECTOR * tile.slices
    elif depth % tile.slices:
        return None
    steps = math.ceil(gemm.total_depth / depth)
    choices = [
        FloatProduct(gemm, replace(tile, depth=depth, stages=min(stages, steps) if gpu.async_copies else 2), gpu)
        for stages in ((4, 3, 2) if gpu.async_copies else (2,))
    ]
    fitting = [product for product in choices if product.shared_words * 4 <= gpu.most_shared - _RESERVED]
    return max(fitting, key=lambda product: product.blocks_per_sm, default=None)


def _clocks(product: FloatProduct) -> float:
    """About how many clocks of a multiprocessor a step of the depth takes in all of the result.

    Each of four schedulers starts one instruction of a warp in a clock: a multiply-add, or a load of a vector. The
    lanes of a warp share what they load so far that a vector takes shared memory two clocks, a third of which nothing
    hides. A scheduler with one warp waits for about a quarter of its time.
    """
    gemm, tile, gpu = product.gemm, product.tile, product.gpu
    blocks = math.ceil(gemm.rows / tile.rows) * math.ceil(gemm.columns / tile.columns) * gemm.groups
    each, most = tile.threads // WARP, math.ceil(blocks / gpu.sms)
    warps, resident = max(4, most * each), max(4, min(most, product.blocks_per_sm) * each)
    started = (tile.down * tile.across + (tile.down + tile.across) / 2) / 4
    loaded = (tile.down + tile.across) / 2 / 3
    return warps * (started + loaded) / tile.slices * (1 + 1 / resident)
