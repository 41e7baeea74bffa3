"""What driver_cases.py and driver_failures.py share: the proxy's controls, what the network computes, arrays on a GPU.

python driver_cases.py FUNCTION ARTIFACT
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys

import numpy as np

from bnncc import runtime
from bnncc.runtime.errors import ExecutionError
from bnncc.runtime.gpu import DeviceArray
from bnncc.runtime.gpu import _tensor_in as tensor_in

ROWS, COLUMNS = 6, 64

proxy = ctypes.CDLL("libcuda.so.1")
proxy.proxy_calls.restype = ctypes.c_char_p


def weights() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(COLUMNS).astype(np.float32)


def inputs(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal((ROWS, COLUMNS)).astype(np.float32),
        generator.integers(-(2**60), 2**60, 3, np.int64),
    )


def check(outputs, x, n) -> None:
    y, m = outputs
    wanted = np.exp(x * (2 * weights()) + np.float32(1))[:, ::-1] + np.float32(1)
    np.testing.assert_allclose(y, wanted, rtol=1e-5)  # one rounding of the exponent, and expf of two libraries
    np.testing.assert_array_equal(m, n + 1)


def called(name: str) -> int:
    return proxy.proxy_calls().decode().split().count(name)


def gpu(**properties: int) -> None:
    """What the emulated GPU is from now on; see `emulator.gpu.EmulatedGpu.environment`."""
    properties = {"devices": 2, "capability": 90, **properties}
    os.environ["BNNCC_EMULATED_GPU"] = " ".join(f"{name}={value}" for name, value in properties.items())


def same(actual, wanted) -> None:
    if actual != wanted:
        raise AssertionError(f"{actual!r}, not {wanted!r}")


def refusal(path, device=None):
    """The line with which loading is refused; nothing may be left behind, and no context be current."""
    try:
        runtime.load(path, device=device)
    except ExecutionError as error:
        assert proxy.proxy_live() == 0 and proxy.proxy_depth() == 0
        return str(error)
    raise AssertionError("it was loaded")


class Array:
    """Somebody else's array on a GPU, as DLPack hands it over; memory by the session's driver."""

    def __init__(self, session, values, device=0, strides=None, offset=0):
        self.values, self.device, self.streams = np.ascontiguousarray(values), device, []
        instance = session._instance
        self.block = instance.device_block(self.values.nbytes + offset)
        self.array = DeviceArray(self.block, self.values.shape, self.values.dtype)
        self.strides, self.offset = strides and (ctypes.c_int64 * len(strides))(*strides), offset
        self.session = session
        self.set(values)

    def set(self, values):
        values = np.ascontiguousarray(values)
        address, instance = self.block.address + self.offset, self.session._instance
        instance.library.call("copy", instance.pointer, address, values.ctypes.data, values.nbytes)

    def __dlpack_device__(self):
        return 2, self.device

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        capsule = self.array.__dlpack__(stream=-1)
        tensor = tensor_in(capsule)
        tensor.byte_offset = self.offset
        if self.strides:
            tensor.strides = self.strides
        return capsule


class Stream:
    """A stream of the caller's, as torch wraps it; its context is current as long as it is there."""

    def __init__(self):
        self._context, handle = ctypes.c_void_p(), ctypes.c_void_p()
        assert proxy.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), 0) == 0
        assert proxy.cuCtxPushCurrent_v2(self._context) == 0
        assert proxy.cuStreamCreate(ctypes.byref(handle), 1) == 0
        self.cuda_stream = handle.value

    def copy(self, to, source, size):
        words = (ctypes.c_uint64(to), ctypes.c_uint64(source), ctypes.c_size_t(size))
        assert proxy.cuMemcpyAsync(*words, ctypes.c_void_p(self.cuda_stream)) == 0

    def synchronize(self):
        assert proxy.cuStreamSynchronize(ctypes.c_void_p(self.cuda_stream)) == 0

    def close(self):
        assert proxy.cuStreamDestroy_v2(ctypes.c_void_p(self.cuda_stream)) == 0
        assert proxy.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())) == 0
        assert proxy.cuDevicePrimaryCtxRelease_v2(0) == 0


def fetch(instance, address, like):
    """A copy of what lies there in the GPU's memory."""
    array = np.empty_like(like)
    instance.library.call("copy", instance.pointer, array.ctypes.data, address, array.nbytes)
    return array


def main(cases):
    """Runs the case that the command line names: FUNCTION ARTIFACT."""
    cases[sys.argv[1]](sys.argv[2])
    gc.collect()
    assert proxy.proxy_live() == 0, "something was not given back"
    assert proxy.proxy_depth() == 0, "a context stayed current"
