"""What a network takes besides time: compiling it, and memory when it runs. Each in a fresh process.

    python -m benchmarks.resources compile NETWORK FILE     compiles a network into a file
    python -m benchmarks.resources run FILE                 runs an artifact with NumPy alone

Both print one line of JSON. `compiling` and `running` call them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bnncc.runtime.manifest import VersionEntry, tensor_bytes

ROOT = Path(__file__).parent.parent
#: Runs before the memory is looked at; from the second on nothing is allocated.
_RUNS = 5


def compiling(network: str, path: Path) -> dict[str, float]:
    """Compiles a network into `path`: seconds (by the wall's clock, and of CPU time) and most MB where nothing is
    cached, and seconds of doing it once more."""
    with tempfile.TemporaryDirectory(prefix="bnncc-bench-") as folder:
        environment = {**os.environ, "BNNCC_CACHE": folder}
        arguments = ["compile", network, str(path)]
        first, second = (_fresh(arguments, environment) for _ in range(2))
    return {**first, "second_seconds": second["seconds"]}


def running(artifact: Path, version: VersionEntry) -> dict[str, int]:
    """Bytes: of the file, its weights, its arena, the most alive in it, and what a run adds to the process's memory."""
    return {
        "artifact_bytes": artifact.stat().st_size,
        "weights_bytes": version["weights_bytes"],
        "arena_bytes": version["arena_bytes"],
        "alive_bytes": alive_bytes(version),
        **_fresh(["run", str(artifact)], dict(os.environ)),
    }


def alive_bytes(version: VersionEntry) -> int:
    """The bytes of the arena that hold something needed, in the step that needs the most.

    Found from the steps alone, not by the planner: what a step reads is needed since the step that wrote there last,
    under whatever name, for a view is another tensor of the same memory.
    """

    def span(number: int) -> tuple[int, int] | None:
        tensor = version["tensors"][number]
        start = tensor["offset"]
        return (start, start + tensor_bytes(tensor["shape"], tensor["dtype"])) if tensor["space"] == "arena" else None

    written: list[tuple[int, int, int]] = []
    needed: list[list[tuple[int, int]]] = [[] for _ in version["steps"]]
    for now, step in enumerate(version["steps"]):
        reads, writes = step["args"][: -step["outputs"]], step["args"][-step["outputs"] :]
        for start, end in filter(None, map(span, reads)):
            since = max((at for at, first, last in written if first < end and start < last), default=0)
            for at in range(since, now + 1):
                needed[at].append((start, end))
        for start, end in filter(None, map(span, writes)):
            written.append((now, start, end))
            needed[now].append((start, end))
    return max(map(_covered, needed), default=0)


def _covered(spans: list[tuple[int, int]]) -> int:
    total = reached = 0
    for start, end in sorted(spans):
        total += max(0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _fresh(arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.resources", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(arguments)} failed: {done.stderr.strip().splitlines()[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _compile(network: str, path: str) -> dict[str, float]:
    import resource
    import warnings

    from benchmarks.networks import build
    from bnncc.compiler import compile as compile_model

    warnings.filterwarnings("ignore")
    model, image = build(network)
    before, start = sum(os.times()[:4]), time.perf_counter()
    compile_model(model, (image,), target="native", name=network).save(path)
    seconds = time.perf_counter() - start
    # The linker runs in a process of its own.
    most = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu = sum(os.times()[:4]) - before
    return {"seconds": round(seconds, 2), "cpu_seconds": round(cpu, 2), "peak_mb": round(most * 1024e-6, 1)}


def _run(path: str) -> dict[str, int]:
    import numpy as np

    from bnncc.runtime.session import load

    before = _high_water()
    with load(path, threads=1) as session:
        inputs = [np.zeros(port["shape"], port["dtype"]) for port in session.inputs]
        for _ in range(_RUNS):
            session(*inputs)
        return {"resident_bytes": _high_water() - before}


def _high_water() -> int:
    """The most bytes that this process ever had resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resources", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    compile_parser = commands.add_parser("compile")
    compile_parser.add_argument("network")
    compile_parser.add_argument("file")
    commands.add_parser("run").add_argument("file")
    options = parser.parse_args()
    answer = _compile(options.network, options.file) if options.command == "compile" else _run(options.file)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
