"""ONNX operators that move values: shapes, slices, padding, resizing, in Relax."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op as R

from bnncc.frontends.converter import Unsupported
from bnncc.frontends.onnx_converter import Node, converts, shape_of


@converts("Reshape")
def _reshape(n: Node) -> relax.Expr:
    x = n.input()
    wanted = [int(extent) for extent in n.setting("shape", 1)]
    if not n.attr("allowzero", 0):
        wanted = [shape_of(x)[axis] if extent == 0 else extent for axis, extent in enumerate(wanted)]
    if -1 in wanted:
        known = int(np.prod([extent for extent in wanted if extent != -1]))
        wanted[wanted.index(-1)] = int(np.prod(shape_of(x))) // known
    return R.reshape(x, wanted)


@converts("Flatten")
def _flatten(n: Node) -> relax.Expr:
    shape = shape_of(n.input())
    axis = n.attr("axis", 1)
    axis = axis + len(shape) if axis < 0 else axis
    return R.reshape(n.input(), (int(np.prod(shape[:axis])), int(np.prod(shape[axis:]))))


@converts("Squeeze")
def _squeeze(n: Node) -> relax.Expr:
    shape = shape_of(n.input())
    axes = n.setting("axes", 1)
    dropped = {a % len(shape) for a in axes} if axes is not None else {a for a, e in enumerate(shape) if e == 1}
    return R.reshape(n.input(), [extent for axis, extent in enumerate(shape) if axis not in dropped])


@converts("Unsqueeze")
def _unsqueeze(n: Node) -> relax.Expr:
    shape, axes = list(shape_of(n.input())), n.setting("axes", 1)
    rank = len(shape) + len(axes)
    for axis in sorted(a % rank for a in axes):
        shape.insert(axis, 1)
    return R.reshape(n.input(), shape)


@converts("Transpose")
def _transpose(n: Node) -> relax.Expr:
    rank = len(shape_of(n.input()))
    return R.permute_dims(n.input(), list(n.attr("perm", range(rank)[::-1])))


@converts("Expand")
def _expand(n: Node) -> relax.Expr:
    wanted = n.constant(1, "shape").tolist()
    return R.broadcast_to(n.input(), np.broadcast_shapes(shape_of(n.input()), tuple(wanted)))


@converts("Concat")
def _concat(n: Node) -> relax.Expr:
    # Empty tensors, which some exporters leave behind, have no elements to add.
    parts = [n.input(i) for i in range(len(n.inputs)) if 0 not in shape_of(n.input(i))]
    axis = n.attr("axis") % len(shape_of(parts[0]))
    return R.concat(parts, axis) if len(parts) > 1 else parts[0]


@converts("Split")
def _split(n: Node) -> list[relax.Expr]:
    x = n.input()
    axis = n.attr("axis", 0) % len(shape_of(x))
    extent = shape_of(x)[axis]
    sizes = n.setting("split", 1)
    if sizes is None:
        piece = -(-extent // n.outputs)
        sizes = [min(piece, extent - piece * i) for i in range(n.outputs)]
    ends = np.cumsum(sizes).tolist()
    return [R.strided_slice(x, [axis], [end - size], [end]) for end, size in zip(ends, sizes, strict=True)]


@converts("Slice")
def _slice(n: Node) -> relax.Expr:
    x = n.input()
    shape = shape_of(x)
    starts, ends = n.setting("starts", 1), n.setting("ends", 2)
    axes = n.setting("axes", 3)
    axes = range(len(starts)) if axes is None else [axis % len(shape) for axis in axes]
    steps = n.setting("steps", 4) or [1] * len(starts)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        # A reversed slice that ends before the first element says so by a very negative end.
        end = None if step < 0 and end < -shape[axis] else end
        begin, stop, step = slice(start, end, step).indices(shape[axis])
        x = _picked(n, x, axis, range(begin, stop, step))
    return x


def _picked(n: Node, x: relax.Expr, axis: int, positions: Sequence[int]) -> relax.Expr:
    """The elements at these positions of one axis."""
    x, positions = n.bound(x), list(positions)
    if positions == list(range(shape_of(x)[axis])):
        return x
    steps = set(np.diff(positions).tolist())
    if not positions:
        raise Unsupported("its result is empty")
    if len(positions) == 1 or (len(steps) == 1 and min(steps) > 0):
        step = steps.pop() if steps else 1
        return R.strided_slice(x, [axis], [positions[0]], [positions[-1] + 1], [step])
    return R.take(x, relax.const(np.array(positions, "int64")), axis, mode="fast")


@converts("Gather")
def _gather(n: Node) -> relax.Expr:
    x = n.input()
    axis = n.attr("axis", 0) % len(shape_of(x))
    indices = n.constant(1, "indices") % shape_of(x)[axis]
    picked = _picked(n, x, axis, indices.reshape(-1).tolist())
    if indices.ndim == 1:
        return picked
    shape = shape_of(x)
    return R.reshape(n.bound(picked), (*shape[:axis], *indices.shape, *shape[axis + 1 :]))


@converts("Tile")
def _tile(n: Node) -> relax.Expr:
    x = n.input()
    for axis, count in enumerate(n.constant(1, "repeats").tolist()):
        if count > 1:
            x = n.emit(R.concat([x] * count, axis))
    return x


@converts("Pad")
def _pad(n: Node) -> relax.Expr:
    x = n.input()
    shape = shape_of(x)
    widths = n.attr("paddings") or n.setting("pads", 1)
    axes = [axis % len(shape) for axis in n.constant(3, "axes").tolist()] if n.has(3) else range(len(shape))
    before, after = [0] * len(shape), [0] * len(shape)
    for position, axis in enumerate(axes):
        before[axis], after[axis] = int(widths[position]), int(widths[position + len(axes)])
    mode = n.attr("mode", "constant")
    if mode != "constant":
        return _pad_by_position(n, x, before, after, mode)
    for axis, extent in enumerate(shape):
        x = _picked(n, x, axis, range(max(0, -before[axis]), extent - max(0, -after[axis])))
    positive = [max(0, width) for pair in zip(before, after, strict=True) for width in pair]
    if not any(positive):
        return x
    value = n.constant(2, "padding value").item() if n.has(2) else n.attr("value", 0.0)
    return R.nn.pad(n.bound(x), positive, "constant", value)


def _pad_by_position(n: Node, x: relax.Expr, before: list[int], after: list[int], mode: str) -> relax.Expr:
    if mode not in ("edge", "reflect", "wrap") or min(*before, *after) < 0:
        raise Unsupported(f"mode '{mode}', widths {before} and {after}; supported are constant, edge, reflect and wrap")
    for axis, pair in enumerate(zip(before, after, strict=True)):
        positions: Any = np.arange(shape_of(n.input())[axis])
        x = _picked(n, x, axis, np.pad(positions, pair, mode).tolist())  # type: ignore[call-overload]
    return x


@converts("DepthToSpace")
def _depth_to_space(n: Node) -> relax.Expr:
    batch, channels, height, width = shape_of(n.input())
    size = n.attr("blocksize")
    rest = channels // size**2
    if n.attr("mode", "DCR") == "DCR":
        split, order = (batch, size, size, rest, height, width), [0, 3, 4, 1, 5, 2]
    else:
        split, order = (batch, rest, size, size, height, width), [0, 1, 4, 2, 5, 3]
    moved = n.emit(R.permute_dims(n.emit(R.reshape(n.input(), split)), order))
    return R.reshape(moved, (batch, rest, height * size, width * size))


@converts("SpaceToDepth")
def _space_to_depth(n: Node) -> relax.Expr:
    batch, channels, height, width = shape_of(n.input())
    size = n.attr("blocksize")
    split = (batch, channels, height // size, size, width // size, size)
    moved = n.emit(R.permute_dims(n.emit(R.reshape(n.input(), split)), [0, 3, 5, 1, 2, 4]))
    return R.reshape(moved, (batch, channels * size**2, height // size, width // size))


_ROUNDED: dict[str, Any] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - np.float32(0.5)),
    "round_prefer_ceil": lambda x: np.floor(x + np.float32(0.5)),
}


@converts("Resize", "Upsample")
def _resize(n: Node) -> relax.Expr:
    x = n.input()
    shape = shape_of(x)
    if n.attr("mode", "nearest") != "nearest":
        raise Unsupported(f"mode '{n.attr('mode')}'; supported is nearest")
    if n.attr("keep_aspect_ratio_policy", "stretch") != "stretch":
        raise Unsupported("keep_aspect_ratio_policy; supported is stretch")
    first = n.opset <= 10  # X, scales; later X, roi, scales, sizes
    axes = n.attr("axes", range(len(shape)))
    scales = n.attr("scales") or n.constants[1 if first else 2]
    if scales is not None and len(scales):
        per_axis = {axis % len(shape): float(scale) for axis, scale in zip(axes, scales, strict=True)}
        sizes = {axis: int(np.floor(shape[axis] * scale)) for axis, scale in per_axis.items()}
    else:
        sizes = {axis % len(shape): int(s) for axis, s in zip(axes, n.constant(3, "sizes"), strict=True)}
        per_axis = {axis: size / shape[axis] for axis, size in sizes.items()}
    coordinates = n.attr("coordinate_transformation_mode", "asymmetric" if first else "half_pixel")
    rounded = _ROUNDED[n.attr("nearest_mode", "floor" if first else "round_prefer_floor")]
    for axis, size in sizes.items():
        positions = rounded(_sources(shape[axis], size, per_axis[axis], coordinates))
        x = _picked(n, x, axis, np.clip(positions, 0, shape[axis] - 1).astype(int).tolist())
    return x


def _sources(extent: int, size: int, scale: float, coordinates: str) -> np.ndarray:
    """Where in the input each output element lies, in float32 as ONNX Runtime computes it."""
    at, ratio, half = np.arange(size, dtype="float32"), np.float32(scale), np.float32(0.5)
    if coordinates == "asymmetric":
        return at / ratio
    if coordinates == "align_corners":
        return at * np.float32(extent - 1) / np.float32(size - 1) if size > 1 else at * 0
    if coordinates == "half_pixel" or (coordinates == "pytorch_half_pixel" and size > 1):
        return (at + half) / ratio - half
    if coordinates == "pytorch_half_pixel":
        return at * 0
    raise Unsupported(
        f"coordinate_transformation_mode '{coordinates}'; supported are asymmetric, half_pixel, pytorch_half_pixel and "
        "align_corners"
    )


@converts("ArgMax")
def _argmax(n: Node) -> relax.Expr:
    if n.attr("select_last_index", 0):
        raise Unsupported("select_last_index; supported is the first index")
    return R.argmax(n.input(), n.attr("axis", 0) % len(shape_of(n.input())), bool(n.attr("keepdims", 1)))
