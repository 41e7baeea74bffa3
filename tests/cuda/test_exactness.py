"""The grids of `tests/conformance` on the emulated GPU: whole networks, bit for bit against eager PyTorch.

What precedes and follows each layer comes with it: packing, thresholds and tables, batch norm, ReLU, residuals.
`make test` takes a few cases of every kind, `make conformance` all of them and drawn points. Architectures take turns;
where the seed is another one, others get a case.
"""

from __future__ import annotations

import functools
import os
import zlib
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from networks import run
from torch import nn
from torch.nn import functional as F

from ..conformance.branches import Branches, Case, awkward, batch_norm, compare, sign, signs
from ..conformance.points import GRIDS, draw, pairwise
from ..conformance.test_grid import case as of_point
from ..conformance.test_integers import AXES, pairs
from ..conformance.test_layers import GRIDS as LAYERS
from ..conformance.test_published import differences, pairs_of_widths, published

#: One architecture for each of the instructions that multiply tiles of bits.
ARCHITECTURES = ("cuda-sm_75", "cuda-sm_80", "cuda-sm_90", "cuda-sm_100")

_SEED, _COUNT, _MODULE = int(os.environ.get("SEED", "0")), int(os.environ.get("POINTS", "3000")) // 10, 25


@functools.cache
def _grid() -> list[Case]:
    return [of_point(point) for grid in GRIDS.values() for point in pairwise(grid)]


#: Name → the cases, made when they are needed.
_EQUAL: dict[str, Callable[[], Sequence[Case]]] = {
    "convolutions": _grid,
    "bytes": lambda: pairs(AXES),
    **{name: functools.partial(LAYERS.__getitem__, name) for name in LAYERS},
}


def _emulated(cases: Sequence[Case], target: str) -> list[np.ndarray]:
    """The outputs of the cases, which are branches of one network."""
    return run(Branches([case.module for case in cases]).eval(), [case.input for case in cases], target)


def _turn(target: str) -> int:
    return (ARCHITECTURES.index(target) + _SEED) % len(ARCHITECTURES)


@pytest.mark.conformance
@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("name", _EQUAL)
def test_every_pair_of_values(name: str, target: str) -> None:
    cases = _EQUAL[name]()[_turn(target) :: len(ARCHITECTURES)]
    compare(cases, _emulated(cases, target), target)


@pytest.mark.conformance
@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("made", [pairs_of_widths, published])
def test_levels_of_bits(made: Callable[[], list[Case]], target: str) -> None:
    cases = made()[_turn(target) :: len(ARCHITECTURES)]
    assert not differences(cases, _emulated(cases, target))


@pytest.mark.conformance
@pytest.mark.parametrize("first", range(0, _COUNT, _MODULE), ids=lambda first: f"seed{_SEED}-{first}")
def test_random_points(first: int) -> None:
    """A tenth of the points that processors are given: each kernel is compiled, and run thread by thread."""
    target = ARCHITECTURES[first // _MODULE % len(ARCHITECTURES)]
    cases = [of_point(point) for point in draw(_COUNT, _SEED)[first : first + _MODULE]]
    compare(cases, _emulated(cases, target), target)


# -- what `make test` runs -------------------------------------------------------------------------------------------


class _Residual(nn.Module):
    """Signs, a convolution, batch norm, a residual added, PReLU, and again signs and a convolution: the sum is stored
    as floats and as bits."""

    def __init__(self, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("first", signs((channels, channels, 3, 3), generator))
        self.register_buffer("second", signs((40, channels, 1, 1), generator))
        self.norm = batch_norm(channels, 9 * channels, generator)
        self.slope = nn.PReLU(channels)
        nn.init.normal_(self.slope.weight, generator=generator)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(F.conv2d(F.pad(sign(x), (1, 1, 1, 1), value=-1.0), self.first))
        y = self.slope(y + x)
        return torch.cat([F.conv2d(sign(y), self.second), y], 1)


class _Layer(nn.Module):
    """A function of signs, or of ternary signs, and weights of ±1."""

    def __init__(self, function: Callable[..., torch.Tensor], weight: torch.Tensor, ternary: bool) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.function, self.quantize = function, torch.sign if ternary else sign

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self.quantize(x), self.weight)


def _kinds() -> list[Case]:
    """One of each kind of layer, larger than a tile in every direction where it is not deep."""
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, tuple[Callable[..., torch.Tensor], tuple[int, ...], tuple[int, ...]]] = {
        "dense": (F.linear, (70, 1000), (3, 1000)),
        "groups": (lambda x, w: F.conv2d(x, w, groups=3), (66, 40, 3, 3), (2, 120, 7, 8)),
        "strides": (lambda x, w: F.conv2d(x, w, stride=(2, 3), padding=1), (33, 96, 3, 2), (1, 96, 9, 10)),
        "dilations": (lambda x, w: F.conv2d(x, w, dilation=(3, 2)), (32, 65, 2, 3), (2, 65, 8, 9)),
        "1d": (lambda x, w: F.conv1d(x, w, padding=2, stride=2), (40, 33, 5), (2, 33, 31)),
        "one tensor twice": (lambda x, w: torch.cat([F.conv2d(x, w)] * 2, 1), (33, 40, 1, 1), (1, 40, 3, 5)),
        "3d": (lambda x, w: F.conv3d(x, w, padding=1), (8, 20, 2, 3, 3), (1, 20, 3, 4, 5)),
        "transposed": (lambda x, w: F.conv_transpose2d(x, w, stride=2, padding=1), (33, 20, 3, 3), (1, 33, 5, 4)),
    }
    cases = [Case("a residual block", _Residual(96, generator), awkward((2, 96, 6, 7), generator))]
    for number, (name, (function, weight, image)) in enumerate(layers.items()):
        module = _Layer(function, signs(weight, generator), bool(number % 2))
        cases.append(Case(name, module, awkward(image, generator)))
    return cases


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_every_kind_of_layer(target: str) -> None:
    """And a few cases of every grid, which the name of the grid decides."""
    cases = _kinds()
    for name, made in _EQUAL.items():
        start = 4 * (zlib.crc32(name.encode()) % 8) + ARCHITECTURES.index(target)
        cases += made()[start :: 128 if name == "convolutions" else 64]
    compare(cases, _emulated(cases, target), target)


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_some_levels_of_bits(target: str) -> None:
    cases = pairs_of_widths()[ARCHITECTURES.index(target) :: 16]
    assert not differences(cases, _emulated(cases, target))
