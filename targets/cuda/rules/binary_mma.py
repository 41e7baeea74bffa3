"""Binary convolutions on tensor cores, and whatever else is a sum over two operands in planes of bits.

The product of a tile is ``mma.sync.m16n8k256`` on bits: sixteen rows, eight columns, eight words of the depth. It
counts pc(a xor w) or pc(a & w), whichever the hardware has; what a kernel sums is made of these counts and the
popcounts of single planes (`bnncc.targets.cuda.rules.bilinear`). Of mismatches, for example:

    b1.xor              pc(a ^ w)                        the sum itself; pc(a & w) is there, too
    b1.xor.m8n8k128     the same by four smaller instructions
    b1.and              pc(a & w)                        pc(a) + pc(w) − 2·pc(a & w)
    s8                  Σ a·w, a of {0, 1}, w of ±1      pc(w) + Σ a·w, w = 1 − 2·bit

pc(a) and pc(w) are products with ones: a column of ones beside the weights, a row of ones below the windows. The warps
share that work. Pairs of planes with the same factor share their sums. Where the hardware has no tiles of bits (s8), a
word becomes eight registers of four bytes, of all planes together; bit 8·i + s goes to byte i of register s, in both
operands alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from bnncc.targets.cuda.descriptor import Architecture

from .base import barrier
from .bilinear import Bilinear, Counts, of_signs
from .gemm import Gemm, ImplicitGemm, Product, Tile
from .popcount import MOST_ROWS, Popcounts
from .warp_mma import WarpMma, choose, local, share, zeros

_ONES = 0xFFFFFFFF
_EACH = 0x01010101


class BinaryMma(WarpMma):
    """Sums over planes of bits."""

    def __init__(self, gemm: Gemm, tile: Tile, gpu: Architecture, form: Bilinear) -> None:
        super().__init__(gemm, tile, gpu)
        self.form, self.bytes = form, gpu.product == "s8"
        self.counts = counts_of(form, gpu)
        if self.bytes:
            pairs, rows = {1: [(0, 0)]}, {}
            columns = {1: [0]} if any(form.own_columns) else {}
        else:
            coefficients = self.counts.pairs
            pairs = _by_coefficient({(i, j): c for i, row in enumerate(coefficients) for j, c in enumerate(row)})
            rows = _by_coefficient(dict(enumerate(self.counts.rows)))
            columns = _by_coefficient(dict(enumerate(self.counts.columns)))
        #: Factor → the pairs of planes, the planes of windows and of weights that have it.
        self.pairs, self.of_rows, self.of_columns = pairs, rows, columns
        self.parts = len(pairs)
        # Of the popcounts each warp makes its share, for fragments that others of its row or column hold as well.
        self.row_share = -(-self.down // tile.warps_across)
        self.column_share = -(-self.across // tile.warps_down)

    @property
    def own_words(self) -> int:
        """For popcounts of rows and columns."""
        return self.tile.rows * bool(self.of_rows) + self.tile.columns * bool(self.of_columns)

    @property
    def registers(self) -> int:
        counts = 4 * (self.row_share * len(self.of_rows) + self.column_share * len(self.of_columns))
        as_bytes = (self.down * 4 + self.across * 2) * self.bytes
        return super().registers + counts + as_bytes

    def _allocate(self) -> None:
        if self.of_rows:
            self.row_counts = zeros("row_counts", 4 * self.row_share * len(self.of_rows))
        if self.of_columns:
            self.column_counts = zeros("column_counts", 4 * self.column_share * len(self.of_columns))
        if self.bytes:
            self.a_bytes, self.b_bytes = local("a_bytes", self.down * 4), local("b_bytes", self.across * 2)

    # -- a step of the depth -----------------------------------------------------------------------------------------

    def _step(self) -> None:
        if self.bytes:
            with T.unroll(0, 8) as s:
                self._step_of_bytes(tirx.Cast("uint32", s))
            return
        kind = f"s32.b1.b1.s32.{self.counts.operation}.popc"
        ones = [tirx.const(_ONES, "uint32")] * 4
        for i in range(self.down):
            for j in range(self.across):
                for part, pairs in enumerate(self.pairs.values()):
                    for p, q in pairs:
                        self.mma(kind, self.sums, self._at(part, i, j), self.a_of(p, i), self.b_of(q, j))
            with share(self.warp_across, i % self.tile.warps_across, self.tile.warps_across):
                for part, planes in enumerate(self.of_rows.values()):
                    at = 4 * (part * self.row_share + i // self.tile.warps_across)
                    for p in planes:
                        self._count(self.row_counts, at, self.a_of(p, i), ones[:2])
        for j in range(self.across):
            with share(self.warp_down, j % self.tile.warps_down, self.tile.warps_down):
                for part, planes in enumerate(self.of_columns.values()):
                    at = 4 * (part * self.column_share + j // self.tile.warps_down)
                    for q in planes:
                        self._count(self.column_counts, at, ones, self.b_of(q, j))

    def _step_of_bytes(self, shift: Any) -> None:
        form, planes, kind = self.form, self.gemm.planes, "s32.s8.s8.s32"
        for j in range(self.across):
            words = [[self._spread(self.b_of(q, j)[n], shift) for q in range(planes[1])] for n in range(2)]
            if self.of_columns:
                own = share(self.warp_down, j % self.tile.warps_down, self.tile.warps_down)
                with own:
                    counted = [_bytes(word, form.own_columns, 0) for word in words]
                    each = [tirx.const(_EACH, "uint32")] * 4
                    self.mma(kind, self.column_counts, 4 * (j // self.tile.warps_down), each, counted)
            for n, word in enumerate(words):
                T.buffer_store(self.b_bytes, _bytes(word, form.weights, form.offset), [2 * j + n])
        for i in range(self.down):
            for n in range(4):
                word = [self._spread(self.a_of(p, i)[n], shift) for p in range(planes[0])]
                T.buffer_store(self.a_bytes, _bytes(word, form.windows, 0), [4 * i + n])
        for i in range(self.down):
            for j in range(self.across):
                a, b = self.a_of(0, i, self.a_bytes), self.b_of(0, j, self.b_bytes)
                self.mma(kind, self.sums, self._at(0, i, j), a, b)

    @staticmethod
    def _spread(word: Any, shift: Any) -> Any:
        """Four bits of a word as bytes."""
        return T.bind((word >> shift) & tirx.const(_EACH, "uint32"))

    def _count(self, sums: Any, at: int, a: list[Any], b: list[Any]) -> None:
        """Popcounts by the one instruction there is: pc(a) = pc(a & 1) = pc(a xor 0)."""
        if self.counts.operation == "xor":
            zero = tirx.const(0, "uint32")
            a, b = ([zero if isinstance(word, tirx.IntImm) else word for word in words] for words in (a, b))
        self.mma(f"s32.b1.b1.s32.{self.counts.operation}.popc", sums, at, a, b)

    def _at(self, part: int, i: int, j: int) -> int:
        return 4 * ((part * self.down + i) * self.across + j)

    # -- the sums of the tile ----------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if not self.own_words:
            return
        tile = self.tile
        self.single = T.alloc_buffer((self.own_words,), "int32", scope="shared")
        IRBuilder.name("counts", self.single)
        self.columns_from = tile.rows * bool(self.of_rows)
        if self.of_rows:
            for i in range(self.down):
                own = share(self.warp_across, i % tile.warps_across, tile.warps_across)
                with own, T.If(self.pair == 0), T.Then():
                    for half in range(2):
                        counts = [
                            (c, self.row_counts[4 * (part * self.row_share + i // tile.warps_across) + 2 * half])
                            for part, c in enumerate(self.of_rows)
                        ]
                        T.buffer_store(self.single, _weighted(counts), [self.place(i, half, 0)[0]])
        if self.of_columns:
            for j in range(self.across):
                own = share(self.warp_down, j % tile.warps_down, tile.warps_down)
                with own, T.If(self.quad == 0), T.Then():
                    for n in range(2):
                        counts = [
                            (c, self.column_counts[4 * (part * self.column_share + j // tile.warps_down) + n])
                            for part, c in enumerate(self.of_columns)
                        ]
                        at = self.columns_from + self.place(0, 0, j)[1] + n
                        T.buffer_store(self.single, _weighted(counts), [at])
        barrier()

    def _total(self, fragment: int, n: int, row: Any, column: Any) -> Any:
        size = self.down * self.across
        total = _weighted([(c, self.sums[4 * (part * size + fragment) + n]) for part, c in enumerate(self.pairs)])
        if self.of_rows:
            total = total + self.single[row]
        if self.of_columns:
            total = total + self.single[self.columns_from + column]
        return total >> self.counts.shift if self.counts.shift else total


def counts_of(form: Bilinear, gpu: Architecture) -> Counts:
    """The sum by the operations that the hardware has, those with the fewest popcounts."""
    counts = [form.by_and()] if "and" in gpu.bit_operations else []
    counts += [form.by_xor()] if "xor" in gpu.bit_operations else []
    return min(counts, key=lambda c: c.popcounts)


def _by_coefficient(coefficients: dict[Any, int]) -> dict[int, list[Any]]:
    found: dict[int, list[Any]] = {}
    for key, c in coefficients.items():
        if c:
            found.setdefault(c, []).append(key)
    return found


def _weighted(counts: Sequence[tuple[int, Any]]) -> Any:
    """int32 Σ factor · count of registers."""
    total: Any = None
    for c, count in counts:
        value = tirx.reinterpret("int32", count)
        value = value if c == 1 else value * c
        total = value if total is None else total + value
    return total


def _bytes(words: Sequence[Any], factors: Sequence[int], offset: int) -> Any:
    """Four signed bytes ``Σ factor · bit + offset`` of words of four bytes of 0 or 1.

    Sums of words are sums of their bytes as long as the result's bytes are 0 … 255: 128 more, where they are negative,
    which flips their highest bit.
    """
    low = offset + sum(f for f in factors if f < 0)
    bias = 128 if low < 0 else 0
    total: Any = tirx.const((offset + bias) * _EACH & _ONES, "uint32") if offset + bias else None
    for word, f in zip(words, factors, strict=True):
        if f:
            value = word if f == 1 else word * tirx.const(f & _ONES, "uint32")
            total = value if total is None else total + value
    return total ^ tirx.const(0x80808080, "uint32") if bias else total


def product_of_bits(gemm: Gemm, gpu: Architecture, form: Bilinear) -> Product:
    """Popcounts for few rows, else tensor cores."""
    if gemm.rows <= MOST_ROWS:
        return Popcounts(gemm, form)
    return choose(gemm, gpu, lambda tile: BinaryMma(gemm, tile, gpu, form))


class BinaryConv(ImplicitGemm):
    """Binary convolutions and dense layers, ternary ones among them."""

    name = "binary convolution on tensor cores"
    anchor_role: ClassVar[str] = "binary_conv2d"

    def product(self, gemm: Gemm) -> Product | str:
        if str(gemm.x.dtype) != "uint32" or gemm.lanes != 1:
            return "its operands do not lie as tensor cores take them"
        windows, weights = gemm.planes
        form = of_signs(windows == 2, weights == 2, products=str(gemm.sums.dtype) == "int32")
        return product_of_bits(gemm, self.target.gpu, form)
