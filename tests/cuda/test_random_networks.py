"""Random small networks as whole artifacts on the emulated GPU, in a process of their own: the artifact's runner.

What `tests/conformance` asks of a processor: every exact step bit for bit eager's, alone and in the whole run, others
within the tolerance of float sums.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from pathlib import Path

import pytest

from bnncc.runtime import device

from ..conformance.test_random_graphs import check_networks

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the artifacts are linked for x86-64")

#: Architecture → its compute capability, one for each of the instructions that multiply tiles of bits.
CAPABILITIES = {"sm_75": 75, "sm_80": 80, "sm_90": 90, "sm_100": 100}


@pytest.fixture
def check(emulated_compiler, monkeypatch, tmp_path: Path) -> Callable[[int, int, str], None]:
    """Checks so many networks, from a number of hypothesis' runs on, on an architecture."""

    def checked(count: int, first: int, sm: str) -> None:
        for name, value in emulated_compiler.environment(capability=CAPABILITIES[sm]).items():
            monkeypatch.setenv(name, value)
        check_networks(count, first, f"cuda-{sm}", "qemu", tmp_path)

    # A runner in a process that finds the GPU, instead of one under another processor's emulator.
    monkeypatch.setattr(device, "_emulator", lambda manifest: "env")
    return checked


def test_fixed_networks(check) -> None:
    check(3, 0, "sm_90")


_SEED = int(os.environ.get("SEED", "0"))


@pytest.mark.conformance
@pytest.mark.parametrize("sm", CAPABILITIES)
@pytest.mark.parametrize("part", range(2))
def test_random_networks(part: int, sm: str, check) -> None:
    # Far from the runs of the next part, and from those that processors are given.
    check(10, 10**9 + 1000 * (8 * _SEED + 4 * part + [*CAPABILITIES].index(sm)), sm)
