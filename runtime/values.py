"""How a value of the model lies in a tensor of the artifact: encode eager's arrays, decode the device's.

A tensor's entry in the manifest may carry ``value``: ``{"node": name, "order": axes or null, "bits": {…} or null}``.
Axis i of the stored array is axis ``order[i]`` of the node's value. Packed tensors state their `BitLayout` and besides
``planes`` (2 for −1/0/+1 values), ``padding`` (top, left, bottom, right pixels around the value) and ``pad_value``
(−1, 0 or +1, what those pixels hold). With ``levels``, the planes hold the bits of an index into that list of values;
pixels of the padding have index 0. With ``offset`` as well, the index less that offset is a byte of its own, a
`ByteLayout`, and the padding has index ``pad_level``. ``step`` is the distance of two neighbours of a quantized value.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bnncc.runtime.bits import BitLayout, ByteLayout, Levels
from bnncc.runtime.errors import BnnccError
from bnncc.runtime.manifest import TensorEntry


@dataclass(frozen=True)
class StoredValue:
    """One tensor of an artifact that holds a value of the model. shape, dtype: of the tensor as stored."""

    id: int
    shape: tuple[int, ...]
    dtype: str
    node: str
    order: tuple[int, ...] | None
    layout: BitLayout | ByteLayout | None
    planes: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    pad_value: int = -1
    levels: np.ndarray | None = None
    step: float | None = None

    @classmethod
    def of(cls, tensor: TensorEntry) -> StoredValue | None:
        """From a tensor's entry in the manifest; None for scratch memory that stands for nothing in the model."""
        value = tensor["value"]
        if value is None:
            return None
        bits = value["bits"] or {}
        layout: BitLayout | ByteLayout | None = None
        if "offset" in bits:
            layout = ByteLayout(bits["channels"], bits["groups"], bits["offset"])
        elif bits:
            layout = BitLayout(bits["channels"], bits["groups"], bits["word_bits"], bits["lanes"])
        return cls(
            id=tensor["id"],
            shape=tuple(tensor["shape"]),
            dtype=tensor["dtype"],
            node=value["node"],
            order=None if value["order"] is None else tuple(value["order"]),
            layout=layout,
            planes=bits.get("planes", 1),
            padding=tuple(bits.get("padding", (0, 0, 0, 0))),
            pad_value=bits.get("pad_level", 0) if "levels" in bits else bits.get("pad_value", -1),
            levels=np.array(bits["levels"], np.float32) if "levels" in bits else None,
            step=value.get("step"),
        )

    @property
    def value_shape(self) -> tuple[int, ...]:
        """The value's shape in stored axes, without padding."""
        if self.layout is None:
            return self.shape
        plane_axis = isinstance(self.layout, BitLayout) and (self.planes > 1 or self.levels is not None)
        axes = list(self.shape[: -2 if plane_axis else -1])
        if len(axes) == 3:
            top, left, bottom, right = self.padding
            axes[1] -= top + bottom
            axes[2] -= left + right
        return (*axes, self.layout.channels)

    def encode(self, value: np.ndarray) -> np.ndarray:
        """The stored array that holds `value`, the node's value in the model's own axes; −1, 0, +1 where packed."""
        plain = value if self.order is None else value.transpose(self.order)
        if plain.size != math.prod(self.value_shape):
            raise BnnccError(
                f"'{self.node}' has shape {value.shape} in the reference, {self.value_shape} as stored in the "
                "artifact: the reference is not the model that was compiled"
            )
        plain = plain.reshape(self.value_shape)
        if self.levels is not None:
            plain = Levels(self.levels).of(plain)
        if self.layout is None:
            return np.ascontiguousarray(plain, self.dtype)
        top, left, bottom, right = self.padding
        if any(self.padding):
            widths = ((0, 0), (top, bottom), (left, right), (0, 0))
            plain = np.pad(plain, widths, constant_values=self.pad_value)
        if isinstance(self.layout, ByteLayout):
            return self.layout.pack(plain)
        if self.levels is not None:
            planes = [self.layout.pack((plain >> plane & 1).astype(bool)) for plane in range(self.planes)]
            return np.stack(planes, axis=-2).view(self.dtype).reshape(self.shape)
        planes = [self.layout.pack(plain > 0)]
        if self.planes == 2:
            planes.append(self.layout.pack(plain != 0))
        return np.stack(planes, axis=-2).view(self.dtype).reshape(self.shape)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """The value in stored axes, without padding: −1/0/+1 as int8 for packed signs, else floats or the array."""
        if self.layout is None:
            return stored
        top, left, bottom, right = self.padding
        if any(self.padding):
            stored = stored[:, top : stored.shape[1] - bottom, left : stored.shape[2] - right]
        if isinstance(self.layout, ByteLayout) and self.levels is not None:
            return self.levels[np.clip(self.layout.unpack(stored), 0, len(self.levels) - 1)]
        if self.levels is not None:
            index = sum(self.layout.unpack(stored[..., p, :]).astype(int) << p for p in range(self.planes))
            return self.levels[np.minimum(index, len(self.levels) - 1)]
        if self.planes == 1:
            return np.where(self.layout.unpack(stored), np.int8(1), np.int8(-1))
        positive, nonzero = (self.layout.unpack(stored[..., plane, :]) for plane in (0, 1))
        return np.where(nonzero, np.where(positive, np.int8(1), np.int8(-1)), np.int8(0))
