"""Float arithmetic lane by lane, for vector units that take denormals for 0.

    a + b                        -->  [a.0 + b.0, a.1 + b.1, …]         and so −, ·, /, fma, sqrt, exp, …
    a < b, max(a, b), …          -->  the same of integers that are ordered as the floats are
    s + x · w                    -->  fma(x, w, s) on vectors: the sum of a convolution

NEON of 32-bit ARM takes denormal operands and results for 0 wherever it computes with floats or compares them; the
scalar unit (VFP) follows IEEE 754. LLVM takes NEON for whatever TVM wrote on vectors, so that this pass leaves no float
arithmetic there. Loads, stores, selections and conversions stay vectors. An exact step states its roundings
(`bnncc.dialect.scalars`); a product that stands open in a sum is one of a convolution or dense layer, which are not
exact: there NEON's zeros differ from eager's denormals by less than 2^-126 in each term.

After `LowerIntrin`, as the last pass before LLVM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, Op
from tvm.target.codegen import llvm_lookup_intrinsic_id

_FENCE, _FMA, _FMULADD, _FABS = (
    llvm_lookup_intrinsic_id(f"llvm.{name}") for name in ("arithmetic.fence", "fma", "fmuladd", "fabs")
)
#: Intrinsics that take bits as they are.
_MOVES = {_FENCE, _FABS}
_LLVM = ("tirx.call_llvm_pure_intrin", "tirx.call_llvm_intrin")

_ARITHMETIC = (tirx.Add, tirx.Sub, tirx.Mul, tirx.Div)
_COMPARISONS = (tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE)


@tirx.transform.prim_func_pass(opt_level=0, name="ScalarFloats")
def ScalarFloats(func: tirx.PrimFunc, mod: tvm.IRModule, context: Any) -> tirx.PrimFunc:
    """Takes float arithmetic out of the vectors of a lowered function."""
    body = tvm_ffi.structural_map(func.body, (tirx.Add, _mark_sum))
    callbacks = [(_ARITHMETIC, _by_lane), (_COMPARISONS, _compare), ((tirx.Max, tirx.Min), _extreme), (Call, _call)]
    return func.with_body(tvm_ffi.structural_map(body, callbacks))


def _dtype(e: Any) -> str:
    return str(getattr(e.ty, "dtype", ""))  # pointers have none


def _is_vector(e: Any) -> bool:
    return _dtype(e).startswith("float32x")


def _lanes(e: Any) -> int:
    return int(_dtype(e).partition("x")[2])


def _llvm(intrinsic: int, dtype: str, *args: Any) -> Any:
    return tirx.call_llvm_pure_intrin(dtype, intrinsic, *args)


def _mark_sum(e: Any) -> Any:
    """``s + x·w`` as a call that later is told from the fma of an exact step."""
    if _is_vector(e):
        for s, product in ((e.a, e.b), (e.b, e.a)):
            if isinstance(product, tirx.Mul):
                return _llvm(_FMULADD, _dtype(e), product.a, product.b, s)
    return e


def _lanes_of(e: Any) -> list[Any] | None:
    """The lanes of a gathered vector, of others None."""
    if isinstance(e, tirx.Shuffle) and all("x" not in _dtype(v) for v in e.vectors):
        return [e.vectors[int(i)] for i in e.indices]
    return None


def _lane(e: Any, i: int) -> Any:
    """Lane i, such that LLVM does not put several of them together again."""
    if isinstance(e, tirx.Broadcast):
        return e.value
    if (lanes := _lanes_of(e)) is not None:
        return lanes[i]
    return _llvm(_FENCE, "float32", tirx.Shuffle([e], [i]))


def _gather(values: list[Any]) -> Any:
    return tirx.Shuffle(values, list(range(len(values))))


def _once(make: Callable[..., Any], *operands: Any, lanes: bool = False) -> Any:
    """What `make` makes of the operands, each of them computed once although it stands there several times.

    lanes: of a gathered vector it takes each value for itself.
    """
    bound: list[tuple[Any, Any]] = []
    simple: list[Any] = []
    for operand in operands:
        while isinstance(operand, tirx.Let):
            bound.append((operand.var, operand.value))
            operand = operand.body
        if not (isinstance(operand, (tirx.Var, tirx.Broadcast)) or (lanes and _lanes_of(operand) is not None)):
            bound.append((tirx.Var(f"once{len(bound)}", _dtype(operand)), operand))
            operand = bound[-1][0]
        simple.append(operand)
    value = make(*simple)
    for var, whole in reversed(bound):
        value = tirx.Let(var, whole, value)
    return value


def _by_lane(e: Any) -> Any:
    if not _is_vector(e):
        return e

    def gathered(a: Any, b: Any) -> Any:
        return _gather([type(e)(_lane(a, i), _lane(b, i)) for i in range(_lanes(e))])

    return _once(gathered, e.a, e.b, lanes=True)


def _call(e: Any) -> Any:
    if not _is_vector(e) or not isinstance(e.op, Op) or str(e.op.name) not in _LLVM:
        return e
    intrinsic = int(e.args[0])
    if intrinsic == _FMULADD:
        return _llvm(_FMA, _dtype(e), *e.args[1:])
    if intrinsic in _MOVES:
        return _by_lane_where_gathered(e, intrinsic, e.args[1])

    def gathered(*args: Any) -> Any:
        return _gather([_llvm(intrinsic, "float32", *(_lane(a, i) for a in args)) for i in range(_lanes(e))])

    return _once(gathered, *e.args[1:], lanes=True)


def _by_lane_where_gathered(e: Any, intrinsic: int, operand: Any) -> Any:
    """A move of lanes that are already apart leaves them so. Bound to a name, and each lane read from there, they would
    be written out once a lane: TVM's code generation puts values in the place of names, and names may stand in them."""
    if isinstance(operand, tirx.Let):
        inner = _by_lane_where_gathered(e, intrinsic, operand.body)
        return e if inner.same_as(e) else tirx.Let(operand.var, operand.value, inner)
    lanes = _lanes_of(operand)
    return e if lanes is None else _gather([_llvm(intrinsic, "float32", lane) for lane in lanes])


