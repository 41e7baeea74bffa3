"""Binary convolutions on tensor cores, and whatever else is a sum over two operands in planes of bits.

The product of a tile is ``mma.sync.m16n8k256`` on bits: sixteen rows, eight columns, eight words of the depth. It
counts pc(a xor w) or pc(a & w), whichever the hardware has; what a kernel sums is made of these counts and the
popcounts of single planes (`bnncc.targets.cuda.rules.bilinear`). Of mismatches, for example:

    b1.xor              pc(a ^ w)                        the sum itself; pc(a & w) is there, too
    b1.xor.m8n8k128     the same by four smaller instructions
    b1.and              pc(a & w)                        pc(a) + pc(w) − 2·pc(a & w)
    s8                  Σ a·w, a of {0, 1}, w of ±1      pc(w) + Σ a·w, w = 1 − 2·bit

pc(a) and pc(w) are counted by POPC, no work of the tensor cores: four a lane and step for a fragment of 16 rows.
The warps share that work. Pairs of planes with the same factor share their sums. Where the hardware has no tiles of
bits (s8), a word becomes eight registers of four bytes, of all planes together; bit 8·i + s goes to byte i of register
s, in both operands alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from bnncc.targets.cuda.descriptor import Architecture

from .base import barrier, from_lane_across, local, zeros
from .bilinear import Bilinear, Counts, of_signs
from .gemm import Gemm, ImplicitGemm, Product, Tile
from .popcount import MOST_ROWS, Popcounts
from .warp_mma import WarpMma, choose, chosen

_ONES = 0xFFFFFFFF
_EACH = 0x01010101


class BinaryMma(WarpMma):
    """Sums over planes of bits."""

    def __init__(self, gemm: Gemm, tile: Tile, gpu: Architecture, form: Bilinear) -> None:
        super().__init__(gemm, tile, gpu)
        self.form, self.bytes = form, gpu.product == "s8"
        self.counts = counts_of(form, gpu)
        coefficients = ((1,),) if self.bytes else self.counts.pairs
        #: Factor → the pairs of planes that have it.
        self.pairs: dict[int, list[tuple[int, int]]] = {}
        for i, j in itertools.product(range(len(coefficients)), range(len(coefficients[0]))):
            if coefficients[i][j]:
                self.pairs.setdefault(coefficients[i][j], []).append((i, j))
        self.parts = len(self.pairs)
        #: Factors of the popcounts of single planes. The offset of bytes is part of their products.
        self.of_rows = (0,) * len(self.counts.rows) if self.bytes else self.counts.rows
        self.of_columns = self.counts.columns
        # Of the popcounts each warp makes its share, for fragments that others of its row or column hold as well.
        self.row_share = -(-self.down // tile.warps_across)
        self.column_share = -(-self.across // tile.warps_down)

    @property
    def own_words(self) -> int:
        """For popcounts of rows and columns."""
        return self.tile.rows * any(self.of_rows) + self.tile.columns * any(self.of_columns)

    @property
    def registers(self) -> int:
        counts = 2 * self.row_share * any(self.of_rows) + self.column_share * any(self.of_columns)
        as_bytes = (self.down * 4 + self.across * 2) * self.bytes
        return super().registers + counts + as_bytes

    def _allocate(self) -> None:
        if any(self.of_rows):
            self.row_counts = zeros("row_counts", 2 * self.row_share)
        if any(self.of_columns):
            self.column_counts = zeros("column_counts", self.column_share)
        if self.bytes:
            self.a_bytes, self.b_bytes = local("a_bytes", self.down * 4), local("b_bytes", self.across * 2)

    # -- a step of the depth -----------------------------------------------------------------------------------------

    def _step(self) -> None:
        self._count()
        if self.bytes:
            with T.unroll(0, 8) as s:
                self._step_of_bytes(tirx.Cast("uint32", s))
            return
        kind = f"s32.b1.b1.s32.{self.counts.operation}.popc"
        for i, j in itertools.product(range(self.down), range(self.across)):
            for part, pairs in enumerate(self.pairs.values()):
                for p, q in pairs:
                    self.mma(kind, self.sums, self._at(part, i, j), self.a_of(p, i), self.b_of(q, j))

    def _count(self) -> None:
        """Adds the popcounts of single planes: a lane's words are those of rows `quad` and `quad` + 8, or of a
        column."""
        planes = self.gemm.planes
        if any(self.of_rows):
            for own in range(self.row_share):
                fragments = [[self.a_of(p, i) for p in range(planes[0])] for i in self._shared(own, self.down, True)]
                for half in range(2):
                    words = [(c, p, half + 2 * part) for p, c in enumerate(self.of_rows) for part in range(2) if c]
                    counted = [(c, chosen(self.warp_across, [f[p][n] for f in fragments])) for c, p, n in words]
                    _add_popcounts(self.row_counts, 2 * own + half, counted)
        if any(self.of_columns):
            for own in range(self.column_share):
                fragments = [[self.b_of(q, j) for q in range(planes[1])] for j in self._shared(own, self.across, False)]
                words = [(c, q, n) for q, c in enumerate(self.of_columns) for n in range(2) if c]
                counted = [(c, chosen(self.warp_down, [f[q][n] for f in fragments])) for c, q, n in words]
                _add_popcounts(self.column_counts, own, counted)

    def _shared(self, own: int, fragments: int, rows: bool) -> range:
        """The fragments of which each warp of a row (column) of warps counts one."""
        warps = self.tile.warps_across if rows else self.tile.warps_down
        return range(own * warps, min(own * warps + warps, fragments))

    def _step_of_bytes(self, shift: Any) -> None:
        form, planes, kind = self.form, self.gemm.planes, "s32.s8.s8.s32"
        for j in range(self.across):
            words = [[self._spread(self.b_of(q, j)[n], shift) for q in range(planes[1])] for n in range(2)]
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

    def _at(self, part: int, i: int, j: int) -> int:
        return 4 * ((part * self.down + i) * self.across + j)

    # -- the sums of the tile ----------------------------------------------------------------------------------------

    def _prepare(self) -> None:
        if not self.own_words:
            return
        tile = self.tile
        self.single = T.alloc_buffer((self.own_words,), "int32", scope="shared")
        IRBuilder.name("counts", self.single)
        self.columns_from = tile.rows * any(self.of_rows)
        if any(self.of_rows):
            for own, half in itertools.product(range(self.row_share), range(2)):
                total = _of_four_lanes(self.row_counts[2 * own + half])
                i = own * tile.warps_across + self.warp_across
                with T.If(tirx.all(self.pair == 0, i < self.down)), T.Then():
                    T.buffer_store(self.single, total, [self.place(i, half, 0)[0]])
        if any(self.of_columns):
            for own in range(self.column_share):
                total = _of_four_lanes(self.column_counts[own])
                j = own * tile.warps_down + self.warp_down
                with T.If(tirx.all(self.pair == 0, j < self.across)), T.Then():
                    at = self.columns_from + self.place(0, 0, j)[1] - self.pair + self.quad
                    T.buffer_store(self.single, total, [at])
        barrier()

    def _total(self, fragment: int, n: int, row: Any, column: Any) -> Any:
        size = self.down * self.across
        total = _weighted([(c, self.sums[4 * (part * size + fragment) + n]) for part, c in enumerate(self.pairs)])
        if any(self.of_rows):
            total = total + self.single[row]
        if any(self.of_columns):
            total = total + self.single[self.columns_from + column]
        return total >> self.counts.shift if self.counts.shift else total


def counts_of(form: Bilinear, gpu: Architecture) -> Counts:
    """The sum by the operations that the hardware has, those with the fewest popcounts."""
    counts = [form.by_and()] if "and" in gpu.bit_operations else []
    counts += [form.by_xor()] if "xor" in gpu.bit_operations else []
    return min(counts, key=lambda c: c.popcounts)


def _add_popcounts(counts: Any, at: int, words: Sequence[tuple[int, Any]]) -> None:
    """Adds factor · popcount of the words; sums modulo 2^32 are sums of int32."""
    total = counts[at]
    for c, word in words:
        count = tirx.popcount(word)
        total = total + (count if c == 1 else count * tirx.const(c & _ONES, "uint32"))
    T.buffer_store(counts, total, [at])


def _of_four_lanes(count: Any) -> Any:
    """The int32 sum of the counts of lanes beside each other."""
    for distance in (1, 2):
        count = T.bind(count + from_lane_across(count, distance))
    return tirx.reinterpret("int32", count)


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
