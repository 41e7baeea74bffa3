"""Quantizations as they are published, and every width of bits: products of levels are exact integers.

A layer multiplies levels of activations (an integer times a step) with levels of weights. Eager sums products of
floats; where the steps are powers of two it rounds nowhere, and the artifact is bit-equal. Otherwise eager itself is
off by roundings, and what must hold is more than closeness: each result is the exact integer sum times one float for
each channel, rounded once.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnncc.runtime.container import read_manifest

from .branches import RUNS, TARGETS, BitReader, Case, batch_norm, chunks, differs, run, sign
from .pairwise import Row, all_pairs

Function = Callable[[torch.Tensor], torch.Tensor]

_LAYERS: dict[str, Any] = {"linear": F.linear, "conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}
_EXTENTS: dict[str, tuple[int, ...]] = {"linear": (), "conv1d": (9,), "conv2d": (4, 5), "conv3d": (3, 2, 4)}


@dataclass(frozen=True)
class Levels:
    """A quantizer: its values are integers times `step` (a float, or [O, 1, …] for the outputs of a weight)."""

    quantize: Function
    step: Any

    def integers(self, x: torch.Tensor) -> torch.Tensor:
        return torch.round(self.quantize(x).double() / self.step)


class Product(nn.Module):
    """One layer of quantized activations and weights, as its authors compute it."""

    def __init__(self, layer: str, activation: Levels, weight: torch.Tensor, quantizer: Levels) -> None:
        super().__init__()
        self.layer, self.activation, self.quantizer = _LAYERS[layer], activation, quantizer
        self.weight = nn.Parameter(weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(self.activation.quantize(x), self.quantizer.quantize(self.weight))

    def integers(self, x: torch.Tensor) -> np.ndarray:
        """The exact sums, float32, which holds them."""
        sums = self.layer(self.activation.integers(x), self.quantizer.integers(self.weight)).numpy()
        assert np.abs(sums).max() < 1 << 24
        return sums.astype("float32")

    def factors(self) -> np.ndarray:
        """What the sums are multiplied with, float32 [O]."""
        step = torch.as_tensor(self.activation.step, dtype=torch.float64) * self.quantizer.step
        return step.float().reshape(-1).expand(len(self.weight)).numpy()


def _is_scaled(actual: np.ndarray, sums: np.ndarray, factors: np.ndarray) -> bool:
    """Whether a result [N, O, …] is the sums times one factor for each channel: one that float32 may have for the
    product of two steps, a few last bits around it."""
    for channel, factor in enumerate(factors):
        nearby = [np.float32(float(factor) * (1 + ulps * 2.0**-24)) for ulps in range(-8, 9)]
        if not any(np.array_equal(actual[:, channel], sums[:, channel] * f) for f in nearby):
            return False
    return True


def _check(cases: Sequence[Case], target: str, folder: Any) -> None:
    """Every layer is computed on bits or integers, exactly; bit-equal to eager where no step is rounded."""
    outputs = run(cases, target, folder)
    layers = read_manifest(folder / "model.so")["versions"][0]["layers"]
    assert len(layers) == len(cases)
    floats = [f"{row['path']}: {row['op']}" for row in layers if row["op"].startswith(("float", "weight-only"))]
    wrong = [*floats, *differences(cases, outputs)]
    if wrong:
        pytest.fail(f"on {target}:\n" + "\n".join(wrong), False)


def differences(cases: Sequence[Case], outputs: Sequence[np.ndarray]) -> list[str]:
    """Where products are not what they must be, a line for each. cases: of `Product`."""
    wrong = []
    for case, actual in zip(cases, outputs, strict=True):
        module: Any = case.module
        with torch.no_grad():
            eager, sums = module(case.input).numpy(), module.integers(case.input)
        factors = module.factors()
        if (np.frexp(factors)[0] == 0.5).all():
            wrong += [f"{case.name}: {difference}" for difference in [differs(actual, eager)] if difference]
        elif np.abs(actual - eager).max() > 1e-5 * np.abs(eager).max():
            wrong.append(f"{case.name}: not close to eager")
        elif not _is_scaled(actual, sums, factors):
            wrong.append(f"{case.name}: sums are not exact")
    return wrong


# -- every width -----------------------------------------------------------------------------------------------------

_WIDTHS = {
    "activation bits": tuple(range(1, 9)),
    "weight bits": (1, 2, 3, 4),
    "activations": ("unipolar", "bipolar"),
    "weights": ("two's complement", "bipolar"),
    "step": ("a power of two", "powers of two per channel", "learned", "learned per channel"),
    "layer": tuple(_LAYERS),
}
_OUTPUTS, _DEPTHS = 6, (8, 33, 70)


def _steps(kind: str, generator: torch.Generator, rank: int) -> tuple[float, Any]:
    """Of the activations, and of the weights."""
    count = _OUTPUTS if "channel" in kind else 1
    if "two" in kind:
        exponents = torch.randint(-5, 3, (count, *[1] * rank), generator=generator)
        return 0.25, 2.0**exponents
    return 0.0371, torch.rand((count, *[1] * rank), generator=generator) + 0.01


def _bipolar(x: torch.Tensor, bits: int, step: Any) -> torch.Tensor:
    """Odd integers from 1 − 2^bits to 2^bits − 1, times the step."""
    most = 2**bits - 1
    return (2 * torch.round(torch.clamp((x / step + most) / 2, 0, most)) - most) * step


def _integers(x: torch.Tensor, lowest: int, highest: int, step: Any) -> torch.Tensor:
    return torch.clamp(torch.round(x / step), lowest, highest) * step


def _width(row: Row) -> Case:
    activation_bits, weight_bits, activations, weights, kind, layer = row
    generator = torch.Generator().manual_seed(zlib.crc32(repr(row).encode()))
    depth = _DEPTHS[zlib.crc32(repr(row).encode()) % len(_DEPTHS)]
    extents = _EXTENTS[layer]
    a, w = _steps(kind, generator, len(extents) + 1)
    shape = (_OUTPUTS, depth, *[2] * len(extents))
    if activations == "bipolar":
        activation = Levels(lambda x: _bipolar(x, activation_bits, a), a)
    else:
        activation = Levels(lambda x: _integers(x, 0, 2**activation_bits - 1, a), a)
    if weights == "bipolar":
        integers = 2 * torch.randint(0, 2**weight_bits, shape, generator=generator) - (2**weight_bits - 1)
    else:
        integers = torch.randint(-(2 ** (weight_bits - 1)), 2 ** (weight_bits - 1), shape, generator=generator)
    integers.view(_OUTPUTS, -1)[:, 0] = -1  # so that no channel is a multiple of fewer levels
    x = torch.randn((2, depth, *extents), generator=generator) * a * 2**activation_bits
    ties = torch.round(2 * x / a) / 2 * a
    x = torch.where(torch.rand(x.shape, generator=generator) < 0.5, x, ties)
    name = ", ".join(f"{axis} {value}" for axis, value in zip(_WIDTHS, row, strict=True))
    return Case(name, Product(layer, activation, integers * w, Levels(lambda v: v, w)), x)


def pairs_of_widths() -> list[Case]:
    return [_width(row) for row in all_pairs(_WIDTHS, lambda row: True)]


@pytest.mark.parametrize(("target", "share"), RUNS)
def test_every_pair_of_widths_and_steps(target, share, tmp_path):
    _check(pairs_of_widths()[share], target, tmp_path)


# All 512 combinations of widths, forms and steps; kinds of layers take turns.
_EVERY = chunks(
    [
        (*widths, layer)
        for widths, layer in zip(
            itertools.product(*[*_WIDTHS.values()][:-1]), itertools.cycle((*_LAYERS, "conv2d")), strict=False
        )
    ],
    32,
)


@pytest.mark.conformance
@pytest.mark.parametrize("part", range(len(_EVERY)))
def test_every_width_and_step(part, tmp_path):
    _check([_width(row) for row in _EVERY[part]], "native", tmp_path)


# -- as published ----------------------------------------------------------------------------------------------------


def _per_channel(weight: torch.Tensor, function: Callable[..., torch.Tensor]) -> torch.Tensor:
    return function(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)


def _mean_sign(weight: torch.Tensor) -> Levels:
    """XNOR-Net (Rastegari et al. 2016, https://arxiv.org/abs/1603.05279), equation 6."""
    return Levels(lambda w: _per_channel(w.abs(), torch.mean) * sign(w), _per_channel(weight.abs(), torch.mean))


def _mean_sign_straight_through(weight: torch.Tensor) -> Levels:
    """As the code of ReActNet (Liu et al. 2020, https://arxiv.org/abs/2003.03488) has it, gradients and all."""

    def quantize(w: torch.Tensor) -> torch.Tensor:
        binary = _per_channel(w.abs(), torch.mean).detach() * torch.sign(w)
        clipped = torch.clamp(w, -1.0, 1.0)
        return binary.detach() - clipped.detach() + clipped

    return Levels(quantize, _per_channel(weight.abs(), torch.mean))


def _ternary_mean(weight: torch.Tensor) -> Levels:
    """Ternary weight networks (Li et al. 2016, https://arxiv.org/abs/1605.04711), equations 5 and 6, per channel."""

    def mask(w: torch.Tensor) -> torch.Tensor:
        return (w.abs() > 0.7 * _per_channel(w.abs(), torch.mean)).float()

    def scale(w: torch.Tensor) -> torch.Tensor:
        return _per_channel(mask(w) * w.abs(), torch.sum) / _per_channel(mask(w), torch.sum)

    return Levels(lambda w: scale(w) * torch.sign(w) * mask(w), scale(weight))


def _learned_step(lowest: int, highest: int, step: Any) -> Levels:
    """LSQ (Esser et al. 2020, https://arxiv.org/abs/1902.08153), as its appendix A spells the gradients."""

    def quantize(x: torch.Tensor) -> torch.Tensor:
        scaled = step * (1 - 0.1) + step * 0.1  # gradscale
        v = torch.clamp(x / scaled, lowest, highest)
        return ((torch.round(v) - v).detach() + v) * scaled

    return Levels(quantize, step * (1 - 0.1) + step * 0.1)


_SIGN, _TERNARY = Levels(sign, 1.0), Levels(torch.sign, 1.0)
_SHAPE = (9, 33, 3, 3)


def _rsign(shift: torch.Tensor) -> Levels:
    return Levels(lambda x: sign(x + shift), 1.0)


def published() -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_SHAPE, generator=generator)
    x = torch.randint(-8, 9, (2, 33, 5, 4), generator=generator) / 4
    shift = torch.randint(-8, 9, (1, 33, 1, 1), generator=generator) / 4
    steps = torch.rand((9, 1, 1, 1), generator=generator) + 0.1
    step = torch.tensor(0.213)
    pairs = {
        "XNOR-Net": (_SIGN, _mean_sign(weight)),
        "ReActNet": (_rsign(shift), _mean_sign_straight_through(weight)),
        "learned scale of signs": (Levels(lambda x: step * sign(x), step.double()), Levels(sign, 1.0)),
        "ternary × ternary": (_TERNARY, Levels(torch.sign, 1.0)),
        "ternary × ternary, scaled": (_TERNARY, _ternary_mean(weight)),
        "ternary × XNOR-Net": (_TERNARY, _mean_sign(weight)),
        "ternary by rounding × ternary": (_learned_step(-1, 1, step), _ternary_mean(weight)),
        "LSQ, 4 bits": (_learned_step(0, 15, step), _learned_step(-8, 7, torch.tensor(0.31))),
        "LSQ, 3 bits, signed": (_learned_step(-4, 3, step), _learned_step(-4, 3, torch.tensor(0.31))),
        "LSQ, 2 bits, steps per channel": (_learned_step(0, 3, step), _learned_step(-2, 1, steps)),
        "LSQ, 8 bits × signs": (_learned_step(-128, 127, step / 50), _mean_sign(weight)),
        "DoReFa, 2 bits": (Levels(lambda x: torch.round(torch.clamp(x, 0, 1) * 3) / 3, 1 / 3), _mean_sign(weight)),
    }
    return [Case(name, Product("conv2d", a, weight, w), x) for name, (a, w) in pairs.items()]


