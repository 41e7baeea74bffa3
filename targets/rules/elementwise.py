"""Elementwise stages: chains, broadcasts, padding, casts. Parallel outside, vectorised along the innermost axis."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from bnncc.dialect.stages import ROLE
from bnncc.targets.descriptor import TargetSpec

from .base import TASK_WORK, dtype_bits, extent, iterations, parallel_outer, partition, vector_lanes

#: Steps of an innermost loop that are written one after the other.
_UNROLLED = 4


def schedule_elementwise(sch: Schedule, block: SBlockRV, target: TargetSpec, run: int = 0) -> None:
    """Vectorises one elementwise stage whose inputs lie in memory; `run` as for `schedule_rest`."""
    loops = sch.get_loops(block)
    if not loops:
        return
    stage = sch.get(block)
    if ROLE in stage.annotations and stage.annotations[ROLE] == "pad" and len(loops) == 4:
        _schedule_pad(sch, block, target)
        return
    narrowest = min(dtype_bits(region.source.dtype) for region in (*stage.writes, *stage.reads))
    widest = max(dtype_bits(region.source.dtype) for region in (*stage.writes, *stage.reads))
    work = iterations(sch, block) * widest / target.vector_bits
    if _same_index_everywhere(stage):
        loops = [sch.fuse(*loops)] if len(loops) > 1 else loops
    *outer, inner = loops
    length = extent(sch, inner)
    if run:
        _schedule_joined(sch, outer, inner, math.gcd(run, target.vector_bits // widest), work)
        return
    lanes = _lanes(length, target.vector_bits // widest, target.vector_bits // narrowest)
    if lanes > 1:
        inner, lane = sch.split(inner, [None, lanes])
        sch.vectorize(lane)
        if length % lanes:
            partition(sch, inner)
    if length % max(lanes, 1) or not outer:
        # A loop with a peeled rest must not be fused into its neighbours.
        if not outer and length % max(lanes, 1) == 0:
            parallel_outer(sch, [inner], work)
        elif outer:
            parallel_outer(sch, outer, work)
        return
    parallel_outer(sch, outer, work)


def _schedule_joined(sch: Schedule, outer: list[LoopRV], channels: LoopRV, lanes: int, work: float) -> None:
    """Vectors of `lanes` channels, one after the other without a loop."""
    vectors, lane = sch.split(channels, [None, lanes])
    sch.vectorize(lane)
    sch.unroll(vectors)
    if outer:
        parallel_outer(sch, outer, work)


def _schedule_pad(sch: Schedule, block: SBlockRV, target: TargetSpec) -> None:
    """Images [N, H, W, C] in larger ones: the border is peeled, so that copying the inside asks nothing."""
    *outer, x, channel = sch.get_loops(block)
    bits = dtype_bits(sch.get(block).writes[0].source.dtype)
    work = iterations(sch, block) * bits / target.vector_bits
    lanes = vector_lanes(target, bits, extent(sch, channel), most_vectors=1)
    vectors, lane = sch.split(channel, [None, lanes])
    if lanes > 1:
        sch.vectorize(lane)
    if extent(sch, vectors) <= _UNROLLED:
        sch.unroll(vectors)
    partition(sch, x)
    if work < 2 * TASK_WORK:
        partition(sch, outer[-1])  # a parallel loop stays whole
    else:
        parallel_outer(sch, outer, work)


def _lanes(length: int, least: int, most: int) -> int:
    """Lanes for an axis: as many as divide it, between one vector of the widest and of the narrowest type; else one
    vector of the widest with a rest; the whole axis where that is short."""
    lanes = most
    while lanes >= least:
        if length % lanes == 0:
            return lanes
        lanes //= 2
    return least if length >= least else length


def _same_index_everywhere(stage: tirx.SBlock) -> bool:
    """Whether every access is at the stage's own index: then the axes can be fused into one."""
    axes = [iv.var for iv in stage.iter_vars]
    return all(
        len(access.region) == len(axes)
        and all(r.min.same_as(v) and int(r.extent) == 1 for r, v in zip(access.region, axes, strict=True))
        for access in (*stage.reads, *stage.writes)
    )
