"""What stands around binary convolutions: packing, pooling, linear layers, weight-only layers, chains of layers.

Each grid is covered pairwise; every output equals eager's bit for bit.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .branches import QUANTIZERS, RUNS, TARGETS, BitReader, Case, awkward, batch_norm, check, sign, signs
from .pairwise import Row, all_pairs


def _cases(
    axes: Mapping[str, Sequence[Any]],
    build: Callable[..., tuple[nn.Module, torch.Tensor]],
    valid: Callable[[Row], bool] = lambda row: True,
) -> list[Case]:
    """A case for each row of a pairwise design; build(*row, generator) → module and input."""
    cases = []
    for row in all_pairs(axes, valid):
        name = ", ".join(f"{axis} {value}" for axis, value in zip(axes, row, strict=True))
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        cases.append(Case(name, *build(*row, generator)))
    return cases


class BinaryConv2d(nn.Conv2d):
    """sign → padding with a constant → convolution with fixed random ±1 weights."""

    def __init__(
        self, channels: int, out: int, kernel: Any, generator: torch.Generator, *, pad: int = 0, value: float = -1.0,
        quantizer: str = "sign", **kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__(channels, out, kernel, bias=False, **kwargs)
        self.weight.data = signs(self.weight.shape, generator)
        self.pad, self.value, self.quantizer = pad, value, quantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = QUANTIZERS[self.quantizer](x)
        return super().forward(F.pad(x, [self.pad] * 4, value=self.value) if self.pad else x)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


# -- packing ---------------------------------------------------------------------------------------------------------

_MORE_QUANTIZERS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **QUANTIZERS,
    "x >= 0": lambda x: torch.where(x >= 0, 1.0, -1.0),
    "not x <= 0": lambda x: torch.where(x <= 0, -1.0, 1.0),
}

_PACKING = {
    "channels": (1, 2, 7, 8, 9, 31, 32, 33, 63, 64, 65, 128, 130),
    "image": ((1, 1, 1), (1, 5, 3), (3, 2, 4)),
    "quantizer": tuple(_MORE_QUANTIZERS),
}


def _packing(channels: int, image: tuple[int, int, int], quantizer: str, generator: torch.Generator) -> Any:
    module = nn.Sequential(Apply(_MORE_QUANTIZERS[quantizer]), BitReader(channels, quantizer=None))
    return module, awkward((image[0], channels, *image[1:]), generator)


# -- pooling of signs ------------------------------------------------------------------------------------------------

_POOLING = {
    "image": ((7, 7, 1), (7, 7, 64), (7, 7, 130), (8, 5, 1), (8, 5, 64), (8, 5, 200)),
    "window": ((1, 1), (2, 2), (3, 3), (2, 3)),
    "stride": (1, 2, (2, 3)),
    "padding": (0, 1),
    "ceil_mode": (False, True),
    "of": ("the input's signs", "a convolution's signs", "ternary signs", "floats"),
}


def _pooling(
    image: tuple[int, int, int], window: Any, stride: Any, padding: int, ceil_mode: bool, of: str, generator: Any
) -> Any:
    height, width, channels = image
    pool = nn.MaxPool2d(window, stride, padding, ceil_mode=ceil_mode)
    before = {
        "the input's signs": [Apply(sign), pool],
        "a convolution's signs": [
            BinaryConv2d(channels, channels, 3, generator, pad=1), batch_norm(channels, 9 * channels, generator),
            Apply(sign), pool,
        ],
        "ternary signs": [Apply(torch.sign), pool],
        "floats": [pool, Apply(sign)],
    }[of]  # fmt: skip
    return nn.Sequential(*before, BitReader(channels, quantizer=None)), awkward((2, channels, height, width), generator)


def _pools(row: Row) -> bool:
    """PyTorch's own rule: padding is at most half of the window."""
    return all(2 * row[3] <= extent for extent in row[1])


# -- pixels in another order -----------------------------------------------------------------------------------------

