"""Fused kernels round where eager rounds: TVM neither cancels nor contracts what the model spells out."""

import numpy as np
import pytest
import torch
import tvm
from torch import nn
from tvm import te

import bnncc
from bnncc.dialect.scalars import rounded_to
from bnncc.targets import emit
from bnncc.targets.descriptor import get_target

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


def _specials() -> np.ndarray:
    """Floats of all exponents and signs, and those where a rounding turns: ties, and their neighbours."""
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 1 << 32, 200_000, np.uint64).astype(np.uint32)
    ties = (bits & np.uint32(0xFFFFE000)) | np.uint32(0x1000)
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32).view(np.uint32)
    middle = (halves & np.uint32(0xFFFFE000)) | np.uint32(0x1000)
    found = np.concatenate([bits, *(c + np.uint32(d) for c in (ties, halves, middle) for d in (0xFFFFFFFF, 0, 1))])
    return found.view(np.float32)


@pytest.mark.parametrize("form", ["tf32", "float16"])
def test_rounding_to_what_tensor_cores_multiply(form):
    x = _specials()
    tensor = te.placeholder(x.shape, "float32", "x")
    func = te.create_prim_func([tensor, te.compute(x.shape, lambda i: rounded_to(tensor(i), form))])
    out = tvm.runtime.tensor(np.zeros_like(x))
    emit.build_scheduled(tvm.IRModule({"k": func.with_attr("global_symbol", "k")}), get_target("native"))["k"](
        tvm.runtime.tensor(x), out
    )
    got = out.numpy()
    if form == "float16":
        with np.errstate(over="ignore", invalid="ignore"):
            expected = x.astype(np.float16).astype(np.float32)
    else:
        # The nearest multiple of 2¹³ units of the last place, ties away from zero; integers of magnitudes do that.
        magnitude = (x.view(np.uint32) & 0x7FFFFFFF).astype(np.int64)
        near = (magnitude + 0x1000) // 0x2000 * 0x2000
        expected = (near.astype(np.uint32) | (x.view(np.uint32) & 0x80000000)).view(np.float32)
    numbers = ~np.isnan(x)
    assert np.isnan(got[~numbers]).all()
    assert np.array_equal(got[numbers].view(np.uint32), expected[numbers].view(np.uint32))
