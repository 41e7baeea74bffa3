"""TE computes on packed bits: packing by predicates, thresholds and tables, padding, pooling.

Packing needs no operation across lanes: channel ``block·8L + v·L + l`` is bit v of byte ``block·L + l``
(`bnncc.runtime.bits`), so that eight vectors of comparisons give one vector of bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from bnncc.runtime.bits import BitLayout

from .stages import COMPARE, IN_ORDER, LANES, ROLE, UNEVEN, Padding, extents, mismatches_of, nearest, staged, window

#: Pixels of an NCHW image that are packed beside each other.
_PLANAR_LANES = 16


def _channel(layout: BitLayout, byte: Any, bit: Any) -> tuple[Any, Any]:
    """The channel that `bit` of `byte` holds, and whether there is one (None: always)."""
    size, lanes = layout.group_bytes, layout.lanes
    group, within = (0, byte) if layout.groups == 1 else (tirx.floordiv(byte, size), tirx.floormod(byte, size))
    block, lane = tirx.floordiv(within, lanes), tirx.floormod(within, lanes)
    channel = block * (8 * lanes) + bit * lanes + lane
    if size * 8 == layout.group_channels:
        inside = None
    elif layout.group_channels % lanes == 0:  # the same for all lanes, so that the comparison stays one of vectors
        inside = block * 8 + bit < layout.group_channels // lanes
    else:
        inside = channel < layout.group_channels
    return group * layout.group_channels + channel, inside


def _bit(condition: Any, inside: Any, bit: Any, *, negated: bool = False) -> Any:
    """``1 << bit`` where the condition holds, as int32. A negation is written by swapping the arms: TVM turns
    ``not x < 0`` into ``0 <= x``, which NaN tells apart."""
    one, zero = tirx.const(1, "int32") << bit, tirx.const(0, "int32")
    value = tirx.Select(condition, zero, one) if negated else tirx.Select(condition, one, zero)
    return value if inside is None else tirx.if_then_else(inside, value, zero)


def _packed(bits: Callable[..., Any], shape: tuple[int, ...], layout: BitLayout) -> te.Tensor:
    """Bytes whose bit v is ``bits(*index, v)``, an int32 that is ``1 << v`` or 0."""
    v = te.reduce_axis((0, 8), "v")
    whole = layout.groups == 1 or layout.group_bytes * 8 == layout.group_channels
    wide = te.compute(
        shape,
        lambda *at: te.sum(bits(*at, v), axis=[v]),
        name="pack_bits",
        attrs={
            ROLE: "pack.bits",
            LANES: layout.lanes,
            UNEVEN: int(layout.group_channels % layout.lanes != 0),
            IN_ORDER: int(layout.lanes == 1 and whole),
        },
    )
    return staged(shape, lambda *at: tirx.Cast("uint8", wide(*at)), "pack", "pack")


def pack(
    x: te.Tensor,
    layout: BitLayout,
    predicate: str,
    *,
    padding: Padding = (0, 0, 0, 0),
    pad_bit: int = 0,
    data_layout: str = "NHWC",
) -> te.Tensor:
    """Packs float32 [N, H, W, C] (or NCHW) into bytes [N, H', W', bytes], or [N, H', W', 2, bytes] for "ternary".

    predicate: when a bit is 1, see `bnncc.dialect.ops.PREDICATES`. padding: pixels added around, all of whose channels
    hold `pad_bit` (0 in both planes for "ternary").
    """
    if data_layout == "NCHW":
        return _pack_nchw(x, layout, predicate, padding, pad_bit)
    batch, height, width, _ = extents(x)
    at_bit = _bits_of(layout, predicate)
    if predicate == "ternary":
        pixels: tuple[int, ...] = (batch, height, width, 2, layout.bytes)
        packed = _packed(lambda n, y, x_, p, byte, v: at_bit(lambda c: x(n, y, x_, c), p, byte, v), pixels, layout)
    else:
        pixels = (batch, height, width, layout.bytes)
        packed = _packed(lambda n, y, x_, byte, v: at_bit(lambda c: x(n, y, x_, c), 0, byte, v), pixels, layout)
    return pad_bits(packed, layout, padding, 0 if predicate == "ternary" else pad_bit)


def _bits_of(layout: BitLayout, predicate: str) -> Callable[[Callable[[Any], Any], Any, Any, Any], Any]:
    """(value of a channel, plane, byte, bit) → ``1 << bit`` or 0."""

    def bit(value: Callable[[Any], Any], plane: Any, byte: Any, v: Any) -> Any:
        channel, inside = _channel(layout, byte, v)
        if predicate != "ternary":
            compare, negated = COMPARE[predicate]
            return _bit(compare(value(channel)), inside, v, negated=negated)
        here, zero = value(channel), tirx.const(0.0, "float32")
        negative = tirx.Select(plane == 1, _bit(here < zero, inside, v), tirx.const(0, "int32"))
        return _bit(here > zero, inside, v) + negative

    return bit


def _pack_nchw(x: te.Tensor, layout: BitLayout, predicate: str, padding: Padding, pad_bit: int) -> te.Tensor:
    """Lanes are pixels here: each gathers the bits of 32 channels in one integer, whose bytes are stored per pixel."""
    batch, _, height, width = extents(x)
    planes = 2 if predicate == "ternary" else 1
    at_bit = _bits_of(layout, predicate)
    size = 4 if layout.bytes % 4 == 0 else 1  # bytes to an integer
    r = te.reduce_axis((0, 8 * size), "r")
    # The last tile of pixels begins early rather than end late, so that all are whole.
    pixels = height * width
    lanes = min(_PLANAR_LANES, pixels)

    def start(tile: Any) -> Any:
        return tile * lanes if pixels % lanes == 0 else tirx.min(tile * lanes, pixels - lanes)

    def word(n: Any, j: Any, tile: Any, lane: Any) -> Any:
        p = start(tile) + lane
        plane, first = tirx.floordiv(j, layout.bytes // size), tirx.floormod(j, layout.bytes // size) * size
        pixel = tirx.floordiv(p, width), tirx.floormod(p, width)
        byte = tirx.floordiv(r, 8)
        bits = at_bit(lambda c: x(n, c, *pixel), plane, first + byte, tirx.floormod(r, 8))
        return te.sum(bits << (byte * 8), axis=[r])

    tiles = -(-pixels // lanes)
    words = staged((batch, planes * layout.bytes // size, tiles, lanes), word, "pack_words", "pack.words")

    def stored(n: Any, y: Any, x_: Any, *at: Any) -> Any:
        byte = at[-1] if planes == 1 else at[0] * layout.bytes + at[1]
        p = y * width + x_
        tile = tirx.floordiv(p, lanes)
        value = words(n, tirx.floordiv(byte, size), tile, p - start(tile))
        return tirx.Cast("uint8", value >> (tirx.floormod(byte, size) * 8))

    shape = (batch, height, width, layout.bytes) if planes == 1 else (batch, height, width, 2, layout.bytes)
    packed = staged(shape, stored, "pack", "pack")
    return pad_bits(packed, layout, padding, 0 if predicate == "ternary" else pad_bit)


def constant_byte(layout: BitLayout, bit: int) -> Callable[[Any], Any]:
    """What a byte holds, by its index, in a pixel whose true channels all hold `bit`."""
    full = layout.group_bytes * 8 == layout.group_channels

    def constant(byte: Any) -> Any:
        if not bit or full:
            return tirx.const(255 if bit else 0, "uint8")
        total: Any = tirx.const(0, "uint8")
        for v in range(8):
            _, inside = _channel(layout, byte, tirx.const(v, "int32"))
            total = total + tirx.Select(inside, tirx.const(1 << v, "uint8"), tirx.const(0, "uint8"))
        return total

    return constant


def pad_bits(x: te.Tensor, layout: BitLayout, padding: Padding, pad_bit: int) -> te.Tensor:
    """Adds pixels around packed bytes [N, H, W, (2,) bytes]; all their true channels hold `pad_bit`."""
    top, left, bottom, right = padding
    if not any(padding):
        return x
    batch, height, width, *rest = extents(x)
    constant = constant_byte(layout, pad_bit)

    def f(n: Any, y: Any, x_: Any, *at: Any) -> Any:
        inside = tirx.all(y >= top, y < top + height, x_ >= left, x_ < left + width)
        return tirx.if_then_else(inside, x(n, y - top, x_ - left, *at), constant(at[-1]))

    return staged((batch, height + top + bottom, width + left + right, *rest), f, "pad_bits", "pad")


def threshold_pack(acc: te.Tensor, t: te.Tensor, layout: BitLayout) -> te.Tensor:
    """Packs int32 accumulators [N, H, W, O] into bytes [N, H, W, bytes]: bit = ``acc >= t[channel]``, t int32 [O]."""
    product = mismatches_of(acc)

    def reached(n: Any, y: Any, x: Any, channel: Any) -> Any:
        if product is None:
            return acc(n, y, x, channel) >= t(channel)
        mismatches, depth = product
        # depth − 2·m >= t with no arithmetic for every pixel. Thresholds out of reach come closer, lest they overflow.
        within = tirx.min(tirx.max(t(channel), -depth), depth + 2)
        return mismatches(n, y, x, channel) <= (depth - within) >> 1

    def bits(n: Any, y: Any, x: Any, byte: Any, v: Any) -> Any:
        channel, inside = _channel(layout, byte, v)
        return _bit(reached(n, y, x, channel), inside, v)

    return _packed(bits, (*extents(acc)[:3], layout.bytes), layout)


def lookup_pack(acc: te.Tensor, table: te.Tensor, layout: BitLayout, *, lowest: int, step: int) -> te.Tensor:
    """Packs int32 accumulators by a table uint8 [O, D]: bit = ``table[channel, (acc − lowest) / step]``.

    For chains between two quantizers that are not monotone. D covers every value that the accumulator can take.
    """

    def bits(n: Any, y: Any, x: Any, byte: Any, v: Any) -> Any:
        channel, inside = _channel(layout, byte, v)
        entry = table(channel, tirx.floordiv(acc(n, y, x, channel) - lowest, step))
        return _bit(entry != tirx.const(0, "uint8"), inside, v)

    return _packed(bits, (*extents(acc)[:3], layout.bytes), layout)


def max_pool2d_bits(
    x: te.Tensor,
    pool_size: tuple[int, int],
    strides: tuple[int, int],
    padding: Padding = (0, 0, 0, 0),
    *,
    planes: int = 1,
    inverted: bool = False,
) -> te.Tensor:
    """Max pooling of ±1 on packed bytes [N, H, W, bytes]: the OR of a window (AND for inverted bits: a minimum).

    planes=2: ternary [N, H, W, 2, bytes]; the maximum is non-zero where any sign bit is set or all values are.
    Pixels of the padding never win.
    """
    top, left, bottom, right = padding
    batch, height, width, *rest = extents(x)
    oh = window(height + top + bottom, pool_size[0], strides[0], 1)
    ow = window(width + left + right, pool_size[1], strides[1], 1)
    word = str(x.dtype)
    ones, zero = tirx.const((1 << int(word.removeprefix("uint"))) - 1, word), tirx.const(0, word)
    any_of = te.comm_reducer(lambda a, b: a | b, lambda _: zero, name="any_of")
    all_of = te.comm_reducer(lambda a, b: a & b, lambda _: ones, name="all_of")

    def pool(reducer: Any, name: str, tail: tuple[int, ...], at: Callable[..., tuple[Any, ...]]) -> Any:
        i, j = te.reduce_axis((0, pool_size[0]), "ky"), te.reduce_axis((0, pool_size[1]), "kx")

        def f(n: Any, y: Any, x_: Any, *inner: Any) -> Any:
            sy = nearest(y * strides[0] + i - top, height, top, bottom)
            sx = nearest(x_ * strides[1] + j - left, width, left, right)
            return reducer(x(n, sy, sx, *at(*inner)), axis=[i, j])

        return staged((batch, oh, ow, *tail), f, name, "reduction")

    if planes == 1:
        return pool(all_of if inverted else any_of, "max_pool2d_bits", tuple(rest), lambda *inner: inner)
    size = rest[-1]
    sign = pool(any_of, "pool_sign", (size,), lambda byte: (0, byte))
    nonzero = pool(all_of, "pool_nonzero", (size,), lambda byte: (1, byte))

    def merged(n: Any, y: Any, x_: Any, plane: Any, byte: Any) -> Any:
        s = sign(n, y, x_, byte)
        return tirx.Select(plane == 0, s, s | nonzero(n, y, x_, byte))

    return te.compute((batch, oh, ow, 2, size), merged, name="max_pool2d_bits")
