"""What all schedule rules share: the protocol, the stages of a kernel by their role, and small scheduling steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV, SBlockRV

from bnncc.dialect.stages import ROLE
from bnncc.targets.descriptor import TargetSpec

#: Vector operations (about) that make a task worth handing to another thread. Measured on whole networks: a step that
#: one thread computes alone also fetches half of its input from the other core's cache.
TASK_WORK = 300

#: Kinds of block axes, as TVM numbers them.
SPATIAL, REDUCED = 0, 2


@dataclass(frozen=True)
class Rule:
    """A schedule rule of one target."""

    target: TargetSpec
    name: ClassVar[str] = "rule"

    def __call__(self, func: tirx.PrimFunc) -> Schedule | str:
        """The scheduled function, or why this rule does not apply."""
        raise NotImplementedError


class Stages:
    """The blocks of an unscheduled function, in program order, with their roles."""

    def __init__(self, sch: Schedule) -> None:
        self.sch = sch
        self.root = sch.get_sblock("root")
        self.blocks: list[SBlockRV] = list(sch.get_child_blocks(self.root))
        names = {sch.get(b).name_hint for b in sch.get_output_blocks(self.root)}
        self.outputs = [b for b in self.blocks if sch.get(b).name_hint in names]

    def role(self, block: SBlockRV) -> str:
        """The role that the compute gave this stage, "" if it is plain elementwise."""
        annotations = self.sch.get(block).annotations
        return str(annotations[ROLE]) if ROLE in annotations else ""

    def of(self, *roles: str) -> list[SBlockRV]:
        return [b for b in self.blocks if self.role(b) in roles]

    def name(self, block: SBlockRV) -> str:
        return str(self.sch.get(block).name_hint)

    def is_output(self, block: SBlockRV) -> bool:
        return self.name(block) in {self.name(b) for b in self.outputs}

    def reduces(self, block: SBlockRV) -> bool:
        return any(iv.iter_type == REDUCED for iv in self.sch.get(block).iter_vars)

    def index(self, block: SBlockRV) -> int:
        return [self.name(b) for b in self.blocks].index(self.name(block))

    def producers(self, block: SBlockRV) -> list[SBlockRV]:
        names = {self.name(b) for b in self.sch.get_producers(block)}
        return [b for b in self.blocks if self.name(b) in names]

    def consumers(self, block: SBlockRV) -> list[SBlockRV]:
        names = {self.name(b) for b in self.sch.get_consumers(block)}
        return [b for b in self.blocks if self.name(b) in names]

    def inline(self, *keep: SBlockRV, roles: tuple[str, ...] = ("",)) -> None:
        """Inlines every elementwise stage that is neither kept nor an output into its consumers."""
        kept = {self.name(b) for b in (*keep, *self.outputs)}
        for block in list(self.blocks):
            if self.name(block) not in kept and self.role(block) in roles:
                self.sch.compute_inline(block)
                self.blocks.remove(block)


def iterations(sch: Schedule, block: SBlockRV) -> float:
    """Iterations of a stage."""
    return float(math.prod(int(iv.dom.extent) for iv in sch.get(block).iter_vars))


def extent(sch: Schedule, loop: LoopRV) -> int:
    return int(sch.get(loop).extent)


def last_common(stages: Stages, anchor: SBlockRV) -> SBlockRV | None:
    """The last elementwise stage through which the anchor's result reaches every output, None if there is none."""
    following: list[SBlockRV] = []
    reached = {stages.name(anchor)}
    for block in stages.blocks[stages.index(anchor) + 1 :]:
        if reached & {stages.name(b) for b in stages.producers(block)}:
            reached.add(stages.name(block))
            following.append(block)
    for cut in reversed(following):
        if stages.role(cut) == "" and not _leaks(stages, anchor, cut, following):
            return cut
    return None


def _leaks(stages: Stages, anchor: SBlockRV, cut: SBlockRV, following: list[SBlockRV]) -> bool:
    """Whether the anchor reaches an output on a way around `cut`."""
    reached = {stages.name(anchor)}
    for block in following:
        if stages.name(block) != stages.name(cut) and reached & {stages.name(b) for b in stages.producers(block)}:
            if stages.is_output(block):
                return True
            reached.add(stages.name(block))
    return False


def dtype_bits(dtype: object) -> int:
    """Bits of a type by its name: "uint8", "float32"."""
    return 8 if str(dtype) == "bool" else int("".join(c for c in str(dtype) if c.isdigit()))


def unroll(sch: Schedule, *loops: LoopRV) -> None:
    for loop in loops:
        sch.unroll(loop)


def partition(sch: Schedule, loop: LoopRV) -> None:
    """Has the lowering peel the iterations whose bounds checks can fail, so that the others run unguarded."""
    sch.annotate(loop, "pragma_loop_partition_hint", 1)


def parallel_outer(sch: Schedule, loops: list[LoopRV], work: float, around: LoopRV | None = None) -> LoopRV:
    """Fuses the loops and runs them in parallel where `work` vector operations are worth it; returns the fused loop.

    around: a serial loop outside. Every thread runs it for its own part of the loops, so that they are launched once.
    """
    fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    if work >= 2 * TASK_WORK and extent(sch, fused) > 1:
        sch.parallel(fused)
        if around is not None and extent(sch, around) > 1:
            sch.annotate(around, "pragma_parallel_launch_point", 1)
    return fused


def balance(tasks: int) -> float:
    """The least share of two to four threads' time that so many equal tasks fill, each thread taking a run of them."""
    return min(tasks / (threads * math.ceil(tasks / threads)) for threads in (2, 3, 4))


def vector_lanes(target: TargetSpec, dtype_bits: int, length: int, most_vectors: int = 4) -> int:
    """Lanes to vectorise a contiguous axis of `length` by: the most that divide it, up to some whole vectors."""
    lanes = target.vector_bits // dtype_bits * most_vectors
    while lanes > 1 and length % lanes:
        lanes //= 2
    return lanes
