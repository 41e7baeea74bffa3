"""ATen operators that work element by element, in Relax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import relax
from tvm.relax import op as R

from bnncc.dialect import ops as dialect
from bnncc.frontends.converter import CONVERTERS, Converter, Emitter, Unsupported, converts, is_zero


def _unary(name: str, function: Callable[[relax.Expr], relax.Expr]) -> None:
    CONVERTERS[name] = lambda e, a: function(e.cast(a.self, e.dtype))


for _name, _function in {
    "abs": R.abs,
    "atan": R.atan,
    "ceil": R.ceil,
    "cos": R.cos,
    "erf": R.erf,
    "exp": R.exp,
    "floor": R.floor,
    "log": R.log,
    "neg": R.negative,
    "relu": R.nn.relu,
    "round": R.round,
    "rsqrt": R.rsqrt,
    "sigmoid": R.sigmoid,
    "sign": R.sign,
    "silu": R.nn.silu,
    "sin": R.sin,
    "sqrt": R.sqrt,
    "tanh": R.tanh,
    "trunc": R.trunc,
}.items():
    _unary(f"{_name}.default", _function)

_unary("expm1.default", lambda x: dialect.call("expm1", [x]))
_unary("log1p.default", lambda x: dialect.call("log1p", [x]))
CONVERTERS["isnan.default"] = lambda e, a: R.isnan(a.self)
CONVERTERS["isinf.default"] = lambda e, a: R.isinf(a.self)


@converts("alias.default", "clone.default")
def _same(e: Emitter, a: Any) -> relax.Expr:
    return a.self


@converts("_assert_tensor_metadata.default", "_assert_async.msg")
def _nothing(e: Emitter, a: Any) -> None:
    return None


@converts("_to_copy.default")
def _to_copy(e: Emitter, a: Any) -> relax.Expr:
    if a.self.ty.dtype == e.dtype:
        return a.self
    return R.logical_not(e.emit(is_zero(a.self))) if e.dtype == "bool" else R.astype(a.self, e.dtype)


@converts("reciprocal.default")
def _reciprocal(e: Emitter, a: Any) -> relax.Expr:
    return R.divide(relax.const(1.0, e.dtype), e.cast(a.self, e.dtype))


@converts("gelu.default")
def _gelu(e: Emitter, a: Any) -> relax.Expr:
    return R.nn.gelu_tanh(a.self) if a.approximate == "tanh" else R.nn.gelu(a.self)


@converts("leaky_relu.default")
def _leaky_relu(e: Emitter, a: Any) -> relax.Expr:
    return R.nn.leakyrelu(a.self, float(a.negative_slope))


@converts("rrelu.default")
def _rrelu(e: Emitter, a: Any) -> relax.Expr:
    return R.nn.leakyrelu(a.self, (float(a.lower) + float(a.upper)) / 2)


@converts("elu.default")
def _elu(e: Emitter, a: Any) -> relax.Expr:
    def scaled(x: relax.Expr, factor: float) -> relax.Expr:
        return x if factor == 1 else e.emit(R.multiply(x, relax.const(factor, e.dtype)))

    falling = e.emit(dialect.call("expm1", [scaled(a.self, a.input_scale)]))
    positive = e.emit(R.greater(a.self, relax.const(0.0, e.dtype)))
    return R.where(positive, scaled(a.self, a.scale), scaled(falling, a.alpha * a.scale))


@converts("copysign.Tensor")
def _copysign(e: Emitter, a: Any) -> relax.Expr:
    magnitude = e.emit(R.abs(e.cast(a.self, e.dtype)))
    negative = e.emit(dialect.call("signbit", [e.cast(a.other, e.dtype)]))
    return R.where(negative, e.emit(R.negative(magnitude)), magnitude)


@converts("signbit.default")
def _signbit(e: Emitter, a: Any) -> relax.Expr:
    dtype = str(a.self.ty.dtype)
    return dialect.call("signbit", [a.self]) if "float" in dtype else R.less(a.self, relax.const(0, dtype))


@converts("hardsigmoid.default")
def _hardsigmoid(e: Emitter, a: Any) -> relax.Expr:
    # ATen: min(max(x + 3, 0), 6) / 6
    return R.divide(_clip(e, _shift(e, a.self, 3.0), 0.0, 6.0), relax.const(6.0, e.dtype))


@converts("hardswish.default")
def _hardswish(e: Emitter, a: Any) -> relax.Expr:
    # ATen: x * min(max(x + 3, 0), 6) / 6
    product = e.emit(R.multiply(a.self, _clip(e, _shift(e, a.self, 3.0), 0.0, 6.0)))
    return R.divide(product, relax.const(6.0, e.dtype))


def _shift(e: Emitter, x: relax.Expr, by: float) -> relax.Var:
    return e.emit(R.add(x, relax.const(by, e.dtype)))


def _clip(e: Emitter, x: relax.Expr, low: float, high: float) -> relax.Var:
    return e.emit(R.clip(x, low, high))


@converts("clamp.default", "hardtanh.default", "clamp.Tensor")
def _clamp(e: Emitter, a: Any) -> relax.Expr:
    low = getattr(a, "min", getattr(a, "min_val", None))
    high = getattr(a, "max", getattr(a, "max_val", None))
    x = e.cast(a.self, e.dtype)
    scalars = not isinstance(low, relax.Expr) and not isinstance(high, relax.Expr)
    if scalars and low is not None and high is not None and "float" in e.dtype:
        return R.clip(x, float(low), float(high))
    if low is not None:
        x = R.maximum(x, e.cast(low, e.dtype))
        if high is None:
            return x
        x = e.emit(x)
    return R.minimum(x, e.cast(high, e.dtype))


def _arithmetic(function: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Converter:
    def convert(e: Emitter, a: Any) -> relax.Expr:
        other = e.cast(a.other, e.dtype)
        alpha = getattr(a, "alpha", 1)
        if alpha != 1:
            other = e.emit(R.multiply(other, relax.const(alpha, e.dtype)))
        return function(e.cast(a.self, e.dtype), other)

    return convert


for _name, _operation in {
    "add.Tensor": R.add,
    "add.Scalar": R.add,
    "sub.Tensor": R.subtract,
    "sub.Scalar": R.subtract,
    "mul.Tensor": R.multiply,
    "mul.Scalar": R.multiply,
    "div.Tensor": R.divide,
    "div.Scalar": R.divide,
    "maximum.default": R.maximum,
    "minimum.default": R.minimum,
}.items():
    CONVERTERS[_name] = _arithmetic(_operation)


def _comparison(function: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Converter:
    return lambda e, a: function(*e.operands(a.self, a.other))


def _logical(function: Callable[..., relax.Expr]) -> Converter:
    return lambda e, a: function(*(e.cast(value, "bool") for value in vars(a).values()))


for _name, _operation in {
    "eq": R.equal,
    "lt": R.less,
    "le": R.less_equal,
    "gt": R.greater,
    "ge": R.greater_equal,
}.items():
    CONVERTERS[f"{_name}.Tensor"] = CONVERTERS[f"{_name}.Scalar"] = _comparison(_operation)


@converts("ne.Tensor", "ne.Scalar")
def _not_equal(e: Emitter, a: Any) -> relax.Expr:
    # TVM compares `NaN != x` as false.
    return R.logical_not(e.emit(R.equal(*e.operands(a.self, a.other))))


for _name, _logical_operation in {
    "logical_and": R.logical_and,
    "logical_or": R.logical_or,
    "logical_xor": R.logical_xor,
    "logical_not": R.logical_not,
}.items():
    CONVERTERS[f"{_name}.default"] = _logical(_logical_operation)


def _bitwise(function: Callable[..., relax.Expr]) -> Converter:
    convert_bool = _logical(function)

    def convert(e: Emitter, a: Any) -> relax.Expr:
        if e.dtype != "bool":
            raise Unsupported(f"it works on {e.dtype}; bitwise operators are supported on bool")
        return convert_bool(e, a)

    return convert


for _name, _logical_operation in {
    "bitwise_and.Tensor": R.logical_and,
    "bitwise_or.Tensor": R.logical_or,
    "bitwise_xor.Tensor": R.logical_xor,
    "bitwise_not.default": R.logical_not,
}.items():
    CONVERTERS[_name] = _bitwise(_logical_operation)


@converts("pow.Tensor_Scalar")
def _pow_scalar(e: Emitter, a: Any) -> relax.Expr:
    # ATen computes these exponents without pow (aten/src/ATen/native/cpu/PowKernel.cpp); so do we, to round alike.
    x, one = e.cast(a.self, e.dtype), relax.const(1, e.dtype)
    special: dict[float, Callable[[], relax.Expr]] = {
        0.5: lambda: R.sqrt(x),
        2: lambda: R.multiply(x, x),
        3: lambda: R.multiply(e.emit(R.multiply(x, x)), x),
        -0.5: lambda: R.rsqrt(x),
        -1: lambda: R.divide(one, x),
        -2: lambda: R.divide(one, e.emit(R.multiply(x, x))),
    }
    if a.exponent == 1:
        return x
    if a.exponent in special and ("float" in e.dtype or a.exponent in (2, 3)):
        return special[a.exponent]()
    if "float" not in e.dtype:
        raise Unsupported(f"an integer tensor to the power {a.exponent}; supported are 1, 2 and 3, or float tensors")
    return R.power(x, relax.const(a.exponent, e.dtype))


@converts("pow.Tensor_Tensor")
def _pow_tensor(e: Emitter, a: Any) -> relax.Expr:
    if "float" not in e.dtype:
        raise Unsupported("integer tensors as base and exponent; use float tensors")
    return R.power(e.cast(a.self, e.dtype), e.cast(a.exponent, e.dtype))


@converts("where.self")
def _where(e: Emitter, a: Any) -> relax.Expr:
    return R.where(e.cast(a.condition, "bool"), e.cast(a.self, e.dtype), e.cast(a.other, e.dtype))
