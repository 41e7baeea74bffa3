"""Convolutions as products of matrices: what their kernels share, whatever multiplies.

Rows are the pixels of the result, columns the output channels of a group, the depth is the window: position by position
of the kernel, and within each the input's channels. The matrix of windows is never stored (implicit GEMM): a block of
threads copies the part of it that its tile needs from the image, step by step of the depth, into shared memory.

    kernel = copy and multiply (a `Product`)  →  sums of a tile in shared memory  →  epilogue: a thread per element

The epilogue is that of the fused function: whatever elementwise operators follow, stored and packed in the same pass.
Where it is more than that, the sums go to memory, and `LoopNests` does the rest in a launch of its own.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import tvm_ffi
from tvm import tirx
from tvm.ir import Call
from tvm.s_tir import Schedule
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from bnncc.dialect.stages import ROUNDED
from bnncc.targets.rules.base import REDUCED, Stages

from .base import BLOCKS_PER_SM, IF_THEN_ELSE, Rule
from .epilogue import Epilogue
from .graph import loads, substitute
from .nests import LoopNests
from .split import split

logger = logging.getLogger(__name__)


def flat(buffer: Any, indices: Sequence[Any]) -> Any:
    """The position of an element in its buffer."""
    at: Any = 0
    for size, index in zip(buffer.shape, indices, strict=True):
        at = at * int(size) + index
    return at


@dataclass(frozen=True)
class Tile:
    """What a block of threads computes: `rows` × `columns` sums, by warps side by side in both directions.

    depth: words of the depth of a step. stages: steps that shared memory holds.
    """

    rows: int
    columns: int
    warps_down: int
    warps_across: int
    depth: int
    stages: int

    @property
    def threads(self) -> int:
        return 32 * self.warps_down * self.warps_across


class Gemm:
    """The matrices of an anchor: ``sums[n, y, x, g, b, l] += term(x[…], w[g, b, i, j, k, l])``, or of a dense layer's,
    ``sums[n, b, l] += term(x[n, k], w[b, k, l])``, whose other axes are 1 long.

    rows: pixels. columns: output channels of a group, with those that fill up its blocks. channels: output channels
    without (0: of an anchor that nothing follows, all). depth: words or values of a position of the window; run: how
    many of these lie beside each other in x. values: that lie in a word. planes: of the windows, and of the weights.
    """

    def __init__(self, block: Any, channels: int) -> None:
        spatial = [iv for iv in block.iter_vars if iv.iter_type != REDUCED]
        reduced = [iv for iv in block.iter_vars if iv.iter_type == REDUCED]
        if len(spatial) == 3:
            spatial, reduced = [spatial[0], None, None, None, *spatial[1:]], [None, None, *reduced]
        inner, spatial, reduced = (*spatial[6:], *reduced[3:]), spatial[:6], reduced[:3]
        self.axes = [None if iv is None else iv.var for iv in (*spatial, *reduced)]
        self.inner = [iv.var for iv in inner]  # pairs of planes, or the values of a word
        self.sums = block.body.buffer
        self.annotations = dict(block.annotations)
        own, term = block.body.value.a, block.body.value.b
        if not own.source.same_as(self.sums):
            raise ValueError("an anchor adds to what it has summed")
        self.term = term
        self.images, self.height, self.width, self.groups, blocks, lanes = map(_extent, spatial)
        self.window_height, self.window_width, self.depth = map(_extent, reduced)
        self.columns = blocks * lanes
        self.lanes = lanes
        self.channels = channels or self.columns * self.groups
        w = max(loads(term), key=lambda load: len(load.source.shape))
        x = next(load for load in loads(term) if not load.source.same_as(w.source))
        self.x, self.x_indices = x.source, list(x.indices)
        self.w, self.w_indices = w.source, w.indices
        self.guards = _guards_of(term, x)
        self.values = 4 if str(self.w.dtype) == "int8" else 2 if self.annotations.get(ROUNDED) == "float16" else 1
        of_windows = int(self.x.shape[3]) if len(self.x.shape) == 5 else 1
        of_weights = int(self.w.shape[4]) if len(self.w.shape) == 7 and self.values == 1 else 1
        self.planes = of_windows, of_weights
        self.run = int(self.x.shape[-1]) // self.values // self.groups

    @property
    def rows(self) -> int:
        return self.images * self.height * self.width

    @property
    def total_depth(self) -> int:
        return self.window_height * self.window_width * self.depth

    def pixel(self, row: Any) -> tuple[Any, Any, Any]:
        """(image, y, x) of a row."""
        if self.height == self.width == 1:
            return row, tirx.const(0), tirx.const(0)
        image = self.height * self.width
        within = tirx.floormod(row, image)
        return tirx.floordiv(row, image), tirx.floordiv(within, self.width), tirx.floormod(within, self.width)

    def step(self, at: Any) -> tuple[Any, Any, Any]:
        """(ky, kx, k) of a place in the depth."""
        position, k = tirx.floordiv(at, self.depth), tirx.floormod(at, self.depth)
        return tirx.floordiv(position, self.window_width), tirx.floormod(position, self.window_width), k

    def source(self, row: Any, group: Any, at: Any, plane: Any = 0) -> tuple[Any, Any]:
        """Where in `x` the matrix of windows has its word or value, and whether it has one (None: always); at other
        places it is 0."""
        pixel, step = self.pixel(row), self.step(at)
        return self.place(pixel, step, group, plane), self.inside(pixel, step)

    def place(self, pixel: Sequence[Any], step: Sequence[Any], group: Any = None, plane: Any = 0) -> Any:
        """Where in `x` a pixel's window has its word or value (ky, kx, k). It is linear in all of them."""
        values = self._axes_at(pixel, step, group)
        indices = [substitute(index, values) for index in self.x_indices]
        if len(indices) == 5:
            indices[3] = plane
        return tirx.floordiv(flat(self.x, indices), self.values)

    def inside(self, pixel: Sequence[Any], step: Sequence[Any]) -> Any:
        """Whether that is a place of `x` and not of the padding around it; None: always."""
        values = self._axes_at(pixel, step)
        conditions = [substitute(guard, values) for guard in self.guards]
        return functools.reduce(tirx.all, conditions) if conditions else None

    def _axes_at(self, pixel: Sequence[Any], step: Sequence[Any], group: Any = None) -> dict[Any, Any]:
        zero = tirx.const(0)
        places = (*pixel, zero if group is None else group, zero, zero, *step)
        values = {axis: place for axis, place in zip(self.axes, places, strict=True) if axis is not None}
        return values | dict.fromkeys(self.inner, zero)

    def weight(self, channel: Any, at: Any, plane: Any = 0) -> Any:
        """Where in `w` the word or value of an output channel, counted through all groups, lies."""
        if self.planes[1] == 1:
            return channel * self.total_depth + at
        position, k = tirx.floordiv(at, self.depth), tirx.floormod(at, self.depth)
        positions = self.window_height * self.window_width
        return ((channel * positions + position) * self.planes[1] + plane) * self.depth + k


