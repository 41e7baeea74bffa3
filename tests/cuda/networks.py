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
from bnncc.passes import pipeline
from bnncc.targets.cuda import emit
from bnncc.targets.cuda.descriptor import CUDA_TARGETS


def lowered(model: nn.Module, inputs: Sequence[torch.Tensor], target: str) -> tuple[Any, Any, emit.Lowered]:
    """The plan of a network, the launches of its steps and their CUDA C."""
    spec = CUDA_TARGETS[target]
    mod = pipeline.run(import_model(model, tuple(inputs)).mod, spec)
    kernels = {gvar.name_hint: func for gvar, func in mod.functions_items() if gvar.name_hint != "main"}
    code = emit.lower(emit.schedule(IRModule(kernels), spec), spec)
    return *emit.place(pipeline.plan_memory(mod, "model"), code), code


def run(model: nn.Module, inputs: Sequence[torch.Tensor], target: str) -> list[np.ndarray]:
    """The outputs of a network for these inputs."""
    plan, launches, code = lowered(model, inputs, target)
    module = emulate(code.source, CUDA_TARGETS[target].sm)
    memory = {
        "arena": np.full(plan.arena_bytes, 0xA5, np.uint8),
        "persistent": np.full(plan.persistent_bytes, 0xA5, np.uint8),
        "weights": np.frombuffer(bytearray(plan.weights), np.uint8),
    }
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
