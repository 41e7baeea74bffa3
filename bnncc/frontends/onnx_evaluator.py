"""ONNX graphs in NumPy: `onnx.reference` with the QONNX operators, and with ONNX Runtime's order of operations.

The frontend folds constants through it, and the parity check runs graphs through it that ONNX Runtime cannot. Where the
ONNX standard leaves the roundings open (batch norm, hard sigmoid), these implementations take the same steps as ONNX
Runtime's CPU kernels, so that both references agree to the last bit with what `bnncc` compiles.

The QONNX operators follow their specification (github.com/fastmachinelearning/qonnx, docs/qonnx-custom-ops), which
gives them as NumPy code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

#: Domains under which exporters write the QONNX operators; the older two come from FINN and Brevitas.
QONNX_DOMAINS = ("qonnx.custom_op.general", "finn.custom_op.general", "onnx.brevitas")

#: QONNX rounding modes; halves go to the even neighbour, away from zero or towards zero.
ROUNDINGS: dict[str, Callable[[Any], Any]] = {
    "ROUND": np.round,
    "HALF_EVEN": np.round,
    "CEIL": np.ceil,
    "FLOOR": np.floor,
    "DOWN": np.trunc,
    "UP": lambda x: np.sign(x) * np.ceil(np.abs(x)),
    "HALF_UP": lambda x: np.sign(x) * np.floor(np.abs(x) + np.float32(0.5)),
    "HALF_DOWN": lambda x: np.sign(x) * np.ceil(np.abs(x) - np.float32(0.5)),
}


def integer_range(bits: Any, signed: bool, narrow: bool) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest integer of that many bits, float32; `narrow` leaves out one at the end."""
    bits = np.asarray(bits, "float32")
    two, cut = np.float32(2), np.float32(bool(narrow))
    if signed:
        return -(two ** (bits - 1)) + cut, two ** (bits - 1) - 1
    return np.zeros_like(bits), two**bits - 1 - cut


def truncation_scale(scale: Any, output_scale: Any) -> np.ndarray:
    """By how much a QONNX Trunc of version 2 divides: the ratio of its scales, made a power of two."""
    return np.asarray(np.float32(2) ** np.round(np.log2(np.asarray(output_scale, "float32") / scale)), "float32")


