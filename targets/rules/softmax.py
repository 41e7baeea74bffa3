"""Softmax: one row after the other, all of its steps while the row is in the first-level cache."""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule

from .base import Rule, Stages, extent, iterations, parallel_outer, partition, vector_lanes

#: Vector operations, about, for one of the elements: the exponential function and what is around it.
_WORK = 24


class Softmax(Rule):
    """Softmax over the rows of a matrix, with the elementwise stages behind it."""

    name = "softmax"

    def __call__(self, func: tirx.PrimFunc) -> Schedule | str:
        sch = Schedule(func)
        stages = Stages(sch)
        steps = [b for b in stages.blocks if stages.role(b).startswith("softmax.")]
        if not steps or len(stages.outputs) != 1:
            return "no softmax with one result"
        (main,) = stages.outputs
        stages.inline(main)
        loops = sch.get_loops(main)
        if len(loops) != 2 or len(stages.blocks) != len(steps) + 1:
            return "not a softmax alone"
        work = iterations(sch, main) * _WORK / self.target.float_lanes
        row = parallel_outer(sch, loops[:1], work)
        for block in reversed(steps):
            sch.compute_at(block, row, preserve_unit_loops=True)
            sch.set_scope(block, 0, "local")
        for block in (*steps, main):
            column, *reduced = sch.get_loops(block)[1 + (block is not main) :]
            if reduced:
                sch.reorder(*reduced, column)
            vectors, lane = sch.split(column, [None, self._lanes(extent(sch, column))])
            if extent(sch, lane) > 1:
                sch.vectorize(lane)
            if reduced:
                sch.unroll(vectors)
                init = sch.decompose_reduction(block, reduced[0])
                *_, vectors, lane = sch.get_loops(init)
                sch.unroll(vectors)
                sch.vectorize(lane)
            else:
                partition(sch, vectors)
        return sch

    def _lanes(self, length: int) -> int:
        """Of a vector, or of fewer where there are fewer columns; the last vector may have a rest."""
        return self.target.float_lanes if length > self.target.float_lanes else vector_lanes(self.target, 32, length, 1)
