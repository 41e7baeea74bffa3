"""Whole artifacts on the emulated GPU: their kernels, launches, graph and memory plan, in processes of their own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bitorch.layers import QConv2d
from emulator.gpu import EmulatedGpu
from torch import nn

import bnncc

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the artifacts are linked for x86-64")

# Runs the artifact on an image twice, so that what the first run leaves behind would show; on a line of its own what it
# raised.
_RUN = """
import sys
import numpy as np
from bnncc import runtime
try:
    with runtime.load(sys.argv[1]) as session:
        x = np.load(sys.argv[2])
        session(-x)
        np.save(sys.argv[3], session(x))
except runtime.errors.BnnccError as error:
    print(type(error).__name__, error)
"""


def _model() -> tuple[nn.Module, torch.Tensor]:
    """Binary layers alone, which are exact: counts, thresholds, a batch norm of powers of two behind them."""
    torch.manual_seed(0)
    middle, last = nn.BatchNorm2d(96), nn.BatchNorm2d(40)
    nn.init.normal_(middle.weight)
    nn.init.normal_(middle.bias)
    nn.init.constant_(last.weight, 0.5)
    last.eps = 0.0
    layers = [QConv2d(40, 96, 3, padding=1), middle, QConv2d(96, 40, 3, padding=1, stride=2), last]
    return nn.Sequential(*layers).eval(), torch.randn(2, 40, 9, 9)


class _Case:
    """An artifact, and the process in which it runs."""

    def __init__(self, gpu: EmulatedGpu, folder: Path) -> None:
        self.gpu, self.folder = gpu, folder
        self.model, self.image = _model()
        bnncc.compile(self.model, (self.image,), "cuda-sm_80").save(folder / "model.so")
        np.save(folder / "x.npy", self.image.numpy())

    def run(self, **properties: int) -> np.ndarray | str:
        """What the session returned on a GPU with these properties, or the error that it raised."""
        arguments = [str(self.folder / name) for name in ("model.so", "x.npy", "y.npy")]
        result = subprocess.run(
            [sys.executable, "-c", _RUN, *arguments],
            env={**os.environ, **self.gpu.environment(**{"capability": 80, **properties})},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip() or np.load(self.folder / "y.npy")


@pytest.fixture(scope="module")
def case(emulated_compiler, tmp_path_factory) -> _Case:
    return _Case(emulated_compiler, tmp_path_factory.mktemp("artifact"))


def test_an_artifact_computes_what_eager_does(case):
    with torch.no_grad():
        expected = case.model(case.image).numpy()
    assert np.array_equal(case.run(), expected)
    report = case.gpu.report()
    assert report["graph_launches"] == 2
    assert report["allocations"] == report["frees"] > 0 and report["live_bytes"] == 0


def test_a_later_gpu_takes_the_cubin_or_the_ptx(case):
    assert np.array_equal(case.run(capability=86), case.run())
    assert np.array_equal(case.run(capability=90), case.run())


@pytest.mark.parametrize(
    ("properties", "message"),
    [
        ({"devices": 0}, "no GPU can be used"),
        ({"capability": 75}, "compiled for cuda-sm_80"),
        ({"driver": 11000}, "the NVIDIA driver is too old"),
        ({"capability": 90, "ptx": 0}, "CUDA_ERROR_UNSUPPORTED_PTX_VERSION"),
        ({"memory": 1000}, "out of memory"),
        ({"fail_launch": 1}, "CUDA_ERROR_LAUNCH_FAILED"),
    ],
)
def test_a_gpu_that_cannot_is_told_in_a_line(case, properties, message):
    told = case.run(**properties)
    assert isinstance(told, str) and message in told and "\n" not in told


# ---- The stand-in itself: what a driver that forgets something would see.

_FORGETFUL = """
import ctypes
cuda = ctypes.CDLL("libcuda.so.1")
def call(name, *arguments):
    if error := getattr(cuda, name)(*arguments):
        print(f"{name}: {error}")
context, device, pinned = ctypes.c_void_p(), ctypes.c_uint64(), ctypes.c_void_p()
call("cuMemAlloc_v2", ctypes.byref(device), ctypes.c_size_t(64))  # before cuInit: 3
call("cuInit", 0)
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), 0)
call("cuMemAlloc_v2", ctypes.byref(device), ctypes.c_size_t(64))  # no current context: 201
call("cuCtxPushCurrent_v2", context)
call("cuMemAlloc_v2", ctypes.byref(device), ctypes.c_size_t(64))
call("cuMemHostAlloc", ctypes.byref(pinned), ctypes.c_size_t(64), 0)
there = (ctypes.c_char * 64).from_address(pinned.value)
before = bytes(there)
stream = ctypes.c_void_p()
call("cuStreamCreate", ctypes.byref(stream), 1)
source = ctypes.create_string_buffer(b"x" * 64)
call("cuMemcpyAsync", device, ctypes.c_uint64(ctypes.addressof(source)), ctypes.c_size_t(64), stream)
call("cuMemcpyAsync", pinned, device, ctypes.c_size_t(64), stream)
print(bytes(there) == before)  # not there yet
call("cuStreamSynchronize", stream)
print(bytes(there) == b"x" * 64)
call("cuMemcpyAsync", ctypes.c_uint64(device.value + 1), device, ctypes.c_size_t(64), stream)  # one byte too far: 1
print(ctypes.string_at(device.value, 1))  # the host reads the GPU's memory: a signal
"""


def test_the_stand_in_does_not_forgive(emulated_gpu):
    result = subprocess.run(
        [sys.executable, "-u", "-c", _FORGETFUL],
        env={**os.environ, **emulated_gpu.environment()},
        capture_output=True,
        text=True,
    )
    lines = ["cuMemAlloc_v2: 3", "cuMemAlloc_v2: 201", "True", "True", "cuMemcpyAsync: 1"]
    assert result.stdout.splitlines() == lines
    assert result.returncode == -11
