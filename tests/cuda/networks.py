"""Whole networks as a GPU computes them: plan and kernels of the compiler, run launch by launch on the emulator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from emulator import emulate
from torch import nn
from tvm.ir import IRModule

from bnncc.compiler import import_model
from bnncc.dialect.plan import Plan, QuantizedLayer
from bnncc.passes import pipeline
from bnncc.targets.cuda import emit
from bnncc.targets.cuda.descriptor import CUDA_TARGETS, CudaSpec
from bnncc.targets.launch import DeviceCode

_ALIGNMENT = 256


def lowered(
    model: nn.Module, inputs: Sequence[torch.Tensor], target: str, quantized: Sequence[QuantizedLayer] = ()
) -> tuple[Any, Any, emit.Lowered]:
    """The plan of a network, the launches of its steps and their CUDA C. quantized: layers of an opt-in."""
    spec = CUDA_TARGETS[target]
    kernels, plan = _planned(model, inputs, spec, quantized)
    code = emit.lower(emit.schedule(kernels, spec), spec)
    return *emit.place(plan, code), code


def compiled(model: nn.Module, inputs: Sequence[torch.Tensor], target: str) -> tuple[DeviceCode, str]:
    """The device code of a network, and its CUDA C."""
    spec = CUDA_TARGETS[target]
    texts: dict[str, str] = {}
    _, code = emit.compile_kernels(*_planned(model, inputs, spec), spec, dump=texts.__setitem__)
    return code, texts["kernels.cu"]


def _planned(
    model: nn.Module, inputs: Sequence[torch.Tensor], spec: CudaSpec, quantized: Sequence[QuantizedLayer] = ()
) -> tuple[IRModule, Plan]:
    """The kernels of a network before they are scheduled, and its plan."""
    mod = pipeline.run(import_model(model, tuple(inputs)).mod, spec, quantized=quantized)
    kernels = {gvar.name_hint: func for gvar, func in mod.functions_items() if gvar.name_hint != "main"}
    return IRModule(kernels), pipeline.plan_memory(mod, "model")


def run(
    model: nn.Module, inputs: Sequence[torch.Tensor], target: str, quantized: Sequence[QuantizedLayer] = ()
) -> list[np.ndarray]:
    """The outputs of a network for these inputs."""
    plan, launches, code = lowered(model, inputs, target, quantized)
    # Contraction as the compiler of CUDA has it: what must round by itself says so.
    module = emulate(code.source, CUDA_TARGETS[target].sm, contract=True)
    memory = {
        "arena": _aligned(plan.arena_bytes),
        "persistent": _aligned(plan.persistent_bytes),
        "weights": _aligned(len(plan.weights)),
    }
    memory["weights"][:] = np.frombuffer(plan.weights, np.uint8)
    outside: dict[tuple[str, int], np.ndarray] = {}
    arrays = {}
    for tensor in plan.tensors:
        size = int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize
        if tensor.space == "input":
            home = outside.setdefault(("input", tensor.offset), inputs[tensor.offset].numpy().copy())
        elif tensor.space == "output":
            home = outside.setdefault(("output", tensor.offset), np.full(size, 0xA5, np.uint8))
        else:
            home = memory[tensor.space][tensor.offset : tensor.offset + size]
        arrays[tensor.id] = home.reshape(-1).view(np.uint8).view(tensor.dtype).reshape(tensor.shape)
    for call in (call for step in launches for call in step):
        given = [arrays[i] for i in call.args]
        module.launch(call.function, call.grid, call.block, call.shared_bytes, *given)
    return [arrays[i].copy() for i in plan.outputs]


def _aligned(size: int) -> np.ndarray:
    """Bytes that begin as a GPU's memory does, filled with what must not survive."""
    memory = np.full(size + _ALIGNMENT, 0xA5, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size]