_MOVES: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {
    **{m: lambda s, mode=m: F.pad(s, (1, 2) * (s.ndim - 2), mode) for m in ("reflect", "replicate", "circular")},
    "first axis reversed": lambda s: s.flip(2),
    "last axis reversed": lambda s: s.flip(-1),
    "enlarged": lambda s: F.interpolate(s, scale_factor=2),
}  # fmt: skip
_MOVED = {"rank": (1, 2, 3), "move": tuple(_MOVES), "quantizer": tuple(QUANTIZERS), "channels": (3, 33)}
_EXTENTS = (4, 3, 5)


def _moved(rank: int, move: str, quantizer: str, channels: int, generator: torch.Generator) -> Any:
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1]
    weight = nn.Parameter(signs((5, channels, *(2,) * rank), generator))

    class Moved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return conv(_MOVES[move](QUANTIZERS[quantizer](x)), self.weight)

    return Moved(), awkward((2, channels, *_EXTENTS[:rank]), generator)


# -- volumes ---------------------------------------------------------------------------------------------------------

_VOLUMES = {
    "kernel": ((1, 2, 2), (1, 1, 1), (2, 1, 1), (3, 3, 2)),
    "padding": ((0, 0, 0), (2, 0, 0), (0, 1, 1), (1, 2, 1)),
    "value": (-1.0, 0.0, 1.0),
    "stride": (1, 2),
    "dilation": (1, 2),
    "groups": (1, 3),
    "quantizer": tuple(QUANTIZERS),
    "weight": ("binary", "ternary"),
}


