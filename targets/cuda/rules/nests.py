"""Kernels without tensor cores: each element of a result is a thread's."""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import Schedule

from bnncc.targets.rules.base import Stages

from .base import Rule, bind_threads


class LoopNests(Rule):
    """Elementwise chains, packing, padding, pooling, means; every stage that is not inlined is a kernel of its own."""

    name = "loop nests"

    def __call__(self, func: tirx.PrimFunc) -> tirx.PrimFunc | str:
        sch = Schedule(func)
        stages = Stages(sch)
        stages.inline(roles=("", "permute", "concat", "pack", "pad", "levels"))
        for block in stages.blocks:
            axes, loops = sch.get(block).iter_vars, sch.get_loops(block)
            spatial = [loop for loop, iv in zip(loops, axes, strict=True) if iv.iter_type == 0]
            if not spatial:
                spatial = [sch.add_unit_loop(block)]
            sch.reorder(*spatial, *[loop for loop in loops if all(not loop.same_as(s) for s in spatial)])
            thread = bind_threads(sch, spatial)
            if len(loops) > len(spatial):
                sch.decompose_reduction(block, sch.get_loops(block)[2])
            del thread
        return sch.mod["main"]
