"""Cycles of ARM code by llvm-mca, LLVM's machine code analyser, on cores that are not here.

It knows a core's pipes and latencies, takes all loads to hit the first-level cache and all branches to be predicted.
The Cortex-A76 has no model of its own; neoverse-n1, its server sibling with the same pipes, stands in.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bnncc.runtime.errors import BnnccError

#: Architecture and processor of a target → the processor that llvm-mca has a model of, where that is another one.
#: "generic" is what in-order cores compile for. Of 32-bit code on the Cortex-A53 it knows nothing; Swift stands in.
_MODELS = {
    ("aarch64", "cortex-a76"): "neoverse-n1",
    ("aarch64", "generic"): "cortex-a53",
    ("arm", "cortex-a53"): "swift",
}

_BRANCH = re.compile(
    r"(b|bl|br|blr|ret|cbz|cbnz|tbz|tbnz|b\.\w+)\b"
    # of 32 bits; a return is a load of the program counter
    r"|(b|bl|bx|blx)(eq|ne|[ch]s|cc|lo|mi|pl|v[sc]|hi|ls|[gl][et])?\b|(pop|ldm\w*)\s.*\bpc\b|(mov|ldr|add)\w*\s+pc\b"
)
_POPCOUNT = re.compile(r"cnt\s+v\d+\.(8|16)b|vcnt\.8\s+([dq])")
#: Architectures, as targets spell them, with llvm-mca's options.
_OPTIONS = {
    "aarch64": ["-mtriple=aarch64", "-mattr=+dotprod,+fullfp16"],
    # What has no cycles are a few instructions at the edges of functions.
    "arm": ["-mtriple=armv7-linux-gnueabihf", "-mattr=+neon,+vfp4", "-skip-unsupported-instructions=lack-sched"],
}
ARCHITECTURES = tuple(_OPTIONS)
#: The instructions that multiply; those that widen take half a register of weights, the others what they write.
_PRODUCT = re.compile(r"(?:cnt|fmla|sdot)\s+v\d+\.(\d+)([bhs])|(?:vcnt\.8|vfma\.f32|vmla\.f32)\s+([dq])")
_WIDENING_PRODUCT = re.compile(r"[su](?:mull|mlal)2?\s+v|v(?:mull|mlal)\.[su]\d+\s")
_BYTES = {"b": 1, "h": 2, "s": 4, "d": 8, "q": 16}


@dataclass(frozen=True)
class Instruction:
    """text: in the assembler's syntax. count: how often it ran."""

    address: int
    text: str
    count: int = 1

    @property
    def branches(self) -> bool:
        return bool(_BRANCH.match(self.text))

    @property
    def goal(self) -> int | None:
        """The address that a direct branch goes to."""
        if not self.branches or (found := re.search(r"#?(0x[0-9a-f]+)$", self.text)) is None:
            return None
        return int(found[1], 16)

    @property
    def macs(self) -> int:
        """Binary multiply-accumulates: the bits that it counts."""
        found = _POPCOUNT.match(self.text)
        if found is None:
            return 0
        return 8 * int(found[1]) if found[1] else {"d": 64, "q": 128}[found[2]]

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that it multiplies or compares with inputs; 0 for what does neither."""
        if _WIDENING_PRODUCT.match(self.text):
            return 8
        found = _PRODUCT.match(self.text)
        if found is None:
            return 0
        return _BYTES[found[3]] if found[3] else int(found[1]) * _BYTES[found[2]]


Block = tuple[Instruction, ...]


def read_assembly(text: str) -> list[Instruction]:
    """The instructions of what LLVM prints, at made-up addresses, with those in the place of branches' labels."""
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in text.splitlines():
        code = line.partition("//")[0].partition("@")[0].strip()
        if code.endswith(":"):
            labels[code[:-1]] = 4 * len(lines)
        elif code and not code.startswith((".", "#")):
            lines.append(" ".join(code.split()))
    return [Instruction(4 * n, _with_address(line, labels)) for n, line in enumerate(lines)]


def _with_address(line: str, labels: dict[str, int]) -> str:
    *_, last = line.split(" ")
    return line.removesuffix(last) + f"#0x{labels[last]:x}" if last in labels and _BRANCH.match(line) else line


def basic_blocks(instructions: Sequence[Instruction]) -> list[Block]:
    """Splits a function (ascending addresses) after every branch and before everything that one goes to."""
    leaders = {goal for i in instructions if (goal := i.goal) is not None}
    blocks: list[list[Instruction]] = []
    previous: Instruction | None = None
    for i in instructions:
        if previous is None or previous.branches or i.address in leaders or i.address != previous.address + 4:
            blocks.append([])
        blocks[-1].append(i)
        previous = i
    return [tuple(block) for block in blocks]


def inner_loops(blocks: Sequence[Block]) -> Iterator[Block]:
    """The bodies of the innermost loops: from where a branch goes back to, to that branch."""
    ends = [(block[-1].goal, n) for n, block in enumerate(blocks)]
    starts = {block[0].address: n for n, block in enumerate(blocks)}
    back = [(starts[goal], n) for goal, n in ends if goal in starts and starts[goal] <= n]
    for first, last in back:
        if not any(first <= f and n <= last and (f, n) != (first, last) for f, n in back):
            yield tuple(i for block in blocks[first : last + 1] for i in block)


def model_of(arch: str, cpu: str) -> str:
    """The processor whose model stands for a target's."""
    return _MODELS.get((arch, cpu), cpu)


@functools.cache
def tool() -> str:
    """llvm-mca, the newest of those that say their version. Raises BnnccError where there is none."""
    names = [*(f"llvm-mca-{version}" for version in range(30, 13, -1)), "llvm-mca"]
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        raise BnnccError("llvm-mca, which estimates what ARM code takes, is not installed: apt install llvm")
    return found


def cycles_of(blocks: Sequence[Block], model: str, iterations: int = 50, arch: str = "aarch64") -> list[float]:
    """Cycles of each block on a processor of llvm-mca, when it follows itself many times. arch: as targets spell it."""
    source = []
    for n, block in enumerate(blocks):
        source.append(f"# LLVM-MCA-BEGIN {n}")
        source += [_assembler(i) for i in block]
        source.append(f"# LLVM-MCA-END {n}")
    with tempfile.NamedTemporaryFile("w", suffix=".s") as file:
        file.write("\n".join(source) + "\n")
        file.flush()
        command = [tool(), *_OPTIONS[arch], f"-mcpu={model}", "--json"]
        command += [f"-iterations={iterations}", file.name]
        result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise BnnccError(f"{tool()} failed: {result.stderr.strip().partition(chr(10))[0]}")
    regions = {region["Name"]: region["SummaryView"] for region in json.loads(result.stdout)["CodeRegions"]}
    return [regions[str(n)]["TotalCycles"] / iterations for n in range(len(blocks))]


def _assembler(instruction: Instruction) -> str:
    """An instruction as llvm-mca takes it: an address in the code needs to be no real one, but one in reach."""
    far = instruction.branches or instruction.text.startswith("adr")
    text = re.sub(r"#?0x[0-9a-f]+$", "#0", instruction.text) if far else instruction.text
    # A disassembler's bytes of alignment are an assembler's bits.
    text = re.sub(r":0x([0-9a-f]+)\]", lambda bits: f":{int(bits[1], 16)}]", text)
    return "nop" if text.startswith((".byte", "udf")) else text
