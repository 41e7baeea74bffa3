"""CUDA C to machine code: by NVRTC from PyPI (`bnncc[cuda]`), else by an nvcc that is there.

NVRTC is one shared library, called through ctypes; it needs no GPU, no driver, no CUDA toolkit and no header, since
the kernels' source stands for itself (`self_contained`). Of several that are installed the oldest that knows the
architecture is taken: what CUDA 12 makes runs on drivers from R525 on, those of JetPack 6 included; what CUDA 13 makes
needs R580.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from bnncc.runtime.errors import BnnccError

# Every rounding as IEEE 754 has it. Contraction stays on, as on CPUs: where two roundings matter, the source says
# __fmul_rn and __fadd_rn.
_OPTIONS = ("--std=c++17", "--fmad=true", "--prec-div=true", "--prec-sqrt=true", "--ftz=false")

_HOW = "pip install 'bnncc[cuda]', or set CUDA_HOME to a CUDA toolkit of 12.8 or later"

# In place of the headers that TVM's source asks for; types as LP64 systems have them, constants as <math_constants.h>.
_PRELUDE = """\
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
#define CUDART_INF_F __int_as_float(0x7f800000)
#define CUDART_NAN_F __int_as_float(0x7fffffff)
#define CUDART_INF __longlong_as_double(0x7ff0000000000000ULL)
#define CUDART_NAN __longlong_as_double(0xfff8000000000000ULL)
#ifdef __CUDACC_RTC__
#define __asm__ asm
#define __volatile__ volatile
#endif
"""
_TVM_PRELUDE = re.compile(r"#ifdef __CUDACC_RTC__\n  #include <cuda/std/cstdint>.*?#include <cuda\.h>\n#endif\n", re.S)
_DYNAMIC = re.compile(r"extern __shared__ __align__\((\d+)\) (\w+(?: \w+)*) (\w+)\[\];")
_BUILT_IN = re.compile(r"#include <(math_constants|sm_61_intrinsics)\.h>\n")

# Where a kernel begins, in CUDA C and in PTX.
_KERNEL = r"__global__ void (?:__launch_bounds__\([^)]*\) )?(\w+)\([^;{}]*\{"
_ENTRY = r"\.entry (\w+)\("


def compile_cuda(source: str, sm: str) -> tuple[bytes, bytes]:
    """The cubin for an architecture ("sm_90", "sm_90a"), and the PTX it was made from, for the driver to compile for
    later ones.

    source: CUDA C as TVM generates it. What the results compute depends on it, on `sm` and on `compiler(sm).identity`
    alone. Their bytes may differ from one call to the next: NVRTC (12.8, 12.9 and 13.5 alike) now and then makes one
    read of 16 bytes into two.

    Raises:
        BnnccError: no compiler here knows the architecture.
        RuntimeError: the compiler refuses the source (a bug of bnncc's).
    """
    return compiler(sm).compile(self_contained(source), sm)


class Compiler(Protocol):
    """identity: name and version. architectures: "sm_75", …, those it makes machine code for."""

    @property
    def identity(self) -> str: ...
    @property
    def architectures(self) -> Sequence[str]: ...
    def compile(self, source: str, sm: str) -> tuple[bytes, bytes]: ...


def compiler(sm: str) -> Compiler:
    """The one to use here for an architecture. Raises BnnccError where there is none."""
    found = _compilers()
    for each in found:
        if sm.rstrip("af") in each.architectures:
            return each
    if found:
        known = "; ".join(f"{each.identity} knows {', '.join(each.architectures)}" for each in found)
        raise BnnccError(f"no compiler here makes code for {sm} ({known}). Do: {_HOW}")
    raise BnnccError(f"compiling for CUDA needs NVRTC or nvcc, and neither is here. Do: {_HOW}")


@functools.lru_cache(maxsize=1)
def _compilers() -> tuple[Compiler, ...]:
    program = nvcc_program()
    return (*map(Nvrtc, nvrtc_libraries()), *([Nvcc(program)] if program else []))


def nvrtc_libraries() -> list[Path]:
    """Every libnvrtc of pip packages, the oldest major version first."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []
    found = [path for folder in folders for path in folder.glob("*/lib/libnvrtc.so.*")]
    return sorted(found, key=lambda path: (int(path.name.split(".")[2]), str(path)))


def nvcc_program() -> Path | None:
    """The nvcc of CUDA_HOME, of the PATH, or of the folder where the toolkit is installed by default."""
    home = os.environ.get("CUDA_HOME")
    for candidate in (f"{home}/bin/nvcc" if home else "", "nvcc", "/usr/local/cuda/bin/nvcc"):
        program = shutil.which(candidate)
        if program:
            return Path(program)
    return None


def self_contained(source: str) -> str:
    """Source as TVM generates it, without the headers that it asks for, and with dynamic shared memory under a name of
    its type: kernels that lie in one source call it alike, which C++ allows for arrays of one type only."""
    return _DYNAMIC.sub(_typed, _BUILT_IN.sub("", _TVM_PRELUDE.sub(lambda _: _PRELUDE, source, count=1)))


def _typed(match: re.Match[str]) -> str:
    alignment, kind, name = match.groups()
    array = f"dynamic_{kind.replace(' ', '_')}_{alignment}"
    return f"extern __shared__ __align__({alignment}) {kind} {array}[]; {kind}* const {name} = {array};"


class Nvrtc:
    """The library at `path`. Its calls release the GIL."""

    def __init__(self, path: Path) -> None:
        try:
            # libnvrtc opens this one by its bare name, and not every version looks beside itself.
            for builtins in path.parent.glob("libnvrtc-builtins.so.*"):
                ctypes.CDLL(str(builtins))
            self._lib = ctypes.CDLL(str(path))
        except OSError as error:
            raise BnnccError(f"cannot load {path}: {error}. Do: {_HOW}") from error
        self._lib.nvrtcGetErrorString.restype = ctypes.c_char_p

    @functools.cached_property
    def identity(self) -> str:
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        return f"NVRTC {major.value}.{minor.value}"

    @functools.cached_property
    def architectures(self) -> tuple[str, ...]:
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", numbers)
        return tuple(f"sm_{number}" for number in numbers)

    def compile(self, source: str, sm: str) -> tuple[bytes, bytes]:
        """(cubin, PTX) of one compilation."""
        cubin, ptx = self._compile(source, sm, ("CUBIN", "PTX"))
        return cubin, ptx

    def _compile(self, source: str, architecture: str, results: Sequence[str]) -> tuple[bytes, ...]:
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
        try:
            options = (f"--gpu-architecture={architecture}", *_OPTIONS, "--disable-warnings")
            array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            if self._lib.nvrtcCompileProgram(program, len(options), array):
                log = self._read("ProgramLog", program).decode(errors="replace")
                ptx = b""
                if "ptxas" in log:  # which it read; for a virtual architecture it stops there
                    (ptx,) = self._compile(source, architecture.replace("sm_", "compute_"), ("PTX",))
                raise RuntimeError(_complaint(self.identity, architecture, log, source, ptx.decode()))
            return tuple(self._read(result, program) for result in results)
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _read(self, what: str, program: ctypes.c_void_p) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, data)
        return data.raw if what == "CUBIN" else data.value  # texts end with a zero

    def _call(self, function: str, *args: Any) -> None:
        code = getattr(self._lib, function)(*args)
        if code:
            raise RuntimeError(f"{function}: {self._lib.nvrtcGetErrorString(code).decode()}")


