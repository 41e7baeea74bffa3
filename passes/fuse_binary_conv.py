"""Convolutions and dense layers of signs with binary weights become binary operators.

    s = bnncc.sign(x); p = nn.pad(s, -1); y = nn.conv2d(p, W)   -->   y = bnncc.binary_conv2d(s, W, padding, pad_value)
    s = bnncc.sign(x); y = matmul(s, transpose(W))              -->   y = bnncc.binary_dense(s, W)
    y = nn.conv2d(s, alpha * W)                                 -->   y = bnncc.rescale(binary_conv2d(s, W), alpha)
    z = bnncc.insert_zeros(s); y = nn.conv2d(z, W)              -->   t = bnncc.sign(z, predicate="ternary")
                                                                      y = bnncc.binary_conv2d(t, W)

W holds ±1, or −1, 0, +1 (ternary). After `FoldConstants` (weights are constants) and `HoistReshape`; before the
thresholds, which need to see the accumulator. A scale per output channel is taken out of the weights; eager multiplies
every term by it and rounds in between, so that such a layer is close to eager but not bit-equal, and says so
(`bnncc.rescale`). With a power of two nothing rounds, and the scale is an ordinary multiplication.

Declines: padding with anything but −1, 0, +1; a pad before the sign (it pads x, not ±1, and is handled as any pad);
weights of other values; inputs that are not known to be signs (such a layer is weight-only binary and stays float).
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from tvm import relax
from tvm.relax import op as R

from bnncc.dialect.ops import attributes, call, is_call, op_name, shape_of
from bnncc.passes.layers import LayerRewriter, joint_padding
from bnncc.passes.rewriter import Origin, is_const, module_pass, numpy_of

# Powers of two up to here times an integer below 2²⁴ are float32 numbers, neither infinite nor subnormal.
_EXACT_EXPONENT = 100

_POOLS = ("nn.max_pool1d", "nn.max_pool2d")


def binary_weight(weight: np.ndarray, channel_axis: int = 0) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Splits a weight into ±1/0 and a positive scale per output channel (None: all ones), or None if it is not that."""
    moved = np.moveaxis(weight, channel_axis, 0)
    flat = np.abs(moved.reshape(moved.shape[0], -1))
    scale = flat.max(axis=1, initial=0)
    if not np.isfinite(scale).all() or not ((flat == scale[:, None]) | (flat == 0)).all():
        return None
    signs = np.sign(weight).astype("float32")
    scale = np.where(scale == 0, 1, scale).astype("float32")
    return signs, None if (scale == 1).all() else scale


def _keeps_bits(value: Any) -> bool:
    """Whether it has a kernel on bits: a max-pool whose window has no holes, or pixels read in another order."""
    if is_call(value, "take"):
        return is_const(value.args[1]) and attributes(value)["axis"] != 1
    return op_name(value) in _POOLS and set(attributes(value)["dilation"]) == {1}


def is_binary(value: Any, definition: dict[Any, Any]) -> bool:
    """Whether an expression only takes the values −1, +1 (and 0 where its sign is ternary)."""
    while isinstance(value, relax.Var):
        value = definition.get(value)
    if _keeps_bits(value):
        return is_binary(value.args[0], definition)
    return op_name(value) in ("bnncc.sign", "bnncc.threshold")


def is_ternary(value: Any, definition: dict[Any, Any]) -> bool:
    """Whether a binary expression, in any layout, takes the value 0 as well."""
    while isinstance(value, relax.Var):
        value = definition.get(value)
    if op_name(value) in (*_POOLS, "take"):
        return is_ternary(value.args[0], definition)
    return is_call(value, "bnncc.sign") and attributes(value)["predicate"] == "ternary"


class _Fuse(LayerRewriter):
    name: ClassVar[str] = "FuseBinaryConv"

    def conv(self, var: Any, value: relax.Call) -> Any | None:
        source, weight = self.definition[var].args
        attrs = attributes(value)
        if not is_const(weight) or attrs["data_layout"] not in ("NCW", "NCHW", "NCDHW"):
            return self.decline(var, "the weight is no constant")
        split = binary_weight(numpy_of(weight))
        if split is None:
            return self.decline(var, "the weight is not binary")
        padding, pad_value = tuple(attrs["padding"]), 0.0
        pad = self.definition.get(source)
        if is_call(pad, "nn.pad") and is_binary(pad.args[0], self.definition):
            around = joint_padding(padding, pad)
            if around is None or around[1] not in (-1, 0, 1):
                return self.decline(var, "its padding is not a constant −1, 0 or +1 around the image")
            source, (padding, pad_value) = pad.args[0], around
        zeros_between = self.has_zeros_between(source)
        if not zeros_between and not is_binary(source, self.definition):
            return self.decline(var, "its input is no sign")
        if any(padding) and pad_value and is_ternary(source, self.definition):
            return self.decline(var, "a ternary input is padded with something else than 0")
        signs, scale = split
        image = self.replaced(source)
        if zeros_between:
            image = self.emit(call("sign", [image], predicate="ternary"), f"{source.name}__ternary")
        fused = call(
            f"binary_conv{signs.ndim - 2}d", [image, relax.const(signs)],
            strides=tuple(attrs["strides"]), dilation=tuple(attrs["dilation"]), groups=attrs["groups"],
            padding=padding, pad_value=int(pad_value), data_layout=attrs["data_layout"],
        )  # fmt: skip
        return self.rescaled(var, fused, scale, (1, -1, *[1] * (signs.ndim - 2)))

    def has_zeros_between(self, source: Any) -> bool:
        """Whether it is ±1 with zeros inserted, perhaps cropped: what a transposed convolution reads."""
        value = self.definition.get(source)
        if is_call(value, "strided_slice"):
            value = self.definition.get(value.args[0])
        return is_call(value, "bnncc.insert_zeros") and is_binary(value.args[0], self.definition)

    def dense(self, var: Any, value: relax.Call) -> Any | None:
        source, weight = self.definition[var].args
        if not is_const(weight) or len(shape_of(weight)) != 2 or len(shape_of(source)) != 2:
            return None
        split = binary_weight(numpy_of(weight), channel_axis=1)
        if split is None or not is_binary(source, self.definition):
            return self.decline(var, "not a sign times a binary weight")
        signs, scale = split
        fused = call("binary_dense", [self.replaced(source), relax.const(np.ascontiguousarray(signs.T))])
        return self.rescaled(var, fused, scale, (1, -1))

    def rescaled(self, var: Any, fused: relax.Call, scale: np.ndarray | None, shape: tuple[int, ...]) -> relax.Call:
        if scale is None:
            return fused
        origin = self.origin(var)
        accumulator = self.emit(fused, f"{var.name}__unscaled", Origin("", origin.path) if origin else None)
        mantissa, exponent = np.frexp(scale)
        if (mantissa == 0.5).all() and (abs(exponent) < _EXACT_EXPONENT).all():
            return R.multiply(accumulator, relax.const(scale.reshape(shape)))
        return call("rescale", [accumulator, relax.const(scale.reshape(shape))])


FuseBinaryConv = module_pass(lambda mod: _Fuse(mod).run(), "FuseBinaryConv")
