"""TE computes of the binary operators: what a kernel means, for any target.

Shapes and the bit convention are those of `bnncc.runtime.bits`: bit 1 is +1, padding bits are 0 in both operands,
``dot = K − 2·popcount(x xor w)``. Activations are NHWC; spatial padding is there already, or said to be read as zeros.
The roles of the stages stand in `bnncc.dialect.stages`, what packs and pools in `computes_pack`.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable
from typing import Any

from tvm import te, tirx

from .computes_pack import constant_byte, lookup_pack, max_pool2d_bits, pack, pad_bits, threshold_pack
from .stages import DEPTH, GROUP, ROLE, STEPS, Padding, extents, staged, window

__all__ = [
    "binary_conv2d", "constant_byte", "extents", "lookup_pack", "max_pool2d_bits", "pack", "pad_bits",
    "padding_correction", "threshold_pack",
]  # fmt: skip

#: What a binary product counts at a time: the bits of each word; those of words that carry-save adders made of more;
#: those of the bytes of each word, added up in bytes where the target has instructions for that.
COUNTING = ("words", "carry_save", "bytes")

#: A byte accumulator holds this many popcounts of one byte; half as many where the terms are signed.
BYTE_STEPS = 31
#: Words that carry-save adders take together: nine become four. Expressions grow with the square of it; twice as many
#: were no faster.
_CARRY_SAVE_WORDS = 9


def _as(dtype: str, value: Any) -> Any:
    return value if str(value.ty.dtype) == dtype else tirx.Cast(dtype, value)


def _chunk_of(depth: int, limit: int) -> int:
    """Length of the longest equal chunks of at most `limit` steps, even if the last chunk has a rest."""
    exact = max(d for d in range(1, limit + 1) if depth % d == 0)
    if exact >= min(depth, 8):
        return exact
    chunks = -(-depth // limit)
    return -(-depth // chunks)


def binary_conv2d(
    x: te.Tensor,
    w: te.Tensor,
    *,
    depth: int,
    out_channels: int,
    strides: tuple[int, int] = (1, 1),
    dilation: tuple[int, int] = (1, 1),
    n_eff: te.Tensor | None = None,
    in_lanes: int = 0,
    counting: str = "words",
    padding: Padding = (0, 0, 0, 0),
) -> te.Tensor:
    """The convolution of ±1 (or −1/0/+1) values as exact int32 dot products [N, OH, OW, out_channels].

    x: words [N, H, W, G·K]; ternary: [N, H, W, 2, G·K], the sign plane and the non-zero plane.
    w: words [G, OB, KH, KW, K, OL], OL output channels beside each other, each group's channels filled up to a multiple
       of OL by zero words; ternary: [G, OB, KH, KW, 2, K, OL].
    depth: true number of terms of one product, KH·KW·C/G; `n_eff` int32 [out_channels] replaces it where ternary
       weights drop terms (and spares counting them).
    in_lanes: if not 0, weights [OB, KH, KW, V, OL, in_lanes] of one group whose last axis are bytes of the reduction:
       those of one pixel (V vectors of them), or, where a pixel has fewer, of neighbouring pixels, with the same
       weights for each.
    padding: pixels around x that are read as words of 0; not with `in_lanes` and "carry_save".
    counting: one of `COUNTING`; the others than "words" where neither operand is ternary and no word is a byte.
    """
    if in_lanes:
        mismatches, blocks, lanes = _lane_counts(x, w, strides, dilation)
        return _dots(mismatches, out_channels, 1, blocks, lanes, depth, n_eff)
    ternary_x, ternary_w = len(x.shape) == 5, len(w.shape) == 7
    batch, height, width = extents(x)[:3]
    groups, blocks, kh, kw, *_, words, lanes = extents(w)
    top, left, bottom, right = padding
    oh = window(height + top + bottom, kh, strides[0], dilation[0])
    ow = window(width + left + right, kw, strides[1], dilation[1])
    signed = ternary_x or (ternary_w and n_eff is None)
    zero = tirx.const(0, str(x.dtype))

    def read(n: Any, y: Any, x_: Any, *at: Any) -> Any:
        if not any(padding):
            return x(n, y, x_, *at)
        inside = tirx.all(y >= top, y < top + height, x_ >= left, x_ < left + width)
        return tirx.if_then_else(inside, x(n, y - top, x_ - left, *at), zero)

    def term(dtype: str) -> Callable[..., Any]:
        def f(n: Any, y: Any, x_: Any, g: Any, b: Any, lane: Any, i: Any, j: Any, k: Any) -> Any:
            pixel = (n, y * strides[0] + i * dilation[0], x_ * strides[1] + j * dilation[1])
            xs = read(*pixel, 0, g * words + k) if ternary_x else read(*pixel, g * words + k)
            ws = w(g, b, i, j, 0, k, lane) if ternary_w else w(g, b, i, j, k, lane)
            differing = xs ^ ws
            if not (ternary_x or ternary_w):
                return _as(dtype, tirx.popcount(differing))
            masks = [read(*pixel, 1, g * words + k)] if ternary_x else []
            masks += [w(g, b, i, j, 1, k, lane)] if ternary_w else []
            mask = masks[0] if len(masks) == 1 else masks[0] & masks[1]
            mismatches = _as(dtype, tirx.popcount(differing & mask))
            if not signed:
                return mismatches
            return _as(dtype, tirx.popcount(mask)) - mismatches - mismatches

        return f

    shape = (batch, oh, ow, groups, blocks, lanes)
    plain = str(x.dtype) != "uint8" and not (ternary_x or ternary_w)
    if counting == "carry_save" and plain:

        def differing(n: Any, y: Any, x_: Any, g: Any, b: Any, lane: Any, i: Any, j: Any, k: Any) -> Any:
            pixel = (n, y * strides[0] + i * dilation[0], x_ * strides[1] + j * dilation[1])
            return x(*pixel, g * words + k) ^ w(g, b, i, j, k, lane)

        counts = _carry_save_counts(shape, (kh, kw, words), differing)
    elif counting == "bytes" and plain:
        counts = _byte_counts(shape, (kh, kw, words), term(str(x.dtype)), str(x.dtype))
    else:
        counts = _popcounts(x.dtype, signed, shape, (kh, kw, words), term)
    return _dots(counts, out_channels, groups, blocks, lanes, None if signed else depth, n_eff)


def _dots(
    counts: te.Tensor, out_channels: int, groups: int, blocks: int, lanes: int, depth: int | None, n_eff: Any
) -> te.Tensor:
    """int32 [N, OH, OW, out_channels] of counts [N, OH, OW, G, OB, OL]: the depth less twice the mismatches; without a
    depth, the counts as they are."""
    shape = (*extents(counts)[:3], out_channels)
    group_out = out_channels // groups

    def narrow(n: Any, y: Any, x_: Any, o: Any) -> Any:
        g, within = (0, o) if groups == 1 else (tirx.floordiv(o, group_out), tirx.floormod(o, group_out))
        b, lane = (0, within) if blocks == 1 else (tirx.floordiv(within, lanes), tirx.floormod(within, lanes))
        return counts(n, y, x_, g, b, lane)

    if str(counts.dtype) == "uint16" and depth is not None and n_eff is None and depth < 1 << 15:

        def short(*at: Any) -> Any:
            count = tirx.Cast("int16", narrow(*at))  # twice as many lanes to a vector
            return tirx.Cast("int32", tirx.const(depth, "int16") - count * tirx.const(2, "int16"))

        return te.compute(shape, short, name="dot")
    mismatches = te.compute(shape, lambda *at: _as("int32", narrow(*at)), name="mismatches")
    if depth is None:
        return mismatches
    if n_eff is not None:
        return te.compute(shape, lambda *at: n_eff(at[-1]) - mismatches(*at) * 2, name="dot")
    return te.compute(shape, lambda *at: depth - mismatches(*at) * 2, name="dot", attrs={DEPTH: depth})


def _lane_counts(
    x: te.Tensor, w: te.Tensor, strides: tuple[int, int], dilation: tuple[int, int]
) -> tuple[te.Tensor, int, int]:
    """Mismatches [N, OH, OW, 1, OB, OL] of bytes [N, H, W, K] and weights [OB, KH, KW, V, OL, 16]; OB; OL.

    Each lane of a vector counts in a byte for itself; a chunk of the reduction is as long as bytes can hold, and the
    chunks' lanes are added up in a wider type.
    """
    batch, height, width, size = extents(x)
    blocks, kh, kw, vectors, channels, lanes = extents(w)
    oh = window(height, kh, strides[0], dilation[0])
    ow = window(width, kw, strides[1], dilation[1])
    pixels = max(1, lanes // size)
    # All of the window, one row of it, or a part of one position: the largest that a byte can count.
    rows, cols, part = kh, kw, vectors
    if rows * cols * part > BYTE_STEPS:
        rows = 1
    if cols * part > BYTE_STEPS:
        cols = 1
    if part > BYTE_STEPS:
        part = max(d for d in range(1, BYTE_STEPS + 1) if part % d == 0)
    chunks = (kh // rows, kw // cols, vectors // part)
    axes = [
        te.reduce_axis((0, extent), name) for extent, name in zip((rows, cols, part), ("ky", "kx", "k"), strict=True)
    ]

    def count(n: Any, y: Any, x_: Any, b: Any, cy: Any, cx: Any, ck: Any, o: Any, lane: Any) -> Any:
        i, j, k = cy * rows + axes[0], cx * cols + axes[1], ck * part + axes[2]
        row, col = y * strides[0] + i * dilation[0], x_ * (pixels * strides[1]) + j * dilation[1]
        if pixels > 1:
            xs = x(n, row, col + tirx.floordiv(lane, size), tirx.floormod(lane, size))
        else:
            xs = x(n, row, col, k * lanes + lane)
        return te.sum(tirx.popcount(xs ^ w(b, i, j, k, o, lane)), axis=axes)

    counts = te.compute(
        (batch, oh, ow // pixels, blocks, *chunks, channels, lanes),
        count,
        name="binary_conv2d_lanes",
        attrs={ROLE: "binary_conv2d.lanes"},
    )
    run = lanes // pixels
    wide = "uint16" if 8 * kh * kw * vectors * run < 1 << 16 else "uint32"
    outer = [te.reduce_axis((0, extent), name) for extent, name in zip(chunks, ("cy", "cx", "ck"), strict=True)]
    within = te.reduce_axis((0, run), "lane")

    def total(n: Any, y: Any, x_: Any, _: Any, b: Any, o: Any) -> Any:
        vector, pixel = (x_, 0) if pixels == 1 else (tirx.floordiv(x_, pixels), tirx.floormod(x_, pixels))
        return te.sum(_as(wide, counts(n, y, vector, b, *outer, o, pixel * run + within)), axis=[*outer, within])

    totals = te.compute(
        (batch, oh, ow, 1, blocks, channels),
        total,
        name="binary_conv2d_total",
        attrs={ROLE: "binary_conv2d.lane_total", STEPS: rows * cols * part},
    )
    return totals, blocks, channels


def _carry_save_counts(
    shape: tuple[int, ...], reduced: tuple[int, int, int], differing: Callable[..., Any]
) -> te.Tensor:
    """The popcounts of ``differing(*at, i, j, k)`` summed over (KH, KW, K), by fewer of them.

    The words of a step of the reduction go through carry-save adders (Harley and Seal; Warren, Hacker's Delight, 5-1).
    """
    kh, kw, words = reduced
    rows = kh if kh * kw <= _CARRY_SAVE_WORDS else 1
    cols = kw if kw <= _CARRY_SAVE_WORDS else 1
    part = max(d for d in range(1, words + 1) if words % d == 0 and rows * cols * d <= _CARRY_SAVE_WORDS)
    steps = (kh // rows, kw // cols, words // part)
    axes = [te.reduce_axis((0, extent), name) for extent, name in zip(steps, ("ky", "kx", "k"), strict=True)]

    def group(*at: Any) -> Any:
        i, j, k = axes
        weights = _carry_saved(
            [
                differing(*at, i * rows + row, j * cols + col, k * part + word)
                for row, col, word in itertools.product(range(rows), range(cols), range(part))
            ]
        )
        total: Any = None
        for of_weight in reversed(weights):
            counts = [tirx.popcount(word) for word in of_weight]
            total = functools.reduce(operator.add, counts if total is None else [total + total, *counts])
        return total

    return te.compute(
        shape,
        lambda *at: te.sum(group(*at), axis=axes),
        name="binary_conv2d",
        attrs={ROLE: "binary_conv2d", GROUP: rows * cols * part},
    )


def _carry_saved(words: list[Any]) -> list[list[Any]]:
    """Lists of at most two words, the bits in the n-th of which count 2ⁿ; together as many as are set in `words`."""
    result = []
    while words:
        carries = []
        while len(words) >= 3:
            a, b, c, *words = words
            words.append(a ^ b ^ c)
            carries.append((a & b) | (c & (a | b)))
        result.append(words)
        words = carries
    return result


def _byte_counts(
    shape: tuple[int, ...], reduced: tuple[int, int, int], term: Callable[..., Any], word: str
) -> te.Tensor:
    """Sums `term`, popcounts of words, over (KH, KW, K), in chunks whose counts of a byte fit into a byte."""
    kh, kw, words = reduced
    *outer, lanes = shape
    rows = max((r for r in range(1, kh + 1) if kh % r == 0 and r * kw * words <= BYTE_STEPS), default=0)
    size = _chunk_of(words, BYTE_STEPS)
    window = (rows, kw, words) if rows else (1, 1, size)
    parts = (kh // rows, 1, 1) if rows else (kh, kw, -(-words // size))
    i, j, k = (te.reduce_axis((0, extent), name) for extent, name in zip(window, ("ky", "kx", "k"), strict=True))

    def chunk(*axes: Any) -> Any:
        *at, y, x, part, lane = axes
        if rows or words % size == 0:
            value = term(*at, lane, y * window[0] + i, x + j, part * size + k)
        else:  # the last one has a rest
            inside = part * size + k < words
            word_at = tirx.min(part * size + k, words - 1)
            value = tirx.if_then_else(inside, term(*at, lane, y + i, x + j, word_at), tirx.const(0, word))
        return te.sum(value, axis=[i, j, k])

    chunks = staged((*outer, *parts, lanes), chunk, "binary_conv2d_bytes", "binary_conv2d.bytes")
    among = [te.reduce_axis((0, extent), name) for extent, name in zip(parts, ("y", "x", "part"), strict=True)]
    return staged(
        shape,
        lambda *axes: te.sum(chunks(*axes[:-1], *among, axes[-1]), axis=among),
        "binary_conv2d_total",
        "binary_conv2d.total",
    )


def _popcounts(
    word: str, signed: bool, shape: tuple[int, ...], reduced: tuple[int, int, int], term: Callable[[str], Any]
) -> te.Tensor:
    """Sums `term` over (KH, KW, K): at once in the word's own width, or for bytes in chunks that a byte can hold."""
    kh, kw, words = reduced
    if str(word) != "uint8":
        dtype = str(word).replace("uint", "int") if signed else str(word)
        i, j, k = (te.reduce_axis((0, extent), name) for extent, name in zip(reduced, ("ky", "kx", "k"), strict=True))
        f = term(dtype)
        return staged(shape, lambda *axes: te.sum(f(*axes, i, j, k), axis=[i, j, k]), "binary_conv2d", "binary_conv2d")
    narrow = "int8" if signed else "uint8"
    limit = BYTE_STEPS // 2 if signed else BYTE_STEPS
    most = 8 * kh * kw * words
    wide = ("int16" if most < 1 << 15 else "int32") if signed else ("uint16" if most < 1 << 16 else "uint32")
    f = term(narrow)
    if kw * words <= limit:  # one row of the window to a chunk
        j, k = te.reduce_axis((0, kw), "kx"), te.reduce_axis((0, words), "k")
        outer = te.reduce_axis((0, kh), "ky")
        chunks = staged(
            (*shape, kh),
            lambda *axes: te.sum(f(*axes, j, k), axis=[j, k]),
            "binary_conv2d_chunk",
            "binary_conv2d.chunk",
        )
        reduction = [outer]
    else:  # a part of one position's words to a chunk
        size = _chunk_of(words, limit)
        k = te.reduce_axis((0, size), "k")
        count = -(-words // size)

        def chunk(*axes: Any) -> Any:
            *at, i, j, c = axes
            if count * size == words:
                return te.sum(f(*at, i, j, c * size + k), axis=[k])
            inside = c * size + k < words
            return te.sum(
                tirx.if_then_else(inside, f(*at, i, j, tirx.min(c * size + k, words - 1)), tirx.const(0, narrow)),
                axis=[k],
            )

        chunks = staged((*shape, kh, kw, count), chunk, "binary_conv2d_chunk", "binary_conv2d.chunk")
        reduction = [te.reduce_axis((0, e), n) for e, n in ((kh, "ky"), (kw, "kx"), (count, "c"))]
    return staged(
        shape,
        lambda *axes: te.sum(_as(wide, chunks(*axes, *reduction)), axis=reduction),
        "binary_conv2d_total",
        "binary_conv2d.total",
    )


def padding_correction(
    dot: te.Tensor, correction: te.Tensor, rows: te.Tensor, cols: te.Tensor, images: te.Tensor | None = None
) -> te.Tensor:
    """Adds what zero padding leaves out of an input padded with −1: ``dot + correction[rows[y], cols[x], o]``.

    correction: int32 [row classes, column classes, O]; rows int32 [OH] and cols int32 [OW] give the class of a pixel,
    that is which of the window's rows and columns lie outside. images int32 [N]: the same for the depth of 3-D
    convolutions, a first axis of `correction`.
    """

    def corrected(n: Any, y: Any, x: Any, o: Any) -> Any:
        image = () if images is None else (images(n),)
        return dot(n, y, x, o) + correction(*image, rows(y), cols(x), o)

    return te.compute(dot.shape, corrected, name="padding_correction")
