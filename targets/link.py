"""Links kernels, weights and the C driver into an artifact, for any target from any host, with the pip package ziglang.

Zig brings the C libraries of all targets. What it builds of them lands in its cache: the first artifact of an
architecture takes some seconds more, the first runner (a static executable, so all of musl) half a minute or more.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from bnncc import __version__, runtime
from bnncc.dialect.plan import Plan, Tensor
from bnncc.runtime.container import seal, write_whole
from bnncc.runtime.errors import LinkError
from bnncc.runtime.manifest import FORMAT, Manifest, tensor_bytes
from bnncc.targets.cuda.cubin import least_driver
from bnncc.targets.elf import Elf
from bnncc.targets.launch import DeviceCode
from bnncc.targets.modelc import MANIFEST_SECTION, Files, model_c, model_h, symbol_prefix, version_script

_DRIVER = ("driver.c", "cpu.c")
_ON_HOST = ("host.c", "pool.c")
_ON_GPU = ("gpu.c", "gpu_device.c", "gpu_graph.c")
_RUNNER = ("runner.c", "serve.c", "npy.c")
# No CPU is named: the driver runs on any of the architecture, so that it can say which feature is missing, and Zig
# builds its C library once for all CPUs.
_FLAGS = ("-std=gnu11", "-O2", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-fno-sanitize=undefined")

_LIBRARIES = ("-lm", "-lpthread", "-ldl")  # linked as far as they are used

# Bytes of a model up to which Zig may keep what it makes of them, and of the driver, which it then need not make again.
_MOST_KEPT = 1 << 20

# In bytes, of every tensor in the arena and of every constant: what kernels rely on.
_ALIGNMENT = 64

# What of TVM's runtime an object may refer to: the driver defines these.
_PROVIDED = {
    "TVMFFIErrorSetRaisedFromCStr",
    "TVMFFIErrorSetRaisedFromCStrParts",
    "__TVMBackendAllocWorkspace",
    "__TVMBackendFreeWorkspace",
    "__TVMBackendParallelLaunch",
}


_T = TypeVar("_T")


class LinkTarget(Protocol):
    """What linking reads of a target descriptor.

    features: words of /proc/cpuinfo. zig, zig_static: Zig's names of the systems of the library and of the runner.
    """

    @property
    def name(self) -> str: ...
    @property
    def arch(self) -> str: ...
    @property
    def cpu(self) -> str: ...
    @property
    def zig(self) -> str: ...
    @property
    def zig_static(self) -> str: ...
    @property
    def features(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class Version:
    """A model compiled for one target.

    objects: object files that together define `__tvm_ffi_<kernel>` for every step of the plan; of several versions that
    go into one artifact, no two may define the same.
    device: where the steps run on a GPU, its code; the target is then that of the machine around it, without objects.
    """

    plan: Plan
    target: LinkTarget
    objects: tuple[bytes, ...] = ()
    device: DeviceCode | None = None


def link(
    versions: Sequence[Version],
    out: Path,
    *,
    target: str | None = None,
    header: Path | None = None,
    runner: Path | None = None,
    manifest: Mapping[str, Any] | None = None,
    io_alignment: int = 64,
) -> None:
    """Writes the artifact, and on request its C header and its runner; each file appears whole or not at all.

    versions: of one model, for processors of one architecture; the most demanding first.
    target: what they are together; a single one's own name is the default.
    manifest: entries to stand in the manifest beside those of `bnncc.runtime.manifest.Manifest`.
    io_alignment: in bytes, what the kernels assume of inputs and outputs; callers' arrays so aligned are used in place.

    Raises:
        LinkError: ziglang is missing or fails, or the model's name cannot be used.
        ArtifactError: a file cannot be written.
        ValueError: a plan contradicts itself, its objects, or another plan (a bug of the compiler, not of its user).
    """
    for version in versions:
        _check_plan(version.plan)
        if version.device is None:
            _check_objects(version)
        else:
            _check_device(version, version.device)
    entries = build_manifest(versions, io_alignment, manifest or {}, target)
    plans, weights = share_weights([version.plan for version in versions])
    system = versions[0].target
    with tempfile.TemporaryDirectory(prefix="bnncc-link-") as name:
        folder = Path(name)
        sources = [*_write_sources(folder, versions, plans, weights, entries), *_driver_sources(_driver(versions))]
        image = _link_library(folder, sources, system.zig, out.name)
        executable = _link_runner(folder, sources, system, _on_gpu(versions)) if runner else None
    section = Elf(image).section(MANIFEST_SECTION)
    write_whole(out, seal(image, section.offset, section.size - 1), 0o777)  # without the terminating zero
    if header:
        write_whole(header, model_h(entries).encode())
    if runner and executable:
        write_whole(runner, executable, 0o777)


def build_manifest(
    versions: Sequence[Version], io_alignment: int, more: Mapping[str, Any], target: str | None = None
) -> Manifest:
    """The manifest; arguments as of `link`.

    `more` stands beside the entries made here. Raises ValueError where they collide, or where the versions are not of
    one model and one architecture.
    """
    plans, weights = share_weights([version.plan for version in versions])
    name = _common("names", [plan.name for plan in plans])
    entries = {
        "format": FORMAT,
        "bnncc": __version__,
        "name": name,
        "prefix": symbol_prefix(name),
        "target": target or versions[0].target.name,
        "arch": _common("architectures", [version.target.arch for version in versions]),
        "inputs": _common("inputs", [_ports(plan, plan.inputs) for plan in plans]),
        "outputs": _common("outputs", [_ports(plan, plan.outputs) for plan in plans]),
        "versions": [_version_entry(*pair) for pair in zip(versions, plans, strict=True)],
        "io_alignment": io_alignment,
        "weights_bytes": len(weights),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
    }
    if taken := sorted(set(entries) & set(more)):
        raise ValueError(f"the manifest has its own {', '.join(taken)}")
    # Through JSON, so that what callers see now is what they will read back: lists, not tuples.
    return cast(Manifest, json.loads(json.dumps({**entries, **more})))


def _version_entry(version: Version, plan: Plan) -> dict[str, Any]:
    """plan: the version's, its weights where they lie in the artifact."""
    target = version.target
    return {
        "name": target.name,
        "cpu": target.cpu,
        "features": sorted(target.features),
        "layers": [dataclasses.asdict(layer) for layer in plan.layers],
        "tensors": [dataclasses.asdict(tensor) for tensor in plan.tensors],
        "init": [dataclasses.asdict(step) for step in plan.init],
        "steps": [dataclasses.asdict(step) for step in plan.steps],
        "inputs": plan.inputs,
        "outputs": plan.outputs,
        "arena_bytes": plan.arena_bytes,
        "persistent_bytes": plan.persistent_bytes,
        "weights_bytes": len(version.plan.weights),
        "device": None if version.device is None else _device_entry(version.device),
    }


