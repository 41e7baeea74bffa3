"""From unscheduled PrimFuncs to an object file: every kernel gets the first schedule rule that takes it.

`compile_kernels` is what the linker of an artifact calls. The object file's symbols are ``__tvm_ffi_<global_symbol>``,
C functions in the tvm-ffi ABI.
"""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import tvm
from tvm import s_tir, tirx
from tvm.target import Target

from bnncc.dialect.stages import UNEVEN

from .descriptor import TargetSpec
from .lowering import pipeline_of
from .rules import rules_for
from .rules.base import Stages
from .rules.register_tile import Tiles, default_tile

logger = logging.getLogger(__name__)

#: Attribute of a PrimFunc: name of the rule that scheduled it.
SCHEDULED_BY = "bnncc.scheduled_by"


def schedule(mod: tvm.IRModule, target: TargetSpec, tiles: Tiles = default_tile) -> tvm.IRModule:
    """Every PrimFunc of `mod`, scheduled. One that no rule takes keeps its naive loops, and a debug line names it.

    tiles: chooses the register tiles, as `bnncc.targets.tuning` does from what it has measured.
    """
    rules = rules_for(target, tiles)
    functions = {}
    for name, func in mod.functions.items():
        if not isinstance(func, tirx.PrimFunc):
            continue
        functions[name] = _schedule_one(str(name.name_hint), func, rules)
    return tvm.IRModule(functions, attrs=mod.attrs)


def _schedule_one(name: str, func: tirx.PrimFunc, rules: list) -> tirx.PrimFunc:
    for rule in rules:
        try:
            sch = rule(func)
        except s_tir.ScheduleError as error:
            sch = str(error).partition("\n")[0]
        if isinstance(sch, str):
            logger.debug("%s: %s does not apply: %s", name, rule.name, sch)
            continue
        done = _unrolled(func, sch.mod["main"]).with_attr(SCHEDULED_BY, rule.name)
        symbol = func.attrs.get("global_symbol", name) if func.attrs else name
        return done.with_attr("global_symbol", str(symbol)).with_attr("tirx.is_scheduled", True)
    logger.debug("%s: no schedule rule takes it; it runs as naive loops", name)
    return func.with_attr("global_symbol", name) if not func.attrs or "global_symbol" not in func.attrs else func


def _unrolled(func: tirx.PrimFunc, scheduled: tirx.PrimFunc) -> tirx.PrimFunc:
    """What became of `func`. Where the lanes of a vector differ, its unrolled loops are unrolled here: TVM vectorises
    before it unrolls, and makes a loop of every vector whose lanes it cannot prove to be alike in each iteration."""
    stages = Stages(s_tir.Schedule(func))
    uneven = any(int(stages.sch.get(bits).annotations[UNEVEN]) for bits in stages.of("pack.bits"))
    return tirx.transform.UnrollLoop()(tvm.IRModule({"main": scheduled}))["main"] if uneven else scheduled


def unscheduled(mod: tvm.IRModule) -> list[str]:
    """Names of the functions of a scheduled module that no rule took."""
    return [
        str(name.name_hint)
        for name, func in mod.functions.items()
        if isinstance(func, tirx.PrimFunc) and not (func.attrs and SCHEDULED_BY in func.attrs)
    ]


def build(mod: tvm.IRModule, target: TargetSpec, tiles: Tiles = default_tile) -> tvm.runtime.Executable:
    """Schedules and compiles; the result runs in this process where the machine allows it."""
    return build_scheduled(schedule(mod, target, tiles), target)


def build_scheduled(scheduled: tvm.IRModule, target: TargetSpec) -> tvm.runtime.Executable:
    """The same from what `schedule` returned."""
    machine = Target(target.tvm())
    with machine, tvm.transform.PassContext(config=_CONFIG):  # operators with lowerings of their own ask for the target
        return tvm.compile(scheduled, target=machine, tir_pipeline=pipeline_of(target))


_CONFIG = {
    "s_tir.LoopPartition": {"partition_const_loop": True},
    # The driver passes what the plan says; checks of every argument in every call were three quarters of the code.
    "tirx.disable_assert": True,
}


def compile_kernels(mod: tvm.IRModule, target: TargetSpec, tiles: Tiles = default_tile) -> bytes:
    """The object file of all PrimFuncs of `mod`."""
    with tempfile.TemporaryDirectory(prefix="bnncc-") as folder:
        path = Path(folder) / "kernels.o"
        build(mod, target, tiles).mod.write_to_file(str(path))
        return path.read_bytes()


def assembly(mod: tvm.IRModule, target: TargetSpec) -> str:
    """The assembly of all PrimFuncs of `mod`."""
    return str(build(mod, target).mod.inspect_source("asm"))
