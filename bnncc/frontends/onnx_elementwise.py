"""ONNX operators that work element by element, in Relax, rounded as ONNX Runtime's CPU kernels round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import helper
from tvm import relax
from tvm.relax import op as R

from bnncc.frontends.converter import Unsupported
from bnncc.frontends.onnx_converter import (
    CONVERTERS,
    SUPPORTED_DTYPES,
    Converter,
    Node,
    converts,
    dtype_of,
    float32,
    shape_of,
)


def _unary(function: Callable[[relax.Expr], relax.Expr]) -> Converter:
    return lambda n: function(n.input())


for _name, _function in {
    "Abs": R.abs,
    "Ceil": R.ceil,
    "Erf": R.erf,
    "Exp": R.exp,
    "Floor": R.floor,
    "Log": R.log,
    "Neg": R.negative,
    "Not": R.logical_not,
    "Relu": R.nn.relu,
    "Round": R.round,
    "Sigmoid": R.sigmoid,
    "Sign": R.sign,
    "Sqrt": R.sqrt,
    "Tanh": R.tanh,
}.items():
    CONVERTERS[_name] = _unary(_function)

CONVERTERS["Identity"] = lambda n: n.input()


@converts("Dropout")
def _dropout(n: Node) -> relax.Expr:
    if n.has(2) and bool(n.constant(2, "training_mode")):
        raise Unsupported("it is in training mode; export the model for inference")
    n.only_output(1, "mask")
    return n.input()


def _binary(function: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Converter:
    return lambda n: function(*n.together(n.input(0), n.input(1)))


for _name, _binary_function in {
    "Add": R.add,
    "And": R.logical_and,
    "Equal": R.equal,
    "Greater": R.greater,
    "GreaterOrEqual": R.greater_equal,
    "Less": R.less,
    "LessOrEqual": R.less_equal,
    "Mul": R.multiply,
    "Or": R.logical_or,
    "Sub": R.subtract,
    "Xor": R.logical_xor,
}.items():
    CONVERTERS[_name] = _binary(_binary_function)


@converts("Div")
def _divide(n: Node) -> relax.Expr:
    if dtype_of(n.input(0)) != "float32":
        raise Unsupported(f"it divides {dtype_of(n.input(0))}; supported is float32")
    return R.divide(*n.together(n.input(0), n.input(1)))


def _variadic(function: Callable[[relax.Expr, relax.Expr], relax.Expr]) -> Converter:
    """Of any number of operands, from the left."""

    def convert(n: Node) -> relax.Expr:
        result = n.input(0)
        for index in range(1, len(n.inputs)):
            result = n.emit(result) if index > 1 else result
            result = function(*n.together(result, n.input(index)))
        return result

    return convert


for _name, _binary_function in {"Max": R.maximum, "Min": R.minimum, "Sum": R.add}.items():
    CONVERTERS[_name] = _variadic(_binary_function)


@converts("Mean")
def _mean(n: Node) -> relax.Expr:
    total = CONVERTERS["Sum"](n)
    if len(n.inputs) == 1:
        return total
    return R.multiply(n.emit(total), float32(np.float32(1) / np.float32(len(n.inputs))))


@converts("Where")
def _where(n: Node) -> relax.Expr:
    return R.where(*n.together(n.input(0), n.input(1), n.input(2)))


@converts("Cast")
def _cast(n: Node) -> relax.Expr:
    dtype = str(helper.tensor_dtype_to_np_dtype(n.attr("to")))
    if dtype not in SUPPORTED_DTYPES:
        raise Unsupported(f"it casts to {dtype}; supported are {', '.join(sorted(SUPPORTED_DTYPES))}")
    return n.cast(n.input(), dtype)


@converts("Reciprocal")
def _reciprocal(n: Node) -> relax.Expr:
    return R.divide(float32(1), n.input())


@converts("Pow")
def _pow(n: Node) -> relax.Expr:
    x = n.input()
    exponent = n.constants[1]
    if exponent is not None and exponent.size == 1:
        power = float(exponent.reshape(()))
        if power == 1:
            return x
        if power in (2, 3):  # ONNX Runtime multiplies here, too
            square = R.multiply(x, x)
            return square if power == 2 else R.multiply(n.emit(square), x)
    if dtype_of(x) != "float32":
        raise Unsupported(f"it raises {dtype_of(x)} to a power; supported are the powers 1, 2 and 3, or float32")
    return R.power(*n.together(x, n.cast(n.input(1), "float32")))


@converts("Clip")
def _clip(n: Node) -> relax.Expr:
    x = n.input()
    bounds = []
    for name, index in (("min", 1), ("max", 2)):
        value = n.attr(name)
        if value is None and n.has(index):
            value = n.constant(index, name)
        bounds.append(None if value is None else np.asarray(value, dtype_of(x)).reshape(()))
    low, high = bounds
    if dtype_of(x) == "float32":
        # A bound that is left out is the largest finite number.
        largest = float(np.finfo("float32").max)
        return R.clip(x, -largest if low is None else float(low), largest if high is None else float(high))
    if low is not None:
        x = R.maximum(x, relax.const(low, dtype_of(x)))
        x = x if high is None else n.emit(x)
    return x if high is None else R.minimum(x, relax.const(high, dtype_of(x)))


@converts("LeakyRelu")
def _leaky_relu(n: Node) -> relax.Expr:
    return R.nn.leakyrelu(n.input(), float(n.attr("alpha", 0.01)))


@converts("PRelu")
def _prelu(n: Node) -> relax.Expr:
    x, slope = n.together(n.input(0), n.input(1))
    return _positive_or(n, x, n.emit(R.multiply(slope, x)))


def _positive_or(n: Node, x: relax.Expr, otherwise: relax.Expr) -> relax.Expr:
    return R.where(n.emit(R.greater(x, float32(0))), x, otherwise)


@converts("Elu")
def _elu(n: Node) -> relax.Expr:
    x = n.input()
    grown = n.emit(R.subtract(n.emit(R.exp(x)), float32(1)))
    return _positive_or(n, x, n.emit(R.multiply(grown, float32(n.attr("alpha", 1.0)))))


@converts("Softplus")
def _softplus(n: Node) -> relax.Expr:
    # log(1 + exp(x)) without overflow: max(x, 0) + log(1 + exp(−|x|))
    x = n.input()
    small = n.emit(R.exp(n.emit(R.negative(n.emit(R.abs(x))))))
    return R.add(n.emit(R.nn.relu(x)), n.emit(R.log(n.emit(R.add(small, float32(1))))))


def _line(n: Node, slope: Any, offset: Any) -> relax.Expr:
    """clip(slope · x + offset, 0, 1)"""
    scaled = n.emit(R.multiply(n.input(), float32(slope)))
    return R.clip(n.emit(R.add(scaled, float32(offset))), 0.0, 1.0)


CONVERTERS["HardSigmoid"] = lambda n: _line(n, n.attr("alpha", 0.2), n.attr("beta", 0.5))


@converts("HardSwish")
def _hard_swish(n: Node) -> relax.Expr:
    return R.multiply(n.input(), n.emit(_line(n, np.float32(1) / np.float32(6), 0.5)))


@converts("Gelu")
def _gelu(n: Node) -> relax.Expr:
    return R.nn.gelu_tanh(n.input()) if n.attr("approximate", "none") == "tanh" else R.nn.gelu(n.input())


def _softmax(function: Callable[[relax.Expr, int], relax.Expr]) -> Converter:
    def convert(n: Node) -> relax.Expr:
        x = n.input()
        shape = shape_of(x)
        if n.opset >= 13:
            return function(x, n.attr("axis", -1) % len(shape))
        # Up to operator set 12 everything from `axis` on is one axis.
        axis = n.attr("axis", 1) % len(shape)
        rows = int(np.prod(shape[:axis]))
        flat = n.emit(R.reshape(x, (rows, int(np.prod(shape[axis:])))))
        return R.reshape(n.emit(function(flat, 1)), shape)

    return convert


CONVERTERS["Softmax"] = _softmax(R.nn.softmax)
CONVERTERS["LogSoftmax"] = _softmax(R.nn.log_softmax)
