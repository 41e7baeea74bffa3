"""Sums of runs: values that lie beside each other are summed in lanes, which are folded in the end.

for each run, parallel:
    lanes[:] += x[run, vector]              for its vectors, and for the parts of its rest
    result = epilogue(fold(lanes))
"""

from __future__ import annotations

import math
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.ir.expr import TensorLoad
from tvm.s_tir import Schedule
from tvm.script.ir_builder import IRBuilder
from tvm.tirx.script.builder import ir as T

from bnncc.dialect.stages import RUN_LENGTH

from .base import SPATIAL, TASK_WORK, Rule, Stages
from .written import parts, substituted

#: Vectors that are summed side by side in a long run, and how many of them such a run has at least.
_BESIDE, _LONG = 4, 16


class RunSums(Rule):
    """The mean over a tensor's last axes, with the elementwise stages behind it."""

    name = "sums of runs"

    def __call__(self, func: tirx.PrimFunc) -> Schedule | str:
        sch = Schedule(func)
        stages = Stages(sch)
        sums = [b for b in stages.of("reduction") if RUN_LENGTH in sch.get(b).annotations]
        if len(sums) != 1 or len(stages.outputs) != 1 or stages.is_output(sums[0]):
            return "not one sum of runs with one result"
        stages.inline()
        if len(stages.blocks) != 2:
            return "more than elementwise stages behind the sums"
        block, main = sch.get(sums[0]), sch.get(stages.outputs[0])
        source = block.reads[0].source
        if not any(source.same_as(param) for param in func.params):
            return "what is summed lies nowhere"
        kept = [int(iv.dom.extent) for iv in block.iter_vars if iv.iter_type == SPATIAL]
        shape = [int(iv.dom.extent) for iv in main.iter_vars]
        if [e for e in kept if e > 1] != [e for e in shape if e > 1]:
            return "its results are repeated"
        return Schedule(self._kernel(func, source, block, main, shape))

    def _kernel(self, func: tirx.PrimFunc, source: Any, block: Any, main: Any, shape: list[int]) -> tirx.PrimFunc:
        run, runs = int(block.annotations[RUN_LENGTH]), math.prod(shape)
        lanes = self.target.float_lanes
        lanes *= _BESIDE if run >= _LONG * lanes else 1
        sums = block.writes[0].source
        with IRBuilder() as builder, T.prim_func(s_tir=True):
            T.func_name("main")
            T.func_attr({"tirx.noalias": True})
            for param in func.params:
                T.arg(param.name, param)
            x = T.decl_buffer((runs, run), "float32", data=source.data, layout=None)
            work = runs * (run / self.target.float_lanes + math.log2(lanes))
            loop = T.parallel if work >= 2 * TASK_WORK and runs > 1 else T.serial
            with loop(0, runs) as at:
                kept = T.alloc_buffer((lanes,), "float32", scope="local")
                T.buffer_store(kept, tirx.Broadcast(tirx.const(0.0, "float32"), lanes), [tirx.Ramp(0, 1, lanes)])

                def add(start: Any, size: int) -> None:
                    here, there = (tirx.Ramp(i, 1, size) if size > 1 else i for i in (0, start))
                    T.buffer_store(kept, kept[here] + x[at, there], [here])

                if whole := run // lanes:
                    with T.serial(0, whole) as vector:
                        add(vector * lanes, lanes)
                for start, size in parts(run % lanes, lanes):
                    add(whole * lanes + start, size)
                width = lanes
                while width > 1:
                    width //= 2
                    low, high = (tirx.Ramp(i, 1, width) if width > 1 else i for i in (0, width))
                    T.buffer_store(kept, kept[low] + kept[high], [low])
                place = _unraveled(at, shape)
                expr = substituted(main.body.value, main, place)
                value = tvm_ffi.structural_map(
                    expr, (TensorLoad, lambda load: kept[0] if load.source.same_as(sums) else load)
                )
                T.buffer_store(main.writes[0].source, value, list(place))
        return builder.get()


def _unraveled(at: Any, shape: list[int]) -> tuple[Any, ...]:
    """The position in each axis of the element that is number `at` of a tensor."""
    place = []
    for axis, extent in enumerate(shape):
        behind = math.prod(shape[axis + 1 :])
        place.append(tirx.floormod(tirx.floordiv(at, behind), extent))
    return tuple(place)
