"""Images that are turned from NCHW to NHWC and padded: square tiles as in `permute`, straight into the larger image.

for each row of the larger image, parallel:
    border: filled                              or, in a row of the image:
    for each square of channels and columns:    turned over inside vector registers
    left and right of them: filled

Two or three channels make up no square: vectors of them are interleaved, which on ARM is one store.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from .base import TASK_WORK, Rule, Stages, dtype_bits
from .permute import order_of, square, transposed
from .written import over

_TO_NHWC = [0, 2, 3, 1]
#: Channels that are interleaved.
_FEW = (2, 3)


class PermutePad(Rule):
    """Kernels that transpose a tensor of 32-bit elements to NHWC and pad its images."""

    name = "transposition with padding"

    def __call__(self, func: tirx.PrimFunc) -> Schedule | str:
        sch = Schedule(func)
        stages = Stages(sch)
        if [stages.role(block) for block in stages.blocks] != ["permute", "pad"]:
            return "not a transposition and padding alone"
        turn, pad = (sch.get(block) for block in stages.blocks)
        source, result = turn.reads[0].source, pad.writes[0].source
        if order_of(turn) != _TO_NHWC or dtype_bits(source.dtype) != 32:
            return "no transposition of 32-bit elements to NHWC"
        channels, width = int(source.shape[1]), int(source.shape[3])
        size = square(self.target)
        shortest = width if channels in _FEW else min(channels, width)
        while size > 4 and shortest < size:
            size //= 2
        if shortest < size:
            return f"shorter than a tile of {size}"
        return Schedule(_kernel(func, source, result, pad, size, self.target.float_lanes))


def _kernel(func: tirx.PrimFunc, source: Any, result: Any, pad: Any, size: int, lanes: int) -> Any:
    images, channels, height, width = (int(extent) for extent in source.shape)
    _, rows, cols, _ = (int(extent) for extent in result.shape)
    _, _, value = pad.body.value.args
    top, left = _edges(pad)

    def start(tile: Any, extent: int) -> Any:
        return tile * size if extent % size == 0 else tirx.min(tile * size, extent - size)

    turns = [c * size + i for i in range(size) for c in range(channels)]
    vectors = -(-width // size)
    together = next(count for count in (4, 2, 1) if vectors % count == 0)

    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("main")
        T.func_attr({"tirx.noalias": True})
        a, b = (T.arg(buffer.name, buffer) for buffer in (source, result))
        line = T.decl_buffer((images, rows, cols * channels), str(result.dtype), data=b.data, layout=None)

        def fill(n: Any, y: Any, first: int, count: int) -> None:
            def store(at: Any, size: int) -> None:
                where = tirx.Ramp(first + at, 1, size) if size > 1 else first + at
                T.buffer_store(line, tirx.Broadcast(value, size) if size > 1 else value, [n, y, where])

            over(count, lanes, store)

        loop = T.parallel if images * rows * cols * channels > 2 * size * TASK_WORK else T.serial
        with loop(0, images * rows) as task:
            n, y = tirx.floordiv(task, rows), tirx.floormod(task, rows)
            with T.If(tirx.all(y >= top, y < top + height)):
                with T.Then():
                    fill(n, y, 0, left * channels)
                    if channels in _FEW:
                        with T.serial(0, vectors // together) as across:
                            for i in range(together):
                                x = start(across * together + i, width)
                                loaded = [a[n, c, y - top, tirx.Ramp(x, 1, size)] for c in range(channels)]
                                place = tirx.Ramp((left + x) * channels, 1, size * channels)
                                T.buffer_store(line, tirx.Shuffle(loaded, turns), [n, y, place])
                    else:
                        with T.serial(0, -(-channels // size)) as down, T.serial(0, -(-width // size)) as across:
                            c, x = start(down, channels), start(across, width)
                            loaded = [a[n, c + i, y - top, tirx.Ramp(x, 1, size)] for i in range(size)]
                            for i, column in enumerate(transposed(loaded)):
                                T.buffer_store(b, column, [n, y, x + left + i, tirx.Ramp(c, 1, size)])
                    fill(n, y, (left + width) * channels, (cols - left - width) * channels)
                with T.Else():
                    fill(n, y, 0, cols * channels)
    return builder.get()


def _edges(pad: Any) -> tuple[int, int]:
    """Rows above and columns left of the image, from what a padded image reads: [n, y − top, x − left, c]."""
    _, y, x, _ = (r.min for r in pad.reads[0].region)
    top, left = (int(index.b) if isinstance(index, tirx.Sub) else 0 for index in (y, x))
    return top, left
