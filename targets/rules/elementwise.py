"""Elementwise stages: chains, broadcasts, padding, casts. Parallel outside, vectorised along the innermost axis."""

from __future__ import annotations

import math
from typing import Any

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
    together = _axes_together(stage)
    # The index of a vector in three axes fused is one sum again only if vectors end where the inner axes do.
    if together > 2 and extent(sch, loops[-1]) % (target.vector_bits // narrowest):
        together = 2
    if together > 1:
        loops = [*loops[:-together], sch.fuse(*loops[-together:])]
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
    """Vectors of `lanes` channels, each of one tensor."""
    vectors, lane = sch.split(channels, [None, lanes])
    sch.vectorize(lane)
    partition(sch, vectors)
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


def _axes_together(stage: tirx.SBlock) -> int:
    """How many of the last axes can be fused into one: every access has all of them, last and in order, or none."""
    axes = [iv.var for iv in stage.iter_vars]

    def fits(access: Any, count: int) -> bool:
        last = axes[len(axes) - count :]
        at = [r.min for r in access.region]
        if len(at) >= count and all(index.same_as(var) for index, var in zip(at[-count:], last, strict=True)):
            rest = at[:-count]
            full = [int(extent) for extent in access.source.shape[len(at) - count :]]
            whole = full == [int(iv.dom.extent) for iv in list(stage.iter_vars)[len(axes) - count :]]
        else:
            rest, whole = at, True
        points = all(isinstance(r.extent, tirx.IntImm) and int(r.extent) == 1 for r in access.region)
        return whole and points and not any(_uses(index, var) for index in rest for var in last)

    count = len(axes)
    while count > 1 and not all(fits(access, count) for access in (*stage.reads, *stage.writes)):
        count -= 1
    return count


def _uses(index: Any, var: Any) -> bool:
    """Whether an index depends on an axis; True for what is neither an axis, a number nor their arithmetic."""
    if isinstance(index, (tirx.Var, tirx.IntImm)):
        return bool(index.same_as(var))
    return not (hasattr(index, "a") and hasattr(index, "b")) or _uses(index.a, var) or _uses(index.b, var)
