"""Fused kernels round where eager rounds: TVM neither cancels nor contracts what the model spells out."""

import pytest
import torch
from torch import nn

import bnncc

CHAINS = {
    "(x + 1) − x": lambda x: (x + 1) - x,
    "(round(x) − x) + x": lambda x: (x.round() - x) + x,
    "x · 3 + x": lambda x: x * 3 + x,
    "(x − y) + y": lambda x: (x - x.flip(0)) + x.flip(0),
    "−(x + 1e8) + 1e8": lambda x: -(x + 1e8) + 1e8,
}


class _All(nn.Module):
    def forward(self, x):
        return tuple(chain(x) for chain in CHAINS.values())


@pytest.fixture(scope="module")
def results():
    x = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 1e3
    model = _All().eval()
    return dict(zip(CHAINS, zip(bnncc.compile(model, (x,)).load()(x.numpy()), model(x), strict=True), strict=True))


@pytest.mark.parametrize("chain", CHAINS)
def test_a_chain_rounds_as_eager_does(chain, results):
    ours, eager = results[chain]
    assert torch.equal(torch.from_numpy(ours), eager)