def _device_entry(device: DeviceCode) -> dict[str, Any]:
    return {
        "kind": "cuda",
        "sm": device.sm,
        "driver": least_driver(device.ptx),
        "image_bytes": len(device.image),
        "ptx_bytes": len(device.ptx),
        "kernels": {name: dataclasses.asdict(resources) for name, resources in sorted(device.resources.items())},
        "launches": [[dataclasses.asdict(launch) for launch in step] for step in device.launches],
    }


def _ports(plan: Plan, ids: Sequence[int]) -> list[dict[str, Any]]:
    return [
        {"name": t.name, "shape": t.shape, "dtype": t.dtype, "order": t.value.order if t.value else None}
        for t in (plan.tensors[i] for i in ids)
    ]


def _common(what: str, values: Sequence[_T]) -> _T:
    if any(value != values[0] for value in values):
        raise ValueError(f"versions of one model have different {what}: {values}")
    return values[0]


def share_weights(plans: Sequence[Plan]) -> tuple[list[Plan], bytes]:
    """The plans with the weights of all of them in one piece of memory, and that; equal constants lie there once."""
    memory = bytearray()
    places: dict[bytes, int] = {}

    def move(plan: Plan, tensor: Tensor) -> Tensor:
        if tensor.space != "weights":
            return tensor
        content = plan.weights[tensor.offset : tensor.offset + tensor_bytes(tensor.shape, tensor.dtype)]
        if content not in places:
            places[content] = len(memory)
            memory.extend(content + bytes(-len(content) % _ALIGNMENT))
        return dataclasses.replace(tensor, offset=places[content])

    moved = [dataclasses.replace(plan, tensors=tuple(move(plan, tensor) for tensor in plan.tensors)) for plan in plans]
    weights = bytes(memory)
    return [dataclasses.replace(plan, weights=weights) for plan in moved], weights


