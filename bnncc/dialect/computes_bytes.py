"""TE computes on bytes: the levels of quantized values as one byte each, and their convolution with signed bytes.

A stored byte is ``level − offset``: 0 … 255 as uint8 (offset 0) or −128 … 127 as int8 (offset 128), whichever the
target multiplies. What the offset, the zero point and the padding add to a sum is a constant of the output channel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from bnncc.runtime.bits import ByteLayout

from .stages import ROLE, WIDE, Padding, extents, staged, window


def pack_bytes(
    x: te.Tensor, lowest: Any, inverse: Any, layout: ByteLayout, *, most: int, padding: Padding, pad_level: int
) -> te.Tensor:
    """The levels of quantized values float32 [N, H, W, C] as bytes [N, H', W', layout.bytes].

    The level of x is ``nearbyint((x − lowest) · inverse)``, clamped to 0 … most; `lowest` and `inverse`, one over the
    distance of two levels, are float32 numbers. Pixels of the padding have level `pad_level`, bytes that no channel
    fills hold 0: their weights are 0.
    """
    dtype, offset = layout.dtype, tirx.const(float(layout.offset), "float32")
    top_level, zero = tirx.const(float(most), "float32"), tirx.const(0.0, "float32")

    def level(n: Any, y: Any, x_: Any, c: Any) -> Any:
        steps = tirx.nearbyint((x(n, y, x_, c) - lowest) * inverse)
        # Not Select, which would compute x three times over before LLVM finds that they are one; no level is NaN.
        clamped = tirx.min(tirx.max(steps, zero), top_level)
        # By way of int32: processors convert floats to that.
        return tirx.Cast(dtype, tirx.Cast("int32", clamped - offset if layout.offset else clamped))

    batch, height, width, _ = extents(x)
    filled = layout.group_channels

    def unless_gap(b: Any, value: Callable[[Any], Any]) -> Any:
        """`value` of the channel that byte b holds, 0 where it holds none."""
        if filled == layout.group_bytes:
            return value(b)
        group, inside = tirx.floordiv(b, layout.group_bytes), tirx.floormod(b, layout.group_bytes)
        channel = group * filled + tirx.min(inside, filled - 1)
        return tirx.if_then_else(inside < filled, value(channel), tirx.const(0, dtype))

    def byte(n: Any, y: Any, x_: Any, b: Any) -> Any:
        return unless_gap(b, lambda channel: level(n, y, x_, channel))

    levels = te.compute((batch, height, width, layout.bytes), byte, name="levels")
    if not any(padding):
        return levels
    top, left, bottom, right = padding

    def padded(n: Any, y: Any, x_: Any, b: Any) -> Any:
        row, column = y - top, x_ - left
        inside = tirx.all(row >= 0, row < height, column >= 0, column < width)
        outside = unless_gap(b, lambda _: tirx.const(pad_level - layout.offset, dtype))
        return tirx.if_then_else(inside, levels(n, row, column, b), outside)

    return staged((batch, height + top + bottom, width + left + right, layout.bytes), padded, "pad", "pad")


def byte_conv2d(
    x: te.Tensor,
    w: te.Tensor,
    base: te.Tensor,
    *,
    out_channels: int,
    factor: int,
    wide: bool = False,
    strides: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> te.Tensor:
    """The convolution of quantized values as exact int32 [N, OH, OW, out_channels]: ``base + factor · Σ x·w``.

    x: bytes [N, H, W, G·K·4], already padded. w: int8 [G, OB, KH, KW, R·K, OL, 4], the four channels of a word
    innermost, OL output channels side by side, in R parts whose sum is the weight. base: int32 [out_channels].
    wide: two neighbouring weights are −128, so that two products of int8 need more than 16 bits.
    """
    batch, height, width, size = extents(x)
    groups, blocks, kh, kw, parts_words, lanes, four = extents(w)
    words = size // (four * groups)
    oh, ow = window(height, kh, strides[0], dilation[0]), window(width, kw, strides[1], dilation[1])
    i, j = te.reduce_axis((0, kh), "ky"), te.reduce_axis((0, kw), "kx")
    k, q = te.reduce_axis((0, parts_words), "k"), te.reduce_axis((0, four), "q")

    def product(n: Any, y: Any, x_: Any, g: Any, b: Any, lane: Any) -> Any:
        pixel = (n, y * strides[0] + i * dilation[0], x_ * strides[1] + j * dilation[1])
        word = k if parts_words == words else tirx.floormod(k, words)
        channel = (word if groups == 1 else g * words + word) * four + q
        return tirx.Cast("int32", x(*pixel, channel)) * tirx.Cast("int32", w(g, b, i, j, k, lane, q))

    sums = te.compute(
        (batch, oh, ow, groups, blocks, lanes),
        lambda *at: te.sum(product(*at), axis=[i, j, k, q]),
        name="byte_conv2d",
        attrs={ROLE: "byte_conv2d", WIDE: int(wide)},
    )
    group_out = out_channels // groups

    def result(n: Any, y: Any, x_: Any, o: Any) -> Any:
        g, within = (0, o) if groups == 1 else (tirx.floordiv(o, group_out), tirx.floormod(o, group_out))
        b, lane = (0, within) if blocks == 1 else (tirx.floordiv(within, lanes), tirx.floormod(within, lanes))
        return base(o) + sums(n, y, x_, g, b, lane) * factor

    return te.compute((batch, oh, ow, out_channels), result, name="bytes_dot")
