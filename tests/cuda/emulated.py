"""PrimFuncs as CUDA would run them, by the emulator, and as the CPU's naive loops do."""

from __future__ import annotations

from typing import Any

import numpy as np
import tvm
from emulator import Checks, emulate
from tvm import s_tir

from bnncc.targets import emit as cpu
from bnncc.targets.cuda import emit
from bnncc.targets.cuda.descriptor import CUDA_TARGETS, CudaSpec
from bnncc.targets.descriptor import get_target

SM_90 = CUDA_TARGETS["cuda-sm_90"]


class Emulated:
    """The functions of a module, scheduled and lowered for a GPU."""

    def __init__(self, mod: tvm.IRModule, target: CudaSpec = SM_90) -> None:
        self.mod = mod
        self.scheduled = emit.schedule(mod, target)
        self.lowered = emit.lower(self.scheduled, target)
        self.module = emulate(self.lowered.source)

    def __call__(self, name: str, *inputs: np.ndarray, checks: Checks = Checks.ALL) -> list[np.ndarray]:
        """The outputs of a function."""
        func = self.mod[name]
        arrays = _arguments(func, inputs)
        scratch = {
            key: np.full(buffer.shape, 0xA5, np.uint8).astype(buffer.dtype)
            for key, buffer in self.lowered.scratch[name].items()
        }
        for call in self.lowered.calls[name]:
            given = [scratch[a] if isinstance(a, str) else arrays[a] for a in call.args]
            self.module.launch(call.function, call.grid, call.block, call.shared_bytes, *given, checks=checks)
        return [array for array, out in zip(arrays, _written(func), strict=True) if out]


def naive(mod: tvm.IRModule, name: str, *inputs: np.ndarray) -> list[np.ndarray]:
    """The outputs of a function whose loops nobody scheduled, on the CPU."""
    func = mod[name].with_attr("global_symbol", name)
    arrays = _arguments(func, inputs)
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    cpu.build_scheduled(tvm.IRModule({name: func}), get_target("native"))[name](*tensors)
    return [tensor.numpy() for tensor, out in zip(tensors, _written(func), strict=True) if out]


def _written(func: Any) -> list[bool]:
    """Which parameters a function writes."""
    sch = s_tir.Schedule(func)
    blocks = [sch.get(block) for block in sch.get_child_blocks(sch.get_sblock("root"))]
    targets = [region.source for block in blocks for region in block.writes]
    return [any(param.same_as(target) for target in targets) for param in func.params]


def _arguments(func: Any, inputs: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    """Arrays for all parameters; outputs start as a pattern that must not survive."""
    left = list(inputs)
    arrays = []
    for param, out in zip(func.params, _written(func), strict=True):
        shape, dtype = tuple(int(e) for e in param.shape), np.dtype(str(param.dtype))
        if out:
            size = int(np.prod(shape)) * dtype.itemsize
            pattern = 0 if dtype == np.bool_ else 0xA5
            arrays.append(np.full(size, pattern, np.uint8).view(dtype).reshape(shape))
        else:
            array = left.pop(0)
            assert array.shape == shape and array.dtype == dtype, (param.name, array.shape, array.dtype)
            arrays.append(np.array(array))
    assert not left
    return arrays
