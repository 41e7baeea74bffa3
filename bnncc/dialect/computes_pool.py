"""TE computes of pooling, means and softmax."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import te, tirx

from .functions import exp_of_negative
from .larger import larger
from .scalars import f32
from .stages import ROLE, RUN_LENGTH, Padding, extents, nearest, staged


def _pool_index(
    pool: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding,
    height: int,
    width: int,
    dilation: tuple[int, int] = (1, 1),
) -> tuple[Any, Any, Callable[[Any, Any], tuple[Any, Any, Any]]]:
    i, j = te.reduce_axis((0, pool[0]), "ky"), te.reduce_axis((0, pool[1]), "kx")

    def at(y: Any, x_: Any) -> tuple[Any, Any, Any]:
        sy = y * strides[0] + i * dilation[0] - padding[0]
        sx = x_ * strides[1] + j * dilation[1] - padding[1]
        inside = tirx.all(sy >= 0, sy < height, sx >= 0, sx < width) if any(padding) else None
        return sy, sx, inside

    return i, j, at


def _pooled(size: int, kernel: int, stride: int, before: int, after: int, ceil_mode: bool) -> int:
    if not ceil_mode:
        return (size + before + after - kernel) // stride + 1
    out = -(-(size + before + after - kernel) // stride) + 1
    return out - 1 if (out - 1) * stride >= size + before else out  # a window must start inside


def pooled_image(
    image: Sequence[int],
    pool_size: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    dilation: Sequence[int] = (1, 1),
    *,
    ceil_mode: bool = False,
) -> tuple[int, int]:
    """Height and width of the result of a pool over an image of (height, width)."""
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, pool_size, strict=True)]
    height, width = (
        _pooled(image[axis], reach[axis], strides[axis], padding[axis], padding[axis + 2], ceil_mode) for axis in (0, 1)
    )
    return height, width


def _is_ragged(
    image: Sequence[int], out: Sequence[int], pool_size: Sequence[int], strides: Sequence[int], padding: Padding
) -> bool:
    """Whether windows reach beyond the padding, as some do that rounding up has added."""
    return any(
        (out[axis] - 1) * strides[axis] + pool_size[axis] > image[axis] + padding[axis] + padding[axis + 2]
        for axis in (0, 1)
    )


def window_counts(
    image: Sequence[int],
    out: Sequence[int],
    pool_size: Sequence[int],
    strides: Sequence[int],
    padding: Padding,
    *,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Callable[[Any, Any], Any]:
    """By what the sum of the window of pixel (y, x) is divided, as ATen counts."""

    def count(y: Any, x: Any) -> Any:
        if divisor is not None:
            return f32(float(divisor))
        if not any(padding) and not _is_ragged(image, out, pool_size, strides, padding):
            return f32(float(pool_size[0] * pool_size[1]))
        spans = []
        for axis, at in enumerate((y, x)):
            start = at * strides[axis] - padding[axis]
            end = tirx.min(start + pool_size[axis], image[axis] + padding[axis + 2])
            if not count_include_pad:
                start, end = tirx.max(start, 0), tirx.min(end, image[axis])
            spans.append(end - start)
        return tirx.Cast("float32", spans[0] * spans[1])

    return count


def max_pool2d(
    x: te.Tensor,
    pool_size: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding = (0, 0, 0, 0),
    *,
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
) -> te.Tensor:
    """Max pooling of [N, H, W, C]; NaN wins, padding never does."""
    batch, height, width, channels = extents(x)
    reach = tuple(d * (k - 1) + 1 for d, k in zip(dilation, pool_size, strict=True))
    oh, ow = pooled_image((height, width), pool_size, strides, padding, dilation, ceil_mode=ceil_mode)
    bottom = max(padding[2], (oh - 1) * strides[0] + reach[0] - height - padding[0])
    right = max(padding[3], (ow - 1) * strides[1] + reach[1] - width - padding[1])
    lowest = f32(-math.inf)
    reducer = te.comm_reducer(larger, lambda _: lowest, name="larger")
    sides = (padding[0], padding[1], bottom, right)
    i, j, at = _pool_index(pool_size, strides, sides, height, width, dilation)

    def f(n: Any, y: Any, x_: Any, c: Any) -> Any:
        sy, sx, inside = at(y, x_)
        if dilation == (1, 1):  # no element lies between those of the window: its nearest edge is one of them
            value = x(n, nearest(sy, height, sides[0], sides[2]), nearest(sx, width, sides[1], sides[3]), c)
        else:
            value = x(n, sy, sx, c) if inside is None else tirx.if_then_else(inside, x(n, sy, sx, c), lowest)
        return reducer(value, axis=[i, j])

    return staged((batch, oh, ow, channels), f, "max_pool2d", "reduction")


def avg_pool2d(
    x: te.Tensor,
    pool_size: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding = (0, 0, 0, 0),
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> te.Tensor:
    """Average pooling of [N, H, W, C]: the sum in window order, divided by the count as ATen counts."""
    batch, height, width, channels = extents(x)
    top, left, bottom, right = padding
    oh, ow = pooled_image((height, width), pool_size, strides, padding, ceil_mode=ceil_mode)
    ragged = _is_ragged((height, width), (oh, ow), pool_size, strides, padding)
    i, j, at = _pool_index(pool_size, strides, (top, left, max(bottom, ragged), right), height, width)

    def f(n: Any, y: Any, x_: Any, c: Any) -> Any:
        sy, sx, inside = at(y, x_)
        value = x(n, sy, sx, c)
        return te.sum(value if inside is None else tirx.if_then_else(inside, value, f32(0.0)), axis=[i, j])

    sums = staged((batch, oh, ow, channels), f, "pool_sum", "reduction")

    count = window_counts(
        (height, width), (oh, ow), pool_size, strides, padding, count_include_pad=count_include_pad, divisor=divisor
    )
    return te.compute(
        (batch, oh, ow, channels), lambda n, y, x_, c: sums(n, y, x_, c) / count(y, x_), name="avg_pool2d"
    )


def mean(x: te.Tensor, axes: Sequence[int], *, keepdims: bool = False) -> te.Tensor:
    """Mean over `axes`: global average pooling over the pixels of NHWC is axes (1, 2)."""
    shape = extents(x)
    axes = sorted(axis % len(shape) for axis in axes)
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    reduced = [te.reduce_axis((0, shape[axis]), f"r{axis}") for axis in axes]

    def read(at: Sequence[Any]) -> Any:
        index: list[Any] = [None] * len(shape)
        for axis, var in zip(axes, reduced, strict=True):
            index[axis] = var
        for axis, var in zip(kept, at, strict=True):
            index[axis] = var
        return x(*index)

    count = math.prod(shape[axis] for axis in axes)
    attrs: dict[str, Any] = {ROLE: "reduction"}
    if kept and kept[-1] < axes[0]:
        attrs[RUN_LENGTH] = count
    sums = te.compute(
        [shape[axis] for axis in kept], lambda *at: te.sum(read(at), axis=reduced), name="sum", attrs=attrs
    )
    if keepdims:
        full = [1 if axis in axes else extent for axis, extent in enumerate(shape)]
        return te.compute(full, lambda *at: sums(*(at[axis] for axis in kept)) / f32(float(count)), name="mean")
    return te.compute([shape[axis] for axis in kept], lambda *at: sums(*at) / f32(float(count)), name="mean")


def softmax(x: te.Tensor) -> te.Tensor:
    """Softmax over the last axis of [N, C]: each row, filled up with −inf to whole vectors, by partial results side by
    side that are folded in the end."""
    rows, size = extents(x)
    lanes = 64 if size > 64 else 16
    steps = -(-size // lanes)

    def stage(width: int, f: Callable[..., Any], name: str) -> te.Tensor:
        return staged((rows, width), f, f"softmax_{name}", f"softmax.{name}")

    def reduced(source: te.Tensor, combine: Callable[..., Any], fold: Callable[[Any, Any], Any], name: str) -> Any:
        k = te.reduce_axis((0, steps), "k")
        part = stage(lanes, lambda n, lane: combine(source(n, k * lanes + lane), axis=[k]), f"{name}_lanes")
        width = lanes
        while width > 1:
            width //= 4
            part = stage(width, functools.partial(_quarter, part, width, fold), f"{name}_{width}")
        return part

    def inside(n: Any, c: Any) -> Any:
        return tirx.if_then_else(c < size, x(n, c), f32(-math.inf)) if size % lanes else x(n, c)

    row = stage(steps * lanes, inside, "row")
    top = reduced(row, te.max, tirx.max, "max")
    powers = stage(steps * lanes, lambda n, c: exp_of_negative(row(n, c) - top(n, 0)), "exp")
    total = reduced(powers, te.sum, lambda a, b: a + b, "sum")
    scale = stage(1, lambda n, c: f32(1.0) / total(n, c), "scale")
    return te.compute((rows, size), lambda n, c: powers(n, c) * scale(n, 0), name="softmax")


def _quarter(source: te.Tensor, width: int, fold: Callable[[Any, Any], Any], n: Any, lane: Any) -> Any:
    parts = [source(n, lane + i * width) for i in range(4)]
    return fold(fold(parts[0], parts[1]), fold(parts[2], parts[3]))
