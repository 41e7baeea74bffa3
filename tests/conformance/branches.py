"""Many small networks compiled as branches of one, and compared with eager bit for bit.

A module of some dozens of branches costs one export, one object file and one link, so that a grid takes minutes.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import bnncc
from bnncc.runtime.device import open_device, runner_path
from bnncc.runtime.errors import UnsupportedMachineError
from bnncc.targets.descriptor import get_target

#: The targets that the exactness of a layer is shown on, and where each of them runs.
DEVICES: Mapping[str, str] = {
    "native": "local", "x86-64-v4": "local", "x86-64-v3": "local", "x86-64-v2": "local", "rpi4": "qemu", "rpi2": "qemu",
}  # fmt: skip

#: Of these `make test` runs parts of the grid only: the former two are among the versions of `tests/test_versions.py`.
_LONG = ("x86-64-v4", "x86-64-v2", "rpi2")

#: The others: `make test` runs all that has no share on each of them.
_SHORT = [target for target in DEVICES if target not in _LONG]


def _marks(target: str) -> list[Any]:
    return [pytest.mark.qemu] if DEVICES[target] == "qemu" else []


TARGETS = [
    pytest.param(target, marks=_marks(target) + [pytest.mark.conformance] * (target in _LONG), id=target)
    for target in DEVICES
]

#: (target, its share of a grid's cases): in `make test` each case on one of three targets, in `make conformance` all on
#: all.
RUNS = [
    *(pytest.param(t, slice(i, None, len(_SHORT)), marks=_marks(t), id=f"{t}-share") for i, t in enumerate(_SHORT)),
    *(pytest.param(t, slice(None), marks=[*_marks(t), pytest.mark.conformance], id=t) for t in DEVICES),
]


@dataclass(frozen=True)
class Case:
    """A network of one input and one output. name: what a failure says."""

    name: str
    module: nn.Module
    input: torch.Tensor


class Branches(nn.Module):
    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(modules)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(branch(x) for branch, x in zip(self.branches, inputs, strict=True))


def check(cases: Sequence[Case], target: str, folder: Path, kinds: Set[str] = frozenset()) -> None:
    """Compiles the cases as one module and runs it; the test fails unless every output equals eager's."""
    compare(cases, run(cases, target, folder, kinds), target)


def compare(cases: Sequence[Case], outputs: Sequence[np.ndarray], target: str) -> None:
    """The test fails unless every output, made on some target, equals eager's."""
    with torch.no_grad():
        expected = [case.module(case.input).numpy() for case in cases]
    wrong = [
        f"{case.name}: {difference}"
        for case, actual, wanted in zip(cases, outputs, expected, strict=True)
        if (difference := differs(actual, wanted))
    ]
    if wrong:
        pytest.fail(f"{len(wrong)} of {len(cases)} branches differ from eager on {target}\n" + "\n".join(wrong), False)


def device_of(target: str) -> str:
    """Where code for a target runs; skips the test where that needs an emulator which is not installed."""
    device, emulator = DEVICES.get(target, "qemu"), f"qemu-{get_target(target).arch}"
    if device == "qemu" and not (shutil.which(emulator) or shutil.which(f"{emulator}-static")):
        pytest.skip(f"{emulator} is not installed (Debian: qemu-user)")
    return device


def run(cases: Sequence[Case], target: str, folder: Path, kinds: Set[str] = frozenset()) -> list[np.ndarray]:
    """What the cases, compiled as one module for a target, give there; skips the test where it cannot run.

    kinds: what the arithmetic of every layer must be one of ("binary", "integer"…), unless empty.
    """
    device = device_of(target)
    path = folder / "model.so"
    model = Branches([case.module for case in cases]).eval()
    artifact = bnncc.compile(model, tuple(case.input for case in cases), target)
    found = {str(layer["op"]).split()[0] for layer in artifact.manifest["versions"][0]["layers"]}
    assert not kinds or found <= kinds, found
    artifact.save(path, runner=runner_path(path) if device == "qemu" else None)
    try:
        with open_device(path, device) as opened:
            return opened.run([case.input.numpy() for case in cases])
    except UnsupportedMachineError as reason:
        pytest.skip(str(reason))


