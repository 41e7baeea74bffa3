"""Products on tensor cores whose words are bits or bytes: what their kernels share.

A warp has its own rows and columns of the tile in fragments of 16 × 8 sums. Of each step of the depth it loads the
fragments of eight words of all its rows and columns, plane by plane, once, and multiplies each with each. Fragments of
bits and of bytes lie alike in registers: PTX ISA, "Matrix multiply-accumulate operation using mma instruction",
m16n8k256 and m16n8k32; those of the smaller instructions of sm_75, m8n8k128 and m8n8k16, are their halves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bnncc.targets.cuda.descriptor import WARP, Architecture

from .base import barrier, local, zeros
from .copies import Copies
from .gemm import Gemm, Product, Tile, largest_that_fills, pitch

#: Words of the depth that one instruction takes, and its rows and columns.
WORDS, ROWS, COLUMNS = 8, 16, 8

#: From large to small. A warp's tile of 64 × 32 reads shared memory at half of its bandwidth while it multiplies.
_TILES = (
    Tile(128, 128, 2, 2, 0, 0),
    Tile(256, 64, 4, 2, 0, 0),
    Tile(128, 64, 4, 2, 0, 0),
    Tile(64, 64, 2, 2, 0, 0),
    Tile(32, 64, 2, 2, 0, 0),
    Tile(32, 32, 2, 2, 0, 0),
)

#: Words of the depth that shared memory holds at most of each row: more under way would not come sooner.
_MOST_AHEAD = 96

#: Registers of a thread for addresses and copies.
_OTHER_REGISTERS = 63


class WarpMma(Product):
    """Loads fragments and stores sums; `_step` multiplies.

    parts: sums that each element of the tile has until `_total` makes one of them.
    """

    parts = 1
    #: Of the registers that hold sums.
    sums_dtype: ClassVar[str] = "uint32"

    def __init__(self, gemm: Gemm, tile: Tile, gpu: Architecture) -> None:
        super().__init__(gemm, tile)
        self.gpu = gpu
        self.copies = Copies(gemm, tile, gpu.async_copies)
        self.down = tile.rows // tile.warps_down // ROWS
        self.across = tile.columns // tile.warps_across // COLUMNS

    @property
    def shared_words(self) -> int:
        return self.copies.words

    @property
    def blocks_per_sm(self) -> int:
        """One or two, as registers allow. Unasked, ptxas spills some to make room for one more."""
        registers = min(255, self.registers + _OTHER_REGISTERS)
        return 2 if 2 * self.tile.threads * registers <= self.gpu.registers_per_sm else 1

    @property
    def own_words(self) -> int:
        """Words of shared memory beside those of the copies and the sums."""
        return 0

    @property
    def registers(self) -> int:
        """That a thread needs for sums and fragments."""
        planes = self.gemm.planes
        return self.down * self.across * 4 * self.parts + self.down * planes[0] * 4 + self.across * planes[1] * 2

    def run(self, shared: Any, thread: Any, row: Any, column: Any, group: Any) -> Callable[[Any, Any], Any]:
        tile, planes = self.tile, self.gemm.planes
        self.shared = shared
        self.lane = tirx.floormod(thread, WARP)
        warp = tirx.floordiv(thread, WARP)
        self.warp_down = tirx.floordiv(warp, tile.warps_across)
        self.warp_across = tirx.floormod(warp, tile.warps_across)
        self.sums = zeros("sums", self.down * self.across * 4 * self.parts, self.sums_dtype)
        self.a = local("a", self.down * 4 * planes[0])
        self.b = local("b", self.across * 2 * planes[1])
        self._allocate()
        self.copies.run(shared, thread, row, column, group, self._multiply)
        self._store()
        width = pitch(tile)
        return lambda r, c: self._sum(shared[r * width + c])

    # -- what products differ in -------------------------------------------------------------------------------------

    def _sum(self, word: Any) -> Any:
        """What a word of the tile's sums stands for, of the type of the anchor's."""
        return tirx.Cast(str(self.gemm.sums.dtype), word)

    def _allocate(self) -> None:
        """Allocates further registers."""

    def _step(self) -> None:
        """Multiplies the fragments of eight words."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """What warps tell each other when all is multiplied, between two barriers."""

    def _total(self, fragment: int, n: int, row: Any, column: Any) -> Any:
        """The int32 sum in register n of a fragment, at a place of the tile."""
        raise NotImplementedError

    # -- fragments ---------------------------------------------------------------------------------------------------

    def a_of(self, plane: int, i: int, a: Any = None) -> list[Any]:
        """The registers of 16 rows of the windows."""
        a = self.a if a is None else a
        return [a[4 * (plane * self.down + i) + n] for n in range(4)]

    def b_of(self, plane: int, j: int, b: Any = None) -> list[Any]:
        """The registers of 8 columns of the weights."""
        b = self.b if b is None else b
        return [b[2 * (plane * self.across + j) + n] for n in range(2)]

    def _multiply(self, base: Any) -> None:
        """Multiplies what lies in shared memory from `base` on."""
        skewed, tile, planes = self.copies.pitch, self.tile, self.gemm.planes
        rows = base + self.warp_down * (self.down * ROWS * skewed)
        columns = base + self.copies.window_rows * skewed + self.warp_across * (self.across * COLUMNS * skewed)
        lane = self.lane
        # Each lane names one row of one of four matrices of 8 rows × 4 words.
        a_lane = tirx.floormod(lane, 16) * skewed + tirx.floordiv(lane, 16) * 4
        b_lane = (tirx.floormod(lane, 8) + tirx.floordiv(lane, 16) * 8) * skewed
        b_lane = b_lane + tirx.floormod(tirx.floordiv(lane, 8), 2) * 4
        a_from, b_from = T.bind(rows + a_lane), T.bind(columns + b_lane)
        with T.unroll(0, tile.depth // WORDS) as step:
            for plane in range(planes[0]):
                for i in range(self.down):
                    at = (plane * tile.rows + i * ROWS) * skewed
                    self._load(self.a_of(plane, i), a_from + at + step * WORDS)
            for plane in range(planes[1]):
                for j in range(0, self.across, 2):
                    at = (plane * tile.columns + j * COLUMNS) * skewed
                    two = self.b_of(plane, j) + (self.b_of(plane, j + 1) if j + 1 < self.across else [])
                    self._load(two, b_from + at + step * WORDS)
            self._step()

    def _load(self, registers: list[Any], at: Any) -> None:
        load = T.ptx[f"ldmatrix.sync.aligned.m8n8.x{len(registers)}.shared.b16"]
        T.evaluate(load(*registers, self.copies.address(at)))

    def mma(self, kind: str, sums: Any, first: int, a: Sequence[Any], b: Sequence[Any]) -> None:
        """One product of fragments. kind: types, and the operation if they are bits."""
        c = [sums[first + n] for n in range(4)]
        bits = kind.startswith("s32.b1")
        if not self.gpu.small_mma:
            instruction = T.ptx[f"mma.sync.aligned.m16n8k{256 if bits else 32}.row.col.{kind}"]
            T.evaluate(instruction(*c, *a, *b, *c))
            return
        small = T.ptx[f"mma.sync.aligned.m8n8k{128 if bits else 16}.row.col.{kind}"]
        for half in range(2):  # upper and lower rows
            for part in range(2):  # of the depth
                own = c[2 * half : 2 * half + 2]
                T.evaluate(small(*own, a[half + 2 * part], b[part], *own))

    # -- the sums of the tile ----------------------------------------------------------------------------------------

    @property
    def quad(self) -> Any:
        """The row in eight of which this lane has sums; its columns are `pair` and the next."""
        return tirx.floordiv(self.lane, 4)

    @property
    def pair(self) -> Any:
        return tirx.floormod(self.lane, 4) * 2

    def place(self, i: Any, half: int, j: Any) -> tuple[Any, Any]:
        """Row and first column of a fragment's half, in the tile."""
        row = self.warp_down * (self.down * ROWS) + i * ROWS + half * 8 + self.quad
        return row, self.warp_across * (self.across * COLUMNS) + j * COLUMNS + self.pair

    def _store(self) -> None:
        width = pitch(self.tile)
        barrier()
        self._prepare()
        for i in range(self.down):
            for half in range(2):
                r = T.bind(self.place(i, half, 0)[0])
                for j in range(self.across):
                    c = self.place(i, half, j)[1]
                    for n in range(2):
                        total = self._total(i * self.across + j, 2 * half + n, r, c + n)
                        T.buffer_store(self.shared, total, [r * width + c + n])
        barrier()


