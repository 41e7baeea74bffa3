"""bitorch's own networks, from its own classes, on small images; `python -m benchmarks.bitorch_networks` takes 224²."""

import pytest

from benchmarks import bitorch_networks

# Side of the image: small enough to be quick, large enough for every pooling.
_SIDES = {"LeNet": None, "QuickNetSmall": 64}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("LeNet", "ResnetE18", "MeliusNet22") else [pytest.mark.conformance])
        for name in bitorch_networks.NETWORKS
    ],
)
def test_every_binary_layer_is_eager(name):
    row = bitorch_networks.check(name, "native", _SIDES.get(name, 32))
    assert row["ok"], row["problems"]
    assert row["exact_elements"] > 0 and row["exact_mismatches"] == 0
    if name != "Resnet50V1":  # quantizes weights alone
        assert row["binary_macs"] > 0 and row["bits"] > 0
