"""The bit convention, and nothing else: which bit is +1, where a channel's bit lies, what padding bits hold.

A packed tensor keeps the pixel axes of an NHWC tensor and replaces its channel axis by words:

* bit 1 means the value +1, bit 0 the value −1; a product of K terms is ``K − 2·popcount(a xor w)``.
* Each group's channels are padded to a whole number of words. Padding bits are 0 in both operands, so that they cancel.
* Inside a group, channels lie in blocks of ``8·lanes``: channel ``block·8·lanes + v·lanes + l`` is bit ``v`` (0 is the
  least significant) of byte ``block·lanes + l``. So eight vectors of ``lanes`` comparisons pack into one of bytes
  without any horizontal operation; activations and weights share the permutation, which therefore never shows.
* Words are those bytes read little-endian.
* Ternary values (−1, 0, +1) are two planes of words: the sign plane (1 means > 0), then the non-zero plane.

This file is part of the artifact's format: the compiler packs weights with it, the parity check eager's values.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

WORD_BITS = (8, 32, 64)


@dataclass(frozen=True)
class BitLayout:
    """How the channel axis of one packed tensor is laid out.

    channels: the true number of channels, all groups together; a multiple of `groups`.
    word_bits: 8, 32 or 64. lanes: bytes per block, a power of two.
    """

    channels: int
    groups: int
    word_bits: int
    lanes: int

    @classmethod
    def for_target(cls, channels: int, groups: int, word_bits: int, max_lanes: int) -> BitLayout:
        """The layout with the most lanes (at most `max_lanes`) whose blocks fill a group exactly."""
        group_bytes = -(-(channels // groups) // word_bits) * word_bits // 8
        lanes = max_lanes
        while group_bytes % lanes:
            lanes //= 2
        return cls(channels, groups, word_bits, lanes)

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of one pixel, padding included."""
        return -(-self.group_channels // self.word_bits) * self.word_bits // 8

    @property
    def group_words(self) -> int:
        return self.group_bytes * 8 // self.word_bits

    @property
    def bytes(self) -> int:
        """Bytes of one pixel."""
        return self.groups * self.group_bytes

    @property
    def words(self) -> int:
        return self.groups * self.group_words

    @property
    def word_dtype(self) -> str:
        return f"uint{self.word_bits}"

    def pack(self, bits: np.ndarray) -> np.ndarray:
        """Packs booleans [..., channels] into words [..., words] of `word_dtype`."""
        pixels = bits.shape[:-1]
        padded = np.zeros((*pixels, self.groups, self.group_bytes * 8), np.uint8)
        padded[..., : self.group_channels] = bits.reshape(*pixels, self.groups, self.group_channels)
        blocks = padded.reshape(*pixels, self.bytes // self.lanes, 8, self.lanes)
        packed = np.packbits(blocks, axis=-2, bitorder="little")
        return packed.reshape(*pixels, self.bytes).view(self.word_dtype)

    def unpack(self, words: np.ndarray) -> np.ndarray:
        """Unpacks words [..., words] into booleans [..., channels]."""
        pixels = words.shape[:-1]
        packed = np.ascontiguousarray(words).view(np.uint8).reshape(*pixels, self.bytes // self.lanes, 1, self.lanes)
        bits = np.unpackbits(packed, axis=-2, bitorder="little").reshape(*pixels, self.groups, -1)
        return bits[..., : self.group_channels].reshape(*pixels, self.channels).astype(bool)

    def constant_bytes(self, bit: int) -> np.ndarray:
        """One pixel, uint8 [bytes], whose true channels all hold `bit`."""
        return self.pack(np.full(self.channels, bool(bit))).view(np.uint8)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Levels:
    """The values of a quantized activation, float32, ascending and evenly spaced; a value's level is its index.

    The level of any x is ``nearbyint((x − lowest) · inverse)``, clamped, each operation rounded to float32: kernels and
    the parity check compute it alike, so that they agree on ties.
    """

    values: np.ndarray

    @classmethod
    def affine(cls, scale: float, first: int, most: int) -> Levels:
        """``scale · (first + level)`` for the levels 0 … most."""
        return cls((np.arange(first, first + most + 1, dtype=np.float32) * np.float32(scale)).astype(np.float32))

    @property
    def lowest(self) -> np.float32:
        return np.float32(self.values[0])

    @property
    def most(self) -> int:
        """The greatest level."""
        return len(self.values) - 1

    @property
    def inverse(self) -> np.float32:
        """One over the distance of two neighbours."""
        wide = self.values.astype(np.float64)
        return np.float32(self.most / (wide[-1] - wide[0]))

    def of(self, x: np.ndarray) -> np.ndarray:
        """The levels of x, int64; NaN has level 0."""
        steps = np.rint((x.astype(np.float32) - self.lowest) * self.inverse)
        return np.clip(np.nan_to_num(steps, nan=0.0), 0, self.most).astype(np.int64)


@dataclass(frozen=True)
class ByteLayout:
    """How the channel axis of a tensor of levels lies in bytes, where a value takes more bits than planes are good for.

    channels: the true number of channels, all groups together; a multiple of `groups`. Each group is padded to whole
    words of four bytes, which hold 0.
    offset: what is subtracted from a level: 0 (stored as uint8) or 128 (as int8).
    """

    channels: int
    groups: int
    offset: int

    @property
    def group_channels(self) -> int:
        return self.channels // self.groups

    @property
    def group_bytes(self) -> int:
        """Bytes of one group of one pixel, padding included."""
        return -(-self.group_channels // 4) * 4

    @property
    def bytes(self) -> int:
        """Bytes of one pixel."""
        return self.groups * self.group_bytes

    @property
    def dtype(self) -> str:
        return "int8" if self.offset else "uint8"

    def pack(self, levels: np.ndarray) -> np.ndarray:
        """Levels 0 … 255 [..., channels] as bytes [..., bytes] of `dtype`."""
        pixels = levels.shape[:-1]
        padded = np.zeros((*pixels, self.groups, self.group_bytes), self.dtype)
        padded[..., : self.group_channels] = levels.reshape(*pixels, self.groups, -1).astype(np.int16) - self.offset
        return padded.reshape(*pixels, self.bytes)

    def unpack(self, stored: np.ndarray) -> np.ndarray:
        """Bytes [..., bytes] as levels, int16 [..., channels]."""
        pixels = stored.shape[:-1]
        grouped = stored.reshape(*pixels, self.groups, self.group_bytes)[..., : self.group_channels]
        return grouped.reshape(*pixels, self.channels).astype(np.int16) + np.int16(self.offset)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
