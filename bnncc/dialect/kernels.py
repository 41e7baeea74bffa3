"""From Relax calls to TE: what each operator computes when it becomes (part of) a kernel.

`lower` maps one call onto the computes of `bnncc.dialect.computes*`. `ELEMENTWISE` operators fuse behind any operator
of the same shape; `is_exact` says which are bit-equal to eager when their inputs are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax, te, tirx
from tvm.ir import GenericConst, register_op_attr
from tvm_ffi import structural_equal

from bnncc.dialect import (
    computes,
    computes_bytes,
    computes_float,
    computes_images,
    computes_planar,
    computes_planes,
    functions,
)
from bnncc.dialect.computes_float import clip_value, fma, relu_value, rounded, rounded_to
from bnncc.dialect.ops import attributes, dtype_of, op_name, shape_of
from bnncc.runtime.bits import BitLayout, ByteLayout, Levels

Lowered = Callable[[Sequence[Any], dict[str, Any], relax.Call], te.Tensor]


def _f32(value: float) -> Any:
    return tirx.const(value, "float32")


def _select(condition: Any, yes: Any, no: Any) -> Any:
    return tirx.Select(condition, yes, no)


def _maximum(a: Any, b: Any) -> Any:
    """torch.maximum: NaN wins. (`a != a` would be folded to false.)"""
    return _select(tirx.isnan(a), a, _select(a >= b, a, b))


def _minimum(a: Any, b: Any) -> Any:
    return _select(tirx.isnan(a), a, _select(a <= b, a, b))


def _equal(a: Any, b: Any) -> Any:
    """x == x is false for NaN; TVM would fold it to true."""
    # Loads of one element of one tensor; structural equality refuses to compare tensors.
    (tensor, *at), (other, *at_other) = (getattr(value, "args", None) or (None,) for value in (a, b))
    if tensor is not None and tensor.same_as(other) and structural_equal(at, at_other):
        return _select(tirx.isnan(a), tirx.const(False), tirx.const(True))
    return a == b


def _not_equal(a: Any, b: Any) -> Any:
    """True for NaN, where TVM's own is false."""
    return tirx.any(a < b, a > b, tirx.isnan(a), tirx.isnan(b))


def _rounded(x: Any) -> Any:
    """A sum as it is: TVM would cancel ``(x + 1) − x`` and ``(r − x) + x``, which round."""
    return rounded(x) if str(x.ty.dtype) == "float32" else x


def _libm(name: str, a: Any) -> Any:
    return tirx.call_pure_extern("float32", name, a)


#: Operators that are one expression per element, of the arguments' elements.
_SCALAR: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: _rounded(a + b),
    "subtract": lambda a, b: _rounded(a - b),
    "divide": lambda a, b: a / b,
    "maximum": _maximum,
    "minimum": _minimum,
    "where": _select,
    "negative": lambda a: rounded(a * _f32(-1.0)),
    "abs": tirx.abs,
    "sqrt": tirx.sqrt,
    "rsqrt": lambda a: _f32(1.0) / tirx.sqrt(a),
    "exp": functions.exp,
    "tanh": functions.tanh,
    "sigmoid": functions.sigmoid,
    "nn.relu": relu_value,
    "nn.silu": lambda a: a / (_f32(1.0) + functions.exp(rounded(a * _f32(-1.0)))),
    "equal": _equal,
    "not_equal": _not_equal,
    "greater": lambda a, b: a > b,
    "greater_equal": lambda a, b: a >= b,
    "less": lambda a, b: a < b,
    "less_equal": lambda a, b: a <= b,
    "logical_and": tirx.all,
    "logical_or": tirx.any,
    "floor": tirx.floor,
    "ceil": tirx.ceil,
    "round": tirx.nearbyint,
    "trunc": tirx.trunc,
    "log": tirx.log,
    "sin": tirx.sin,
    "cos": tirx.cos,
    "atan": lambda a: _libm("atanf", a),
    "erf": functions.erf,
    "nn.gelu": lambda a: a * _f32(0.5) * (_f32(1.0) + functions.erf(a * _f32(math.sqrt(0.5)))),
    "nn.gelu_tanh": lambda a: (
        _f32(0.5) * a * (_f32(1.0) + functions.tanh(_f32(math.sqrt(2 / math.pi)) * (a + _f32(0.044715) * a * a * a)))
    ),
    "bnncc.expm1": lambda a: _libm("expm1f", a),
    "bnncc.log1p": lambda a: _libm("log1pf", a),
    "bnncc.signbit": lambda a: tirx.reinterpret("int32", a) < tirx.const(0, "int32"),
    "bnncc.add_bias": lambda a, b: _rounded(a + b),
    "bnncc.copy": lambda a: a,
    "bnncc.scale_shift": fma,
    "bnncc.rescale": lambda a, alpha: rounded(a * alpha),
    "bnncc.threshold": lambda acc, t: _select(acc >= tirx.Cast("float32", t), _f32(1.0), _f32(-1.0)),
}

