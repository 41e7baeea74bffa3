"""What the figures of a GPU are held against, and the tables of a report; texts, since rich may not be there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

_PEER = "torch fp16"
_NETWORK, _BATCH = "ResnetE18", "256"
#: Of the limit by the fastest instruction that multiplies bits: the shapes whose tiles fill one.
_SHARE, _SHARED = 0.6, ("28²×128", "14²×256", "7²×512")
_SHAPES = ("56²×64", *_SHARED)
_CONVOLUTION_FASTER, _NETWORK_FASTER, _LATENCY_FASTER = 3.0, 2.0, 2.0


@dataclass(frozen=True)
class Claim:
    """A demand on one item: at least `demanded`. measured: None where the report has no figure; `why` says why."""

    item: str
    what: str
    demanded: float
    measured: float | None
    why: str = ""

    @property
    def verdict(self) -> str:
        if self.measured is None:
            return "not measured"
        return "holds" if self.measured >= self.demanded else "FAILS"

    @property
    def ratio(self) -> float | None:
        """Measured to demanded."""
        return None if self.measured is None else self.measured / self.demanded

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": self.verdict, "ratio": self.ratio}


def claims(report: dict[str, Any]) -> list[Claim]:
    """Every demand, measured or not. They are meant for an H200; elsewhere they say how that GPU would do."""
    return list(_claims(report))


def _claims(report: dict[str, Any]) -> Iterator[Claim]:
    for shape in _SHAPES:
        item = f"3×3, {shape}, batch {_BATCH}"
        row = report.get("convolutions", {}).get(shape, {}).get(_BATCH)
        if shape in _SHARED:
            share = (row or {}).get("share_of_limit")
            yield Claim(item, "share of the measured limit", _SHARE, share, "" if share else _why(row, "limit"))
        yield _faster(item, "times as fast as", _CONVOLUTION_FASTER, row, row)
    network = report.get("networks", {}).get(_NETWORK, {})
    whole, one = network.get(_BATCH), network.get("1")
    yield _faster(f"{_NETWORK}, batch {_BATCH}", "times as fast as", _NETWORK_FASTER, whole, whole)
    latency = (one or {}).get("latency")
    yield _faster(f"{_NETWORK}, batch 1", "latency, times as fast as", _LATENCY_FASTER, one, latency)


def _faster(item: str, what: str, demanded: float, row: Any, times: Any) -> Claim:
    measured = (times or {}).get("times_faster", {}).get(_PEER)
    why = "" if measured is not None else _why(row, _PEER)
    return Claim(item, f"{what} {_PEER} with CUDA graphs", demanded, measured, why)


def _why(row: Any, what: str) -> str:
    if row is None:
        return "the item was not run"
    return str(row.get("missing", {}).get(what, f"the {what} was not measured"))


# -- tables ----------------------------------------------------------------------------------------------------------


def claims_table(found: Sequence[Claim]) -> str:
    rows = [
        (
            claim.item, claim.what, "" if claim.measured is None else f"{claim.measured:.3g}", f"≥ {claim.demanded:g}",
            "" if claim.ratio is None else f"{claim.ratio:.2f}", ": ".join(filter(None, (claim.verdict, claim.why))),
        )
        for claim in found
    ]  # fmt: skip
    return table("what was demanded", ("item", "claim", "measured", "demanded", "ratio", ""), rows)


def limits_table(measured: dict[str, dict[str, float]]) -> str:
    rows = [
        (name, f"{row['tops']:.1f} TOPS" if "tops" in row else f"{row['gbs']:.0f} GB/s")
        for name, row in measured.items()
    ]
    return table("what the GPU does at best", ("instruction or memory", "rate"), rows)


def convolutions_table(rows: dict[str, dict[str, Any]]) -> str:
    cells = [
        (
            shape, batch, f"{1e3 * row['median_ms']['bnncc']:.2f}", f"{row['tops']:.1f}",
            f"{row['share_of_limit']:.0%}" if "share_of_limit" in row else "",
            *_peers(row, ("torch fp16", "torch fp32")),
        )
        for shape, by_batch in rows.items() for batch, row in by_batch.items()
    ]  # fmt: skip
    heads = ("binary 3×3", "batch", "µs", "TOPS", "of the limit", "torch fp16 µs", "torch fp32 µs")
    return table("convolutions between binary layers, and torch's of the same shape", heads, cells)


def networks_table(rows: dict[str, dict[str, Any]]) -> str:
    kinds = ("torch fp16", "torch fp32", "torch.compile fp16", "torch.compile fp32")
    cells = []
    for name, by_batch in rows.items():
        for batch, row in by_batch.items():
            parts = {"on the GPU": row, "host to host": row["host_to_host"], "latency": row.get("latency")}
            for what, times in parts.items():
                if times:
                    ours = f"{1e3 * times['median_ms']['bnncc']:.1f}"
                    cells.append((name, batch, what, ours, *_peers(times, kinds)))
    heads = ("network", "batch", "", "bnncc µs", *(f"{kind} µs" for kind in kinds))
    return table("networks, and torch's float twins in CUDA graphs", heads, cells)


def _peers(row: dict[str, Any], kinds: Sequence[str]) -> Iterator[str]:
    for kind in kinds:
        took = row["median_ms"].get(kind)
        yield "" if took is None else f"{1e3 * took:.1f} ({row['times_faster'][kind]:.2f}×)"


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns in plain text, as wide as they need to be."""
    lines = [tuple(heads), *map(tuple, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    rule = "-" * max(len(line) for line in text)
    return "\n".join([title, rule, text[0], rule, *text[1:], ""])
