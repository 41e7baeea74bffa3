"""Convolutions of bytes on tensor cores: ``mma.sync.m16n8k32`` (m8n8k16 on sm_75), four bytes to a word.

Words are those of `bnncc.dialect.computes_bytes.byte_conv2d`; what the offset of the levels adds is in the epilogue's
base. Sums are exact: int32, as everywhere.
"""

from __future__ import annotations

from typing import Any, ClassVar

from tvm import tirx

from .gemm import Gemm, ImplicitGemm, Product
from .warp_mma import WarpMma, choose


class ByteMma(WarpMma):
    """Dot products of bytes, the weights signed."""

    def _step(self) -> None:
        kind = f"s32.{'s8' if str(self.gemm.x.dtype) == 'int8' else 'u8'}.s8.s32"
        for i in range(self.down):
            for j in range(self.across):
                self.mma(kind, self.sums, 4 * (i * self.across + j), self.a_of(0, i), self.b_of(0, j))

    def _total(self, fragment: int, n: int, row: Any, column: Any) -> Any:
        return tirx.reinterpret("int32", self.sums[4 * fragment + n])


class ByteConv(ImplicitGemm):
    """Convolutions and dense layers of quantized values."""

    name = "convolution of bytes on tensor cores"
    anchor_role: ClassVar[str] = "byte_conv2d"

    def product(self, gemm: Gemm) -> Product | str:
        if gemm.lanes != 1:
            return "its weights do not lie as tensor cores take them"
        gpu = self.target.gpu
        return choose(gemm, gpu, lambda tile: ByteMma(gemm, tile, gpu))
