"""What a GPU refuses, in one line, and what its driver compiles anew."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

from benchmarks.cuda_device import GpuError, count
from bnncc.runtime.container import read_manifest
from bnncc.runtime.errors import ExecutionError
from bnncc.runtime.session import load

from .built import as_tuple

pytestmark = pytest.mark.gpu


def _refused(path, device="cuda"):
    with pytest.raises(ExecutionError) as caught:
        load(path, device=device)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_for_a_later_architecture(built, gpu):
    entry = built.section("others", "newer")
    major, minor = gpu.capability
    if int(entry["sm"].removeprefix("sm_")) <= 10 * major + minor:
        pytest.skip(f"{entry['sm']} is no later than this GPU")
    message = _refused(built.path(entry["artifact"]))
    assert f"compiled for cuda-{entry['sm']}" in message
    assert f"compile with -t cuda-sm_{major}{minor}" in message


def test_for_an_earlier_architecture(built):
    """The driver compiles the PTX, and the bits are the same."""
    entry = built.section("others", "older")
    with load(built.path(entry["artifact"]), device="cuda") as session:
        actual = as_tuple(session(*built.inputs(entry)))
    assert all(np.array_equal(*pair) for pair in zip(actual, built.expected(entry), strict=True))


def test_out_of_memory(built, gpu):
    """Nearly all of the GPU's memory is taken; when it is given back, the artifact runs. The largest artifact that was
    built, of which a first instance has the code and the weights there already."""
    batches = [*built.index.get("networks", {}).values()]
    names = [*(name for entry in batches for name in entry["batches"].values()), built.section("demo")["artifact"]]
    paths = map(built.path, names)
    arena, path = max((read_manifest(path)["versions"][0]["arena_bytes"], path) for path in paths)
    with load(path, device="cuda"):
        taken, size = [], gpu.memory[1]
        while size >= min(arena // 2, 64 << 20):  # CUDA's own needs are left
            try:
                taken.append(gpu.allocate(size))
            except GpuError:  # no piece so large is left
                size //= 2
        message = _refused(path)
        assert "out of memory" in message and "take a smaller batch" in message
        taken.clear()
        load(path, device="cuda").close()


def test_a_gpu_that_is_not_there(built):
    message = _refused(built.path(built.section("demo")["artifact"]), f"cuda:{count()}")
    assert f"there is no cuda:{count()}" in message


def test_no_gpu_to_be_seen(built):
    """As CUDA_VISIBLE_DEVICES hides all of them, in a process of its own."""
    program = "import sys; from bnncc.runtime.session import load; load(sys.argv[1], device='cuda')"
    path = built.path(built.section("demo")["artifact"])
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program, str(path)], env=hidden, capture_output=True, text=True)
    assert done.returncode and "no GPU can be used" in done.stderr
