"""Expressions that CUDA C must round, compare and compute as eager PyTorch does.

    arithmetic.fence(a · b), (a + b)   -->   __fmul_rn(a, b), __fadd_rn(a, b)      never contracted
    fma(x, a, b)                       -->   __fmaf_rn(x, a, b)
    max(a, b), min(a, b) of floats     -->   bnncc_max(a, b), bnncc_min(a, b)      NaN stays, as on CPUs
    log(x), sin(x), cos(x)             -->   logf(x), …                            not the hardware's approximations

TVM prints ``max`` and ``__logf`` for CUDA; a fence is how computes keep a rounding (`bnncc.dialect.scalars`). What
stands open the compiler may contract, as LLVM does on CPUs. `PlainFunctions` runs before TVM's `LowerIntrin`,
`Roundings` after it, on device functions; `FUNCTIONS` stands before their text.
"""

from __future__ import annotations

from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Op
from tvm.target.codegen import llvm_lookup_intrinsic_id

_FENCE, _FMA = (llvm_lookup_intrinsic_id(f"llvm.{name}") for name in ("arithmetic.fence", "fma"))
_LLVM = ("tirx.call_llvm_pure_intrin", "tirx.call_llvm_intrin")
_FUNCTIONS = {"tirx.log": "logf", "tirx.sin": "sinf", "tirx.cos": "cosf", "tirx.exp": "expf"}
_EXTREMES = {tirx.Max: ("bnncc_max", ">"), tirx.Min: ("bnncc_min", "<")}

#: CUDA C of what kernels call. Functions, since an operand that is written twice doubles a chain's text at each link.
FUNCTIONS = "".join(
    f"template <typename T> __device__ __forceinline__ T {name}(T a, T b) {{ return a {comparison} b ? a : b; }}\n"
    for name, comparison in _EXTREMES.values()
)
_ROUNDED = {tirx.Add: "__fadd_rn", tirx.Sub: "__fsub_rn", tirx.Mul: "__fmul_rn"}


@tirx.transform.prim_func_pass(opt_level=0, name="PlainFunctions")
def PlainFunctions(func: tirx.PrimFunc, mod: tvm.IRModule, context: Any) -> tirx.PrimFunc:
    """Functions of the C library stay accurate."""
    return func.with_body(tvm_ffi.structural_map(func.body, (Call, _plain)))


@tirx.transform.prim_func_pass(opt_level=0, name="Roundings")
def Roundings(func: tirx.PrimFunc, mod: tvm.IRModule, context: Any) -> tirx.PrimFunc:
    """States the roundings and comparisons of floats in CUDA's own terms."""
    callbacks = [(Call, _rounded), (tuple(_EXTREMES), _extreme)]
    return func.with_body(tvm_ffi.structural_map(func.body, callbacks))


def _extern(name: str, *args: Any, dtype: str = "float32") -> Any:
    return tirx.call_pure_extern(dtype, name, *args)


def _name(e: Any) -> str:
    return str(e.op.name) if isinstance(e.op, Op) else ""


def _dtype(e: Any) -> str:
    return str(getattr(e.ty, "dtype", ""))  # pointers have none


def _plain(e: Any) -> Any:
    function = _FUNCTIONS.get(_name(e))
    return _extern(function, *e.args) if function and _dtype(e) == "float32" else e


def _rounded(e: Any) -> Any:
    if _name(e) not in _LLVM:
        return e
    intrinsic, *args = e.args
    if int(intrinsic) == _FMA:
        return _extern("__fmaf_rn", *args)
    if int(intrinsic) != _FENCE:
        raise ValueError(f"no CUDA for the intrinsic {e}")
    value = args[0]
    function = _ROUNDED.get(type(value))
    if function:
        return _extern(function, value.a, value.b)
    # Nothing to round, but TVM must not see through it; by now it does not look any more.
    return value


def _extreme(e: Any) -> Any:
    if not _dtype(e).startswith("float"):
        return e
    return _extern(_EXTREMES[type(e)][0], e.a, e.b, dtype=_dtype(e))