def _extreme(e: Any) -> Any:
    """The larger or smaller as TVM has them: ``a > b ? a : b``, ``a < b ? a : b``."""
    if not _is_vector(e):
        return e

    def larger(a: Any, b: Any) -> Any:
        return tirx.Select(_ordered_less(b, a), a, b)

    def smaller(a: Any, b: Any) -> Any:
        return tirx.Select(_ordered_less(a, b), a, b)

    return _once(larger if isinstance(e, tirx.Max) else smaller, e.a, e.b)


def _compare(e: Any) -> Any:
    """LLVM's ordered comparisons, as TVM asks for them: false for NaN, ``!=`` too."""
    if not _is_vector(e.a):
        return e
    if isinstance(e, tirx.LT):
        return _once(_ordered_less, e.a, e.b)
    if isinstance(e, tirx.GT):
        return _once(_ordered_less, e.b, e.a)
    return _once(lambda a, b: tirx.And(type(e)(_key(a), _key(b)), _numbers(a, b)), e.a, e.b)


def _ordered_less(a: Any, b: Any) -> Any:
    """``a < b``. The bits of the positive numbers, and those of the negative ones, are neighbours."""
    if _is_zero(b):
        return _bits(a, "uint32") - _word(a, 0x80000001) <= _word(a, 0x7F7FFFFF)
    if _is_zero(a):
        return _bits(b, "uint32") - _word(b, 1) <= _word(b, 0x7F7FFFFF)
    return tirx.And(_key(a) < _key(b), _numbers(a, b))


def _is_zero(e: Any) -> bool:
    return isinstance(e, tirx.Broadcast) and isinstance(e.value, tirx.FloatImm) and float(e.value.value) == 0


def _bits(e: Any, dtype: str) -> Any:
    return tirx.reinterpret(f"{dtype}x{_lanes(e)}", e)


def _word(like: Any, value: int, dtype: str = "uint32") -> Any:
    return tirx.Broadcast(tirx.const(value, dtype), _lanes(like))


def _magnitude(e: Any) -> Any:
    return _bits(e, "int32") & _word(e, 0x7FFFFFFF, "int32")


def _key(e: Any) -> Any:
    """An integer that grows as the float does, 0 for both zeros."""
    sign = _bits(e, "int32") >> _word(e, 31, "int32")
    return (_magnitude(e) ^ sign) - sign


def _numbers(a: Any, b: Any) -> Any:
    """Whether neither is NaN."""
    return tirx.max(_magnitude(a), _magnitude(b)) <= _word(a, 0x7F800000, "int32")
