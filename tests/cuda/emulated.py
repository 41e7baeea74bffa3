"""PrimFuncs as CUDA would run them, by the emulator, and as the CPU's naive loops do."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import tvm
from emulator import Checks, emulate
from tvm import s_tir, te

from bnncc.targets import emit as cpu
from bnncc.targets.cuda import emit
from bnncc.targets.cuda.descriptor import CUDA_TARGETS, CudaSpec
from bnncc.targets.descriptor import get_target

SM_90 = CUDA_TARGETS["cuda-sm_90"]
#: What comparisons, roundings and clamps tell apart: NaN, signed zeros, infinities, denormals, ties, huge numbers.
SPECIAL = np.array(
    [np.nan, 0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 0.5, 1.5, -0.5, 2.5, 1.0, -1.0, 3e38, -3e38], np.float32
)


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
    executable = cpu.build_scheduled(tvm.IRModule({name: func}), get_target("native"))
    return _run(executable, func, name, inputs)


class Cases:
    """Functions of TE tensors with inputs, which become one module once all of them are there."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)
        self._functions: dict[str, Any] = {}
        self._inputs: dict[str, tuple[np.ndarray, ...]] = {}

    @property
    def names(self) -> list[str]:
        return list(self._functions)

    def add(self, name: str, function: Callable[..., Any], *inputs: np.ndarray) -> None:
        tensors = [te.placeholder(array.shape, str(array.dtype), f"x{i}") for i, array in enumerate(inputs)]
        made = function(*tensors)
        results = list(made) if isinstance(made, (list, tuple)) else [made]
        func = te.create_prim_func([*tensors, *results])
        self._functions[name] = func.with_attrs({"global_symbol": name, "tirx.noalias": True})
        self._inputs[name] = inputs

    def floats(self, *shape: int) -> np.ndarray:
        """Numbers around 0, some of which are special or ties of a rounding."""
        values = self.rng.standard_normal(shape).astype(np.float32)
        special = self.rng.random(shape) < 0.2
        values[special] = self.rng.choice(SPECIAL, special.sum())
        return values

    def plain(self, *shape: int) -> np.ndarray:
        """Numbers around 0, for sums."""
        return self.rng.standard_normal(shape).astype(np.float32)

    def integers(self, low: int, high: int, *shape: int, dtype: str = "int32") -> np.ndarray:
        return self.rng.integers(low, high, shape).astype(dtype)

    @cached_property
    def mod(self) -> tvm.IRModule:
        return tvm.IRModule(self._functions)

    @cached_property
    def emulated(self) -> Emulated:
        return Emulated(self.mod)

    @cached_property
    def _naive(self) -> Any:
        return cpu.build_scheduled(self.mod, get_target("native"))

    def compared(self, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """(the GPU's, the CPU's) of every output."""
        inputs = self._inputs[name]
        return list(zip(self.emulated(name, *inputs), _run(self._naive, self.mod[name], name, inputs), strict=True))

    def source_of(self, name: str) -> str:
        """CUDA C of the kernels of a function."""
        parts = self.emulated.lowered.source.split('extern "C" __global__')
        calls = {call.function for call in self.emulated.lowered.calls[name]}
        return "".join(part for part in parts[1:] if "{" in part and any(f" {c}(" in part for c in calls))


def _run(executable: Any, func: Any, name: str, inputs: tuple[np.ndarray, ...]) -> list[np.ndarray]:
    tensors = [tvm.runtime.tensor(array) for array in _arguments(func, inputs)]
    executable[name](*tensors)
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
