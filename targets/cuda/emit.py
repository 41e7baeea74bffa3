"""From unscheduled PrimFuncs to a module of device code: every kernel gets the first rule that takes it.

A step of the plan becomes one launch or several: each nest of loops that is bound to threads is a kernel of its own.
TVM lowers the function and splits it; what its host part would do, launch after launch, is read off and becomes data
(`bnncc.targets.launch.Launch`) for the driver. Buffers between two kernels of a step become tensors of the plan.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import Call, Op
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm.s_tir.stmt import SBlockRealize
from tvm.target import Target
from tvm.tirx.build import split_host_device_mods

from bnncc.dialect.plan import Plan, Step, Tensor
from bnncc.targets.launch import DeviceCode, Launch

from .descriptor import CudaSpec
from .lowering import FUNCTIONS, PlainFunctions, Roundings
from .rules import rules_for
from .rules.base import BLOCKS_PER_SM

logger = logging.getLogger(__name__)

_ALIGNMENT = 64
#: `Architecture.tile_registers` for kernels that would spill with more.
_FEWER_REGISTERS = 64
_THREAD_AXES = ("blockIdx.x", "blockIdx.y", "blockIdx.z", "threadIdx.x", "threadIdx.y", "threadIdx.z")
_CONFIG = {"tirx.disable_assert": True}


@dataclass(frozen=True)
class _Scratch:
    """A buffer that one kernel of a step fills for another."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, buffer: Any) -> _Scratch:
        return cls(tuple(int(extent) for extent in buffer.shape), str(buffer.dtype))

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class _KernelCall:
    """One launch of a function. args: positions among the PrimFunc's parameters, or names of scratch."""

    function: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    args: tuple[int | str, ...]


@dataclass(frozen=True)
class Lowered:
    """CUDA C of a module, and for each PrimFunc of it the launches and the scratch they share."""

    source: str
    calls: dict[str, tuple[_KernelCall, ...]]
    scratch: dict[str, dict[str, _Scratch]]


@dataclass(frozen=True)
class Scheduled:
    """Functions whose loops are bound to threads.

    pieces: the names of those that a kernel of the plan became, in order; a parameter of theirs that the kernel has not
    is scratch. params: of each kernel.
    """

    mod: tvm.IRModule
    pieces: dict[str, tuple[str, ...]]
    params: dict[str, tuple[str, ...]]

    def updated(self, others: Scheduled) -> Scheduled:
        """The same with other schedules of some kernels."""
        replaced = {piece for kernel in others.pieces for piece in self.pieces[kernel]}
        functions = {gvar.name_hint: f for gvar, f in self.mod.functions.items() if gvar.name_hint not in replaced}
        functions |= {gvar.name_hint: f for gvar, f in others.mod.functions.items()}
        return Scheduled(tvm.IRModule(functions), self.pieces | others.pieces, self.params)


def schedule(mod: tvm.IRModule, target: CudaSpec) -> Scheduled:
    """Every PrimFunc of `mod`, its loops bound to threads. Raises ValueError where no rule takes one (a bug)."""
    rules = rules_for(target)
    functions, pieces, params = {}, {}, {}
    for gvar, func in mod.functions.items():
        if not isinstance(func, tirx.PrimFunc):
            continue
        name = str(gvar.name_hint)
        done = _schedule_one(name, func, rules)
        names = [name] if len(done) == 1 else [f"{name}_{i}" for i in range(len(done))]
        for piece, scheduled in zip(names, done, strict=True):
            marks = {"global_symbol": piece, "tirx.is_scheduled": True, "tirx.noalias": True}
            functions[piece] = scheduled.with_attrs(marks)
        pieces[name], params[name] = tuple(names), _parameter_names(func)
    return Scheduled(tvm.IRModule(functions), pieces, params)


def _schedule_one(name: str, func: tirx.PrimFunc, rules: list[Any]) -> list[tirx.PrimFunc]:
    reasons = []
    for rule in rules:
        try:
            done = rule(func)
        except s_tir.ScheduleError as error:
            done = str(error).partition("\n")[0]
        if not isinstance(done, str):
            return done if isinstance(done, list) else [done]
        logger.debug("%s: %s does not apply: %s", name, rule.name, done)
        reasons.append(f"{rule.name}: {done}")
    raise ValueError(f"no schedule rule takes kernel {name}: {'; '.join(reasons)}")


