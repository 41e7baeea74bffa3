"""Sessions: an artifact loaded into this process, called with NumPy arrays, or with arrays in a GPU's memory."""

from __future__ import annotations

import ctypes
import math
import os
import time
import weakref
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from bnncc.runtime.errors import InputError
from bnncc.runtime.gpu import DeviceArray, View, is_on_gpu, stream_handle, view
from bnncc.runtime.instance import Instance
from bnncc.runtime.library import Library
from bnncc.runtime.manifest import Manifest, PortEntry, VersionEntry, tensor_bytes, version_named

_ALIGNMENT = 64
Array = NDArray[Any]


def load(
    path: str | os.PathLike[str], threads: int | None = None, device: str | None = None, version: str | None = None
) -> Session:
    """Loads an artifact.

    path: what `bnncc compile` wrote.
    threads: how many compute; None takes one per physical core that this process may use. A GPU takes no notice.
    device: "cuda:1", say, for an artifact that runs on a GPU; None and "cuda" take that of the environment variable
        BNNCC_DEVICE, and where there is none, the first.
    version: which of the artifact's versions to run, by name, for tests; None takes that of the environment variable
        BNNCC_VERSION, and where there is none, the best that this machine's CPU can run.

    Raises:
        ArtifactError: the file is missing, truncated, altered, or no artifact.
        UnsupportedMachineError: it was compiled for another architecture, or this CPU lacks a feature it needs.
        ExecutionError: the GPU or its driver is missing, cannot run it, or has no memory left.
        InputError: threads is below 1, or there is no such version, or it does not run on that kind of device.
    """
    return Session(path, threads, device, version)


