"""Binary products in assembler: what is loaded, how pointers move, and what does not fit.

That they are exact is what tests/targets/test_neon.py checks under QEMU.
"""

from __future__ import annotations

import re

from bnncc.targets.in_order import Loop, Place, Step, can_reach, llvm_function


def _row(pixels: int, at: int, channels: int = 8) -> Step:
    """A step that begins at a pixel of a row, of 16 bytes each, with weights of its own."""
    return Step(
        tuple((0, 16 * (at + p)) for p in range(pixels)), tuple((1, 16 * (channels * at + c)) for c in range(channels))
    )


def _code(loops: list[Loop], steps: list[Step], pointers: int = 2) -> list[str]:
    function = llvm_function(loops, steps, pointers)
    assert function is not None
    name, text = function
    assert f"@{name}(" in text
    found = re.search(r'sideeffect "(.*?)", "', text)
    assert found
    return found[1].split("\\0A")


def _loaded(code: list[str]) -> list[Place]:
    """What LDR and LDP read: by operand, and bytes."""
    places = []
    for line in code:
        if match := re.match(r"ld([rp]) .*\[\$(\d+)(?:, #(\d+))?\]$", line):
            places += [(int(match[2]), int(match[3] or 0) + 16 * n) for n in range(2 if match[1] == "p" else 1)]
    return places


def test_each_vector_of_a_row_is_loaded_once() -> None:
    """Three steps along a row read four pixels of it together, and their weights."""
    places = _loaded(_code([], [_row(2, at) for at in range(3)]))
    assert len(places) == len(set(places)) == 4 + 3 * 8


def test_products_follow_in_runs_longer_than_their_latency() -> None:
    code = _code([], [_row(2, 0)])
    names = [line.split()[0] for line in code]
    assert names == ["ldp"] * 5 + (["eor"] * 8 + ["cnt"] * 8 + ["add"] * 8) * 2


def test_three_pixels_are_two_equal_runs() -> None:
    names = [line.split()[0] for line in _code([], [_row(3, 0, channels=4)])]
    assert names[-36:] == (["eor"] * 6 + ["cnt"] * 6 + ["add"] * 6) * 2


def test_pointers_move_from_where_the_loops_inside_left_them() -> None:
    """20 rows of 8 iterations, 32 bytes each: 5,000 bytes to the next row are 4,744 from the end of one."""
    code = _code([Loop(20, (5000, 0)), Loop(8, (32, 256))], [_row(1, 0)])
    moves = [line for line in code if re.match(r"(add|sub) \$\d+, \$\d+, #", line)]
    pointers = sorted({line.split()[1] for line in moves}, key=lambda p: int(p[1:-1]))
    assert len(pointers) == 2
    x, w = pointers
    assert moves == [
        f"add {x} {x} #32", f"add {w} {w} #256", f"add {x} {x} #{5000 - 256 - 4096}", f"add {x} {x} #1, lsl #12",
        f"sub {w} {w} #{2048}",
    ]  # fmt: skip
    branches = [line.split()[1] for line in code if line.startswith("b.ne")]
    labels = [line[:-1] for line in code if line.endswith(":")]
    assert branches == labels[::-1]
    assert [line.split()[-1] for line in code if line.startswith("mov")] == ["#20", "#8"]


def test_what_does_not_fit() -> None:
    assert llvm_function([], [_row(4, 0)], 2) is None  # 32 sums
    assert llvm_function([], [_row(2, 0)], 2) is not None
    assert llvm_function([Loop(2, (1 << 24, 0))], [_row(2, 0)], 2) is None  # further than two instructions add
    assert can_reach(0) and can_reach(65520)
    assert not can_reach(65536) and not can_reach(8) and not can_reach(-16)