def lower(scheduled: Scheduled, target: CudaSpec) -> Lowered:
    """CUDA C and launches of a scheduled module."""
    machine = Target(target.tvm())
    with machine, tvm.transform.PassContext(config=_CONFIG):
        host, devices = split_host_device_mods(_through_pipeline(scheduled.mod, machine))
        ((cuda, device),) = devices.items()
        device = _with_bounds(device, scheduled.mod)
        device = tvm.transform.Sequential(
            [
                tirx.transform.LowerWarpMemory(),
                tirx.transform.StmtSimplify(),
                PlainFunctions,
                tirx.transform.LowerIntrin(),
                Roundings,
            ]
        )(device)
        module = tvm.get_global_func("target.build.cuda")(device, cuda)
    axes = {
        str(g.name_hint): [str(a) for a in f.attrs["tirx.kernel_launch_params"]] for g, f in device.functions.items()
    }
    hosts = {str(gvar.name_hint): func for gvar, func in host.functions.items()}
    calls, scratch = {}, {}
    for kernel, pieces in scheduled.pieces.items():
        buffers: dict[str, _Scratch] = {}
        launches: list[_KernelCall] = []
        for piece in pieces:
            for param in scheduled.mod[piece].params:
                if str(param.name) not in scheduled.params[kernel]:
                    buffers.setdefault(str(param.name), _Scratch.of(param))
            launches += _host_calls(hosts[piece], scheduled.params[kernel], axes, buffers)
        calls[kernel], scratch[kernel] = tuple(launches), buffers
    return Lowered(FUNCTIONS + str(module.inspect_source()), calls, scratch)


def _through_pipeline(mod: tvm.IRModule, machine: Target) -> tvm.IRModule:
    """TVM's lowering. Kernels that rules write out have no blocks, and their buffers are as small as they can be; to
    make sure of that would take TVM three quarters of its time."""
    pipeline, _, _ = default_s_tir_pipeline()
    written = {gvar: func for gvar, func in mod.functions.items() if not isinstance(func.body, SBlockRealize)}
    scheduled = {gvar: func for gvar, func in mod.functions.items() if gvar not in written}
    result = tvm.IRModule({})
    for functions, skipped in ((written, ["s_tir.CompactBufferAllocation"]), (scheduled, [])):
        if functions:
            with tvm.transform.PassContext(config=_CONFIG, disabled_pass=skipped):
                result.update(pipeline(tirx.transform.BindTarget(machine)(tvm.IRModule(functions))))
    return result


def _with_bounds(device: tvm.IRModule, scheduled: tvm.IRModule) -> tvm.IRModule:
    """Kernels with the bound on their registers that their schedule asks for, which splitting them off loses."""
    bounds = {
        f"{gvar.name_hint}_kernel": int(func.attrs[BLOCKS_PER_SM])
        for gvar, func in scheduled.functions.items()
        if BLOCKS_PER_SM in func.attrs
    }
    functions = {
        gvar: func.with_attr(BLOCKS_PER_SM, bounds[gvar.name_hint]) if gvar.name_hint in bounds else func
        for gvar, func in device.functions.items()
    }
    return tvm.IRModule(functions)


def _parameter_names(func: tirx.PrimFunc) -> tuple[str, ...]:
    names = tuple(str(param.name) for param in func.params)
    if len(set(names)) != len(names):
        raise ValueError(f"parameters share a name: {names}")
    return names


def _host_calls(
    func: tirx.PrimFunc, params: tuple[str, ...], axes: dict[str, list[str]], scratch: dict[str, _Scratch]
) -> list[_KernelCall]:
    """The launches of a host function in order; the buffers it allocates go to `scratch`."""
    calls: list[_KernelCall] = []

    def allocated(node: tirx.AllocBuffer) -> None:
        name = str(node.buffer.name)
        if name in scratch or name in params:
            raise ValueError(f"two buffers of a kernel are called {name}")
        scratch[name] = _Scratch.of(node.buffer)

    def called(node: Call) -> None:
        if isinstance(node.op, Op) and str(node.op.name) == "tirx.call_ffi_kernel":
            calls.append(_kernel_call(node, axes, params))

    tvm_ffi.structural_walk(func.body, [(tirx.AllocBuffer, allocated), (Call, called)], order="pre")
    return calls


