"""What the loader asks about this machine: its architecture and the features of its CPU."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from bnncc.runtime.errors import UnsupportedMachineError
from bnncc.runtime.manifest import Manifest, version_named

_ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
_CPUINFO = Path("/proc/cpuinfo")
#: What 32-bit ARM kernels list of processors of which 64-bit kernels list "asimd", to 32-bit processes, too.
_ARMV8 = frozenset({"neon", "vfpv4", "idiva"})


def host_architecture() -> str:
    """ "x86_64", "aarch64", "arm", or what the system calls anything else."""
    machine = platform.machine().lower()
    architecture = _ARCHITECTURES.get(machine, "arm" if machine.startswith("arm") else machine)
    # A 32-bit userland on a 64-bit kernel, common on Raspberry Pi OS: the kernel names the CPU, not the process.
    if architecture == "aarch64" and platform.architecture()[0] == "32bit":
        return "arm"
    return architecture


def host_features() -> frozenset[str] | None:
    """The words of /proc/cpuinfo's "flags" (x86) or "Features" (ARM); None where there is no such line."""
    try:
        lines = _CPUINFO.read_text(errors="replace").splitlines()
    except OSError:
        return None
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            words = frozenset(value.split())
            return words | _ARMV8 if "asimd" in words else words
    return None


def check_machine(manifest: Manifest, path: str | os.PathLike[str], version: str | None = None) -> None:
    """Raises UnsupportedMachineError unless that version of the artifact, or any, can run in this process.

    Which one will run the driver decides, who asks the processor itself, and about GPUs their own driver.
    InputError: there is no version of that name.
    """
    target, host = manifest["target"], host_architecture()
    if manifest["arch"] != host:
        emulated = all(version["device"] is None for version in manifest["versions"])
        raise UnsupportedMachineError(
            f"{path}: compiled for {manifest['arch']} (target {target}), this machine is {host}; compile for it"
            + (", or use --device qemu" if emulated else "")
        )
    features = host_features()
    versions = manifest["versions"] if version is None else [version_named(manifest, version)]
    missing = [[f for f in v["features"] if features is not None and f not in features] for v in versions]
    if all(missing):
        lacks = f"this CPU lacks {', '.join(missing[-1])}"
        if version is not None:
            raise UnsupportedMachineError(f"{path}: version {version} cannot run here: {lacks}")
        raise UnsupportedMachineError(
            f"{path}: compiled for target {target}, {lacks}; "
            "compile with -t native on this machine, or for an older target"
        )
