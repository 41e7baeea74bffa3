"""`make bench`: the machine's limits, single operators and whole networks, bnncc against its peers, all in one run.

Prints tables and writes a JSON file and plots under benchmarks/results. Everything runs on one thread unless it says
otherwise. `python -m benchmarks.compare` sets two of the files side by side.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import claims, lce, limit, models, networks, operators, plot, tables
from benchmarks.machine import machine, terminal, versions
from benchmarks.zoo import NETWORKS

RESULTS = Path(__file__).parent / "results"

#: Seconds of measuring an item of each section, and their factor for --quick.
SECONDS = {"kernels": 1.5, "layers": 2.0, "convolutions": 8.0, "networks": 24.0}
QUICK = 0.25
#: Load average above which a machine is not quiet.
_QUIET = 0.7
#: Networks that --quick measures.
QUICK_NETWORKS = ("QuickNet",)


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("--only", default="", help="items like this: networks/QuickNet, kernels/3×3, layers, …")
    parser.add_argument("--quick", action="store_true", help="QuickNet alone, and a quarter of the time for everything")
    parser.add_argument(
        "--no-lce", action="store_true", help="without Larq Compute Engine, which takes minutes to install"
    )
    parser.add_argument("--name", help="name of the files under benchmarks/results (default: the processor's)")
    options = parser.parse_args()
    wanted = _wanted(options.only, options.quick)
    if not any(wanted.values()):
        parser.error(f"no item is named like {options.only!r}: they are {', '.join(f'{s}/…' for s in wanted)}")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    console = terminal()

    report: dict[str, Any] = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "clock": "CPU time of the process, median; several threads: wall time, median",
        "quick": options.quick,
        "only": options.only,
    }
    if (load := report["machine"]["load_average"]) > _QUIET:
        console.print(f"load average {load:.1f}: something else computes, so wall times mean little", style="yellow")
    worker = None if options.no_lce else _start_lce(console, report, wanted)
    try:
        _measure(report, wanted, QUICK if options.quick else 1.0, worker, console)
    finally:
        if worker:
            worker.close()
    report["claims"] = [claim.to_json() for claim in claims.claims(report)]
    console.print(claims.table(report["claims"]))
    name = options.name or re.sub(r"[^a-z0-9]+", "-", report["machine"]["processor"].lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    for written in (path, *plot.plots(report, RESULTS / name)):
        console.print(
            f"written to {written.relative_to(Path.cwd()) if written.is_relative_to(Path.cwd()) else written}"
        )


def _wanted(only: str, quick: bool) -> dict[str, list[str]]:
    """Section → the items to measure."""
    items: dict[str, Iterable[str]] = {
        "kernels": (f"{k}×{k}, {shape}" for k in models.KERNELS for shape in models.CONVOLUTIONS),
        "layers": models.FLOAT_LAYERS,
        "convolutions": models.CONVOLUTIONS,
        "networks": QUICK_NETWORKS if quick else NETWORKS,
    }
    return {section: [name for name in names if only in f"{section}/{name}"] for section, names in items.items()}


def _measure(
    report: dict[str, Any],
    wanted: dict[str, list[str]],
    factor: float,
    worker: lce.Worker | None,
    console: Console,
) -> None:
    """Fills the report's sections, each of its items by name, and prints a table for each."""
    seconds = {section: factor * time for section, time in SECONDS.items()}
    limits = report["limits"] = limit.measure()
    console.print(*limit.tables(limits))
    measures: dict[str, Callable[[str], dict[str, Any]]] = {
        "kernels": lambda name: operators.binary_kernels(name, limits, seconds["kernels"]),
        "layers": lambda name: operators.float_layer(name, limits, seconds["layers"]),
        "convolutions": lambda name: operators.one_convolution(name, limits, seconds["convolutions"], worker),
        "networks": lambda name: networks.measure(name, limits, seconds["networks"], worker),
    }
    report["took_seconds"] = {}
    for section, measure in measures.items():
        report[section] = {}
        start = time.perf_counter()
        for name in wanted[section]:
            console.print(f"{section}/{name} …", style="dim")
            report[section][name] = entry = measure(name)
            for peer, reason in entry.get("missing", {}).items():
                console.print(f"without {peer}: {reason}", style="yellow")
        report["took_seconds"][section] = round(time.perf_counter() - start, 1)
        if report[section]:
            console.print(*tables.SECTIONS[section](report[section]))


def _start_lce(console: Console, report: dict[str, Any], wanted: dict[str, list[str]]) -> lce.Worker | None:
    """The worker with all models converted, so that nothing is converted while something else is timed."""
    shapes = (models.CONVOLUTIONS[name] for name in wanted["convolutions"])
    counterparts = [f"{size}×{channels}" for size, channels in shapes]
    counterparts += [larq for name in wanted["networks"] if (larq := NETWORKS[name].larq)]
    if not counterparts:
        return None
    console.print("Larq Compute Engine: installing, converting …", style="dim")
    try:
        worker = lce.start()
        for model in counterparts:
            worker.convert(model)
    except lce.Unavailable as reason:
        report["without_lce"] = str(reason)
        console.print(f"without LCE: {reason}", style="yellow")
        return None
    report["versions"] |= dict(package.split("==") for package in lce.REQUIREMENTS if "==" in package)
    return worker


if __name__ == "__main__":
    main()
