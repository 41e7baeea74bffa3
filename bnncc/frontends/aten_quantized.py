"""Quantization of torch.ao, in Relax: exact float arithmetic on values that lie on a grid.

    quantize:    q = clip(nearbyint(x / scale + zero_point), quant_min, quant_max)
    dequantize:  y = (q − zero_point) · scale

How `x / scale + zero_point` is rounded differs from kernel to kernel of PyTorch, which decides ties (and near ties):

    aten.quantize_per_tensor     nearbyint(fma(x, inv, zero_point)),  inv = 1 / scale in float32
    aten.fake_quantize_*         nearbyint(x · inv) + zero_point
    quantized_decomposed.*       round(x · inv) + zero_point, inv = 1 / scale in float64 for a tensor

tests/frontends/test_aten_quantized.py holds these to eager on grids of ties. A tensor of a quantized dtype (quint8,
qint8, qint32) is carried as the floats that it stands for, so that its `dequantize` is the tensor itself; between the
two only operators that move values may stand.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed.*
from torch import fx
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax import op as R

from bnncc.dialect import ops as dialect
from bnncc.dialect.torch_eval import to_constant
from bnncc.frontends.converter import CONVERTERS, Emitter, Unsupported, converts

_BOUNDS = {torch.quint8: (0, 255), torch.qint8: (-128, 127), torch.qint32: (-(2**31), 2**31 - 1)}

# What a tensor of a quantized dtype may go through: what gives the same grid of values, whichever way it is carried.
_MOVES = frozenset({
    "view.default", "permute.default", "squeeze.dims", "unsqueeze.default", "expand.default", "clone.default",
    "alias.default", "slice.Tensor", "select.int", "relu.default", "max_pool2d_with_indices.default",
})  # fmt: skip


def _array(e: Emitter, value: Any, dtype: str) -> np.ndarray:
    """Quantization parameters as an array; they must be known when compiling."""
    if isinstance(value, relax.Expr):
        known = e.value(value)
        if known is None:
            raise Unsupported("scale and zero point are computed from the data; use static quantization")
        value = known.numpy()
    return np.asarray(value).astype(dtype)


def _along(axis: int, values: np.ndarray, rank: int) -> np.ndarray:
    return values.reshape([-1 if i == axis % rank else 1 for i in range(rank)])


def _const(values: np.ndarray) -> relax.Expr:
    return relax.const(np.ascontiguousarray(values, "float32") if values.ndim else np.float32(values), "float32")


def _integers(
    e: Emitter,
    x: relax.Expr,
    inverse: np.ndarray,
    zero_point: np.ndarray,
    bounds: tuple[int, int],
    *,
    fused: bool = False,
) -> relax.Expr:
    """fused: the zero point is added before rounding to an integer, by one fma; else after it."""
    if fused and zero_point.any():
        scaled = dialect.call("scale_shift", [x, _const(inverse), _const(zero_point)], axis=1)
        return R.clip(e.emit(R.round(e.emit(scaled))), *map(float, bounds))
    rounded = e.emit(R.round(e.emit(R.multiply(x, _const(inverse)))))
    if zero_point.any():
        rounded = e.emit(R.add(rounded, _const(zero_point)))
    return R.clip(rounded, *map(float, bounds))


def _dequantized(e: Emitter, integers: relax.Expr, scale: np.ndarray, zero_point: np.ndarray) -> relax.Expr:
    if zero_point.any():
        integers = e.emit(R.subtract(integers, _const(zero_point)))
    return R.multiply(integers, _const(scale))


# Quantized dtypes


@converts("quantize_per_tensor.default", "quantize_per_tensor.tensor_qparams", "quantize_per_channel.default")
def _quantize(e: Emitter, a: Any) -> relax.Expr:
    if a.dtype not in _BOUNDS:
        raise Unsupported(f"it quantizes to {str(a.dtype).removeprefix('torch.')}; use quint8, qint8 or qint32")
    _check_readers(e.node)
    if isinstance(a.self, GenericConst):
        return to_constant(_of_constant(e, a).dequantize())
    if not hasattr(a, "scale"):
        raise Unsupported("it quantizes an activation per channel; use quantize_per_tensor")
    scale, zero_point = (_array(e, v, "float32").reshape(()) for v in (a.scale, a.zero_point))
    integers = _integers(e, a.self, np.float32(1) / scale, zero_point, _BOUNDS[a.dtype], fused=True)
    return _dequantized(e, e.emit(integers), scale, zero_point)


def _of_constant(e: Emitter, a: Any) -> torch.Tensor:
    """What the quantizing node makes of a constant, by the node's own operator."""
    target: Any = e.node.target
    return target(*(e.value(value) if isinstance(value, relax.Expr) else value for value in vars(a).values()))


