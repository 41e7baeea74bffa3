"""Whole networks at 224×224, batch 1, on one thread: `python -m benchmarks.networks QuickNet --steps`.

Prints how long an image takes, which share of the roofline that is, and, with --steps, the steps that lose the most.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from benchmarks import lce, limit, peers, resources, roofline
from benchmarks.bitorch_networks import NETWORKS as BITORCH
from benchmarks.bitorch_networks import build as build_bitorch
from benchmarks.machine import terminal
from benchmarks.stopwatch import Stopwatch
from benchmarks.timing import interleaved_medians
from benchmarks.zoo import NETWORKS, Built, float_twin
from bnncc.artifact import Artifact
from bnncc.compiler import Options
from bnncc.compiler import compile as compile_model
from bnncc.runtime.session import Session, load


def build(name: str) -> Built:
    """A network of the suite, or any of bitorch's, and an image for it."""
    return NETWORKS[name].build() if name in NETWORKS else build_bitorch(name)


def compiled(name: str, model: torch.nn.Module, image: torch.Tensor, target: str = "native") -> tuple[Artifact, float]:
    """The artifact, and the seconds that compiling took."""
    start = time.perf_counter()
    artifact = compile_model(model, (image,), target=target, name=name)
    return artifact, time.perf_counter() - start


def step_report(session: Session, image: np.ndarray, limits: dict[str, Any], isa: str, seconds: float) -> list[Any]:
    """What each step took, what it had to do, and its bound: a row of the JSON each, in order."""
    works = roofline.work_of(session.version)
    rows = []
    for work, took in zip(works, Stopwatch(session, [image]).laps(seconds), strict=True):
        bound = roofline.bound(work, session.version, limits, isa)
        rows.append({
            "step": work.step,
            "op": work.op,
            "layers": list(work.layers),
            "macs": {f"{a}×{w} bits": count for (a, w), count in work.macs.items()},
            "activation_bytes": work.activation_bytes,
            "weight_bytes": work.weight_bytes,
            "us": round(1e6 * took, 2),
            "bound_us": round(1e6 * bound.seconds, 2),
            "bound_by": "compute" if bound.compute >= bound.memory else "memory",
            "moves": work.moves,
        })  # fmt: skip
    return rows


def roofline_report(session: Session, seconds: float, limits: dict[str, Any], isa: str) -> dict[str, Any]:
    """The network's roofline in ms, and the share of it that a run of `seconds` reaches."""
    total = roofline.total(roofline.work_of(session.version), session.version, limits, isa)
    return {
        "ms": round(1e3 * total["all"], 4),
        "ms_of_layers_that_multiply": round(1e3 * total["layers"], 4),
        "share": round(total["all"] / seconds, 3),
        "share_by_layers_that_multiply": round(total["layers"] / seconds, 3),
    }


def measure(name: str, limits: dict[str, Any], seconds: float, worker: lce.Worker | None = None) -> dict[str, Any]:
    """A network among its peers, on one thread and two, its steps, what it takes besides: an entry of the JSON."""
    model, image = build(name)
    twin, array = float_twin(build(name)[0]), image.numpy()
    with torch.no_grad():
        expected = model(image).numpy()
    with tempfile.TemporaryDirectory(prefix="bnncc-bench-") as folder:
        path = Path(folder) / f"{name}.so"
        compiling = resources.compiling(name, path)
        # The opt-in that rounds the float layers, calibrated on the image alone: it is timed, not judged.
        rounding = Options(float_layers="int8", calibration=[(image,)])
        rounded = compile_model(model, (image,), name=name, options=rounding)
        with (
            load(path, threads=1) as session,
            load(path, threads=2) as pair,
            rounded.load(threads=1) as session_rounded,
        ):
            difference = float(np.abs(session(array) - expected).max())
            ours = {"bnncc": lambda: session(array), "bnncc, int8 for floats": lambda: session_rounded(array)}
            others, missing = peers.runners(twin, image, model)
            counterpart = NETWORKS[name].larq
            elsewhere = worker.runners(counterpart) if worker and counterpart else {}
            times = interleaved_medians({**ours, **others, **elsewhere}, seconds)
            steps = step_report(session, array, limits, "native", seconds / 8)
            share = roofline_report(session, times["bnncc"], limits, "native")
            threads = {"1": lambda: session(array), "2": lambda: pair(array)}
            wall = interleaved_medians(threads, seconds / 2, clock=time.perf_counter)
            memory = resources.running(path, session.version)
    return {
        **peers.comparison(times),
        "missing": missing,
        "macs": {"binary": _macs(steps, "1×1 bits"), "all": _macs(steps, "")},
        "largest_difference_from_eager": difference,
        "roofline": share,
        "steps": steps,
        "threads": {
            "wall_ms": {n: round(1e3 * t, 4) for n, t in wall.items()},
            "ratio": round(wall["1"] / wall["2"], 2),
        },
        "memory": memory,
        "compile": compiling,
    }


def _macs(steps: list[dict[str, Any]], bits: str) -> int:
    return sum(count for row in steps for kind, count in row["macs"].items() if bits in kind)


def step_table(rows: list[dict[str, Any]], most: int) -> Table:
    """The steps that lose the most time to their bound."""
    table = Table("", "step", "last layer", "µs", "bound", "share", "by", "lost µs", title="what loses the most")
    for column in (3, 4, 5, 7):
        table.columns[column].justify = "right"
    for row in sorted(rows, key=lambda r: r["bound_us"] * (not r["moves"]) - r["us"])[:most]:
        bound = 0.0 if row["moves"] else row["bound_us"]
        share = f"{bound / row['us']:.0%}" if row["us"] else ""
        path = next((p for p in row["layers"]), "")
        by = "moves only" if row["moves"] else row["bound_by"]
        cells = (f"{row['us']:.1f}", f"{bound:.1f}", share, by, f"{row['us'] - bound:.1f}")
        table.add_row(str(row["step"]), row["op"], path, *cells)
    return table


def main() -> None:
    names = sorted({*NETWORKS, *BITORCH})
    parser = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=__doc__.partition("\n")[0])
    parser.add_argument("networks", nargs="*", choices=[*names, []], metavar="NETWORK", help=", ".join(names))
    parser.add_argument("--steps", type=int, nargs="?", const=20, help="print that many of the slowest steps (20)")
    parser.add_argument("--target", default="native")
    parser.add_argument("--seconds", type=float, default=3, help="to measure each network for")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    console = terminal()
    limits = limit.measure((options.target if options.target in limit.isas() else "native",))
    isa = next(iter(limits["arithmetic"]))
    console.print(*limit.tables(limits))
    for name in options.networks or list(NETWORKS):
        model, image = build(name)
        artifact, compiling = compiled(name, model, image, options.target)
        with artifact.load(threads=1) as session:
            array = image.numpy()
            took = interleaved_medians({"": lambda: session(array)}, options.seconds)[""]  # noqa: B023
            share = roofline_report(session, took, limits, isa)
            console.print(
                f"{name}: {1e3 * took:.3f} ms, compiled in {compiling:.1f} s; roofline {share['ms']:.3f} ms, "
                f"{share['share']:.0%} of it reached ({share['share_by_layers_that_multiply']:.0%} by the layers that "
                "multiply alone)"
            )
            if options.steps:
                rows = step_report(session, array, limits, isa, options.seconds)
                console.print(step_table(rows, options.steps))
                console.print(f"sum of the steps {1e-3 * sum(row['us'] for row in rows):.3f} ms")


if __name__ == "__main__":
    main()
