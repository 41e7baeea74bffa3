"""The loops that measure a core's limit do what they count, and nothing else."""

import re
import subprocess
import sys

import pytest

from benchmarks import limit

# (flags, bytes of a vector, loop, the instruction that does the work, how many of it a round has)
_LOOPS = [
    (["-mcpu=x86_64_v2"], 16, "binary_popcnt", "popcntq", 4),
    (["-mcpu=x86_64_v2"], 16, "float_fma", "mulps", 12),
    (["-mcpu=x86_64_v3"], 32, "binary_table", "vpshufb", 8),
    (["-mcpu=x86_64_v3"], 32, "binary_carry_save_2", "vpshufb", 2),
    (["-mcpu=x86_64_v3"], 32, "float_fma", "vfmadd231ps", 12),
    (["-mcpu=x86_64_v3"], 32, "int8_pmaddubsw", "vpmaddubsw", 8),
    (["-mcpu=x86_64_v4"], 64, "binary_carry_save_3", "vpternlogq", 14),
    (["-mcpu=znver4"], 64, "binary_counted", "vpopcntq", 8),
    (["-mcpu=znver4"], 64, "int8_vpdpbusd", "vpdpbusd", 12),
    (["-target", "aarch64-linux-gnu", "-mcpu=cortex_a72"], 16, "binary_counted", "cnt", 8),
    (["-target", "aarch64-linux-gnu", "-mcpu=cortex_a72"], 16, "float_fma", "fmla", 12),
    (["-target", "aarch64-linux-gnu", "-mcpu=cortex_a72"], 16, "int8_smull", "smull", 8),
    (["-target", "aarch64-linux-gnu", "-mcpu=cortex_a76"], 16, "int8_sdot", "sdot", 12),
]


@pytest.fixture(scope="module")
def assembly(tmp_path_factory):
    """limit.c's assembly for some flags, compiled once."""
    folder, made = tmp_path_factory.mktemp("limit"), {}

    def of(flags, width):
        key = (*flags, width)
        if key not in made:
            path = folder / f"{len(made)}.s"
            command = [sys.executable, "-m", "ziglang", "cc", "-O3", "-g0", "-fno-sanitize=undefined", *flags]
            command += [f"-DBYTES={width}", "-S", "-o", path, limit.SOURCE]
            subprocess.run(command, check=True, capture_output=True)
            made[key] = path.read_text()
        return made[key]

    return of


def innermost(text, function):
    """The instructions of a function's loop, from its head to the branch back."""
    body = text[re.search(rf"^{function}:", text, re.MULTILINE).end() :].split(".Lfunc_end")[0]
    labels: dict[str, int] = {}
    lines = []
    for line in body.splitlines():
        if label := re.match(r"(\.LBB\w+):", line):
            labels[label[1]] = len(lines)
        elif re.match(r"\t[a-z]", line):
            lines.append(line.strip())
            goal = re.search(r"(\.LBB\w+)$", line)
            if goal and goal[1] in labels:
                return lines[labels[goal[1]] :]
    raise AssertionError(f"{function} has no loop")


@pytest.mark.parametrize(("flags", "width", "function", "instruction", "count"), _LOOPS)
def test_a_round_is_as_many_instructions_as_are_counted_and_all_on_registers(
    assembly, flags, width, function, instruction, count
):
    loop = innermost(assembly(flags, width), function)
    assert sum(line.split()[0] == instruction for line in loop) == count
    assert not [line for line in loop if re.search(r"\(%r|\[(x\d|sp)", line)]


def test_the_loops_of_this_machine_say_how_much_they_compute():
    """A call's rounds by its vectors: two operations to each of their multiply-accumulates."""
    loops = limit.loops("native")
    assert {name.partition("_")[0] for name in loops} == set(limit.KINDS)
    for loop in loops.values():
        loop.call()
        rounds = loop.call.args[0]
        assert loop.operations > 0 and loop.operations % rounds == 0