@pytest.mark.parametrize(("target", "share"), RUNS)
def test_published(target, share, tmp_path):
    _check(published()[share], target, tmp_path)


class ReActNet(nn.Module):
    """Blocks of ReActNet: RSign, 3×3 binary convolution, batch norm, shortcut, RPReLU; and a reader of the last signs.

    exact: multiply with alpha behind the convolution, where eager adds exact integers, instead of inside.
    """

    def __init__(self, channels: int, blocks: int, generator: torch.Generator) -> None:
        super().__init__()

        def normal(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.exact = False
        self.weights = nn.ParameterList(normal(channels, channels, 3, 3) for _ in range(blocks))
        self.shifts = nn.ParameterList(normal(1, channels, 1, 1) for _ in range(3 * blocks))
        self.norms = nn.ModuleList(batch_norm(channels, channels, generator) for _ in range(blocks))
        self.slopes = nn.ParameterList(normal(channels) for _ in range(blocks))
        self.reader = BitReader(channels)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for index, (weight, norm, slope) in enumerate(zip(self.weights, self.norms, self.slopes, strict=True)):
            before, inside, behind = self.shifts[3 * index : 3 * index + 3]
            if self.exact:
                alpha = _per_channel(weight.abs(), torch.mean).reshape(1, -1, 1, 1)
                y = F.conv2d(sign(x + before), torch.sign(weight), padding=1) * alpha
            else:
                y = F.conv2d(sign(x + before), _mean_sign_straight_through(weight).quantize(weight), padding=1)
            x = F.prelu(norm(y) + x + inside, slope) + behind
        return x, self.reader(x)


@pytest.mark.parametrize("target", TARGETS)
def test_blocks_of_reactnet_are_exact_but_for_the_place_of_their_scale(target, tmp_path):
    generator = torch.Generator().manual_seed(1)
    module = ReActNet(33, 3, generator).eval()
    x = torch.randn((1, 33, 6, 5), generator=generator)
    outputs = run([Case("ReActNet", module, x)], target, tmp_path)
    module.exact = True
    with torch.no_grad():
        expected = module(x)
    for actual, wanted in zip(outputs, expected, strict=True):
        assert differs(actual, wanted.numpy()) is None
