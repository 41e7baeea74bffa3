"""Integer convolutions: dot products of bytes on the register tile of the binary ones."""

from __future__ import annotations

from typing import ClassVar

from tvm.s_tir import SBlock

from bnncc.dialect.stages import WIDE
from bnncc.targets.intrinsics import DOTS, Dot

from .register_tile import TiledAnchor


class ByteConv(TiledAnchor):
    """Convolutions of bytes: four channels to a word, one word against a vector of weights."""

    name = "integer convolution"
    anchor_role: ClassVar[str] = "byte_conv2d"

    def accumulators(self, dtype_bits: int, lanes: int) -> int:
        registers = max(1, dtype_bits * lanes // self.target.vector_bits)
        return (self.target.registers - DOTS[self.target.dot].temporaries) // registers

    def dot(self, anchor: SBlock) -> Dot:
        wide = f"{self.target.dot} wide"
        return DOTS[wide if anchor.annotations[WIDE] and wide in DOTS else self.target.dot]
