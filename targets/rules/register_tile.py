"""The register tile that binary and float convolutions share.

Lanes are output channels; one word (or float) of the input is broadcast against a vector of weights:

    for outer loops, parallel:
        for ky, kx, k:                          real loops: where all is unrolled, LLVM spills
            for pixel, vector in tile:          unrolled
                acc[pixel, vector, :] += popcount(x[pixel, ky, kx, k] ^ w[vector, ky, kx, k, :])
        epilogue of the tile                    on the accumulators, still in registers
        packing of the tile                     where the kernel's result is packed

A tile that does not divide the image leaves a rest, which the lowering peels (`base.partition`), so that the loop over
whole tiles runs without bounds checks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tvm import tirx
from tvm.s_tir import SBlock, Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from bnncc.dialect.stages import GROUP
from bnncc.targets.descriptor import TargetSpec
from bnncc.targets.intrinsics import MIN_LANES, Dot, use_dot

from .base import (
    REDUCED,
    SPATIAL,
    Rule,
    Stages,
    balance,
    dtype_bits,
    extent,
    last_common,
    parallel_outer,
    partition,
    unroll,
)
from .byte_counts import use_byte_counts
from .nests import schedule_rest
from .pack import Masks, block_lanes, in_order, schedule_bits
from .permute import square
from .tiles import Shape, TileRequest, Tiles, choose_tile, default_tile
from .turned import choose_chunk, fetch, turn, turned_stage

#: Bytes of weights up to which the loop over output channels runs inside that over pixels (half of a small L1 cache).
_CACHED_WEIGHTS = 16 << 10
#: Share of the threads' time that tasks must fill (`base.balance`) for rows alone to be shared out.
_BALANCED = 0.87
#: Bytes of a local buffer that stay on the stack; TVM takes larger ones from a workspace.
_STACK_BYTES = 1024


@dataclass(frozen=True)
class TiledAnchor(Rule):
    """Schedules a convolution or dense layer with its elementwise epilogue and the packing of its result.

    Subclasses say which anchor they take and what its inner loop needs in registers.

    tiles: has the last word on a tile.
    """

    tiles: Tiles = default_tile

    anchor_role: ClassVar[str]
    #: Stage that sums the anchor's results over parts of the reduction, where there is one.
    total_role: ClassVar[str | None] = None
    #: Of the anchor's axes, where there is such a stage.
    lane_axis: ClassVar[int] = 5
    #: Whether the anchor's sums are of the bytes of words, which that stage adds up.
    in_bytes: ClassVar[bool] = False

    @property
    def scalar(self) -> bool:
        """Whether the inner loop works on single words."""
        return False

    def accumulators(self, dtype_bits: int, lanes: int) -> int:
        """How many accumulators of `lanes` lanes the registers hold beside the inner loop's temporaries."""
        raise NotImplementedError

    def dot(self, anchor: SBlock) -> Dot | None:
        """The instructions that compute the lanes and the last axis of the reduction; None: a vectorised loop."""
        return None

    def __call__(self, func: tirx.PrimFunc) -> Schedule | str:
        sch = Schedule(func)
        stages = Stages(sch)
        anchors = stages.of(self.anchor_role)
        if len(anchors) != 1:
            return f"{len(anchors)} stages of role {self.anchor_role}"
        totals = stages.of(self.total_role) if self.total_role else []
        last = totals[0] if totals else anchors[0]
        main = last_common(stages, last)
        if main is None:
            return "the outputs share no elementwise stage after the anchor"
        stages.inline(main)
        shape = anchor_shape(stages, last, main, anchors[0])
        fused = fused_pack(stages, main, shape, self.target)
        nest = TileNest(self, stages, shape, main, fused, last)
        parts = accumulate(
            sch, last, nest.run(), scalar=self.scalar, dot=self.dot(sch.get(last)), vectorized=not self.in_bytes
        )
        if totals:
            accumulate(sch, anchors[0], parts, lane_axis=self.lane_axis, vectorized=not self.in_bytes)
        nest.finish()
        done = {stages.name(b) for b in (*anchors, *totals, main, *nest.behind) if b in stages.blocks}
        schedule_rest(stages, self.target, done)
        if self.in_bytes:
            use_byte_counts(sch, anchors[0], last)
        return sch


