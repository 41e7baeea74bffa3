"""Whole networks as device code: every kernel compiles for every architecture, spills nothing, and fits."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch
from networks import compiled
from torch import nn

from benchmarks.zoo import NETWORKS
from bnncc.targets.cuda.descriptor import ARCHITECTURES, Architecture
from bnncc.targets.launch import Launch, Resources

#: Launches of kernels of one block, whatever they compute.
_GRID = 2**31 - 1


def _check(model: nn.Module, image: torch.Tensor, sm: str) -> None:
    code, source = compiled(model, [image], f"cuda-{sm}")
    wrong = [
        f"{launch.function}: {problem}"
        for launch in {launch.function: launch for step in code.launches for launch in step}.values()
        if (problem := _problem(launch, code.resources[launch.function], ARCHITECTURES[sm]))
    ]
    assert not wrong, "\n".join(wrong)
    assert re.search(r"\bmma\.sync\.", source), "nothing is multiplied by tensor cores"


def _problem(launch: Launch, kernel: Resources, gpu: Architecture) -> str:
    """Why a multiprocessor would not run a launch as it was meant to, "" if it would."""
    threads, shared = launch.block[0] * launch.block[1] * launch.block[2], kernel.shared_bytes + launch.shared_bytes
    if kernel.local_bytes:
        return f"{kernel.local_bytes} bytes of local memory: registers are spilled, or indexed"
    if kernel.registers * -(-threads // 32) * 32 > gpu.registers_per_sm:
        return f"{kernel.registers} registers × {threads} threads"
    if threads > kernel.most_threads:
        return f"{threads} threads, compiled for {kernel.most_threads}"
    if shared > gpu.most_shared:
        return f"{shared} bytes of shared memory"
    return f"a grid of {launch.grid}" if launch.grid[0] > _GRID or max(launch.grid[1:]) > 65535 else ""


@pytest.mark.parametrize("sm", ["sm_75", "sm_90"])
def test_demo_network(sm: str) -> None:
    torch.manual_seed(0)
    digits = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "digits.py"))
    _check(digits["Digits"]().eval(), torch.randn(2, 1, 8, 8), sm)


@pytest.mark.conformance
@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("batch", [1, 32, 256])
@pytest.mark.parametrize("name", ["ResnetE18", "QuickNet", "BinaryDenseNet28", "MeliusNet22"])
def test_published_network(name: str, batch: int, sm: str) -> None:
    model, image = NETWORKS[name].build()
    _check(model, image.repeat(batch, 1, 1, 1), sm)
