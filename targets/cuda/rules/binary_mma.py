"""Binary convolutions on tensor cores.

The product of a tile is ``mma.sync.m16n8k256`` on bits: sixteen rows, eight columns, eight words of the depth. Of what
it counts, the mismatches a xor w follow, pc standing for a popcount:

    b1.xor              pc(a ^ w)                              the mismatches themselves
    b1.xor.m8n8k128     the same by four smaller instructions, whose fragments are halves of the large one's
    b1.and              pc(a & w)                              pc(a) + pc(w) − 2·pc(a & w)
    s8                  Σ a·w, a of {0, 1}, w of {−1, +1}      pc(w) − Σ a·w

pc(a) and pc(w) are products with ones: a column of ones beside the weights, a row of ones below the windows. The warps
share that work. Where the hardware has no tiles of bits (s8), a word becomes eight registers of four bytes; bit 8·i + s
goes to byte i of register s, in both operands alike. Layouts of fragments: PTX ISA, "Matrix multiply-accumulate
operation using mma instruction", m16n8k256 and m8n8k128, and m16n8k32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from bnncc.targets.cuda.descriptor import WARP, Architecture

from .base import barrier, guarded
from .copies import Copies
from .gemm import Gemm, ImplicitGemm, Product, Tile, largest_that_fills, pitch

#: Words of the depth that one instruction takes, and its rows and columns.
_WORDS, _ROWS, _COLUMNS = 8, 16, 8

#: From large to small. A warp's tile of 64 × 32 reads shared memory at half of its bandwidth while it multiplies.
_TILES = (
    Tile(128, 128, 2, 4, 0, 0),
    Tile(256, 64, 4, 2, 0, 0),
    Tile(128, 64, 4, 2, 0, 0),
    Tile(64, 64, 2, 2, 0, 0),
    Tile(32, 64, 2, 2, 0, 0),
    Tile(32, 32, 2, 2, 0, 0),
)


@dataclass(frozen=True)
class _Form:
    """rows, columns: whether the popcounts of the windows' rows, the weights' columns are needed."""

    rows: bool
    columns: bool


_FORMS = {
    "b1.xor": _Form(False, False),
    "b1.xor.m8n8k128": _Form(False, False),
    "b1.and": _Form(True, True),
    "s8": _Form(False, True),
}


class BinaryMma(Product):
    """Counts mismatches of bits."""

    def __init__(self, gemm: Gemm, tile: Tile, gpu: Architecture) -> None:
        super().__init__(gemm, tile)
        self.gpu, self.form = gpu, _FORMS[gpu.product]
        self.copies = Copies(gemm, tile, gpu.async_copies)
        self.down = tile.rows // tile.warps_down // _ROWS
        self.across = tile.columns // tile.warps_across // _COLUMNS

    @property
    def shared_words(self) -> int:
        return self.copies.words

    @property
    def count_words(self) -> int:
        """Words of shared memory for popcounts of rows and columns."""
        return self.tile.rows * self.form.rows + self.tile.columns * self.form.columns

    def run(self, shared: Any, thread: Any, row: Any, column: Any, group: Any) -> Callable[[Any, Any], Any]:
        tile = self.tile
        self.shared = shared
        self.lane = tirx.floormod(thread, WARP)
        warp = tirx.floordiv(thread, WARP)
        self.warp_down = tirx.floordiv(warp, tile.warps_across)
        self.warp_across = tirx.floormod(warp, tile.warps_across)
        self.sums = self._registers("sums", self.down * self.across * 4)
        # Of these popcounts each warp makes its share, for fragments that others of its row or column hold as well.
        self.of_rows = self._registers("of_rows", 4 * -(-self.down // tile.warps_across)) if self.form.rows else None
        self.of_columns = (
            self._registers("of_columns", 4 * -(-self.across // tile.warps_down)) if self.form.columns else None
        )
        self.a = _local("a", self.down * 4)
        self.b = _local("b", self.across * 2)
        if self.gpu.product == "s8":
            self.a_bytes, self.b_bytes = _local("a_bytes", self.down * 4), _local("b_bytes", self.across * 2)
        self.copies.run(shared, thread, row, column, group, self._multiply)
        return self._store()

    def _registers(self, name: str, count: int) -> Any:
        """Registers that start as 0."""
        buffer = _local(name, count)
        with T.unroll(0, count) as i:
            T.buffer_store(buffer, tirx.const(0, "uint32"), [i])
        return buffer

    # -- a step of the depth -----------------------------------------------------------------------------------------

    def _multiply(self, base: Any) -> None:
        """Multiplies what lies in shared memory from `base` on."""
        skewed, tile = self.copies.pitch, self.tile
        rows = base + self.warp_down * (self.down * _ROWS * skewed)
        columns = base + tile.rows * skewed + self.warp_across * (self.across * _COLUMNS * skewed)
        lane = self.lane
        # Each lane names one row of one of four matrices of 8 rows × 4 words.
        a_lane = tirx.floormod(lane, 16) * skewed + tirx.floordiv(lane, 16) * 4
        b_lane = (tirx.floormod(lane, 8) + tirx.floordiv(lane, 16) * 8) * skewed
        b_lane = b_lane + tirx.floormod(tirx.floordiv(lane, 8), 2) * 4
        a_from, b_from = T.bind(rows + a_lane), T.bind(columns + b_lane)
        with T.unroll(0, tile.depth // _WORDS) as step:
            for i in range(self.down):
                self._load(self.a, 4 * i, 4, a_from + i * _ROWS * skewed + step * _WORDS)
            for j in range(0, self.across, 2):
                count = min(4, 2 * (self.across - j))
                self._load(self.b, 2 * j, count, b_from + j * _COLUMNS * skewed + step * _WORDS)
            if self.gpu.product == "s8":
                self._multiply_bytes()
            else:
                self._multiply_bits()

    def _load(self, fragment: Any, first: int, count: int, at: Any) -> None:
        registers = [fragment[first + i] for i in range(count)]
        T.evaluate(T.ptx[f"ldmatrix.sync.aligned.m8n8.x{count}.shared.b16"](*registers, self.copies.address(at)))

    def _multiply_bits(self) -> None:
        ones = tirx.const(0xFFFFFFFF, "uint32")
        for i in range(self.down):
            a = [self.a[4 * i + n] for n in range(4)]
            for j in range(self.across):
                self._mma(self.sums, 4 * (i * self.across + j), a, [self.b[2 * j], self.b[2 * j + 1]])
            if self.of_rows is not None:
                with self._share(self.warp_across, i % self.tile.warps_across, self.tile.warps_across):
                    self._mma(self.of_rows, 4 * (i // self.tile.warps_across), a, [ones, ones])
        if self.of_columns is not None:
            for j in range(self.across):
                with self._share(self.warp_down, j % self.tile.warps_down, self.tile.warps_down):
                    b = [self.b[2 * j], self.b[2 * j + 1]]
                    self._mma(self.of_columns, 4 * (j // self.tile.warps_down), [ones] * 4, b)

    def _multiply_bytes(self) -> None:
        each = tirx.const(0x01010101, "uint32")
        with T.unroll(0, 8) as s:
            shift = tirx.Cast("uint32", s)
            for i in range(4 * self.down):
                T.buffer_store(self.a_bytes, (self.a[i] >> shift) & each, [i])
            for j in range(2 * self.across):
                bits = T.bind((self.b[j] >> shift) & each)
                # 0 → 0xff, 1 → 0x01: no byte of the product reaches into the next.
                T.buffer_store(self.b_bytes, ((bits ^ each) * tirx.const(0xFF, "uint32")) | bits, [j])
            for i in range(self.down):
                a = [self.a_bytes[4 * i + n] for n in range(4)]
                for j in range(self.across):
                    b = [self.b_bytes[2 * j], self.b_bytes[2 * j + 1]]
                    self._mma(self.sums, 4 * (i * self.across + j), a, b)
            for j in range(self.across):
                with self._share(self.warp_down, j % self.tile.warps_down, self.tile.warps_down):
                    b = [self.b_bytes[2 * j], self.b_bytes[2 * j + 1]]
                    self._mma(self.of_columns, 4 * (j // self.tile.warps_down), [each] * 4, b)

    @staticmethod
    def _share(warp: Any, own: int, warps: int) -> Any:
        return guarded(warp == own, warps > 1)

    def _mma(self, sums: Any, first: int, a: list[Any], b: list[Any]) -> None:
        c = [sums[first + n] for n in range(4)]
        if self.gpu.product == "s8":
            T.evaluate(T.ptx["mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"](*c, *a, *b, *c))
        elif self.gpu.product == "b1.xor.m8n8k128":
            small = T.ptx["mma.sync.aligned.m8n8k128.row.col.s32.b1.b1.s32.xor.popc"]
            for half in range(2):  # upper and lower rows
                for part in range(2):  # of the depth
                    own = c[2 * half : 2 * half + 2]
                    T.evaluate(small(*own, a[half + 2 * part], b[part], *own))
        else:
            operation = self.gpu.product.removeprefix("b1.")
            mma = T.ptx[f"mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.{operation}.popc"]
            T.evaluate(mma(*c, *a, *b, *c))

    # -- the sums of the tile ----------------------------------------------------------------------------------------

    def _store(self) -> Callable[[Any, Any], Any]:
        tile, shared, lane, width = self.tile, self.shared, self.lane, pitch(self.tile)
        of_columns_from = tile.rows * self.form.rows
        quad, pair = tirx.floordiv(lane, 4), tirx.floormod(lane, 4) * 2
        first_row = self.warp_down * (self.down * _ROWS)
        first_column = self.warp_across * (self.across * _COLUMNS)
        if self.count_words:
            counts = T.alloc_buffer((self.count_words,), "int32", scope="shared")
            IRBuilder.name("counts", counts)
        barrier()
        if self.of_rows is not None:
            for i in range(self.down):
                with self._share(self.warp_across, i % tile.warps_across, tile.warps_across), T.If(pair == 0), T.Then():
                    for half in range(2):
                        count = self.of_rows[4 * (i // tile.warps_across) + 2 * half]
                        at = first_row + i * _ROWS + half * 8 + quad
                        T.buffer_store(counts, tirx.reinterpret("int32", count), [at])
        if self.of_columns is not None:
            for j in range(self.across):
                with self._share(self.warp_down, j % tile.warps_down, tile.warps_down), T.If(quad == 0), T.Then():
                    for n in range(2):
                        count = tirx.reinterpret("int32", self.of_columns[4 * (j // tile.warps_down) + n])
                        if self.gpu.product == "s8":
                            # What a row of ones gives is the bits that are set less those that are not.
                            count = (count + 32 * self.copies.steps * tile.depth) >> 1
                        T.buffer_store(counts, count, [of_columns_from + first_column + j * _COLUMNS + pair + n])
        if self.count_words:
            barrier()
        for i in range(self.down):
            for half in range(2):
                r = T.bind(first_row + i * _ROWS + half * 8 + quad)
                of_row = T.bind(counts[r]) if self.form.rows else None
                for j in range(self.across):
                    c = first_column + j * _COLUMNS + pair
                    for n in range(2):
                        total = tirx.reinterpret("int32", self.sums[4 * (i * self.across + j) + 2 * half + n])
                        if self.form.columns:
                            of_column = counts[of_columns_from + c + n]
                            total = of_column - total if of_row is None else of_row + of_column - 2 * total
                        T.buffer_store(shared, total, [r * width + c + n])
        barrier()
        return lambda r, c: tirx.Cast("uint32", shared[r * width + c])


def _local(name: str, count: int) -> Any:
    buffer = T.alloc_buffer((count,), "uint32", scope="local")
    IRBuilder.name(name, buffer)
    return buffer


class BinaryConv(ImplicitGemm):
    """Binary convolutions and dense layers, neither of whose operands is ternary."""

    name = "binary convolution on tensor cores"
    anchor_role: ClassVar[str] = "binary_conv2d"

    def product(self, gemm: Gemm) -> Product | str:
        if len(gemm.x.shape) != 4 or len(gemm.w.shape) != 6 or str(gemm.x.dtype) != "uint32":
            return "an operand has several planes"
        gpu = self.target.gpu
        columns = _WORDS * math.ceil(gemm.columns / _WORDS)
        fitting = [t for t in _TILES if t.columns <= max(32, columns)]
        tiles = [t for t in (self._staged(gemm, tile, gpu) for tile in fitting) if t is not None]
        return BinaryMma(gemm, largest_that_fills(tiles, gemm, gpu.sms), gpu)

    @staticmethod
    def _staged(gemm: Gemm, tile: Tile, gpu: Architecture) -> Tile | None:
        """The tile with as deep and as many steps as leave room for a second block on a multiprocessor."""
        whole = _WORDS * math.ceil(gemm.total_depth / _WORDS)
        for depth, stages in ((32, 3), (32, 2), (16, 4), (16, 3), (16, 2), (8, 2)):
            depth = whole if whole <= depth + _WORDS else depth
            stages = min(stages, math.ceil(whole / depth)) if gpu.async_copies else 2
            staged = replace(tile, depth=depth, stages=stages)
            product = BinaryMma(gemm, staged, gpu)
            words = max(product.shared_words, tile.rows * pitch(tile)) + product.count_words
            if words * 4 <= gpu.shared_per_sm // 2 - 1024:
                return staged
        return None
