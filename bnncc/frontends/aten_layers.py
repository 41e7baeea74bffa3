"""ATen operators that make, shape, multiply, normalize, pool and reduce tensors, in Relax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax import op as R

from bnncc.dialect import ops as dialect
from bnncc.frontends.converter import CONVERTERS, Converter, Emitter, Unsupported, converts
from bnncc.frontends.transposed import transposed_convolution

# Making tensors


def _filled(e: Emitter, value: Any) -> relax.Expr:
    return R.full(e.shape, e.cast(value, e.dtype), e.dtype)


CONVERTERS["full.default"] = CONVERTERS["full_like.default"] = lambda e, a: _filled(e, a.fill_value)
CONVERTERS["scalar_tensor.default"] = lambda e, a: relax.const(a.s, e.dtype)
CONVERTERS["arange.start_step"] = lambda e, a: relax.const(
    torch.arange(a.start, a.end, a.step, dtype=e.node.meta["val"].dtype).numpy()
)


# Shapes


@converts("view.default", "squeeze.dims", "unsqueeze.default")
def _view(e: Emitter, a: Any) -> relax.Expr:
    return R.reshape(a.self, e.shape)


CONVERTERS["expand.default"] = lambda e, a: R.broadcast_to(a.self, e.shape)
CONVERTERS["flip.default"] = lambda e, a: _fold(e, a.self, [d % len(e.shape) for d in a.dims], R.flip)
CONVERTERS["cat.default"] = lambda e, a: _cat(e, a)


def _fold(e: Emitter, x: relax.Expr, axes: Sequence[int], function: Callable[..., relax.Expr]) -> relax.Expr:
    """Apply a one-axis operation to several axes."""
    for axis in axes[:-1]:
        x = e.emit(function(x, axis))
    return function(x, axes[-1]) if axes else x


def _cat(e: Emitter, a: Any) -> relax.Expr:
    # ATen skips the legacy empty tensor of shape (0,).
    tensors = [e.cast(t, e.dtype) for t in a.tensors if tuple(int(d) for d in t.ty.shape) != (0,)]
    return R.concat(tensors, a.dim % len(e.shape))


@converts("permute.default")
def _permute(e: Emitter, a: Any) -> relax.Expr:
    return R.permute_dims(a.self, [d % len(e.shape) for d in a.dims])


@converts("slice.Tensor")
def _slice(e: Emitter, a: Any) -> relax.Expr:
    axis = a.dim % len(e.shape)
    extent = int(a.self.ty.shape[axis])
    begin, end, step = slice(a.start, a.end, a.step).indices(extent)
    if (begin, step) == (0, 1) and end >= extent:
        return a.self
    return R.strided_slice(a.self, [axis], [begin], [max(begin, end)], [step])


@converts("select.int")
def _select(e: Emitter, a: Any) -> relax.Expr:
    axis = a.dim % (len(e.shape) + 1)
    index = a.index % int(a.self.ty.shape[axis])
    return R.reshape(e.emit(R.strided_slice(a.self, [axis], [index], [index + 1])), e.shape)


@converts("split_with_sizes.default")
def _split(e: Emitter, a: Any) -> tuple[relax.Expr, ...]:
    axis = a.dim % a.self.ty.ndim
    ends = np.cumsum(a.split_sizes).tolist()
    slices = zip([0, *ends[:-1]], ends, strict=True)
    return tuple(e.emit(R.strided_slice(a.self, [axis], [begin], [end])) for begin, end in slices)


@converts("constant_pad_nd.default")
def _constant_pad_nd(e: Emitter, a: Any) -> relax.Expr:
    pairs = list(zip(a.pad[0::2], a.pad[1::2], strict=True))
    widths = [(0, 0)] * (len(e.shape) - len(pairs)) + pairs[::-1]
    x = a.self
    crops = [(axis, low, high) for axis, (low, high) in enumerate(widths) if low < 0 or high < 0]
    if crops:
        extents = [int(extent) for extent in x.ty.shape]
        axes = [axis for axis, _, _ in crops]
        begin = [max(0, -low) for _, low, _ in crops]
        end = [extents[axis] - max(0, -high) for axis, _, high in crops]
        x = e.emit(R.strided_slice(x, axes, begin, end))
    positive = [max(0, width) for pair in widths for width in pair]
    return R.nn.pad(x, positive, "constant", a.value) if any(positive) else x


# Products


def _conv_bias(e: Emitter, bias: relax.Expr | None, product: relax.Expr) -> relax.Expr:
    """One binding each, so that a binary product stays recognisable. See `bnncc.add_bias` for how eager rounds."""
    if bias is None:
        return product
    shape = [1, -1] + [1] * (len(e.shape) - 2)
    if isinstance(bias, GenericConst):
        column: relax.Expr = relax.const(bias.value.numpy().reshape(shape))
    else:
        column = e.emit(R.reshape(bias, [1, e.shape[1]] + [1] * (len(e.shape) - 2)))
    return dialect.call("add_bias", [e.emit(product), column])


@converts("convolution.default")
def _convolution(e: Emitter, a: Any) -> relax.Expr:
    spatial = len(e.shape) - 2

    def per_axis(values: Sequence[int]) -> list[int]:
        return list(values) * (spatial if len(values) == 1 else 1)

    common = {"strides": per_axis(a.stride), "dilation": per_axis(a.dilation), "groups": a.groups}
    padding = per_axis(a.padding)
    if a.transposed:
        product = transposed_convolution(
            e.emit, a.input, a.weight, padding=padding, output_padding=per_axis(a.output_padding), **common
        )
    else:
        function = {1: R.nn.conv1d, 2: R.nn.conv2d, 3: R.nn.conv3d}[spatial]
        product = function(a.input, a.weight, padding=padding, **common)
    return _conv_bias(e, a.bias, product)


@converts("mm.default", "bmm.default")
def _matmul(e: Emitter, a: Any) -> relax.Expr:
    return R.matmul(a.self, a.mat2)


@converts("addmm.default")
def _addmm(e: Emitter, a: Any) -> relax.Expr:
    product = e.emit(R.matmul(a.mat1, a.mat2))
    if a.alpha != 1:
        product = e.emit(R.multiply(product, relax.const(a.alpha, e.dtype)))
    if a.beta == 0:
        return product
    bias = a.self if a.beta == 1 else e.emit(R.multiply(a.self, relax.const(a.beta, e.dtype)))
    return dialect.call("add_bias", [product, bias])


# Normalization


@converts("_native_batch_norm_legit_no_training.default")
def _batch_norm(e: Emitter, a: Any) -> relax.Expr | tuple[relax.Expr, None, None]:
    sample = e.node.args[0].meta["val"]  # type: ignore[union-attr]
    channels = sample.shape[1]
    dtype = str(a.input.ty.dtype)
    gamma = a.weight if a.weight is not None else relax.const(np.ones(channels, dtype), dtype)
    beta = a.bias if a.bias is not None else relax.const(np.zeros(channels, dtype), dtype)
    if not _dense(sample):
        return _strided_batch_norm(e, a, gamma, beta), None, None
    return R.nn.batch_norm(
        a.input, gamma, beta, a.running_mean, a.running_var, axis=1, epsilon=a.eps, momentum=a.momentum, training=False
    )


def _dense(x: torch.Tensor) -> bool:
    """What ATen's batch norm takes for contiguous (`is_contiguous` in aten/src/ATen/native/Normalization.cpp)."""
    formats = {4: [torch.channels_last], 5: [torch.channels_last_3d]}.get(x.ndim, [])
    return any(x.is_contiguous(memory_format=chosen) for chosen in (torch.contiguous_format, *formats))


