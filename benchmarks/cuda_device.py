"""The CUDA driver through ctypes: memory, kernels of a cubin, graphs of them, and the GPU's own clock.

All in the primary context of a device, which artifacts and torch use, too, so that they share memory and streams.
Needs NumPy and libcuda.so.1 alone.
"""

from __future__ import annotations

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

_MULTIPROCESSORS, _MAJOR, _MINOR, _PCI = 16, 75, 76, (50, 33, 34)  # CUdevice_attribute
_MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_ADDRESS = ctypes.c_uint64  # CUdeviceptr

#: Seconds that a contender is timed for before it is the next one's turn.
BURST = 0.01

#: Puts one run into a CUstream, without waiting for it.
Contender = Callable[[int], object]

#: A launch: the function, its grid and block, bytes of dynamic shared memory, addresses of its arguments.
Kernel = tuple[ctypes.c_void_p, Sequence[int], Sequence[int], int, Sequence[int]]


class Unavailable(Exception):
    """Why there is nothing to measure on, in one line."""


class GpuError(Exception):
    """A call of the driver failed; one line."""


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Unavailable(f"no GPU: libcuda.so.1 cannot be opened ({error})") from None
    library.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    if code := library.cuInit(0):
        raise Unavailable(f"no GPU: libcuda.so.1 is here, but cuInit says {_text(library, code)}")
    return library


def _text(library: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    library.cuGetErrorString(code, ctypes.byref(text))
    return f"{text.value.decode() if text.value else 'something unknown'} ({code})"


def _call(name: str, *arguments: Any) -> None:
    library = _driver()
    if code := library[name](*arguments):
        raise GpuError(f"{name}: {_text(library, code)}")


def count() -> int:
    """GPUs that this process sees. Raises Unavailable where there is no driver."""
    number = ctypes.c_int()
    _call("cuDeviceGetCount", ctypes.byref(number))
    return number.value


def missing() -> str | None:
    """Why nothing can run on a GPU here, or None."""
    try:
        return None if count() else "no GPU: libcuda.so.1 lists none"
    except Unavailable as reason:
        return str(reason)


class _KernelNode(ctypes.Structure):
    """CUDA_KERNEL_NODE_PARAMS_v1."""

    _fields_ = (
        ("function", ctypes.c_void_p),
        *((f"{of}_{axis}", ctypes.c_uint) for of in ("grid", "block") for axis in "xyz"),
        ("shared_bytes", ctypes.c_uint),
        ("parameters", ctypes.POINTER(ctypes.c_void_p)),
        ("extra", ctypes.c_void_p),
    )


class Memory:
    """A piece of the device's memory, given back when this object is gone."""

    def __init__(self, gpu: Gpu, size: int) -> None:
        self.size, self.address, self._gpu = size, 0, gpu
        address = _ADDRESS()
        gpu.call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(1, size)))
        self.address = int(address.value)

    def write(self, array: np.ndarray) -> None:
        data = np.ascontiguousarray(array)
        self._gpu.copy(self.address, data.ctypes.data, data.nbytes)

    def read(self, shape: Sequence[int], dtype: Any) -> np.ndarray:
        array = np.empty(shape, dtype)
        self._gpu.copy(array.ctypes.data, self.address, array.nbytes)
        return array

    def __del__(self) -> None:
        if self.address:
            self._gpu.call("cuMemFree_v2", _ADDRESS(self.address))


class Module:
    """The kernels of a cubin. They stay loaded as long as the process lives."""

    def __init__(self, gpu: Gpu, image: bytes) -> None:
        self._gpu, self._image = gpu, image
        self._module = ctypes.c_void_p()
        gpu.call("cuModuleLoadDataEx", ctypes.byref(self._module), image, 0, None, None)

    def function(self, name: str, shared_bytes: int = 0) -> ctypes.c_void_p:
        """A kernel that may ask for so much dynamic shared memory."""
        function = ctypes.c_void_p()
        self._gpu.call("cuModuleGetFunction", ctypes.byref(function), self._module, name.encode())
        if shared_bytes:
            self._gpu.call("cuFuncSetAttribute", function, _MOST_SHARED, ctypes.c_int(shared_bytes))
        return function


class Graph:
    """Launches one after another, as one CUDA graph."""

    def __init__(self, gpu: Gpu, kernels: Sequence[Kernel]) -> None:
        self._gpu, self._graph, self._exec = gpu, ctypes.c_void_p(), ctypes.c_void_p()
        gpu.call("cuGraphCreate", ctypes.byref(self._graph), 0)
        before: ctypes.c_void_p | None = None
        for function, grid, block, shared_bytes, addresses in kernels:
            values = (_ADDRESS * len(addresses))(*addresses)
            pointers = (ctypes.c_void_p * len(addresses))(
                *(ctypes.addressof(values) + i * ctypes.sizeof(_ADDRESS) for i in range(len(addresses)))
            )
            parameters = _KernelNode(function, *grid, *block, shared_bytes, pointers, None)
            node = ctypes.c_void_p()
            gpu.call(
                "cuGraphAddKernelNode", ctypes.byref(node), self._graph, ctypes.byref(before) if before else None,
                ctypes.c_size_t(1 if before else 0), ctypes.byref(parameters),
            )  # fmt: skip
            before = node
        gpu.call("cuGraphInstantiateWithFlags", ctypes.byref(self._exec), self._graph, ctypes.c_ulonglong(0))

    def launch(self, stream: int) -> None:
        self._gpu.call("cuGraphLaunch", self._exec, ctypes.c_void_p(stream))


