"""Float convolutions and dense layers: the register tile of the binary ones with fused multiply-adds."""

from __future__ import annotations

from typing import ClassVar

from .register_tile import TiledAnchor


class Conv(TiledAnchor):
    """Float convolutions, grouped or not; depthwise ones are reductions."""

    name = "convolution"
    anchor_role: ClassVar[str] = "conv2d"

    def accumulators(self, dtype_bits: int, lanes: int) -> int:
        registers = max(1, dtype_bits * lanes // self.target.vector_bits)
        # One input and one spare. Where 32-bit ARM has no more, it loads inputs ahead and spills sums.
        taken = 4 if self.target.arch == "arm" else 2
        return (self.target.registers - taken) // registers


class Dense(Conv):
    """Dense layers: rows of the batch are the tile's pixels."""

    name = "dense"
    anchor_role: ClassVar[str] = "dense"
