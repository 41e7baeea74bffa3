"""C compiled into this process, by the clang that links artifacts."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path


def compile_c(source: Path, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """The functions of one file of C."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / f"{source.stem}.so"
        command = [sys.executable, "-m", "ziglang", "cc", "-O3", "-Wall", "-Wextra", "-fno-sanitize=undefined", *flags]
        done = subprocess.run([*command, "-shared", "-fPIC", "-o", library, source], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile: {done.stderr.strip().splitlines()[0]}")
        return ctypes.CDLL(str(library))
