"""Signs behind an accumulator: every channel at every value that its accumulator can take, 0 flips against eager.

Channel o's weights are one common vector of ±1 times a sign of its own, and pixel p of the input is that vector with
its first p entries turned. So K + 1 pixels show every channel all of the accumulator's values ±(K − 2p), whichever of
them a batch norm puts its flip on.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from .branches import QUANTIZERS, RUNS, BitReader, Case, check, signs

_CHANNELS = 500


class Sweep(nn.Module):
    """A binary 1×1 convolution of `depth` terms, a chain of operations, a sign, and a reader of its bits."""

    def __init__(self, depth: int, chain: nn.Module, quantizer: str, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        common = signs((1, depth), generator)
        own = signs((channels, 1), generator)
        self.register_buffer("weight", (own * common)[:, :, None, None])
        turned = torch.arange(depth)[None] < torch.arange(depth + 1)[:, None]
        self.sweep = torch.where(turned, -common, common).T.reshape(1, depth, 1, depth + 1).contiguous()
        self.chain, self.reader = chain, BitReader(channels, quantizer=quantizer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.reader(self.chain(F.conv2d(QUANTIZERS["sign"](x), self.weight)))


def swept(name: str, depth: int, chain: nn.Module, quantizer: str, channels: int, seed: int) -> Case:
    module = Sweep(depth, chain, quantizer, channels, torch.Generator().manual_seed(seed))
    return Case(f"{name}, depth {depth}, {quantizer}, seed {seed}", module, module.sweep)


# -- batch norms -----------------------------------------------------------------------------------------------------


def random_batch_norm(channels: int, depth: int, eps: float, seed: int) -> nn.BatchNorm2d:
    """Batch norms of every awkward kind, the channels taking turns: see `_KINDS`."""
    generator = torch.Generator().manual_seed(seed)
    norm = nn.BatchNorm2d(channels, eps=eps)
    gamma = torch.randn(channels, generator=generator)
    beta = torch.randn(channels, generator=generator)
    mean = torch.randn(channels, generator=generator) * depth**0.5
    var = torch.rand(channels, generator=generator) * depth + 0.01
    value = depth - 2.0 * torch.randint(depth + 1, (channels,), generator=generator)  # one the accumulator takes
    for index, kind in enumerate(_KINDS):
        here = torch.arange(channels) % len(_KINDS) == index
        for tensor, changed in zip((gamma, beta, mean, var), kind(gamma, beta, mean, var, value), strict=True):
            tensor.copy_(torch.where(here, changed, tensor))
    norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var = gamma, beta, mean, var
    # Ties by rounding: β is minus what the batch norm makes of a value the accumulator takes, so that it becomes 0.
    with torch.no_grad():
        tie = torch.arange(channels) % len(_KINDS) == len(_KINDS) - 1
        norm.bias[tie] = 0
        norm.bias[tie] = -norm.eval()(value[None, :, None, None])[0, :, 0, 0][tie]
    return norm.eval()


def _nudged(value: torch.Tensor, towards: float) -> torch.Tensor:
    return torch.nextafter(value, torch.tensor(towards))


_INFINITY = float("inf")

#: (γ, β, mean, variance, value the accumulator takes) → (γ, β, mean, variance)
_KINDS = (
    lambda g, b, m, v, x: (g, b, m, v),
    lambda g, b, m, v, x: (g, b * 0, x, v),  # a tie: 0 at the value
    lambda g, b, m, v, x: (g, -(b * 0), x, v),  # and −0
    lambda g, b, m, v, x: (g, b * 0, _nudged(x, _INFINITY), v),  # the flip one rounding above the value
    lambda g, b, m, v, x: (g, b * 0, _nudged(x, -_INFINITY), v),  # and below
    lambda g, b, m, v, x: (g * 0, b, m, v),  # γ = 0: constant
    lambda g, b, m, v, x: (g * 0, b * 0, m, v),
    lambda g, b, m, v, x: (-(g * 0), b * 1e-38, m, v),
    lambda g, b, m, v, x: (g, b, x, v * 0),  # no variance: eps alone
    lambda g, b, m, v, x: (g, b, m, v * 1e-30),
    lambda g, b, m, v, x: (g, b, m, v * 1e30),  # β alone decides, or almost
    lambda g, b, m, v, x: (g, b * 1e-15, x, v * 1e30),
    lambda g, b, m, v, x: (g * 1e-38, b * 1e-38, m, v),  # denormal scales
    lambda g, b, m, v, x: (g * 1e-44, b * 1e-44, x, v),
    lambda g, b, m, v, x: (g * 1e38, b, m, v * 1e-12),  # overflow: infinities and NaN
    lambda g, b, m, v, x: (g, b, m, v),  # a tie by rounding, see `random_batch_norm`
)

_DEPTHS, _EPS = (3, 16, 64, 100, 576), (1e-5, 1e-3, 0.0)


@pytest.mark.parametrize(("target", "share"), RUNS)
def test_ten_thousand_batch_norms(target, share, tmp_path):
    quantizers = itertools.cycle(("sign", "heaviside"))
    cases = [
        swept("batch norm", depth, random_batch_norm(_CHANNELS, depth, eps, seed), next(quantizers), _CHANNELS, seed)
        for seed, (depth, eps) in enumerate(itertools.islice(itertools.cycle(itertools.product(_DEPTHS, _EPS)), 20))
    ]
    assert len(cases) * _CHANNELS == 10_000
    check(cases[share], target, tmp_path)


# -- chains ----------------------------------------------------------------------------------------------------------


class _Scale(nn.Module):
    def __init__(self, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("factor", torch.randn(1, channels, 1, 1, generator=generator))
        self.register_buffer("shift", torch.randn(1, channels, 1, 1, generator=generator))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor + self.shift


def _chains(channels: int, depth: int, seed: int) -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(seed)

    def norm() -> nn.Module:
        return random_batch_norm(channels, depth, 1e-5, seed)

    rising, turning = nn.PReLU(channels), nn.PReLU(channels)
    rising.weight.data = torch.rand(channels, generator=generator)
    turning.weight.data = -torch.rand(channels, generator=generator)  # falls, then rises: tables instead of thresholds
    return {
        "none": nn.Identity(),
        "scale and shift": _Scale(channels, generator),
        "scale, batch norm": nn.Sequential(_Scale(channels, generator), norm()),
        "ReLU, batch norm": nn.Sequential(nn.ReLU(), norm()),
        "hardtanh, batch norm": nn.Sequential(nn.Hardtanh(-3.0, 5.0), norm()),
        "batch norm, hardtanh": nn.Sequential(norm(), nn.Hardtanh()),
        "PReLU": rising,
        "PReLU, batch norm": nn.Sequential(rising, norm()),
        "turning PReLU": turning,
        "turning PReLU, batch norm": nn.Sequential(turning, norm()),
        "batch norm, turning PReLU, shift": nn.Sequential(norm(), turning, _Scale(channels, generator)),
        "leaky ReLU, batch norm": nn.Sequential(nn.LeakyReLU(-0.25), norm()),
    }


@pytest.mark.parametrize(("target", "share"), RUNS)
def test_chains_between_accumulator_and_sign(target, share, tmp_path):
    cases = [
        swept(name, depth, chain, quantizer, channels, seed)
        for seed, (depth, channels, quantizer) in enumerate(((64, 100, "sign"), (9, 7, "heaviside")))
        for name, chain in _chains(channels, depth, seed).items()
    ]
    check(cases[share], target, tmp_path)
