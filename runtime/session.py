"""Sessions: an artifact loaded into this process, called with NumPy arrays."""

from __future__ import annotations

import ctypes
import math
import os
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnncc.runtime.errors import InputError
from bnncc.runtime.library import Library
from bnncc.runtime.manifest import Manifest, PortEntry, VersionEntry, tensor_bytes, version_named

_ALIGNMENT = 64
Array = NDArray[Any]


def load(path: str | os.PathLike[str], threads: int | None = None, version: str | None = None) -> Session:
    """Loads an artifact.

    path: what `bnncc compile` wrote.
    threads: how many compute; None takes one per physical core that this process may use.
    version: which of the artifact's versions to run, by name, for tests; None takes that of the environment variable
        BNNCC_VERSION, and where there is none, the best that this machine can run.

    Raises:
        ArtifactError: the file is missing, truncated, altered, or no artifact.
        UnsupportedMachineError: it was compiled for another architecture, or this CPU lacks a feature it needs.
        InputError: threads is below 1, or there is no such version.
    """
    return Session(path, threads, version)


class Session:
    """One instance of a model, with its own memory and threads.

    Sessions are independent of each other. Calls of one session from several threads take turns. The GIL is released
    while the model runs. Close it (or use `with`) to give back memory and threads at once.

    version: the manifest's entry for the version that runs.
    """

    manifest: Manifest
    version: VersionEntry
    inputs: tuple[PortEntry, ...]
    outputs: tuple[PortEntry, ...]

    def __init__(self, path: str | os.PathLike[str], threads: int | None = None, version: str | None = None) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads must be 1 or more, or None for one per physical core; {threads} was given")
        self._library = library = Library.acquire(path, version)
        self.manifest = library.manifest
        self.inputs, self.outputs = tuple(self.manifest["inputs"]), tuple(self.manifest["outputs"])
        self._input_forms, self._output_forms = _forms(self.inputs), _forms(self.outputs)
        self._lock = threading.Lock()
        instance = library.create_on(None if version is None else version.encode(), -1)
        if not instance:
            failure = library.failure()
            library.release()
            raise failure
        self._instance = ctypes.c_void_p(instance)
        self.version = version_named(self.manifest, library.version(self._instance).decode())
        self._finalizer = weakref.finalize(self, _destroy, library, self._instance)
        self._staging: dict[int, Array] = {}
        try:
            library.call("set_threads", self._instance, threads or 0)
        except Exception:
            self.close()
            raise

    def __call__(self, *inputs: ArrayLike) -> Array | tuple[Array, ...]:
        """Runs the model on its inputs in order: arrays of exactly the manifest's shapes and dtypes, of any strides.

        Returns the output, or a tuple of several; new arrays that the caller owns.

        Raises:
            InputError: the number, shape or dtype of the inputs differs.
            ExecutionError: the driver reported a failure.
        """
        arrays = [np.asarray(value) for value in inputs]
        # What fits needs no look at each port for what does not: the call of a small model takes microseconds.
        if [(array.shape, array.dtype) for array in arrays] != self._input_forms:
            arrays = check_inputs(self.inputs, inputs)
        outputs = self._run(arrays)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def run(self, inputs: Mapping[str, ArrayLike]) -> dict[str, Array]:
        """Runs the model on inputs given by name and returns the outputs by name; errors as for calling it."""
        names = [port["name"] for port in self.inputs]
        for name in inputs:
            if name not in names:
                raise InputError(f"no input '{name}'; the model's inputs are {', '.join(names)}")
        for name in names:
            if name not in inputs:
                raise InputError(f"input '{name}' is missing; the model's inputs are {', '.join(names)}")
        outputs = self._run(check_inputs(self.inputs, [inputs[name] for name in names]))
        return {port["name"]: array for port, array in zip(self.outputs, outputs, strict=True)}

    def bench(self, runs: int = 100, inputs: Sequence[ArrayLike] | None = None) -> list[float]:
        """Seconds of each of `runs` runs, after one that warms up; inputs are random numbers when none are given."""
        if runs < 1:
            raise InputError(f"runs must be 1 or more; {runs} was given")
        arrays = [_random(port) for port in self.inputs] if inputs is None else check_inputs(self.inputs, inputs)
        outputs = [_empty(port) for port in self.outputs]
        seconds = []
        with self._lock:
            instance = self._open_instance()
            arrays = self._contiguous(arrays)
            sources, targets = _pointers(arrays), _pointers(outputs)
            for _ in range(runs + 1):
                start = time.perf_counter()
                self._library.call("run", instance, sources, targets)
                seconds.append(time.perf_counter() - start)
        return seconds[1:]

    def set_threads(self, threads: int | None) -> None:
        """Changes how many threads compute; None as in `load`."""
        if threads is not None and threads < 1:
            raise InputError(f"threads must be 1 or more, or None for one per physical core; {threads} was given")
        with self._lock:
            self._library.call("set_threads", self._open_instance(), threads or 0)

    # For inspection, used by the parity check: single tensors and steps of the plan.

    def write(self, tensor: int, array: Array) -> None:
        """Stores an array, of the tensor's bytes, into a tensor of the plan. Raises InputError."""
        with self._lock:
            address, size = self._memory(tensor)
            if self.version["tensors"][tensor]["space"] == "weights":
                raise InputError(f"tensor {tensor} ('{self.version['tensors'][tensor]['name']}') is a constant")
            if array.nbytes != size:
                raise InputError(f"tensor {tensor} takes {size} bytes, {array.nbytes} were given")
            ctypes.memmove(address, np.ascontiguousarray(array).ctypes.data, size)

    def read(self, tensor: int) -> Array:
        """A copy of a tensor of the plan. Raises InputError for an unknown id."""
        with self._lock:
            address, size = self._memory(tensor)
            data = bytearray(ctypes.string_at(address, size))
        entry = self.version["tensors"][tensor]
        return np.frombuffer(data, entry["dtype"]).reshape(entry["shape"])

    def run_steps(self, first: int, count: int) -> None:
        """Runs some steps on what `write` stored and earlier steps left. Raises ExecutionError."""
        with self._lock:
            self._library.call("run_steps", self._open_instance(), first, count)

    def close(self) -> None:
        """Ends the threads and frees the memory; a closed session cannot run. May be called again."""
        with self._lock:
            self._finalizer()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_instance(self) -> ctypes.c_void_p:
        if not self._finalizer.alive:
            raise InputError(f"the session of model '{self.manifest['name']}' is closed; load the artifact again")
        return self._instance

    def _memory(self, tensor: int) -> tuple[int, int]:
        """Address and bytes of a tensor."""
        instance, tensors = self._open_instance(), self.version["tensors"]
        if not 0 <= tensor < len(tensors):
            raise InputError(f"no tensor {tensor}; the model has {len(tensors)}")
        size = tensor_bytes(tensors[tensor]["shape"], tensors[tensor]["dtype"])
        return int(self._library.tensor_data(instance, tensor)), size

    def _contiguous(self, arrays: list[Array]) -> list[Array]:
        """The arrays, those with gaps copied to memory kept for that: aligned, so the driver copies no second time."""
        if all(array.flags.c_contiguous for array in arrays):
            return arrays
        staged = []
        for i, (port, array) in enumerate(zip(self.inputs, arrays, strict=True)):
            if not array.flags.c_contiguous:
                if i not in self._staging:
                    self._staging[i] = _empty(port)
                np.copyto(self._staging[i], array)
                array = self._staging[i]
            staged.append(array)
        return staged

    def _run(self, arrays: list[Array]) -> list[Array]:
        outputs = [_aligned(shape, dtype) for shape, dtype in self._output_forms]
        with self._lock:
            instance = self._open_instance()
            arrays = self._contiguous(arrays)
            self._library.call("run", instance, _pointers(arrays), _pointers(outputs))
        return outputs


