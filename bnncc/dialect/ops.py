"""The binary dialect: Relax operators `relax.bnncc.*` and how their types follow from their arguments.

Semantic operators still speak of ±1 floats in the model's own shapes; the fusing passes work on them:

    sign(x) {predicate}                                  ±1 (−1, 0, +1 for "ternary") by the predicate, see `PREDICATES`
    binary_conv1d/2d/3d(x, w) {strides, padding,         x of ±1/0 values, w a ±1/0 constant [O, I/groups, …, KH, KW]
            pad_value, dilation, groups, data_layout}
    add_bias(x, b)                                       x + b, the bias of a convolution or linear layer; eager may
                                                         start its sum from b and round: exact for integer b only
    insert_zeros(x) {strides}                            zeros between the pixels of NC… images: a transposed
                                                         convolution is a convolution over that
    expm1(x), log1p(x), signbit(x)                       as in torch; signbit is bool, true for −0 and negative NaN
    resample(x, index, weight) {axis}                    Σ over k of weight[k, o] · x[index[k, o]] along an axis;
    pool_axis(x, index, count) {axis, kind}              max or mean of x at index[0 … count[o], o]
    binary_dense(x, w)                                   x [N, K], w a ±1/0 constant [O, K]
    integer_conv1d/2d/3d(x, w, values)                   x is one of `values` (float32, ascending), its levels, each an
            {…, pad_steps, first, every}                 integer ``first + every · level`` times a scale; w holds small
    integer_dense(x, w, values) {first, every}           integers; the result is the exact sum of integer products
    threshold(acc, t)                                    +1 where acc ≥ t[channel], else −1
    lookup(acc, table) {lowest, step}                    +1 where table[channel, (acc − lowest) / step], else −1
    rescale(acc, alpha)                                  acc · alpha, where eager rounds in another order: never exact
    quantize(x, scale) {first, most}                     the nearest of ``scale · (first + level)``, level 0 … most, in
                                                         the arithmetic of `bnncc.runtime.bits.Levels`
    round_to(x) {form}                                   x as "tf32" or "float16" has it, see `scalars.rounded_to`

Packed operators are what kernels compute. Activations are NHWC, packed tensors words (see `bnncc.runtime.bits`):

    pack(x) {predicate, planes, padding, pad_bit, data_layout, channels, groups, word_bits, lanes}
    pad_bits(x) {padding, pad_bit, …layout}              max_pool2d_bits(x) {pool_size, strides, padding, planes, …}
    threshold_pack(acc, t) {…layout}                     lookup_pack(acc, table) {lowest, step, …layout}
    xnor_conv2d(x, w[, n_eff][, correction, rows, cols]) {…} → int32 accumulator
    pack_levels(x, lowest, inverse) {planes, padding, …layout}      levels of quantized values, one plane for each bit
    plane_conv2d(x, w, base[, correction, rows, cols]) {form, factor, …} → int32 accumulator
    pack_bytes(x, lowest, inverse) {most, padding, pad_level, channels, groups, offset}    the same levels, a byte each
    byte_conv2d(x, w, base[, correction, rows, cols]) {factor, wide, …} → int32 accumulator
    scale_shift(x, a, b) {axis}                          fma(x, a, b): batch norm exactly as ATen evaluates it
    conv2d(x, w), depthwise_conv2d, dense                float, weights laid out for the target's register tile;
                                                         depthwise_conv2d {data_layout: "NCHW"} takes w [C, KH, KW];
                                                         conv2d, dense {form} round x as `round_to` does
    unpack_weights(w)                                    float weights from bits, once per instance
    copy(x)                                              x, in memory of its own
    unfold_depth(x) {depth, kernel, stride, dilation,    images [N·D, H, W, C] → [N·OD, H, W, C·kernel]: beside each
                     padding, pad_value, groups}         other the slices that one depth of a 3-D convolution reads
    unfold_depth_bits(x) {…, pad_bit, …layout}           the same for packed bytes

`inexact=1` on a threshold says that eager may round the chain before it in another way (a float bias).
Padding is always (before each axis…, after each axis…): for images (top, left, bottom, right).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import tvm
from tvm import ir, relax
from tvm.ir import Op

from bnncc.runtime.bits import ByteLayout

#: predicate → when the bit is 1 (the value +1). They differ at ±0 and NaN only.
PREDICATES = {
    "not_lt": "not x < 0  (0 and NaN give +1)",
    "gt": "x > 0  (0 and NaN give −1)",
    "ge": "x >= 0  (0 gives +1, NaN gives −1)",
    "not_le": "not x <= 0  (0 gives −1, NaN gives +1)",
    "ternary": "torch.sign: +1, −1, and 0 for ±0 and NaN",
}

PREFIX = "relax.bnncc."


def call(name: str, args: Sequence[Any], **attrs: Any) -> relax.Call:
    """A call of `relax.bnncc.<name>`; attributes are integers, strings and tuples of integers."""
    return relax.Call(Op.get(PREFIX + name), list(args), attrs=ir.make_node("ir.DictAttrs", **attrs))


def is_call(expr: Any, name: str) -> TypeGuard[relax.Call]:
    """Whether `expr` calls the operator `name`: "bnncc.sign", "nn.conv2d", "add"…"""
    return isinstance(expr, relax.Call) and isinstance(expr.op, Op) and expr.op.name == f"relax.{name}"


def op_name(expr: Any) -> str | None:
    """The operator's name without "relax.", or None for anything that is no operator call."""
    if isinstance(expr, relax.Call) and isinstance(expr.op, Op):
        return expr.op.name.removeprefix("relax.")
    return None


