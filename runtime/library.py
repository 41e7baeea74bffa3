"""The C interface of a loaded artifact, through ctypes; calls release the GIL."""

from __future__ import annotations

import _ctypes
import ctypes
import os
import threading
from pathlib import Path
from typing import Any, ClassVar

from bnncc.runtime import container, cpu
from bnncc.runtime.errors import ArtifactError, ExecutionError
from bnncc.runtime.manifest import Manifest

_POINTERS = ctypes.POINTER(ctypes.c_void_p)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "create_on": (ctypes.c_void_p, [ctypes.c_char_p, ctypes.c_int32]),
    "destroy": (None, [ctypes.c_void_p]),
    "version": (ctypes.c_char_p, [ctypes.c_void_p]),
    "device": (ctypes.c_int32, [ctypes.c_void_p]),
    "run": (ctypes.c_int, [ctypes.c_void_p, _POINTERS, _POINTERS]),
    "run_device": (ctypes.c_int, [ctypes.c_void_p, _POINTERS, _POINTERS, ctypes.c_void_p]),
    "run_steps": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32]),
    "stream": (ctypes.c_void_p, [ctypes.c_void_p]),
    "wait": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p]),
    "synchronize": (ctypes.c_int, [ctypes.c_void_p]),
    "set_threads": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int32]),
    "host_alloc": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]),
    "host_free": (None, [ctypes.c_void_p, ctypes.c_void_p]),
    "device_alloc": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t]),
    "device_free": (None, [ctypes.c_void_p, ctypes.c_void_p]),
    "copy": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]),
    "tensor_data": (ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int32]),
    "error": (ctypes.c_char_p, []),
}


class Library:
    """One artifact mapped into this process; several instances of it share the mapping.

    `acquire` and `release` count the users; the last one unmaps it.
    """

    _loaded: ClassVar[dict[str, Library]] = {}  # by digest; guarded by _lock
    _lock = threading.RLock()  # the garbage collector releases sessions at any moment, also inside `acquire`

    def __init__(self, descriptor: int, path: Path, manifest: Manifest, digest: str) -> None:
        self.manifest = manifest
        self.users = 0
        self._digest = digest
        # The system's loader takes a name that it has seen for the library it has loaded, even when the file behind
        # the name was replaced since. The descriptor's name is ours as long as it is open, and it is the very file
        # that was checked.
        self._descriptor = os.dup(descriptor)
        name = f"/proc/self/fd/{self._descriptor}"
        try:
            self._library = ctypes.CDLL(name if os.path.exists(name) else str(path.resolve()))
        except OSError as error:
            os.close(self._descriptor)
            raise ArtifactError(f"{path}: the system cannot load it: {error}") from None
        for function, (result, arguments) in _FUNCTIONS.items():
            pointer = self._library[f"{manifest['prefix']}_{function}"]
            pointer.restype, pointer.argtypes = result, arguments
            setattr(self, function, pointer)

    @classmethod
    def acquire(cls, path: str | os.PathLike[str], version: str | None = None) -> Library:
        """Checks the file, and whether this version of it, or any, can run here, and maps it.

        Raises:
            ArtifactError, UnsupportedMachineError, InputError: nothing of the file was executed.
        """
        with container.opened(path) as descriptor:
            manifest, digest = container.check(descriptor, path)
            cpu.check_machine(manifest, path, version)
            with cls._lock:
                while True:
                    library = cls._loaded.get(digest)
                    if library is None:
                        library = cls._loaded[digest] = cls(descriptor, Path(path), manifest, digest)
                    library.users += 1
                    # The garbage collector may have released the last other user in between.
                    if cls._loaded.get(digest) is library:
                        return library

    def release(self) -> None:
        """Gives up what `acquire` gave."""
        with self._lock:
            self.users -= 1
            if self.users == 0:
                del self._loaded[self._digest]
                _ctypes.dlclose(self._library._handle)
                os.close(self._descriptor)

    def call(self, function: str, *arguments: object) -> None:
        """Calls a function that returns 0 or -1; raises ExecutionError with the driver's line."""
        if getattr(self, function)(*arguments):
            raise self.failure()

    def failure(self) -> ExecutionError:
        """The calling thread's last error."""
        return ExecutionError(self.error().decode(errors="replace"))

    # Set from _FUNCTIONS; named here for readers and type checkers.
    create_on: ctypes._NamedFuncPointer
    destroy: ctypes._NamedFuncPointer
    version: ctypes._NamedFuncPointer
    device: ctypes._NamedFuncPointer
    stream: ctypes._NamedFuncPointer
    host_alloc: ctypes._NamedFuncPointer
    host_free: ctypes._NamedFuncPointer
    device_alloc: ctypes._NamedFuncPointer
    device_free: ctypes._NamedFuncPointer
    tensor_data: ctypes._NamedFuncPointer
    error: ctypes._NamedFuncPointer
