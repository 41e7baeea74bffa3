"""Integer layers: quantized values as bytes, for the processor's own dot products.

    y = bnncc.integer_conv2d(v, U, values)   -->   p = bnncc.pack_bytes(v, padding, layout)
                                                   a = bnncc.byte_conv2d(p, packed U, base)
                                                   y = astype(a, "float32")

After `PackPlanes`, which takes what has few bits. An activation's byte is its level less the target's offset, so with
zero points and whatever signs ``Σ a·u = (first + every · offset) · Σ u + every · Σ byte·u`` (`base` and a multiple of
the kernel's sum). Padding holds the level of its value; only where that is none of 0 … 255, a correction adds what is
missing. What follows, requantisation included, fuses behind the sum (`FormKernels`).
Declines nothing: `FuseIntegerConv` did.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from bnncc.dialect.reference import block_outputs
from bnncc.passes.integer_layers import IntegerLayers, Packed, weight_form
from bnncc.passes.rewriter import module_pass
from bnncc.runtime.bits import ByteLayout


class _Pack(IntegerLayers):
    operator: ClassVar[str] = "byte_conv2d"
    arithmetic: ClassVar[str] = "integer"

    def takes(self, integers: np.ndarray, values: np.ndarray) -> bool:
        return True

    def operands(self, source: Any, values: np.ndarray, integers: np.ndarray, a: dict[str, Any]) -> Packed:
        out, per_group, *_ = integers.shape
        groups, first, every = a["groups"], a["first"], a["every"]
        layout = ByteLayout(per_group * groups, groups, self.target.byte_offset)
        level, rest = divmod(a["pad_steps"] - first, every)
        inside = rest == 0 and 0 <= level <= 255
        levels = self.pack(
            "pack_bytes", source, values, "bytes", tuple(a["padding"]), layout,
            most=len(values) - 1, pad_level=level if inside else 0,
        )  # fmt: skip
        weight = pack_weight(integers, groups, layout, self.target.byte_lanes(out // groups))
        base = (first + every * layout.offset) * integers.reshape(out, -1).sum(axis=1)
        return Packed(
            levels, weight, base.astype("int32"), {"factor": every, "wide": int(has_wide_pairs(weight))},
            weight_bits=min(weight_form(integers)[1], max(1, int(np.ptp(integers)).bit_length())),
            missing=0 if inside else a["pad_steps"] - first,
        )  # fmt: skip


def pack_weight(integers: np.ndarray, groups: int, layout: ByteLayout, lanes: int) -> np.ndarray:
    """Weights [O, I/groups, KH, KW] as int8 [G, OB, KH, KW, R·K, OL, 4].

    R: 1, or as many parts as a weight beyond −128 … 127 (integers around a zero point) must be the sum of.
    """
    out, per_group, kh, kw = integers.shape
    parts = max(1, -(-int(integers.max()) // 127), -(int(integers.min()) // 128))
    channels = np.zeros((out, kh, kw, parts, layout.group_bytes), "int8")
    for part in range(parts):
        channels[..., part, :per_group] = ((integers + part) // parts).transpose(0, 2, 3, 1)
    tiled = block_outputs(channels.reshape(out, kh, kw, -1, 4), groups, lanes)  # [G, OB, KH, KW, R·K, 4, OL]
    return np.ascontiguousarray(tiled.swapaxes(-1, -2))


def has_wide_pairs(weight: np.ndarray) -> bool:
    """Whether the products of two neighbours may add up to more than 16 bits hold: where both weights are −128."""
    return bool((weight == -128).reshape(-1, 2).all(axis=1).any())


def PackBytes(target: Any) -> Any:
    """The pass for a target (`bnncc.targets.descriptor.TargetSpec`): its products of bytes decide the layouts."""
    return module_pass(lambda mod: _Pack(mod, target).run(), "PackBytes")
