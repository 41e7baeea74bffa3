"""What the pass tests share: comparing Before with Expected, building small functions, and running them in PyTorch."""

import logging
import math

import numpy as np
import pytest
import torch
import tvm
import tvm_ffi
from tvm import relax
from tvm.ir import IRModule

from bnncc.dialect import torch_eval
from bnncc.dialect.ops import op_name
from bnncc.dialect.plan import Tensor
from bnncc.passes.form_kernels import STEPS
from bnncc.passes.plan_memory import plan_memory
from bnncc.passes.rewriter import LAYERS, ORIGINS, Rewriter
from bnncc.targets.descriptor import get_target

#: One value of every kind a comparison with zero can meet, and the edges of float32.
_MAGNITUDES = [1e-45, 1e-38, 0.5, 1.0, 2.0, 3e38, math.inf]
SPECIAL = torch.tensor([*(-m for m in reversed(_MAGNITUDES)), -0.0, 0.0, *_MAGNITUDES, math.nan])


def _bare(mod: IRModule) -> IRModule:
    """The module without the attributes that carry names and notes along."""
    bare = mod.clone()
    main = bare["main"]
    for attribute in (ORIGINS, LAYERS, STEPS, "global_symbol"):
        main = main.without_attr(attribute)
    bare["main"] = main
    return bare


def _apply(transform, mod: IRModule) -> IRModule:
    """Runs a pass between two checks of well-formedness."""
    relax.analysis.well_formed(mod)  # raises
    result = transform(mod)
    relax.analysis.well_formed(result)
    return result


@pytest.fixture
def apply():
    """apply(pass, module) → module, both checked to be well-formed."""
    return _apply


@pytest.fixture
def check():
    """check(pass, before, expected): the pass turns one module into the other; returns what the pass returned."""

    def compare(transform, before: IRModule, expected: IRModule) -> IRModule:
        result = _apply(transform, before)
        # A pass binds the result of `main` once more, and drops what is dead; the identity pass does so too.
        tvm.ir.assert_structural_equal(_bare(result), _bare(_normal(expected)), map_free_vars=True)
        return result

    return compare


def _normal(mod: IRModule) -> IRModule:
    class Identity(Rewriter):
        def rewrite(self, var, value):
            return None

    return Identity(mod).run()


@pytest.fixture
def check_unchanged(check):
    """check_unchanged(pass, module): the pass declines everything in it."""
    return lambda transform, mod: check(transform, mod, mod)


def _function(shape, body, dtype="float32", *, params=1) -> IRModule:
    builder = relax.BlockBuilder()
    variables = [relax.Var("xyzuv"[i], relax.TensorType(shape, dtype)) for i in range(params)]
    with builder.function("main", variables):
        with builder.dataflow():
            result = builder.emit_output(body(*variables))
        builder.emit_func_output(result)
    return builder.get()


@pytest.fixture
def function():
    """function(shape, body): a module whose `main` returns body(x), written as one nested expression."""
    return _function


@pytest.fixture
def evaluate():
    """evaluate(module, *inputs) → what `main` returns, by PyTorch's arithmetic."""

    def run(mod: IRModule, *inputs: torch.Tensor):
        results = torch_eval.evaluate_function(mod["main"], inputs)
        return results[0] if len(results) == 1 else results

    return run


@pytest.fixture
def special() -> torch.Tensor:
    return SPECIAL.clone()


@pytest.fixture
def reasons(caplog):
    """reasons(): the debug lines that passes wrote so far."""
    caplog.set_level(logging.DEBUG, logger="bnncc.passes")
    return lambda: [record.getMessage() for record in caplog.records]


def _calls(mod: IRModule) -> list[str]:
    return [str(op_name(b.value)) for block in mod["main"].body.blocks for b in block.bindings if op_name(b.value)]


@pytest.fixture
def calls():
    """calls(module) → the names of the operators of `main`, in order."""
    return _calls


def _aligned(size: int) -> np.ndarray:
    """`size` bytes of garbage at a 64-byte boundary, so that a kernel that reads what nobody wrote is noticed."""
    memory = np.full(size + 64, 0xA5, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size]


def _execute(mod: IRModule, *inputs: np.ndarray) -> list[np.ndarray]:
    """Plans the memory of what `FormKernels` returned and runs it, kernel by kernel, on TVM's unscheduled code."""
    plan = plan_memory(mod, "model")
    kernels = tvm.IRModule({gv: f for gv, f in mod.functions_items() if gv.name_hint != "main"})
    library = tvm.compile(kernels, target={"kind": "llvm", "opt-level": 0}).mod
    spaces = {"arena": _aligned(plan.arena_bytes), "persistent": _aligned(plan.persistent_bytes)}
    spaces["weights"] = _aligned(len(plan.weights))
    spaces["weights"][:] = np.frombuffer(plan.weights, np.uint8)
    outputs = [_aligned(_size(plan.tensors[t])) for t in plan.outputs]
    given = [_aligned(array.nbytes) for array in inputs]
    for memory, array in zip(given, inputs, strict=True):
        memory[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)

    def view(index: int) -> np.ndarray:
        t = plan.tensors[index]
        if t.space in ("input", "output"):
            memory = (given if t.space == "input" else outputs)[t.offset]
        else:
            memory = spaces[t.space][t.offset :]
        return memory[: _size(t)].view(t.dtype).reshape(t.shape)

    for step in (*plan.init, *plan.steps):
        library[step.kernel](*(tvm_ffi.from_dlpack(view(t)) for t in step.args))
    return [view(t).copy() for t in plan.outputs]


def _size(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize


@pytest.fixture(scope="session")
def execute():
    """execute(module of kernels, *arrays) → the outputs of the planned module."""
    return _execute


@pytest.fixture
def v3():
    return get_target("x86-64-v3")
