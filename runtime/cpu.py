"""What the loader asks about this machine: its architecture and the features of its CPU."""

from __future__ import annotations

import os
import platform
from pathlib import Path

from bnncc.runtime.errors import UnsupportedMachineError
from bnncc.runtime.manifest import Manifest

_ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}
_CPUINFO = Path("/proc/cpuinfo")


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
            return frozenset(value.split())
    return None


def check_machine(manifest: Manifest, path: str | os.PathLike[str]) -> None:
    """Raises UnsupportedMachineError unless code of the artifact can run in this process."""
    target, host = manifest["target"], host_architecture()
    if target["arch"] != host:
        raise UnsupportedMachineError(
            f"{path}: compiled for {target['arch']} (target {target['name']}), this machine is {host}; "
            "compile for it, or use --device qemu"
        )
    features = host_features()
    missing = [] if features is None else [f for f in target["features"] if f not in features]
    if missing:
        raise UnsupportedMachineError(
            f"{path}: compiled for target {target['name']}, this CPU lacks {', '.join(missing)}; "
            "compile with -t native on this machine, or for an older target"
        )
