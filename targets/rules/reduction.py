"""Pooling, means, depthwise convolutions: lanes along the channels, a few accumulators in registers."""

from __future__ import annotations

from tvm.s_tir import Schedule
from tvm.s_tir.schedule import SBlockRV

from bnncc.targets.descriptor import TargetSpec

from .base import (
    REDUCED,
    SPATIAL,
    Stages,
    dtype_bits,
    extent,
    iterations,
    last_common,
    parallel_outer,
    partition,
    unroll,
)

#: Independent sums that hide the latency of an addition.
_SUMS = 8


def schedule_reduction(stages: Stages, block: SBlockRV, target: TargetSpec, *, joined: bool = False) -> set[str]:
    """Schedules one reduction under the elementwise stage that follows it; returns the names of the stages it took.

    joined: it reads a concatenation, so that the loop over channels is divided where the tensors meet.
    """
    sch = stages.sch
    names = {stages.name(block)}
    kept = [iv for iv in sch.get(block).iter_vars if iv.iter_type == SPATIAL]
    bits = dtype_bits(sch.get(block).writes[0].source.dtype)
    work = iterations(sch, block) * bits / target.vector_bits
    if not kept:
        reduced = sch.get_loops(block)
        sch.decompose_reduction(block, reduced[0])
        return names
    main = last_common(stages, block) if not stages.is_output(block) else None
    if main is None or len(sch.get(main).iter_vars) != len(kept):
        main = sch.cache_write(block, 0, "local")
        # The copy writes what the reduction wrote, the reduction a local accumulator.
    names.add(stages.name(main))
    *outer, inner = sch.get_loops(main)
    length = extent(sch, inner)
    lanes = target.vector_bits // bits
    while length % lanes:
        lanes //= 2
    depthwise = stages.role(block) == "depthwise"
    # Depthwise, weights serve all pixels of a tile: with one vector of channels they are loaded least often. Seven sums
    # of sixteen registers, because images are mostly a multiple of seven wide.
    vectors = 1 if depthwise else _divisor(length // lanes, 4)
    sums = target.registers // 2 - 1 if depthwise else _SUMS // vectors
    co, cv, lane = sch.split(inner, [None, vectors, lanes])
    if len(outer) > 1:
        po, pi = sch.split(outer[-1], [None, _divisor(extent(sch, outer[-1]), sums)])
        sch.reorder(po, co, pi, cv, lane)
        unroll(sch, pi)
        if depthwise:
            partition(sch, po)  # the windows that reach into the padding
        parallel_outer(sch, outer[:-1], work)
        if joined:
            partition(sch, co)
    else:
        co = parallel_outer(sch, [*outer, co], work)
    unroll(sch, cv)
    _vectorize(sch, lane)
    sch.compute_at(block, co, preserve_unit_loops=True)
    axes = sch.get(block).iter_vars
    loops = sch.get_loops(block)[-len(axes) :]
    reduced = [loop for loop, iv in zip(loops, axes, strict=True) if iv.iter_type == REDUCED]
    spatial = [loop for loop, iv in zip(loops, axes, strict=True) if iv.iter_type == SPATIAL]
    cv, lane = sch.split(spatial.pop(), [None, lanes])
    sch.reorder(*reduced, *spatial, cv, lane)
    unroll(sch, *spatial, cv)
    if depthwise and extent(sch, reduced[-1]) <= _SUMS:
        unroll(sch, reduced[-1])  # what lies in the padding is then known
    _vectorize(sch, lane)
    init = sch.decompose_reduction(block, reduced[0])
    *others, lane = sch.get_loops(init)[-len(spatial) - 2 :]
    unroll(sch, *others)
    _vectorize(sch, lane)
    sch.set_scope(block, 0, "local")
    return names


def _divisor(length: int, most: int) -> int:
    return max(d for d in range(1, max(most, 1) + 1) if length % d == 0)


def _vectorize(sch: Schedule, lane: object) -> None:
    if extent(sch, lane) > 1:  # type: ignore[arg-type]
        sch.vectorize(lane)
