"""Transposed convolutions: a convolution over the input with zeros between its pixels, the kernel reversed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tvm import relax
from tvm.relax import op as R

from bnncc.dialect import ops as dialect

Emit = Callable[[relax.Expr], relax.Var]


def transposed_convolution(
    emit: Emit,
    x: Any,
    weight: Any,
    *,
    strides: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> relax.Expr:
    """The transposed convolution of x [N, I, …] with a weight [I, O/groups, …], one to three image axes.

    padding is cut off on both sides of each axis; output_padding is added at its end, negative to cut off more.
    """
    kernel = [int(extent) for extent in weight.ty.shape][2:]
    spread = emit(dialect.call("insert_zeros", [x], strides=tuple(strides))) if max(strides) > 1 else x
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    before = [r - p for r, p in zip(reach, padding, strict=True)]
    after = [b + extra for b, extra in zip(before, output_padding, strict=True)]
    if min(*before, *after) < 0:
        spread = _cropped(emit, spread, before, after)
    around = [max(0, width) for width in (*before, *after)]
    function = {1: R.nn.conv1d, 2: R.nn.conv2d, 3: R.nn.conv3d}[len(strides)]
    return function(
        spread, _reversed_kernel(emit, weight, groups), strides=[1] * len(strides), padding=around,
        dilation=list(dilation), groups=groups,
    )  # fmt: skip


def _reversed_kernel(emit: Emit, weight: Any, groups: int) -> relax.Expr:
    """[I, O/G, …] of a transposed convolution as [O, I/G, …] of the convolution, reversed along the kernel.

    As operators, since the weight may be computed (a sign of a parameter); they fold to a constant.
    """
    inputs, per_group, *kernel = (int(extent) for extent in weight.ty.shape)
    grouped = emit(R.reshape(weight, (groups, inputs // groups, per_group, *kernel)))
    swapped = emit(R.permute_dims(grouped, [0, 2, 1, *range(3, 3 + len(kernel))]))
    flat = emit(R.reshape(swapped, (groups * per_group, inputs // groups, *kernel)))
    for axis in range(2, 2 + len(kernel)):
        flat = emit(R.flip(flat, axis))
    return flat


def _cropped(emit: Emit, x: Any, before: Sequence[int], after: Sequence[int]) -> relax.Expr:
    """Negative padding removes pixels."""
    shape = [int(extent) for extent in x.ty.shape]
    axes = list(range(2, len(shape)))
    begin = [max(0, -width) for width in before]
    end = [extent - max(0, -width) for extent, width in zip(shape[2:], after, strict=True)]
    return emit(R.strided_slice(x, axes, begin, end))
