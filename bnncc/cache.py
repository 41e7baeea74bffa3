"""The compile cache: versions of artifacts, kept on disk under a digest of everything they were made from.

A key covers the imported module with its constants, the target, the options, the sources of bnncc, the versions of the
packages that take part and the compiler of CUDA, so that an entry never has to be found out of date: what differs has
another key.

The folder is `$BNNCC_CACHE`, or `bnncc` under `$XDG_CACHE_HOME` or `~/.cache`; `BNNCC_CACHE=off` does without. The
entries used longest ago go when all together take more than `MOST_BYTES`. A folder that cannot be written and an entry
that cannot be read only cost their time.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import platform
import sys
import zipfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from pathlib import Path
from typing import Any

import bnncc
from bnncc import runtime
from bnncc.dialect.plan import Layer, Plan, Step, Tensor, Value
from bnncc.runtime.container import write_whole
from bnncc.runtime.errors import BnnccError
from bnncc.targets.cuda import toolchain
from bnncc.targets.cuda.descriptor import CudaSpec
from bnncc.targets.descriptor import AnyTarget
from bnncc.targets.launch import DeviceCode, Launch, Resources
from bnncc.targets.link import Version

MOST_BYTES = 2 << 30
_PACKAGES = ("apache-tvm", "apache-tvm-ffi", "torch", "numpy", "onnx")


def folder() -> Path | None:
    """Where entries lie; None where the cache is off."""
    named = os.environ.get("BNNCC_CACHE")
    if named == "off":
        return None
    if named:
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "bnncc"


def file_digest(path: Path) -> bytes:
    """Of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def module_digest(mod: Any) -> bytes:
    """Of a Relax module: its text, every constant in the order it is read, and TVM's hash of its structure."""
    import tvm_ffi
    from tvm import relax
    from tvm.ir import GenericConst

    digest = hashlib.sha256(mod.script(show_meta=False).encode())
    digest.update(str(tvm_ffi.structural_hash(mod)).encode())

    def visit(expr: Any) -> None:
        if isinstance(expr, GenericConst):
            array = expr.value.numpy()
            digest.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())

    for _, func in mod.functions_items():
        if isinstance(func, relax.Function):
            relax.analysis.post_order_visit(func, visit)
    return digest.digest()


@dataclasses.dataclass(frozen=True)
class Entry:
    """The versions of one artifact in the cache, each in a file of its own, named by its key."""

    keys: tuple[str, ...]
    targets: tuple[AnyTarget, ...]

    @classmethod
    def of(cls, model: bytes, targets: Sequence[AnyTarget], *settings: Any) -> Entry:
        """model: a digest of it. settings: what else decides the result, values whose `repr` says all about them.

        Raises BnnccError where nothing here compiles for a target that is a GPU.
        """
        tools = [toolchain.compiler(spec.sm).identity if isinstance(spec, CudaSpec) else "" for spec in targets]
        keys = (_key(model, spec, len(targets), *settings, tool) for spec, tool in zip(targets, tools, strict=True))
        return cls(tuple(keys), tuple(targets))

    def load(self) -> tuple[Version, ...] | None:
        """All versions, or None if one is missing or cannot be read."""
        versions = [_load(key, target) for key, target in zip(self.keys, self.targets, strict=True)]
        return tuple(v for v in versions if v) if all(versions) else None

    def store(self, versions: Sequence[Version]) -> None:
        for key, made in zip(self.keys, versions, strict=True):
            _store(key, made)


def _load(key: str, target: AnyTarget) -> Version | None:
    place = folder()
    path = place / f"{key}.zip" if place else None
    if path is None or not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as entry:
            plan = _plan(json.loads(entry.read("plan.json")), entry.read("weights"))
            objects = tuple(entry.read(name) for name in sorted(entry.namelist()) if name.startswith("object"))
            device = None
            if "device.json" in entry.namelist():
                device = _device(json.loads(entry.read("device.json")), entry.read("image"), entry.read("ptx"))
        os.utime(path)  # the eviction goes by it
    except (OSError, zipfile.BadZipFile, KeyError, TypeError, ValueError):
        return None
    return Version(plan, target, objects, device)


