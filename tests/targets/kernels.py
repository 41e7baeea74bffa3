"""Builds one kernel from TE tensors and runs it in this process."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import tvm
from tvm import te

from bnncc.targets import emit
from bnncc.targets.descriptor import TargetSpec, get_target, native


def _targets() -> dict[str, TargetSpec]:
    """What this machine can run: its own instructions, fewer of them, and NEON's byte scheme on its own vectors."""
    own = native()
    found = {"native": own, "bytes": replace(own, name="bytes", word_bits=8, popcount="bytes", vector_bits=128)}
    for name in ("x86-64-v2", "x86-64-v3", "x86-64-v4"):
        spec = get_target(name)
        if own.arch == spec.arch and set(spec.features) <= set(own.features):
            found[name] = spec
    return found


TARGETS = _targets()


def placeholder(array: np.ndarray, name: str) -> te.Tensor:
    return te.placeholder(array.shape, str(array.dtype), name)


def prim_func(inputs: list[te.Tensor], outputs: list[te.Tensor], name: str = "kernel") -> tvm.IRModule:
    func = te.create_prim_func([*inputs, *outputs]).with_attr("global_symbol", name)
    return tvm.IRModule({name: func})


def aligned(array: np.ndarray) -> Any:
    return tvm.runtime.tensor(np.ascontiguousarray(array))


class Kernel:
    """A kernel of some inputs (arrays that give shapes and dtypes) and outputs."""

    def __init__(self, target: TargetSpec, f: Any, *arrays: np.ndarray) -> None:
        tensors = [placeholder(a, f"arg{i}") for i, a in enumerate(arrays)]
        outputs = f(*tensors)
        self.outputs = list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]
        self.mod = prim_func(tensors, self.outputs)
        self.target = target
        self.scheduled = emit.schedule(self.mod, target)
        self.executable: Any = None

    def __call__(self, *arrays: np.ndarray) -> Any:
        """Runs it on arrays; outputs start as a pattern that must not survive."""
        if self.executable is None:
            self.executable = emit.build(self.mod, self.target)
        results = []
        for out in self.outputs:
            shape = tuple(int(e) for e in out.shape)
            results.append(
                aligned(
                    np.full(int(np.prod(shape)) * np.dtype(str(out.dtype)).itemsize, 0xA5, np.uint8)
                    .view(str(out.dtype))
                    .reshape(shape)
                )
            )
        self.executable["kernel"](*(aligned(a) for a in arrays), *results)
        values = [r.numpy() for r in results]
        return values[0] if len(values) == 1 else values
