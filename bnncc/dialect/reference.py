"""What the dialect's kernels mean, in plain NumPy on the values themselves, and how their operands are laid out.

The tests hold every kernel to these functions; the passes use the packing functions for weights. Nothing here is fast.
"""

from __future__ import annotations

import numpy as np

from bnncc.runtime.bits import BitLayout

Array = np.ndarray


def signs(x: Array, predicate: str) -> Array:
    """x as −1/+1 (−1/0/+1 for "ternary") int8, by the predicates of `bnncc.dialect.ops.PREDICATES`."""
    if predicate == "ternary":
        return ((x > 0).astype(np.int8) - (x < 0)).astype(np.int8)
    bit = {"not_lt": ~(x < 0), "gt": x > 0, "ge": x >= 0, "not_le": ~(x <= 0)}[predicate]
    return np.where(bit, 1, -1).astype(np.int8)


def pad_pixels(x: Array, padding: tuple[int, int, int, int], value: float) -> Array:
    """Pads [N, H, W, …] by (top, left, bottom, right) pixels of `value`."""
    top, left, bottom, right = padding
    widths = [(0, 0), (top, bottom), (left, right)] + [(0, 0)] * (x.ndim - 3)
    return np.pad(x, widths, constant_values=value)


def pack_signs(values: Array, layout: BitLayout) -> Array:
    """Packs −1/+1 [..., C] into words [..., words]."""
    return layout.pack(values > 0)


def pack_ternary(values: Array, layout: BitLayout) -> Array:
    """Packs −1/0/+1 [..., C] into words [..., 2, words]: the sign plane, then the non-zero plane."""
    return np.stack([layout.pack(values > 0), layout.pack(values != 0)], axis=-2)


def conv2d(
    x: Array, w: Array, strides: tuple[int, int] = (1, 1), dilation: tuple[int, int] = (1, 1), groups: int = 1
) -> Array:
    """The convolution of x [N, H, W, C], padded already, by w [O, C/groups, KH, KW] → [N, OH, OW, O].

    Integers are summed as int64, floats as float64.
    """
    n, h, width, _ = x.shape
    o, depth, kh, kw = w.shape
    oh = (h - dilation[0] * (kh - 1) - 1) // strides[0] + 1
    ow = (width - dilation[1] * (kw - 1) - 1) // strides[1] + 1
    wide = np.float64 if x.dtype.kind == "f" else np.int64
    y = np.zeros((n, oh, ow, groups, o // groups), wide)
    x_ = x.astype(wide).reshape(n, h, width, groups, depth)
    w_ = w.astype(wide).reshape(groups, o // groups, depth, kh, kw)
    for i in range(kh):
        for j in range(kw):
            rows = slice(i * dilation[0], i * dilation[0] + (oh - 1) * strides[0] + 1, strides[0])
            cols = slice(j * dilation[1], j * dilation[1] + (ow - 1) * strides[1] + 1, strides[1])
            y += np.einsum("nyxgc,goc->nyxgo", x_[:, rows, cols], w_[..., i, j], optimize=True)
    return y.reshape(n, oh, ow, o)


def block_outputs(w: Array, groups: int, lanes: int) -> Array:
    """[O, …] → [G, OB, …, lanes]: a group's outputs in blocks of `lanes`, filled up by zeros."""
    group_out = w.shape[0] // groups
    blocks = -(-group_out // lanes)
    padded = np.zeros((groups, blocks * lanes, *w.shape[1:]), w.dtype)
    padded[:, :group_out] = w.reshape(groups, group_out, *w.shape[1:])
    blocked = padded.reshape(groups, blocks, lanes, *w.shape[1:])
    return np.ascontiguousarray(np.moveaxis(blocked, 2, -1))


def pack_conv_weights(w: Array, layout: BitLayout, lanes: int, *, ternary: bool = False) -> Array:
    """±1 weights [O, C/groups, KH, KW] as words [G, OB, KH, KW, (2,) K, lanes]; `layout` is that of the activations."""
    own = BitLayout(layout.group_channels, 1, layout.word_bits, layout.lanes)
    by_pixel = np.moveaxis(w, 1, -1)
    packed = pack_ternary(by_pixel, own) if ternary else pack_signs(by_pixel, own)
    return block_outputs(packed, layout.groups, lanes)


def block_conv_weights(w: Array, groups: int, lanes: int) -> Array:
    """Float weights [O, C/groups, KH, KW] as [G, OB, KH, KW, CI, lanes]."""
    return block_outputs(np.moveaxis(w, 1, -1), groups, lanes)


def block_dense_weights(w: Array, lanes: int) -> Array:
    """Float weights [O, K] as [OB, K, lanes]."""
    return block_outputs(w, 1, lanes)[0]


def pack_weight_signs(w: Array, groups: int, lanes: int) -> Array:
    """±1 weights [O, C/groups, KH, KW] as the bits that `unpack_weights` reads: [G, OB, KH, KW, CI, ⌈lanes/8⌉]."""
    blocked = block_conv_weights((w > 0).astype(np.uint8), groups, lanes)
    return np.packbits(blocked, axis=-1, bitorder="little")


def max_pool(x: Array, pool: tuple[int, int], strides: tuple[int, int], padding: tuple[int, int, int, int]) -> Array:
    """Maximum over windows of [N, H, W, C]; the padding never wins, NaN always does."""
    lowest = -np.inf if x.dtype.kind == "f" else np.iinfo(x.dtype).min
    x = pad_pixels(x, padding, lowest)
    oh, ow = ((x.shape[1 + d] - pool[d]) // strides[d] + 1 for d in (0, 1))
    windows = [
        x[:, i : i + (oh - 1) * strides[0] + 1 : strides[0], j : j + (ow - 1) * strides[1] + 1 : strides[1]]
        for i in range(pool[0])
        for j in range(pool[1])
    ]
    return np.maximum.reduce(windows)
