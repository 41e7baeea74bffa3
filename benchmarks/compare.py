"""Two results side by side: `python -m benchmarks.compare BEFORE.json AFTER.json`.

Every figure that both have, and how many times as good the second one's is: above 1 is better, whichever direction the
figure has. Of results of different machines only what does not depend on the machine is compared: shares and ratios.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.machine import terminal


@dataclass(frozen=True)
class Figure:
    """A number of a result. higher: whether more is better. absolute: whether it depends on the machine."""

    value: float
    higher: bool
    absolute: bool = True


def figures(report: dict[str, Any]) -> dict[str, Figure]:
    """The figures of a result by name."""
    return dict([*_limits(report), *_operators(report), *_networks(report)])


def _limits(report: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    limits = report.get("limits", {})
    for isa, kinds in limits.get("arithmetic", {}).items():
        for kind, entry in kinds.items():
            yield f"limits/{isa}, {kind}: GOPS", Figure(entry["gops"], True)
    for level, entry in limits.get("memory", {}).items():
        yield f"limits/{level}: GB/s read", Figure(entry["read_gbs"], True)


def _operators(report: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    for name, by_isa in report.get("kernels", {}).items():
        for isa, row in by_isa.items():
            yield f"kernels/{name}, {isa}: µs", Figure(row["us"], False)
            yield f"kernels/{name}, {isa}: share of the limit", Figure(row["share_of_limit"], True, False)
    for name, row in report.get("layers", {}).items():
        yield from _against_peers(f"layers/{name}", row)
        yield f"layers/{name}: kernel µs", Figure(row["kernel_us"], False)
        yield f"layers/{name}: share of the bound", Figure(row["share_of_bound"], True, False)
    for name, row in report.get("convolutions", {}).items():
        yield from _against_peers(f"convolutions/{name}", row)


def _networks(report: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    for name, row in report.get("networks", {}).items():
        yield from _against_peers(f"networks/{name}", row)
        yield f"networks/{name}: share of the roofline", Figure(row["roofline"]["share"], True, False)
        yield f"networks/{name}: two threads over one", Figure(row["threads"]["ratio"], True, False)
        for what in ("arena", "artifact", "resident"):
            yield f"networks/{name}: {what} bytes", Figure(row["memory"][f"{what}_bytes"], False)
        for what in ("seconds", "second_seconds", "peak_mb"):
            yield f"networks/{name}: compile {what}", Figure(row["compile"][what], False)


def _against_peers(name: str, row: dict[str, Any]) -> Iterator[tuple[str, Figure]]:
    yield f"{name}: ms", Figure(row["median_ms"]["bnncc"], False)
    for peer, ratio in row["times_faster"].items():
        yield f"{name}: times as fast as {peer}", Figure(ratio, True, False)


def gain(before: Figure, after: Figure) -> float:
    """How many times as good the second figure is."""
    if not before.value or not after.value:
        return 1.0 if before.value == after.value else float("inf")
    return after.value / before.value if after.higher else before.value / after.value


def table(before: dict[str, Any], after: dict[str, Any], least: float) -> Table:
    """Figures of both results that differ by the factor `least` or more, the greatest loss first."""
    same = before["machine"]["processor"] == after["machine"]["processor"]
    old, new = figures(before), figures(after)
    names = [name for name in old if name in new and (same or not old[name].absolute)]
    gains = {name: gain(old[name], new[name]) for name in names}
    result = Table("", "before", "after", "times as good", title=f"{before['when']} → {after['when']}")
    for column in result.columns[1:]:
        column.justify = "right"
    for name in sorted(names, key=lambda name: gains[name]):
        if max(gains[name], 1 / gains[name] if gains[name] else float("inf")) >= least:
            style = "red" if gains[name] < 1 else "green" if gains[name] > 1 else ""
            result.add_row(name, f"{old[name].value:g}", f"{new[name].value:g}", f"{gains[name]:.3f}", style=style)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.partition("\n")[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--all", action="store_true", help="figures that differ by less than 3 %%, too")
    options = parser.parse_args()
    before, after = (json.loads(path.read_text()) for path in (options.before, options.after))
    terminal().print(table(before, after, 1.0 if options.all else 1.03))


if __name__ == "__main__":
    main()