def _check_readers(node: fx.Node) -> None:
    for user in node.users:
        name = getattr(user.target, "__name__", str(user.target))
        if name in _MOVES or name == "getitem":
            _check_readers(user)
        elif name != "dequantize.self":
            raise Unsupported(f"{name} reads its integers; dequantize them first")


CONVERTERS["dequantize.self"] = lambda e, a: a.self


# Fake quantization


@converts(
    "fake_quantize_per_tensor_affine_cachemask.default",
    "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams.default",
    "fake_quantize_per_tensor_affine.default",
    "fake_quantize_per_tensor_affine.tensor_qparams",
)
def _fake_quantize(e: Emitter, a: Any) -> Any:
    scale, zero_point = (_array(e, v, "float32").reshape(()) for v in (a.scale, a.zero_point))
    enabled = getattr(a, "fake_quant_enabled", None)
    if enabled is not None and not _array(e, enabled, "bool").any():
        return _first(e, a.self)
    return _first(e, _faked(e, a, scale, zero_point))


@converts("fake_quantize_per_channel_affine_cachemask.default", "fake_quantize_per_channel_affine.default")
def _fake_quantize_per_channel(e: Emitter, a: Any) -> Any:
    scale, zero_point = (_along(a.axis, _array(e, v, "float32"), a.self.ty.ndim) for v in (a.scale, a.zero_point))
    return _first(e, _faked(e, a, scale, zero_point))


def _faked(e: Emitter, a: Any, scale: np.ndarray, zero_point: np.ndarray) -> relax.Expr:
    inverse = np.float32(1) / scale
    integers = e.emit(_integers(e, a.self, inverse, zero_point, (a.quant_min, a.quant_max)))
    return _dequantized(e, integers, scale, zero_point)


def _first(e: Emitter, value: relax.Expr) -> Any:
    """The value; with the mask of the gradient, which nothing compiled reads, where the operator returns that too."""
    return (value, None) if isinstance(e.node.meta["val"], tuple | list) else value


# quantized_decomposed: integers in plain dtypes


@converts(
    "quantized_decomposed::quantize_per_tensor.default",
    "quantized_decomposed::quantize_per_tensor.tensor",
    "quantized_decomposed::quantize_per_tensor.tensor2",
)
def _quantize_decomposed(e: Emitter, a: Any) -> relax.Expr:
    inverse = (1.0 / _array(e, a.scale, "float64").reshape(())).astype("float32")
    bounds = (int(_array(e, a.quant_min, "int64")), int(_array(e, a.quant_max, "int64")))
    integers = _integers(e, a.input, inverse, _array(e, a.zero_point, "float32").reshape(()), bounds)
    return R.astype(e.emit(integers), e.dtype)


@converts("quantized_decomposed::quantize_per_channel.default")
def _quantize_decomposed_per_channel(e: Emitter, a: Any) -> relax.Expr:
    rank = a.input.ty.ndim
    inverse = _along(a.axis, np.float32(1) / _array(e, a.scales, "float32"), rank)
    zero_points = _along(a.axis, _array(e, a.zero_points, "float32"), rank)
    integers = _integers(e, a.input, inverse, zero_points, (a.quant_min, a.quant_max))
    return R.astype(e.emit(integers), e.dtype)


@converts(
    "quantized_decomposed::dequantize_per_tensor.default",
    "quantized_decomposed::dequantize_per_tensor.tensor",
    "quantized_decomposed::dequantize_per_tensor.tensor2",
)
def _dequantize_decomposed(e: Emitter, a: Any) -> relax.Expr:
    scale, zero_point = (_array(e, v, "float32").reshape(()) for v in (a.scale, a.zero_point))
    return _dequantized(e, e.cast(a.input, "float32"), scale, zero_point)


@converts("quantized_decomposed::dequantize_per_channel.default")
def _dequantize_decomposed_per_channel(e: Emitter, a: Any) -> relax.Expr:
    scale = _along(a.axis, _array(e, a.scales, "float32"), a.input.ty.ndim)
    zero_points = np.zeros(1, "float32") if a.zero_points is None else _array(e, a.zero_points, "float32")
    return _dequantized(e, e.cast(a.input, "float32"), scale, _along(a.axis, zero_points, a.input.ty.ndim))