class Gpu:
    """A GPU of this process, by its number. stream: a CUstream of its own, for all that is timed.

    Raises Unavailable.
    """

    def __init__(self, index: int = 0) -> None:
        if reason := missing():
            raise Unavailable(reason)
        if index >= (there := count()):
            raise Unavailable(f"no cuda:{index}: libcuda.so.1 lists {there}")
        self.index = index
        self._device, context, stream = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_void_p()
        self.call("cuDeviceGet", ctypes.byref(self._device), index)
        # Held, and current in this thread, until the process ends.
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device)
        self.call("cuCtxPushCurrent_v2", context)
        self.call("cuStreamCreate", ctypes.byref(stream), 1)
        self.stream = int(stream.value or 0)
        self._events = [ctypes.c_void_p(), ctypes.c_void_p()]
        for event in self._events:
            self.call("cuEventCreate", ctypes.byref(event), 0)

    call = staticmethod(_call)

    @functools.cached_property
    def name(self) -> str:
        text = ctypes.create_string_buffer(256)
        self.call("cuDeviceGetName", text, 256, self._device)
        return text.value.decode()

    @property
    def multiprocessors(self) -> int:
        return self._attribute(_MULTIPROCESSORS)

    @property
    def pci(self) -> str:
        """Where it sits, as nvidia-smi takes it: its numbers and CUDA's differ where some GPUs are hidden."""
        domain, bus, slot = (self._attribute(number) for number in _PCI)
        return f"{domain:08x}:{bus:02x}:{slot:02x}.0"

    @property
    def capability(self) -> tuple[int, int]:
        return self._attribute(_MAJOR), self._attribute(_MINOR)

    @property
    def driver(self) -> str:
        """The newest CUDA that the driver supports: "13.0"."""
        version = ctypes.c_int()
        self.call("cuDriverGetVersion", ctypes.byref(version))
        return f"{version.value // 1000}.{version.value % 1000 // 10}"

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes that are free, and all of them."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value, total.value

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self.call("cuDeviceGetAttribute", ctypes.byref(value), number, self._device)
        return value.value

    def allocate(self, size: int) -> Memory:
        return Memory(self, size)

    def fill(self, memory: Memory, generator: np.random.Generator) -> None:
        """With random bytes: what toggles no wires takes less power and may run at a higher clock."""
        block = 1 << 24
        data = generator.integers(0, 256, min(block, memory.size), np.uint8)
        for at in range(0, memory.size, block):
            self.copy(memory.address + at, data.ctypes.data, min(block, memory.size - at))

    def copy(self, to: int, source: int, size: int) -> None:
        """Between any two places; returns when it is done."""
        if size:
            stream = ctypes.c_void_p(self.stream)
            self.call("cuMemcpyAsync", _ADDRESS(to), _ADDRESS(source), ctypes.c_size_t(size), stream)
            self.synchronize()

    def module(self, image: bytes) -> Module:
        return Module(self, image)

    def graph(self, kernels: Sequence[Kernel]) -> Graph:
        return Graph(self, kernels)

    def synchronize(self) -> None:
        self.call("cuStreamSynchronize", ctypes.c_void_p(self.stream))

    def seconds(self, run: Contender, runs: int) -> float:
        """Of one of so many runs behind each other, after one that is not counted, by the GPU's clock."""
        stream = ctypes.c_void_p(self.stream)
        run(self.stream)
        self.call("cuEventRecord", self._events[0], stream)
        for _ in range(runs):
            run(self.stream)
        self.call("cuEventRecord", self._events[1], stream)
        self.synchronize()
        milliseconds = ctypes.c_float()
        self.call("cuEventElapsedTime", ctypes.byref(milliseconds), *self._events)
        return 1e-3 * milliseconds.value / runs


def interleaved(gpu: Gpu, contenders: Mapping[str, Contender], seconds: float) -> dict[str, float]:
    """Median seconds of a run of each contender, by the GPU's clock.

    They take turns in bursts of about `BURST` seconds, so that a clock that falls as the GPU gets warm falls for all.
    seconds: for all of them together; of each there are three bursts at least.
    """
    runs = {name: max(1, int(BURST / max(1e-7, gpu.seconds(run, 3)))) for name, run in contenders.items()}
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or not all(len(taken) >= 3 for taken in samples.values()):
        for name, run in contenders.items():
            samples[name].append(gpu.seconds(run, runs[name]))
    return {name: statistics.median(taken) for name, taken in samples.items()}


def latencies(gpu: Gpu, contenders: Mapping[str, Contender], runs: int) -> dict[str, float]:
    """Median seconds from the call to the end of its work, by the wall's clock, for each contender; they take turns."""
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(runs + 3):
        for name, run in contenders.items():
            start = time.perf_counter()
            run(gpu.stream)
            gpu.synchronize()
            if turn >= 3:
                samples[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in samples.items()}
