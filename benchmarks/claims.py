"""What the suite's figures are held against: one claim to a demand, with the figure that was measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

#: TOPS that were asked for where the limit by VPOPCNTDQ measures 5.7; in proportion elsewhere.
_OF_THAT_LIMIT = {"x86-64-v3": 1.1 / 5.7, "x86-64-v2": 0.55 / 5.7}
#: The same in proportion to the instructions' own limit, which on that machine is 147 and 74 multiply-accumulates a
#: cycle at 4.3 GHz: the harder demand where VPOPCNTDQ is slower than there.
_OF_OWN_LIMIT = {"x86-64-v3": 1.1 / 1.264, "x86-64-v2": 0.55 / 0.636}

_FLOAT_SHARE, _WIDE = 0.9, ("3×3, ", "3×3 /2, ", "1×1, ")  # convolutions of 16 input channels and more, not grouped
_COMPILE_SECONDS = {"QuickNet": 30.0, "ResnetE18": 30.0, "MeliusNet22": 60.0}
_NETWORKS_DEMANDED = ("QuickNet", "ResnetE18", "BinaryDenseNet28", "MeliusNet22")


@dataclass(frozen=True)
class Claim:
    """A demand on one item. at_least: or at most."""

    item: str
    what: str
    measured: float
    demanded: float
    at_least: bool = True

    @property
    def holds(self) -> bool:
        return self.measured >= self.demanded if self.at_least else self.measured <= self.demanded

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def claims(report: dict[str, Any]) -> list[Claim]:
    """Every claim about which the report has a figure."""
    found = [*_kernels(report), *_convolutions(report.get("convolutions", {})), *_layers(report.get("layers", {}))]
    for name, entry in report.get("networks", {}).items():
        found += _network(name, entry)
    return found


def _kernels(report: dict[str, Any]) -> Iterator[Claim]:
    kernels, arithmetic = report.get("kernels", {}), report["limits"]["arithmetic"]
    for name, by_isa in kernels.items():
        if "native" in by_isa:
            demanded = 0.9 if name.startswith("3×3") else 0.7
            yield Claim(name, "kernel, share of the limit", by_isa["native"]["share_of_limit"], demanded)
    counted = arithmetic.get("native", {}).get("binary", {})
    for isa in _OF_THAT_LIMIT:
        rows = [by_isa[isa] for name, by_isa in kernels.items() if name.startswith("3×3") and isa in by_isa]
        if not rows:
            continue
        slowest = min(rows, key=lambda row: row["gops"])
        if counted.get("mix") == "binary_counted":
            demanded = round(_OF_THAT_LIMIT[isa] * counted["gops"], 1)
            yield Claim(f"build for {isa}", "slowest 3×3 kernel, GOPS", slowest["gops"], demanded)
        own = round(_OF_OWN_LIMIT[isa], 3)
        yield Claim(f"build for {isa}", "slowest 3×3 kernel, share of its limit", slowest["share_of_limit"], own)


def _convolutions(rows: dict[str, Any]) -> Iterator[Claim]:
    for name, row in rows.items():
        demands = {"ORT int8": 3.5 if name == "56²×64" else 4.2, "ORT fp32": 12.0, "LCE best": 15.0}
        for peer, demanded in demands.items():
            if peer in row["times_faster"]:
                yield Claim(f"3×3, {name}", f"artifact, times as fast as {peer}", row["times_faster"][peer], demanded)


def _layers(rows: dict[str, Any]) -> Iterator[Claim]:
    for name, row in rows.items():
        if name.startswith(_WIDE) and "groups" not in name:
            yield Claim(name, "kernel, share of the FMA limit", row["share_of_bound"], _FLOAT_SHARE)
        yield Claim(name, "layer, times as fast as ORT fp32", row["times_faster"]["ORT fp32"], 1.0)


def _network(name: str, entry: dict[str, Any]) -> Iterator[Claim]:
    if name in _NETWORKS_DEMANDED:
        for peer in ("LCE best", "ORT fp32"):
            if peer in entry["times_faster"]:
                yield Claim(name, f"times as fast as {peer}", entry["times_faster"][peer], 6.0)
        yield Claim(name, "share of the roofline", entry["roofline"]["share"], 0.7)
        yield Claim(name, "two threads, times as fast as one", entry["threads"]["ratio"], 1.8)
    memory = entry["memory"]
    yield Claim(
        name, "arena / most alive at once", round(memory["arena_bytes"] / memory["alive_bytes"], 3), 1.05, False
    )
    beside = memory["artifact_bytes"] - memory["weights_bytes"]
    yield Claim(name, "artifact beside its weights, KB", round(1e-3 * beside, 1), 400.0, False)
    more = memory["resident_bytes"] - memory["artifact_bytes"] - memory["arena_bytes"]
    yield Claim(name, "resident beside artifact and arena, MB", round(1e-6 * more, 2), 10.0, False)
    compiling = entry["compile"]
    if name in _COMPILE_SECONDS:
        demanded = _COMPILE_SECONDS[name]
        yield Claim(name, "compiled in, s", compiling["seconds"], demanded, False)
        yield Claim(name, "compiled again, s", compiling["second_seconds"], demanded / 4, False)
    yield Claim(name, "compiled within, MB", compiling["peak_mb"], 3000.0, False)


def table(found: list[dict[str, Any]]) -> Table:
    """Claims as they stand in the JSON, those that do not hold in red."""
    result = Table("", "claim", "measured", "demanded", "", title="what was demanded")
    result.columns[2].justify = result.columns[3].justify = "right"
    for claim in found:
        verdict, style = ("holds", "") if claim["holds"] else ("FAILS", "red")
        sign = "≥" if claim["at_least"] else "≤"
        demanded = f"{sign} {claim['demanded']:g}"
        result.add_row(claim["item"], claim["what"], f"{claim['measured']:g}", demanded, verdict, style=style)
    return result