def _strided_batch_norm(e: Emitter, a: Any, gamma: relax.Expr, beta: relax.Expr) -> relax.Expr:
    """Of a part of a tensor, such as a chunk of channels: ATen has another kernel for these, which rounds otherwise.

    ((x − mean) · (1 / sqrt(var + eps))) · gamma + beta, each operation rounded: that file's
    `batch_norm_cpu_transform_input_template`.
    """
    dtype, shape = str(a.input.ty.dtype), (1, -1, *[1] * (a.input.ty.ndim - 2))
    deviation = e.emit(R.sqrt(e.emit(R.add(a.running_var, relax.const(a.eps, dtype)))))
    inverse = e.emit(R.divide(relax.const(1.0, dtype), deviation))
    mean, inverse, gamma, beta = (e.emit(R.reshape(v, shape)) for v in (a.running_mean, inverse, gamma, beta))
    centred = e.emit(R.subtract(a.input, mean))
    scaled = e.emit(R.multiply(e.emit(R.multiply(centred, inverse)), gamma))
    return R.add(scaled, beta)


@converts("_softmax.default")
def _softmax(e: Emitter, a: Any) -> relax.Expr:
    return R.nn.softmax(e.cast(a.self, e.dtype), a.dim % len(e.shape))


@converts("_log_softmax.default")
def _log_softmax(e: Emitter, a: Any) -> relax.Expr:
    return R.nn.log_softmax(e.cast(a.self, e.dtype), a.dim % len(e.shape))


