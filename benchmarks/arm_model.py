"""What a network would take on an ARM core that is not here: `python -m benchmarks.arm_model`.

The runner of a network compiled for that core runs once under qemu-user, which logs every block of instructions it
translates and every execution of one, so that how often each instruction ran is counted, not estimated. llvm-mca then
says how many cycles a basic block takes when it follows itself many times, and

    cycles of a kernel = Σ over its basic blocks of executions · cycles
    time of a kernel   = cycles / clock + bytes from memory / bandwidth

Assumptions:

* All loads hit the first-level cache and all branches are predicted: that is what llvm-mca knows.
* Blocks overlap with their neighbours as well as with copies of themselves.
* LLVM's scheduling models describe the cores. The Cortex-A76 has none of its own; neoverse-n1, its server sibling with
  the same pipes, stands in. There is none of the Cortex-A7, nor of the A53 with a 32-bit system. On the Cortex-A53
  LLVM's model issues one NEON operation on 16 bytes in a cycle.
* Weights come from DRAM in every run if all weights together exceed the last-level cache; so do an activation's reads
  and writes if it exceeds half of that cache. They are charged at `Core.bandwidth`, on top of the cycles: nothing is
  assumed to be hidden behind arithmetic.
* One thread. The driver around the kernels (a few thousand instructions in a run) is left out.

`LCE` holds what Larq Compute Engine's authors measured on a Raspberry Pi 4B at 1.5 GHz with one thread.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import math
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import versions
from bnncc.compiler import Artifact
from bnncc.compiler import compile as compile_model
from bnncc.runtime.device import runner_path
from bnncc.runtime.manifest import tensor_bytes
from bnncc.targets.descriptor import get_target
from bnncc.targets.mca import Block, Instruction, basic_blocks, cycles_of, inner_loops

RESULT = Path(__file__).parent / "results" / "arm-model.json"

#: Published by the authors of LCE (arXiv 2011.09398 and its repository): ms on a Raspberry Pi 4B, one thread.
LCE = {
    "QuickNetSmall": 27.7, "QuickNet": 45.0, "QuickNetLarge": 77.0, "ResnetE18": 85.4, "DenseNet28": 181.0,
    "MeliusNet22": 252.0,
}  # fmt: skip


@dataclass(frozen=True)
class Core:
    """target: bnncc's. model: llvm-mca's processor. clock in GHz, bandwidth in GB/s (of one core reading DRAM), cache:
    bytes of the last level."""

    target: str
    model: str
    clock: float
    bandwidth: float
    cache: int

    @property
    def arch(self) -> str:
        return get_target(self.target).arch


CORES = {
    "cortex-a72": Core("rpi4", "cortex-a72", 1.5, 4.0, 1 << 20),
    "cortex-a53": Core("rpi3", "cortex-a53", 1.2, 2.0, 512 << 10),
    "cortex-a72, 32 bit": Core("rpi4-32", "cortex-a72", 1.5, 4.0, 1 << 20),
    "cortex-a76": Core("rpi5", "neoverse-n1", 2.4, 10.0, 2 << 20),
}


@dataclass(frozen=True)
class Loop:
    """A loop without another inside, or the blocks of one that are always passed together."""

    start: int
    iterations: int
    instructions: int
    macs: int
    cycles: float

    @property
    def macs_per_cycle(self) -> float:
        return self.macs / self.cycles


@dataclass(frozen=True)
class KernelCost:
    """One step of a network. loop: the one with the most binary work, None without any."""

    kernel: str
    op: str
    layers: tuple[str, ...]
    instructions: int
    cycles: float
    memory_bytes: int
    ms: float
    loop: Loop | None


def read_log(lines: Iterable[str]) -> list[Instruction]:
    """Every instruction that ran, by address, from what qemu writes with ``-d in_asm,exec,nochain``."""
    texts: dict[int, str] = {}
    blocks: dict[int, list[int]] = {}
    counts: dict[int, int] = {}
    current: list[int] = []
    for line in lines:
        if line.startswith("Trace "):
            start = int(line.split("/", 2)[1], 16)
            counts[start] = counts.get(start, 0) + 1
        elif line.startswith("IN:"):
            current = []
        elif line.startswith("0x"):
            address, _, text = line.split(None, 2)
            at = int(address.rstrip(":"), 16)
            texts[at] = " ".join(text.split())
            current.append(at)
            blocks[current[0]] = current
    executed = dict.fromkeys(texts, 0)
    for start, count in counts.items():
        for at in blocks[start]:
            executed[at] += count
    return [Instruction(at, texts[at], executed[at]) for at in sorted(texts)]


def loop_cost(body: Block, model: str, arch: str = "aarch64") -> Loop:
    (cycles,) = cycles_of([body], model, arch=arch)
    return Loop(body[0].address, body[-1].count, len(body), sum(i.macs for i in body), cycles)


def network_cost(artifact: Artifact, inputs: Sequence[np.ndarray], core: Core) -> list[KernelCost]:
    """The cost of every step of a network on a core."""
    with tempfile.TemporaryDirectory(prefix="bnncc-arm-") as name:
        folder = Path(name)
        path = folder / f"{artifact.name}.so"
        runner = runner_path(path)
        artifact.save(path, runner=runner)
        ran = read_log(_log(f"qemu-{core.arch}", runner, inputs, len(artifact.versions[0].plan.outputs)))
        functions = _functions(artifact.versions[0].objects[0], runner.read_bytes(), folder)
    code = {name: [i for i in ran if any(i.address in part for part in parts)] for name, parts in functions.items()}
    return _costs(artifact, code, core)


def _costs(artifact: Artifact, code: dict[str, list[Instruction]], core: Core) -> list[KernelCost]:
    plan = artifact.versions[0].plan
    blocks = {name: basic_blocks(instructions) for name, instructions in code.items()}
    flat = [(name, block) for name, parts in blocks.items() for block in parts]
    # What runs seldom is charged one instruction a cycle: its share is nothing and its blocks are many.
    heavy = [(name, block) for name, block in flat if block[0].count * len(block) > 2000]
    estimated = cycles_of([block for _, block in heavy], core.model, arch=core.arch)
    total = {name: 0.0 for name in blocks}
    for name, block in flat:
        if block[0].count * len(block) <= 2000:
            total[name] += block[0].count * len(block)
    for (name, block), cycles in zip(heavy, estimated, strict=True):
        total[name] += block[0].count * cycles

    hottest: dict[str, Loop] = {}
    for name, parts in blocks.items():
        bodies = [body for body in inner_loops(parts) if any(i.macs for i in body)]
        if bodies:
            body = max(bodies, key=lambda b: sum(i.macs * i.count for i in b))
            hottest[name] = loop_cost(body, core.model, core.arch)

    cold = len(plan.weights) > core.cache
    shared = {step.kernel: sum(s.kernel == step.kernel for s in plan.steps) for step in plan.steps}
    costs = []
    for step in plan.steps:
        memory = 0
        for i in step.args:
            tensor = plan.tensors[i]
            size = tensor_bytes(tensor.shape, tensor.dtype)
            if cold if tensor.space in ("weights", "persistent") else size > core.cache // 2:
                memory += size
        # One kernel may serve several steps, which all do the same.
        cycles = total[step.kernel] / shared[step.kernel]
        ms = cycles / core.clock * 1e-6 + memory / core.bandwidth * 1e-6
        count = sum(i.count for i in code[step.kernel]) // shared[step.kernel]
        costs.append(KernelCost(step.kernel, step.op, step.layers, count, cycles, memory, ms, hottest.get(step.kernel)))
    return costs


def _log(qemu: str, runner: Path, inputs: Sequence[np.ndarray], outputs: int) -> Iterator[str]:
    """Lines of qemu's log of one run."""
    command = [qemu, "-d", "in_asm,exec,nochain", "-D", "/dev/stderr", str(runner), "--threads", "1"]
    for n, array in enumerate(inputs):
        np.save(runner.parent / f"in{n}.npy", array)
        command += ["--input", str(runner.parent / f"in{n}.npy")]
    for n in range(outputs):
        command += ["--output", str(runner.parent / f"out{n}.npy")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stderr is not None
    yield from process.stderr
    if process.wait():
        raise RuntimeError(f"{qemu} ended with status {process.returncode}")


def _functions(kernels: bytes, runner: bytes, folder: Path) -> dict[str, list[range]]:
    """The addresses at which the runner, which has no symbols, holds each kernel, by its name."""
    path = folder / "kernels.o"
    path.write_bytes(kernels)
    sections = _readelf("-S", path)
    text = next(s for s in sections if s["Name"]["Name"] == ".text")
    symbols = [s for s in _readelf("-s", path) if s["Section"]["Name"] == ".text" and s["Type"]["Name"] == "Function"]
    fixed = {r["Relocation"]["Offset"] for part in _readelf("-r", path) for r in part if "Relocation" in r}
    # The longest run of code that linking left alone says where the whole section went.
    edges = [-4, *sorted(f & ~3 for f in fixed if f < text["Size"]), text["Size"]]
    start, end = max(((a + 4, b) for a, b in itertools.pairwise(edges)), key=lambda run: run[1] - run[0])
    run = kernels[text["Offset"] + start : text["Offset"] + end]
    at = runner.find(run)
    if at < 0 or runner.find(run, at + 1) >= 0:
        raise RuntimeError("the kernels' code is not found in the runner")
    (folder / "runner").write_bytes(runner)
    linked = next(s for s in _readelf("-S", folder / "runner") if s["Name"]["Name"] == ".text")
    base = at - start - linked["Offset"] + linked["Address"]
    order = sorted((s["Value"], s["Name"]["Name"]) for s in symbols)
    ends = [value for value, _ in order[1:]] + [text["Size"]]
    found: dict[str, list[range]] = {}
    # A kernel's parallel loops are functions without a symbol, right behind its own.
    for (value, symbol), end in zip(order, ends, strict=True):
        kernel = symbol.removeprefix("__tvm_ffi_").removesuffix("_compute_")
        found.setdefault(kernel, []).append(range(base + value, base + end))
    return found


def _readelf(what: str, path: Path) -> list[dict[str, Any]]:
    command = ["llvm-readelf-19", "--elf-output-style=JSON", what, str(path)]
    (file,) = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    key = {"-S": "Sections", "-s": "Symbols", "-r": "Relocations"}[what]
    inner = {"-S": "Section", "-s": "Symbol", "-r": "Relocs"}[what]
    return [entry[inner] for entry in file[key]]


def report(costs: Sequence[KernelCost], core: Core, name: str) -> dict[str, Any]:
    """A network's entry of the JSON file."""
    binary = [c for c in costs if c.loop]
    return {
        "ms": round(sum(c.ms for c in costs), 2),
        "ms_of_binary_kernels": round(sum(c.ms for c in binary), 2),
        "ms_of_memory": round(sum(c.memory_bytes for c in costs) / core.bandwidth * 1e-6, 2),
        "million_instructions": round(sum(c.instructions for c in costs) * 1e-6, 1),
        "lce_ms": LCE.get(name) if core.target == "rpi4" else None,
        "kernels": [
            {
                "kernel": c.kernel,
                "layers": c.layers,
                "ms": round(c.ms, 3),
                "cycles": math.ceil(c.cycles),
                "instructions": c.instructions,
                "memory_bytes": c.memory_bytes,
                "loop": {**asdict(c.loop), "macs_per_cycle": round(c.loop.macs_per_cycle, 1)} if c.loop else None,
            }
            for c in costs
        ],
    }


def _table(name: str, core: str, entry: dict[str, Any], most: int) -> Table:
    lce = f"; LCE published {entry['lce_ms']} ms" if entry["lce_ms"] else ""
    table = Table("kernel", "ms", "million cycles", "million instructions", "MB", "MAC/cycle of its loop")
    table.title = f"{name} on {core}: {entry['ms']} ms modelled{lce}"
    for column in table.columns[1:]:
        column.justify = "right"
    for k in sorted(entry["kernels"], key=lambda k: -k["ms"])[:most]:
        rate = f"{k['loop']['macs_per_cycle']:.1f}" if k["loop"] else ""
        cells = (k["ms"], k["cycles"] * 1e-6, k["instructions"] * 1e-6, k["memory_bytes"] * 1e-6)
        table.add_row(k["kernel"], *(f"{value:.2f}" for value in cells), rate)
    return table


def main() -> None:
    """Model what the arguments ask for; entries of earlier runs stay in the file."""
    from benchmarks.bitorch_networks import NETWORKS, build

    parser = argparse.ArgumentParser(prog="python -m benchmarks.arm_model", description=__doc__.partition("\n")[0])
    parser.add_argument("--network", action="append", choices=list(NETWORKS), help="default: QuickNet")
    parser.add_argument("--core", action="append", choices=list(CORES), help="default: all")
    parser.add_argument("--kernels", type=int, default=12, help="how many kernels to print, the longest first")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    console = Console(width=150)
    for tool in ("qemu-aarch64", "qemu-arm", "llvm-mca-19", "llvm-readelf-19"):
        if shutil.which(tool) is None:
            raise SystemExit(f"{tool} is missing: apt install qemu-user llvm-19")
    data: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {"networks": {}}
    data |= {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "cores": {name: asdict(core) for name, core in CORES.items()},
    }
    for name in options.network or ["QuickNet"]:
        model, image = build(name)
        for core in options.core or list(CORES):
            artifact = compile_model(model, (image,), CORES[core].target, name=name)
            entry = report(network_cost(artifact, [image.numpy()], CORES[core]), CORES[core], name)
            data["networks"].setdefault(name, {})[core] = entry
            options.out.write_text(json.dumps(data, indent=1) + "\n")
            console.print(_table(name, core, entry, options.kernels))


if __name__ == "__main__":
    main()
