"""Binary convolutions: xor, popcount, add on register tiles."""

from __future__ import annotations

from typing import ClassVar

from .register_tile import TiledAnchor

#: Vectors (weights and sums) of a tile where POPCNT counts single words; measured best of 3 to 8.
_SCALAR_VECTORS = 3

#: Sums of a tile where carry-save adders fill the registers; measured best of 5 to 14.
_CARRY_SAVE_SUMS = 9


class BinaryConv(TiledAnchor):
    """Convolutions of words with one popcount sum."""

    name = "binary convolution"
    anchor_role: ClassVar[str] = "binary_conv2d"

    @property
    def scalar(self) -> bool:
        return self.target.popcount == "scalar"

    def accumulators(self, dtype_bits: int, lanes: int) -> int:
        if self.scalar:
            # Of sixteen general registers, each vector of accumulators takes one to a lane, and its weights as many.
            return _SCALAR_VECTORS
        registers = max(1, dtype_bits * lanes // self.target.vector_bits)
        if self.target.counting == "carry_save":
            return _CARRY_SAVE_SUMS // registers
        # The difference and, where LLVM counts by tables, the table, its mask, a zero and two halves.
        temporaries = {"vector": 3, "table": 5, "bytes": 4}[self.target.popcount]
        return (self.target.registers - temporaries) // registers


class BinaryConvBytes(BinaryConv):
    """Convolutions of bytes: sums of at most 31 steps in bytes, added up in a wider type."""

    name = "binary convolution in bytes"
    anchor_role: ClassVar[str] = "binary_conv2d.chunk"
    total_role: ClassVar[str | None] = "binary_conv2d.total"

    def accumulators(self, dtype_bits: int, lanes: int) -> int:
        # The wide totals live in the first-level cache; the byte accumulators fill the registers.
        registers = max(1, 8 * lanes // self.target.vector_bits)
        return (self.target.registers - 4) // registers


class BinaryConvWordBytes(BinaryConv):
    """Convolutions of words whose bytes count apart, for at most 31 steps."""

    name = "binary convolution in bytes of words"
    anchor_role: ClassVar[str] = "binary_conv2d.bytes"
    total_role: ClassVar[str | None] = "binary_conv2d.total"
    lane_axis: ClassVar[int] = -1
    in_bytes: ClassVar[bool] = True