def bipolar_quant(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.where(x >= 0, np.float32(1), np.float32(-1)) * scale


def quant(x: np.ndarray, scale: Any, zero: Any, bits: Any, *, signed: bool, narrow: bool, rounding: str) -> np.ndarray:
    """x on the grid of `scale`: clamped to the integers of `bits`, then rounded. One signed bit is ±1."""
    y = x / scale + zero
    if signed and np.all(np.asarray(bits) == 1):
        y = np.where(y >= 0, np.float32(1), np.float32(-1))
    else:
        low, high = integer_range(bits, signed, narrow)
        y = np.where(y > high, high, y)
        y = ROUNDINGS[rounding.upper()](np.where(y < low, low, y))
    return np.asarray((y - zero) * scale, "float32")


def trunc(
    x: np.ndarray, scale: Any, zero: Any, bits: Any, *output: Any, signed: bool, narrow: bool, rounding: str
) -> np.ndarray:
    """Drops low bits. `output`: the bits to keep (version 1), or scale, zero point and bits after it (version 2)."""
    y = np.round(x / scale + zero)
    if len(output) == 1:
        y = ROUNDINGS[rounding.upper()](y / np.float32(2) ** (np.asarray(bits, "float32") - output[0]))
        return np.asarray((y - zero) * scale, "float32")
    output_scale, _, output_bits = output
    step = truncation_scale(scale, output_scale)
    low, high = integer_range(output_bits, signed, narrow)
    y = y / step
    y = np.where(y > high, high, y)
    y = ROUNDINGS[rounding.upper()](np.where(y < low, low, y))
    return np.asarray((y - zero / step) * output_scale, "float32")


class _BipolarQuant(OpRun):  # type: ignore[misc]
    def _run(self, x: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray]:
        return (bipolar_quant(x, scale),)


class _Quant(OpRun):  # type: ignore[misc]
    def _run(self, x: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: np.ndarray, **_: Any) -> Any:
        signed, narrow = bool(getattr(self, "signed", 1)), bool(getattr(self, "narrow", 1))
        rounding = getattr(self, "rounding_mode", "ROUND")
        return (quant(x, scale, zero, bits, signed=signed, narrow=narrow, rounding=rounding),)


class _Trunc(OpRun):  # type: ignore[misc]
    def _run(self, x: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: np.ndarray, *output: Any, **_: Any) -> Any:
        signed, narrow = bool(getattr(self, "signed", 1)), bool(getattr(self, "narrow", 0))
        rounding = getattr(self, "rounding_mode", "FLOOR")
        return (trunc(x, scale, zero, bits, *output, signed=signed, narrow=narrow, rounding=rounding),)


def batch_norm_factors(statistics: Sequence[np.ndarray], epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """From gamma, beta, mean and variance: a and b of ONNX Runtime's batch norm, y = x·a + b with both roundings."""
    gamma, beta, mean, variance = statistics
    a = np.float32(1) / np.sqrt(variance + np.float32(epsilon)) * gamma
    return a, beta - mean * a


class _BatchNormalization(OpRun):  # type: ignore[misc]
    def _run(self, x: np.ndarray, *statistics: np.ndarray, epsilon: float = 1e-5, **_: Any) -> Any:
        shape = (1, -1, *[1] * (x.ndim - 2))
        a, b = (v.reshape(shape) for v in batch_norm_factors(statistics, epsilon))
        return (x * a + b,)


class _HardSigmoid(OpRun):  # type: ignore[misc]
    def _run(self, x: np.ndarray, alpha: float = 0.2, beta: float = 0.5) -> Any:
        return (np.clip(x * np.float32(alpha) + np.float32(beta), np.float32(0), np.float32(1)),)


class _Mean(OpRun):  # type: ignore[misc]
    def _run(self, *operands: np.ndarray) -> Any:
        total = operands[0]
        for operand in operands[1:]:
            total = total + operand
        return (total * (np.float32(1) / np.float32(len(operands))),)


def _along(values: np.ndarray, x: np.ndarray, axis: int) -> np.ndarray:
    """Scales or zero points, one or one per channel, so that they broadcast against x."""
    if values.size == 1:
        return values.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


class _QuantizeLinear(OpRun):  # type: ignore[misc]
    def _run(self, x: np.ndarray, scale: np.ndarray, zero: Any = None, axis: int = 1, **_: Any) -> Any:
        zero = np.zeros((), "uint8") if zero is None else zero
        limits = np.iinfo(zero.dtype)
        y = np.round(x / _along(scale, x, axis)) + _along(zero, x, axis).astype("float32")
        return (np.clip(y, limits.min, limits.max).astype(zero.dtype),)


class _DequantizeLinear(OpRun):  # type: ignore[misc]
    def _run(self, x: np.ndarray, scale: np.ndarray, zero: Any = None, axis: int = 1, **_: Any) -> Any:
        y = x.astype("float32")
        if zero is not None:
            y = y - _along(zero, x, axis).astype("float32")
        return (y * _along(scale, x, axis),)


# Where onnx.reference begins to have these; before, they know neither blocks nor small floats.
_OWN_QUANTIZATION_BEFORE = 19


def _implementations(opset: int) -> list[type[OpRun]]:
    custom = {"BipolarQuant": _BipolarQuant, "Quant": _Quant, "IntQuant": _Quant, "Trunc": _Trunc}
    classes = [type(name, (base,), {"op_domain": domain}) for domain in QONNX_DOMAINS for name, base in custom.items()]
    standard = {"BatchNormalization": _BatchNormalization, "HardSigmoid": _HardSigmoid, "Mean": _Mean}
    if opset < _OWN_QUANTIZATION_BEFORE:
        standard |= {"QuantizeLinear": _QuantizeLinear, "DequantizeLinear": _DequantizeLinear}
    return [*classes, *(type(name, (base,), {"op_domain": ""}) for name, base in standard.items())]


def evaluator(model: onnx.ModelProto) -> ReferenceEvaluator:
    """Runs a whole model; `.run(names, feeds)`."""
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    return ReferenceEvaluator(model, new_ops=_implementations(opset))


def evaluate_node(
    node: onnx.NodeProto, values: Mapping[str, np.ndarray], opsets: Sequence[onnx.OperatorSetIdProto]
) -> list[np.ndarray]:
    """The outputs of one node whose inputs are all in `values`."""
    names = list(dict.fromkeys(name for name in node.input if name))
    inputs = [
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(values[name].dtype), values[name].shape)
        for name in names
    ]
    outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
    model = helper.make_model(helper.make_graph([node], "constant", inputs, outputs), opset_imports=opsets)
    results = evaluator(model).run(None, {name: values[name] for name in names})
    return [np.asarray(result) for result in results]
