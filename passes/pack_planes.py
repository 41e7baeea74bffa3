"""Bitserial operators take packed bit planes.

    y = bnncc.bitserial_conv2d(v, U, values)   -->   p = bnncc.pack_levels(v, padding, layout)
                                                     a = bnncc.plane_conv2d(memory.view(p, words), packed U, base)
                                                     y = astype(a, "float32")

After `ToNHWC`, beside `PackBits` and with its conventions: a layer packs what it reads, equal packs are one, the
value's float spelling is dead where nothing else reads it. With a = first + every · level, the sum over a window is

    Σ a·u = first · Σ u + every · Σ level·u,   Σ level·u = ½ (K (2^P − 1)(2^Q − 1) + (2^P − 1) Σ u) − S   (form "xor")
                                               Σ level·u = S                                              (form "and")

with S the weighted popcounts (`bnncc.dialect.computes_planes`). Pixels outside the image have level 0; where that is
not the padding's value, a correction adds the difference times the sum of the weights that lie outside.
Declines nothing: `FuseBitserialConv` did.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op as R

from bnncc.dialect.ops import attributes, call, is_call, shape_of
from bnncc.dialect.plan import Layer
from bnncc.passes.pack_bits import zero_padding_correction
from bnncc.passes.rewriter import Origin, Rewriter, module_pass, numpy_of
from bnncc.runtime.bits import BitLayout


class _Pack(Rewriter):
    def __init__(self, mod: Any, target: Any):
        super().__init__(mod)
        self.target = target
        self.packed: dict[Any, Any] = {}

    def rewrite(self, var: Any, value: Any) -> Any | None:
        if is_call(value, "bnncc.bitserial_conv2d"):
            a = attributes(value)
            accumulator = self.product(var, self.definition[var], numpy_of(value.args[1]), a, "bitserial conv2d")
            return R.astype(accumulator, "float32")
        if is_call(value, "bnncc.bitserial_dense"):
            one = {"strides": (1, 1), "dilation": (1, 1), "groups": 1, "padding": (0, 0, 0, 0), "pad_steps": 0}
            weight = numpy_of(value.args[1])[:, :, None, None]
            product = self.product(var, self.definition[var], weight, attributes(value) | one, "bitserial linear")
            # The image of a dense layer is 1×N pixels; its float form drops the unit axes again.
            return R.reshape(self.emit(R.astype(product, "float32"), f"{var.name}__pixels"), shape_of(var))
        return None

    def product(self, var: Any, old: relax.Call, weight: np.ndarray, a: dict[str, Any], op: str) -> Any:
        """Emits the int32 accumulator [N, OH, OW, O] of a layer with integer weight [O, I/groups, KH, KW]."""
        source, values = old.args[0], numpy_of(old.args[2])
        out, per_group, kh, kw = weight.shape
        layout = BitLayout.for_target(
            per_group * a["groups"], a["groups"], self.target.word_bits, self.target.max_lanes
        )
        planes = max(1, (len(values) - 1).bit_length())
        bits = self.levels_of(source, values, layout, planes, tuple(a["padding"]))
        words = self.view(bits, layout)
        integers = weight.astype("int64")
        form, weight_planes = weight_form(integers)
        lanes = self.target.binary_lanes(out // a["groups"])
        packed = pack_planes(integers, form, weight_planes, a["groups"], layout, lanes)
        base, factor = constants(integers, form, weight_planes, planes, a["first"], a["every"])
        args = [words, relax.const(packed), relax.const(base)]
        missing = a["pad_steps"] - a["first"]
        corrected = bool(any(a["padding"]) and missing)
        if corrected:
            args += [relax.const(c) for c in zero_padding_correction(integers * missing, shape_of(source), a)]
        product = call(
            "plane_conv2d", args, out_channels=out, kernel_size=(kh, kw), strides=a["strides"],
            dilation=a["dilation"], form=form, factor=factor, corrected=int(corrected),
        )  # fmt: skip
        path = origin.path if (origin := self.origin(var)) else ""
        accumulator = self.emit(product, f"{var.name}__acc", Origin("", path))
        n, oh, ow, _ = shape_of(accumulator)
        row = Layer(
            path, op, shape_of(var) if len(shape_of(var)) == 2 else (n, out, oh, ow),
            planes, weight_planes, n * oh * ow * weight.size, packed.nbytes,
        )  # fmt: skip
        self.layers.append(json.dumps(dataclasses.asdict(row)))
        return accumulator

    def levels_of(self, source: Any, values: np.ndarray, layout: BitLayout, planes: int, padding: Any) -> Any:
        """The packed bytes of a quantized old variable, padded."""
        key = (source, layout, padding, values.tobytes())
        if key in self.packed:
            return self.packed[key]
        x = self.replaced(source)
        if len(shape_of(x)) == 2:
            x = self.emit(R.reshape(x, (1, 1, *shape_of(x))), f"{source.name}__image")
        wide = values.astype("float64")
        inverse = np.float32((len(values) - 1) / (wide[-1] - wide[0]))
        packed = call(
            "pack_levels", [x, relax.const(values[0]), relax.const(inverse)],
            planes=planes, padding=padding, **layout.to_json(),
        )  # fmt: skip
        name = f"{source.name}__planes" + ("_padded" if any(padding) else "")
        self.packed[key] = self.emit(packed, name, self.packed_origin(source, values, layout, planes, padding))
        return self.packed[key]

    def packed_origin(
        self, source: Any, values: np.ndarray, layout: BitLayout, planes: int, padding: Any
    ) -> Origin | None:
        origin = self.origin(source)
        if origin is None:
            return None
        bits = {**layout.to_json(), "planes": planes, "padding": list(padding), "levels": values.tolist()}
        return Origin(origin.node, origin.path, origin.order, bits, float(np.diff(values).max()))

    def view(self, bits: Any, layout: BitLayout) -> Any:
        """The same memory as words."""
        if layout.word_bits == 8:
            return bits
        shape = (*shape_of(bits)[:-1], layout.words)
        return self.emit(R.memory.view(bits, shape, layout.word_dtype), f"{bits.name}__words")


def weight_form(integers: np.ndarray) -> tuple[str, int]:
    """How integer weights are made of planes, and of how many: "xor" for odd integers, else "and" (no negative ones) or
    "and-" (two's complement)."""
    low, high = int(integers.min()), int(integers.max())
    if (integers % 2).all():
        return "xor", max(-low, high).bit_length()
    if low >= 0:
        return "and", max(1, high.bit_length())
    return "and-", 1 + max((-low - 1).bit_length(), high.bit_length())


def constants(
    integers: np.ndarray, form: str, weight_planes: int, planes: int, first: int, every: int
) -> tuple[np.ndarray, int]:
    """(base int32 [O], factor) such that the sum of a window is ``base + factor · S``; see above."""
    sums = integers.reshape(len(integers), -1).sum(axis=1)
    if form != "xor":
        return (first * sums).astype("int32"), every
    depth, most = integers[0].size, (1 << planes) - 1
    half = most * (depth * ((1 << weight_planes) - 1) + sums)  # even: all weights are odd
    return (first * sums + every * half // 2).astype("int32"), -every


def pack_planes(
    integers: np.ndarray, form: str, weight_planes: int, groups: int, layout: BitLayout, lanes: int
) -> np.ndarray:
    """Integer weights [O, I/groups, KH, KW] as words [G, OB, KH, KW, Q, K, OL]."""
    out, per_group, kh, kw = integers.shape
    own = BitLayout(per_group, 1, layout.word_bits, layout.lanes)
    pixels = integers.transpose(0, 2, 3, 1)
    codes = (pixels + (1 << weight_planes) - 1) // 2 if form == "xor" else pixels  # two's complement by its low bits
    planes = [own.pack((codes >> plane & 1).astype(bool)) for plane in range(weight_planes)]
    words = np.stack(planes, axis=3)  # [O, KH, KW, Q, K]
    blocks = -(-(out // groups) // lanes)
    filled = np.zeros((groups, blocks * lanes, *words.shape[1:]), words.dtype)
    filled[:, : out // groups] = words.reshape(groups, out // groups, *words.shape[1:])
    tiled = filled.reshape(groups, blocks, lanes, kh, kw, weight_planes, -1).transpose(0, 1, 3, 4, 5, 6, 2)
    return np.ascontiguousarray(tiled)


def PackPlanes(target: Any) -> Any:
    """The pass for a target (`bnncc.targets.descriptor.TargetSpec`): its word size and lanes decide the layouts."""
    return module_pass(lambda mod: _Pack(mod, target).run(), "PackPlanes")
