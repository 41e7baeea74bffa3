"""An instance of the C driver, and the memory that it hands out."""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnncc.runtime.library import Library


class Instance:
    """It lives until its owner has closed it and all memory that came from it is gone.

    lock: to be held while a C function works with the instance; giving memory back needs no lock.
    pointer: what the C functions take. device: the index of its GPU, -1 on the CPU. stream: its own CUstream, 0 on the
    CPU.
    """

    def __init__(self, library: Library, version: str | None, device: int) -> None:
        """Takes over a use of the library that the caller has acquired. Arguments as of `create_on` in model.h.

        Raises ExecutionError with the driver's line; the library is then released.
        """
        self.library = library
        self.lock = threading.RLock()  # a session that takes its own output in asks the output for its capsule
        self._users = 1
        self._guard = threading.RLock()  # the garbage collector gives memory back at any moment, also in `retain`
        self._spare: dict[int, list[int]] | None = {}
        pointer = library.create_on(None if version is None else version.encode(), device)
        if not pointer:
            failure = library.failure()
            library.release()
            raise failure
        self.pointer = ctypes.c_void_p(pointer)
        self.version = str(library.version(self.pointer).decode())
        self.device = int(library.device(self.pointer))
        self.stream = int(library.stream(self.pointer) or 0)

    def host_array(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array in memory that the driver uses in place: pinned for a GPU, aligned on the CPU.

        The memory is given back when the array and all views of it are gone. Raises ExecutionError.
        """
        return np.ndarray(shape, dtype, np.asarray(_HostMemory(self, math.prod(shape) * dtype.itemsize)))

    def device_block(self, size: int) -> DeviceBlock:
        """Memory of the device. Raises ExecutionError."""
        with self._guard:
            spare = self._spare.get(size) if self._spare else None
            address = spare.pop() if spare else None
        return DeviceBlock(self, address or self._allocate(self.library.device_alloc, size), size)

    def close(self) -> None:
        """For the owner: gives back what is spare, and all when nothing else is in use."""
        with self._guard:
            spare, self._spare = self._spare, None
        for address in (address for addresses in (spare or {}).values() for address in addresses):
            self.library.device_free(self.pointer, address)
        self.release()

    def retain(self) -> None:
        """Counts a piece of memory that is in use."""
        with self._guard:
            self._users += 1

    def release(self) -> None:
        """Gives up what `retain` counted."""
        with self._guard:
            self._users -= 1
            if self._users:
                return
        self.library.destroy(self.pointer)
        self.library.release()

    def _allocate(self, allocate: Callable[..., int | None], size: int) -> int:
        address = allocate(self.pointer, size)
        if not address:
            raise self.library.failure()
        return address

    def _give_block(self, address: int, size: int) -> None:
        with self._guard:
            kept = self._spare is not None
            if self._spare is not None:  # the next run wants as much; to free and allocate would make the GPU wait
                self._spare.setdefault(size, []).append(address)
        if not kept:
            self.library.device_free(self.pointer, address)
        self.release()

    def _give_host(self, address: int) -> None:
        self.library.host_free(self.pointer, address)
        self.release()


class _HostMemory:
    """A piece of the host's memory, as NumPy takes it."""

    def __init__(self, instance: Instance, size: int) -> None:
        address = instance._allocate(instance.library.host_alloc, size)
        self.__array_interface__ = _bytes_at(address, size)
        instance.retain()
        weakref.finalize(self, instance._give_host, address)


class DeviceBlock:
    """A piece of the device's memory; it is given back when this object is gone."""

    def __init__(self, instance: Instance, address: int, size: int) -> None:
        self.instance, self.address = instance, address
        self.__array_interface__ = _bytes_at(address, size)
        instance.retain()
        weakref.finalize(self, instance._give_block, address, size)


def _bytes_at(address: int, size: int) -> dict[str, object]:
    """NumPy's array interface: an array keeps the object that has it alive."""
    return {"version": 3, "typestr": "|u1", "shape": (max(1, size),), "data": (address, False)}
