"""What one core of this machine can do at best, for every instruction set it has: `python -m benchmarks.limit`.

Arithmetic is measured from registers (limit.c), so no kernel can be faster; where several mixes of instructions count
bits or multiply bytes, the fastest is the limit. Memory is measured by reading and by copying blocks that fit each
cache and one that fits none. One multiply-accumulate is two operations.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import caches
from benchmarks.native_c import compile_c
from bnncc.runtime.cpu import host_architecture, host_features
from bnncc.targets.descriptor import get_target

SOURCE = Path(__file__).with_name("limit.c")
KINDS = ("binary", "float", "int8")

#: Vectors that a round of each loop of limit.c takes. `binary_popcnt` counts words of 64 bits.
_VECTORS = {
    "binary_counted": 8, "binary_popcnt": 4, "binary_table": 4, "binary_carry_save_2": 4, "binary_carry_save_3": 8,
    "float_fma": 12, "int8_vpdpbusd": 12, "int8_pmaddwd": 8, "int8_pmaddubsw": 8, "int8_sdot": 12, "int8_smull": 8,
}  # fmt: skip
#: Bits of an operand of a multiply-accumulate.
_BITS = {"binary": 1, "float": 32, "int8": 8, "int8_pmaddwd": 16}


@dataclass(frozen=True)
class Loop:
    """A loop of limit.c. operations: of a call, two for every multiply-accumulate."""

    name: str
    call: Callable[[], None]
    operations: float


def isas() -> list[str]:
    """The targets whose code this machine runs, the most general first."""
    if host_architecture() != "x86_64":
        return ["native"]
    present = host_features() or frozenset()
    levels = [name for name in ("x86-64-v2", "x86-64-v3", "x86-64-v4") if set(get_target(name).features) <= present]
    return [*levels, "native"]


@functools.cache
def loops(isa: str) -> dict[str, Loop]:
    """The loops of an instruction set by name; a call takes some 5 ms."""
    library, width = _library(isa)
    found = {}
    for name, vectors in _VECTORS.items():
        if not hasattr(library, name):
            continue
        run = getattr(library, name)
        run.argtypes, run.restype = [ctypes.c_long], None
        kind = name.partition("_")[0]
        bits = 64 if name == "binary_popcnt" else 8 * width
        rounds = _rounds(run)
        operations = 2.0 * vectors * bits // _BITS.get(name, _BITS[kind]) * rounds
        found[name] = Loop(name, functools.partial(run, rounds), operations)
    return found


@functools.cache
def _library(isa: str) -> tuple[ctypes.CDLL, int]:
    """limit.c for an instruction set, and the bytes of its vectors."""
    target = get_target(isa)
    width = target.vector_bits // 8
    # Zig spells the processors' names so, and takes this flag on every architecture.
    return compile_c(SOURCE, [f"-mcpu={isa.replace('-', '_')}", f"-DBYTES={width}"]), width


def _rounds(run: Callable[[int], None], seconds: float = 0.005) -> int:
    rounds = 1000
    while True:
        start = time.process_time()
        run(rounds)
        if (took := time.process_time() - start) > seconds / 4:
            return int(rounds * seconds / took)
        rounds *= 4


def median_seconds(call: Callable[[], Any], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.process_time()
        call()
        times.append(time.process_time() - start)
    return statistics.median(times)


def arithmetic(isa: str, runs: int = 15) -> dict[str, dict[str, Any]]:
    """Kind → {"gops", "mix": the fastest loop, "mixes": GOPS of each}, of one core."""
    rates = {name: 1e-9 * loop.operations / median_seconds(loop.call, runs) for name, loop in loops(isa).items()}
    result = {}
    for kind in KINDS:
        mixes = {name: round(rate, 1) for name, rate in rates.items() if name.startswith(kind)}
        best = max(mixes, key=lambda name: mixes[name])
        result[kind] = {"gops": mixes[best], "mix": best, "mixes": mixes}
    return result


def memory(runs: int = 9) -> dict[str, dict[str, Any]]:
    """Level → {"bytes": of that cache, "read_gbs", "copy_gbs"}: 10⁹ bytes a second, a copy counting both ways.

    "memory" is a block four times as large as the last cache; its "bytes" is None.
    """
    library, _ = _library("native")
    library.memory_read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    library.memory_copy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long]
    sizes = caches()
    last = sizes[max(sizes)]
    most = 4 * last
    buffers = (ctypes.c_char * (2 * most + 4096))()
    ctypes.memset(buffers, 1, len(buffers))  # or all pages are one page of zeros
    start = -(-ctypes.addressof(buffers) // 4096) * 4096
    result = {}
    before = last
    for level, size in [*sizes.items(), ("memory", None)]:
        # Far more than the cache before, but at most half of this one: other things are in it, other cores' as well.
        block = most if size is None else min(size // 2, 4 * before) // 4096 * 4096
        before = size or last
        half = block // 2 // 4096 * 4096
        rounds = max(1, (1 << 23) // block)
        read = median_seconds(lambda: library.memory_read(start, block, rounds), runs)  # noqa: B023
        copy = median_seconds(lambda: library.memory_copy(start + half, start, half, rounds), runs)  # noqa: B023
        result[level] = {
            "bytes": size,
            "read_gbs": round(1e-9 * block * rounds / read, 1),
            "copy_gbs": round(1e-9 * 2 * half * rounds / copy, 1),
        }
    return result


def measure(of: Sequence[str] | None = None) -> dict[str, Any]:
    """{"arithmetic": {isa: …}, "memory": {level: …}}, see `arithmetic` and `memory`. of: None for all `isas`."""
    return {"arithmetic": {isa: arithmetic(isa) for isa in of or isas()}, "memory": memory()}


def tables(limits: dict[str, Any]) -> list[Table]:
    """`measure`'s result for people."""
    arithmetic = Table("code for", title="one core at best, from registers: 10⁹ operations a second")
    for column in ("binary", "by", "float32", "bytes", "by"):
        arithmetic.add_column(column, justify="left" if column == "by" else "right")
    for isa, kinds in limits["arithmetic"].items():
        binary, floats, products = (kinds[kind] for kind in KINDS)
        names = [kind["mix"].partition("_")[2] for kind in (binary, products)]
        rates = [f"{kind['gops']:.0f}" for kind in (binary, floats, products)]
        arithmetic.add_row(isa, rates[0], names[0], rates[1], rates[2], names[1])
    memory = Table("data in", title="from memory: 10⁹ bytes a second")
    memory.add_column("read", justify="right")
    memory.add_column("copied", justify="right")
    for level, rates in limits["memory"].items():
        memory.add_row(level, f"{rates['read_gbs']:.0f}", f"{rates['copy_gbs']:.0f}")
    return [arithmetic, memory]


def main() -> None:
    limits = measure()
    console = Console()
    console.print(*tables(limits))
    for isa, kinds in limits["arithmetic"].items():
        console.print(isa, {name: rate for kind in kinds.values() for name, rate in kind["mixes"].items()})


if __name__ == "__main__":
    main()
