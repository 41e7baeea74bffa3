"""Measures what `benchmarks.cuda_build` compiled on a GPU of this machine, and writes the report."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cuda_claims
from benchmarks.cuda_device import Gpu, Unavailable
from benchmarks.cuda_folder import FolderError, opened
from benchmarks.cuda_limits import Limits
from benchmarks.cuda_measure import Bench
from benchmarks.cuda_peers import Torch

#: Seconds of measuring an item, and their factor for --quick.
SECONDS = {"limits": 4.0, "convolutions": 2.0, "networks": 6.0}
QUICK = 0.25
#: Bytes that the memory kernels read: far more than any cache holds, or an eighth of what is free.
_MEMORY = 1 << 30

_QUESTIONS = (
    "name", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit", "power.draw",
    "temperature.gpu",
)  # fmt: skip

Say = Callable[[str], None]


def run(
    folder: Path, results: Path, only: Sequence[str] = ("",), quick: bool = False, device: int = 0,
    name: str | None = None, say: Say = print,
) -> dict[str, Any]:  # fmt: skip
    """The report; also written to `results`. Raises Unavailable, GpuError, FolderError, BnnccError."""
    gpu = Gpu(device)
    with opened(folder) as (files, index):
        wanted = _wanted(index, only)
        if not any(wanted.values()):
            raise FolderError(f"{folder} has no item named like {' or '.join(only)}: {', '.join(_names(index))}")
        torch, why_not = _torch(gpu)
        report: dict[str, Any] = {
            "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "gpu": machine(gpu),
            "before": nvidia_smi(gpu),
            "built": {key: index[key] for key in ("target", "sm", "versions")},
            "versions": {"numpy": np.__version__, "torch": torch.version if torch else None},
            "without_torch": why_not,
            "quick": quick,
            "only": list(only),
        }
        if why_not:
            say(f"without torch: {why_not}")
        _measure(report, wanted, index, Bench(gpu, files, _limits(gpu, files, index), torch, why_not), quick, say)
    report["after"] = nvidia_smi(gpu)
    found = cuda_claims.claims(report)
    report["claims"] = [claim.to_json() for claim in found]
    say(cuda_claims.claims_table(found))
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"{name or 'cuda-' + _slug(gpu.name)}.json"
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for written in (path, *_plots(report, path, say)):
        say(f"written to {written}")
    return report


def _measure(
    report: dict[str, Any], wanted: dict[str, list[str]], index: dict[str, Any], bench: Bench, quick: bool, say: Say
) -> None:
    seconds = {section: full * (QUICK if quick else 1.0) for section, full in SECONDS.items()}
    report["limits"] = bench.measure_limits(seconds["limits"])
    if report["limits"]:
        say(cuda_claims.limits_table(report["limits"]))
    report["took_seconds"] = {}
    measures: dict[str, Callable[[Any, int], dict[str, Any]]] = {
        "convolutions": lambda entry, batch: bench.convolution(entry, batch, seconds["convolutions"]),
        "networks": lambda entry, batch: bench.network(entry, batch, seconds["networks"], not quick),
    }
    tables = {"convolutions": cuda_claims.convolutions_table, "networks": cuda_claims.networks_table}
    for section, measure in measures.items():
        report[section], start = {}, time.perf_counter()
        for name in wanted[section]:
            item, batch = name.split("/")
            say(f"{section}/{name} …")
            row = measure(index[section][item], int(batch))
            row["clocks"] = nvidia_smi(bench.gpu)
            report[section].setdefault(item, {})[batch] = row
            if not bench.why_not:
                for peer, reason in row["missing"].items():
                    say(f"without {peer}: {reason}")
        report["took_seconds"][section] = round(time.perf_counter() - start, 1)
        if report[section]:
            say(tables[section](report[section]))


def _plots(report: dict[str, Any], path: Path, say: Say) -> list[Path]:
    try:
        from benchmarks import plot
    except ImportError as error:
        say(f"without plots: {error}")
        return []
    return plot.gpu_plots(report, path.with_suffix(""))


def _names(index: dict[str, Any]) -> list[str]:
    return [
        f"{section}/{item}/{batch}"
        for section in ("convolutions", "networks")
        for item, entry in index.get(section, {}).items()
        for batch in entry["batches"]
    ]


def _wanted(index: dict[str, Any], only: Sequence[str]) -> dict[str, list[str]]:
    """Section → the items to measure, as "56²×64/256"."""
    wanted: dict[str, list[str]] = {"convolutions": [], "networks": []}
    for name in _names(index):
        section, _, item = name.partition("/")
        if any(text in name for text in only):
            wanted[section].append(item)
    return wanted


def _torch(gpu: Gpu) -> tuple[Torch | None, str]:
    try:
        return Torch(gpu), ""
    except Unavailable as reason:
        return None, str(reason)


def _limits(gpu: Gpu, files: Path, index: dict[str, Any]) -> Limits | None:
    if "limits" not in index:
        return None
    images = {name: (files / cubin).read_bytes() for name, cubin in index["limits"]["modules"].items()}
    memory = min(_MEMORY, gpu.memory[0] // 8)
    return Limits(gpu, images, index["limits"]["kernels"], memory)


def machine(gpu: Gpu) -> dict[str, Any]:
    """The GPU as its driver describes it."""
    major, minor = gpu.capability
    return {
        "name": gpu.name,
        "capability": f"{major}.{minor}",
        "multiprocessors": gpu.multiprocessors,
        "memory_bytes": gpu.memory[1],
        "newest_cuda_of_driver": gpu.driver,
    }


def nvidia_smi(gpu: Gpu) -> dict[str, str]:
    """Driver, clocks, power and temperature now; {"missing": why} without nvidia-smi."""
    command = ["nvidia-smi", f"--id={gpu.pci}", f"--query-gpu={','.join(_QUESTIONS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"missing": str(error)}
    answers = [answer.strip() for answer in done.stdout.strip().split(",")]
    if done.returncode or len(answers) != len(_QUESTIONS):
        return {"missing": (done.stdout + done.stderr).strip()[:200]}
    return dict(zip(_QUESTIONS, answers, strict=True))


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower().replace("nvidia", "")).strip("-")
