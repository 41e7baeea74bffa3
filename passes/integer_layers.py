"""What `PackPlanes` and `PackBytes` share: layers of integers get packed operands.

    y = bnncc.integer_conv2d(v, U, values)   -->   p = packed levels of v
                                                   a = the product of p and packed U, int32
                                                   y = astype(a, "float32")

With a = first + every · level, the sum over a window is ``Σ a·u = first · Σ u + every · Σ level·u``: a constant of the
channel (`base`) and a multiple of what the data decides. A layer packs what it reads, equal packs are one, and the
value's float spelling is dead where nothing else reads it.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from tvm import relax
from tvm.relax import op as R

from bnncc.dialect.ops import attributes, call, is_call, shape_of
from bnncc.dialect.plan import Layer
from bnncc.passes.pack_bits import zero_padding_correction
from bnncc.passes.rewriter import Origin, Rewriter, numpy_of
from bnncc.runtime.bits import Levels

_DENSE = {"strides": (1, 1), "dilation": (1, 1), "groups": 1, "padding": (0, 0, 0, 0), "pad_steps": 0}


@dataclass(frozen=True)
class Packed:
    """A layer's operands. x: the packed levels; weight, base: constants; attrs: of the kernel's operator; weight_bits:
    of a weight's integer; missing: what pixels of the padding lack, in steps of the activation's scale."""

    x: Any
    weight: np.ndarray
    base: np.ndarray
    attrs: dict[str, Any]
    weight_bits: int
    missing: int


class IntegerLayers(Rewriter):
    """Rewrites the layers that a subclass takes. target: `bnncc.targets.descriptor.TargetSpec`."""

    #: Operator of the kernel, and what the layer table calls the arithmetic.
    operator: ClassVar[str]
    arithmetic: ClassVar[str]

    def __init__(self, mod: Any, target: Any):
        super().__init__(mod)
        self.target = target
        self.packed: dict[Any, Any] = {}

    def takes(self, integers: np.ndarray, values: np.ndarray) -> bool:
        """Whether a layer of these weights [O, …] and activation values is this pass's."""
        raise NotImplementedError

    def operands(self, source: Any, values: np.ndarray, integers: np.ndarray, a: dict[str, Any]) -> Packed:
        """The operands of a layer that reads the old variable `source`, with int64 weights [O, I/groups, KH, KW]."""
        raise NotImplementedError

    def rewrite(self, var: Any, value: Any) -> Any | None:
        dense = is_call(value, "bnncc.integer_dense")
        if not dense and not is_call(value, "bnncc.integer_conv2d"):
            return None
        integers, values = numpy_of(value.args[1]).astype("int64"), numpy_of(value.args[2])
        if not self.takes(integers, values):
            return None
        source = self.definition[var].args[0]
        if not dense:
            return R.astype(self.product(var, source, values, integers, attributes(value), "conv2d"), "float32")
        one_pixel = integers[:, :, None, None]
        product = self.product(var, source, values, one_pixel, attributes(value) | _DENSE, "linear")
        # The image of a dense layer is 1×N pixels; its float form drops the unit axes again.
        return R.reshape(self.emit(R.astype(product, "float32"), f"{var.name}__pixels"), shape_of(var))

    def product(
        self, var: Any, source: Any, values: np.ndarray, integers: np.ndarray, a: dict[str, Any], layer: str
    ) -> Any:
        """Emits the int32 accumulator [N, OH, OW, O] of a layer."""
        out, _, kh, kw = integers.shape
        packed = self.operands(source, values, integers, a)
        args = [packed.x, relax.const(packed.weight), relax.const(packed.base)]
        corrected = bool(any(a["padding"]) and packed.missing)
        if corrected:
            args += [relax.const(c) for c in zero_padding_correction(integers * packed.missing, shape_of(source), a)]
        product = call(
            self.operator, args, out_channels=out, kernel_size=(kh, kw), strides=a["strides"],
            dilation=a["dilation"], corrected=int(corrected), **packed.attrs,
        )  # fmt: skip
        path = origin.path if (origin := self.origin(var)) else ""
        accumulator = self.emit(product, f"{var.name}__acc", Origin("", path))
        n, oh, ow, _ = shape_of(accumulator)
        row = Layer(
            path, f"{self.arithmetic} {layer}", shape_of(var) if len(shape_of(var)) == 2 else (n, out, oh, ow),
            bits_of(values), packed.weight_bits, n * oh * ow * integers.size, packed.weight.nbytes,
        )  # fmt: skip
        self.layers.append(json.dumps(dataclasses.asdict(row)))
        return accumulator

    def pack(
        self, operator: str, source: Any, values: np.ndarray, suffix: str, padding: Any, layout: Any, **attrs: Any
    ) -> Any:
        """The packed levels of an old variable, whose float `values` are known. attrs: of the packing operator.

        Packing rounds to the nearest level, so that an explicit quantizer before it has nothing left to do.
        """
        if is_call(quantizer := self.definition.get(source), "bnncc.quantize"):
            source = quantizer.args[0]
        key = (operator, source, layout, padding, values.tobytes(), *attrs.values())
        if key not in self.packed:
            x = self.replaced(source)
            if len(shape_of(x)) == 2:
                x = self.emit(R.reshape(x, (1, 1, *shape_of(x))), f"{source.name}__image")
            grid = Levels(values)
            args = [x, relax.const(grid.lowest), relax.const(grid.inverse)]
            levels = call(operator, args, padding=padding, **layout.to_json(), **attrs)
            name = f"{source.name}__{suffix}" + ("_padded" if any(padding) else "")
            bits = {**layout.to_json(), **attrs, "padding": list(padding), "levels": values.tolist()}
            self.packed[key] = self.emit(levels, name, self.packed_origin(source, bits, values))
        return self.packed[key]

    def packed_origin(self, source: Any, bits: dict[str, Any], values: np.ndarray) -> Origin | None:
        origin = self.origin(source)
        if origin is None:
            return None
        return Origin(origin.node, origin.path, origin.order, bits, float(np.diff(values).max()))


def bits_of(values: np.ndarray) -> int:
    """Bits of the levels of an activation with these values."""
    return max(1, (len(values) - 1).bit_length())


def weight_form(integers: np.ndarray) -> tuple[str, int]:
    """How integer weights are made of bit planes, and of how many: "xor" for odd integers, else "and" (no negative
    ones) or "and-" (two's complement)."""
    low, high = int(integers.min()), int(integers.max())
    if (integers % 2).all():
        return "xor", max(-low, high).bit_length()
    if low >= 0:
        return "and", max(1, high.bit_length())
    return "and-", 1 + max((-low - 1).bit_length(), high.bit_length())
