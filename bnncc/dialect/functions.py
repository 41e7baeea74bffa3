"""exp, sigmoid, tanh and erf as operators of TIR that stay vectors: LLVM would call the C library for each element.

They become arithmetic only after loops are vectorised, so that an expression holds its argument once. NaN stays NaN.
Errors in units of the last place, against float64: exp 1, sigmoid 3 (above e⁻⁸⁷), tanh 5, erf 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Op, register_op_attr
from tvm.target.codegen import llvm_lookup_intrinsic_id

# exp: x = n·ln 2 + r; (e^r − 1 − r) / r² on |r| ≤ ln 2 / 2, minimax: 4e-9 of the result; ln 2 in two parts as in SLEEF.
_EXP = (0.00138145312666893, 0.00836874544620514, 0.04166839271783829, 0.1666652113199234, 0.4999999403953552)
_LN2 = (0.693145751953125, 1.428606765330187045e-06)
# Adding 1.5·2²³ rounds to an integer, which then stands in the low bits.
_ROUND, _ROUND_BITS = 12582912.0, 0x4B400000
# tanh x = x·P(x²) / Q(x²) and erf likewise, minimax on these intervals, outside of which they are ±1: as in Eigen
# (generic_fast_tanh_float, generic_fast_erf_float).
_TANH_END = 9.0
_TANH_P = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
           1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)  # fmt: skip
_TANH_Q = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03, 4.89352518554385e-03)
_ERF_END = 4.0
_ERF_P = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
          -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)  # fmt: skip
_ERF_Q = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03, -7.37332916720468e-03,
          -1.42647390514189e-02)  # fmt: skip


def exp(x: Any) -> Any:
    """e to the power of a float."""
    return tirx.call_intrin("float32", "tirx.bnncc_exp", x)


def exp_of_negative(x: Any) -> Any:
    """The same of an argument that is at most 0, which may be −inf; results that would be denormal are 0."""
    return tirx.call_intrin(str(x.ty.dtype), "tirx.bnncc_exp_of_negative", x)


def sigmoid(x: Any) -> Any:
    """1 / (1 + e⁻ˣ), at least e⁻⁸⁷."""
    return tirx.call_intrin("float32", "tirx.bnncc_sigmoid", x)


def tanh(x: Any) -> Any:
    return tirx.call_intrin("float32", "tirx.bnncc_tanh", x)


def erf(x: Any) -> Any:
    return tirx.call_intrin("float32", "tirx.bnncc_erf", x)


class _Vector:
    """Writes arithmetic on vectors like one value; `let` names what is used more than once."""

    def __init__(self, like: Any) -> None:
        self.dtype = str(like.ty.dtype)
        _, _, lanes = self.dtype.partition("x")
        self.lanes = int(lanes or 1)
        self.bound: list[tuple[Any, Any]] = []

    def const(self, value: float, dtype: str = "float32") -> Any:
        scalar = tirx.const(value, dtype)
        return tirx.Broadcast(scalar, self.lanes) if self.lanes > 1 else scalar

    def bits(self, x: Any, dtype: str) -> Any:
        return tirx.reinterpret(f"{dtype}x{self.lanes}" if self.lanes > 1 else dtype, x)

    def let(self, value: Any) -> Any:
        var = tirx.Var(f"t{len(self.bound)}", value.ty.dtype)
        self.bound.append((var, value))
        return var

    def close(self, value: Any) -> Any:
        for var, bound in reversed(self.bound):
            value = tirx.Let(var, bound, value)
        return value

    def polynomial(self, x: Any, coefficients: Sequence[float]) -> Any:
        """By Horner's rule, the highest power first."""
        value = self.const(coefficients[0])
        for c in coefficients[1:]:
            value = value * x + self.const(c)
        return value

    def clamped(self, x: Any, low: float, high: float) -> Any:
        """The bounds come first: TVM's ``max(a, b)`` is ``a > b ? a : b``, and NaN stays."""
        return tirx.min(self.const(high), tirx.max(self.const(low), x))