def check_inputs(ports: Sequence[PortEntry], inputs: Sequence[ArrayLike]) -> list[Array]:
    """The inputs as arrays of exactly their ports' shapes and dtypes. Raises InputError naming the first that fails."""
    if len(inputs) != len(ports):
        names = ", ".join(port["name"] for port in ports)
        raise InputError(f"the model has {len(ports)} input(s) ({names}), {len(inputs)} given")
    arrays = []
    for port, value in zip(ports, inputs, strict=True):
        array, shape = np.asarray(value), tuple(port["shape"])
        if array.shape != shape:
            empty = " is empty and" if array.size == 0 else ""
            raise InputError(
                f"input '{port['name']}'{empty} has shape {array.shape}, the model was compiled for {shape}; "
                "shapes are fixed when compiling"
            )
        if array.dtype != np.dtype(port["dtype"]):
            raise InputError(
                f"input '{port['name']}' has dtype {array.dtype}, the model takes {port['dtype']}; "
                f"convert it with .astype('{port['dtype']}')"
            )
        arrays.append(array)
    return arrays


def _destroy(library: Library, instance: ctypes.c_void_p) -> None:
    library.destroy(instance)
    library.release()


def _forms(ports: Sequence[PortEntry]) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
    """Shapes and dtypes."""
    return [(tuple(port["shape"]), np.dtype(port["dtype"])) for port in ports]


def _empty(port: PortEntry) -> Array:
    return _aligned(*_forms([port])[0])


def _aligned(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array aligned so that the driver writes it in place."""
    memory = np.empty(math.prod(shape) * dtype.itemsize + _ALIGNMENT, np.uint8)
    return np.ndarray(shape, dtype, memory, -_address(memory) % _ALIGNMENT)


def _random(port: PortEntry) -> Array:
    """Numbers as an input of the network might hold them: normal for floats, all values for integers."""
    generator, array = np.random.default_rng(0), _empty(port)
    if array.dtype.kind == "f":
        array[...] = generator.standard_normal(array.shape)
    elif array.dtype.kind == "b":
        array[...] = generator.integers(0, 2, array.shape)
    else:
        limits = np.iinfo(array.dtype)
        array[...] = generator.integers(limits.min, limits.max, array.shape, array.dtype, endpoint=True)
    return array


def _pointers(arrays: list[Array]) -> Any:
    return (ctypes.c_void_p * max(1, len(arrays)))(*[_address(array) for array in arrays])


def _address(array: Array) -> int:
    """Where the elements of a contiguous array lie: `array.ctypes.data` at a quarter of its time, for small models."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # read-only or empty
        return int(array.ctypes.data)
