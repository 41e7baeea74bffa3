"""The parts of the ARM model that read logs and assembly: counts, blocks, loops, cycles."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import arm_model

_LOOP = [
    "movi v0.16b, #0", "ldr q1, [x0], #16", "eor v2.16b, v1.16b, v3.16b", "cnt v2.16b, v2.16b",
    "add v0.16b, v0.16b, v2.16b", "subs x1, x1, #1", "b.ne #0x1004", "ret",
]  # fmt: skip


def _log(executions: list[int]) -> list[str]:
    """What qemu writes: the block that falls into the loop, the loop, the return; then what ran."""
    lines = []
    for first, last in ((0, 7), (1, 7), (7, 8)):
        lines += [
            "----------------",
            "IN: ",
            *(f"0x{0x1000 + 4 * n:08x}:  00000000  {_LOOP[n]}" for n in range(first, last)),
        ]
    lines += [""]
    for start in executions:
        lines.append(f"Trace 0: 0x7f9f81200100 [0000000001009331/{start:016x}/00000001/00000200] ")
    return lines


def _ran():
    return arm_model.read_log(_log([0x1000, 0x1004, 0x1004, 0x101C]))


def test_every_execution_is_counted():
    """The block that falls into the loop counts the loop's first pass."""
    ran = _ran()
    assert [i.text for i in ran] == _LOOP
    assert [i.count for i in ran] == [1, 3, 3, 3, 3, 3, 3, 1]


def test_a_block_that_is_translated_twice_is_one():
    log = _log([0x1000])
    assert [i.count for i in arm_model.read_log([*log, *log])] == [2, 2, 2, 2, 2, 2, 2, 0]


def test_blocks_end_at_branches_and_before_their_goals():
    blocks = arm_model.basic_blocks(_ran())
    assert [(block[0].address, len(block)) for block in blocks] == [(0x1000, 1), (0x1004, 6), (0x101C, 1)]


def test_blocks_end_where_code_that_never_ran_lies_between():
    ran = [arm_model.Instruction(0x1000, "nop"), arm_model.Instruction(0x1008, "nop")]
    assert [len(block) for block in arm_model.basic_blocks(ran)] == [1, 1]


def test_inner_loops_hold_no_other():
    texts = ["nop", "nop", "cbnz x1, #0x1004", "subs x2, x2, #1", "b.ne #0x1000"]
    code = [arm_model.Instruction(0x1000 + 4 * n, text) for n, text in enumerate(texts)]
    loops = list(arm_model.inner_loops(arm_model.basic_blocks(code)))
    assert [[i.address for i in loop] for loop in loops] == [[0x1004, 0x1008]]


@pytest.mark.parametrize(
    ("text", "macs"),
    [
        ("cnt v2.16b, v2.16b", 128),
        ("cnt v2.8b, v2.8b", 64),
        ("add v0.16b, v0.16b, v2.16b", 0),
        ("cntb x0", 0),
        ("vcnt.8 q8, q9", 128),
        ("vcnt.8 d8, d9", 64),
        ("vadd.i8 q8, q9, q8", 0),
    ],
)
def test_macs_are_the_bits_counted(text, macs):
    assert arm_model.Instruction(0, text).macs == macs


@pytest.mark.parametrize(
    ("text", "goal"),
    [
        ("b.ne #0x1004", 0x1004),
        ("tbz w8, #3, #0x20", 0x20),
        ("ret", None),
        ("bics x0, x1, x2", None),
        ("b #0x8", 8),
        ("bne #0x1004", 0x1004),
        ("bls #0x20", 0x20),
        ("bic r0, r1, #0x1", None),
        ("pop {r4, pc}", None),
    ],
)
def test_goals_of_branches(text, goal):
    assert arm_model.Instruction(0, text).goal == goal


@pytest.mark.skipif(shutil.which("llvm-mca-19") is None, reason="needs llvm-mca-19")
def test_macs_per_cycle_of_a_loop():
    """128 products to an iteration; its sum goes round in three cycles, the latency of an add."""
    (body,) = arm_model.inner_loops(arm_model.basic_blocks(_ran()))
    loop = arm_model.loop_cost(body, "cortex-a72")
    assert (loop.start, loop.iterations, loop.instructions, loop.macs) == (0x1004, 3, 6, 128)
    assert loop.cycles >= 3
    assert loop.macs_per_cycle == pytest.approx(128 / loop.cycles)


@pytest.mark.parametrize("text", ["pop {r4, r5, pc}", "bx lr", "ldmfd sp!, {r4, pc}", "blhi #0x20", "bgt #0x8"])
def test_branches_of_32_bit_code(text):
    assert arm_model.Instruction(0, text).branches


@pytest.mark.parametrize(
    "text", ["pop {r4, lr}", "bic r0, r0, #1", "bfi r0, r1, #2, #3", "mov r0, pc", "ldm r0, {r1, r2}"]
)
def test_what_only_looks_like_a_branch(text):
    assert not arm_model.Instruction(0, text).branches


@pytest.mark.skipif(shutil.which("llvm-mca-19") is None, reason="needs llvm-mca-19")
def test_cycles_of_32_bit_code():
    """The disassembler's alignment in bytes, a store that the model has no cycles for, a sum that goes round."""
    texts = ["vld1.64 {d2, d3}, [r0:0x80]!", "veor q2, q1, q3", "vcnt.8 q2, q2", "vadd.i8 q0, q0, q2",
             "vstmia r1, {d0, d1}", "subs r2, r2, #1", "bne #0x1000"]  # fmt: skip
    body = tuple(arm_model.Instruction(0x1000 + 4 * n, text, 3) for n, text in enumerate(texts))
    loop = arm_model.loop_cost(body, "cortex-a72", "arm")
    assert (loop.instructions, loop.macs) == (7, 128)
    assert 3 <= loop.cycles < 7