def chosen(warp: Any, values: Sequence[Any]) -> Any:
    """The value that is this warp's; warps beyond them have the last. No branch: it would be as long for all warps."""
    value = values[-1]
    for number in range(len(values) - 2, -1, -1):
        value = tirx.Select(warp == number, values[number], value)
    return value


def choose(gemm: Gemm, gpu: Architecture, make: Callable[[Tile], WarpMma]) -> WarpMma:
    """The product with the largest tile of which there are enough, its steps as deep and as many as fit."""
    columns = COLUMNS * math.ceil(gemm.columns / COLUMNS)
    fitting = [tile for tile in _TILES if tile.columns <= max(32, columns)]
    tiles = [tile for tile in (_staged(gemm, tile, gpu, make) for tile in fitting) if tile is not None]
    return make(largest_that_fills(tiles, gemm, gpu.sms))


def _staged(gemm: Gemm, tile: Tile, gpu: Architecture, make: Callable[[Tile], WarpMma]) -> Tile | None:
    """The tile with as deep and as many steps as leave room for a second block on a multiprocessor."""
    whole = WORDS * math.ceil(gemm.total_depth / WORDS)

    def cost(depth: int) -> int:
        """Words that are multiplied, the rest of the last step included; barrier and addresses cost about as much as
        half an instruction's."""
        return math.ceil(whole / depth) * (depth + WORDS // 2)

    for depth, stages in itertools.product(sorted((40, 32, 24, 16, 8), key=cost), (4, 3, 2)):
        depth = min(depth, whole)
        stages = min(stages, math.ceil(whole / depth)) if gpu.async_copies else 2
        if depth * stages > _MOST_AHEAD:
            continue
        staged = replace(tile, depth=depth, stages=stages)
        product = make(staged)
        words = max(product.shared_words, tile.rows * pitch(tile)) + product.own_words
        if words * 4 <= gpu.shared_per_sm // 2 - 1024 and product.registers <= gpu.tile_registers:
            return staged
    return None
