"""ATen's normalizations over the data itself, and what they are made of, in Relax.

Spelled out as means and elementwise operators. Eager sums in another order, so that they agree to a few units in the
last place, which is what the steps say of themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op as R

from bnncc.frontends.converter import Emitter, Unsupported, converts


def _extents(x: relax.Expr) -> list[int]:
    return [int(extent) for extent in x.ty.shape]


def _centred(e: Emitter, x: relax.Expr, axes: Sequence[int]) -> tuple[relax.Var, relax.Var]:
    """x − mean, and the mean of its squares, over the axes, which stay."""
    difference = e.emit(R.subtract(x, e.emit(R.mean(x, list(axes), keepdims=True))))
    square = e.emit(R.multiply(difference, difference))
    return difference, e.emit(R.mean(square, list(axes), keepdims=True))


def _normalized(e: Emitter, x: relax.Expr, axes: Sequence[int], eps: float) -> relax.Var:
    difference, variance = _centred(e, x, axes)
    factor = e.emit(R.rsqrt(e.emit(R.add(variance, relax.const(eps, str(x.ty.dtype))))))
    return e.emit(R.multiply(difference, factor))


def _affine(e: Emitter, x: relax.Var, weight: Any, bias: Any, shape: Sequence[int] | None) -> relax.Expr:
    """x · weight + bias; shape: that of both where they are vectors of channels."""

    def aligned(value: Any) -> Any:
        return value if shape is None else e.emit(R.reshape(value, list(shape)))

    if weight is not None:
        x = e.emit(R.multiply(x, aligned(weight)))
    return x if bias is None else R.add(x, aligned(bias))


@converts("native_layer_norm.default")
def _layer_norm(e: Emitter, a: Any) -> tuple[relax.Expr, None, None]:
    rank = a.input.ty.ndim
    axes = range(rank - len(a.normalized_shape), rank)
    return _affine(e, _normalized(e, a.input, axes, a.eps), a.weight, a.bias, None), None, None


@converts("native_group_norm.default")
def _group_norm(e: Emitter, a: Any) -> tuple[relax.Expr, None, None]:
    shape = _extents(a.input)
    grouped = e.emit(R.reshape(a.input, [shape[0], a.group, int(np.prod(shape[1:])) // a.group]))
    normal = e.emit(R.reshape(_normalized(e, grouped, [2], a.eps), shape))
    return _affine(e, normal, a.weight, a.bias, [1, shape[1], *[1] * (len(shape) - 2)]), None, None


@converts("_native_batch_norm_legit.no_stats")
def _batch_statistics(e: Emitter, a: Any) -> tuple[relax.Expr, None, None]:
    """Instance norm is this on images that stand in for channels."""
    shape = _extents(a.input)
    axes = [axis for axis in range(len(shape)) if axis != 1]
    normal = _normalized(e, a.input, axes, a.eps)
    return _affine(e, normal, a.weight, a.bias, [1, shape[1], *[1] * (len(shape) - 2)]), None, None


@converts("var.correction")
def _variance(e: Emitter, a: Any) -> relax.Expr:
    x = e.cast(a.self, e.dtype)
    shape = _extents(x)
    axes = sorted(axis % len(shape) for axis in a.dim or range(len(shape)))
    count = int(np.prod([shape[axis] for axis in axes]))
    freedom = count - (1 if a.correction is None else a.correction)
    if freedom <= 0:
        raise Unsupported("a variance of as few values as its correction; it has no finite value")
    _, variance = _centred(e, x, axes)
    scaled = e.emit(R.multiply(variance, relax.const(count / freedom, e.dtype)))
    return scaled if a.keepdim else R.reshape(scaled, e.shape)


@converts("linalg_vector_norm.default")
def _vector_norm(e: Emitter, a: Any) -> relax.Expr:
    x = e.cast(a.self, e.dtype)
    axes = None if a.dim is None else [axis % x.ty.ndim for axis in a.dim]
    magnitude = e.emit(R.abs(x))
    if a.ord == float("inf"):
        return R.max(magnitude, axes, a.keepdim)
    if a.ord == 1:
        return R.sum(magnitude, axes, a.keepdim)
    if a.ord == 2:
        return R.sqrt(e.emit(R.sum(e.emit(R.multiply(x, x)), axes, a.keepdim)))
    raise Unsupported(f"the norm of order {a.ord}; supported are 1, 2 and infinity")
