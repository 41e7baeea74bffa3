"""TE computes that rearrange images or work along one axis of them.

A 3-D image [N, D, H, W, C] is N·D images; a 3-D convolution unfolds their depth (below) and is a 2-D convolution whose
channels are those of all the slices it reads. Padding by reflection, interpolation and adaptive pooling read, for each
position of an axis, the positions that a constant names: one axis after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from bnncc.dialect.computes import extents, staged
from bnncc.dialect.computes_float import unless_nan
from bnncc.dialect.stages import ROLE, RUN


def unfold_depth(
    x: te.Tensor,
    *,
    depth: int,
    kernel: int,
    stride: int,
    dilation: int,
    padding: tuple[int, int],
    groups: int,
    outside: Any,
) -> te.Tensor:
    """[N·D, H, W, (planes,) C] → [N·OD, H, W, (planes,) G·kernel·(C/G)]: the kernel's slices beside each other.

    Channels are ordered by group, slice, channel of the group, so that the slices of one group stay together. C counts
    floats or packed bytes. outside(byte or channel of the source): what slices beyond the depth hold.
    """
    images, height, width, *planes, channels = extents(x)
    out = (depth + sum(padding) - dilation * (kernel - 1) - 1) // stride + 1
    batch, per_group = images // depth, channels // groups

    def f(n: Any, y: Any, x_: Any, *rest: Any) -> Any:
        *plane, c = rest
        group, slice_, channel = (
            tirx.floordiv(c, kernel * per_group),
            tirx.floormod(tirx.floordiv(c, per_group), kernel),
            tirx.floormod(c, per_group),
        )
        source = group * per_group + channel
        z = tirx.floormod(n, out) * stride + slice_ * dilation - padding[0]
        value = x(tirx.floordiv(n, out) * depth + z, y, x_, *plane, source)
        if not any(padding):
            return value
        inside = tirx.all(z >= 0, z < depth)
        return tirx.if_then_else(inside, value, outside(source))

    return te.compute((batch * out, height, width, *planes, channels * kernel), f, name="unfold_depth")


def concat(*tensors: te.Tensor) -> te.Tensor:
    """Tensors that differ in their last axis only, beside each other along it.

    Which tensor an element comes from is asked of its run of channels, so that vectors within runs ask once.
    """
    *shape, first = extents(tensors[0])
    sizes = [first, *(extents(t)[-1] for t in tensors[1:])]
    run = math.gcd(*sizes)
    starts = [sum(sizes[:i]) for i in range(len(sizes))]

    def f(*at: Any) -> Any:
        *pixel, c = at
        value = tensors[-1](*pixel, c - starts[-1])
        for tensor, start, end in reversed(list(zip(tensors, starts, starts[1:], strict=False))):
            value = tirx.if_then_else(tirx.floordiv(c, run) < end // run, tensor(*pixel, c - start), value)
        return value

    return te.compute((*shape, sum(sizes)), f, name="concat", attrs={ROLE: "concat", RUN: run})


def insert_zeros(x: te.Tensor, strides: tuple[int, ...]) -> te.Tensor:
    """[N, C, …] → zeros between the pixels: pixel i moves to i·stride along each axis of the image."""
    shape = extents(x)
    steps = (1, 1, *strides)

    def f(*at: Any) -> Any:
        there = tirx.all(*(tirx.floormod(i, s) == 0 for i, s in zip(at, steps, strict=True) if s > 1))
        value = x(*(tirx.floordiv(i, s) for i, s in zip(at, steps, strict=True)))
        return tirx.if_then_else(there, value, tirx.const(0, x.dtype)) if any(s > 1 for s in strides) else value

    return te.compute(
        tuple(s * (extent - 1) + 1 for extent, s in zip(shape, steps, strict=True)), f, name="insert_zeros"
    )


def _along(x: te.Tensor, axis: int, at: tuple[Any, ...]) -> Callable[[Any], Any]:
    """Reads `x` at another position of an axis."""
    return lambda position: x(*at[:axis], position, *at[axis + 1 :])


def take(x: te.Tensor, indices: te.Tensor, axis: int, *, trusted: bool) -> te.Tensor:
    """x at `indices` of any shape along an axis; unless `trusted`, positions outside become the nearest inside."""
    shape, rank = extents(x), len(indices.shape)

    def f(*at: Any) -> Any:
        position = indices(*at[axis : axis + rank])
        if not trusted:
            last = tirx.const(shape[axis] - 1, indices.dtype)
            position = tirx.max(tirx.min(position, last), tirx.const(0, indices.dtype))
        return x(*at[:axis], tirx.Cast("int32", position), *at[axis + rank :])

    return te.compute((*shape[:axis], *extents(indices), *shape[axis + 1 :]), f, name="take")


def resample(x: te.Tensor, index: te.Tensor, weight: te.Tensor, axis: int) -> te.Tensor:
    """Σ over k of weight[k, o] · x[index[k, o]] along an axis: index int32, weight float32 [taps, OUT]."""
    taps, out = extents(index)
    shape = extents(x)

    def f(*at: Any) -> Any:
        read = _along(x, axis, at)
        terms = [weight(k, at[axis]) * read(index(k, at[axis])) for k in range(taps)]
        return sum(terms[1:], terms[0])

    return te.compute((*shape[:axis], out, *shape[axis + 1 :]), f, name="resample")


def pool_axis(x: te.Tensor, index: te.Tensor, count: te.Tensor, axis: int, kind: str) -> te.Tensor:
    """The maximum or mean ("max", "mean") over windows of differing sizes along an axis.

    index: int32 [taps, OUT], the window's positions, the last one repeated. count: int32 [OUT], how many there are.
    """
    taps, out = extents(index)
    shape = extents(x)
    result = (*shape[:axis], out, *shape[axis + 1 :])
    k = te.reduce_axis((0, taps), "k")
    if kind == "max":
        larger = te.comm_reducer(
            lambda kept, new: tirx.Select(new > kept, new, unless_nan(new, kept)),
            lambda _: tirx.const(-math.inf, "float32"),
            name="larger",
        )
        return staged(
            result, lambda *at: larger(_along(x, axis, at)(index(k, at[axis])), axis=[k]), "pool_axis", "reduction"
        )

    def term(at: tuple[Any, ...]) -> Any:
        value = _along(x, axis, at)(index(k, at[axis]))
        return tirx.if_then_else(k < count(at[axis]), value, tirx.const(0, x.dtype))

    sums = staged(result, lambda *at: te.sum(term(at), axis=[k]), "pool_sum", "reduction")
    return te.compute(result, lambda *at: sums(*at) / tirx.Cast("float32", count(at[axis])), name="pool_axis")
