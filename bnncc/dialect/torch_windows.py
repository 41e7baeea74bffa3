"""Relax's products, normalization and pooling by PyTorch's functions, in the layouts that `can_evaluate` knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from bnncc.dialect.torch_operators import defines

defines("matmul", "out_dtype")(lambda x, y, out_dtype: torch.matmul(x, y))


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
    defines(f"nn.conv{_spatial}d", "strides", "padding", "dilation", "groups")(_convolution(_spatial))
for _spatial in (1, 2):
    defines(f"nn.conv{_spatial}d_transpose", "strides", "padding", "output_padding", "dilation", "groups")(
        _transposed(_spatial)
    )


@defines("nn.batch_norm", "axis", "epsilon")
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
    defines(f"nn.max_pool{_spatial}d", *_WINDOW, "dilation")(_pool(_max, _spatial))
    defines(f"nn.avg_pool{_spatial}d", *_WINDOW, "count_include_pad")(_pool(_average(_avg), _spatial))


@defines("nn.adaptive_avg_pool2d", "output_size")
def _adaptive_avg_pool2d(x: torch.Tensor, output_size: list[int] | None) -> torch.Tensor:
    height, width = output_size or x.shape[-2:]
    return F.adaptive_avg_pool2d(x, (height, width))