#: Elementwise operators that need their attributes or types.
_ATTRIBUTED: dict[str, Callable[[relax.Call], Callable[..., Any]]] = {
    "multiply": lambda c: lambda a, b: rounded(a * b) if dtype_of(c) == "float32" else a * b,
    "clip": lambda c: _clip(*(_scalar(a) for a in c.args[1:3])),
    "astype": lambda c: lambda a: tirx.Cast(dtype_of(c), a),
    "nn.leakyrelu": lambda c: _leaky_relu(attributes(c)["alpha"]),
    "bnncc.sign": lambda c: lambda a: computes_float.sign_value(a, attributes(c)["predicate"]),
    "bnncc.round_to": lambda c: lambda a: rounded_to(a, attributes(c)["form"]),
    "bnncc.quantize": lambda c: _quantize(_scalar(c.args[1]), attributes(c)["first"], attributes(c)["most"]),
}

# How many of the arguments are operands, where the rest are attributes.
_OPERANDS = {"multiply": 2}

ELEMENTWISE = frozenset(_SCALAR) | frozenset(_ATTRIBUTED)

_INEXACT = frozenset({
    "sqrt",  # torch.sqrt is a vector library's, off by a bit in one of seven values
    "rsqrt", "exp", "tanh", "sigmoid", "nn.silu", "bnncc.rescale", "bnncc.conv2d", "bnncc.depthwise_conv2d",
    "bnncc.dense", "mean", "nn.avg_pool2d", "nn.adaptive_avg_pool2d", "nn.softmax",
    "bnncc.resample", "bnncc.expm1", "bnncc.log1p", "atan", "cos", "erf", "log", "nn.gelu", "nn.gelu_tanh", "sin",
})  # fmt: skip


# Operators that TVM computes for us and that only move values.
_MOVES = frozenset({"concat", "strided_slice", "broadcast_to", "flip", "split", "max", "min", "full"})


def is_exact(call: relax.Call) -> bool:
    """Whether the operator is bit-equal to eager's, given equal inputs."""
    name = op_name(call)
    if name == "bnncc.add_bias":
        return _is_integer(call.args[1])
    if name == "bnncc.pool_axis":
        return bool(attributes(call)["kind"] == "max")
    known = is_anchor(call) or name in ELEMENTWISE or name in _MOVES
    return known and name not in _INEXACT and not attributes(call).get("inexact")


def _is_integer(expr: Any) -> bool:
    """Whether a constant holds integers that a float32 sum keeps exact."""
    if not isinstance(expr, GenericConst):
        return False
    array = expr.value.numpy()
    return bool((abs(array) < 1 << 24).all() and (array == array.round()).all())


def _clip(low: float, high: float) -> Callable[[Any], Any]:
    return lambda a: clip_value(a, low, high)


def _leaky_relu(slope: float) -> Callable[[Any], Any]:
    return lambda a: _select(a > _f32(0.0), a, rounded(a * _f32(slope)))


def _quantize(scale: float, first: int, most: int) -> Callable[[Any], Any]:
    levels = Levels.affine(scale, first, most)
    lowest, inverse = _f32(float(levels.lowest)), _f32(float(levels.inverse))

    def nearest(a: Any) -> Any:
        level = tirx.min(tirx.max(tirx.nearbyint((a - lowest) * inverse), _f32(0.0)), _f32(float(most)))
        return rounded((level + _f32(float(first))) * _f32(scale))

    return nearest