def _check_plan(plan: Plan) -> None:
    spaces = {"arena": plan.arena_bytes, "persistent": plan.persistent_bytes, "weights": len(plan.weights)}
    for position, tensor in enumerate(plan.tensors):
        size = tensor_bytes(tensor.shape, tensor.dtype)
        if tensor.id != position:
            raise ValueError(f"tensor {tensor.id} ({tensor.name}) stands at position {position}")
        if tensor.space in spaces and (tensor.offset % _ALIGNMENT or tensor.offset + size > spaces[tensor.space]):
            raise ValueError(f"tensor {tensor.id} ({tensor.name}) does not lie in its space {tensor.space}")
    for role, ids in (("input", plan.inputs), ("output", plan.outputs)):
        if len(set(ids)) != len(ids):
            raise ValueError(f"an {role} is listed twice")
        for index, i in enumerate(ids):
            if plan.tensors[i].space != role:
                raise ValueError(f"tensor {i} ({plan.tensors[i].name}) is an {role} in space {plan.tensors[i].space}")
            if plan.tensors[i].offset != index:
                raise ValueError(f"tensor {i} ({plan.tensors[i].name}) is {role} {index} at {plan.tensors[i].offset}")
    for step in (*plan.init, *plan.steps):
        if not 0 < step.outputs <= len(step.args) or not all(0 <= i < len(plan.tensors) for i in step.args):
            raise ValueError(f"step {step.kernel}: its arguments are not tensors of the plan")
        for i in step.args[-step.outputs :]:
            if plan.tensors[i].space in ("input", "weights"):
                raise ValueError(f"step {step.kernel} writes tensor {i} in space {plan.tensors[i].space}")
    # By place, because a tensor that an output only reshapes is the same memory under another number.
    written = [plan.tensors[i] for step in plan.steps for i in step.args[-step.outputs :]]
    places = {tensor.offset for tensor in written if tensor.space == "output"}
    if unwritten := [i for i in plan.outputs if plan.tensors[i].offset not in places]:
        raise ValueError(f"no step writes output {unwritten}")


def _check_objects(version: Version) -> None:
    plan, arch = version.plan, version.target.arch
    defined: set[str] = set()
    for elf in map(Elf, version.objects):
        if elf.architecture != arch:
            raise ValueError(f"an object file is for {elf.architecture}, the target is {arch}")
        defined |= {symbol.name for symbol in elf.symbols if symbol.defined}
        for symbol in elf.symbols:
            if symbol.name.startswith(("TVM", "__TVM")) and symbol.name not in _PROVIDED:
                raise ValueError(f"a kernel calls {symbol.name}, which only TVM's runtime has")
    for step in (*plan.init, *plan.steps):
        if f"__tvm_ffi_{step.kernel}" not in defined:
            raise ValueError(f"no object file defines kernel {step.kernel}")


def _check_device(version: Version, device: DeviceCode) -> None:
    plan = version.plan
    if version.objects:
        raise ValueError(f"version {version.target.name} has object files, and its steps run on a GPU")
    if len(device.launches) != len(plan.init) + len(plan.steps):
        raise ValueError(f"launches of {len(device.launches)} steps for {len(plan.init) + len(plan.steps)}")
    for step, launches in zip((*plan.init, *plan.steps), device.launches, strict=True):
        for launch in launches:
            where = f"step {step.kernel}: kernel {launch.function}"
            if launch.function not in device.resources:
                raise ValueError(f"{where} is not among the kernels of the module")
            if not 0 < math.prod(launch.block) <= device.resources[launch.function].most_threads:
                raise ValueError(f"{where} cannot have blocks of {launch.block}")
            if not all(0 <= i < len(plan.tensors) for i in launch.args):
                raise ValueError(f"{where} takes tensors that the plan does not have")
        if missing := set(step.args[-step.outputs :]) - {i for launch in launches for i in launch.args}:
            raise ValueError(f"step {step.kernel}: no kernel takes its output {sorted(missing)}")


def _on_gpu(versions: Sequence[Version]) -> bool:
    return any(version.device for version in versions)


def _driver(versions: Sequence[Version]) -> tuple[str, ...]:
    """The driver's files that these versions need."""
    on_host = not all(version.device for version in versions)
    return _DRIVER + (_ON_HOST if on_host else ()) + (_ON_GPU if _on_gpu(versions) else ())


