"""Compiles translated kernels and the runtime into a shared library, with the compiler that links artifacts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from .errors import EmulationError

_HERE = Path(__file__).parent
_RUNTIME = ("runtime.cpp", "memory.cpp", "global.cpp", "instructions.cpp")
_FLAGS = ["-O2", "-g0", "-std=c++20", "-fPIC", "-nostdlib++", "-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"]
_FLAGS += ["-fno-sanitize=undefined", "-fno-strict-aliasing", "-fwrapv", "-fno-stack-protector"]
# Large local arrays meet the page at the end of the thread's stack, and do not step over it.
_FLAGS += ["-fstack-clash-protection", f"-I{_HERE}"]
_FLAGS += [f"-I{_HERE / 'include'}", "-Wno-unused-command-line-argument"]
# The hooks of the thread sanitizer before every access to memory, and nothing else of it. They know accesses of up to
# 16 bytes, which is all that CUDA has: so no vectors of the host's.
_WATCHED = ["-Xclang", "-fsanitize=thread,alignment,array-bounds", "-fno-vectorize", "-fno-slp-vectorize"]
for _option in ("func-entry-exit=0", "atomics=0", "read-before-write=1"):
    _WATCHED += ["-mllvm", f"-tsan-instrument-{_option}"]


def compile_library(program: str, folder: Path, contract: bool) -> Path:
    """The library of a program in C++. contract: a·b + c may become one fma, as nvcc does unless told not to."""
    source, kernels, library = folder / "kernels.cpp", folder / "kernels.o", folder / "kernels.so"
    source.write_text(program)
    rounding = "-ffp-contract=" + ("fast-honor-pragmas" if contract else "off")
    _zig([*_FLAGS, *_WATCHED, "-Wno-everything", rounding, "-c", str(source), "-o", str(kernels)])
    runtime = [str(_HERE / name) for name in _RUNTIME]
    _zig([*_FLAGS, "-Wall", "-Wextra", "-shared", *runtime, str(kernels), "-o", str(library), "-lm"])
    return library


def compile_host(sources: list[Path], library: Path, options: list[str]) -> None:
    """A library of the host's own, from sources beside this file."""
    _zig([*_FLAGS, "-Wall", "-Wextra", "-shared", *map(str, sources), "-o", str(library), *options])


def _zig(arguments: list[str]) -> None:
    command = [sys.executable, "-m", "ziglang", "c++", *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error:" in line][:5]
        raise EmulationError("the translated kernels do not compile: " + "; ".join(errors or [result.stderr[-2000:]]))
