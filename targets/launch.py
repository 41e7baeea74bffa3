"""What the linker of an artifact gets for a GPU: one module of device code, and the launches that each step is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel. grid, block: extents (x, y, z).

    function: the kernel's name in the module. shared_bytes: of dynamic shared memory.
    args: ids of the plan's tensors, in the order of the kernel's parameters, all of which are pointers.
    """

    function: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared_bytes: int
    args: tuple[int, ...]


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers and bytes of local memory (stack and spills) of a thread, bytes of static shared
    memory of a block, and the most threads that a block of it may have."""

    registers: int
    shared_bytes: int
    local_bytes: int
    most_threads: int


@dataclass(frozen=True)
class DeviceCode:
    """The device's part of a version.

    sm: the architecture that `image`, a cubin, is for: "sm_90". ptx: the same for the driver to compile where the
    architecture is a later one. launches: of every step, the plan's init steps first. resources: of each kernel.
    """

    sm: str
    image: bytes
    ptx: bytes
    launches: tuple[tuple[Launch, ...], ...]
    resources: dict[str, Resources]
