"""What a figure was measured on and with."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

_PACKAGES = ("bnncc", "apache-tvm", "torch", "onnxruntime", "bitorch", "ziglang", "numpy")
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_vpopcntdq", "asimd", "asimddp")


def terminal() -> Console:
    """Where results are printed: the terminal's width, or one that holds every table."""
    return Console(highlight=False) if Console().is_terminal else Console(highlight=False, width=150)


def machine() -> dict[str, Any]:
    """Processor, the vector extensions that matter here, cores this process may use, system."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""

    def field(name: str) -> str:
        found = re.search(rf"^{name}\s*:\s*(.+)$", text, re.MULTILINE)
        return found.group(1).strip() if found else ""

    flags = set((field("flags") or field("Features")).split())
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": field("model name") or platform.processor() or platform.machine(),
        "family_model_stepping": [field("cpu family"), field("model"), field("stepping")],
        "extensions": [flag for flag in _FLAGS if flag in flags],
        "cores": cores,
        "load_average": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that take part."""
    return {"python": platform.python_version(), **{name: version(name) for name in _PACKAGES}}


def caches() -> dict[str, int]:
    """Level ("L1", "L2", …) → bytes of the data caches that core 0 reaches."""
    found = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        size, unit = re.fullmatch(r"(\d+)([KMG]?)", (index / "size").read_text().strip()).groups()  # type: ignore
        if (index / "type").read_text().strip() != "Instruction":
            found[f"L{(index / 'level').read_text().strip()}"] = int(size) << {"": 0, "K": 10, "M": 20, "G": 30}[unit]
    return found or {"L1": 32 << 10, "L2": 512 << 10}  # a system that does not say; what a small core has
