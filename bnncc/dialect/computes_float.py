"""TE computes of the float operators around the binary layers, with eager PyTorch's roundings and special values.

TVM contracts every ``a·b + c`` into a fused multiply-add. A product that eager rounds on its own is therefore wrapped
in `rounded`; where ATen itself fuses (batch norm), `fma` says so. NaN and −0 follow ATen's CPU kernels.
Convolutions and dense layers sum by fused multiply-adds in another order than eager: they are never exact.
Pooling, means and softmax stand in `computes_pool`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

from . import functions
from .computes_pool import avg_pool2d, max_pool2d, mean, softmax
from .scalars import clip_value, f32, fma, prelu_value, relu_value, rounded, rounded_to, sign_value, unless_nan
from .stages import ROLE, ROUNDED, ZERO_ROWS, Padding, extents, mismatches_of, staged, window

__all__ = [
    "add", "avg_pool2d", "broadcast", "clip", "clip_value", "conv2d", "dense", "depthwise_conv2d", "divide",
    "elementwise", "fma", "leaky_relu", "max_pool2d", "mean", "multiply", "pad", "permute", "prelu", "prelu_value",
    "relu", "relu_value", "rounded", "rounded_to", "scale_shift", "sigmoid", "sign_value", "signs", "softmax",
    "subtract", "tanh", "to_float", "unless_nan", "unpack_weights",
]  # fmt: skip


def broadcast(constant: te.Tensor, ndim: int, axis: int) -> Callable[..., Any]:
    """Reads a constant of shape [C] along `axis`, or one of shape [1, …] like the tensor it meets, or a scalar []."""
    shape = extents(constant)

    def read(*at: Any) -> Any:
        if not shape:
            return constant()
        if len(shape) == 1 and ndim != 1:
            return constant(0 if shape[0] == 1 else at[axis])
        aligned = at[len(at) - len(shape) :]
        return constant(*(0 if extent == 1 else index for extent, index in zip(shape, aligned, strict=True)))

    return read


def elementwise(f: Callable[..., Any], *tensors: te.Tensor, axis: int = -1, name: str = "elementwise") -> te.Tensor:
    """``f`` of the elements of tensors that broadcast against each other; a [C] tensor lies along `axis`."""
    ndim = max(len(t.shape) for t in tensors)
    shape = [1] * ndim
    for t in tensors:
        own = extents(t)
        if len(own) == 1 and ndim > 1:
            index = axis % ndim
            shape[index] = max(shape[index], own[0])
        else:
            for d, extent in enumerate(own, ndim - len(own)):
                shape[d] = max(shape[d], extent)
    readers = [broadcast(t, ndim, axis % ndim) for t in tensors]
    return te.compute(tuple(shape), lambda *at: f(*(read(*at) for read in readers)), name=name)


def to_float(x: te.Tensor) -> te.Tensor:
    """int32 accumulators as float32: exact below 2²⁴."""
    product = mismatches_of(x)
    if product is not None and 2 * product[1] < 1 << 24:
        mismatches, depth = product  # exact in every step, and one of them less
        return te.compute(
            x.shape, lambda *at: f32(depth) - tirx.Cast("float32", mismatches(*at)) * f32(2), name="to_float"
        )
    return te.compute(x.shape, lambda *at: tirx.Cast("float32", x(*at)), name="to_float")


def scale_shift(x: te.Tensor, a: te.Tensor, b: te.Tensor, *, axis: int = -1) -> te.Tensor:
    """Batch norm as ATen evaluates it in eval mode: ``fma(x, a, b)`` with a, b [C] precomputed."""
    return elementwise(fma, x, a, b, axis=axis, name="scale_shift")


def add(a: te.Tensor, b: te.Tensor, *, axis: int = -1) -> te.Tensor:
    return elementwise(lambda p, q: p + q, a, b, axis=axis, name="add")


def subtract(a: te.Tensor, b: te.Tensor, *, axis: int = -1) -> te.Tensor:
    return elementwise(lambda p, q: p - q, a, b, axis=axis, name="subtract")


def multiply(a: te.Tensor, b: te.Tensor, *, axis: int = -1) -> te.Tensor:
    return elementwise(lambda p, q: rounded(p * q), a, b, axis=axis, name="multiply")


def divide(a: te.Tensor, b: te.Tensor, *, axis: int = -1) -> te.Tensor:
    return elementwise(lambda p, q: p / q, a, b, axis=axis, name="divide")


def relu(x: te.Tensor) -> te.Tensor:
    return elementwise(relu_value, x, name="relu")


def clip(x: te.Tensor, low: float, high: float) -> te.Tensor:
    return elementwise(lambda v: clip_value(v, low, high), x, name="clip")


def prelu(x: te.Tensor, slope: te.Tensor, *, axis: int = -1) -> te.Tensor:
    return elementwise(prelu_value, x, slope, axis=axis, name="prelu")


def leaky_relu(x: te.Tensor, slope: float) -> te.Tensor:
    return elementwise(lambda v: prelu_value(v, f32(slope)), x, name="leaky_relu")


def sigmoid(x: te.Tensor) -> te.Tensor:
    return elementwise(functions.sigmoid, x, name="sigmoid")


def tanh(x: te.Tensor) -> te.Tensor:
    return elementwise(functions.tanh, x, name="tanh")


def signs(x: te.Tensor, predicate: str) -> te.Tensor:
    """`sign_value` of every element."""
    return elementwise(lambda v: sign_value(v, predicate), x, name="signs")


def permute(x: te.Tensor, order: Sequence[int]) -> te.Tensor:
    """Transposition: axis i of the result is axis ``order[i]`` of x."""
    shape = extents(x)

    def f(*at: Any) -> Any:
        source = [at[order.index(axis)] for axis in range(len(shape))]
        return x(*source)

    order = list(order)
    return staged([shape[axis] for axis in order], f, "permute", "permute")


def pad(x: te.Tensor, padding: Padding, value: float = 0.0, *, data_layout: str = "NHWC") -> te.Tensor:
    """Constant padding (top, left, bottom, right) of a float tensor."""
    if not any(padding):
        return x
    top, left, bottom, right = padding
    first = 2 if data_layout == "NCHW" else 1
    shape = list(extents(x))
    height, width = shape[first], shape[first + 1]
    shape[first] += top + bottom
    shape[first + 1] += left + right

    def f(*at: Any) -> Any:
        y, x_ = at[first] - top, at[first + 1] - left
        inside = tirx.all(y >= 0, y < height, x_ >= 0, x_ < width)
        return tirx.if_then_else(inside, x(*at[:first], y, x_, *at[first + 2 :]), f32(value))

    return staged(shape, f, "pad", "pad")


def conv2d(
    x: te.Tensor,
    w: te.Tensor,
    *,
    out_channels: int,
    strides: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    padding: Padding = (0, 0, 0, 0),
    form: str = "",
    zero_rows: tuple[int, int] = (0, 0),
) -> te.Tensor:
    """Float convolution: x [N, H, W, G·CI], zeros around it, by w [G, OB, KH, KW, CI, OL] → [N, OH, OW, out_channels].

    form: what x is rounded to, as in `scalars.rounded_to`, if it is. The weights are so rounded already; of "float16"
    they are, in words of two channels of the input, uint32 [G, OB, KH, KW, CI/2, OL].
    zero_rows: how many of x's first and last rows are padding with 0, where all weights are finite: schedules may leave
    their products out.
    The sum's order is (KH, KW, CI) by fused multiply-adds; eager's differs, so the result is never exact.
    """
    batch, height, width, _ = extents(x)
    groups, blocks, kh, kw, depth, lanes = extents(w)
    top, left, bottom, right = padding
    oh = window(height + top + bottom, kh, strides[0], dilation[0])
    ow = window(width + left + right, kw, strides[1], dilation[1])
    i, j, *of_depth = _axes(form, ky=kh, kx=kw, k=depth)

    def term(n: Any, y: Any, x_: Any, g: Any, b: Any, lane: Any) -> Any:
        weight, channel = _weight(w(g, b, i, j, of_depth[0], lane), of_depth)
        sy, sx = y * strides[0] + i * dilation[0] - top, x_ * strides[1] + j * dilation[1] - left
        own = x(n, sy, sx, g * (depth * len(of_depth)) + channel)
        if any(padding):
            own = _inside(own, sy, sx, height, width)
        return te.sum(_operand(own, form) * weight, axis=[i, j, *of_depth])

    shape = (batch, oh, ow, groups, blocks, lanes)
    sums = te.compute(shape, term, name="conv2d", attrs=_attrs("conv2d", form, zero_rows))
    group_out = out_channels // groups

    def unblocked(n: Any, y: Any, x_: Any, o: Any) -> Any:
        g, within = (0, o) if groups == 1 else (tirx.floordiv(o, group_out), tirx.floormod(o, group_out))
        b, lane = (0, within) if blocks == 1 else (tirx.floordiv(within, lanes), tirx.floormod(within, lanes))
        return sums(n, y, x_, g, b, lane)

    return te.compute((batch, oh, ow, out_channels), unblocked, name="unblocked")


def _inside(value: Any, y: Any, x: Any, height: int, width: int) -> Any:
    """A value of an image, 0 around it."""
    return tirx.if_then_else(tirx.all(y >= 0, y < height, x >= 0, x < width), value, f32(0.0))


def _attrs(role: str, form: str, zero_rows: tuple[int, int] = (0, 0)) -> dict[str, Any]:
    rounded = {ROUNDED: form} if form else {}
    return {ROLE: role, **rounded, **({ZERO_ROWS: list(zero_rows)} if any(zero_rows) else {})}


def _operand(x: Any, form: str) -> Any:
    return rounded_to(x, form) if form else x


def _axes(form: str, **extents_: int) -> list[Any]:
    """Reduction axes; where the last counts pairs of values, one more for which of the two."""
    pair = {"v": 2} if form == "float16" else {}
    return [te.reduce_axis((0, extent), name) for name, extent in (extents_ | pair).items()]


def _weight(word: Any, depth: Sequence[Any]) -> tuple[Any, Any]:
    """A weight as float32, and the input's channel that it is for. depth: axes of the channels, or of pairs and which.

    The exponent of a float16 is 112 smaller in bits, which a product makes up for; that is exact below infinity.
    """
    if len(depth) == 1:
        return word, depth[0]
    half = word >> (tirx.Cast("uint32", depth[1]) * tirx.const(16, "uint32"))
    magnitude = tirx.reinterpret("float32", (half & tirx.const(0x7FFF, "uint32")) << tirx.const(13, "uint32"))
    value = magnitude * f32(2.0**112)
    negative = (half & tirx.const(0x8000, "uint32")) != tirx.const(0, "uint32")
    return tirx.Select(negative, -value, value), depth[0] * 2 + depth[1]


def depthwise_conv2d(
    x: te.Tensor,
    w: te.Tensor,
    *,
    strides: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    padding: Padding = (0, 0, 0, 0),
) -> te.Tensor:
    """Depthwise convolution: x [N, H, W, C], zeros around it, by w [KH, KW, C] → [N, OH, OW, C]."""
    batch, height, width, channels = extents(x)
    kh, kw, _ = extents(w)
    top, left, bottom, right = padding
    oh = window(height + top + bottom, kh, strides[0], dilation[0])
    ow = window(width + left + right, kw, strides[1], dilation[1])
    i, j = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")

    def product(n: Any, y: Any, x_: Any, c: Any) -> Any:
        sy, sx = y * strides[0] + i * dilation[0] - top, x_ * strides[1] + j * dilation[1] - left
        value = x(n, sy, sx, c)
        if any(padding):
            value = _inside(value, sy, sx, height, width)
        return te.sum(value * w(i, j, c), axis=[i, j])

    return staged((batch, oh, ow, channels), product, "depthwise", "depthwise")


def dense(x: te.Tensor, w: te.Tensor, *, out_channels: int, form: str = "") -> te.Tensor:
    """x [N, K] by w [OB, K, OL] → [N, out_channels]. form: as of `conv2d`, w of "float16" [OB, K/2, OL]."""
    rows, _ = extents(x)
    blocks, depth, lanes = extents(w)
    reduced = _axes(form, k=depth)

    def term(n: Any, b: Any, lane: Any) -> Any:
        weight, channel = _weight(w(b, reduced[0], lane), reduced)
        return te.sum(_operand(x(n, channel), form) * weight, axis=reduced)

    sums = te.compute((rows, blocks, lanes), term, name="dense", attrs=_attrs("dense", form))

    def unblocked(n: Any, o: Any) -> Any:
        return sums(n, 0, o) if blocks == 1 else sums(n, tirx.floordiv(o, lanes), tirx.floormod(o, lanes))

    return te.compute((rows, out_channels), unblocked, name="unblocked")


def unpack_weights(bits: te.Tensor, lanes: int, alpha: te.Tensor | None = None) -> te.Tensor:
    """Float weights ±1 (times alpha) from bits: uint8 [G, OB, KH, KW, CI, OL/8 rounded up] → [G, OB, KH, KW, CI, OL].

    Bit l%8 of byte l//8 is lane l; alpha float32 [G, OB, OL], one factor to an output channel.
    """
    groups, blocks, kh, kw, depth, _ = extents(bits)

    def f(g: Any, b: Any, i: Any, j: Any, k: Any, lane: Any) -> Any:
        byte = tirx.Cast("int32", bits(g, b, i, j, k, tirx.floordiv(lane, 8)))
        bit = (byte >> tirx.floormod(lane, 8)) & 1
        positive, negative = (f32(1.0), f32(-1.0)) if alpha is None else (alpha(g, b, lane), -alpha(g, b, lane))
        return tirx.Select(bit == 1, positive, negative)

    return te.compute((groups, blocks, kh, kw, depth, lanes), f, name="unpack_weights")
