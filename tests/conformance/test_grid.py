"""Binary convolutions of every shape and surrounding in the grid of `points`, bit for bit against eager PyTorch.

`make test` runs a pairwise design of each grid, each point on one of three targets; `make conformance` runs it on all
of them, and draws 3,000 points of all grids: the seed is printed, `make conformance SEED=n` repeats it, and POINTS=n
draws more or fewer.
"""

from __future__ import annotations

import os
import zlib

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .branches import QUANTIZERS, RUNS, TARGETS, BitReader, Case, awkward, batch_norm, check, chunks, signs
from .points import GRIDS, PAD_VALUES, Point, draw, pairwise

# Points to a module: enough that what a module costs by itself is small, few enough that it fits in the memory of two.
_MODULE = 40


class _Convolution(nn.Module):
    def __init__(self, point: Point, generator: torch.Generator) -> None:
        super().__init__()
        self.point = point
        channels = point.shape[3] // point.groups
        kh, kw, out = point.filter
        self.register_buffer("weight", signs((out, channels, kh, kw), generator, ternary=point.weight == "ternary"))
        self.norm = batch_norm(out, kh * kw * channels, generator) if point.batch_norm else nn.Identity()
        self.reader = BitReader(out, point.groups) if point.output == "packed" else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        point, (top, left, bottom, right) = self.point, self.point.pads()
        x, inside = QUANTIZERS[point.quantizer](x), (0, 0)
        if point.padding == "zero" and (top, left) == (bottom, right):
            inside = (top, left)  # as most models spell it
        elif any(point.pads()):
            x = F.pad(x, (left, right, top, bottom), value=PAD_VALUES[point.padding])
        x = F.conv2d(x, self.weight, None, point.strides, inside, point.dilation, point.groups)
        return self.reader(self.norm(F.relu(x) if point.activation == "relu" else x))


def case(point: Point) -> Case:
    """A point as a network of one convolution. `benchmarks.cuda_build` takes them, too."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(point).encode()))
    n, h, w, c = point.shape
    return Case(repr(point), _Convolution(point, generator), awkward((n, c, h, w), generator))


_PAIRWISE = {name: pairwise(grid) for name, grid in GRIDS.items()}


@pytest.mark.parametrize(("target", "share"), RUNS)
@pytest.mark.parametrize("points", _PAIRWISE.values(), ids=_PAIRWISE.keys())
def test_every_pair_of_values(points, target, share, tmp_path):
    for index, part in enumerate(chunks(points[share], _MODULE)):
        folder = tmp_path / str(index)
        folder.mkdir()
        check([case(point) for point in part], target, folder)


# One point of 8, so that all kinds of kernels run; `make conformance` runs all of them.
_SPARSE = [point for points in _PAIRWISE.values() for point in points][::8]


@pytest.mark.qemu
def test_some_points_on_32_bit_arm(tmp_path):
    check([case(point) for point in _SPARSE], "rpi2", tmp_path)


_SEED, _COUNT = int(os.environ.get("SEED", "0")), int(os.environ.get("POINTS", "3000"))
_POINTS = draw(_COUNT, _SEED)
_DRAWN = [_POINTS[first : first + _MODULE] for first in range(0, _COUNT, _MODULE)]


@pytest.mark.conformance
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("points", _DRAWN, ids=[f"seed{_SEED}-{index}" for index in range(len(_DRAWN))])
def test_random_points(points, target, tmp_path):
    check([case(point) for point in points], target, tmp_path)
