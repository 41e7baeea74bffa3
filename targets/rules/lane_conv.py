"""Binary convolutions with the reduction in the lanes: nothing is broadcast, and no vector operation is spent on it.

    for outer loops, parallel:
        for tile of 8 output channels:
            for ky, kx, k:                        16 bytes of a pixel, or of neighbouring ones, to a step
                for pixel, channel in tile:       unrolled
                    bytes[pixel, channel, :] += popcount(x[pixel, ky, kx, k, :] ^ w[channel, ky, kx, k, :])
            totals[pixel, 0 … 7] += lanes of bytes[pixel, 0 … 7, :], added up pairwise
        epilogue and packing as in `register_tile`

On NEON the inner loop is EOR, CNT and ADD, with loads beside them; in layouts that broadcast the input every pixel of
the tile costs one vector operation more, because LD1R and DUP use the same pipes. The sums across lanes are trees of
ADDP, which halve many vectors at once, so that eight channels cost 9 to 15 operations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target.codegen import llvm_lookup_intrinsic_id

from bnncc.dialect.stages import STEPS
from bnncc.targets.descriptor import TargetSpec
from bnncc.targets.intrinsics import replace_body, vpadd

from .base import REDUCED, SPATIAL, Stages, last_common, unroll
from .lane_steps import use_assembler
from .nests import schedule_rest
from .register_tile import TiledAnchor, TileNest, anchor_shape, fused_pack
from .tiles import Shape, Tile, TileRequest, row_pixels


class LaneConv(TiledAnchor):
    """Binary convolutions whose weights keep sixteen bytes of the reduction beside each other."""

    name = "binary convolution in lanes"
    anchor_role: ClassVar[str] = "binary_conv2d.lanes"
    total_role: ClassVar[str | None] = "binary_conv2d.lane_total"

    def accumulators(self, dtype_bits: int, lanes: int) -> int:
        return most_pixels(self.target) + 1

    def __call__(self, func: tirx.PrimFunc) -> Schedule | str:
        sch = Schedule(func)
        stages = Stages(sch)
        anchors, totals = stages.of(self.anchor_role), stages.of(str(self.total_role))
        if len(anchors) != 1:
            return f"{len(anchors)} stages of role {self.anchor_role}"
        (anchor,), (total,) = anchors, totals
        main = last_common(stages, total)
        if main is None:
            return "the outputs share no elementwise stage after the anchor"
        stages.inline(main)
        lanes = int(sch.get(anchor).writes[0].source.shape[-1])
        summed = int(sch.get(total).iter_vars[-1].dom.extent)
        shape = anchor_shape(stages, total, main, anchor)
        shape = replace(shape, steps=shape.steps // summed)
        fused = fused_pack(stages, main, shape, self.target)
        nest = _LaneNest(self, stages, shape, main, fused, total, lanes // summed)
        at = nest.run()
        chunks, lanes_loop = _sum_lanes(sch, total, at, lanes // summed)
        steps = _count(sch, anchor, chunks)
        _use_tree(sch, total, lanes_loop, lanes // summed, self.target.arch)
        nest.finish()
        schedule_rest(stages, self.target, {stages.name(b) for b in (anchor, total, main, *nest.behind)})
        if self.target.assembles_steps:
            use_assembler(sch, steps)
        return sch


def most_pixels(target: TargetSpec) -> int:
    """Vectors of pixels in a tile: half the registers are sums; with three quarters of them LLVM begins to spill."""
    return max(1, target.registers // 2 // target.lane_block)


class _LaneNest(TileNest):
    """The loops around a tile whose vectors hold `pixels` neighbouring pixels."""

    def __init__(
        self,
        rule: TiledAnchor,
        stages: Stages,
        shape: Shape,
        main: SBlockRV,
        fused: tuple[SBlockRV, ...],
        last: SBlockRV,
        pixels: int,
    ) -> None:
        self.together = pixels
        super().__init__(rule, stages, shape, main, fused, last)

    def _request(self, rule: TiledAnchor, kind: str, last: SBlockRV, chunk: int | None) -> TileRequest:
        pixels = self.together
        most = max(1, min(most_pixels(rule.target), self.most_pixels // pixels))
        vectors = self.shape.width // pixels
        # Pixels that share a vector cannot be peeled apart.
        cols = row_pixels(vectors, most) if pixels == 1 else max(d for d in range(1, most + 1) if vectors % d == 0)
        room = rule.accumulators(8, self.shape.lanes)
        # One vector of channels at a time: more sums than it has do not fit.
        return TileRequest(kind, self.shape, Tile(1, pixels * cols, 1), room, 1, 1, self.most_pixels, pixels)


def _sum_lanes(sch: Schedule, total: SBlockRV, at: LoopRV, pixels: int) -> tuple[LoopRV, LoopRV]:
    """Moves the totals under `at`; returns the loop over chunks, and the one whose body sums whole vectors."""
    sch.compute_at(total, at, preserve_unit_loops=True)
    n, y, x, g, b, c, *chunks, lane = sch.get_loops(total)[-len(sch.get(total).iter_vars) :]
    inner = []
    if pixels > 1:
        x, within = sch.split(x, [None, pixels])
        inner.append(within)
    sch.reorder(*chunks, n, y, x, g, b, *inner, c, lane)
    unroll(sch, n, y, x, g, b)
    init = sch.decompose_reduction(total, chunks[0])
    *others, channel = sch.get_loops(init)[-6 - len(inner) :]
    unroll(sch, *others)
    sch.vectorize(channel)
    sch.set_scope(total, 0, "local")
    return chunks[-1], inner[0] if inner else c


def _count(sch: Schedule, anchor: SBlockRV, at: LoopRV) -> LoopRV:
    """Moves the counts of single bytes under `at`, the chunk that they belong to; returns the outermost loop
    over their reduction."""
    sch.compute_at(anchor, at, preserve_unit_loops=True)
    axes = sch.get(anchor).iter_vars
    loops = sch.get_loops(anchor)[-len(axes) :]
    reduced = [loop for loop, iv in zip(loops, axes, strict=True) if iv.iter_type == REDUCED]
    *spatial, lane = [loop for loop, iv in zip(loops, axes, strict=True) if iv.iter_type == SPATIAL]
    sch.reorder(*reduced, *spatial, lane)
    unroll(sch, *spatial)
    sch.vectorize(lane)
    init = sch.decompose_reduction(anchor, reduced[0])
    *others, lane = sch.get_loops(init)[-len(spatial) - 1 :]
    unroll(sch, *others)
    sch.vectorize(lane)
    sch.set_scope(anchor, 0, "local")
    return reduced[0]


def _use_tree(sch: Schedule, update: SBlockRV, outer: LoopRV, pixels: int, arch: str) -> None:
    """Puts a tree of pairwise sums in the place of the loops from `outer` inwards, as `bnncc.targets.intrinsics`."""
    block = sch.get(sch.blockize(outer))
    (totals,) = block.writes
    counts = next(r for r in block.reads if not r.source.same_as(totals.source))
    *at, channel, lane = (r.min for r in counts.region)
    channels, width = (int(r.extent) for r in counts.region[-2:])
    vectors = [tirx.BufferLoad(counts.source, [*at, channel + i, tirx.Ramp(lane, 1, width)]) for i in range(channels)]
    steps = int(sch.get(update).annotations[STEPS])
    sums = tree(vectors, pixels, 8 * steps, arch)
    dtype = str(totals.source.dtype)
    stores = []
    for pixel, value in enumerate(sums):
        n, y, x, g, b, first = (r.min for r in totals.region)
        where = [n, y, x + pixel, g, b, tirx.Ramp(first, 1, channels)]
        wide = value if dtype == "uint16" else tirx.Cast(f"{dtype}x{channels}", value)
        stores.append(tirx.BufferStore(totals.source, tirx.BufferLoad(totals.source, where) + wide, where))
    replace_body(sch, update, block, stores[0] if len(stores) == 1 else tirx.SeqStmt(stores))


def tree(vectors: Sequence[Any], pixels: int, most: int, arch: str) -> list[Any]:
    """The sums of vectors of 16 bytes, each at most `most`, by pixel: uint16 vectors with a lane for each of `vectors`.

    Each vector holds `pixels` equal runs of lanes, which are added up apart from each other.
    """
    pairs, widen = _INSTRUCTIONS.get(arch, (_add_pairs, _widen_pairs))
    rounds = (16 // pixels).bit_length() - 1
    level = list(vectors)
    narrow = 0
    while most * 2 <= 255 and narrow < rounds - 1 and len(level) > 1:
        level = [pairs("uint8x16", a, b) for a, b in zip(level[::2], level[1::2], strict=True)]
        most, narrow = most * 2, narrow + 1
    level = [widen(v) for v in level]
    for _ in range(rounds - narrow - 1):
        level = [pairs("uint16x8", a, b) for a, b in zip(level[::2], level[1::2], strict=True)]
    # Now lanes alternate between the pixels: bring those of each together.
    lanes = [tirx.Shuffle(level, list(range(pixel, 8 * len(level), pixels))) for pixel in range(pixels)]
    return level if pixels == 1 else lanes


def _llvm(intrinsic: str, dtype: str, *args: Any) -> Any:
    return tirx.call_llvm_pure_intrin(dtype, llvm_lookup_intrinsic_id(intrinsic), *args)


def _addp(dtype: str, a: Any, b: Any) -> Any:
    return _llvm("llvm.aarch64.neon.addp", dtype, a, b)


def _uaddlp(a: Any) -> Any:
    return _llvm("llvm.aarch64.neon.uaddlp", "uint16x8", a)


def _vpaddl(a: Any) -> Any:
    return _llvm("llvm.arm.neon.vpaddlu", "uint16x8", a)


#: Architecture → its sums of neighbouring lanes: of two vectors, and of one in twice the width.
_INSTRUCTIONS = {"aarch64": (_addp, _uaddlp), "arm": (vpadd, _vpaddl)}


def _add_pairs(dtype: str, a: Any, b: Any) -> Any:
    lanes = int(dtype.split("x")[1])
    even, odd = (tirx.Shuffle([a, b], list(range(first, 2 * lanes, 2))) for first in (0, 1))
    return even + odd


def _widen_pairs(a: Any) -> Any:
    pairs = tirx.reinterpret("uint16x8", a)
    return (pairs & tirx.Broadcast(tirx.const(255, "uint16"), 8)) + (
        pairs >> tirx.Broadcast(tirx.const(8, "uint16"), 8)
    )
