"""Convolutions and dense layers of quantized activations with quantized weights become sums of integers.

    v = round(clip(x, 0, 1) · 3) / 3; y = nn.conv2d(v, W)   -->   a = bnncc.integer_conv2d(v, U, values)
                                                                  y = bnncc.rescale(a, scale)

where W = U · s with integers U, v an integer times a scale (`bnncc.passes.grids`), and a the exact sum of the products
of these integers. After `FuseBinaryConv`, which takes signs with binary weights; before layers that are left become
float kernels. Eager sums rounded floats, so the scaled result is close to eager's but not bit-equal, and says so
(`bnncc.rescale`); where nothing can be rounded (scales that are powers of two), it is a plain product, and exact.

How they are summed, by bit planes or by bytes, is the target's choice (`PackPlanes`, `PackBytes`).

Declines: activations that are not known to lie on a grid of at most 256 values; weights of more than 8 bits, or of more
than 4 where a group has few channels (a depthwise convolution is faster in floats); padding that is no multiple of the
grid's scale; sums that 31 bits cannot hold.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from tvm import relax
from tvm.relax import op as R

from bnncc.dialect.ops import attributes, call, is_call, shape_of
from bnncc.passes.grids import Grid, Grids, integer_weight
from bnncc.passes.layers import LayerRewriter, joint_padding
from bnncc.passes.rewriter import Origin, is_const, module_pass, numpy_of, opt_ins_of

#: The largest magnitude of a weight's integers: eight bits counted from a zero point.
MOST_WEIGHT = 255

# The same where groups have fewer channels than a word of bytes: four bits, odd integers or counted from a zero point.
_MOST_IN_SMALL_GROUPS = 15

_LAYOUTS = ("NCW", "NCHW", "NCDHW")


class _Fuse(LayerRewriter):
    name: ClassVar[str] = "FuseIntegerConv"

    def begin(self) -> None:
        self.grids = Grids(self.definition)
        self.opt_ins = opt_ins_of(self.func)

    def conv(self, var: Any, value: relax.Call) -> Any | None:
        source, weight = self.definition[var].args
        a = attributes(value)
        if not is_const(weight) or a["data_layout"] not in _LAYOUTS:
            return self.decline(var, "the weight is no constant")
        padding, pad_value = tuple(a["padding"]), 0.0
        pad = self.definition.get(source)
        if is_call(pad, "nn.pad"):
            around = joint_padding(padding, pad)
            if around is None:
                return self.decline(var, "its padding is not one constant around the image")
            source, (padding, pad_value) = pad.args[0], around
        found = self.split(var, source, numpy_of(weight), a["groups"])
        if found is None:
            return None
        grid, integers, scale = found
        outside = pad_value / grid.scale if any(padding) else 0.0
        if abs(outside - round(outside)) > 1e-3:
            return self.decline(var, f"it is padded with {pad_value:g}, which is no multiple of {grid.scale:g}")
        of_the_activation = pad_value in grid.values and pad_value == round(pad_value)
        if integers.ndim == 5 and (padding[0] or padding[3]) and not of_the_activation:
            return self.decline(var, "its depth is padded with a value that is no whole number of the activation's")
        fused = call(
            f"integer_conv{integers.ndim - 2}d",
            [self.replaced(source), relax.const(integers.astype("float32")), relax.const(grid.values)],
            strides=tuple(a["strides"]), dilation=tuple(a["dilation"]), groups=a["groups"], padding=padding,
            pad_steps=round(outside), pad_value=round(pad_value), first=grid.first, every=grid.every,
            data_layout=a["data_layout"],
        )  # fmt: skip
        return self.scaled(var, fused, grid, integers, scale, (1, -1, *[1] * (integers.ndim - 2)))

    def dense(self, var: Any, value: relax.Call) -> Any | None:
        source, weight = self.definition[var].args
        if not is_const(weight) or len(shape_of(weight)) != 2 or len(shape_of(source)) != 2:
            return None
        found = self.split(var, source, np.ascontiguousarray(numpy_of(weight).T), 1)
        if found is None:
            return None
        grid, integers, scale = found
        args = [self.replaced(source), relax.const(integers.astype("float32")), relax.const(grid.values)]
        fused = call("integer_dense", args, first=grid.first, every=grid.every)
        return self.scaled(var, fused, grid, integers, scale, (1, -1))

    def split(
        self, var: Any, source: Any, weight: np.ndarray, groups: int
    ) -> tuple[Grid, np.ndarray, np.ndarray] | None:
        """The input's grid, and the weight [O, I/groups, …] as integers and their scales [O]."""
        grid = self.grids.of(source)
        if grid is None:
            return self.decline(var, "its input lies on no grid")
        most = MOST_WEIGHT if groups == 1 or weight.shape[1] >= 4 else _MOST_IN_SMALL_GROUPS
        found = integer_weight(weight, most)
        if found is None:
            return self.decline(var, f"its weight is no multiple of integers up to {most}")
        if self.largest(grid, found[0]) >= 1 << 31:
            return self.decline(var, "its sums need more than 31 bits")
        return grid, *found

    def largest(self, grid: Grid, integers: np.ndarray) -> int:
        """A bound of the integer sums and of what they are made of: popcounts of planes, bytes with an offset."""
        levels = (1 << grid.bits) - 1
        reach = max(abs(grid.first), abs(grid.first + grid.every * levels), 2 * grid.every * max(levels, 128))
        return int(reach * 2 * np.abs(integers).max(initial=1) * integers[0].size)

    def scaled(
        self, var: Any, fused: relax.Call, grid: Grid, integers: np.ndarray, scale: np.ndarray, shape: tuple[int, ...]
    ) -> relax.Expr:
        """The sum times the scales; exact if eager cannot have rounded: powers of two, and sums below 2²⁴."""
        origin = self.origin(var)
        accumulator = self.emit(fused, f"{var.name}__steps", Origin("", origin.path) if origin else None)
        factors = (scale * grid.scale).astype("float32")
        powers = np.frexp(scale)[0] == 0.5
        bound = np.abs(grid.values).max() / grid.scale * np.abs(integers.reshape(len(integers), -1)).sum(axis=1).max()
        exact = grid.exact and powers.all() and bound < 1 << 24 and var.name not in self.opt_ins
        if exact and (factors == 1).all():
            return accumulator
        const = relax.const(np.ascontiguousarray(factors.reshape(shape)))
        return R.multiply(accumulator, const) if exact else call("rescale", [accumulator, const])


FuseIntegerConv = module_pass(lambda mod: _Fuse(mod).run(), "FuseIntegerConv")
