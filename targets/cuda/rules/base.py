"""What the rules share: the protocol, and how loops become threads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tvm import tirx
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV

from bnncc.targets.cuda.descriptor import WARP, CudaSpec
from bnncc.targets.rules.base import extent

#: Threads of a block where nothing asks for another number.
THREADS = 256


@dataclass(frozen=True)
class Rule:
    """A schedule rule of one GPU."""

    target: CudaSpec
    name: ClassVar[str] = "rule"

    def __call__(self, func: tirx.PrimFunc) -> tirx.PrimFunc | str:
        """The function with its loops bound to threads, or why this rule does not apply."""
        raise NotImplementedError


def bind_threads(sch: Schedule, loops: list[LoopRV], threads: int = THREADS) -> LoopRV:
    """Fuses the loops and gives every iteration a thread; returns the loop over the threads of a block."""
    fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    threads = min(threads, -(-extent(sch, fused) // WARP) * WARP)
    block, thread = sch.split(fused, [None, threads])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return thread