def _scalar(expr: Any) -> float:
    if isinstance(expr, GenericConst):
        return float(expr.value.numpy())
    value = expr.value
    return float(getattr(value, "value", value))


def layout_of(attrs: dict[str, Any]) -> BitLayout:
    return BitLayout(attrs["channels"], attrs["groups"], attrs["word_bits"], attrs["lanes"])


def _pair(value: Any) -> tuple[int, int]:
    return (value[0], value[1] if len(value) > 1 else value[0])


def _xnor_conv2d(args: Sequence[Any], a: dict[str, Any], _: relax.Call) -> te.Tensor:
    x, w, *rest = args
    n_eff = rest.pop(0) if a["n_eff"] else None
    dot = computes.binary_conv2d(
        x,
        w,
        depth=a["depth"],
        out_channels=a["out_channels"],
        strides=a["strides"],
        dilation=a["dilation"],
        n_eff=n_eff,
        in_lanes=a.get("in_lanes", 0),
        counting=a.get("counting", "words"),
        padding=a.get("padding", (0, 0, 0, 0)),
    )
    return computes.padding_correction(dot, *rest) if a["corrected"] else dot


def _plane_conv2d(args: Sequence[Any], a: dict[str, Any], _: relax.Call) -> te.Tensor:
    x, w, base, *correction = args
    total = computes_planes.plane_conv2d(
        x, w, base, out_channels=a["out_channels"], factor=a["factor"], form=a["form"],
        strides=a["strides"], dilation=a["dilation"],
    )  # fmt: skip
    return computes.padding_correction(total, *correction) if a["corrected"] else total


def _byte_conv2d(args: Sequence[Any], a: dict[str, Any], _: relax.Call) -> te.Tensor:
    x, w, base, *correction = args
    total = computes_bytes.byte_conv2d(
        x, w, base, out_channels=a["out_channels"], factor=a["factor"], wide=bool(a["wide"]),
        strides=a["strides"], dilation=a["dilation"],
    )  # fmt: skip
    return computes.padding_correction(total, *correction) if a["corrected"] else total


def _pack_bytes(args: Sequence[Any], a: dict[str, Any], _: relax.Call) -> te.Tensor:
    layout = ByteLayout(a["channels"], a["groups"], a["offset"])
    return computes_bytes.pack_bytes(*(*args, layout), most=a["most"], padding=a["padding"], pad_level=a["pad_level"])


def _conv2d(args: Sequence[Any], a: dict[str, Any], _: relax.Call) -> te.Tensor:
    return computes_float.conv2d(
        *args, out_channels=a["out_channels"], strides=a["strides"], dilation=a["dilation"],
        padding=a.get("padding", (0, 0, 0, 0)), form=a.get("form", ""),
        zero_rows=a.get("zero_rows", (0, 0)),
    )  # fmt: skip


def _pack(args: Sequence[Any], a: dict[str, Any], _: relax.Call) -> te.Tensor:
    return computes.pack(
        args[0], layout_of(a), a["predicate"], padding=a["padding"], pad_bit=a["pad_bit"], data_layout=a["data_layout"]
    )


def _lookup(acc: te.Tensor, table: te.Tensor, a: dict[str, Any]) -> te.Tensor:
    axis = a.get("axis", 1)

    def f(*at: Any) -> Any:
        entry = table(at[axis], tirx.floordiv(tirx.Cast("int32", acc(*at)) - a["lowest"], a["step"]))
        return _select(entry != tirx.const(0, "uint8"), _f32(1.0), _f32(-1.0))

    return te.compute(acc.shape, f, name="lookup")


