"""docs/support.md says what holds: every cell is compiled, run and compared with eager here.

`make docs` writes the file from what it measures; `make conformance` measures all of it again and compares.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from .cells import Family, measure
from .families import FAMILIES

DOCUMENT = Path(__file__).parents[2] / "docs" / "support.md"

_HEAD = """# What compiles, and how exactly

Written by `make docs` from what it measured; do not edit. Every cell is a small network that was compiled for the
machine at hand, run, and compared with eager PyTorch; `make conformance` measures again and compares with this file.

| a cell says | meaning |
|---|---|
| exact | every output bit is eager's, and the artifact promises so |
| rounding | close to eager: float sums have no fixed order, and functions such as exp are rounded in several ways |
| within one step | a quantized result: where a sum lies next to a tie, it may round to the neighbouring value |
| binary, bitserial | bits are counted: sums are exact integers; with "rounding", a scale or bias behind them is not |
| integer | the same with products of bytes |
| weight-only binary | weights stored as bits, float arithmetic |
| float | float weights and arithmetic |
| PyTorch refuses | eager raises as well, with this message |
| refused | bnncc does not compile it |
| — | there is no such thing |

"""

# Families short enough for every test run.
_QUICK = ("torch.nn.LazyConv", "between a sign and a binary convolution")


def render(family: Family, verdicts: dict[str, list[str]]) -> str:
    """A family as Markdown."""
    lines = [f"## {family.title}", ""]
    lines += [f"| | {' | '.join(family.columns)} |", "|---" * (len(family.columns) + 1) + "|"]
    lines += [f"| {option} | {' | '.join(cells)} |" for option, cells in verdicts.items()]
    return "\n".join(lines) + "\n"


def sections() -> dict[str, str]:
    """Title → text of the sections that the document has."""
    text = DOCUMENT.read_text(encoding="utf-8") if DOCUMENT.exists() else ""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0].removeprefix("## "): part.rstrip() + "\n" for part in parts}


def write(texts: dict[str, str]) -> None:
    """The document, from the sections in the order of `FAMILIES`."""
    body = "\n".join(texts[title] for title in FAMILIES if title in texts)
    DOCUMENT.write_text(_HEAD + body, encoding="utf-8")


@pytest.mark.parametrize(
    "title", [pytest.param(t, marks=[] if t in _QUICK else [pytest.mark.conformance]) for t in FAMILIES]
)
def test_the_table_is_what_is_measured(title):
    verdicts = measure(FAMILIES[title])
    text = render(FAMILIES[title], verdicts)
    wrong = [
        f"{option}: {verdict}"
        for option, row in verdicts.items()
        for verdict in row
        if "WRONG" in verdict or verdict.startswith("refused")
    ]
    if os.environ.get("UPDATE_DOCS"):
        write(sections() | {title: text})
    else:
        assert sections().get(title) == text, "docs/support.md is out of date: make docs"
    assert not wrong


def test_the_document_has_every_family_and_row():
    texts = sections()
    assert list(texts) == list(FAMILIES)
    for title, family in FAMILIES.items():
        rows = re.findall(r"^\| ([^|]+) \|", texts[title], re.MULTILINE)
        assert rows == list(family.rows)
