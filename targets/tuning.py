"""The tuning database: register tiles that were found better than those of the cost model, by target and kernel.

`bnncc compile --tune` fills it (`bnncc.targets.search`), every later compilation reads it: a `Tiles` of
`bnncc.targets.rules`, handed to the rules. A record holds the default that it was compared with; where the cost model
answers differently by now, or the tile is no longer legal, the default stands and the kernel counts as not searched.

The file is JSON: `$BNNCC_TUNING`, or `bnncc/tuning.json` under `$XDG_DATA_HOME` or `~/.local/share`. `BNNCC_TUNING=off`
does without. Sums are integers or go in the same order in every tile, so that no record changes a result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

from bnncc.runtime.container import write_whole
from bnncc.runtime.errors import BnnccError
from bnncc.targets.descriptor import AnyTarget

from .rules.candidates import is_legal
from .rules.tiles import Tile, TileRequest

_FORMAT = 1
_UNITS = ("seconds", "cycles")


@dataclass(frozen=True)
class Record:
    """The outcome of one kernel's search. before, after: what a call takes with `default` and with `best`.

    unit: "seconds" as measured, or "cycles" as llvm-mca estimates its inner loop.
    """

    default: Tile
    best: Tile
    before: float
    after: float
    unit: str


def database_path() -> Path | None:
    """Where the database lies; None where it is off."""
    named = os.environ.get("BNNCC_TUNING")
    if named == "off":
        return None
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "bnncc" / "tuning.json"


def target_key(target: AnyTarget) -> str:
    """The name of a target's records: `native` means another machine elsewhere, so the processor is part of it."""
    return f"{target.name} {target.cpu}"


def kernel_key(request: TileRequest) -> str:
    """What kernels must have in common to share a record."""
    s = request.shape
    image = f"{s.images}x{s.height}x{s.width}"
    channels = f"{s.outputs} channels in {s.groups}x{s.blocks}x{s.lanes}"
    return (
        f"{request.kind}: {image}, {channels}, {s.steps} steps, {s.weight_bytes} bytes, {request.accumulators} sums, "
        f"{request.most_pixels} pixels"
    )


@dataclass(frozen=True)
class RecordedTiles:
    """The records of one target, answering as `Tiles`."""

    records: Mapping[str, Record]

    def __call__(self, request: TileRequest) -> Tile:
        record = self.of(request)
        return record.best if record else request.default

    def of(self, request: TileRequest) -> Record | None:
        """The record of a kernel, if it is one of today's rules."""
        record = self.records.get(kernel_key(request))
        fits = record and record.default == request.default and is_legal(request, record.best)
        return record if fits else None

    @property
    def signature(self) -> tuple[tuple[str, str], ...]:
        """All by which code compiled with these records can differ from code compiled without."""
        return tuple(
            (key, f"{astuple(r.default)} → {astuple(r.best)}")
            for key, r in sorted(self.records.items())
            if r.best != r.default
        )


class Database:
    """The records of all targets. path: None where nothing is kept."""

    def __init__(self, path: Path | None, targets: dict[str, dict[str, Record]] | None = None) -> None:
        self.path = path
        self._targets = targets or {}

    @classmethod
    def read(cls, path: Path | None) -> Database:
        """The database in a file, empty if there is none. Raises BnnccError for a file that is no such database."""
        if path is None:
            return cls(None)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return cls(path)
        except OSError as error:
            raise BnnccError(f"the tuning database {path} cannot be read: {error.strerror}") from None
        except ValueError:
            raise _damaged(path) from None
        try:
            if data["format"] != _FORMAT:
                raise _damaged(path)
            targets = {
                str(target): {str(key): _record(row) for key, row in rows.items()}
                for target, rows in data["targets"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError):
            raise _damaged(path) from None
        return cls(path, targets)

    def tiles(self, target: AnyTarget) -> RecordedTiles:
        return RecordedTiles(dict(self._targets.get(target_key(target), {})))

    def signature(self, targets: Sequence[AnyTarget]) -> tuple[Any, ...]:
        """What the code for these targets owes to the records, for cache keys."""
        return tuple(self.tiles(target).signature for target in targets)

    def add(self, target: AnyTarget, request: TileRequest, record: Record) -> None:
        self._targets.setdefault(target_key(target), {})[kernel_key(request)] = record

    def write(self) -> None:
        """Raises BnnccError if the file cannot be written."""
        if self.path is None:
            raise BnnccError("tuning keeps its records in a file, and BNNCC_TUNING=off allows none; unset it")
        targets = {
            target: {key: _row(record) for key, record in sorted(records.items())}
            for target, records in sorted(self._targets.items())
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, (json.dumps({"format": _FORMAT, "targets": targets}, indent=1) + "\n").encode())
        except OSError as error:
            raise BnnccError(f"the tuning database {self.path} cannot be written: {error.strerror}") from None


def _damaged(path: Path) -> BnnccError:
    return BnnccError(
        f"{path} is no tuning database, or a damaged one; delete it, or name another with BNNCC_TUNING (off: none)"
    )


def _row(record: Record) -> dict[str, Any]:
    return {
        "default": astuple(record.default),
        "best": astuple(record.best),
        "before": record.before,
        "after": record.after,
        "unit": record.unit,
    }


def _record(row: dict[str, Any]) -> Record:
    if row["unit"] not in _UNITS:
        raise ValueError(row["unit"])
    before, after = float(row["before"]), float(row["after"])
    return Record(_tile(row["default"]), _tile(row["best"]), before, after, row["unit"])


def _tile(extents: list[Any]) -> Tile:
    rows, cols, vectors = extents
    if not all(type(e) is int and e > 0 for e in extents):
        raise ValueError(extents)
    return Tile(rows, cols, vectors)
