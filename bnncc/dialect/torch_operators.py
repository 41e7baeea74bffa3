"""Relax operators on elements and shapes, and reductions, by PyTorch's functions; see `bnncc.dialect.torch_eval`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from bnncc.runtime.bits import Levels

_DTYPES = {
    "bool": torch.bool,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


# The others (exp, tanh, sigmoid, power, sums, …) differ in the last bit between the vectorised body of an ATen kernel
# and its scalar tail, so what they give at one shape need not be what eager gives at another.
# fmt: off
SHAPE_INDEPENDENT = frozenset(f"relax.{name}" for name in (
    "abs", "add", "astype", "ceil", "clip", "divide", "equal", "floor", "greater", "greater_equal", "isfinite", "isinf",
    "isnan", "less", "less_equal", "logical_and", "logical_not", "logical_or", "logical_xor", "maximum", "minimum",
    "multiply", "negative", "nn.batch_norm", "nn.leakyrelu", "nn.prelu", "nn.relu", "not_equal", "round", "sign",
    "sqrt", "square", "subtract", "trunc", "where",
    "broadcast_to", "concat", "expand_dims", "flip", "full", "full_like", "nn.pad", "ones", "ones_like", "permute_dims",
    "reshape", "split", "squeeze", "strided_slice", "take", "zeros", "zeros_like",
))
# fmt: on
"""Operators whose value at an element is fixed by IEEE 754: the same in a tensor of any shape and layout."""

TABLE: dict[str, Callable[..., Any]] = {}
"""PyTorch's function for each operator ("relax.add", …): operands in Relax's order, then its attributes by name."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {}
"""The attributes that the function of an operator takes."""


def defines(name: str, *attributes: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: enters a function for `relax.<name>` in the table."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        TABLE[f"relax.{name}"] = function
        ATTRIBUTES[f"relax.{name}"] = attributes
        return function

    return register


# Element by element. Broadcasting, and the dtype of the result, are alike in both.

_POINTWISE: dict[str, Any] = {
    "abs": torch.abs,
    "add": torch.add,
    "bitwise_and": torch.bitwise_and,
    "bitwise_not": torch.bitwise_not,
    "bitwise_or": torch.bitwise_or,
    "bitwise_xor": torch.bitwise_xor,
    "atan": torch.atan,
    "ceil": torch.ceil,
    "cos": torch.cos,
    "equal": torch.eq,
    "erf": torch.erf,
    "exp": torch.exp,
    "floor": torch.floor,
    "greater": torch.gt,
    "greater_equal": torch.ge,
    "isfinite": torch.isfinite,
    "isinf": torch.isinf,
    "isnan": torch.isnan,
    "less": torch.lt,
    "less_equal": torch.le,
    "log": torch.log,
    "logical_and": torch.logical_and,
    "logical_not": torch.logical_not,
    "logical_or": torch.logical_or,
    "logical_xor": torch.logical_xor,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "multiply": torch.mul,
    "negative": torch.neg,
    "nn.gelu": F.gelu,
    "nn.relu": torch.relu,
    "nn.silu": F.silu,
    "not_equal": torch.ne,
    "round": torch.round,
    "rsqrt": torch.rsqrt,
    "sigmoid": torch.sigmoid,
    "sign": torch.sign,
    "sin": torch.sin,
    "sqrt": torch.sqrt,
    "square": torch.square,
    "subtract": torch.sub,
    "tanh": torch.tanh,
    "trunc": torch.trunc,
    "where": torch.where,
}
TABLE.update({f"relax.{_name}": _function for _name, _function in _POINTWISE.items()})
TABLE["relax.clip"] = torch.clamp


TABLE["relax.bnncc.add_bias"] = torch.add


@defines("bnncc.quantize", "first", "most")
def _quantize(x: torch.Tensor, scale: torch.Tensor, first: int, most: int) -> torch.Tensor:
    levels = Levels.affine(float(scale), first, most)
    steps = ((x - float(levels.lowest)) * float(levels.inverse)).round().clamp(0, most).nan_to_num(0)
    return torch.from_numpy(levels.values)[steps.long()]


@defines("bnncc.round_to", "form")
def round_to(x: torch.Tensor, form: str) -> torch.Tensor:
    if form == "float16":
        return x.to(torch.float16).to(torch.float32)
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isnan(), x, ((bits + 0x1000) & ~0x1FFF).view(torch.float32))


