"""Float convolutions and dense layers: the register tile of the binary ones with fused multiply-adds."""

from __future__ import annotations

from typing import Any, ClassVar

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV
from tvm.sym import Analyzer

from bnncc.dialect.stages import ZERO_ROWS

from .base import Stages
from .register_tile import TiledAnchor
from .written import placed

#: Axes of a convolution's stage: rows of the result, rows of the window.
_Y, _KY = 1, 6


class Conv(TiledAnchor):
    """Float convolutions, grouped or not; depthwise ones are reductions."""

    name = "convolution"
    anchor_role: ClassVar[str] = "conv2d"

    def __call__(self, func: tirx.PrimFunc) -> Schedule | str:
        sch = super().__call__(func)
        if not isinstance(sch, str):
            for block in Stages(sch).blocks:
                if ZERO_ROWS in sch.get(block).annotations and len(sch.get(block).iter_vars) > _KY:
                    _leave_out_zeros(sch, block)
        return sch

    def accumulators(self, dtype_bits: int, lanes: int) -> int:
        registers = max(1, dtype_bits * lanes // self.target.vector_bits)
        # One input and one spare. Where 32-bit ARM has no more, it loads inputs ahead and spills sums.
        taken = 4 if self.target.arch == "arm" else 2
        return (self.target.registers - taken) // registers


class Dense(Conv):
    """Dense layers: rows of the batch are the tile's pixels."""

    name = "dense"
    anchor_role: ClassVar[str] = "dense"


def _leave_out_zeros(sch: Schedule, sums: SBlockRV) -> None:
    """Has a tile skip the rows of a window in which it would multiply nothing but zeros around the image.

    for ky in 0 … KH: …    -->    for ky in 0 … KH: if any of the rows that the tile reads lies in the image: …

    A loop from the first such row to the last was 3 to 15 % slower on AVX-512 in all tiles: its length is not a number.
    """
    block, loops = sch.get(sums), sch.get_loops(sums)
    if int(block.iter_vars[_KY].dom.extent) == 1:
        return
    top, bottom = (int(rows) for rows in block.annotations[ZERO_ROWS])
    pixel = block.reads[1]  # behind the sums themselves
    height, row = int(pixel.source.shape[1]), pixel.region[1].min
    nest = [sch.get(loop) for loop in loops]
    realize = nest[-1].body
    y, ky = realize.iter_values[_Y], realize.iter_values[_KY]
    depth = next(i for i, loop in enumerate(nest) if loop.loop_var.same_as(ky))
    window, inside = nest[depth], nest[depth + 1 :]
    axes = [iv.var for iv in block.iter_vars]

    def read(*, last: bool) -> Any:
        """The row that the first or the last of the tile's rows reads."""
        at = placed(y, {loop.loop_var: tirx.const(int(loop.extent) - 1 if last else 0, "int32") for loop in inside})
        return Analyzer().simplify(placed(row, {axes[_Y]: at, axes[_KY]: ky}))

    within = tirx.all(read(last=True) >= top, read(last=False) < height - bottom)
    body = tirx.IfThenElse(within, window.body, None)
    asking = tirx.For(ky, window.min, window.extent, window.kind, body, None, window.annotations)
    sch.state.replace(sch.state.get_sref(window), asking, {})
