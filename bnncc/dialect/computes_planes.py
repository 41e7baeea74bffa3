"""TE computes on bit planes: k-bit values packed plane by plane, and their convolution as popcounts of plane pairs.

An activation's value is an index into its levels, ``a = Σ 2^i · a_i``. Weights are integers in one of two forms:

    "xor"   odd integers, ``w = Σ 2^j · (2·w_j − 1)``: ``Σ a·w`` is a constant of the channel minus
            ``Σ_ij 2^(i+j) · popcount(a_i xor w_j)``
    "and"   two's complement, ``w = Σ 2^j · w_j``, the last plane negative:
            ``Σ a·w = Σ_ij ±2^(i+j) · popcount(a_i and w_j)``

so that nothing but popcounts depends on the data. Both are ``base[channel] + factor · S`` with S the weighted sum of
popcounts. Roles and layouts are those of `binary_conv2d`; planes are an axis before the words, as in ternary values.
"""

from __future__ import annotations

from typing import Any

from tvm import te, tirx

from bnncc.runtime.bits import BitLayout

from .computes import BYTE_STEPS, _as, _chunk_of
from .computes_pack import _bit, _channel, _packed, pad_bits
from .stages import FORM, ROLE, Padding, extents, staged, window


def pack_levels(
    x: te.Tensor, lowest: Any, inverse: Any, layout: BitLayout, *, planes: int, padding: Padding
) -> te.Tensor:
    """Packs the levels of quantized values float32 [N, H, W, C] into bytes [N, H', W', planes, bytes].

    The level of x is ``nearbyint((x − lowest) · inverse)``, clamped to what the planes can hold; `lowest` and
    `inverse`, one over the distance of two levels, are float32 numbers. Pixels of the padding have level 0.
    """
    batch, height, width, channels = extents(x)
    most = tirx.const(float((1 << planes) - 1), "float32")
    zero = tirx.const(0.0, "float32")

    def level(*at: Any) -> Any:
        steps = tirx.nearbyint((x(*at) - lowest) * inverse)
        return tirx.Cast("uint8", tirx.Select(steps > zero, tirx.Select(steps < most, steps, most), zero))

    # In memory, so that what gives x is computed once and not for every plane.
    levels = staged((batch, height, width, channels), level, "levels", "levels")

    def bit(n: Any, y: Any, x_: Any, plane: Any, byte: Any, v: Any) -> Any:
        channel, inside = _channel(layout, byte, v)
        mask = tirx.const(1, "uint8") << tirx.Cast("uint8", plane)
        return _bit((levels(n, y, x_, channel) & mask) != tirx.const(0, "uint8"), inside, v)

    return pad_bits(_packed(bit, (batch, height, width, planes, layout.bytes), layout), layout, padding, 0)


def plane_conv2d(
    x: te.Tensor,
    w: te.Tensor,
    base: te.Tensor,
    *,
    out_channels: int,
    factor: int,
    form: str,
    strides: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
) -> te.Tensor:
    """The convolution of quantized values as exact int32 [N, OH, OW, out_channels]: ``base + factor · S``.

    x: words [N, H, W, P, G·K], already padded. w: words [G, OB, KH, KW, Q, K, OL], OL output channels side by side.
    base: int32 [out_channels]. form: "xor", "and", or "and-" where the last plane of the weights is negative.
    """
    batch, height, width, planes, _ = extents(x)
    groups, blocks, kh, kw, weight_planes, words, lanes = extents(w)
    oh, ow = window(height, kh, strides[0], dilation[0]), window(width, kw, strides[1], dilation[1])
    group_out = out_channels // groups
    narrow = str(x.dtype)

    def term(n: Any, y: Any, x_: Any, g: Any, b: Any, lane: Any, pair: Any, i: Any, j: Any, k: Any) -> Any:
        pixel = (n, y * strides[0] + i * dilation[0], x_ * strides[1] + j * dilation[1])
        a = x(*pixel, tirx.floordiv(pair, weight_planes), g * words + k)
        v = w(g, b, i, j, tirx.floormod(pair, weight_planes), k, lane)
        return _as(narrow, tirx.popcount(a ^ v if form == "xor" else a & v))

    counts, reduction = _counts(
        term, (batch, oh, ow, groups, blocks, lanes, planes * weight_planes), (kh, kw, words), narrow
    )
    pair, *inner = reduction
    wide = "int64" if narrow == "uint64" else "int32"

    def weighted(*axes: Any) -> Any:
        shift = tirx.floordiv(pair, weight_planes) + tirx.floormod(pair, weight_planes)
        value = _as(wide, counts(*axes, pair, *inner)) << tirx.Cast(wide, shift)
        if form != "and-":
            return value
        return tirx.Select(tirx.floormod(pair, weight_planes) == weight_planes - 1, tirx.const(0, wide) - value, value)

    total = te.compute(
        (batch, oh, ow, groups, blocks, lanes),
        lambda *axes: te.sum(weighted(*axes), axis=list(reduction)),
        name="plane_conv2d",
        attrs={ROLE: "binary_conv2d.total", FORM: form},
    )

    def result(n: Any, y: Any, x_: Any, o: Any) -> Any:
        g, within = (0, o) if groups == 1 else (tirx.floordiv(o, group_out), tirx.floormod(o, group_out))
        b, lane = (0, within) if blocks == 1 else (tirx.floordiv(within, lanes), tirx.floormod(within, lanes))
        return base(o) + _as("int32", total(n, y, x_, g, b, lane)) * factor

    return te.compute((batch, oh, ow, out_channels), result, name="planes_dot")


def _counts(
    term: Any, shape: tuple[int, ...], reduced: tuple[int, int, int], word: str
) -> tuple[te.Tensor, list[te.IterVar]]:
    """The popcounts of each pair of planes, [*shape, …], and the axes that are left to sum over, the pair's first.

    Words of bytes count in bytes, in chunks that a byte can hold.
    """
    kh, kw, words = reduced
    axis, role = te.reduce_axis, "binary_conv2d.chunk"
    pair = axis((0, shape[-1]), "pair")
    if word != "uint8":
        i, j, k = axis((0, kh), "ky"), axis((0, kw), "kx"), axis((0, words), "k")
        counts = staged(shape, lambda *at: te.sum(term(*at, i, j, k), axis=[i, j, k]), "plane_counts", role)
        return counts, [pair]
    if kw * words <= BYTE_STEPS:
        j, k = axis((0, kw), "kx"), axis((0, words), "k")
        counts = staged((*shape, kh), lambda *at: te.sum(term(*at, j, k), axis=[j, k]), "plane_counts", role)
        return counts, [pair, axis((0, kh), "ky")]
    size = _chunk_of(words, BYTE_STEPS)
    chunks = -(-words // size)
    k = axis((0, size), "k")

    def chunk(*at: Any) -> Any:
        *outer, c = at
        if chunks * size == words:
            return te.sum(term(*outer, c * size + k), axis=[k])
        value = term(*outer, tirx.min(c * size + k, words - 1))
        return te.sum(tirx.if_then_else(c * size + k < words, value, tirx.const(0, word)), axis=[k])

    counts = staged((*shape, kh, kw, chunks), chunk, "plane_counts", role)
    return counts, [pair, axis((0, kh), "ky"), axis((0, kw), "kx"), axis((0, chunks), "c")]