@defines("bnncc.scale_shift", "axis")
def _scale_shift(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, axis: int | None) -> torch.Tensor:
    """fma(x, a, b), rounded once; a and b numbers, or vectors along `axis`."""
    tail = [1] * (x.ndim - 1 - (axis or 0) % max(x.ndim, 1))
    a, b = (v.double().reshape(-1, *tail) if v.ndim else v.double() for v in (a, b))
    product = x.double() * a  # exact: 48 bits
    total = product + b
    back = total - product
    error = (product - (total - back)) + (b - back)
    # Rounded to odd, a double keeps what the second rounding needs to know.
    even = (total.contiguous().view(torch.int64) & 1) == 0
    towards = torch.nextafter(total, torch.copysign(torch.full_like(total, torch.inf), error))
    return torch.where(even & (error != 0), towards, total).to(x.dtype)


TABLE["relax.bnncc.expm1"] = torch.expm1
TABLE["relax.bnncc.log1p"] = torch.log1p
TABLE["relax.bnncc.signbit"] = torch.signbit


@defines("bnncc.sign", "predicate")
def _sign(x: torch.Tensor, predicate: str) -> torch.Tensor:
    if predicate == "ternary":
        return torch.sign(x)
    return torch.where(sign_bits(x, predicate), 1.0, -1.0).to(x.dtype)


def sign_bits(x: torch.Tensor, predicate: str) -> torch.Tensor:
    """Where the value is +1, by the predicates of `bnncc.dialect.ops.PREDICATES`."""
    return {"not_lt": lambda: ~(x < 0), "gt": lambda: x > 0, "ge": lambda: x >= 0, "not_le": lambda: ~(x <= 0)}[
        predicate
    ]()


TABLE["relax.nn.gelu_tanh"] = lambda x: F.gelu(x, approximate="tanh")