def differs(actual: np.ndarray, expected: np.ndarray) -> str | None:
    """How an output differs from eager's, or None if it does not: shape, dtype and every value, NaN being NaN."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"{actual.dtype}{actual.shape} instead of {expected.dtype}{expected.shape}"
    if np.array_equal(actual, expected, equal_nan=True):
        return None
    unequal = ~((actual == expected) | (np.isnan(actual) & np.isnan(expected)))
    first = tuple(int(i) for i in np.argwhere(unequal)[0])
    return f"{unequal.sum()} of {unequal.size} differ, first at {first}: {actual[first]} instead of {expected[first]}"


def chunks(cases: Sequence[Any], size: int) -> list[Sequence[Any]]:
    """Parts of nearly equal length, at most `size`; each takes every n-th case, which spreads neighbours in cost."""
    count = -(-len(cases) // size)
    return [cases[first::count] for first in range(count)]


# -- what the networks are made of -----------------------------------------------------------------------------------


def sign(x: torch.Tensor) -> torch.Tensor:
    """+1 where not x < 0, as bitorch spells it."""
    signs = torch.sign(x)
    return torch.where(signs == 0, 1.0, signs)


def heaviside(x: torch.Tensor) -> torch.Tensor:
    """+1 where x > 0, else −1."""
    return torch.where(x > 0, 1.0, -1.0)


QUANTIZERS = {"sign": sign, "heaviside": heaviside, "ternary": torch.sign}


def awkward(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Normal numbers among which every tenth is 0, −0, NaN or infinite."""
    x = torch.randn(*shape, generator=generator)
    odd = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf")])
    picks = torch.randint(len(odd), x.shape, generator=generator)
    return torch.where(torch.rand(*shape, generator=generator) < 0.1, odd[picks], x)


def signs(shape: Sequence[int], generator: torch.Generator, *, ternary: bool = False) -> torch.Tensor:
    """Random ±1, or −1, 0, +1."""
    return (
        torch.randint(3, tuple(shape), generator=generator) - 1.0
        if ternary
        else (torch.randint(2, tuple(shape), generator=generator) * 2.0 - 1.0)
    )


def batch_norm(channels: int, depth: int, generator: torch.Generator) -> nn.BatchNorm2d:
    """A batch norm whose sign flips within the reach of a product of `depth` terms; γ of both signs, some of them 0."""
    norm = nn.BatchNorm2d(channels)
    norm.weight.data = torch.randn(channels, generator=generator) * (torch.rand(channels, generator=generator) > 0.1)
    norm.bias.data = torch.randn(channels, generator=generator)
    norm.running_mean = torch.randn(channels, generator=generator) * depth**0.5
    norm.running_var = torch.rand(channels, generator=generator) * 2 * depth
    return norm.eval()


class BitReader(nn.Module):
    """Signs, and a binary 1×1 convolution of them whose outputs determine every single one: its weight is invertible.

    [N, C, H, W] → [N, C, H, W]; row i of a group's weight is +1 up to column i and −1 behind it.
    quantizer: None where the input is signs already.
    """

    def __init__(self, channels: int, groups: int = 1, quantizer: str | None = "sign") -> None:
        super().__init__()
        size = channels // groups
        rows = torch.tril(torch.ones(size, size)) * 2 - 1
        self.register_buffer("weight", rows.repeat(groups, 1)[:, :, None, None])
        self.groups, self.quantizer = groups, quantizer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        signs = QUANTIZERS[self.quantizer](x) if self.quantizer else x
        return torch.conv2d(signs, self.weight, groups=self.groups)