def anchor_shape(stages: Stages, last: SBlockRV, main: SBlockRV, anchor: SBlockRV) -> Shape:
    sch = stages.sch
    block = sch.get(last)
    spatial = [int(iv.dom.extent) for iv in block.iter_vars if iv.iter_type == SPATIAL]
    steps = math.prod(int(iv.dom.extent) for iv in block.iter_vars if iv.iter_type == REDUCED)
    if stages.name(anchor) != stages.name(last):
        steps *= math.prod(int(iv.dom.extent) for iv in sch.get(anchor).iter_vars if iv.iter_type == REDUCED)
    annotations = sch.get(anchor).annotations
    steps *= int(annotations[GROUP]) if GROUP in annotations else 1
    outputs = int(sch.get(main).iter_vars[-1].dom.extent)
    weights = sch.get(anchor).reads[-1].source
    size = math.prod(int(e) for e in weights.shape) * (dtype_bits(weights.dtype) // 8)
    if len(spatial) == 3:  # dense
        rows, blocks, lanes = spatial
        return Shape(1, 1, rows, 1, blocks, lanes, outputs, steps, size)
    images, height, width, groups, blocks, lanes = spatial
    if height * width == 1:
        images, width = 1, images
    return Shape(images, height, width, groups, blocks, lanes, outputs, steps, size)


def fused_pack(stages: Stages, main: SBlockRV, shape: Shape, target: TargetSpec) -> tuple[SBlockRV, ...]:
    """The stages (bits, bytes) that pack the epilogue tile by tile: if whole blocks of bits meet whole tiles."""
    packs = stages.of("pack.bits")
    if len(packs) != 1 or not (shape.groups == 1 or shape.whole_blocks):
        return ()
    bits = packs[0]
    if [stages.name(b) for b in stages.producers(bits)] != [stages.name(main)]:
        return ()
    (pack,) = stages.consumers(bits)
    axes = [int(iv.dom.extent) for iv in stages.sch.get(pack).iter_vars]
    masked = in_order(stages.sch, bits, target)
    if masked and shape.lanes not in (8, 16):
        return ()
    channels = shape.lanes if masked else 8 * block_lanes(stages.sch, bits)
    aligned = axes[-1] * 8 == shape.outputs and channels % shape.lanes == 0
    whole = shape.groups == 1 or shape.group_outputs % channels == 0
    return (bits, pack) if len(axes) == 4 and aligned and whole and shape.outputs % shape.lanes == 0 else ()


class TileNest:
    """Loops of the epilogue and of what packs it, around one register tile."""

    def __init__(
        self,
        rule: TiledAnchor,
        stages: Stages,
        shape: Shape,
        main: SBlockRV,
        fused: tuple[SBlockRV, ...],
        last: SBlockRV,
    ) -> None:
        self.stages, self.sch, self.shape = stages, stages.sch, shape
        self.main, self.fused, self.target = main, fused, rule.target
        self.most_pixels = 64
        self.turned = None if fused else turned_stage(stages, main, square(rule.target))
        self.behind = (self.turned,) if self.turned else fused
        masked = fused and in_order(self.sch, fused[0], rule.target)
        self.masks = Masks(self.sch, fused[0], shape.lanes) if masked else None
        chunk = shape.blocks if fused or self.turned else None
        if fused and not self.masks:
            self.channels = 8 * block_lanes(self.sch, fused[0])
            bits = dtype_bits(self.sch.get(main).writes[0].source.dtype)
            self.most_pixels = max(1, _STACK_BYTES * 8 // bits // self.channels)
            chunk = self.channels // shape.lanes
        packed = "masks" if self.masks else "bits" if fused else "planes" if self.turned else "values"
        written = "+".join(str(self.sch.get(b).writes[0].source.dtype) for b in stages.outputs)
        self.tile = rule.tiles(self._request(rule, f"{rule.name} to {packed} in {written}", last, chunk))
        if not fused or self.masks:
            self.channels = self.tile.vectors * shape.lanes

    def _request(self, rule: TiledAnchor, kind: str, last: SBlockRV, chunk: int | None) -> TileRequest:
        room = rule.accumulators(dtype_bits(self.sch.get(last).writes[0].source.dtype), self.shape.lanes)
        dot = rule.dot(self.sch.get(last))
        weights = dot.weights if dot else 1
        tile = choose_tile(self.shape, room, weights=weights, chunk=chunk, most_pixels=self.most_pixels)
        return TileRequest(kind, self.shape, tile, room, weights, chunk, self.most_pixels)

    def run(self) -> LoopRV:
        """Schedules everything outside the reduction; returns the loop whose body is one register tile."""
        sch, main = self.sch, self.main
        if self.turned:
            return self._with_planes(self.turned)
        if not self.fused:
            loop = self._outer(main, self.channels)
            self._tile_loops(main)
            return loop
        bits, pack = self.fused
        if self.masks:
            return self._with_masks(self.masks, pack)
        if self.stages.is_output(main):
            loop = self._outer(main, self.channels)
            sch.reverse_compute_at(bits, loop, preserve_unit_loops=True)
            sch.reverse_compute_at(pack, loop, preserve_unit_loops=True)
            schedule_bits(sch, bits, pack)
        else:
            loop = self._outer(pack, self.channels // 8)
            schedule_bits(sch, bits, pack)
            sch.compute_at(main, loop, preserve_unit_loops=True)
            sch.set_scope(main, 0, "local")
            self.pixel_loops = len(sch.get(main).iter_vars) - 1
        *pixels, channel = sch.get_loops(main)[-self.pixel_loops - 1 :]
        part, _ = sch.split(channel, [None, self.tile.vectors * self.shape.lanes])
        sch.reorder(part, *pixels)
        self._tile_loops(main)
        return part

    def _with_masks(self, masks: Masks, pack: SBlockRV) -> LoopRV:
        """The same where comparisons of the tile's vectors are its packed bits already."""
        sch, main = self.sch, self.main
        if self.stages.is_output(main):
            loop = self._outer(main, self.channels)
            self._tile_loops(main)
            sch.reverse_compute_at(masks.blocks, loop, preserve_unit_loops=True)
            sch.reverse_compute_at(pack, loop, preserve_unit_loops=True)
            pixel_loops = len(sch.get(pack).iter_vars) - 1
        else:
            sch.compute_inline(main)
            self.stages.blocks.remove(main)
            loop = self._outer(pack, self.channels // 8)
            pixel_loops = self.pixel_loops
        masks.place(pack)
        unroll(sch, *sch.get_loops(pack)[-2 - pixel_loops : -1])
        return loop

    def _with_planes(self, turned: SBlockRV) -> LoopRV:
        """The same where a chunk of tiles is turned over at once."""
        sch, main, shape, tile = self.sch, self.main, self.shape, self.tile
        n, c, y, x = sch.get_loops(turned)
        whole = extent(sch, n), extent(sch, y), extent(sch, x), extent(sch, c)
        # TVM finds the tiles of a chunk that begins within a group not to be affine.
        channels = self.channels if shape.groups == 1 else shape.group_outputs
        self.chunk = chunk = choose_chunk(*whole, (tile.rows, tile.cols, channels), square(self.target))
        co, ci = sch.split(c, [None, chunk.channels])
        yo, yi = sch.split(y, [None, chunk.rows])
        xo, xi = sch.split(x, [None, chunk.cols])
        tasks = [co, n, yo, xo] if shape.weight_bytes > _CACHED_WEIGHTS else [n, yo, xo, co]
        sch.reorder(*tasks, ci, yi, xi)
        task = parallel_outer(sch, tasks, shape.vector_steps)
        sch.compute_at(main, task, preserve_unit_loops=True)
        sch.set_scope(main, 0, "local")
        _, y, x, c = sch.get_loops(main)[-4:]
        co, ci = sch.split(c, [None, self.channels])
        yo, yi = sch.split(y, [None, tile.rows])
        xo, xi = sch.split(x, [None, tile.cols])
        sch.reorder(co, yo, xo, yi, xi, ci)
        if chunk.cols % tile.cols:
            partition(sch, xo)
        self.pixel_loops = 2
        self._tile_loops(main)
        self.plane = sch.get_loops(turned)[-3]
        self.tiles_of_chunk = (co, yo, xo)
        return xo

    def finish(self) -> None:
        """What is put in the place of loops once all else is scheduled."""
        if self.masks:
            self.masks.finish()
        if self.turned:
            turn(self.sch, self.plane, self.chunk, square(self.target), self.turned)
            if self.target.arch == "x86_64":
                fetch(self.sch, self.tiles_of_chunk, self.chunk, self.turned)

    def _outer(self, block: SBlockRV, channels: int) -> LoopRV:
        """Splits pixels and channels of a stage into tiles, and orders and parallelises the loops over tiles."""
        sch, shape, tile = self.sch, self.shape, self.tile
        *pixels, channel = sch.get_loops(block)
        outputs = extent(sch, channel)
        if shape.whole_blocks:
            co, ci = sch.split(channel, [None, channels])
            uneven = outputs % channels != 0
        else:
            co, ci = sch.split(channel, [shape.groups, None])
            uneven = False
        if len(pixels) == 1 or (shape.height == 1 and extent(sch, pixels[-1]) == 1):
            batch, *units = pixels
            no, ni = sch.split(batch, [None, tile.cols])
            rows, across, within = [], no, [ni, *units]
        else:
            n, y, x = pixels
            yo, yi = sch.split(y, [None, tile.rows])
            across, xi = sch.split(x, [None, tile.cols])
            rows, within = [n, yo], [yi, xi]
        self.pixel_loops = len(within)
        if shape.width % tile.cols:
            partition(sch, across)
        if uneven:
            partition(sch, co)
        by_channel = shape.weight_bytes > _CACHED_WEIGHTS
        around = None
        if by_channel:
            sch.reorder(co, *rows, across, *within, ci)
            # By rows where they are enough: then a thread finds in its own cache what it wrote in the step before, and
            # no other one writes bits into the same cache line.
            if rows and (uneven or balance(_product(sch, rows)) >= _BALANCED):
                tasks, around = rows, co
            else:
                # A loop that is peeled stays alone: fused, its bounds would be checked at every tile.
                tasks = [co] if uneven else [co, *rows]
        else:
            sch.reorder(*rows, across, co, *within, ci)
            tasks = rows
        if tasks:
            parallel_outer(sch, tasks, shape.vector_steps, around)
        return across if by_channel else co

    def _tile_loops(self, main: SBlockRV) -> None:
        """Unrolls and vectorises the epilogue of one register tile."""
        sch, shape = self.sch, self.shape
        channel = sch.get_loops(main)[-1]
        lanes = epilogue_lanes(self.target, shape, extent(sch, channel))
        cv, cl = sch.split(channel, [None, lanes])
        sch.vectorize(cl)
        sch.unroll(cv)
        unroll(sch, *sch.get_loops(main)[-2 - self.pixel_loops : -2])


def _product(sch: Schedule, loops: list[LoopRV]) -> int:
    return math.prod(extent(sch, loop) for loop in loops)


def epilogue_lanes(target: TargetSpec, shape: Shape, channels: int) -> int:
    """Lanes of the epilogue: a whole vector of floats or of the accumulators, whichever is more, if it divides."""
    lanes = max(target.float_lanes, shape.lanes)
    while channels % lanes:
        lanes //= 2
    return lanes if lanes >= min(4, channels) else channels


def accumulate(
    sch: Schedule,
    block: SBlockRV,
    at: LoopRV,
    *,
    scalar: bool = False,
    dot: Dot | None = None,
    lane_axis: int = -1,
    vectorized: bool = True,
) -> LoopRV:
    """Moves a reduction under `at` with its lanes innermost; returns the innermost loop of the reduction itself.

    scalar: lanes are unrolled, not vectorised. dot: computes the lanes and the reduction's last axis.
    lane_axis: which of the spatial axes. vectorized: else the lanes stay a plain loop, the innermost.
    """
    over_lanes = sch.unroll if scalar else sch.vectorize
    sch.compute_at(block, at, preserve_unit_loops=True)
    axes = sch.get(block).iter_vars
    loops = sch.get_loops(block)[-len(axes) :]
    reduced = [loop for loop, iv in zip(loops, axes, strict=True) if iv.iter_type == REDUCED]
    spatial = [loop for loop, iv in zip(loops, axes, strict=True) if iv.iter_type == SPATIAL]
    lane = spatial.pop(lane_axis)
    if dot and extent(sch, lane) < MIN_LANES:
        dot = None  # a convolution of fewer channels than a vector has lanes
    last = [reduced.pop()] if dot else []
    sch.reorder(*reduced, *spatial, lane, *last)
    unroll(sch, *spatial)
    if vectorized and not dot:
        over_lanes(lane)
    init = sch.decompose_reduction(block, reduced[0])
    *others, first = sch.get_loops(init)[-len(spatial) - 1 :]
    unroll(sch, *others)
    over_lanes(first)
    sch.set_scope(block, 0, "local")
    if dot:
        use_dot(sch, block, lane, dot)
    return reduced[-1]
