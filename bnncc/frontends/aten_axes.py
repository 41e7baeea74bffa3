"""ATen operators that read other positions along the axes of a tensor, in Relax.

Padding by reflection, replication or wrapping around, rolling, nearest interpolation and constant indices are gathers
along one axis after the other; linear and cubic interpolation are weighted sums of a few positions, adaptive pooling is
a pool over windows of differing sizes. Which positions and weights those are is asked of PyTorch itself, by running the
operator on the numbers 0, 1, 2, … or on unit vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tvm import relax
from tvm.relax import op as R

from bnncc.dialect import ops as dialect
from bnncc.frontends.aten_layers import batched
from bnncc.frontends.converter import Emitter, Unsupported, converts


def _extents(x: relax.Expr) -> list[int]:
    return [int(extent) for extent in x.ty.shape]


def _gathered(e: Emitter, x: relax.Expr, positions: dict[int, torch.Tensor]) -> relax.Expr:
    """x at some positions of some axes: int vectors, taken one axis after the other. No axis: x itself."""
    for axis, index in positions.items():
        if index.numel() == 0:
            raise Unsupported("it returns an empty tensor")
        if torch.equal(index, torch.arange(_extents(x)[axis])):
            continue
        x = e.emit(R.take(x, relax.const(index.numpy().astype("int32")), axis))
    return x


def _counting(size: int) -> torch.Tensor:
    """0, 1, … as a one-channel signal [1, 1, size]."""
    return torch.arange(size, dtype=torch.float32)[None, None]


@converts("pad.default")
def _pad(e: Emitter, a: Any) -> relax.Expr:
    """By the other modes than constant; `export_model` spells that one `constant_pad_nd`."""
    pairs = list(zip(a.pad[0::2], a.pad[1::2], strict=True))
    shape = _extents(a.self)
    positions = {}
    for back, (before, after) in enumerate(pairs):
        axis = len(shape) - 1 - back
        positions[axis] = F.pad(_counting(shape[axis]), (before, after), mode=a.mode)[0, 0].long()
    return _gathered(e, a.self, positions)


@converts("repeat.default")
def _repeat(e: Emitter, a: Any) -> relax.Expr:
    shape = [1] * (len(a.repeats) - a.self.ty.ndim) + _extents(a.self)
    apart = e.emit(R.reshape(a.self, [size for extent in shape for size in (1, extent)]))
    copies = [size for count, extent in zip(a.repeats, shape, strict=True) for size in (count, extent)]
    return R.reshape(e.emit(R.broadcast_to(apart, copies)), e.shape)


@converts("roll.default")
def _roll(e: Emitter, a: Any) -> relax.Expr:
    shape = _extents(a.self)
    if not a.dims:
        flat = e.emit(R.reshape(a.self, [int(np.prod(shape))]))
        rolled = _gathered(e, flat, {0: torch.arange(int(np.prod(shape))).roll(a.shifts[0])})
        return R.reshape(rolled, shape)
    positions: dict[int, torch.Tensor] = {}
    for shift, dim in zip(a.shifts, a.dims, strict=True):
        axis = dim % len(shape)
        positions[axis] = positions.get(axis, torch.arange(shape[axis])).roll(shift)
    return _gathered(e, a.self, positions)


@converts("index_select.default")
def _index_select(e: Emitter, a: Any) -> relax.Expr:
    return _indexed(e, a.self, {a.dim % max(a.self.ty.ndim, 1): a.index})


@converts("index.Tensor")
def _index(e: Emitter, a: Any) -> relax.Expr:
    return _indexed(e, a.self, {axis: index for axis, index in enumerate(a.indices) if index is not None})


def _indexed(e: Emitter, x: relax.Expr, indices: dict[int, relax.Expr]) -> relax.Expr:
    """x[…, index, …]: by constants, or by one tensor along one axis."""
    shape = _extents(x)
    known = {axis: e.value(index) for axis, index in indices.items()}
    if len(indices) == 1:
        ((axis, index),) = indices.items()
        if known[axis] is None:
            return R.take(x, _wrapped(e, index, shape[axis]), axis)
    if any(value is None for value in known.values()):
        raise Unsupported("several index tensors of which some are computed; index one axis at a time, or by constants")
    constants = {axis: _positions(value, shape[axis]) for axis, value in known.items() if value is not None}
    rank = max(value.ndim for value in constants.values())
    aligned = {axis: value.reshape((1,) * (rank - value.ndim) + value.shape) for axis, value in constants.items()}
    adjacent = list(aligned) == list(range(min(aligned), min(aligned) + len(aligned)))
    separate = len(aligned) == rank and all(
        extent == 1 or place == own
        for own, value in enumerate(aligned.values())
        for place, extent in enumerate(value.shape)
    )
    if adjacent and separate:
        return _gathered(e, x, {axis: value.reshape(-1) for axis, value in aligned.items()})
    if not adjacent:
        order = [*aligned, *(axis for axis in range(len(shape)) if axis not in aligned)]
        x = e.emit(R.permute_dims(x, order))
        shape = [shape[axis] for axis in order]
        aligned = dict(enumerate(aligned.values()))
    first, merged = min(aligned), [shape[axis] for axis in aligned]
    flat = e.emit(R.reshape(x, [*shape[:first], int(np.prod(merged)), *shape[first + len(merged) :]]))
    linear = np.ravel_multi_index(tuple(np.broadcast_arrays(*(v.numpy() for v in aligned.values()))), merged)
    return R.reshape(_gathered(e, flat, {first: torch.from_numpy(linear.reshape(-1))}), e.shape)


def _positions(index: torch.Tensor, size: int) -> torch.Tensor:
    """Constant indices counted from the front."""
    return torch.where(index < 0, index + size, index).long()


def _wrapped(e: Emitter, index: relax.Expr, size: int) -> relax.Expr:
    """Computed indices, negative ones counted from the end."""
    zero, extent = relax.const(0, index.ty.dtype), relax.const(size, index.ty.dtype)
    return e.emit(R.where(e.emit(R.less(index, zero)), e.emit(R.add(index, extent)), index))


@converts("embedding.default")
def _embedding(e: Emitter, a: Any) -> relax.Expr:
    return R.take(a.weight, a.indices, 0)


@converts("_embedding_bag.default", "_embedding_bag_forward_only.default")
def _embedding_bag(e: Emitter, a: Any) -> tuple[relax.Expr, None, None, None]:
    offsets = e.value(a.offsets)
    count = _extents(a.indices)[0]
    bags = 0 if offsets is None else offsets.numel() - int(a.include_last_offset)
    size = count // max(bags, 1)
    if offsets is None or not torch.equal(offsets.long(), torch.arange(offsets.numel()) * size) or bags * size != count:
        raise Unsupported("bags of differing or computed sizes; pass the indices as a matrix, a bag in each row")
    if a.padding_idx >= 0:
        raise Unsupported("padding_idx; leave it out")
    width = _extents(a.weight)[1]
    rows = e.emit(R.reshape(e.emit(R.take(a.weight, a.indices, 0)), [bags, size, width]))
    if a.per_sample_weights is not None:
        column = e.emit(R.reshape(a.per_sample_weights, [bags, size, 1]))
        rows = e.emit(R.multiply(rows, column))
    return {0: R.sum, 1: R.mean, 2: R.max}[a.mode](rows, [1]), None, None, None


# Interpolation


def _scales(a: Any, axes: int) -> list[dict[str, Any]]:
    """What `F.interpolate` is told about each axis: the size, or the factor that eager computes positions with."""
    given = getattr(a, "scale_factors", None)
    if given is not None:
        return [{"scale_factor": float(factor)} for factor in given]
    return [{"size": int(size)} for size in a.output_size[-axes:]]


def _nearest(mode: str, axes: int) -> Callable[[Emitter, Any], relax.Expr]:
    def convert(e: Emitter, a: Any) -> relax.Expr:
        shape = _extents(a.input)
        positions = {
            len(shape) - axes + i: F.interpolate(_counting(shape[len(shape) - axes + i]), **scale, mode=mode)[0, 0]
            for i, scale in enumerate(_scales(a, axes))
        }
        return _gathered(e, a.input, {axis: index.long() for axis, index in positions.items()})

    return convert


for _axes in (1, 2, 3):
    converts(f"upsample_nearest{_axes}d.vec")(_nearest("nearest", _axes))
    converts(f"_upsample_nearest_exact{_axes}d.vec")(_nearest("nearest-exact", _axes))


@converts("upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_trilinear3d.vec", "upsample_bicubic2d.vec")
def _interpolate(e: Emitter, a: Any) -> relax.Expr:
    axes = a.input.ty.ndim - 2
    cubic = "cubic" in e.node.target.__name__  # type: ignore[union-attr]
    x = a.input
    for i, scale in reversed(list(enumerate(_scales(a, axes)))):
        axis = 2 + i
        index, weight = _taps(_extents(a.input)[axis], scale, cubic, a.align_corners)
        if index.shape[0] == 1 and bool((weight == 1).all()):
            x = _gathered(e, x, {axis: torch.from_numpy(index[0]).long()})
        else:
            x = e.emit(dialect.call("resample", [x, relax.const(index), relax.const(weight)], axis=axis))
    return x


def _taps(size: int, scale: dict[str, Any], cubic: bool, align_corners: bool) -> tuple[np.ndarray, np.ndarray]:
    """Which positions each output reads along an axis, int32 [taps, OUT], and their weights, float32 [taps, OUT]."""
    unit = torch.eye(size)
    if cubic:
        scale = {name: (value, 1 if name == "size" else 1.0) for name, value in scale.items()}
        matrix = F.interpolate(unit.reshape(1, size, size, 1), **scale, mode="bicubic", align_corners=align_corners)
    else:
        matrix = F.interpolate(unit[None], **scale, mode="linear", align_corners=align_corners)
    weights = matrix.reshape(size, -1).numpy()  # [IN, OUT]
    taps = max(int((weights != 0).sum(axis=0).max()), 1)
    index = np.sort(np.argsort(weights == 0, axis=0, kind="stable")[:taps], axis=0)
    return index.astype("int32"), np.ascontiguousarray(np.take_along_axis(weights, index, axis=0))


# Adaptive pooling


def _windows(size: int, out: int) -> tuple[np.ndarray, np.ndarray]:
    """The windows of adaptive pooling: positions int32 [taps, OUT], the last one repeated, and their number [OUT]."""
    at = np.arange(out)
    begin, end = at * size // out, -(-(at + 1) * size // out)
    taps = int((end - begin).max())
    index = np.minimum(begin + np.arange(taps)[:, None], end - 1)
    return index.astype("int32"), (end - begin).astype("int32")


def _adaptive(e: Emitter, x: relax.Expr, sizes: Sequence[int], kind: str) -> relax.Expr:
    """Windows of equal size are an ordinary pool, others are pooled axis by axis."""
    spatial = len(sizes)
    image = _extents(x)[-spatial:]
    if all(extent % size == 0 for extent, size in zip(image, sizes, strict=True)):
        window = [extent // size for extent, size in zip(image, sizes, strict=True)]
        if kind == "mean" and spatial == 2:
            return batched(e, x, 2, lambda y: R.nn.adaptive_avg_pool2d(y, tuple(sizes)))
        pool = {("max", 2): R.nn.max_pool2d, ("max", 3): R.nn.max_pool3d, ("mean", 3): R.nn.avg_pool3d}[kind, spatial]
        return batched(e, x, spatial, lambda y: pool(y, pool_size=window, strides=window))
    for back, (extent, size) in enumerate(zip(reversed(image), reversed(sizes), strict=True)):
        if extent == size:
            continue
        index, count = _windows(extent, size)
        axis = x.ty.ndim - 1 - back
        x = e.emit(dialect.call("pool_axis", [x, relax.const(index), relax.const(count)], axis=axis, kind=kind))
    return x


@converts("_adaptive_avg_pool2d.default", "_adaptive_avg_pool3d.default")
def _adaptive_avg_pool(e: Emitter, a: Any) -> relax.Expr:
    return _adaptive(e, a.self, e.shape[-len(a.output_size) :], "mean")


@converts("adaptive_max_pool2d.default", "adaptive_max_pool3d.default")
def _adaptive_max_pool(e: Emitter, a: Any) -> tuple[relax.Expr, None]:
    return _adaptive(e, a.self, a.output_size, "max"), None