class Session:
    """One instance of a model, with its own memory and threads.

    Sessions are independent of each other. Calls of one session from several threads take turns. The GIL is released
    while the model runs. Close it (or use `with`) to give back memory and threads at once, but for what arrays of the
    session's own (outputs on a GPU, `pinned`) still hold.

    version: the manifest's entry for the version that runs. device: "cpu", or "cuda:0".
    """

    manifest: Manifest
    version: VersionEntry
    inputs: tuple[PortEntry, ...]
    outputs: tuple[PortEntry, ...]
    device: str

    def __init__(
        self,
        path: str | os.PathLike[str],
        threads: int | None = None,
        device: str | None = None,
        version: str | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads must be 1 or more, or None for one per physical core; {threads} was given")
        self._library = library = Library.acquire(path, version)
        self.manifest = library.manifest
        self.inputs, self.outputs = tuple(self.manifest["inputs"]), tuple(self.manifest["outputs"])
        self._input_forms, self._output_forms = _forms(self.inputs), _forms(self.outputs)
        try:
            index = _device_index(self.manifest, device, version)
        except InputError:
            library.release()
            raise
        self._instance = Instance(library, version, index)
        self._finalizer = weakref.finalize(self, self._instance.close)
        self.version = version_named(self.manifest, self._instance.version)
        self.device = "cpu" if self._instance.device < 0 else f"cuda:{self._instance.device}"
        self._staging: dict[int, Array] = {}
        try:
            library.call("set_threads", self._instance.pointer, threads or 0)
        except Exception:
            self.close()
            raise

    def __call__(self, *inputs: ArrayLike | DeviceArray, out: Sequence[Any] | None = None, stream: Any = None) -> Any:
        """Runs the model on its inputs in order: arrays of exactly the manifest's shapes and dtypes.

        Returns the output, or a tuple of several. For inputs in the host's memory, of any strides, these are new NumPy
        arrays that the caller owns. For contiguous inputs in the memory of the session's GPU, taken in place through
        DLPack (tensors of torch, arrays of CuPy, ...), they are `DeviceArray`s.

        out: arrays for the outputs, where the inputs are; they are returned.
        stream: for inputs on a GPU, the CUDA stream of the caller's (an integer, or torch.cuda.Stream) in which the
            work takes its turn, without waiting for it; None: the call returns when the outputs are computed.

        Raises:
            InputError: the number, shape, dtype or place of the inputs differs.
            ExecutionError: the driver reported a failure.
        """
        if self._instance.device >= 0 and any(is_on_gpu(value) for value in inputs):
            results = self._run_on_gpu(inputs, out, stream)
            return results[0] if len(results) == 1 else tuple(results)
        try:
            arrays = [np.asarray(value) for value in inputs]
        except TypeError:
            if any(is_on_gpu(value) for value in inputs):
                raise InputError(
                    f"an input lies in a GPU's memory, and the session runs on the {self.device}; copy it to the host, "
                    "or compile with -t cuda-sm_90 or the like"
                ) from None
            raise
        # What fits needs no look at each port for what does not: the call of a small model takes microseconds.
        if [(array.shape, array.dtype) for array in arrays] != self._input_forms:
            arrays = check_inputs(self.inputs, inputs)
        if stream is not None:
            raise InputError("a stream is given, and the inputs lie in the host's memory; leave it out")
        outputs = self._run(arrays, None if out is None else self._checked_out(out))
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def run(self, inputs: Mapping[str, ArrayLike | DeviceArray]) -> dict[str, Any]:
        """Runs the model on inputs given by name and returns the outputs by name; errors as for calling it."""
        names = [port["name"] for port in self.inputs]
        for name in inputs:
            if name not in names:
                raise InputError(f"no input '{name}'; the model's inputs are {', '.join(names)}")
        for name in names:
            if name not in inputs:
                raise InputError(f"input '{name}' is missing; the model's inputs are {', '.join(names)}")
        results = self(*(inputs[name] for name in names))
        outputs = results if isinstance(results, tuple) else (results,)
        return {port["name"]: array for port, array in zip(self.outputs, outputs, strict=True)}

    def bench(self, runs: int = 100, inputs: Sequence[ArrayLike] | None = None) -> list[float]:
        """Seconds of each of `runs` runs, after one that warms up; inputs are random numbers when none are given.

        On a GPU, that includes the copies from and to the host's memory (`pinned`).
        """
        if runs < 1:
            raise InputError(f"runs must be 1 or more; {runs} was given")
        arrays, outputs = self.pinned()
        values = [_random(port) for port in self.inputs] if inputs is None else check_inputs(self.inputs, inputs)
        for array, value in zip(arrays, values, strict=True):
            array[...] = value
        seconds = []
        with self._instance.lock:
            self._check_open()
            sources, targets = _pointers(arrays), _pointers(outputs)
            for _ in range(runs + 1):
                start = time.perf_counter()
                self._library.call("run", self._instance.pointer, sources, targets)
                seconds.append(time.perf_counter() - start)
        return seconds[1:]

    def pinned(self) -> tuple[list[Array], list[Array]]:
        """New arrays for the inputs and for the outputs (`out`) that spare the driver a copy: pinned, for a GPU.

        Raises ExecutionError.
        """
        with self._instance.lock:
            self._check_open()
            make = self._instance.host_array
            return [make(*form) for form in self._input_forms], [make(*form) for form in self._output_forms]

    def set_threads(self, threads: int | None) -> None:
        """Changes how many threads compute; None as in `load`."""
        if threads is not None and threads < 1:
            raise InputError(f"threads must be 1 or more, or None for one per physical core; {threads} was given")
        with self._instance.lock:
            self._check_open()
            self._library.call("set_threads", self._instance.pointer, threads or 0)

    # For inspection, used by the parity check: single tensors and steps of the plan.

    def write(self, tensor: int, array: Array) -> None:
        """Stores an array, of the tensor's bytes, into a tensor of the plan. Raises InputError."""
        with self._instance.lock:
            self._check_open()
            address, size = self._memory(tensor)
            if self.version["tensors"][tensor]["space"] == "weights":
                raise InputError(f"tensor {tensor} ('{self.version['tensors'][tensor]['name']}') is a constant")
            if array.nbytes != size:
                raise InputError(f"tensor {tensor} takes {size} bytes, {array.nbytes} were given")
            data = np.ascontiguousarray(array)
            self._library.call("copy", self._instance.pointer, address, data.ctypes.data, size)

    def read(self, tensor: int) -> Array:
        """A copy of a tensor of the plan. Raises InputError for an unknown id."""
        with self._instance.lock:
            self._check_open()
            address, size = self._memory(tensor)
            entry = self.version["tensors"][tensor]
            array = np.empty(entry["shape"], entry["dtype"])
            self._library.call("copy", self._instance.pointer, array.ctypes.data, address, size)
        return array

    def run_steps(self, first: int, count: int) -> None:
        """Runs some steps on what `write` stored and earlier steps left. Raises ExecutionError."""
        with self._instance.lock:
            self._check_open()
            self._library.call("run_steps", self._instance.pointer, first, count)

    def close(self) -> None:
        """Ends the threads and frees the memory; a closed session cannot run. May be called again."""
        with self._instance.lock:
            self._finalizer()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if not self._finalizer.alive:
            raise InputError(f"the session of model '{self.manifest['name']}' is closed; load the artifact again")

    def _memory(self, tensor: int) -> tuple[int, int]:
        """Address and bytes of a tensor."""
        tensors = self.version["tensors"]
        if not 0 <= tensor < len(tensors):
            raise InputError(f"no tensor {tensor}; the model has {len(tensors)}")
        size = tensor_bytes(tensors[tensor]["shape"], tensors[tensor]["dtype"])
        return int(self._library.tensor_data(self._instance.pointer, tensor)), size

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

    def _run(self, arrays: list[Array], out: list[Array] | None = None) -> list[Array]:
        outputs = [_aligned(shape, dtype) for shape, dtype in self._output_forms] if out is None else out
        with self._instance.lock:
            self._check_open()
            arrays = self._contiguous(arrays)
            self._library.call("run", self._instance.pointer, _pointers(arrays), _pointers(outputs))
        return outputs

    def _checked_out(self, out: Sequence[Any]) -> list[Array]:
        _check_count(self.outputs, out, "output")
        for port, array in zip(self.outputs, out, strict=True):
            if not isinstance(array, np.ndarray) or not array.flags.c_contiguous or not array.flags.writeable:
                raise InputError(f"output '{port['name']}' must be a NumPy array, contiguous and writeable")
            _check_form(port, "output", array.shape, array.dtype)
        return list(out)

    def _run_on_gpu(self, inputs: Sequence[Any], out: Sequence[Any] | None, stream: Any) -> list[Any]:
        handle = self._instance.stream if stream is None else stream_handle(stream)
        _check_count(self.inputs, inputs, "input")
        if out is not None:
            _check_count(self.outputs, out, "output")
        with self._instance.lock:
            self._check_open()
            sources = [self._view(*pair, "input", handle) for pair in zip(self.inputs, inputs, strict=True)]
            if out is None:
                results: list[Any] = [
                    DeviceArray(self._instance.device_block(math.prod(shape) * dtype.itemsize), shape, dtype)
                    for shape, dtype in self._output_forms
                ]
                targets = [array.address for array in results]
            else:
                results = list(out)
                pairs = zip(self.outputs, out, strict=True)
                targets = [self._view(*pair, "output", handle).address for pair in pairs]
            addresses = _addresses([source.address for source in sources]), _addresses(targets)
            self._library.call("run_device", self._instance.pointer, *addresses, handle)
            if stream is None:  # the owner of an input may use its memory for something else as soon as this returns
                self._library.call("synchronize", self._instance.pointer)
        return results

    def _view(self, port: PortEntry, value: Any, role: str, stream: int) -> View:
        where = f"{role} '{port['name']}'"
        if not is_on_gpu(value):
            raise InputError(f"{where} lies in the host's memory, and an input on {self.device}; keep all in one place")
        device = value.__dlpack_device__()[1]
        if device != self._instance.device:
            raise InputError(
                f"{where} lies on cuda:{device}, and the session runs on {self.device}; copy it, or load the artifact "
                f"with device='cuda:{device}'"
            )
        taken = view(value, stream)
        _check_form(port, role, taken.shape, taken.dtype)
        if not taken.contiguous:
            raise InputError(f"{where} is not contiguous; an array on a GPU is taken in place and must be")
        return taken


def check_inputs(ports: Sequence[PortEntry], inputs: Sequence[Any]) -> list[Array]:
    """The inputs as arrays of exactly their ports' shapes and dtypes. Raises InputError naming the first that fails."""
    _check_count(ports, inputs, "input")
    arrays = []
    for port, value in zip(ports, inputs, strict=True):
        array = np.asarray(value)
        _check_form(port, "input", array.shape, array.dtype)
        arrays.append(array)
    return arrays


def _check_count(ports: Sequence[PortEntry], values: Sequence[Any], role: str) -> None:
    if len(values) != len(ports):
        names = ", ".join(port["name"] for port in ports)
        raise InputError(f"the model has {len(ports)} {role}(s) ({names}), {len(values)} given")


def _check_form(port: PortEntry, role: str, shape: tuple[int, ...], dtype: np.dtype[Any] | None) -> None:
    """dtype: None for one that NumPy does not have."""
    wanted = tuple(port["shape"])
    if shape != wanted:
        empty = " is empty and" if 0 in shape else ""
        raise InputError(
            f"{role} '{port['name']}'{empty} has shape {shape}, the model was compiled for {wanted}; "
            "shapes are fixed when compiling"
        )
    if dtype != np.dtype(port["dtype"]):
        does = f"takes {port['dtype']}; convert it with .astype('{port['dtype']}')"
        if role == "output":
            does = f"gives {port['dtype']}"
        raise InputError(f"{role} '{port['name']}' has dtype {dtype or 'unknown to NumPy'}, the model {does}")


def _device_index(manifest: Manifest, device: str | None, version: str | None) -> int:
    """The index that the driver takes, -1 to leave the choice to it."""
    if device is None:
        return -1
    kind, colon, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (colon and (kind == "cpu" or not number.isdecimal())):
        raise InputError(f"unknown device '{device}'; a device is cpu, cuda, or cuda:N")
    versions = manifest["versions"] if version is None else [version_named(manifest, version)]
    if kind not in (kinds := {"cpu" if entry["device"] is None else "cuda" for entry in versions}):
        raise InputError(
            f"device '{device}' cannot run the artifact, which was compiled for {manifest['target']}; "
            f"its device is {' or '.join(sorted(kinds))}"
        )
    return int(number) if number else -1


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
    return _addresses([_address(array) for array in arrays])


def _addresses(addresses: list[int]) -> Any:
    return (ctypes.c_void_p * max(1, len(addresses)))(*addresses)


def _address(array: Array) -> int:
    """Where the elements of a contiguous array lie: `array.ctypes.data` at a quarter of its time, for small models."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(array))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # read-only or empty
        return int(array.ctypes.data)
