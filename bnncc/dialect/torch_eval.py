"""What each Relax operator computes, by the PyTorch function that eager itself runs.

Constant folding and threshold derivation evaluate Relax expressions through this table, so the values they bake into an
artifact are PyTorch's own, to the last bit. Operators that are not in the table are left alone by both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import tvm
from tvm import relax
from tvm.ir import GenericConst

from bnncc.runtime.bits import Levels

Argument = Any
"""A torch.Tensor, a Python number, a tuple of ints (shapes) or a tuple of tensors (operands of a concatenation)."""

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


def to_torch(value: GenericConst | tvm.runtime.Tensor) -> torch.Tensor:
    """A constant as a tensor of its own: shape (0-d included) and dtype (bool included) kept."""
    array = (value.value if isinstance(value, GenericConst) else value).numpy()
    return torch.from_numpy(np.array(array))


def to_constant(tensor: torch.Tensor) -> GenericConst:
    """A tensor as a Relax constant: shape and dtype kept, memory contiguous."""
    array = tensor.detach().cpu().contiguous().numpy()
    return relax.const(array, str(array.dtype))


def evaluate(op_name: str, args: Sequence[Argument], attrs: Mapping[str, Any] | Any = None) -> Any:
    """The value of one operator; a tuple of tensors for operators that return several.

    Args:
        op_name: "relax.add", "relax.nn.relu", ….
        args: the operands in the operator's order.
        attrs: the operator's attributes, a mapping or the `attrs` of a Relax call.

    Raises:
        KeyError: an operator outside the table; ask `can_evaluate` first.
    """
    with torch.no_grad():
        return _TABLE[op_name](*args, **_Attributes(attrs).of(op_name))


def can_evaluate(call: Any) -> bool:
    """Whether `evaluate_call` has a function for this call (whatever its operands are)."""
    if not isinstance(call, relax.Call) or not isinstance(call.op, tvm.ir.Op) or call.op.name not in _TABLE:
        return False
    attributes = _Attributes(call.attrs)
    layouts = (attributes.get(name) for name in ("data_layout", "kernel_layout", "layout", "out_layout"))
    return all(layout in _PLAIN_LAYOUTS for layout in layouts)


def evaluate_call(call: relax.Call, values: Mapping[relax.Var, Any] | None = None) -> Any:
    """The value of a call whose operands are constants or variables found in `values`."""
    arguments = [_argument(argument, values or {}) for argument in call.args]
    return evaluate(call.op.name, arguments, call.attrs)


def evaluate_function(function: relax.Function, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run a Relax function whose every operator is in the table: the meaning of the graph, in PyTorch's arithmetic."""
    result = _argument(function.body.body, evaluate_from(function, dict(zip(function.params, inputs, strict=True))))
    return result if isinstance(result, tuple) else (result,)


def evaluate_from(
    function: relax.Function, known: Mapping[relax.Var, Any], wanted: Sequence[relax.Var] | None = None
) -> dict[relax.Var, Any]:
    """The values of variables of a function, from those of others: at least of `wanted`, or of all that there are.

    Nothing is computed that `known` gives, or that only its definition reads. Raises KeyError where neither the known
    values nor constants lead to a wanted one, and for operators outside the table.
    """
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    needed = None if wanted is None else set(wanted) - known.keys()
    if needed is not None:
        for binding in reversed(bindings):
            if binding.var in needed:
                needed.update(var for var in _reads(binding.value) if var not in known)
    values = dict(known)
    for binding in bindings:
        if binding.var not in values and (needed is None or binding.var in needed):
            value = binding.value
            values[binding.var] = (
                evaluate_call(value, values) if isinstance(value, relax.Call) else _argument(value, values)
            )
    return values


def _reads(expression: Any) -> list[relax.Var]:
    """The variables that an expression in A-normal form reads."""
    if isinstance(expression, relax.Var):
        return [expression]
    if isinstance(expression, relax.TupleGetItem):
        return _reads(expression.tuple_value)
    parts = getattr(expression, "args", getattr(expression, "fields", ()))
    return [var for part in parts for var in _reads(part)]


def _argument(expression: Any, values: Mapping[relax.Var, Any]) -> Argument:
    if isinstance(expression, GenericConst):
        return to_torch(expression)
    if isinstance(expression, relax.ShapeExpr):
        return tuple(int(extent) for extent in expression.values)
    if isinstance(expression, relax.Tuple):
        return tuple(_argument(field, values) for field in expression.fields)
    if isinstance(expression, relax.TupleGetItem):
        return _argument(expression.tuple_value, values)[expression.index]
    if isinstance(expression, tvm.tirx.IntImm | tvm.tirx.FloatImm):
        return expression.value
    return values[expression]


