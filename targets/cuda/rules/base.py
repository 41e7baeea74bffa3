"""What the rules share: the protocol, how loops become threads, and what kernels that rules write out are made of."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from tvm import tirx
from tvm.ir import Op
from tvm.s_tir import Schedule
from tvm.s_tir.schedule import LoopRV
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from bnncc.targets.cuda.descriptor import WARP, CudaSpec
from bnncc.targets.rules.base import extent

#: The operator of a value that is computed only where a condition holds.
IF_THEN_ELSE = Op.get("prim.if_then_else")

#: Attribute of a scheduled function: blocks of its kernel that a multiprocessor is to hold at once, at least. The
#: compiler of CUDA C keeps to the registers that this leaves.
BLOCKS_PER_SM = "tirx.launch_bounds_min_blocks_per_sm"

#: Threads of a block where nothing asks for another number.
THREADS = 256


@dataclass(frozen=True)
class Rule:
    """A schedule rule of one GPU."""

    target: CudaSpec
    name: ClassVar[str] = "rule"

    def __call__(self, func: tirx.PrimFunc) -> tirx.PrimFunc | list[tirx.PrimFunc] | str:
        """The function with its loops bound to threads, or several that take its place one after the other, or why
        this rule does not apply."""
        raise NotImplementedError


def bind_threads(sch: Schedule, loops: list[LoopRV], threads: int = THREADS) -> LoopRV:
    """Fuses the loops and gives every iteration a thread; returns the loop over the threads of a block."""
    fused = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    threads = min(threads, -(-extent(sch, fused) // WARP) * WARP)
    block, thread = sch.split(fused, [None, threads])
    sch.bind(block, "blockIdx.x")
    sch.bind(thread, "threadIdx.x")
    return thread


class guarded:
    """``with guarded(condition, needed)``: a condition in the IR that is being built, or none."""

    def __init__(self, condition: Any, needed: bool) -> None:
        self.frames = [T.If(condition), T.Then()] if needed else []

    def __enter__(self) -> None:
        for frame in self.frames:
            frame.__enter__()

    def __exit__(self, *error: Any) -> None:
        for frame in reversed(self.frames):
            frame.__exit__(*error)


def barrier(scope: str = "shared.dyn") -> None:
    """All threads of the block have come here, and see what the others stored in shared memory."""
    T.evaluate(tirx.call_intrin("int32", "tirx.tvm_storage_sync", scope))


def local(name: str, count: int, dtype: str = "uint32") -> Any:
    """Registers."""
    buffer = T.alloc_buffer((count,), dtype, scope="local")
    IRBuilder.name(name, buffer)
    return buffer


def zeros(name: str, count: int, dtype: str = "uint32") -> Any:
    """Registers that start as 0."""
    buffer = local(name, count, dtype)
    with T.unroll(0, count) as i:
        T.buffer_store(buffer, tirx.const(0, dtype), [i])
    return buffer


def from_lane_across(value: Any, distance: int) -> Any:
    """The value of the lane whose number differs by this bit."""
    return T.cuda.__shfl_xor_sync(tirx.const(0xFFFFFFFF, "uint32"), value, distance, WARP)


def sum_of_parts(shared: Any, parts: int, area: int, line: int) -> Callable[[Any, Any], Any]:
    """(row, column) → the sum of what `parts` areas of shared memory have there, in their order. line: of a row."""

    def total(r: Any, c: Any) -> Any:
        values = [shared[part * area + r * line + c] for part in range(parts)]
        return functools.reduce(lambda value, other: value + other, values)

    return total