@dataclass(frozen=True)
class Nvcc:
    """The program at `path`. It needs a C++ compiler of the host beside it."""

    path: Path

    @functools.cached_property
    def identity(self) -> str:
        match = re.search(r"\bV([\d.]+)", self._ask("--version"))
        return f"nvcc {match[1] if match else 'of unknown version'}"

    @functools.cached_property
    def architectures(self) -> tuple[str, ...]:
        return tuple(re.findall(r"^sm_\d+$", self._ask("--list-gpu-code"), re.M))

    def compile(self, source: str, sm: str) -> tuple[bytes, bytes]:
        """(cubin, PTX): PTX first, then the cubin of it."""
        with tempfile.TemporaryDirectory(prefix="bnncc-cuda-") as name:
            folder = Path(name)
            (folder / "kernels.cu").write_text(source, encoding="utf-8")
            to_ptx = ("--ptx", *_OPTIONS, f"--gpu-architecture={sm.replace('sm_', 'compute_')}", "kernels.cu")
            to_cubin = ("--cubin", f"--gpu-architecture={sm}", "kernels.ptx")
            for command in (to_ptx, to_cubin):
                done = self._run(folder, "--disable-warnings", *command)
                if done.returncode:
                    ptx = folder / "kernels.ptx"
                    made = ptx.read_text() if ptx.exists() else ""
                    raise RuntimeError(_complaint(self.identity, sm, done.stdout, source, made))
            return (folder / "kernels.cubin").read_bytes(), (folder / "kernels.ptx").read_bytes()

    def _ask(self, question: str) -> str:
        done = self._run(None, question)
        if done.returncode:
            raise BnnccError(f"{self.path} {question} failed: {done.stdout.strip()[:200]}. Do: {_HOW}")
        return done.stdout

    def _run(self, folder: Path | None, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.path), *args],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )


def _complaint(identity: str, sm: str, log: str, source: str, ptx: str) -> str:
    """One line of a compiler's log: the first error, and the kernel it is in. ptx: "" where it did not come so far."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    line = next((line for line in lines if re.search(r"\b(error|fatal)\b", line)), lines[0] if lines else "no reason")
    in_source, in_ptx = re.search(r"kernels\.cu\((\d+)\)", line), re.search(r"ptxas .*\bline (\d+);", line)
    kernel = None
    if in_source:
        kernel = _last_before(_KERNEL, source, int(in_source[1]))
    elif in_ptx:
        kernel = _last_before(_ENTRY, ptx, int(in_ptx[1]))
    return f"{identity} refuses the CUDA source for {sm}{f', kernel {kernel}' if kernel else ''}: {line}"


def _last_before(kernel: str, text: str, line: int) -> str | None:
    """The last kernel that begins at or before a line, counted from 1; `kernel` matches such a beginning."""
    names = re.findall(kernel, "\n".join(text.splitlines()[:line]))
    return names[-1] if names else None