def _fence(x: Any) -> Any:
    """Keeps TVM from cancelling ``(x + c) − c``."""
    return tirx.call_llvm_pure_intrin(str(x.ty.dtype), llvm_lookup_intrinsic_id("llvm.arithmetic.fence"), x)


def _reduced(v: _Vector, x: Any, bias: int = 0) -> tuple[Any, Any]:
    """(e^r, n + bias) of x = n·ln 2 + r; the latter as int32, of which all but the lowest 22 bits mean nothing."""
    shifted = v.let(_fence(x * v.const(1.4426950408889634) + v.const(_ROUND + bias)))
    n = v.let(shifted - v.const(_ROUND + bias))
    r = v.let((x - n * v.const(_LN2[0])) - n * v.const(_LN2[1]))
    power = v.polynomial(r, _EXP) * (r * r) + r + v.const(1.0)
    return power, v.bits(shifted, "int32")


def _exp(call: Any) -> Any:
    v = _Vector(call)
    power, low = _reduced(v, v.let(v.clamped(call.args[0], -104.0, 89.0)))  # beyond, the result is 0 or infinite
    n = v.let(low - v.const(_ROUND_BITS, "int32"))
    # 2ⁿ in two factors: results down to the smallest denormal are none that one float exponent could scale to.
    half = v.let(n >> v.const(1, "int32"))

    def power_of_two(exponent: Any) -> Any:
        return v.bits((exponent + v.const(127, "int32")) << v.const(23, "int32"), "float32")

    return v.close(power * power_of_two(half) * power_of_two(n - half))


def _exp_of_negative(call: Any) -> Any:
    v = _Vector(call)
    # The exponent field is n + 127. Of what is smaller still n is -127, and a field of 0 above a mantissa of 0 is 0.
    power, field = _reduced(v, v.let(tirx.max(v.const(-127 * math.log(2)), call.args[0])), bias=127)
    return v.close(power * v.bits(field << v.const(23, "int32"), "float32"))


def _sigmoid(call: Any) -> Any:
    v = _Vector(call)
    power, n = _reduced(v, v.let(v.clamped(v.const(0.0) - call.args[0], -87.0, 87.0)))
    # Within these bounds the exponent can be added to; the shift leaves of n what belongs to it.
    scaled = v.bits(v.bits(power, "int32") + (n << v.const(23, "int32")), "float32")
    return v.close(v.const(1.0) / (v.const(1.0) + scaled))


def _rational(call: Any, end: float, numerator: Sequence[float], denominator: Sequence[float]) -> Any:
    v = _Vector(call)
    x = v.let(v.clamped(call.args[0], -end, end))
    square = v.let(x * x)
    ratio = v.polynomial(square, numerator) / v.polynomial(square, denominator)
    return v.close(v.clamped(x * ratio, -1.0, 1.0))  # not x · P first, which would be a denormal for small x


def _register(name: str, function: Callable[[Any], Any], lowered: Callable[[Any], Any]) -> None:
    import tvm.script.parser.tirx as parser
    import tvm.script.tirx as script

    for key, value in (
        ("TCallEffectKind", Op.get("tirx.exp").get_attr("TCallEffectKind")),
        ("TVectorizable", True),
        ("TScriptPrinterName", name),
        ("default.FLowerIntrinsic", lowered),
    ):
        register_op_attr(f"tirx.{name}", key, value)
    setattr(script, name, function)
    setattr(parser, name, function)


_register("bnncc_exp", exp, _exp)
_register("bnncc_exp_of_negative", exp_of_negative, _exp_of_negative)
_register("bnncc_sigmoid", sigmoid, _sigmoid)
_register("bnncc_tanh", tanh, lambda call: _rational(call, _TANH_END, _TANH_P, _TANH_Q))
_register("bnncc_erf", erf, lambda call: _rational(call, _ERF_END, _ERF_P, _ERF_Q))
