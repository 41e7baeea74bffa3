"""The report's sections as tables."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich.table import Table

Rows = dict[str, dict[str, Any]]


def kernels(rows: Rows) -> list[Table]:
    isas = list(dict.fromkeys(isa for by_isa in rows.values() for isa in by_isa))
    table = _table("binary convolution, the kernel", *isas, title="GOPS, and share of the instructions' limit")
    for name, by_isa in rows.items():
        cells = (f"{row['gops']:.0f}  {row['share_of_limit']:4.0%}" for row in by_isa.values())
        table.add_row(name, *cells)
    return [table]


def layers(rows: Rows) -> list[Table]:
    heads = ("ms", "NHWC ms", "ORT fp32", "torch fp32", "kernel µs", "GFLOPS", "GB/s", "of its bound", "by")
    table = _table("float layer", *heads, title="one-layer models called from Python, and their kernels")
    for name, row in rows.items():
        against = (f"{row['times_faster'][peer]:.2f}×" for peer in ("ORT fp32", "torch fp32"))
        flops = f"{row['gflops']:.0f}" if "gflops" in row else ""
        kernel, share = f"{row['kernel_us']:.1f}", f"{row['share_of_bound']:.0%}"
        ms = row["median_ms"]
        times = f"{ms['bnncc']:.3f}", f"{ms['bnncc, NHWC']:.3f}" if "bnncc, NHWC" in ms else ""
        table.add_row(name, *times, *against, kernel, flops, f"{row['gb_per_s']:.0f}", share, row["bound_by"])
    return [table]


def convolutions(rows: Rows) -> list[Table]:
    return [_against_peers("one binary 3×3", rows, "of the limit", lambda row: f"{row['share_of_limit']:.0%}")]


def networks(rows: Rows) -> list[Table]:
    times = _against_peers("network", rows, "of its roofline", lambda row: f"{row['roofline']['share']:.0%}")
    heads = ("2 threads", "arena MB", "weights MB", "artifact MB", "resident MB", "compiled in s", "again", "within MB")
    costs = _table("network", *heads, title="what else it takes")
    for name, row in rows.items():
        memory = (row["memory"][f"{what}_bytes"] for what in ("arena", "weights", "artifact", "resident"))
        compiling = (row["compile"][what] for what in ("seconds", "second_seconds", "peak_mb"))
        cells = (*(f"{1e-6 * size:.2f}" for size in memory), *(f"{figure:.1f}" for figure in compiling))
        costs.add_row(name, f"{row['threads']['ratio']:.2f}×", *cells)
    return [times, costs]


def _against_peers(what: str, rows: Rows, last: str, share: Callable[[dict[str, Any]], str]) -> Table:
    rivals = list(dict.fromkeys(peer for row in rows.values() for peer in row["times_faster"]))
    rivals = [peer for peer in rivals if not peer.startswith("LCE") or peer == "LCE best"]
    title = "median ms of one image, and how many times as long as bnncc"
    options = list(
        dict.fromkeys(name for row in rows.values() for name in row["median_ms"] if name.startswith("bnncc,"))
    )
    table = _table(what, "bnncc", *options, *rivals, last, title=title)
    for name, row in rows.items():
        ms, ratios = row["median_ms"], row["times_faster"]
        cells = (f"{ms[peer]:.3g}  {ratios[peer]:.1f}×" if peer in ratios else "" for peer in rivals)
        ours = (f"{ms[option]:.3f}" if option in ms else "" for option in ("bnncc", *options))
        table.add_row(name, *ours, *cells, share(row))
    return table


def _table(first: str, *others: str, title: str) -> Table:
    table = Table(first, *others, title=title)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


#: Section of the report → its tables.
SECTIONS: dict[str, Callable[[Rows], list[Table]]] = {
    "kernels": kernels, "layers": layers, "convolutions": convolutions, "networks": networks,
}  # fmt: skip
