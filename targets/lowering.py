"""The lowering of scheduled kernels: TVM's own, and a pass of ours where a target wants one.

    acc = T.alloc_local((28,), "uint32x16")   -->   the same, marked to be left where it is

TVM leaves only buffers of scope "global" below 1 KB on the stack, where LLVM keeps them in registers. All others it
takes from a workspace: a call and a release for every task of a kernel, and stores that LLVM must keep because the
release might read what they wrote. `LocalsOnStack` runs after all passes that make or merge buffers; it declines those
too large for the stack of a thread. `bnncc.targets.scalar_floats` is the pass of 32-bit ARM.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import tirx
from tvm.s_tir.pipeline import default_s_tir_pipeline
from tvm.tirx import compilation_pipeline

from .descriptor import TargetSpec
from .scalar_floats import ScalarFloats

#: Names of the pipelines, for `tvm.compile`.
_LOCALS, _IEEE = "bnncc.locals", "bnncc.ieee"
#: Bytes of the largest buffer that stays on the stack: threads may have as little as 128 KB.
_STACK_BYTES = 16 << 10


def _rewritten(stmt: Any) -> Any:
    if isinstance(stmt, tirx.SeqStmt):
        return tirx.SeqStmt([_rewritten(s) for s in stmt.seq])
    if isinstance(stmt, tirx.For):
        body = _rewritten(stmt.body)
        return tirx.For(
            stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding, stmt.annotations, stmt.step
        )
    if isinstance(stmt, tirx.AttrStmt):
        return tirx.AttrStmt(stmt.node, stmt.attr_key, stmt.value, _rewritten(stmt.body))
    if isinstance(stmt, tirx.IfThenElse):
        other = None if stmt.else_case is None else _rewritten(stmt.else_case)
        return tirx.IfThenElse(stmt.condition, _rewritten(stmt.then_case), other)
    if isinstance(stmt, tirx.AllocBuffer) and stmt.buffer.scope() == "local" and _bytes(stmt.buffer) <= _STACK_BYTES:
        return tirx.AllocBuffer(stmt.buffer, {"disable_lower_builtin": tirx.const(1, "int32")})
    return stmt


def _bytes(buffer: Any) -> int:
    dtype = tvm.DataType(str(buffer.dtype))
    return math.prod(int(extent) for extent in buffer.shape) * -(-dtype.bits * dtype.lanes // 8)


@tirx.transform.prim_func_pass(opt_level=0, name="LocalsOnStack")
def LocalsOnStack(func: tirx.PrimFunc, mod: tvm.IRModule, context: Any) -> tirx.PrimFunc:
    """Marks the local buffers of a lowered function."""
    return func.with_body(_rewritten(func.body))


def _locals_pipeline() -> tuple[Any, Any, Any]:
    lower, host, device = default_s_tir_pipeline()
    return lower, lambda: tvm.transform.Sequential([LocalsOnStack, host()]), device


def _ieee_pipeline() -> tuple[Any, Any, Any]:
    lower, host, device = default_s_tir_pipeline()
    return lower, lambda: tvm.transform.Sequential([host(), ScalarFloats]), device


compilation_pipeline.PIPELINE_MAP[_LOCALS] = _locals_pipeline
compilation_pipeline.PIPELINE_MAP[_IEEE] = _ieee_pipeline


def pipeline_of(target: TargetSpec) -> str:
    """The name of a target's pipeline."""
    if target.flushes_denormals:
        return _IEEE
    # On ARM, LLVM copies registers in the unrolled steps of binary convolutions when their sums are on the stack.
    return _LOCALS if target.arch == "x86_64" else "default"
