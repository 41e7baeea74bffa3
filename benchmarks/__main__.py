"""`make bench`: bnncc against the peers, one thread each, in one run; prints a table and writes a JSON file."""

from __future__ import annotations

import argparse
import json
import logging
import re
import time
import warnings
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks import models, peers
from benchmarks.limit import arithmetic
from benchmarks.machine import machine, versions
from benchmarks.timing import interleaved_medians
from bnncc.compiler import compile as compile_model

RESULTS = Path(__file__).parent / "results"
RESNET = "ResNetE-18, 224²"


def main() -> None:
    """Measure what the arguments ask for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--seconds", type=float, default=12, help="time for each network, all contenders together")
    parser.add_argument("--only", default="", help="networks whose name contains this text")
    parser.add_argument("--name", help="name of the file under benchmarks/results (default: the processor's)")
    options = parser.parse_args()
    console = Console() if Console().is_terminal else Console(width=140)
    warnings.filterwarnings("ignore", category=UserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.disable(logging.WARNING)

    about = machine()
    limit = arithmetic("native")["binary"]["gops"]
    report: dict[str, Any] = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": about,
        "versions": versions(),
        "threads": 1,
        "clock": "CPU time of the process, median",
        "binary_limit_gops": round(limit, 1),
        "networks": {},
    }
    console.print(f"{about['processor']}, one thread; xor–popcount–add from registers: {limit:.0f} GOPS")
    for name in (*models.CONVOLUTIONS, RESNET):
        if options.only in name:
            console.print(f"{name} …")
            report["networks"][name] = _measure(name, options.seconds, limit)
    console.print(_table(report["networks"]))
    name = options.name or re.sub(r"[^a-z0-9]+", "-", about["processor"].lower()).strip("-")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    console.print(f"written to {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


def _measure(name: str, seconds: float, limit: float) -> dict[str, Any]:
    """Compile one network, see that it computes what eager does, and time it among its peers."""
    single = name in models.CONVOLUTIONS
    binary, twin, x = models.convolution(*models.CONVOLUTIONS[name]) if single else models.resnet_e18()
    with torch.no_grad():
        expected = binary(x).numpy()
    start = time.perf_counter()
    artifact = compile_model(binary, (x,), target="native")
    session = artifact.load(threads=1)
    compile_seconds = time.perf_counter() - start
    image = x.numpy()
    difference = float(np.abs(session(image) - expected).max())
    if single and difference != 0:
        raise RuntimeError(f"{name}: the artifact differs from eager by {difference}: the timing means nothing")

    contenders: dict[str, peers.Runner] = {"bnncc": lambda: session(image), **peers.runners(binary, twin, x)}
    medians = interleaved_medians(contenders, seconds)
    result: dict[str, Any] = {
        "median_ms": {contender: round(1e3 * value, 4) for contender, value in medians.items()},
        "times_faster": {
            peer: round(value / medians["bnncc"], 2) for peer, value in medians.items() if peer != "bnncc"
        },
        "compile_seconds": round(compile_seconds, 1),
        "largest_difference_from_eager": difference,
    }
    if single:
        size, channels = models.CONVOLUTIONS[name]
        gops = 2e-9 * size**2 * 9 * channels**2 / medians["bnncc"]
        result["gops"] = round(gops, 1)
        result["share_of_limit"] = round(gops / limit, 3)
    return result


def _table(networks: dict[str, Any]) -> Table:
    table = Table("network", "bnncc", title="median ms of one image, and how many times as long as bnncc")
    rivals = list(next(iter(networks.values()))["times_faster"]) if networks else []
    for column in (*rivals, "of the limit", "compiled in"):
        table.add_column(column, justify="right")
    for name, result in networks.items():
        cells = [f"{result['median_ms'][peer]:.3f} ({result['times_faster'][peer]:.1f}×)" for peer in rivals]
        share = f"{result['share_of_limit']:.0%}" if "share_of_limit" in result else ""
        table.add_row(name, f"{result['median_ms']['bnncc']:.3f}", *cells, share, f"{result['compile_seconds']:.0f} s")
    return table


if __name__ == "__main__":
    main()