def _write_sources(
    folder: Path, versions: Sequence[Version], plans: Sequence[Plan], weights: bytes, manifest: Manifest
) -> list[str]:
    """Puts what is particular to this model into the folder; returns the files to compile or link."""

    def included(kind: str, content: bytes) -> Path:
        path = folder / f"{kind}-{hashlib.sha256(content).hexdigest()}"
        path.write_bytes(content)
        return path

    def code(device: DeviceCode | None) -> tuple[Path, Path] | None:
        return None if device is None else (included("image", device.image), included("ptx", device.ptx))

    devices = [version.device for version in versions]
    files = Files(
        weights=included("weights", weights),
        manifest=included("manifest", json.dumps(manifest, separators=(",", ":")).encode()),
        codes=[code(device) for device in devices],
    )
    (folder / "model.h").write_text(model_h(manifest))
    (folder / "model.c").write_text(model_c(plans, devices, manifest, files))
    (folder / "exports.map").write_text(version_script(manifest["prefix"]))
    objects = [code for version in versions for code in version.objects]
    names = [f"kernels{i}.o" for i in range(len(objects))]
    for name, data in zip(names, objects, strict=True):
        (folder / name).write_bytes(data)
    return ["model.c", *names]


def _link_library(folder: Path, sources: Sequence[str], system: str, soname: str) -> bytes:
    return _zig(
        folder,
        system,
        ["-shared", "-fPIC", *sources],
        # -Wl would split a file name that has a comma.
        [
            "-Wl,--version-script=exports.map",
            "-Xlinker",
            "-soname",
            "-Xlinker",
            soname,
            "-Wl,--strip-debug",
            *_LIBRARIES,
        ],
    )


def _link_runner(folder: Path, sources: Sequence[str], system: LinkTarget, on_gpu: bool) -> bytes:
    """A static executable; where it opens the GPU's driver, which a static one cannot, one that needs glibc."""
    return _zig(
        folder,
        system.zig if on_gpu else system.zig_static,
        [*([] if on_gpu else ["-static"]), *sources, *_driver_sources(_RUNNER)],
        ["-Wl,--strip-debug", *_LIBRARIES],
    )


def _driver_sources(names: Sequence[str]) -> list[str]:
    return [str(_driver_folder() / name) for name in names]


def _driver_folder() -> Path:
    return Path(next(iter(runtime.__path__))) / "c"


def _zig(folder: Path, system: str, arguments: Sequence[str], options: Sequence[str]) -> bytes:
    """Runs `zig cc` in the folder and returns what it linked."""
    if importlib.util.find_spec("ziglang") is None:
        raise LinkError("linking needs the package ziglang, which is not installed: pip install 'bnncc[compile]'")
    linked = folder / f"linked-{system}"
    command = [sys.executable, "-m", "ziglang", "cc", "-target", system, *_FLAGS]
    command += ["-I", str(_driver_folder()), "-I", ".", *arguments, *options, "-o", linked.name]
    result = subprocess.run(command, cwd=folder, env=_environment(folder), capture_output=True, text=True)
    if result.returncode or not linked.is_file():
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        reason = next((line for line in lines if "error" in line), lines[-1] if lines else "no message")
        raise LinkError(f"zig cc failed for {system}: {reason.strip()}")
    return linked.read_bytes()


def _environment(folder: Path) -> dict[str, str]:
    """Zig's environment: its cache where Zig itself would put it, or in the temporary folder where that is closed.

    Zig keeps all that it ever made of a file; what it makes of a large model goes with the model's folder instead.
    """
    environment = dict(os.environ)
    if sum(path.stat().st_size for path in folder.iterdir()) > _MOST_KEPT:
        environment["ZIG_LOCAL_CACHE_DIR"] = str(folder / "zig")
    if "ZIG_GLOBAL_CACHE_DIR" not in environment:
        home = os.path.expanduser("~")
        wanted = Path(environment.get("XDG_CACHE_HOME") or Path(home) / ".cache") / "zig"
        existing = next((p for p in (wanted, *wanted.parents) if p.exists()), None)
        if existing is None or not wanted.is_absolute() or not os.access(existing, os.W_OK | os.X_OK):
            wanted = Path(tempfile.gettempdir()) / f"bnncc-zig-{os.getuid()}"
        environment["ZIG_GLOBAL_CACHE_DIR"] = str(wanted)
    return environment