def _extent(iv: Any) -> int:
    return 1 if iv is None else int(iv.dom.extent)


def _guards_of(term: Any, x: Any) -> list[Any]:
    """The conditions under which a term reads `x` rather than the padding around it, which is 0."""
    guards: list[Any] = []

    def visit(call: Any) -> None:
        if call.op.same_as(IF_THEN_ELSE) and any(load.source.same_as(x.source) for load in loads(call.args[1])):
            guards.append(call.args[0])

    tvm_ffi.structural_walk(term, [(Call, visit)])
    return guards


class Product:
    """How a kernel copies and multiplies. It writes its loops with TVM's IR builder, in place of where it is called."""

    #: Of the words of shared memory.
    dtype: ClassVar[str] = "int32"

    def __init__(self, gemm: Gemm, tile: Tile) -> None:
        self.gemm, self.tile = gemm, tile

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that a multiprocessor is to hold at once, whatever registers that leaves; 0: as it comes out."""
        return 0

    @property
    def shared_words(self) -> int:
        """Words of shared memory that copying and multiplying take."""
        raise NotImplementedError

    def run(self, shared: Any, thread: Any, row: Any, column: Any, group: Any) -> Callable[[Any, Any], Any]:
        """Writes the loops that compute a tile's sums, and puts them into shared memory.

        shared: words of `dtype`; rows of `pitch` words are the tile's sums when this returns, synchronised.
        row, column: of the tile's first element; group: of its columns.
        Returns a function that gives the sum at (row in the tile, column in the tile) of the type of the anchor's.
        """
        raise NotImplementedError


class ImplicitGemm(Rule):
    """A rule for the kernels of one kind of anchor."""

    anchor_role: ClassVar[str] = ""
    #: The stage that adds up the anchor's sums, where there is one: it becomes part of the product.
    total_role: ClassVar[str] = ""

    def product(self, gemm: Gemm) -> Product | str:
        """Chooses the instruction and the tile, or says why none applies."""
        raise NotImplementedError

    def __call__(self, func: tirx.PrimFunc) -> list[tirx.PrimFunc] | str:
        sch = Schedule(func)
        stages = Stages(sch)
        anchors = stages.of(self.anchor_role)
        if len(anchors) != 1 or stages.index(anchors[0]) != 0:
            return f"it has no one {self.anchor_role or 'anchor'} as its first stage"
        total = stages.of(self.total_role)[0] if self.total_role else anchors[0]
        channels = {int(sch.get(block).body.buffer.shape[-1]) for block in stages.consumers(total)}
        if len(channels) > 1:
            return "its sums are read by stages of several widths"
        stages.inline()
        anchor = sch.get(anchors[0])
        gemm = Gemm(anchor, channels.pop() if channels else 0)
        if self.total_role:
            gemm.sums, gemm.annotations = sch.get(total).body.buffer, dict(sch.get(total).annotations)
            stages.blocks.remove(total)
        product = self.product(gemm)
        if isinstance(product, str):
            return product
        epilogue = Epilogue.of(stages, anchor, gemm)
        if isinstance(epilogue, str):
            logger.debug("%s in two launches: %s", self.name, epilogue)
            alone, rest = split(func, gemm.sums)
            pieces = [self(alone), LoopNests(self.target)(rest)]
            return [f for piece in pieces for f in (piece if isinstance(piece, list) else [piece])]
        kernel = func.with_body(_kernel(gemm, product, epilogue))
        return [kernel.with_attr(BLOCKS_PER_SM, product.blocks_per_sm) if product.blocks_per_sm else kernel]


def _kernel(gemm: Gemm, product: Product, epilogue: Epilogue) -> Any:
    """The body of the kernel's function."""
    tile = product.tile
    down, across = -(-gemm.rows // tile.rows), -(-gemm.columns // tile.columns)
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        T.func_name("kernel")
        with (
            T.launch_thread("blockIdx.x", down * across * gemm.groups) as block,
            T.launch_thread("threadIdx.x", tile.threads) as thread,
        ):
            words = max(product.shared_words, tile.rows * pitch(tile))
            shared = T.alloc_buffer((words,), product.dtype, scope="shared.dyn")
            # Kernels of a module declare what has one name with one type.
            IRBuilder.name(f"shared_{product.dtype}", shared)
            # Tiles of the same pixels are neighbours in time, for the sake of the second-level cache.
            row = tirx.floordiv(block, across * gemm.groups) * tile.rows
            column = tirx.floormod(block, across) * tile.columns
            group = tirx.floormod(tirx.floordiv(block, across), gemm.groups)
            sums = product.run(shared, thread, row, column, group)
            epilogue.run(sums, tile, thread, row, column, group)
    return builder.get().body


def pitch(tile: Tile) -> int:
    """Words from row to row of a tile's sums in shared memory: a warp stores the pairs of a fragment (eight rows, four
    pairs) in two passes without conflict."""
    return tile.columns + 8


def largest_that_fills(tiles: Sequence[Tile], gemm: Gemm, sms: int) -> Tile:
    """The first tile, of tiles from large to small, of which there are enough to give every multiprocessor one."""
    for tile in tiles:
        count = math.ceil(gemm.rows / tile.rows) * math.ceil(gemm.columns / tile.columns) * gemm.groups
        if count >= sms:
            return tile
    return tiles[-1]
