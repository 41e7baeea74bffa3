"""Quantization in ONNX and QONNX, in float arithmetic: the same integers, held as floats.

Between QuantizeLinear and DequantizeLinear a value is a small integer; where nothing else reads it, it stays a float
that holds that integer, so that the passes see one chain of divide, round, clip and multiply.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import TensorProto
from tvm import relax
from tvm.relax import op as R

from bnncc.frontends.converter import Unsupported
from bnncc.frontends.onnx_converter import SUPPORTED_DTYPES, Node, converts, float32, qonnx, shape_of
from bnncc.frontends.onnx_evaluator import integer_range, truncation_scale

# dtype by ONNX's number → bits, signed
_INTEGERS = {
    TensorProto.UINT8: (8, False),
    TensorProto.INT8: (8, True),
    TensorProto.UINT16: (16, False),
    TensorProto.INT16: (16, True),
    TensorProto.UINT4: (4, False),
    TensorProto.INT4: (4, True),
}
_NUMBER_OF = {f"{'' if signed else 'u'}int{bits}": number for number, (bits, signed) in _INTEGERS.items()}


def _along(n: Node, values: np.ndarray) -> np.ndarray:
    """Scales or zero points, one or one per channel, so that they broadcast against the first input; as float32."""
    if n.attr("block_size", 0) or values.ndim > 1:
        raise Unsupported("blocked quantization; supported are one scale, or one per channel")
    if values.size == 1:
        return values.astype("float32").reshape(())
    rank = len(shape_of(n.input()))
    shape = [1] * rank
    shape[n.attr("axis", 1) % rank] = -1
    return values.astype("float32").reshape(shape)


def _zero_point(n: Node) -> np.ndarray:
    return _along(n, n.constant(2, "zero point")) if n.has(2) else np.zeros((), "float32")


@converts("QuantizeLinear")
def _quantize(n: Node) -> relax.Expr:
    number = n.attr("output_dtype", 0)
    if n.has(2):
        number = _NUMBER_OF.get(str(n.constant(2, "zero point").dtype), -1)
    bits, signed = _INTEGERS.get(number or TensorProto.UINT8, (0, False))
    if not bits:
        raise Unsupported("it quantizes to another type than integers of 4, 8 or 16 bits, which are supported")
    y = n.emit(R.divide(n.input(), float32(_along(n, n.constant(1, "scale")))))
    y = n.emit(R.round(y))
    zero = _zero_point(n)
    if np.any(zero):
        y = n.emit(R.add(y, float32(zero)))
    low, high = integer_range(bits, signed, False)
    return R.clip(y, float(low), float(high))


def as_integers(n: Node, whole: relax.Expr) -> relax.Expr:
    """What QuantizeLinear gave, for readers that need its dtype."""
    number = n.attr("output_dtype", 0) or TensorProto.UINT8
    if n.has(2):
        number = _NUMBER_OF[str(n.constant(2, "zero point").dtype)]
    bits, signed = _INTEGERS[number]
    dtype = f"{'' if signed else 'u'}int{bits}"
    if dtype not in SUPPORTED_DTYPES:
        raise Unsupported(f"its {dtype} result is read by something else than DequantizeLinear, which is supported")
    return R.astype(n.bound(whole), dtype)


@converts("DequantizeLinear")
def _dequantize(n: Node) -> relax.Expr:
    x = n.cast(n.input(), "float32")
    zero = _zero_point(n)
    if np.any(zero):
        x = n.emit(R.subtract(x, float32(zero)))
    return R.multiply(x, float32(_along(n, n.constant(1, "scale"))))


@qonnx("BipolarQuant")
def _bipolar_quant(n: Node) -> relax.Expr:
    return _scaled(n, _bipolar(n, n.input()), _number(n, 1, "scale"))


def _bipolar(n: Node, x: relax.Expr) -> relax.Expr:
    return R.where(n.emit(R.greater_equal(x, float32(0))), float32(1), float32(-1))


def _number(n: Node, index: int, what: str) -> np.ndarray:
    """A constant operand; 0-d where it holds one number."""
    value = n.constant(index, what).astype("float32")
    return value.reshape(()) if value.size == 1 else value


def _scaled(n: Node, y: relax.Expr, scale: np.ndarray) -> relax.Expr:
    return y if np.all(scale == 1) else R.multiply(n.bound(y), float32(scale))


def _shifted(n: Node, y: relax.Expr, by: np.ndarray) -> relax.Expr:
    return R.add(n.bound(y), float32(by)) if np.any(by) else y


def _divided(n: Node, y: relax.Expr, scale: np.ndarray) -> relax.Expr:
    return y if np.all(scale == 1) else R.divide(n.bound(y), float32(scale))


_ROUNDINGS: dict[str, Callable[[Node, relax.Expr], relax.Expr]] = {
    "ROUND": lambda n, y: R.round(y),
    "HALF_EVEN": lambda n, y: R.round(y),
    "CEIL": lambda n, y: R.ceil(y),
    "FLOOR": lambda n, y: R.floor(y),
    "DOWN": lambda n, y: R.trunc(y),
    "UP": lambda n, y: _by_magnitude(n, y, R.ceil, 0.0),
    "HALF_UP": lambda n, y: _by_magnitude(n, y, R.floor, 0.5),
    "HALF_DOWN": lambda n, y: _by_magnitude(n, y, R.ceil, -0.5),
}


def _by_magnitude(n: Node, y: relax.Expr, function: Callable[[Any], relax.Expr], shift: float) -> relax.Expr:
    magnitude = n.emit(R.abs(y))
    magnitude = n.emit(R.add(magnitude, float32(shift))) if shift else magnitude
    return R.multiply(n.emit(R.sign(y)), n.emit(function(magnitude)))


def _rounded(n: Node, y: relax.Expr, default: str) -> relax.Expr:
    mode = n.attr("rounding_mode", default).upper()
    if mode not in _ROUNDINGS:
        raise Unsupported(f"rounding mode '{mode}'; supported are {', '.join(_ROUNDINGS)}")
    return _ROUNDINGS[mode](n, n.bound(y))


def _clamped(n: Node, y: relax.Expr, bits: np.ndarray, narrow_default: int) -> relax.Expr:
    low, high = integer_range(bits, bool(n.attr("signed", 1)), bool(n.attr("narrow", narrow_default)))
    if low.ndim == 0:
        return R.clip(n.bound(y), float(low), float(high))
    return R.maximum(n.emit(R.minimum(n.bound(y), float32(high))), float32(low))


@qonnx("Quant", "IntQuant")
def _quant(n: Node) -> relax.Expr:
    scale, zero, bits = _number(n, 1, "scale"), _number(n, 2, "zero point"), _number(n, 3, "bit width")
    x = n.input()
    if n.attr("signed", 1) and np.all(bits == 1):
        # Dividing by a scale up to 1 moves no number across zero; by a larger one it may underflow to it.
        same_sign = not np.any(zero) and np.all((scale > 0) & (scale <= 1))
        y = _bipolar(n, n.bound(x if same_sign else _shifted(n, _divided(n, x, scale), zero)))
    else:
        y = _shifted(n, _divided(n, x, scale), zero)
        y = _rounded(n, _clamped(n, y, bits, 1), "ROUND")
    return _scaled(n, _shifted(n, y, -zero), scale)


@qonnx("Trunc")
def _trunc(n: Node) -> relax.Expr:
    scale, zero, bits = _number(n, 1, "scale"), _number(n, 2, "zero point"), _number(n, 3, "input bit width")
    y = R.round(n.bound(_shifted(n, _divided(n, n.input(), scale), zero)))
    if len(n.inputs) == 5:
        step = np.float32(2) ** (bits - _number(n, 4, "output bit width"))
        y = _rounded(n, _divided(n, y, step), "FLOOR")
        return _scaled(n, _shifted(n, y, -zero), scale)
    output_scale, output_bits = _number(n, 4, "output scale"), _number(n, 6, "output bit width")
    step = truncation_scale(scale, output_scale)
    y = _rounded(n, _clamped(n, _divided(n, y, step), output_bits, 0), "FLOOR")
    return _scaled(n, _shifted(n, y, -zero / step), output_scale)
