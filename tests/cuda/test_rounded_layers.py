"""The opt-ins to tf32 and float16: which layers they take, what the artifact then computes and says, and refusals."""

from __future__ import annotations

import networks
import numpy as np
import pytest
import torch
from torch import nn

import bnncc
from bnncc import Options
from bnncc.calibration import QuantizedReference, rounded_layers
from bnncc.compiler import import_model
from bnncc.dialect import torch_operators
from bnncc.layers import QConv2d
from bnncc.passes.quantize_float import round_weight
from bnncc.runtime.errors import BnnccError
from bnncc.runtime.parity import TOLERANCE


class Net(nn.Module):
    """A stem of three channels, a binary layer, float layers of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.binary = QConv2d(16, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 24, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(24, 24, (1, 3), groups=3, padding="same")
        self.depthwise = nn.Conv2d(24, 24, 3, groups=24)
        self.head = nn.Linear(24, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.binary(torch.relu(self.stem(x)) - 0.5)
        x = torch.relu(self.grouped(nn.functional.pad(self.wide(x / 100), (1, 1, 0, 0))))
        return self.head(self.depthwise(x).mean((2, 3)))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


IMAGE = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("form", "taken"), [("tf32", {"wide", "grouped", "head"}), ("float16", {"wide", "grouped", "head"})]
)
def test_layers_that_fill_vectors_are_taken(net: Net, form: str, taken: set[str]) -> None:
    imported = import_model(net, (IMAGE,))
    assert {layer.path for layer in rounded_layers(imported, form)} == taken
    assert {layer.path for layer in rounded_layers(imported, form, ["wide"])} == taken - {"wide"}


def test_weights_that_float16_cannot_hold_stay() -> None:
    large = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1)).eval()
    large[2].weight.data[3, 4] = 65520
    imported = import_model(large, (torch.zeros(1, 8, 2, 2),))
    assert [layer.path for layer in rounded_layers(imported, "float16")] == ["0"]
    assert [layer.path for layer in rounded_layers(imported, "tf32")] == ["0", "2"]


@pytest.mark.parametrize(
    ("target", "form"), [("cuda-sm_75", "float16"), ("cuda-sm_90", "float16"), ("cuda-sm_90", "tf32")]
)
def test_a_network_computes_its_rounded_layers(net: Net, target: str, form: str) -> None:
    """Within the tolerance of other float sums of the model with these layers rounded, and not of the model itself."""
    imported = import_model(net, (IMAGE,))
    layers = rounded_layers(imported, form)
    _, _, code = networks.lowered(net, (IMAGE,), target, layers)
    assert "mma_sync_aligned_m16n8k8_" in code.source or "mma_sync_aligned_m16n8k16_" in code.source
    (got,) = networks.run(net, (IMAGE,), target, layers)
    (intended,) = QuantizedReference(imported, layers).outputs([IMAGE.numpy()])
    eager = net(IMAGE).detach().numpy()
    unit = np.abs(eager).max()
    assert np.abs(got - intended).max() <= TOLERANCE * unit < np.abs(intended - eager).max()


@pytest.mark.parametrize("form", ["tf32", "float16"])
def test_torch_and_numpy_round_alike(form: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(10_000) * 2.0 ** rng.integers(-30, 15, 10_000)).astype(np.float32)
    x[:3] = 1 + 2.0**-11, -1 - 2.0**-11, 1 + 3 * 2.0**-11  # ties
    rounded = torch_operators.round_to(torch.from_numpy(x), form)
    assert np.array_equal(rounded.numpy(), round_weight(x, form))
    assert (rounded.numpy() != x).any()


@pytest.mark.parametrize("form", ["tf32", "float16"])
def test_manifest_says_so(net: Net, form: str) -> None:
    manifest = bnncc.compile(net, (IMAGE,), "cuda-sm_90", options=Options(float_layers=form)).manifest
    assert manifest["float_layers"] == form
    assert {entry["path"]: entry["form"] for entry in manifest["quantized"]} == dict.fromkeys(
        ("wide", "grouped", "head"), form
    )
    marked = {path for step in manifest["versions"][0]["steps"] if step["opt_in"] == form for path in step["layers"]}
    assert marked == {"wide", "grouped", "head"}
    bits = {layer["path"]: layer["weight_bits"] for layer in manifest["versions"][0]["layers"]}
    assert bits["wide"] == (16 if form == "float16" else 32) and bits["stem"] == 32


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("native", {"float_layers": "tf32"}, "'tf32' is for GPUs"),
        ("rpi4", {"float_layers": "float16"}, "rpi4 is a processor"),
        ("cuda-sm_75", {"float_layers": "tf32"}, "cuda-sm_75 is older: use 'float16'"),
        ("cuda-sm_90", {"float_layers": "tf32", "keep_float": ["hed"]}, "keep_float names module 'hed'"),
        ("cuda-sm_90", {"float_layers": "tf32", "calibration": [IMAGE]}, "calibration inputs go with"),
        ("cuda-sm_90", {"keep_float": ["head"]}, "keep_float goes with"),
    ],
)
def test_refusals(net: Net, target: str, options: dict, message: str) -> None:
    with pytest.raises(BnnccError, match=message) as caught:
        bnncc.compile(net, (IMAGE,), target, options=Options(**options))
    assert "\n" not in str(caught.value)