def _store(key: str, made: Version) -> None:
    place = folder()
    if place is None:
        return
    fields = dataclasses.asdict(made.plan)
    weights = fields.pop("weights")
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as entry:
        entry.writestr("plan.json", json.dumps(fields))
        entry.writestr("weights", weights)
        for index, code in enumerate(made.objects):
            entry.writestr(f"object{index:03}", code)
        if made.device is not None:
            device = dataclasses.asdict(made.device)
            entry.writestr("image", device.pop("image"))
            entry.writestr("ptx", device.pop("ptx"))
            entry.writestr("device.json", json.dumps(device))
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_whole(place / f"{key}.zip", buffer.getvalue())
        _evict(place)
    except (OSError, BnnccError):
        return


def _evict(place: Path) -> None:
    entries = []
    for path in place.glob("*.zip"):
        try:
            entries.append((path.stat().st_mtime, path.stat().st_size, path))
        except OSError:
            continue  # another process removed it
    total = sum(size for _, size, _ in entries)
    for _, size, path in sorted(entries):
        if total <= MOST_BYTES:
            return
        path.unlink(missing_ok=True)
        total -= size


def _plan(fields: dict[str, Any], weights: bytes) -> Plan:
    tensors = [Tensor(**{**t, "shape": tuple(t["shape"]), "value": _value(t["value"])}) for t in fields.pop("tensors")]
    init, steps = (_steps(fields.pop(part)) for part in ("init", "steps"))
    layers = tuple(Layer(**{**row, "output_shape": tuple(row["output_shape"])}) for row in fields.pop("layers"))
    inputs, outputs = (tuple(fields.pop(part)) for part in ("inputs", "outputs"))
    return Plan(
        **fields, inputs=inputs, outputs=outputs, tensors=tuple(tensors), init=init, steps=steps, layers=layers,
        weights=weights,
    )  # fmt: skip


def _device(fields: dict[str, Any], image: bytes, ptx: bytes) -> DeviceCode:
    launches = tuple(tuple(_launch(row) for row in step) for step in fields.pop("launches"))
    resources = {name: Resources(**row) for name, row in fields.pop("resources").items()}
    return DeviceCode(**fields, image=image, ptx=ptx, launches=launches, resources=resources)


def _launch(row: dict[str, Any]) -> Launch:
    return Launch(**{**row, **{name: tuple(row[name]) for name in ("grid", "block", "args")}})


def _value(fields: dict[str, Any] | None) -> Value | None:
    if fields is None:
        return None
    return Value(**{**fields, "order": None if fields["order"] is None else tuple(fields["order"])})


def _steps(rows: Sequence[dict[str, Any]]) -> tuple[Step, ...]:
    return tuple(Step(**{**row, "args": tuple(row["args"]), "layers": tuple(row["layers"])}) for row in rows)


def _key(model: bytes, *settings: Any) -> str:
    return hashlib.sha256(model + repr(settings).encode() + _compiler().encode()).hexdigest()


@functools.cache
def _compiler() -> str:
    """What this installation compiles with: its own sources, and the packages' versions."""
    digest = hashlib.sha256()
    for path in _sources():
        digest.update(path.name.encode() + path.read_bytes())
    return json.dumps([digest.hexdigest(), platform.machine(), sys.version, *map(_version, _PACKAGES)])


def _sources() -> Iterator[Path]:
    # In a checkout, the sub-packages stand beside this one.
    roots = {Path(folder) for folder in bnncc.__path__} | {Path(runtime.__file__).parent.parent}
    named = ("bnncc", "passes", "targets", "runtime", "dialect", "frontends")
    for root in sorted(roots):
        for part in (root, *(root / name for name in named)):
            yield from sorted(part.glob("*.py") if part == root else part.rglob("*.py"))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