class _Volume(nn.Module):
    """quantize → padding with a constant → 3-D convolution, its depth gathered into channels by the compiler."""

    def __init__(self, row: Row, generator: torch.Generator) -> None:
        super().__init__()
        kernel, self.padding, self.value, self.stride, self.dilation, self.groups, quantizer, weight = row
        self.quantize = QUANTIZERS[quantizer]
        shape = (6, 6 // self.groups, *kernel)
        self.register_buffer("weight", signs(shape, generator, ternary=weight == "ternary"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        widths = [width for width in reversed(self.padding) for _ in range(2)]
        padded = F.pad(self.quantize(x), widths, value=self.value) if any(widths) else self.quantize(x)
        return F.conv3d(padded, self.weight, None, self.stride, 0, self.dilation, self.groups)


def _volume(*row: Any) -> Any:
    *options, generator = row
    return _Volume(tuple(options), generator), awkward((2, 6, 5, 5, 6), generator)


# -- linear layers ---------------------------------------------------------------------------------------------------

_LINEAR = {
    "batch": (1, 3, 17),
    "inputs": (1, 7, 64, 100, 1000, 4608),
    "outputs": (1, 10, 130),
    "quantizer": tuple(QUANTIZERS),
    "then": ("nothing", "batch norm", "packed"),
}


class _Linear(nn.Linear):
    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__(inputs, outputs, bias=False)
        self.weight.data = signs(self.weight.shape, generator)


def _linear(batch: int, inputs: int, outputs: int, quantizer: str, then: str, generator: torch.Generator) -> Any:
    layers: list[nn.Module] = [Apply(QUANTIZERS[quantizer]), _Linear(inputs, outputs, generator)]
    if then != "nothing":
        norm, image_norm = nn.BatchNorm1d(outputs), batch_norm(outputs, inputs, generator)
        norm.load_state_dict(image_norm.state_dict())
        layers.append(norm)
    if then == "packed":
        layers += [Apply(sign), _Linear(outputs, 20, generator)]
    return nn.Sequential(*layers), awkward((batch, inputs), generator)


# -- weight-only binary layers: floats times ±1 ----------------------------------------------------------------------

_WEIGHT_ONLY = {
    "channels": ((1, 1), (3, 8), (64, 64), (32, 33), (130, 7)),
    "kernel": (1, 3, (2, 3)),
    "groups": (1, "depthwise"),
    "scale": (1.0, 0.5),
    "padding": (0, 1, -1),
    "stride": (1, 2),
}


def _weight_only(
    channels: tuple[int, int], kernel: Any, groups: Any, scale: float, padding: int, stride: int, generator: Any
) -> Any:
    """Inputs are small integers, whose sums are exact in any order; so is a scale that is a power of two."""
    inputs, outputs = channels
    if groups == "depthwise":
        outputs = groups = inputs
    layer = nn.Conv2d(inputs, outputs, kernel, stride, bias=False, groups=groups)
    layer.weight.data = scale * signs(layer.weight.shape, generator)
    pad = Apply(lambda x: F.pad(x, (abs(padding),) * 4, value=float(padding)))
    image = torch.randint(-50, 50, (2, inputs, 6, 5), generator=generator).float()
    return nn.Sequential(nn.ReLU(), pad, layer) if padding else nn.Sequential(nn.ReLU(), layer), image


# -- chains ----------------------------------------------------------------------------------------------------------

_CHAINS = {
    "channels": (1, 3, 32, 64, 72),
    "image": ((1, 1), (4, 4), (5, 9)),
    "batch": (1, 3),
    "kernel": (1, 2, 3, 4),
    "padding": (-1.0, 0.0, 1.0),
    "groups": (1, "all"),
    "between": ("sign", "residual", "PReLU", "turning PReLU", "pool", "ReLU"),
}


class _Chain(nn.Module):
    """Three binary convolutions with 'same' padding; the middle one pads bits, or floats behind a residual."""

    def __init__(self, channels: int, kernel: int, padding: float, groups: int, between: str, generator: Any) -> None:
        super().__init__()
        self.between = between
        self.spread = ((kernel - 1) // 2, kernel // 2) * 2
        self.value = padding
        size = channels // groups
        self.weights = nn.ParameterList(signs((channels, size, kernel, kernel), generator) for _ in range(3))
        self.norms = nn.ModuleList(batch_norm(channels, size * kernel**2, generator) for _ in range(3))
        self.prelu = nn.PReLU(channels)
        slopes = torch.rand(channels, generator=generator)
        self.prelu.weight.data = -slopes if between == "turning PReLU" else slopes
        self.groups = groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight, norm in zip(self.weights, self.norms, strict=True):
            padded = F.pad(sign(x), self.spread, value=self.value) if any(self.spread) else sign(x)
            y = norm(torch.conv2d(padded, weight, groups=self.groups))
            if self.between == "residual":
                y = y + x
            elif "PReLU" in self.between:
                y = self.prelu(y)
            elif self.between == "pool":
                y = F.max_pool2d(y, 3, 1, 1)
            elif self.between == "ReLU":
                y = F.relu(y) - 0.25
            x = y
        return x


def _chain(
    channels: int, image: Any, batch: int, kernel: int, padding: float, groups: Any, between: str, generator: Any
) -> Any:
    groups = channels if groups == "all" else 1
    x = torch.randn(batch, channels, *image, generator=generator).round(decimals=1)  # zeros among them
    return _Chain(channels, kernel, padding, groups, between, generator), x


#: Name → cases. On machines with a GPU, `benchmarks.cuda_build` takes them, too.
GRIDS = {
    "packing": _cases(_PACKING, _packing),
    "pooling": _cases(_POOLING, _pooling, _pools),
    "volumes": _cases(_VOLUMES, _volume),
    "pixels in another order": _cases(_MOVED, _moved),
    "linear": _cases(_LINEAR, _linear),
    "weight-only": _cases(_WEIGHT_ONLY, _weight_only),
    "chains": _cases(_CHAINS, _chain),
}


@pytest.mark.parametrize(("target", "share"), RUNS)
@pytest.mark.parametrize("grid", GRIDS)
def test_equal_to_eager(grid, target, share, tmp_path):
    check(GRIDS[grid][share], target, tmp_path)


class _Slices(nn.Module):
    """A depthwise binary 3-D convolution of signs padded with +1."""

    def __init__(self, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        self.weight = nn.Parameter(signs((channels, 1, 3, 3, 3), generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(sign(x), [1] * 6, value=1.0)
        return F.conv3d(padded, self.weight, groups=len(self.weight))


@pytest.mark.parametrize("target", TARGETS)
def test_slices_that_fill_no_whole_vectors(target, tmp_path):
    """LLVM 22 read another group's bits in the rest of a vector of bytes (17 and 33 channels on AVX-512)."""
    generator = torch.Generator().manual_seed(0)
    cases = [
        Case(f"{c} channels", _Slices(c, generator), awkward((2, c, 1, 4, 2), generator))
        for c in (1, 9, 15, 16, 17, 31, 33, 41)
    ]
    check(cases, target, tmp_path)
