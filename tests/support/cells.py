"""Cells of the table in docs/support.md: small networks, compiled a family at a time, and the verdict on each."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

import bnncc
from bnncc.dialect.plan import Layer
from bnncc.inspection import becomes
from bnncc.runtime.errors import BnnccError

#: What a float result may differ by, as a share of its largest value.
TOLERANCE = 1e-5

#: Makes a network in evaluation mode and the one input that it is called with; raises what PyTorch raises.
Make = Callable[[], tuple[nn.Module, torch.Tensor]]


@dataclass(frozen=True)
class Family:
    """A part of the table: one class in all its ranks, or a list of operators.

    document: what describes it. columns: headings. rows: option → a cell for each column, None where there is none.
    """

    title: str
    document: str
    columns: Sequence[str]
    rows: Mapping[str, Sequence[Make | None]] = field(default_factory=dict)


class _Branches(nn.Module):
    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(modules)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(branch(x) for branch, x in zip(self.branches, inputs, strict=True))


def measure(family: Family) -> dict[str, list[str]]:
    """The verdicts of a family's cells, row by row: "exact", "rounding", "within one step", "refused: …"…"""
    verdicts: dict[tuple[str, int], str] = {}
    built: dict[tuple[str, int], tuple[nn.Module, torch.Tensor, torch.Tensor]] = {}
    for option, cells in family.rows.items():
        for column, make in enumerate(cells):
            verdicts[option, column] = "—"
            if make is None:
                continue
            try:
                built[option, column] = _eager(make)
            except Exception as error:
                if isinstance(error, BnnccError):
                    raise
                verdicts[option, column] = f"PyTorch refuses: {_first_sentence(error)}"
    try:
        verdicts |= dict(zip(built, _compiled(list(built.values())), strict=True))
    except BnnccError:
        for key, one in built.items():
            try:
                (verdicts[key],) = _compiled([one])
            except BnnccError as error:
                verdicts[key] = f"refused: {_first_sentence(error)}"
    return {option: [verdicts[option, column] for column in range(len(cells))] for option, cells in family.rows.items()}


def _eager(make: Make) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        module, x = make()
        return module, x, module(x)


def _compiled(cells: Sequence[tuple[nn.Module, torch.Tensor, torch.Tensor]]) -> list[str]:
    if not cells:
        return []
    inputs = tuple(x for _, x, _ in cells)
    artifact = bnncc.compile(_Branches([module for module, _, _ in cells]).eval(), inputs)
    outputs: Any = artifact.load(threads=1)(*(x.numpy() for x in inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    version: Any = artifact.manifest["versions"][0]
    return [
        _verdict(f"branches.{i}", version, _step(version, i), got, wanted.numpy())
        for i, (got, (_, _, wanted)) in enumerate(zip(outputs, cells, strict=True))
    ]


def _step(version: Any, output: int) -> float | None:
    """How far two neighbours of an output's values are apart, where it is quantized."""
    value = version["tensors"][version["outputs"][output]]["value"]
    return value["step"] if value else None


def _verdict(path: str, version: Any, step: float | None, got: np.ndarray, wanted: np.ndarray) -> str:
    def own(other: str) -> bool:
        return other == path or other.startswith(f"{path}.")

    kinds = [becomes(Layer(**layer)) for layer in version["layers"] if own(layer["path"])]
    promised = all(step["exact"] for step in version["steps"] if any(map(own, step["layers"])))
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        verdict = f"WRONG: {got.dtype}{got.shape} instead of {wanted.dtype}{wanted.shape}"
    elif np.array_equal(got, wanted, equal_nan=True):
        verdict = "exact" if promised else "within one step" if step else "rounding"
    elif promised:
        verdict = f"WRONG: {(got != wanted).sum()} of {wanted.size} differ"
    elif step:
        furthest = float(np.abs(got.astype("float64") - wanted).max()) / step
        verdict = "within one step" if furthest < 1.0001 else f"WRONG by {furthest:.1f} steps"
    else:
        worst = float(np.abs(got.astype("float64") - wanted).max() / max(np.abs(wanted).max(), 1e-30))
        verdict = "rounding" if worst <= TOLERANCE else f"WRONG by {worst:.1e} of the largest value"
    return ", ".join([*dict.fromkeys(kinds), verdict])


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".:")[:160]


def module(function: Callable[..., Any], *modules: nn.Module) -> nn.Module:
    """A network from a function of an input and some modules."""

    class Function(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList(modules)

        def forward(self, x: torch.Tensor) -> Any:
            return function(x, *self.parts)

    return Function().eval()
