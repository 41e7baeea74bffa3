"""Float convolutions and dense layers on tensor cores: operands rounded, sums of 32-bit floats.

    tf32       ``mma.sync.m16n8k8``, a word is a value
    float16    ``mma.sync.m16n8k16``, a word is two channels (sm_75: two of m16n8k8)

The fragments lie in registers as those of bits and bytes do (`WarpMma`). Weights are rounded in the artifact; windows
are rounded between registers and shared memory, while the step before is multiplied.
"""

from __future__ import annotations

from typing import Any, ClassVar

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from bnncc.dialect.stages import ROUNDED
from bnncc.targets.cuda.descriptor import Architecture

from .base import local
from .copies import Copies
from .gemm import Gemm, ImplicitGemm, Product, Tile
from .warp_mma import WarpMma, choose


class RoundedCopies(Copies):
    """Copies by way of registers, where the windows' values are still 32-bit floats: of float16, two to a word."""

    def __init__(self, gemm: Gemm, tile: Tile, halves_apart: bool) -> None:
        """halves_apart: no instruction makes a word of two floats."""
        super().__init__(gemm, tile, asynchronous=False)
        self.halves_apart = halves_apart

    @property
    def _window_words(self) -> int:
        """Words of the windows that a thread copies in a step."""
        return -(-self.window_rows // self._rows_at_once) * self.run_words

    @property
    def _registers(self) -> int:
        return super()._registers + self._window_words * (self.gemm.values - 1)

    def _into_registers(self, to: Any, line: Any, where: Any, inside: Any, register: int) -> None:
        values, count = self.gemm.values, self.run_words
        if not line.same_as(self.windows):
            super()._into_registers(to, line, where, inside, register + self._window_words * (values - 1))
            return
        begin = T.bind(tirx.floordiv(where, count))  # which TVM is to see as a multiple of so many words
        length = min(values * count, 4)
        for first in range(0, values * count, length):
            place, none = begin * (values * count) + first, tirx.const(0.0, "float32")
            kind, at = "uint32", register * values + first
            if length > 1:
                place, none = tirx.Ramp(place, 1, length), tirx.Broadcast(none, length)
                kind, at = f"uint32x{length}", tirx.Ramp(at, 1, length)
            T.buffer_store(self.ahead, tirx.reinterpret(kind, tirx.if_then_else(inside, line[place], none)), [at])

    def _from_registers(self, to: Any, line: Any, where: Any, inside: Any, register: int) -> None:
        values = self.gemm.values
        if not line.same_as(self.windows):
            super()._from_registers(to, line, where, inside, register + self._window_words * (values - 1))
            return
        for word in range(self.run_words):
            own = [tirx.reinterpret("float32", self.ahead[(register + word) * values + n]) for n in range(values)]
            T.buffer_store(self.shared, tirx.reinterpret("int32", self._rounded(own)), [to + word])

    def _rounded(self, values: list[Any]) -> Any:
        """The word of values, rounded."""
        if self.halves_apart:
            low, high = (_converted("cvt.rn.f16.f32", "uint16", value) for value in values)
            return tirx.Cast("uint32", low) | tirx.Cast("uint32", high) << tirx.const(16, "uint32")
        return _converted("cvt.rn.f16x2.f32" if len(values) == 2 else "cvt.rna.tf32.f32", "uint32", *values[::-1])


def _converted(instruction: str, dtype: str, *values: Any) -> Any:
    word = local("word", 1, dtype)
    T.evaluate(T.ptx[instruction](word[0], *values))
    return word[0]


class FloatMma(WarpMma):
    """Sums products of rounded floats."""

    sums_dtype: ClassVar[str] = "float32"

    def __init__(self, gemm: Gemm, tile: Tile, gpu: Architecture) -> None:
        super().__init__(gemm, tile, gpu)
        self.copies: RoundedCopies = RoundedCopies(gemm, tile, halves_apart=gpu.small_mma)

    @property
    def registers(self) -> int:
        return super().registers + (self.copies._registers if self.tile.depth else 0)

    def _step(self) -> None:
        for i in range(self.down):
            for j in range(self.across):
                self._multiply_fragments(4 * (i * self.across + j), self.a_of(0, i), self.b_of(0, j))

    def _multiply_fragments(self, first: int, a: list[Any], b: list[Any]) -> None:
        c = [self.sums[first + n] for n in range(4)]
        if self.gemm.values == 1:
            T.evaluate(T.ptx["mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"](*c, *a, *b, *c))
        elif self.gpu.small_mma:
            for half in range(2):  # of the depth
                small = T.ptx["mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"]
                T.evaluate(small(*c, *a[2 * half : 2 * half + 2], b[half], *c))
        else:
            T.evaluate(T.ptx["mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"](*c, *a, *b, *c))

    def _total(self, fragment: int, n: int, row: Any, column: Any) -> Any:
        return tirx.reinterpret("int32", self.sums[4 * fragment + n])

    def _sum(self, word: Any) -> Any:
        return tirx.reinterpret("float32", word)


class RoundedConv(ImplicitGemm):
    """Float convolutions whose operands are rounded."""

    name = "convolution of rounded floats on tensor cores"
    anchor_role: ClassVar[str] = "conv2d"

    def product(self, gemm: Gemm) -> Product | str:
        if ROUNDED not in gemm.annotations:
            return "its operands are not rounded"
        if gemm.lanes != 1:
            return "its weights do not lie as tensor cores take them"
        gpu = self.target.gpu
        return choose(gemm, gpu, lambda tile: FloatMma(gemm, tile, gpu))


class RoundedDense(RoundedConv):
    """Float dense layers whose operands are rounded."""

    name = "dense layer of rounded floats on tensor cores"
    anchor_role: ClassVar[str] = "dense"