_PLAIN_LAYOUTS = {None, "", "NCW", "NCHW", "NCDHW", "OIW", "OIHW", "OIDHW", "IOW", "IOHW"}


class _Attributes:
    """Attributes by name, from a mapping or from a Relax call, as plain Python values."""

    def __init__(self, attrs: Any) -> None:
        self._attrs = attrs

    def get(self, name: str) -> Any:
        if self._attrs is None:
            return None
        if isinstance(self._attrs, Mapping):
            return _plain(self._attrs.get(name))
        return _plain(getattr(self._attrs, name, None))

    def of(self, op_name: str) -> dict[str, Any]:
        return {name: self.get(name) for name in _ATTRIBUTES.get(op_name, ())}


def _plain(value: Any) -> Any:
    if isinstance(value, tvm.tirx.IntImm | tvm.tirx.FloatImm):
        return value.value
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, Sequence) or type(value).__name__ == "Array":
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | float):
        return value
    return str(value)


_TABLE: dict[str, Callable[..., Any]] = {}
_ATTRIBUTES: dict[str, tuple[str, ...]] = {}


def _defines(name: str, *attributes: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        _TABLE[f"relax.{name}"] = function
        _ATTRIBUTES[f"relax.{name}"] = attributes
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
_TABLE.update({f"relax.{_name}": _function for _name, _function in _POINTWISE.items()})
_TABLE["relax.clip"] = torch.clamp


_TABLE["relax.bnncc.add_bias"] = torch.add


@_defines("bnncc.quantize", "first", "most")
def _quantize(x: torch.Tensor, scale: torch.Tensor, first: int, most: int) -> torch.Tensor:
    levels = Levels.affine(float(scale), first, most)
    steps = ((x - float(levels.lowest)) * float(levels.inverse)).round().clamp(0, most).nan_to_num(0)
    return torch.from_numpy(levels.values)[steps.long()]


@_defines("bnncc.round_to", "form")
def _round_to(x: torch.Tensor, form: str) -> torch.Tensor:
    if form == "float16":
        return x.to(torch.float16).to(torch.float32)
    bits = x.contiguous().view(torch.int32)
    return torch.where(x.isnan(), x, ((bits + 0x1000) & ~0x1FFF).view(torch.float32))


@_defines("bnncc.scale_shift", "axis")
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


_TABLE["relax.bnncc.expm1"] = torch.expm1
_TABLE["relax.bnncc.log1p"] = torch.log1p
_TABLE["relax.bnncc.signbit"] = torch.signbit


@_defines("bnncc.sign", "predicate")
def _sign(x: torch.Tensor, predicate: str) -> torch.Tensor:
    if predicate == "ternary":
        return torch.sign(x)
    return torch.where(sign_bits(x, predicate), 1.0, -1.0).to(x.dtype)


def sign_bits(x: torch.Tensor, predicate: str) -> torch.Tensor:
    """Where the value is +1, by the predicates of `bnncc.dialect.ops.PREDICATES`."""
    return {"not_lt": lambda: ~(x < 0), "gt": lambda: x > 0, "ge": lambda: x >= 0, "not_le": lambda: ~(x <= 0)}[
        predicate
    ]()


_TABLE["relax.nn.gelu_tanh"] = lambda x: F.gelu(x, approximate="tanh")


@_defines("divide")
def _divide(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Relax divides integers towards zero, PyTorch into floats."""
    return torch.div(x, y) if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


@_defines("power")
def _power(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """ATen has another kernel for one exponent than for a tensor of them."""
    return torch.pow(x, y if y.ndim else y.item())


@_defines("nn.leakyrelu", "alpha")
def _leakyrelu(x: torch.Tensor, alpha: float) -> torch.Tensor:
    return F.leaky_relu(x, alpha)


@_defines("nn.prelu", "axis")
def _prelu(x: torch.Tensor, slope: torch.Tensor, axis: int) -> torch.Tensor:
    shape = [1] * x.ndim
    shape[axis] = slope.numel()
    return torch.where(x > 0, x, slope.reshape(shape) * x)


@_defines("astype", "dtype")
def _astype(x: torch.Tensor, dtype: str) -> torch.Tensor:
    return x.to(_DTYPES[dtype])


# Making tensors


@_defines("full", "dtype")
def _full(shape: tuple[int, ...], value: torch.Tensor, dtype: str | None) -> torch.Tensor:
    return value.to(_DTYPES.get(dtype or "", value.dtype)).expand(shape)


@_defines("full_like", "dtype")
def _full_like(x: torch.Tensor, value: torch.Tensor, dtype: str | None) -> torch.Tensor:
    return value.to(_DTYPES.get(dtype or "", x.dtype)).expand(x.shape)


_defines("ones", "dtype")(lambda shape, dtype: torch.ones(shape, dtype=_DTYPES[dtype]))
_defines("zeros", "dtype")(lambda shape, dtype: torch.zeros(shape, dtype=_DTYPES[dtype]))
_defines("ones_like", "dtype")(lambda x, dtype: torch.ones_like(x, dtype=_DTYPES.get(dtype or "", x.dtype)))
_defines("zeros_like", "dtype")(lambda x, dtype: torch.zeros_like(x, dtype=_DTYPES.get(dtype or "", x.dtype)))


# Shapes

_defines("broadcast_to")(lambda x, shape: torch.broadcast_to(x, shape))
_defines("reshape")(lambda x, shape: x.reshape(shape))
_defines("concat", "axis")(lambda tensors, axis: torch.cat(tensors, axis or 0))
_defines("flip", "axis")(lambda x, axis: torch.flip(x, [axis]))


@_defines("permute_dims", "axes")
def _permute_dims(x: torch.Tensor, axes: list[int] | None) -> torch.Tensor:
    return x.permute(axes if axes is not None else tuple(reversed(range(x.ndim))))


@_defines("expand_dims", "axis")
def _expand_dims(x: torch.Tensor, axis: list[int]) -> torch.Tensor:
    rank = x.ndim + len(axis)
    for position in sorted(a % rank for a in axis):
        x = x.unsqueeze(position)
    return x


@_defines("squeeze", "axis")
def _squeeze(x: torch.Tensor, axis: list[int] | None) -> torch.Tensor:
    return x.squeeze() if axis is None else x.squeeze(tuple(axis))


@_defines("split", "indices_or_sections", "axis")
def _split(x: torch.Tensor, indices_or_sections: int | list[int], axis: int) -> tuple[torch.Tensor, ...]:
    return torch.tensor_split(x, indices_or_sections, axis)


@_defines("strided_slice", "assume_inbound")
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


@_defines("nn.pad", "pad_width", "pad_value", "pad_mode")
def _pad(x: torch.Tensor, pad_width: list[int], pad_value: float, pad_mode: str) -> torch.Tensor:
    if pad_mode != "constant":
        raise NotImplementedError(f"padding mode {pad_mode}")
    pairs = [pad_width[i : i + 2] for i in range(0, len(pad_width), 2)]
    return F.pad(x, [int(width) for pair in reversed(pairs) for width in pair], value=pad_value)


@_defines("bnncc.insert_zeros", "strides")
def _insert_zeros(x: torch.Tensor, strides: list[int]) -> torch.Tensor:
    """Zeros between the pixels of [N, C, …]."""
    image = [(extent - 1) * step + 1 for extent, step in zip(x.shape[2:], strides, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *image)
    spread[(slice(None), slice(None), *(slice(None, None, step) for step in strides))] = x
    return spread


@_defines("take", "axis")
def _take(x: torch.Tensor, indices: torch.Tensor, axis: int | None) -> torch.Tensor:
    axis = (axis or 0) % x.ndim
    return x.index_select(axis, indices.reshape(-1)).unflatten(axis, indices.shape)


@_defines("bnncc.resample", "axis")
def _resample(x: torch.Tensor, index: torch.Tensor, weight: torch.Tensor, axis: int) -> torch.Tensor:
    column = [-1 if i == axis else 1 for i in range(x.ndim)]
    terms = [x.index_select(axis, i) * w.reshape(column) for i, w in zip(index, weight, strict=True)]
    return sum(terms[1:], terms[0])


@_defines("bnncc.pool_axis", "axis", "kind")
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
    _defines(_name, "axis", "keepdims")(_reduction(_function))

_defines("argmax", "axis", "keepdims")(lambda x, axis, keepdims: torch.argmax(x, axis, bool(keepdims)))
_defines("nn.softmax", "axis")(lambda x, axis: torch.softmax(x, axis))
_defines("nn.log_softmax", "axis")(lambda x, axis: torch.log_softmax(x, axis))


# Products, normalization, pooling (plain layouts only; `can_evaluate` sees to that)

_defines("matmul", "out_dtype")(lambda x, y, out_dtype: torch.matmul(x, y))


def _split_padding(padding: Sequence[int], spatial: int) -> tuple[list[int], list[int]]:
    padding = list(padding)
    if len(padding) == 1:
        padding *= spatial
    return padding[:spatial], padding[spatial:] or padding[:spatial]


def _pad_spatial(x: torch.Tensor, before: Sequence[int], after: Sequence[int], value: float) -> torch.Tensor:
    return F.pad(x, [w for pair in zip(reversed(before), reversed(after), strict=True) for w in pair], value=value)


def _convolution(spatial: int) -> Callable[..., torch.Tensor]:
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[spatial]

    def convolve(
        x: torch.Tensor, w: torch.Tensor, strides: list[int], padding: list[int], dilation: list[int], groups: int
    ) -> torch.Tensor:
        before, after = _split_padding(padding, spatial)
        if before != after:
            x, before = _pad_spatial(x, before, after, 0.0), [0] * spatial
        return function(x, w, None, strides, before, dilation, groups)

    return convolve


def _transposed(spatial: int) -> Callable[..., torch.Tensor]:
    function = {1: F.conv_transpose1d, 2: F.conv_transpose2d}[spatial]

    def convolve(
        x: torch.Tensor,
        w: torch.Tensor,
        strides: list[int],
        padding: list[int],
        output_padding: list[int],
        dilation: list[int],
        groups: int,
    ) -> torch.Tensor:
        before, after = _split_padding(padding, spatial)
        if before != after:
            raise NotImplementedError("asymmetric padding of a transposed convolution")
        return function(x, w, None, strides, before, output_padding, groups, dilation)

    return convolve


for _spatial in (1, 2, 3):
    _defines(f"nn.conv{_spatial}d", "strides", "padding", "dilation", "groups")(_convolution(_spatial))
for _spatial in (1, 2):
    _defines(f"nn.conv{_spatial}d_transpose", "strides", "padding", "output_padding", "dilation", "groups")(
        _transposed(_spatial)
    )


@_defines("nn.batch_norm", "axis", "epsilon")
def _batch_norm(
    x: torch.Tensor,
    gamma: torch.Tensor,
    beta: torch.Tensor,
    mean: torch.Tensor,
    var: torch.Tensor,
    axis: int,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # ATen has another order of operations for inputs that lie neither NCHW nor NHWC in memory; a layer's output does.
    moved = x.contiguous().movedim(axis, 1)
    normalized = F.batch_norm(moved, mean, var, gamma, beta, training=False, eps=epsilon)
    return normalized.movedim(1, axis), mean, var


def _pool(function: Callable[..., torch.Tensor], spatial: int) -> Callable[..., torch.Tensor]:
    def pool(
        x: torch.Tensor, pool_size: list[int], strides: list[int], padding: list[int], ceil_mode: bool, **window: Any
    ) -> torch.Tensor:
        before, after = _split_padding(padding, spatial)
        if before != after:
            raise NotImplementedError("asymmetric padding of a pooling window")
        return function(x, pool_size, strides, before, ceil_mode=bool(ceil_mode), **window)

    return pool


def _average(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda x, *args, count_include_pad, **kwargs: function(
        x, *args, count_include_pad=bool(count_include_pad), **kwargs
    )


_WINDOW = ("pool_size", "strides", "padding", "ceil_mode")
for _spatial, _max, _avg in (
    (1, F.max_pool1d, F.avg_pool1d),
    (2, F.max_pool2d, F.avg_pool2d),
    (3, F.max_pool3d, F.avg_pool3d),
):
    _defines(f"nn.max_pool{_spatial}d", *_WINDOW, "dilation")(_pool(_max, _spatial))
    _defines(f"nn.avg_pool{_spatial}d", *_WINDOW, "count_include_pad")(_pool(_average(_avg), _spatial))


@_defines("nn.adaptive_avg_pool2d", "output_size")
def _adaptive_avg_pool2d(x: torch.Tensor, output_size: list[int] | None) -> torch.Tensor:
    height, width = output_size or x.shape[-2:]
    return F.adaptive_avg_pool2d(x, (height, width))
