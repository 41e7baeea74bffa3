"""ONNX operators with weights, windows and reductions, in Relax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax import op as R

from bnncc.dialect import ops as dialect
from bnncc.frontends.converter import Unsupported
from bnncc.frontends.onnx_converter import CONVERTERS, Converter, Node, converts, float32, shape_of
from bnncc.frontends.onnx_evaluator import batch_norm_factors
from bnncc.frontends.transposed import transposed_convolution

_CONVOLUTIONS = {1: R.nn.conv1d, 2: R.nn.conv2d, 3: R.nn.conv3d}
_MAX_POOLS = {1: R.nn.max_pool1d, 2: R.nn.max_pool2d, 3: R.nn.max_pool3d}
_AVERAGE_POOLS = {1: R.nn.avg_pool1d, 2: R.nn.avg_pool2d, 3: R.nn.avg_pool3d}


@dataclass(frozen=True)
class _Window:
    """A sliding window over the image axes, ONNX's automatic padding and ceiling resolved.

    before, after: padding of each axis. beyond: how much farther than that the last window reaches.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    beyond: tuple[int, ...]

    @property
    def padding(self) -> list[int]:
        return [*self.before, *self.after]

    @property
    def whole_padding(self) -> list[int]:
        return [*self.before, *(a + b for a, b in zip(self.after, self.beyond, strict=True))]