@defines("divide")
def _divide(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Relax divides integers towards zero, PyTorch into floats."""
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@defines("power")
def _power(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """ATen has another kernel for one exponent than for a tensor of them."""
    return torch.pow(x, y if y.ndim else y.item())


@defines("nn.leakyrelu", "alpha")
def _leakyrelu(x: torch.Tensor, alpha: float) -> torch.Tensor:
    return F.leaky_relu(x, alpha)


@defines("nn.prelu", "axis")
def _prelu(x: torch.Tensor, slope: torch.Tensor, axis: int) -> torch.Tensor:
    shape = [1] * x.ndim
    shape[axis] = slope.numel()
    return torch.where(x > 0, x, slope.reshape(shape) * x)


@defines("astype", "dtype")
def _astype(x: torch.Tensor, dtype: str) -> torch.Tensor:
    return x.to(_DTYPES[dtype])


# Making tensors


@defines("full", "dtype")
def _full(shape: tuple[int, ...], value: torch.Tensor, dtype: str | None) -> torch.Tensor:
    return value.to(_DTYPES.get(dtype or "", value.dtype)).expand(shape)


@defines("full_like", "dtype")
def _full_like(x: torch.Tensor, value: torch.Tensor, dtype: str | None) -> torch.Tensor:
    return value.to(_DTYPES.get(dtype or "", x.dtype)).expand(x.shape)


defines("ones", "dtype")(lambda shape, dtype: torch.ones(shape, dtype=_DTYPES[dtype]))
defines("zeros", "dtype")(lambda shape, dtype: torch.zeros(shape, dtype=_DTYPES[dtype]))
defines("ones_like", "dtype")(lambda x, dtype: torch.ones_like(x, dtype=_DTYPES.get(dtype or "", x.dtype)))
defines("zeros_like", "dtype")(lambda x, dtype: torch.zeros_like(x, dtype=_DTYPES.get(dtype or "", x.dtype)))


# Shapes

defines("broadcast_to")(lambda x, shape: torch.broadcast_to(x, shape))
defines("reshape")(lambda x, shape: x.reshape(shape))
defines("concat", "axis")(lambda tensors, axis: torch.cat(tensors, axis or 0))
defines("flip", "axis")(lambda x, axis: torch.flip(x, [axis]))


@defines("permute_dims", "axes")
def _permute_dims(x: torch.Tensor, axes: list[int] | None) -> torch.Tensor:
    return x.permute(axes if axes is not None else tuple(reversed(range(x.ndim))))


@defines("expand_dims", "axis")
def _expand_dims(x: torch.Tensor, axis: list[int]) -> torch.Tensor:
    rank = x.ndim + len(axis)
    for position in sorted(a % rank for a in axis):
        x = x.unsqueeze(position)
    return x


@defines("squeeze", "axis")
def _squeeze(x: torch.Tensor, axis: list[int] | None) -> torch.Tensor:
    return x.squeeze() if axis is None else x.squeeze(tuple(axis))


@defines("split", "indices_or_sections", "axis")
def _split(x: torch.Tensor, indices_or_sections: int | list[int], axis: int) -> tuple[torch.Tensor, ...]:
    return torch.tensor_split(x, indices_or_sections, axis)


@defines("strided_slice", "assume_inbound")
def _strided_slice(
    x: torch.Tensor,
    axes: tuple[int, ...],
    begin: tuple[int, ...],
    end: tuple[int, ...],
    strides: tuple[int, ...] | None = None,
    assume_inbound: bool | None = None,
) -> torch.Tensor:
    window = [slice(None)] * x.ndim
    for axis, first, last, step in zip(axes, begin, end, strides or (1,) * len(axes), strict=True):
        window[axis] = slice(int(first), int(last), int(step))
    return x[tuple(window)]


@defines("nn.pad", "pad_width", "pad_value", "pad_mode")
def _pad(x: torch.Tensor, pad_width: list[int], pad_value: float, pad_mode: str) -> torch.Tensor:
    if pad_mode != "constant":
        raise NotImplementedError(f"padding mode {pad_mode}")
    pairs = [pad_width[i : i + 2] for i in range(0, len(pad_width), 2)]
    return F.pad(x, [int(width) for pair in reversed(pairs) for width in pair], value=pad_value)


@defines("bnncc.insert_zeros", "strides")
def _insert_zeros(x: torch.Tensor, strides: list[int]) -> torch.Tensor:
    """Zeros between the pixels of [N, C, …]."""
    image = [(extent - 1) * step + 1 for extent, step in zip(x.shape[2:], strides, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *image)
    spread[(slice(None), slice(None), *(slice(None, None, step) for step in strides))] = x
    return spread


@defines("take", "axis")
def _take(x: torch.Tensor, indices: torch.Tensor, axis: int | None) -> torch.Tensor:
    axis = (axis or 0) % x.ndim
    return x.index_select(axis, indices.reshape(-1)).unflatten(axis, indices.shape)


@defines("bnncc.resample", "axis")
def _resample(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    column = [-1 if i == axis else 1 for i in range(x.ndim)]
    terms = [x.index_select(axis, i) * w.reshape(column) for i, w in zip(index, weight, strict=True)]
    return sum(terms[1:], terms[0])


@defines("bnncc.pool_axis", "axis", "kind")
def _pool_axis(x: torch.Tensor, index: torch.Tensor, count: torch.Tensor, axis: int, kind: str) -> torch.Tensor:
    windows = [x.index_select(axis, column[: int(n)]) for column, n in zip(index.unbind(1), count, strict=True)]
    reduce = torch.amax if kind == "max" else torch.mean
    return torch.cat([reduce(window, dim=axis, keepdim=True) for window in windows], axis)


# Reductions


def _reduction(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def reduce(x: torch.Tensor, axis: list[int] | None, keepdims: bool) -> torch.Tensor:
        return function(x, dim=tuple(range(x.ndim)) if axis is None else tuple(axis), keepdim=bool(keepdims))

    return reduce


_REDUCTIONS: dict[str, Any] = {"max": torch.amax, "mean": torch.mean, "min": torch.amin, "sum": torch.sum}
for _name, _function in _REDUCTIONS.items():
    defines(_name, "axis", "keepdims")(_reduction(_function))

defines("argmax", "axis", "keepdims")(lambda x, axis, keepdims: torch.argmax(x, axis, bool(keepdims)))
defines("nn.softmax", "axis")(lambda x, axis: torch.softmax(x, axis))
defines("nn.log_softmax", "axis")(lambda x, axis: torch.log_softmax(x, axis))
