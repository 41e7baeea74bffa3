"""Bitserial layers: integers of few bits as packed bit planes.

    y = bnncc.integer_conv2d(v, U, values)   -->   p = bnncc.pack_levels(v, padding, layout)
                                                   a = bnncc.plane_conv2d(memory.view(p, words), packed U, base)
                                                   y = astype(a, "float32")

After `ToNHWC`, beside `PackBits` and with its conventions. The sum over a window (`bnncc.passes.integer_layers`) holds

    Σ level·u = ½ (K (2^P − 1)(2^Q − 1) + (2^P − 1) Σ u) − S   (form "xor")
    Σ level·u = S                                              (form "and")

with S the weighted popcounts (`bnncc.dialect.computes_planes`). Pixels outside the image have level 0; where that is
not the padding's value, a correction adds the difference times the sum of the weights that lie outside. Declines pairs
of so many planes that bytes are faster (`TargetSpec.most_plane_pairs`): `PackBytes` takes them.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from tvm.relax import op as R

from bnncc.dialect.ops import shape_of
from bnncc.dialect.reference import block_outputs
from bnncc.passes.integer_layers import IntegerLayers, Packed, bits_of, weight_form
from bnncc.passes.rewriter import module_pass
from bnncc.runtime.bits import BitLayout


class _Pack(IntegerLayers):
    operator: ClassVar[str] = "plane_conv2d"
    arithmetic: ClassVar[str] = "bitserial"

    def takes(self, integers: np.ndarray, values: np.ndarray) -> bool:
        return bits_of(values) * weight_form(integers)[1] <= int(self.target.most_plane_pairs)

    def operands(self, source: Any, values: np.ndarray, integers: np.ndarray, a: dict[str, Any]) -> Packed:
        out, per_group, *_ = integers.shape
        groups = a["groups"]
        layout = self.target.bit_layout(per_group * groups, groups)
        planes = bits_of(values)
        levels = self.pack("pack_levels", source, values, "planes", tuple(a["padding"]), layout, planes=planes)
        form, weight_planes = weight_form(integers)
        weight = pack_planes(integers, form, weight_planes, groups, layout, self.target.binary_lanes(out // groups))
        base, factor = constants(integers, form, weight_planes, planes, a["first"], a["every"])
        return Packed(
            self.view(levels, layout), weight, base, {"form": form, "factor": factor}, weight_planes,
            missing=a["pad_steps"] - a["first"],
        )  # fmt: skip

    def view(self, levels: Any, layout: BitLayout) -> Any:
        """The same memory as words."""
        if layout.word_bits == 8:
            return levels
        shape = (*shape_of(levels)[:-1], layout.words)
        return self.emit(R.memory.view(levels, shape, layout.word_dtype), f"{levels.name}__words")


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
    own = BitLayout(integers.shape[1], 1, layout.word_bits, layout.lanes)
    pixels = integers.transpose(0, 2, 3, 1)
    codes = (pixels + (1 << weight_planes) - 1) // 2 if form == "xor" else pixels  # two's complement by its low bits
    planes = [own.pack((codes >> plane & 1).astype(bool)) for plane in range(weight_planes)]
    return np.ascontiguousarray(block_outputs(np.stack(planes, axis=3), groups, lanes))


def PackPlanes(target: Any) -> Any:
    """The pass for a target (`bnncc.targets.descriptor.TargetSpec`): its word size and lanes decide the layouts."""
    return module_pass(lambda mod: _Pack(mod, target).run(), "PackPlanes")
