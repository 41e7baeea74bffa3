"""What a network takes: its arena against the tensors alive at once, its file against its weights, its process against
both."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import bnncc
from benchmarks.bitorch_networks import build
from benchmarks.resources import alive_bytes
from bnncc.layers import QConv2d

#: Prints the bytes by which running an artifact makes a process grow that has loaded the runtime already.
MEASURE = """
import re, sys
import numpy as np
import bnncc.runtime

def peak():
    return int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) * 1024

before = peak()
with bnncc.runtime.load(sys.argv[1], threads=1) as session:
    session.bench(3)
print(peak() - before)
"""


class Branches(nn.Module):
    """Shortcuts that live long, concatenations, and tensors of very different sizes."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.body = nn.ModuleList(QConv2d(32, 32, 3, padding=1) for _ in range(3))
        self.norm = nn.ModuleList(nn.BatchNorm2d(32) for _ in range(3))
        self.down = QConv2d(64, 64, 3, stride=2)

    def forward(self, x):
        x = first = self.stem(x)
        for conv, norm in zip(self.body, self.norm, strict=True):
            x = x + norm(conv(x))
        return self.down(torch.cat([x, first], 1)).mean((2, 3))


def network(name):
    if name != "branches":
        return build(name)
    torch.manual_seed(0)
    return Branches().eval(), torch.randn(1, 3, 33, 47)


NETWORKS = [
    "branches",
    "LeNet",
    *(pytest.param(n, marks=pytest.mark.conformance) for n in ("QuickNet", "ResnetE18", "DenseNet28", "MeliusNet22")),
]


@pytest.fixture(scope="module", params=NETWORKS)
def saved(request, tmp_path_factory):
    """(manifest, path)"""
    model, image = network(request.param)
    artifact = bnncc.compile(model, (image,))
    return artifact.manifest, artifact.save(tmp_path_factory.mktemp("memory") / "model.so")


def test_the_arena_holds_little_but_what_is_alive(saved):
    (version,) = saved[0]["versions"]
    assert alive_bytes(version) <= version["arena_bytes"] <= 1.05 * alive_bytes(version)


def test_the_file_is_weights_and_little_else(saved):
    manifest, path = saved
    assert path.stat().st_size <= manifest["weights_bytes"] + 400_000


def test_a_process_grows_by_the_file_and_the_arena(saved):
    manifest, path = saved
    (version,) = manifest["versions"]
    grown = subprocess.run([sys.executable, "-c", MEASURE, path], capture_output=True, text=True, check=True)
    assert int(grown.stdout) <= path.stat().st_size + version["arena_bytes"] + 10_000_000
