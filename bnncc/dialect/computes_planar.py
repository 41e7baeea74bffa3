"""TE computes of pooling and depthwise convolutions on NCHW images, one plane after the other.

The same values as those of `computes_pool` and `computes_float` on NHWC, the sums in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from .computes_pool import pooled_image, window_counts
from .larger import larger
from .scalars import f32
from .stages import ROLE, WINDOW, Padding, Window, extents, staged


def _windows(
    x: te.Tensor,
    of: Window,
    out: tuple[int, int],
    role: str,
    outside: float,
    reduced: Callable[[Any, list[Any], Any], Any],
) -> te.Tensor:
    """[N, C, H, W] → [N, C, *out]: `reduced(value, axes, channel)` over each window; it sees `outside` around x."""
    batch, channels, height, width = extents(x)
    rows = staged(extents(x), lambda *at: x(*at), "rows", "planar.rows")
    i, j = te.reduce_axis((0, of.height), "ky"), te.reduce_axis((0, of.width), "kx")

    def f(n: Any, c: Any, y: Any, x_: Any) -> Any:
        sy = y * of.stride_y + i * of.dilation_y - of.top
        sx = x_ * of.stride_x + j * of.dilation_x - of.left
        inside = tirx.all(sy >= 0, sy < height, sx >= 0, sx < width)
        return reduced(tirx.if_then_else(inside, rows(n, c, sy, sx), f32(outside)), [i, j], c)

    return te.compute((batch, channels, *out), f, name="window", attrs={ROLE: role, WINDOW: list(of)})


def max_pool2d(
    x: te.Tensor,
    pool_size: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding = (0, 0, 0, 0),
    *,
    dilation: tuple[int, int] = (1, 1),
    ceil_mode: bool = False,
) -> te.Tensor:
    """Max pooling of [N, C, H, W]; NaN wins, padding never does; of zeros of both signs the first in row order."""
    out = pooled_image(extents(x)[2:], pool_size, strides, padding, dilation, ceil_mode=ceil_mode)
    reducer = te.comm_reducer(larger, lambda _: f32(-math.inf), name="larger")
    of = Window(*pool_size, *strides, *dilation, *padding[:2])
    return _windows(x, of, out, "planar.max", -math.inf, lambda value, axes, _: reducer(value, axis=axes))


def avg_pool2d(
    x: te.Tensor,
    pool_size: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding = (0, 0, 0, 0),
    *,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
) -> te.Tensor:
    """Average pooling of [N, C, H, W]: the sum in window order, divided by the count as ATen counts."""
    image = extents(x)[2:]
    out = pooled_image(image, pool_size, strides, padding, ceil_mode=ceil_mode)
    count = window_counts(image, out, pool_size, strides, padding, count_include_pad=count_include_pad)
    of = Window(*pool_size, *strides, 1, 1, *padding[:2])
    sums = _windows(x, of, out, "planar.sum", 0.0, lambda value, axes, _: te.sum(value, axis=axes))
    return te.compute(sums.shape, lambda n, c, y, x_: sums(n, c, y, x_) / count(y, x_), name="avg_pool2d")


def depthwise_conv2d(
    x: te.Tensor,
    w: te.Tensor,
    *,
    strides: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    padding: Padding = (0, 0, 0, 0),
) -> te.Tensor:
    """Depthwise convolution: x [N, C, H, W], zeros around it, by w [C, KH, KW] → [N, C, OH, OW]."""
    _, kh, kw = extents(w)
    out = pooled_image(extents(x)[2:], (kh, kw), strides, padding, dilation)
    of = Window(kh, kw, *strides, *dilation, *padding[:2])
    return _windows(
        x, of, out, "planar.products", 0.0,
        lambda value, axes, c: te.sum(value * w(c, *axes), axis=axes),
    )  # fmt: skip
