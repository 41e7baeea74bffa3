"""Stages that no register tile covers: each gets a loop nest of its own, parallel and vectorised."""

from __future__ import annotations

import math

from tvm import tirx
from tvm.s_tir import Schedule

from bnncc.dialect.stages import RUN
from bnncc.targets.descriptor import TargetSpec

from .base import Rule, Stages
from .elementwise import schedule_elementwise
from .pack import schedule_pack, schedule_planar
from .reduction import schedule_reduction

#: Roles whose own rules schedule the whole kernel.
_ANCHORS = (
    "binary_conv2d", "binary_conv2d.chunk", "binary_conv2d.bytes", "binary_conv2d.lanes", "byte_conv2d", "conv2d",
    "dense",
)  # fmt: skip


def schedule_rest(stages: Stages, target: TargetSpec, done: set[str], run: int = 0) -> None:
    """Schedules every stage whose name is not in `done`, in program order.

    run: if not 0, stages read a concatenation in their channels, from one tensor for every `run` of them: loops over
        channels are then divided where the tensors meet, so that nothing is asked within.
    """
    for name, role, block in [(stages.name(b), stages.role(b), b) for b in stages.blocks]:
        if name in done:
            continue
        if role == "pack.bits":
            done = done | schedule_pack(stages, block, target, joined=run > 0)
        elif role == "pack.words":
            done = done | schedule_planar(stages, block, target)
        elif stages.reduces(block):
            done = done | schedule_reduction(stages, block, target, joined=run > 0)
        else:
            schedule_elementwise(stages.sch, block, target, run)
            done = done | {name}


class LoopNests(Rule):
    """Kernels without a register tile: elementwise chains, packing, padding, pooling, means, softmax."""

    name = "loop nests"

    def __call__(self, func: tirx.PrimFunc) -> Schedule | str:
        sch = Schedule(func)
        stages = Stages(sch)
        if anchors := stages.of(*_ANCHORS):
            return f"its {stages.role(anchors[0])} needs a register tile"
        runs = [int(sch.get(block).annotations[RUN]) for block in stages.of("concat")]
        stages.inline(roles=("", "permute", "concat"))
        schedule_rest(stages, self.target, set(), math.gcd(*runs))
        return sch