def attributes(expr: relax.Call) -> dict[str, Any]:
    """The attributes of a call as plain Python values."""
    attrs = expr.attrs
    if attrs is None:
        return {}
    keys = attrs.keys() if hasattr(attrs, "keys") else [f.name for f in _fields(attrs)]
    return {key: _plain(attrs[key] if hasattr(attrs, "keys") else getattr(attrs, key)) for key in keys}


def _fields(attrs: Any) -> list[Any]:
    return list(type(attrs).__tvm_ffi_type_info__.fields)


def _plain(value: Any) -> Any:
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    if isinstance(value, tvm.tirx.IntImm):
        return int(value.value)
    if isinstance(value, tvm.tirx.FloatImm):
        return float(value.value)
    if hasattr(value, "__len__") and hasattr(value, "__getitem__") and not hasattr(value, "items"):
        return tuple(_plain(v) for v in value)
    return value


def shape_of(expr: Any) -> tuple[int, ...]:
    """The static shape of a tensor expression."""
    return tuple(int(extent) for extent in expr.ty.shape)


def dtype_of(expr: Any) -> str:
    return str(expr.ty.dtype)


def window(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> int:
    """Output extent of a sliding window over `size` elements padded by `before` and `after`."""
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


def _same(call_: relax.Call, _: Any) -> Any:
    return relax.TensorType(shape_of(call_.args[0]), dtype_of(call_.args[0]))


def _binary_conv(call_: relax.Call, _: Any) -> Any:
    a = attributes(call_)
    out, _per_group, *kernel = shape_of(call_.args[1])
    channels_last = a["data_layout"].endswith("C")
    n, *image = shape_of(call_.args[0])
    image = image[:-1] if channels_last else image[1:]
    before, after = a["padding"][: len(kernel)], a["padding"][len(kernel) :]
    result = map(window, image, kernel, a["strides"], a["dilation"], before, after)
    return relax.TensorType((n, *result, out) if channels_last else (n, out, *result), "float32")


def _binary_dense(call_: relax.Call, _: Any) -> Any:
    *rows, _k = shape_of(call_.args[0])
    return relax.TensorType((*rows, shape_of(call_.args[1])[0]), "float32")


def _packed_shape(a: dict[str, Any], n: int, h: int, w: int, planes: int) -> Any:
    group_channels = a["channels"] // a["groups"]
    size = a["groups"] * -(-group_channels // a["word_bits"]) * a["word_bits"] // 8
    return relax.TensorType((n, h, w, size) if planes == 1 else (n, h, w, 2, size), "uint8")


def _pack(call_: relax.Call, _: Any) -> Any:
    a = attributes(call_)
    shape = shape_of(call_.args[0])
    n, h, w = (shape[0], shape[2], shape[3]) if a["data_layout"] == "NCHW" else shape[:3]
    top, left, bottom, right = a["padding"]
    return _packed_shape(a, n, h + top + bottom, w + left + right, a["planes"])


def _threshold_pack(call_: relax.Call, _: Any) -> Any:
    n, h, w, _c = shape_of(call_.args[0])
    return _packed_shape(attributes(call_), n, h, w, 1)


def _pad_bits(call_: relax.Call, _: Any) -> Any:
    n, h, w, *rest = shape_of(call_.args[0])
    top, left, bottom, right = attributes(call_)["padding"]
    return relax.TensorType((n, h + top + bottom, w + left + right, *rest), dtype_of(call_.args[0]))


def _max_pool2d_bits(call_: relax.Call, _: Any) -> Any:
    a = attributes(call_)
    n, h, w, *rest = shape_of(call_.args[0])
    top, left, bottom, right = a["padding"]
    oh = window(h, a["pool_size"][0], a["strides"][0], 1, top, bottom)
    ow = window(w, a["pool_size"][1], a["strides"][1], 1, left, right)
    return relax.TensorType((n, oh, ow, *rest), dtype_of(call_.args[0]))


def _pack_levels(call_: relax.Call, _: Any) -> Any:
    a = attributes(call_)
    n, h, w, _c = shape_of(call_.args[0])
    top, left, bottom, right = a["padding"]
    *pixels, _planes, size = list(_packed_shape(a, n, h + top + bottom, w + left + right, 2).shape)
    return relax.TensorType((*pixels, a["planes"], size), "uint8")


def _pack_bytes(call_: relax.Call, _: Any) -> Any:
    a = attributes(call_)
    n, h, w, _c = shape_of(call_.args[0])
    top, left, bottom, right = a["padding"]
    layout = ByteLayout(a["channels"], a["groups"], a["offset"])
    return relax.TensorType((n, h + top + bottom, w + left + right, layout.bytes), layout.dtype)


def _conv_kernel(dtype: str) -> Callable[[relax.Call, Any], Any]:
    """Convolutions over an input whose padding is already there, with prepacked weights."""

    def infer(call_: relax.Call, _: Any) -> Any:
        a = attributes(call_)
        planar = a.get("data_layout") == "NCHW"
        n, *rest = shape_of(call_.args[0])
        h, w = rest[1:] if planar else rest[:2]
        top, left, bottom, right = a.get("padding", (0, 0, 0, 0))
        kh, kw = a["kernel_size"]
        oh = window(h, kh, a["strides"][0], a["dilation"][0], top, bottom)
        ow = window(w, kw, a["strides"][1], a["dilation"][1], left, right)
        out = a["out_channels"]
        return relax.TensorType((n, out, oh, ow) if planar else (n, oh, ow, out), dtype)

    return infer


def _dense(call_: relax.Call, _: Any) -> Any:
    return relax.TensorType((shape_of(call_.args[0])[0], attributes(call_)["out_channels"]), "float32")


def _unpack_weights(call_: relax.Call, _: Any) -> Any:
    return relax.TensorType(attributes(call_)["shape"], "float32")


def _unfold_depth(call_: relax.Call, _: Any) -> Any:
    a = attributes(call_)
    n, h, w, *rest, channels = shape_of(call_.args[0])
    depth = window(a["depth"], a["kernel"], a["stride"], a["dilation"], *a["padding"])
    return relax.TensorType((n // a["depth"] * depth, h, w, *rest, channels * a["kernel"]), dtype_of(call_.args[0]))


def _insert_zeros(call_: relax.Call, _: Any) -> Any:
    shape = shape_of(call_.args[0])
    strides = attributes(call_)["strides"]
    image = (strides[i] * (extent - 1) + 1 for i, extent in enumerate(shape[2:]))
    return relax.TensorType((*shape[:2], *image), dtype_of(call_.args[0]))


def _along_axis(call_: relax.Call, _: Any) -> Any:
    shape = list(shape_of(call_.args[0]))
    shape[attributes(call_)["axis"]] = shape_of(call_.args[1])[1]
    return relax.TensorType(shape, dtype_of(call_.args[0]))


_INFER: dict[str, Callable[[relax.Call, Any], Any]] = {
    "sign": _same,
    "threshold": _same,
    "lookup": _same,
    "rescale": _same,
    "quantize": _same,
    "round_to": _same,
    "copy": _same,
    "add_bias": _same,
    "scale_shift": _same,
    "binary_conv1d": _binary_conv,
    "binary_conv2d": _binary_conv,
    "binary_conv3d": _binary_conv,
    "binary_dense": _binary_dense,
    "integer_conv1d": _binary_conv,
    "integer_conv2d": _binary_conv,
    "integer_conv3d": _binary_conv,
    "integer_dense": _binary_dense,
    "pack": _pack,
    "pack_levels": _pack_levels,
    "pack_bytes": _pack_bytes,
    "threshold_pack": _threshold_pack,
    "lookup_pack": _threshold_pack,
    "pad_bits": _pad_bits,
    "max_pool2d_bits": _max_pool2d_bits,
    "xnor_conv2d": _conv_kernel("int32"),
    "plane_conv2d": _conv_kernel("int32"),
    "byte_conv2d": _conv_kernel("int32"),
    "conv2d": _conv_kernel("float32"),
    "depthwise_conv2d": _conv_kernel("float32"),
    "dense": _dense,
    "unpack_weights": _unpack_weights,
    "unfold_depth": _unfold_depth,
    "unfold_depth_bits": _unfold_depth,
    "insert_zeros": _insert_zeros,
    "expm1": _same,
    "log1p": _same,
    "signbit": lambda call_, _: relax.TensorType(shape_of(call_.args[0]), "bool"),
    "resample": _along_axis,
    "pool_axis": _along_axis,
}


class _Namespace:
    """Lets TVMScript parse `R.bnncc.<op>(…)` back, so that dumped IR can be read in again."""

    def __getattr__(self, name: str) -> Callable[..., relax.Call]:
        if name not in _INFER:
            raise AttributeError(f"relax.bnncc has no operator {name}")
        return lambda *args, **attrs: call(name, args, **attrs)


def _register() -> None:
    import tvm.script.parser.relax as parser
    import tvm.script.relax as script

    for name, infer in _INFER.items():
        ir.register_op_attr(PREFIX + name, "FInferType", infer)
        ir.register_op_attr(PREFIX + name, "FPurity", True)
    script.bnncc = parser.bnncc = _Namespace()  # type: ignore[attr-defined]


_register()
