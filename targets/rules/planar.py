"""Windows over images in the model's own layout, NCHW: lanes along the rows of one channel's plane.

    for each plane, and each of its parts that fits the first-level cache, parallel:
        frame[row, :] = padding | x[row, :] | padding          so that no window asks where it is; with stride 2,
                                                            even pixels apart from odd ones
        for each tile of rows and vectors of pixels:
            for each row and place of it that the tile's windows read:          unrolled
                acc = op(acc, frame[row, pixel + kx])           of all windows of the tile that this lies in
            epilogue                                            on the accumulators, still in registers

The sum of a window is in the order of its rows, as where lanes are channels. The last vector of a row begins early
rather than to reach over the end; rows shorter than a vector are computed as one, and stored in parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir.expr import TensorLoad
from tvm.s_tir import Schedule
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from bnncc.dialect.larger import larger
from bnncc.dialect.stages import WINDOW, Window

from .base import TASK_WORK, Rule, Stages
from .written import over, parts, store, substituted

#: Bytes of the part of a plane that is framed at once, and its rows of results below which too much of it is still on
#: its way to the cache when it is read.
_FRAME, _PART = 16 << 10, 8
#: Rows of a tile, the best first: they share the rows that their windows read, and their sums lie in registers.
_ROWS = (4, 5, 6, 7, 3, 2, 1)
#: Vectors of a tile that share each weight, beside or else below each other; and operations, which are written out.
_VECTORS, _WRITTEN = 2, 704
#: Lanes of a vector at the end of a row, at least.
_FEWEST = 4

_KINDS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "planar.max": lambda acc, value, _: larger(acc, value),
    "planar.sum": lambda acc, value, _: acc + value,
    "planar.products": lambda acc, value, weight: acc + value * weight,
}


class Planar(Rule):
    """Pooling and depthwise convolutions of NCHW images with the elementwise stages around them."""

    name = "windows over planes"

    def __call__(self, func: tirx.PrimFunc) -> Schedule | str:
        sch = Schedule(func)
        stages = Stages(sch)
        found = stages.of(*_KINDS)
        if len(found) != 1 or len(stages.outputs) != 1:
            return "not one window over planes with one result"
        stages.inline()
        rows, window, *rest = stages.blocks
        if stages.role(rows) != "planar.rows" or stages.role(window) not in _KINDS or len(rest) > 1:
            return "more than elementwise stages around the window"
        main = sch.get(rest[0]) if rest else None
        return Schedule(_Kernel(func, sch.get(rows), sch.get(window), main, stages.role(window), self.target).build())


class _Kernel:
    """The kernel of one window: `rows` is the block that reads the image, `main` what follows the window's."""

    def __init__(self, func: tirx.PrimFunc, rows: Any, window: Any, main: Any, kind: str, target: Any) -> None:
        self.func, self.rows, self.window, self.main, self.kind = func, rows, window, main, kind
        self.of = Window(*(int(i) for i in window.annotations[WINDOW]))
        *self.planes, self.height, self.width = (int(iv.dom.extent) for iv in rows.iter_vars)
        *_, self.out_height, self.out_width = (int(e) for e in window.writes[0].source.shape)
        of = self.of
        self.lanes = min((target.float_lanes >> i for i in range(2)), key=lambda n: (-(-self.out_width // n), n))
        # The frame begins whole vectors before the image, so that what is copied is aligned.
        self.before = self.lanes * of.stride_x if of.left else 0
        reach = (of.width - 1) * of.dilation_x + 1
        last = self.before - of.left + (self.out_width - 1) * of.stride_x + reach  # what is read ends there
        self.after = max(0, last - self.before - self.width)
        filled = -(-max(last, self.before + self.width) // of.stride_x)
        self.pitch = filled + 2 * self.lanes  # a vector may end, and the padding begin, beyond it
        self.tile, self.down = self._choose_tile()
        self.part = self._part(self.tile * self.down)

    def _choose_tile(self) -> tuple[int, int]:
        """Rows of a tile, and how many such blocks lie below each other: where a row is one vector, for each weight to
        serve them all."""
        beside = min(_VECTORS, -(-self.out_width // self.lanes))
        tiles = [
            (rows, down)
            for down in ((_VECTORS, 1) if beside == 1 and self.kind == "planar.products" else (1,))
            for rows in _ROWS
            if self.out_height % (rows * down) == 0 and rows * down * beside * self.of.area <= _WRITTEN
        ]
        return max(tiles or [(1, 1)], key=lambda tile: min(self._part(tile[0] * tile[1]), 2 * tile[0], _PART))

    def _framed(self, rows: int) -> int:
        return (rows - 1) * self.of.stride_y + (self.of.height - 1) * self.of.dilation_y + 1

    def _part(self, tile: int) -> int:
        """Rows of the result that are computed from one frame, by tiles of so many."""
        row = 4 * self.of.stride_x * self.pitch
        whole = (rows for rows in range(tile, self.out_height + 1, tile) if self.out_height % rows == 0)
        return max((rows for rows in whole if row * self._framed(rows) <= _FRAME), default=tile)

    def build(self) -> tirx.PrimFunc:
        parts = self.out_height // self.part
        planes = self.planes[0] * self.planes[1]
        work = planes * self.out_height * -(-self.out_width // self.lanes) * (self.of.area + 2)
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"tirx.noalias": True})
            for param in self.func.params:
                T.arg(param.name, param)
            loop = T.parallel if work >= 2 * TASK_WORK and planes * parts > 1 else T.serial
            with loop(0, planes * parts) as task:
                plane, first = tirx.floordiv(task, parts), tirx.floormod(task, parts) * self.part
                self.plane = (tirx.floordiv(plane, self.planes[1]), tirx.floormod(plane, self.planes[1]))
                shape = self._framed(self.part), self.of.stride_x, self.pitch
                self.frame = T.alloc_buffer(shape, "float32", scope="local")
                with T.serial(0, self._framed(self.part)) as row:
                    self._frame_row(row, first * self.of.stride_y + row - self.of.top)
                rows = self.tile * self.down
                with T.serial(0, self.part // rows) as tile:
                    self._tile_row(first, tile * rows)
        return builder.get()

    def _frame_row(self, row: Any, y: Any) -> None:
        """Row y of the image in the frame; padding where there is none."""
        stride, end = self.of.stride_x, self.before + self.width

        def copy() -> None:
            over(self.width, self.lanes * stride, lambda at, size: self._copy(row, y, at, size))
            for phase in range(stride if self.after else 0):
                self._fill(row, phase, -(-(end - phase) // stride), -(-(end + self.after - phase) // stride))

        if self.of.top or self._framed(self.out_height) > self.height:
            with T.If(tirx.all(y >= 0, y < self.height)):
                with T.Then():
                    copy()
                with T.Else():
                    for phase in range(stride):
                        self._fill(row, phase, 0, -(-(end + self.after) // stride))
        else:
            copy()
        for phase in range(stride if self.before else 0):
            self._fill(row, phase, 0, self.lanes)

    def _fill(self, row: Any, phase: int, start: int, end: int) -> None:
        """Whole vectors of padding, from `start` on and at least to `end`."""
        outside = tirx.const(float("-inf") if self.kind == "planar.max" else 0.0, "float32")
        for at in range(start, end, self.lanes):
            T.buffer_store(self.frame, tirx.Broadcast(outside, self.lanes), [row, phase, tirx.Ramp(at, 1, self.lanes)])

    def _copy(self, row: Any, y: Any, x: Any, size: int) -> None:
        """`size` pixels, from pixel x of row y on: the even ones to one side, the odd ones to the other."""

        def value(lane: Any) -> Any:
            return substituted(self.rows.body.value, self.rows, (*self.plane, y, x + lane))

        stride = self.of.stride_x
        at = tirx.floordiv(self.before + x, stride)
        if stride == 1 or size == 1:
            store(self.frame, value, lambda lane: [row, 0, at + lane], 0, size)
            return
        pixels = T.alloc_buffer((size,), "float32", scope="local")
        store(pixels, value, lambda lane: [lane], 0, size)
        for phase in range(stride):
            vector = tirx.Shuffle([pixels[tirx.Ramp(0, 1, size)]], list(range(phase, size, stride)))
            T.buffer_store(self.frame, vector, [row, phase, tirx.Ramp(at, 1, size // stride) if size > stride else at])

    def _tile_row(self, first: Any, y: Any) -> None:
        """The results of a tile's rows, y rows into the frame's part, which begins with row `first` of the result."""
        wide = self.lanes * _VECTORS
        if whole := self.out_width // wide:
            with T.serial(0, whole) as v:
                self._tile(first, y, v * wide, [(0, i * self.lanes, self.lanes) for i in range(_VECTORS)])
        if rest := list(self._vectors(whole * wide)):
            below = range(0, self.down * self.tile, self.tile)
            self._tile(first, y, 0, [(row, at, lanes) for row in below for at, lanes in rest])

    def _vectors(self, start: int) -> Iterator[tuple[int, int]]:
        """(pixel, lanes) of vectors from `start` to the end of a row.

        The last begins early rather than to reach over the end, and computes some results again.
        """
        for at in range(start, self.out_width, self.lanes):
            lanes = min(self.lanes, max(_FEWEST, 1 << (self.out_width - at - 1).bit_length()))
            yield max(0, min(at, self.out_width - lanes)), lanes

    def _tile(self, first: Any, y: Any, x: Any, vectors: Sequence[tuple[int, int, int]]) -> None:
        """Some vectors, at (row behind y, pixel behind x, lanes), of each of a tile's rows."""
        sums = [T.alloc_buffer((self.tile, lanes), "float32", scope="local") for *_, lanes in vectors]
        self._sum(sums, [(y + below, x + at, lanes) for below, at, lanes in vectors])
        target = (self.main or self.window).writes[0].source
        # What follows a window and reads nothing else may as well be computed beyond the end of a short row.
        alone = self.main is not None and len(self.main.reads) == 1
        for row, (of, (below, start, lanes)) in itertools.product(range(self.tile), zip(sums, vectors, strict=True)):
            at = (*self.plane, first + y + below + row)

            def kept(lane: Any, row: int = row, of: Any = of) -> Any:
                return of[row, lane]

            def result(lane: Any, at: Any = at, start: int = start, kept: Any = kept) -> Any:
                return self._result(kept(lane), (*at, x + start + lane))

            def place(lane: Any, at: Any = at, start: int = start) -> list[Any]:
                return [*at, x + start + lane]

            if alone:
                store(of, result, lambda lane, row=row: [row, lane], 0, lanes)  # type: ignore[misc]
            for begin, size in parts(min(lanes, self.out_width), lanes):
                store(target, kept if alone else result, place, begin, size)

    def _result(self, value: Any, at: tuple[Any, ...]) -> Any:
        """What becomes of a window's value."""
        if self.main is None:
            return value
        windows = self.window.writes[0].source
        expr = substituted(self.main.body.value, self.main, at)
        return tvm_ffi.structural_map(expr, (TensorLoad, lambda load: value if load.source.same_as(windows) else load))

    def _sum(self, sums: Sequence[Any], vectors: Sequence[tuple[Any, Any, int]]) -> None:
        """The windows of a tile's rows at vectors (first row, pixel, lanes), step by step in `sums`.

        What windows of several rows read is used by all of them at once: it would not stay in a register until the
        next row begins. Each adds in the order of its own rows nonetheless.
        """
        of = self.of
        if self.kind != "planar.max":  # a maximum begins with the first value
            for row, (into, (*_, lanes)) in itertools.product(range(self.tile), zip(sums, vectors, strict=True)):
                nothing = tirx.Broadcast(tirx.const(0.0, "float32"), lanes)
                T.buffer_store(into, nothing, [row, tirx.Ramp(0, 1, lanes)])
        for read, j in itertools.product(range(self._framed(self.tile)), range(of.width)):
            start = self.before - of.left + j * of.dilation_x
            for row in range(self.tile):
                i, between = divmod(read - row * of.stride_y, of.dilation_y)
                if between or not 0 <= i < of.height:
                    continue
                for into, (y, x, lanes) in zip(sums, vectors, strict=True):
                    pixels = tirx.Ramp(start // of.stride_x + x, 1, lanes)
                    value = self.frame[y * of.stride_y + read, start % of.stride_x, pixels]
                    at = [row, tirx.Ramp(0, 1, lanes)]
                    if self.kind == "planar.max" and i == j == 0:
                        T.buffer_store(into, value, at)
                        continue
                    weight = None
                    if self.kind == "planar.products":
                        weight = tirx.Broadcast(self.window.reads[1].source[self.plane[1], i, j], lanes)
                    T.buffer_store(into, _KINDS[self.kind](into[tuple(at)], value, weight), at)