def _adaptive(args: Sequence[Any], a: dict[str, Any], call: relax.Call) -> te.Tensor:
    if a["layout"] == "NCHW":
        return computes_float.mean(args[0], (2, 3), keepdims=True)
    _, height, width, _ = shape_of(call.args[0])
    _, oh, ow, _ = shape_of(call)
    if (oh, ow) == (1, 1):
        return computes_float.mean(args[0], (1, 2), keepdims=True)
    window = (height // oh, width // ow)
    return computes_float.avg_pool2d(args[0], window, window)


def _pad(args: Sequence[Any], a: dict[str, Any], call: relax.Call) -> te.Tensor:
    width = a["pad_width"]
    padding = (width[2], width[4], width[3], width[5])
    return computes_float.pad(args[0], padding, float(a.get("pad_value", 0.0)))


def _unfold_depth(args: Sequence[Any], a: dict[str, Any], groups: int, outside: Callable[[Any], Any]) -> te.Tensor:
    return computes_images.unfold_depth(
        args[0], depth=a["depth"], kernel=a["kernel"], stride=a["stride"], dilation=a["dilation"],
        padding=a["padding"], groups=groups, outside=outside,
    )  # fmt: skip


def _windows(a: dict[str, Any]) -> Any:
    """The module that computes windows over images of a layout."""
    return computes_planar if "NCHW" in (a.get("layout"), a.get("data_layout")) else computes_float


_ANCHORS: dict[str, Lowered] = {
    "bnncc.unfold_depth": lambda t, a, _: _unfold_depth(t, a, a["groups"], lambda _: _f32(float(a["pad_value"]))),
    "bnncc.unfold_depth_bits": lambda t, a, _: _unfold_depth(
        t, a, a["unfold_groups"], computes.constant_byte(layout_of(a), a["pad_bit"])
    ),
    "take": lambda t, a, c: computes_images.take(
        t[0], t[1], a["axis"] or 0, trusted=isinstance(c.args[1], GenericConst)
    ),
    "bnncc.resample": lambda t, a, _: computes_images.resample(t[0], t[1], t[2], a["axis"]),
    "bnncc.pool_axis": lambda t, a, _: computes_images.pool_axis(t[0], t[1], t[2], a["axis"], a["kind"]),
    "concat": lambda t, a, _: computes_images.concat(*t),
    "bnncc.insert_zeros": lambda t, a, _: computes_images.insert_zeros(t[0], a["strides"]),
    "bnncc.xnor_conv2d": _xnor_conv2d,
    "bnncc.conv2d": _conv2d,
    "bnncc.depthwise_conv2d": lambda t, a, _: _windows(a).depthwise_conv2d(
        *t, strides=a["strides"], dilation=a["dilation"], padding=a.get("padding", (0, 0, 0, 0))
    ),
    "bnncc.dense": lambda t, a, _: computes_float.dense(*t, out_channels=a["out_channels"], form=a.get("form", "")),
    "bnncc.unpack_weights": lambda t, a, _: computes_float.unpack_weights(t[0], a["shape"][-1], t[1]),
    "bnncc.pack": _pack,
    "bnncc.pack_levels": lambda t, a, _: computes_planes.pack_levels(
        *(*t, layout_of(a)), planes=a["planes"], padding=a["padding"]
    ),
    "bnncc.plane_conv2d": _plane_conv2d,
    "bnncc.pack_bytes": _pack_bytes,
    "bnncc.byte_conv2d": _byte_conv2d,
    "bnncc.threshold_pack": lambda t, a, _: computes.threshold_pack(t[0], t[1], layout_of(a)),
    "bnncc.lookup_pack": lambda t, a, _: computes.lookup_pack(
        t[0], t[1], layout_of(a), lowest=a["lowest"], step=a["step"]
    ),
    "bnncc.lookup": lambda t, a, _: _lookup(t[0], t[1], a),
    "bnncc.pad_bits": lambda t, a, _: computes.pad_bits(t[0], layout_of(a), a["padding"], a["pad_bit"]),
    "bnncc.max_pool2d_bits": lambda t, a, _: computes.max_pool2d_bits(
        t[0], _pair(a["pool_size"]), _pair(a["strides"]), a["padding"], planes=a["planes"]
    ),
    "nn.max_pool2d": lambda t, a, _: _windows(a).max_pool2d(
        t[0], _pair(a["pool_size"]), _pair(a["strides"]), a["padding"],
        dilation=_pair(a["dilation"]), ceil_mode=bool(a["ceil_mode"]),
    ),
    "nn.avg_pool2d": lambda t, a, _: _windows(a).avg_pool2d(
        t[0], _pair(a["pool_size"]), _pair(a["strides"]), a["padding"],
        ceil_mode=bool(a["ceil_mode"]), count_include_pad=bool(a["count_include_pad"]),
    ),
    "nn.adaptive_avg_pool2d": _adaptive,
    "mean": lambda t, a, _: computes_float.mean(t[0], a["axis"], keepdims=bool(a["keepdims"])),
    "nn.pad": _pad,
    "permute_dims": lambda t, a, _: computes_float.permute(t[0], a["axes"]),
    "nn.softmax": lambda t, a, _: computes_float.softmax(t[0]),
}  # fmt: skip


def _pads_pixels(call: relax.Call) -> bool:
    a = attributes(call)
    width = a["pad_width"]
    return a["pad_mode"] == "constant" and len(width) == 8 and not any((*width[:2], *width[6:])) and min(width) >= 0


def _divides(call: relax.Call) -> bool:
    if attributes(call)["layout"] == "NCHW":
        return shape_of(call)[2:] == (1, 1)
    return all(size % out == 0 for size, out in zip(shape_of(call.args[0])[1:3], shape_of(call)[1:3], strict=True))


#: Channels of one run of a concatenation: whole vectors on every target.
_RUN = 16
#: Channels of a concatenation up to which its loop over them can be written out.
_MOST_JOINED = 2048


def _joins_runs(call: relax.Call) -> bool:
    shape, axis = shape_of(call), attributes(call)["axis"]
    whole = all(shape_of(field)[-1] % _RUN == 0 for field in call.args[0].fields)
    return axis in (len(shape) - 1, -1) and whole and shape[-1] <= _MOST_JOINED


# Where our computes serve only some uses of an operator.
_CONDITIONS: dict[str, Callable[[relax.Call], bool]] = {
    "concat": _joins_runs,
    "nn.pad": _pads_pixels,
    "nn.adaptive_avg_pool2d": _divides,
    "nn.softmax": lambda c: len(shape_of(c)) == 2 and attributes(c)["axis"] in (-1, 1),
}


def is_anchor(call: Any) -> bool:
    """Whether a call is computed by us and starts a kernel."""
    name = str(op_name(call))
    return name in _ANCHORS and (name not in _CONDITIONS or _CONDITIONS[name](call))


def lower(call: relax.Call, args: Sequence[Any]) -> te.Tensor:
    """The TE tensor of a call. `args`: a TE tensor for each tensor argument, a TIR constant for each 0-d constant."""
    name = str(op_name(call))
    if name in _ANCHORS:
        return _ANCHORS[name](args, attributes(call), call)
    if name in _ATTRIBUTED:
        args, function = args[: _OPERANDS.get(name, 1)], _ATTRIBUTED[name](call)
    else:
        function = _SCALAR[name]
    return _elementwise(function, args, attributes(call).get("axis", -1), shape_of(call), name.split(".")[-1])


def _elementwise(
    function: Callable[..., Any], args: Sequence[Any], axis: int, shape: tuple[int, ...], name: str
) -> Any:
    rank = len(shape)
    readers = [
        computes_float.broadcast(arg, rank, axis % max(rank, 1)) if isinstance(arg, te.Tensor) else _constant(arg)
        for arg in args
    ]
    return te.compute(shape, lambda *at: function(*(read(*at) for read in readers)), name=name)


def _constant(value: Any) -> Callable[..., Any]:
    return lambda *_: value


def literal(array: Any) -> Any:
    """A 0-d constant as a TIR literal."""
    value = array.item()
    if isinstance(value, float) and math.isnan(value):
        return tirx.const(float("nan"), str(array.dtype))
    return tirx.const(value, str(array.dtype))


def _legalize(builder: relax.BlockBuilder, call: relax.Call) -> relax.Expr:
    return builder.call_te(lambda *tensors: lower(call, tensors), *call.args)


# So that TVM's own pipeline can run modules of the dialect as well, naively: for tests and for the curious.
for _name in (*_ANCHORS, *_SCALAR, *_ATTRIBUTED):
    if _name.startswith("bnncc."):
        register_op_attr(f"relax.{_name}", "FLegalize", _legalize)
