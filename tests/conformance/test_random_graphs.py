"""Random small networks, compiled and compared with eager: every exact step bit for bit, alone and in the whole run.

`make test` runs the same 20 networks every time. `make conformance` draws 300; the seed is printed, and
`make conformance SEED=n` repeats it. Networks are compiled together, as branches of one module; only when such a module
is wrong are they compiled one by one, and the first that is wrong loses steps for as long as it stays wrong.
"""

from __future__ import annotations

import itertools
import os
import traceback
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

import bnncc
from bnncc.frontends.torch import export_model
from bnncc.runtime.device import open_device, runner_path

from .branches import DEVICES, TARGETS, Branches, device_of, differs
from .graphs import Graph, graphs

# Networks to a module: what a module costs by itself is small then, and a failure is found among few.
_MODULE = 20
# Steps from which on a network is worth its compilation.
_STEPS = 4
# Draws of one run of hypothesis. With more of them it begins to vary what it has drawn, and draws little that is new.
_RUN = 10


def _draw(count: int, first: int) -> list[Graph]:
    """Different networks, drawn by runs of hypothesis with the seeds `first`, `first` + 1, …"""
    drawn: dict[str, Graph] = {}
    for number in itertools.count(first):
        drawn |= {repr(graph): graph for graph in _run(number) if len(graph.steps) >= _STEPS}
        if len(drawn) >= count:
            break
    return [*drawn.values()][:count]


def _run(number: int) -> list[Graph]:
    found: list[Graph] = []

    @seed(number)
    @settings(
        max_examples=_RUN, phases=[Phase.generate], database=None, deadline=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(graphs())
    def keep(graph: Graph) -> None:
        found.append(graph)

    keep()
    return found


def _wrong(networks: Sequence[Graph], target: str, device: str, folder: Path) -> str | None:
    """How the networks, compiled as one module, differ from eager, or what went wrong on the way; None if nothing."""
    model, inputs = Branches([graph.module() for graph in networks]).eval(), tuple(g.input for g in networks)
    path = folder / "model.so"
    try:
        program = export_model(model, inputs)
        artifact = bnncc.compile(program, target=target)
        artifact.save(path, runner=runner_path(path) if device == "qemu" else None)
        report = bnncc.validate(path, program, [inputs], device=device)
        with open_device(path, device) as opened:
            outputs = iter(opened.run([x.numpy() for x in inputs]))
    except Exception:
        return traceback.format_exc(limit=-4)
    problems = list(report.problems)
    with torch.no_grad():
        expected = model(*inputs)
    for index, values in enumerate(expected):
        branch = f"branches.{index}"
        exact = all(
            step.exact
            for step in report.steps
            if any(layer == branch or layer.startswith(f"{branch}.") for layer in step.layers)
        )
        for number, value in enumerate(values):
            difference = differs(next(outputs), value.numpy())
            if difference and exact:
                problems.append(f"{branch}, output {number}: {difference}")
    return "\n".join(problems) or None


def check_networks(count: int, first: int, target: str, device: str, folder: Path) -> None:
    """The test fails, with a network that has lost steps for as long as it was wrong, unless all equal eager's.

    count: of networks, drawn by runs of hypothesis from this one on. device: as `open_device` has it.
    """

    def wrong(networks: Sequence[Graph]) -> str | None:
        return _wrong(networks, target, device, folder)

    drawn = _draw(count, first)
    together = wrong(drawn)
    if together is None:
        return
    graph = next((graph for graph in drawn if wrong([graph])), None)
    if graph is None:
        pytest.fail("\n\n".join([f"wrong together, not alone, on {target}: {together}", *map(repr, drawn)]), False)
    while (smaller := next((g for g in graph.smaller() if wrong([g])), None)) is not None:
        graph = smaller
    pytest.fail(f"differs from eager on {target}:\n{wrong([graph])}\n{graph}", False)


def test_fixed_graphs(tmp_path):
    check_networks(10, 0, "native", "local", tmp_path)


_SEED = int(os.environ.get("SEED", "0"))


@pytest.mark.conformance
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("part", range(5))
def test_random_graphs(part, target, tmp_path):
    # Runs are numbered, a part takes some of them: far from those of the next one.
    first = 1000 * (len(DEVICES) * (100 * _SEED + part) + [*DEVICES].index(target) + 1)
    check_networks(_MODULE, first, target, device_of(target), tmp_path)