# Pooling and reductions


def _pool_window(a: Any, spatial: int) -> dict[str, Any]:
    def per_axis(values: Any) -> list[int]:
        values = [values] if isinstance(values, int) else list(values)
        return values * (spatial if len(values) == 1 else 1)

    kernel = per_axis(a.kernel_size)
    padding = per_axis(a.padding)
    return {
        "pool_size": kernel,
        "strides": per_axis(a.stride) if a.stride else kernel,
        "padding": padding + padding,
        "ceil_mode": a.ceil_mode,
    }


def batched(e: Emitter, x: relax.Expr, spatial: int, pool: Callable[[relax.Expr], relax.Expr]) -> relax.Expr:
    """Pooling of an input without a batch axis, which PyTorch allows."""
    if x.ty.ndim == spatial + 2:
        return pool(x)
    extents = [1, *(int(extent) for extent in x.ty.shape)]
    pooled = e.emit(pool(e.emit(R.reshape(x, extents))))
    return R.reshape(pooled, [int(extent) for extent in pooled.ty.shape][1:])


@converts("max_pool2d_with_indices.default", "max_pool3d_with_indices.default")
def _max_pool(e: Emitter, a: Any) -> tuple[relax.Expr, None]:
    spatial = 3 if "3d" in e.node.target.__name__ else 2  # type: ignore[union-attr]
    pool = R.nn.max_pool3d if spatial == 3 else R.nn.max_pool2d
    dilation = [a.dilation] * spatial if isinstance(a.dilation, int) else list(a.dilation)
    dilation = dilation * (spatial if len(dilation) == 1 else 1)
    window = {**_pool_window(a, spatial), "dilation": dilation}
    return batched(e, a.self, spatial, lambda x: pool(x, **window)), None


@converts("avg_pool2d.default", "avg_pool3d.default")
def _avg_pool(e: Emitter, a: Any) -> relax.Expr:
    spatial = 3 if "3d" in e.node.target.__name__ else 2  # type: ignore[union-attr]
    if getattr(a, "divisor_override", None) is not None:
        raise Unsupported("divisor_override; leave it out and scale the result")
    pool = R.nn.avg_pool3d if spatial == 3 else R.nn.avg_pool2d
    window = {**_pool_window(a, spatial), "count_include_pad": a.count_include_pad}
    return batched(e, a.self, spatial, lambda x: pool(x, **window))


def _axes(x: relax.Expr, dim: Any) -> list[int] | None:
    dims = [dim] if isinstance(dim, int) else list(dim or [])
    return [d % x.ty.ndim for d in dims] or None


def _reduction(function: Callable[..., relax.Expr]) -> Converter:
    def convert(e: Emitter, a: Any) -> relax.Expr:
        x = e.cast(a.self, e.dtype)
        return function(x, _axes(x, getattr(a, "dim", None)), getattr(a, "keepdim", False))

    return convert


for _name, _reduce in {
    "mean.default": R.mean,
    "mean.dim": R.mean,
    "sum.dim_IntList": R.sum,
    "amax.default": R.max,
    "amin.default": R.min,
    "max.default": R.max,
    "min.default": R.min,
}.items():
    CONVERTERS[_name] = _reduction(_reduce)


@converts("any.dim", "any.dims", "any.default")
def _any(e: Emitter, a: Any) -> relax.Expr:
    x = e.cast(e.cast(a.self, "bool"), "int8")
    found = e.emit(R.max(x, _axes(x, getattr(a, "dim", None)), getattr(a, "keepdim", False)))
    return R.greater(found, relax.const(0, "int8"))


@converts("max.dim", "min.dim")
def _max_dim(e: Emitter, a: Any) -> tuple[relax.Expr, None]:
    reduce = R.max if "max" in e.node.target.__name__ else R.min  # type: ignore[union-attr]
    return reduce(a.self, _axes(a.self, a.dim), a.keepdim), None


@converts("argmax.default")
def _argmax(e: Emitter, a: Any) -> relax.Expr:
    axis = None if a.dim is None else a.dim % a.self.ty.ndim
    return R.argmax(a.self, axis, a.keepdim)
