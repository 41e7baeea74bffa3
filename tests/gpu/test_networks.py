"""Whole networks: every exact step gives the CPU's bits when fed with the CPU's values; what is inexact stays close."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.cuda_inputs import image
from bnncc.runtime import parity
from bnncc.runtime.container import read_manifest
from bnncc.runtime.device import open_device
from bnncc.runtime.session import load

from .built import OnTheCpu

pytestmark = pytest.mark.gpu

NETWORKS = ("ResnetE18", "QuickNet", "BinaryDenseNet28")

#: Images of a batch that differ; more would take the CPU long, and the memory of all their values.
_DISTINCT = 8


def _check(artifact, cpu, images, layer_batches=1):
    """Whether the parity check on the GPU finds nothing; prints what it found."""
    with open_device(artifact, "cuda") as device, OnTheCpu(cpu) as reference:
        report = parity.check(device, reference, [(images,)], device_name="cuda", layer_batches=layer_batches)
    exact = [step.isolated for step in report.steps if step.exact]
    print(
        f"{sum(d.mismatches for d in exact)} of {sum(d.elements for d in exact):,} values of {len(exact)} exact steps "
        f"differ; outputs within {report.outputs.max_rel:.1e}"
    )
    assert exact
    assert report.ok, "\n".join(report.problems)
    return report


def test_demo_network(built):
    """The network of examples/digits.py: step by step on some images, end to end on all."""
    entry = built.section("demo")
    with np.load(built.path(entry["images"])) as arrays:
        images, labels = arrays["arr_0"], arrays["arr_1"]
    _check(built.path(entry["artifact"]), built.path(entry["cpu"]), images, layer_batches=8)
    with load(built.path(entry["artifact"]), device="cuda") as session:
        right = sum(int(session(one[None]).argmax()) == label for one, label in zip(images, labels, strict=True))
    assert abs(right - entry["right"]) <= 1  # as the demo has it: one image may stand on the edge


@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("network", NETWORKS)
def test_networks(network, batch, built):
    entry = built.section("networks", network)
    artifact = built.section("networks", network, "batches", str(batch))
    count, *rest = read_manifest(built.path(artifact))["inputs"][0]["shape"]
    assert count == batch
    images = image((min(batch, _DISTINCT), *rest), 1)
    _check(built.path(artifact), built.path(entry["cpu"]), np.resize(images, (batch, *rest)))
