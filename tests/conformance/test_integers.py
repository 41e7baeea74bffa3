"""Convolutions of bytes, bit for bit: every shape, zero point and padding, and sums that 16 bits would not hold."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .branches import RUNS, Case, check
from .pairwise import all_pairs

AXES = {
    "channels": [1, 3, 4, 8, 33, 64],
    "groups": [1, 2],
    "out": [1, 4, 17, 32],
    "kernel": [(1, 1), (3, 3), (2, 3)],
    "stride": [1, 2],
    "padding": [0, 1],
    "pad_value": [0, -3],
    "levels": [(0, 255), (-128, 127), (-5, 122), (0, 15)],
    "weight": ["full", "lowest", "zero point", "small"],
}

WEIGHTS = {"full": (-128, 127), "lowest": (-128, -127), "zero point": (-255, 0), "small": (-90, 90)}


class _Conv(nn.Module):
    """Integers from `low` to `high` times integer weights: eager's float sums are exact below 2²⁴."""

    def __init__(self, weight: torch.Tensor, low: int, high: int, pad_value: int, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.low, self.high, self.pad_value, self.options = low, high, pad_value, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.clamp(torch.round(x), self.low, self.high)
        padding = self.options.get("padding", 0)
        if padding and self.pad_value:
            x = F.pad(x, [padding] * 4, value=self.pad_value)
            return F.conv2d(x, self.weight, **{**self.options, "padding": 0})
        return F.conv2d(x, self.weight, **self.options)


def _case(name: str, channels: int, groups: int, out: int, kernel: Any, stride: int, padding: int, pad_value: int,
          levels: tuple[int, int], weight: str) -> Case:  # fmt: skip
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    low, high = WEIGHTS[weight]
    values = torch.randint(low, high + 1, (out * groups, channels, *kernel), generator=generator).float()
    values.view(-1)[0] = low  # else a common factor could belong to the scale
    module = _Conv(values, *levels, pad_value, stride=stride, padding=padding, groups=groups)
    x = torch.randn(2, channels * groups, 6, 7, generator=generator) * 150
    x[0] = levels[0]  # a whole image of the lowest value: the largest sums
    return Case(name, module, x)


def _valid(row: Any) -> bool:
    channels, groups, *_ = row
    return groups == 1 or channels >= 4  # small groups stay float


def pairs(axes: Mapping[str, Sequence[Any]]) -> list[Case]:
    """Convolutions that hold every pair of values."""
    rows = all_pairs(axes, _valid)
    return [_case(", ".join(f"{axis} {value}" for axis, value in zip(axes, row, strict=True)), *row) for row in rows]


@pytest.mark.parametrize(("target", "share"), RUNS)
def test_bytes_are_exact(target, share, tmp_path):
    check(pairs(AXES)[share], target, tmp_path, kinds={"integer"})


@pytest.mark.qemu
def test_sdot(tmp_path):
    check(pairs({axis: values[:2] for axis, values in AXES.items()}), "cortex-a76", tmp_path, kinds={"integer"})
