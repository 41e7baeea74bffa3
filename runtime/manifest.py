"""The manifest: the JSON inside every artifact that says what it is, for which machine, and what each step does.

It is plain data (`json.loads` of an ELF section that `container.py` finds without executing anything), so it is handed
out as dictionaries; the classes below are its schema. Readers ignore keys they do not know, so a new key needs no new
format number; a changed meaning does.
"""

from __future__ import annotations

import math
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray

from bnncc.runtime.errors import InputError

FORMAT = 3
"""Version of the manifest and of the C interface. An artifact of another version is refused."""


class PortEntry(TypedDict):
    """An input or output of the model, in the order of its signature, as the artifact takes or gives it.

    order: axis i of it is axis `order[i]` of the model's; null for the same axes (NCHW, as in PyTorch).
    """

    name: str
    shape: list[int]
    dtype: str
    order: list[int] | None


class ValueEntry(TypedDict):
    """See `bnncc.dialect.plan.Value`."""

    node: str
    order: list[int] | None
    bits: dict[str, Any] | None
    step: float | None


class TensorEntry(TypedDict):
    """See `bnncc.dialect.plan.Tensor`. id is also the position in the list; offset counts bytes in the space."""

    id: int
    name: str
    shape: list[int]
    dtype: str
    space: str
    offset: int
    value: ValueEntry | None


class StepEntry(TypedDict):
    """One kernel call. args: tensor ids, the last `outputs` of them written. exact: must be bit-equal to eager.

    opt_in: "int8", "tf32" or "float16" where it computes a layer that its user opted in to quantize; else null.
    """

    kernel: str
    op: str
    args: list[int]
    outputs: int
    layers: list[str]
    exact: bool
    opt_in: str | None


class LayerEntry(TypedDict):
    """A row of the per-layer table, see `bnncc.dialect.plan.Layer`."""

    path: str
    op: str
    output_shape: list[int]
    activation_bits: int
    weight_bits: int
    macs: int
    weight_bytes: int


class QuantizedEntry(TypedDict):
    """See `bnncc.dialect.plan.QuantizedLayer`."""

    layer: str
    path: str
    low: float | None
    high: float | None
    form: str


class LaunchEntry(TypedDict):
    """One launch of a kernel on a GPU. grid, block: extents (x, y, z). shared_bytes: of dynamic shared memory.

    args: ids of the tensors whose addresses are the kernel's parameters.
    """

    function: str
    grid: list[int]
    block: list[int]
    shared_bytes: int
    args: list[int]


class KernelEntry(TypedDict):
    """What a kernel takes: registers and bytes of local memory (stack, spills) of a thread, bytes of static shared
    memory of a block, and the most threads that a block of it may have."""

    registers: int
    shared_bytes: int
    local_bytes: int
    most_threads: int


class DeviceEntry(TypedDict):
    """The part of a version that runs on a GPU.

    kind: "cuda". sm: the architecture of its machine code, "sm_90"; for later ones there is PTX, which their driver
    compiles. driver: what cuDriverGetVersion must say at least, 13000 for CUDA 13.0. image_bytes, ptx_bytes: sizes of
    both. launches: of every step, the init steps first.
    """

    kind: str
    sm: str
    driver: int
    image_bytes: int
    ptx_bytes: int
    kernels: dict[str, KernelEntry]
    launches: list[list[LaunchEntry]]


class VersionEntry(TypedDict):
    """The model compiled for one target.

    name: the target's. cpu: LLVM's name. features: words of /proc/cpuinfo that must be there. inputs, outputs: the ids
    of the tensors in which the model's inputs and outputs lie. weights_bytes: what it needs, shared or not. device:
    where its steps run on a GPU; null for the CPU.
    """

    name: str
    cpu: str
    features: list[str]
    layers: list[LayerEntry]
    tensors: list[TensorEntry]
    init: list[StepEntry]
    steps: list[StepEntry]
    inputs: list[int]
    outputs: list[int]
    arena_bytes: int
    persistent_bytes: int
    weights_bytes: int
    device: DeviceEntry | None


class Manifest(TypedDict):
    """The whole. prefix: of the C functions' names. target: what the compiler was asked for.

    arch: "x86_64", "aarch64" or "arm". versions: the most demanding first; an instance runs the first whose features
    the machine has. weights: of all versions together, equal ones once. io_alignment: callers' buffers so aligned are
    used in place.

    float_layers: "float32", or by opt-in "int8", "tf32" or "float16"; `quantized` are then the float layers that
    compute with these. What the compiler adds on its own account stands beside these keys.
    """

    format: int
    bnncc: str
    name: str
    prefix: str
    target: str
    arch: str
    inputs: list[PortEntry]
    outputs: list[PortEntry]
    versions: list[VersionEntry]
    float_layers: str
    quantized: list[QuantizedEntry]
    io_alignment: int
    weights_bytes: int
    weights_sha256: str


def version_named(manifest: Manifest, name: str) -> VersionEntry:
    """The version of that name. Raises InputError for any other, with the names that there are."""
    for version in manifest["versions"]:
        if version["name"] == name:
            return version
    names = ", ".join(version["name"] for version in manifest["versions"])
    raise InputError(f"no version '{name}'; the artifact holds {names}")


def to_model_axes(port: PortEntry, array: NDArray[Any]) -> NDArray[Any]:
    """An array in the port's axes, in the model's."""
    return array if port["order"] is None else array.transpose(np.argsort(port["order"]))


def from_model_axes(port: PortEntry, array: NDArray[Any]) -> NDArray[Any]:
    """An array in the model's axes, in the port's; contiguous."""
    return array if port["order"] is None else np.ascontiguousarray(array.transpose(port["order"]))


def model_shape(port: PortEntry) -> tuple[int, ...]:
    """The shape in the model's axes."""
    axes = range(len(port["shape"])) if port["order"] is None else np.argsort(port["order"])
    return tuple(port["shape"][axis] for axis in axes)


def tensor_bytes(shape: list[int] | tuple[int, ...], dtype: str) -> int:
    """Bytes that a contiguous array of this shape and dtype takes."""
    return math.prod(shape) * np.dtype(dtype).itemsize
