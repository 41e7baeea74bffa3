"""Runs the CUDA C that TVM generates, on the CPU: the same source, compiled for the host.

    module = emulate(source)
    module.launch("main_kernel", grid=(128,), block=(256,), shared_bytes=0, a, c)

The threads of a block run as fibers and meet at barriers and warp collectives; inline PTX becomes calls of emulated
instructions. Seen, and raised as EmulationError: accesses outside the arguments, races in shared memory, reads of
shared memory that was not written or whose cp.async was not waited for, threads that wait for each other for ever.
Not emulated: the hardware's approximate functions (the host's libm stands in), the order in which tensor cores add
floats, and memory that is not coherent between blocks.
"""

from __future__ import annotations

import _ctypes
import ctypes
import tempfile
import weakref
from collections.abc import Sequence
from enum import IntFlag
from pathlib import Path

import numpy as np

from .build import compile_library
from .errors import EmulationError
from .source import Kernel, translate

__all__ = ["Checks", "EmulatedModule", "EmulationError", "Kernel", "emulate"]

_MESSAGE = 2048


class Checks(IntFlag):
    """What is looked for; a cp.async that was not waited for always is."""

    BOUNDS = 1
    RACES = 2
    UNINITIALISED = 4
    GLOBAL_RACES = 8
    ALL = 15


class _Buffer(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("size", ctypes.c_size_t)]


class EmulatedModule:
    """Compiled kernels. kernels: by name. library: the file, for the stand-in of the driver; it lives as this does."""

    def __init__(self, kernels: Sequence[Kernel], library: Path, folder: tempfile.TemporaryDirectory[str]) -> None:
        self.kernels = {kernel.name: kernel for kernel in kernels}
        self.library = library
        self._folder = folder
        code = ctypes.CDLL(str(library))
        self._launch = code.emu_launch
        weakref.finalize(self, _close, code)

    def launch(
        self,
        function: str,
        grid: Sequence[int],
        block: Sequence[int],
        shared_bytes: int,
        *arguments: np.ndarray,
        checks: Checks = Checks.ALL,
    ) -> None:
        """Runs a kernel on arrays, which it changes in place. grid, block: (x, y, z), or fewer. shared_bytes: dynamic.

        Raises EmulationError for what the kernel does wrong, and for arguments that it does not take.
        """
        kernel = self.kernels.get(function)
        if kernel is None:
            raise EmulationError(f"there is no kernel {function}: {', '.join(self.kernels)}")
        if len(arguments) != len(kernel.parameters):
            raise EmulationError(f"{function} takes {len(kernel.parameters)} arguments, not {len(arguments)}")
        if bad := [i for i, a in enumerate(arguments) if not (a.flags.c_contiguous and a.flags.writeable)]:
            raise EmulationError(f"{function}: argument {bad[0]} is not a writable array in C order")
        pointers = (ctypes.c_void_p * len(arguments))(*(a.ctypes.data for a in arguments))
        values = (ctypes.c_void_p * len(arguments))(
            *(ctypes.addressof(pointers) + i * ctypes.sizeof(ctypes.c_void_p) for i in range(len(arguments)))
        )
        buffers = (_Buffer * len(arguments))(*((a.ctypes.data, a.nbytes) for a in arguments))
        message = ctypes.create_string_buffer(_MESSAGE)
        failed = self._launch(
            function.encode(),
            _dimensions(grid),
            _dimensions(block),
            ctypes.c_uint32(shared_bytes),
            values,
            buffers,
            ctypes.c_size_t(len(arguments)),
            ctypes.c_uint32(checks),
            message,
            ctypes.c_size_t(_MESSAGE),
        )
        if failed:
            raise EmulationError(message.value.decode())


def emulate(source: str, arch: str = "sm_90", *, contract: bool = False) -> EmulatedModule:
    """Compiles CUDA C for the CPU.

    arch: whose limits hold. contract: a·b + c may become one fma, as nvcc does by default; a kernel that says all its
    roundings computes the same either way.

    Raises EmulationError where the source has what the emulator does not know.
    """
    program, kernels = translate(source, arch)
    folder = tempfile.TemporaryDirectory(prefix="bnncc-emulated-")
    library = compile_library(program, Path(folder.name), contract)
    return EmulatedModule(kernels, library, folder)


def _close(code: ctypes.CDLL) -> None:
    code.emu_release()
    _ctypes.dlclose(code._handle)


def _dimensions(extents: Sequence[int]) -> ctypes.Array[ctypes.c_uint32]:
    return (ctypes.c_uint32 * 3)(*extents, *(1,) * (3 - len(extents)))
