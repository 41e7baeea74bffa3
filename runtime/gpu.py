"""Arrays in a GPU's memory, taken from and given to other libraries through DLPack (dlpack.h, version 0 structures).

A capsule named "dltensor" holds a DLManagedTensor. Who takes the tensor over renames it and calls its deleter in the
end; a capsule that nobody renames does so itself.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bnncc.runtime.errors import InputError
from bnncc.runtime.instance import DeviceBlock

_CUDA, _CUDA_MANAGED = 2, 13  # DLDeviceType
_LEGACY_STREAM = 1  # CUDA's default stream, for DLPack and the driver API alike
_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}  # DLDataTypeCode of NumPy's kinds


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _ManagedTensor(ctypes.Structure):
    """DLManagedTensor."""

    _fields_ = (("tensor", _Tensor), ("manager_ctx", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _tensor_in(capsule: object) -> _Tensor:
    """What a capsule holds, as long as the capsule lives."""
    tensor: _Tensor = _ManagedTensor.from_address(_get_pointer(capsule, b"dltensor")).tensor
    return tensor


@dataclass(frozen=True)
class View:
    """Somebody's array in a GPU's memory. dtype: None for one that NumPy does not have. owner: keeps it alive."""

    address: int
    device: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any] | None
    contiguous: bool
    owner: object


def is_on_gpu(value: Any) -> bool:
    """Whether this is an array in a GPU's memory that DLPack can hand over."""
    if isinstance(value, np.ndarray) or not hasattr(value, "__dlpack_device__"):
        return False
    return value.__dlpack_device__()[0] in (_CUDA, _CUDA_MANAGED)


def stream_handle(stream: Any) -> int:
    """The CUstream of an integer, or of an object that has one as torch's streams do. Raises InputError."""
    handle = getattr(stream, "cuda_stream", stream)
    if not isinstance(handle, int):
        raise InputError(f"stream is {stream!r}; an integer (a CUstream) or a torch.cuda.Stream is expected")
    return handle


def view(value: Any, stream: int) -> View:
    """The array, to be used by work in this CUstream (0: the default one), which waits for what its owner still does.

    Raises InputError where its owner does not hand it over.
    """
    try:
        capsule = value.__dlpack__(stream=stream or _LEGACY_STREAM)
    except (BufferError, RuntimeError) as error:  # torch: a tensor that requires a gradient, or is conjugated
        reason = str(error).partition("\n")[0]
        raise InputError(f"an array on a GPU cannot be taken over through DLPack: {reason}") from None
    tensor = _tensor_in(capsule)
    shape = tuple(tensor.shape[: tensor.ndim])
    kind = next((kind for kind, code in _CODES.items() if code == tensor.code), None)
    known = kind is not None and tensor.lanes == 1 and tensor.bits % 8 == 0
    return View(
        address=(tensor.data or 0) + tensor.byte_offset,
        device=tensor.device_id,
        shape=shape,
        dtype=_dtype(kind, tensor.bits) if known else None,
        contiguous=not tensor.strides or _are_dense(tensor.strides[: tensor.ndim], shape),
        owner=capsule,
    )


def _dtype(kind: str | None, bits: int) -> np.dtype[Any] | None:
    try:
        return np.dtype(f"{kind}{bits // 8}")
    except TypeError:
        return None


def _are_dense(strides: list[int], shape: tuple[int, ...]) -> bool:
    """Whether the elements lie in C order without gaps. An extent of 1 may have any stride."""
    step = 1
    for stride, extent in zip(reversed(strides), reversed(shape), strict=True):
        if extent != 1 and stride != step:
            return False
        step *= extent
    return True


class DeviceArray:
    """An output in a GPU's memory. `torch.from_dlpack`, `cupy.from_dlpack` and the like use it in place.

    Its memory is used again when the array and all that was made of it through DLPack are gone. Work that still reads
    it then must be in the stream of the next call, or be finished, as with memory of torch's own.
    """

    def __init__(self, block: DeviceBlock, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.shape, self.dtype = shape, dtype
        self._block = block

    @property
    def device(self) -> str:
        """ "cuda:0"."""
        return f"cuda:{self._block.instance.device}"

    @property
    def address(self) -> int:
        """Where it lies in the GPU's memory."""
        return self._block.address

    def numpy(self) -> NDArray[Any]:
        """A copy in the host's memory, made when all runs so far are finished. Raises ExecutionError."""
        array, instance = np.empty(self.shape, self.dtype), self._block.instance
        with instance.lock:
            instance.library.call("copy", instance.pointer, array.ctypes.data, self._block.address, array.nbytes)
        return array

    def __dlpack_device__(self) -> tuple[int, int]:
        return _CUDA, self._block.instance.device

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> object:
        """As the array API standard has it. Work in `stream` will wait for the run that computes the array."""
        if copy or (dl_device is not None and tuple(dl_device) != self.__dlpack_device__()):
            raise BufferError(f"an output on {self.device} is handed over where it is; .numpy() copies it to the host")
        instance = self._block.instance
        if stream != -1:  # -1: the consumer sees to it
            with instance.lock:
                instance.library.call("wait", instance.pointer, stream or _LEGACY_STREAM)
        # NumPy's capsule, its deleter and its destructor do all that must happen when no Python code can run. NumPy
        # itself looks at none of the elements, which are not in the host's memory.
        stored = np.dtype(np.uint8) if self.dtype == np.bool_ else self.dtype
        capsule: object = np.ndarray(self.shape, stored, np.asarray(self._block)).__dlpack__()
        tensor = _tensor_in(capsule)
        tensor.device_type, tensor.device_id = self.__dlpack_device__()
        tensor.code = _CODES[self.dtype.kind]  # NumPy before 1.26 refuses bool
        return capsule

    def __repr__(self) -> str:
        return f"<DeviceArray {self.dtype} {list(self.shape)} on {self.device}>"