def _kernel_call(node: Call, axes: dict[str, list[str]], params: tuple[str, ...]) -> _KernelCall:
    function, *rest = node.args
    name = str(function.value)
    count = len(rest) - len(axes[name])
    extents = dict(zip(axes[name], (int(e) for e in rest[count:]), strict=True))
    buffers = [str(pointer.args[0].name) for pointer in rest[:count]]  # `buffer_data(buffer)`
    if len(set(buffers)) != len(buffers):
        raise ValueError(f"kernel {name} has a buffer twice among its arguments, which it takes for apart: {buffers}")
    x, y, z, tx, ty, tz = (extents.get(axis, 1) for axis in _THREAD_AXES)
    return _KernelCall(
        function=name,
        grid=(x, y, z),
        block=(tx, ty, tz),
        shared_bytes=extents.get("tirx.use_dyn_shared_memory", 0),
        args=tuple(params.index(b) if b in params else b for b in buffers),
    )


def place(plan: Plan, lowered: Lowered) -> tuple[Plan, tuple[tuple[Launch, ...], ...]]:
    """The launches of every step, the plan's init steps first, and the plan with the scratch of its steps.

    Scratch lies behind the arena, that of all steps in the same place: nothing of it outlives its step.
    """
    tensors, most = list(plan.tensors), plan.arena_bytes
    launches = []
    for step in (*plan.init, *plan.steps):
        ids, at = {}, plan.arena_bytes
        for name, buffer in lowered.scratch[step.kernel].items():
            ids[name] = len(tensors)
            tensors.append(Tensor(len(tensors), f"{step.kernel}.{name}", buffer.shape, buffer.dtype, "arena", at))
            at += -(-buffer.bytes // _ALIGNMENT) * _ALIGNMENT
        most = max(most, at)
        launches.append(tuple(_launch(call, step, ids) for call in lowered.calls[step.kernel]))
    return replace(plan, tensors=tuple(tensors), arena_bytes=most), tuple(launches)


def _launch(call: _KernelCall, step: Step, scratch: dict[str, int]) -> Launch:
    args = tuple(scratch[a] if isinstance(a, str) else step.args[a] for a in call.args)
    return Launch(call.function, call.grid, call.block, call.shared_bytes, args)


def compile_kernels(
    mod: tvm.IRModule, plan: Plan, target: CudaSpec, dump: Callable[[str, str], None] | None = None
) -> tuple[Plan, DeviceCode]:
    """The device code of all PrimFuncs of `mod`, and the plan with the scratch that its steps turned out to need.

    dump: called as ``dump(file name, text)`` with the CUDA C, before it is compiled, and with the PTX.
    """
    from . import toolchain
    from .cubin import resources

    def compiled(scheduled: Scheduled) -> tuple[Lowered, bytes, bytes]:
        lowered = lower(scheduled, target)
        if dump:
            dump("kernels.cu", toolchain.self_contained(lowered.source))
        return lowered, *toolchain.compile_cuda(lowered.source, target.sm)

    scheduled = schedule(mod, target)
    lowered, image, ptx = compiled(scheduled)
    used = resources(image)
    spilling = {
        kernel: mod[kernel]
        for kernel, calls in lowered.calls.items()
        if any(used[call.function].local_bytes for call in calls)
    }
    if spilling:  # which kernels do depends on their epilogues, and on the compiler
        frugal = replace(target, gpu=replace(target.gpu, tile_registers=_FEWER_REGISTERS))
        lowered, image, ptx = compiled(scheduled.updated(schedule(tvm.IRModule(spilling), frugal)))
        used = resources(image)
    if dump:
        dump("kernels.ptx", ptx.decode())
    placed, launches = place(plan, lowered)
    return placed, DeviceCode(target.sm, image, ptx, launches, used)


__all__ = ["Lowered", "compile_kernels", "lower", "place", "schedule"]