def _window(n: Node, image: Sequence[int], kernel: Sequence[int]) -> _Window:
    rank = len(image)
    if rank not in _CONVOLUTIONS:
        raise Unsupported(f"it works on {rank} image axes; supported are 1, 2 and 3")
    strides = tuple(n.attr("strides", [1] * rank))
    dilations = tuple(n.attr("dilations", [1] * rank))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, kernel, strict=True)]
    pads = list(n.attr("pads", [0] * (2 * rank)))
    before, after = pads[:rank], pads[rank:]
    mode = n.attr("auto_pad", "NOTSET")
    if mode == "VALID":
        before, after = [0] * rank, [0] * rank
    elif mode in ("SAME_UPPER", "SAME_LOWER"):
        for axis, extent in enumerate(image):
            total = max(0, (-(-extent // strides[axis]) - 1) * strides[axis] + reach[axis] - extent)
            small, large = total // 2, total - total // 2
            before[axis], after[axis] = (small, large) if mode == "SAME_UPPER" else (large, small)
    beyond = [0] * rank
    if n.attr("ceil_mode", 0):
        for axis, extent in enumerate(image):
            room = extent + before[axis] + after[axis] - reach[axis]
            count = -(-room // strides[axis]) + 1
            # A window that would start in the padding at the end is left out.
            count -= (count - 1) * strides[axis] >= extent + before[axis]
            beyond[axis] = max(0, (count - 1) * strides[axis] - room)
    return _Window(tuple(kernel), strides, dilations, tuple(before), tuple(after), tuple(beyond))


def _with_bias(n: Node, product: relax.Expr, index: int, channels: int, rank: int) -> relax.Expr:
    """One binding each, so that a binary product stays recognisable."""
    if not n.has(index):
        return product
    bias = n.input(index)
    shape = (1, channels, *[1] * (rank - 2))
    if isinstance(bias, GenericConst):
        column: relax.Expr = float32(bias.value.numpy().reshape(shape))
    else:
        column = n.emit(R.reshape(bias, shape))
    return dialect.call("add_bias", [n.emit(product), column])


@converts("Conv")
def _conv(n: Node) -> relax.Expr:
    x, weight = n.input(0), n.input(1)
    out, _, *kernel = shape_of(weight)
    window = _window(n, shape_of(x)[2:], kernel)
    product = _CONVOLUTIONS[len(kernel)](
        x, weight, strides=list(window.strides), padding=window.padding, dilation=list(window.dilations),
        groups=n.attr("group", 1),
    )  # fmt: skip
    return _with_bias(n, product, 2, out, len(kernel) + 2)


@converts("ConvTranspose")
def _conv_transpose(n: Node) -> relax.Expr:
    x, weight = n.input(0), n.input(1)
    _, per_group, *kernel = shape_of(weight)
    rank, groups, image = len(kernel), n.attr("group", 1), shape_of(x)[2:]
    if rank not in _CONVOLUTIONS:
        raise Unsupported(f"it works on {rank} image axes; supported are 1, 2 and 3")
    strides, dilations = n.attr("strides", [1] * rank), n.attr("dilations", [1] * rank)
    extra = n.attr("output_padding", [0] * rank)
    whole = [
        s * (extent - 1) + e + d * (k - 1) + 1
        for s, extent, e, d, k in zip(strides, image, extra, dilations, kernel, strict=True)
    ]
    pads = n.attr("pads", [0] * (2 * rank))
    before, after = list(pads[:rank]), list(pads[rank:])
    mode = n.attr("auto_pad", "NOTSET")
    sizes = n.attr("output_shape")
    if sizes is None and mode in ("SAME_UPPER", "SAME_LOWER"):
        sizes = [extent * s for extent, s in zip(image, strides, strict=True)]
    if sizes is not None:
        totals = [have - want for have, want in zip(whole, sizes, strict=True)]
        small, large = [t // 2 for t in totals], [t - t // 2 for t in totals]
        before, after = (small, large) if mode == "SAME_UPPER" else (large, small)
    # Unequal padding at the end is padding of the output.
    uneven = [e + b - a for e, b, a in zip(extra, before, after, strict=True)]
    product = transposed_convolution(
        n.emit, x, weight, strides=strides, padding=before, output_padding=uneven, dilation=dilations, groups=groups
    )
    return _with_bias(n, product, 2, per_group * groups, rank + 2)


@converts("MatMul")
def _matmul(n: Node) -> relax.Expr:
    x, y = n.input(0), n.input(1)
    shape, other = shape_of(x), shape_of(y)
    if len(shape) > 2 and len(other) == 2:
        rows = n.emit(R.reshape(x, (int(np.prod(shape[:-1])), shape[-1])))
        return R.reshape(n.emit(R.matmul(rows, y)), (*shape[:-1], other[1]))
    return R.matmul(x, y)


@converts("Gemm")
def _gemm(n: Node) -> relax.Expr:
    x = R.permute_dims(n.input(0), [1, 0]) if n.attr("transA", 0) else n.input(0)
    weight = n.input(1)
    if n.attr("transB", 0):
        if isinstance(weight, GenericConst):
            weight = float32(np.ascontiguousarray(weight.value.numpy().T))
        else:
            weight = n.emit(R.permute_dims(weight, [1, 0]))
    product = R.matmul(n.bound(x), weight)
    alpha, beta = n.attr("alpha", 1.0), n.attr("beta", 1.0)
    if alpha != 1:
        product = R.multiply(n.emit(product), float32(alpha))
    if not n.has(2) or beta == 0:
        return product
    bias = n.input(2)
    bias = bias if beta == 1 else n.emit(R.multiply(bias, float32(beta)))
    return dialect.call("add_bias", [n.emit(product), bias])


@converts("BatchNormalization")
def _batch_norm(n: Node) -> relax.Expr:
    if n.attr("training_mode", 0) or any(n.proto.output[1:]):
        raise Unsupported("it is in training mode; export the model for inference")
    names = ("scale", "bias", "mean", "variance")
    statistics = [n.constant(index, name) for index, name in enumerate(names, 1)]
    a, b = batch_norm_factors(statistics, n.attr("epsilon", 1e-5))
    shape = (1, -1, *[1] * (len(shape_of(n.input())) - 2))
    scaled = n.emit(R.multiply(n.input(), float32(a.reshape(shape))))
    return R.add(scaled, float32(b.reshape(shape)))


@converts("MaxPool")
def _max_pool(n: Node) -> relax.Expr:
    n.only_output(1, "Indices")
    window = _window(n, shape_of(n.input())[2:], n.attr("kernel_shape"))
    return _MAX_POOLS[len(window.kernel)](
        n.input(), pool_size=list(window.kernel), strides=list(window.strides), padding=window.whole_padding,
        dilation=list(window.dilations),
    )  # fmt: skip


@converts("AveragePool")
def _average_pool(n: Node) -> relax.Expr:
    x, shape = n.input(), shape_of(n.input())
    window = _window(n, shape[2:], n.attr("kernel_shape"))
    if set(window.dilations) != {1}:
        raise Unsupported(f"dilations {list(window.dilations)}; supported is 1")
    counted, padding = bool(n.attr("count_include_pad", 0)), window.whole_padding
    if counted and any(window.beyond):
        # The padding counts as zeros, what lies beyond it does not count.
        around = [(0, 0), (0, 0), *zip(window.before, window.after, strict=True)]
        x = n.emit(R.nn.pad(x, [width for pair in around for width in pair], "constant", 0.0))
        counted, padding = False, [*[0] * len(window.beyond), *window.beyond]
    return _AVERAGE_POOLS[len(window.kernel)](
        x, pool_size=list(window.kernel), strides=list(window.strides), padding=padding, count_include_pad=counted
    )


def _image_axes(x: relax.Expr) -> list[int]:
    return list(range(2, len(shape_of(x))))


CONVERTERS["GlobalAveragePool"] = lambda n: R.mean(n.input(), _image_axes(n.input()), True)
CONVERTERS["GlobalMaxPool"] = lambda n: R.max(n.input(), _image_axes(n.input()), True)


def _reduction(function: Callable[..., relax.Expr]) -> Converter:
    def convert(n: Node) -> relax.Expr:
        x: Any = n.input()
        axes = n.setting("axes", 1)
        if not axes and n.attr("noop_with_empty_axes", 0):
            return x
        rank = len(shape_of(x))
        positive = sorted(axis % rank for axis in axes) if axes else list(range(rank))
        return function(x, positive, bool(n.attr("keepdims", 1)))

    return convert


for _name, _reduce in {"ReduceMean": R.mean, "ReduceSum": R.sum, "ReduceMax": R.max, "ReduceMin": R.min}.items():
    CONVERTERS[_name] = _reduction(_reduce)


@converts("LayerNormalization")
def _layer_norm(n: Node) -> relax.Expr:
    x = n.input()
    if any(n.proto.output[1:]):
        raise Unsupported("its mean or inverse deviation is used; only the first output is supported")
    rank = len(shape_of(x))
    axes = list(range(n.attr("axis", -1) % rank, rank))
    centred = n.emit(R.subtract(x, n.emit(R.mean(x, axes, True))))
    variance = n.emit(R.mean(n.emit(R.multiply(centred, centred)), axes, True))
    deviation = n.emit(R.sqrt(n.emit(R.add(variance, float32(n.attr("epsilon", 1e-5))))))
    result = R.multiply(n.emit(R.divide(centred, deviation)), n.input(1))
    return R.add(n.emit(result), n.input(2)) if n.has(2) else result
