"""The report as pictures: the roofline with every step of the networks on it, and each network beside its peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

_KINDS = {"1×1 bits": ("binary", "o", "tab:blue"), "32×32 bits": ("float", "s", "tab:orange")}


def plots(report: dict[str, Any], stem: Path) -> list[Path]:
    """Writes the pictures beside `stem`; returns their paths."""
    written = []
    for name, entry in report.get("networks", {}).items():
        written.append(_save(stem, f"roofline-{name}", _roofline(name, entry, report["limits"])))
    for section in ("convolutions", "networks"):
        if report.get(section):
            written.append(_save(stem, section, _bars(report[section])))
    return written


def gpu_plots(report: dict[str, Any], stem: Path) -> list[Path]:
    """The same of a report of `benchmarks.cuda_run`: each item at each batch beside its peers."""
    written = []
    for section in ("convolutions", "networks"):
        batches = report.get(section, {}).items()
        rows = {f"{name}, batch {batch}": row for name, found in batches for batch, row in found.items()}
        if rows:
            written.append(_save(stem, section, _bars(rows)))
    return written


def _save(stem: Path, what: str, figure: Any) -> Path:
    path = stem.parent / f"{stem.name}-{what}.svg"
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return path


def _roofline(name: str, entry: dict[str, Any], limits: dict[str, Any]) -> Any:
    """GOPS of every step that multiplies over its operations to a byte, under the roof of its kind."""
    figure, axes = plt.subplots(figsize=(8, 5))
    bandwidth = max(limits["memory"]["L2"]["read_gbs"], limits["memory"]["L2"]["copy_gbs"])
    for bits, (kind, marker, color) in _KINDS.items():
        roof = limits["arithmetic"]["native"][kind]["gops"]
        ends = [0.1, roof / bandwidth, 1e5]
        axes.plot(ends, [min(roof, bandwidth * x) for x in ends], color=color, label=f"limit, {kind}")
        rows = [row for row in entry["steps"] if bits in row["macs"] and row["us"]]
        operations = [2 * row["macs"][bits] for row in rows]
        intensity = [
            n / (row["activation_bytes"] + row["weight_bytes"]) for n, row in zip(operations, rows, strict=True)
        ]
        rate = [1e-3 * n / row["us"] for n, row in zip(operations, rows, strict=True)]
        axes.plot(intensity, rate, marker, color=color, label=f"{kind} steps", markersize=5, alpha=0.7)
    axes.set(xscale="log", yscale="log", xlabel="operations to a byte", ylabel="10⁹ operations a second")
    axes.set_title(f"{name}: {entry['roofline']['share']:.0%} of its roofline")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend()
    return figure


def _bars(rows: dict[str, Any]) -> Any:
    """Median milliseconds of every contender, a panel to an item."""
    figure, panels = plt.subplots(1, len(rows), figsize=(4.2 * len(rows), 4), squeeze=False)
    for axes, (name, row) in zip(panels[0], rows.items(), strict=True):
        _bar_panel(axes, name, row["median_ms"])
    figure.tight_layout()
    return figure


def _bar_panel(axes: Axes, name: str, times: dict[str, float]) -> None:
    names = [contender for contender in times if contender != "LCE best"]
    colors = ["tab:blue" if contender.startswith("bnncc") else "tab:gray" for contender in names]
    bars = axes.barh(names, [times[contender] for contender in names], color=colors)
    axes.bar_label(bars, fmt="%.3g", padding=2, fontsize=8)
    axes.set(xlabel="ms", title=name)
    axes.invert_yaxis()
    axes.margins(x=0.2)  # room for the labels
