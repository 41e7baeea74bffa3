"""The exactness grid: every combination of these values is a binary convolution that must equal eager's bit for bit.

Shapes, filters, groups, strides, dilations and paddings are those of Larq Compute Engine's own tests
(tensorflow-style NHWC); what comes before and after the convolution is PyTorch's.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .pairwise import all_pairs

PAD_VALUES = {"zero": 0.0, "one": 1.0, "minus one": -1.0}


@dataclass(frozen=True)
class Point:
    """One binary convolution and what surrounds it.

    shape: of the input, (N, H, W, C). filter: (KH, KW, O).
    padding: "valid" is none; the others add TensorFlow's SAME padding (output = ⌈input / stride⌉) of that value, after
        the quantizer.
    quantizer: of the input; "sign" is +1 at zero and NaN, "heaviside" −1, "ternary" is `torch.sign`.
    weight: "binary" (±1) or "ternary" (−1, 0, +1).
    output: "float", or "packed": the sign of it, read by another binary convolution that keeps every bit visible.
    """

    shape: tuple[int, int, int, int]
    filter: tuple[int, int, int]
    groups: int
    strides: tuple[int, int]
    dilation: tuple[int, int]
    padding: str
    activation: str
    batch_norm: bool
    output: str
    quantizer: str
    weight: str

    def pads(self) -> tuple[int, int, int, int]:
        """(top, left, bottom, right) pixels around the image."""
        if self.padding == "valid":
            return (0, 0, 0, 0)
        totals = []
        for size, kernel, stride, dilation in zip(
            self.shape[1:3], self.filter, self.strides, self.dilation, strict=False
        ):
            out = -(-size // stride)
            totals.append(max((out - 1) * stride + dilation * (kernel - 1) + 1 - size, 0))
        return (totals[0] // 2, totals[1] // 2, totals[0] - totals[0] // 2, totals[1] - totals[1] // 2)


def excluded(point: Point) -> str | None:
    """Why a combination of values is no point of the grid; None if it is one."""
    if point.shape[3] % point.groups or point.filter[2] % point.groups:
        return "groups divide the channels of input and output"
    top, left, bottom, right = point.pads()
    if point.padding != "valid" and not any(point.pads()):
        return "padding that adds no pixel is the same point as valid"
    for size, kernel, dilation in zip(
        (point.shape[1] + top + bottom, point.shape[2] + left + right), point.filter, point.dilation, strict=False
    ):
        if size < dilation * (kernel - 1) + 1:
            return "the window fits into the padded image"
    return None


Grid = Mapping[str, Sequence[Any]]

_SURROUNDINGS: Grid = {
    "padding": ("valid", "zero", "one", "minus one"),
    "activation": ("none", "relu"),
    "batch_norm": (False, True),
    "output": ("float", "packed"),
    "quantizer": ("sign", "heaviside", "ternary"),
    "weight": ("binary", "ternary"),
}

GRIDS: Mapping[str, Grid] = {
    "small": {
        "shape": [(1, 4, 4, channels) for channels in (4, 64, 96, 128, 192, 256)],
        "filter": ((1, 1, 1), (3, 3, 4), (3, 3, 64)),
        "groups": (1, 2),
        "strides": ((1, 1),),
        "dilation": ((1, 1),),
        **_SURROUNDINGS,
    },
    # 76,800 terms to a product: more than a byte or a 16-bit accumulator holds.
    "overflow": {
        "shape": ((1, 6, 6, 3072),),
        "filter": ((5, 5, 4),),
        "groups": (1, 2),
        "strides": ((1, 1),),
        "dilation": ((1, 1),),
        **_SURROUNDINGS,
    },
    "big": {
        "shape": (
            (1, 7, 7, 4), (3, 8, 5, 64), (5, 7, 7, 96), (1, 8, 5, 128), (1, 7, 7, 192), (1, 8, 5, 256), (1, 7, 7, 512),
        ),
        "filter": (
            (1, 1, 1), (3, 3, 1), (2, 3, 2), (1, 1, 3), (3, 3, 4), (2, 3, 5), (1, 1, 6), (3, 3, 7), (2, 3, 32),
        ),
        "groups": (1, 2, 4),
        "strides": ((1, 1), (2, 3)),
        "dilation": ((1, 1), (3, 2)),
        **_SURROUNDINGS,
    },
}  # fmt: skip


def pairwise(grid: Grid) -> list[Point]:
    """Points that together hold every pair of values of two axes that any point of the grid holds."""
    ordered = {field.name: grid[field.name] for field in fields(Point)}
    return [Point(*row) for row in all_pairs(ordered, lambda row: excluded(Point(*row)) is None)]


def every(grid: Grid) -> Iterator[Point]:
    """All points of a grid."""
    axes = [grid[field.name] for field in fields(Point)]
    return (point for row in itertools.product(*axes) if excluded(point := Point(*row)) is None)


def draw(count: int, seed: int) -> list[Point]:
    """Points drawn from all grids together, each at most once, like ones beside each other: they share kernels."""
    everything = [point for grid in GRIDS.values() for point in every(grid)]
    return sorted(random.Random(seed).sample(everything, count), key=repr)
