"""Results of a register tile that are read in NCHW: they are turned over while they are in the first-level cache.

    for outer loops, parallel:                      a chunk of pixels and of output channels
        for tile of the chunk:
            the register tile and its epilogue      into chunk[pixel, channel], a local buffer
        y[channel, pixel] = chunk[pixel, channel]   by squares of vectors, as `permute` has them

A step of its own would fetch the whole image again, and write to as many pages at once as there are channels. On x86,
the place of a chunk in y is asked for while its tiles are computed: it comes from memory while nothing else does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tvm import s_tir, tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from bnncc.targets.intrinsics import replace_body

from .base import Stages
from .permute import transposed
from .written import placed

#: Elements of a chunk: half of a small first-level cache, and what `bnncc.targets.lowering` leaves on the stack.
_CHUNK = 4096
#: Chunks below which an image is divided further, so that threads have even shares.
_TASKS = 8
#: Elements of a cache line.
_LINE = 16
#: NHWC → NCHW.
_ORDER = (0, 3, 1, 2)


@dataclass(frozen=True)
class Chunk:
    """Rows × columns of pixels, contiguous in a plane of the result, times channels."""

    rows: int
    cols: int
    channels: int

    @property
    def pixels(self) -> int:
        return self.rows * self.cols


def turned_stage(stages: Stages, main: SBlockRV, size: int) -> SBlockRV | None:
    """The transposition to NCHW that alone reads `main`, if its planes and pixels have room for squares of `size`."""
    readers = stages.consumers(main)
    if len(readers) != 1 or stages.role(readers[0]) != "permute" or stages.is_output(main):
        return None
    block = stages.sch.get(readers[0])
    at, axes = [r.min for r in block.reads[0].region], [iv.var for iv in block.iter_vars]
    shape = [int(extent) for extent in block.writes[0].source.shape]
    moved = len(at) == 4 and all(at[position].same_as(axes[i]) for i, position in enumerate(_ORDER))
    return readers[0] if moved and shape[1] >= size and shape[2] * shape[3] >= size else None


def choose_chunk(images: int, height: int, width: int, outputs: int, tile: tuple[int, int, int], size: int) -> Chunk:
    """The chunk of whole tiles (rows, columns, channels) for an image; no side of it is shorter than `size`."""
    rows, cols, channels = tile
    divisors = (k for k in range(channels, outputs + 1, channels) if outputs % k == 0)
    channels = next(k for k in divisors if k >= size)
    if width * rows * channels > _CHUNK:
        parts = [x for x in range(cols, width, cols) if width % x == 0 and size <= x * rows * channels <= _CHUNK]
        if parts and rows == 1 and max(parts) >= size:
            return Chunk(1, max(parts), channels)
    fits = [r for r in range(rows, height + 1, rows) if height % r == 0 and r * width >= size]
    tasks = images * (outputs // channels)
    small = [r for r in fits if r * width * channels <= _CHUNK and tasks * (height // r) >= _TASKS]
    return Chunk(max(small, default=fits[0]), width, channels)


def turn(sch: Schedule, channel: LoopRV, chunk: Chunk, size: int, block: SBlockRV) -> None:
    """Puts squares of shuffles in the place of the loops over one chunk: channel, row, column.

    A square that would reach over the end begins early instead and writes some elements again.
    """
    outer = sch.get(sch.blockize(channel))
    (source,), (result,) = outer.reads, outer.writes
    n, c, y, x = (r.min for r in result.region)
    across, down = (tirx.Var(name, "int32") for name in ("channels", "pixels"))

    def start(square: Any, extent: int) -> Any:
        return square * size if extent % size == 0 else tirx.min(square * size, extent - size)

    first, at = start(across, chunk.channels), start(down, chunk.pixels)
    # Rows of a chunk follow each other without a gap, here and there: pixel i is that many columns behind the first.
    rows = [tirx.BufferLoad(source.source, [n, y, x + at + i, tirx.Ramp(c + first, 1, size)]) for i in range(size)]
    stores = [
        tirx.BufferStore(result.source, column, [n, c + first + i, y, tirx.Ramp(x + at, 1, size)])
        for i, column in enumerate(transposed(rows))
    ]
    body: Any = tirx.SeqStmt(stores)
    for var, extent in ((down, chunk.pixels), (across, chunk.channels)):
        body = tirx.For(var, 0, -(-extent // size), tirx.ForKind.SERIAL, body)
    replace_body(sch, block, outer, body)


def fetch(sch: Schedule, tiles: Sequence[LoopRV], chunk: Chunk, block: SBlockRV) -> None:
    """Asks for a chunk's place in the result while its tiles are computed, some channels with each.

    tiles: the loops around one register tile, innermost last. block: what `turn` has made.
    """
    nest = [sch.get(loop) for loop in tiles]
    realize = next(s for s in sch.get(sch.get_loops(block)[-1]).body.seq if isinstance(s, s_tir.SBlockRealize))
    (result,) = realize.block.writes
    values = dict(zip((iv.var for iv in realize.block.iter_vars), realize.iter_values, strict=True))
    n, c, y, x = (placed(r.min, values) for r in result.region)
    index: Any = 0
    for loop in nest:
        index = index * int(loop.extent) + loop.loop_var
    channels = -(-chunk.channels // math.prod(int(loop.extent) for loop in nest))
    asked = []
    for i in range(channels):
        channel = tirx.min(index * channels + i, chunk.channels - 1)
        for at in (*range(0, chunk.pixels - 1, _LINE), chunk.pixels - 1):
            address = tirx.address_of(tirx.BufferLoad(result.source, [n, c + channel, y, x + at]))
            asked.append(tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", address, 1, 3, 1)))
    last = nest[-1]
    body = tirx.SeqStmt([*asked, last.body])
    fetching = tirx.For(last.loop_var, last.min, last.extent, last.kind, body, None, last.annotations)
    sch.state.replace(sch.state.get_sref(last), fetching, {})
