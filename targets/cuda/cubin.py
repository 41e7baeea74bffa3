"""What the kernels of a cubin take, read from its ELF sections; no driver and no tool of NVIDIA's is needed.

A kernel ``f`` has ``.text.f``, ``.nv.info.f`` with its attributes, and ``.nv.shared.f``, as long as its static shared
memory; ``.nv.info`` holds the attributes that name a function by its symbol. The format is undocumented; the numbers
below are those that ``cuobjdump -elf`` prints, and tests compare all of them with what ptxas reports.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator

from bnncc.targets.elf import Elf, Section
from bnncc.targets.launch import Resources

from .descriptor import WARP
from .occupancy import MOST_THREADS, warps_by_registers

# How an attribute's value is stored: nothing, a byte, two bytes (all three in its own four bytes), or that many bytes.
_SIZED = 4
_FORMATS = (1, 2, 3, _SIZED)

# Attributes of a kernel: the bounds of __launch_bounds__, and threads that are required.
_MAX_THREADS, _REQUIRED_THREADS = 0x05, 0x10
# Attributes of a symbol: bytes of its own stack frame, spills included, and of the deepest stack below it; registers.
_FRAME_SIZE, _STACK_SIZE, _REGISTERS = 0x11, 0x12, 0x2F

# Architectures from sm_90 on keep the first kilobyte of a block's shared memory, and count it into every kernel's.
_RESERVED_SECTION, _RESERVED = ".nv.shared.reserved.0", 1024


def resources(cubin: bytes) -> dict[str, Resources]:
    """Of every kernel of a cubin, by name. Raises ValueError where it is none, or damaged."""
    try:
        elf = Elf(cubin)
        if elf.architecture != "cuda":
            raise ValueError(f"for {elf.architecture}, not for a GPU")
        return _kernels(cubin, elf)
    except (ValueError, LookupError, struct.error) as error:
        raise ValueError(f"not a cubin that can be read: {error}") from error


def least_driver(ptx: bytes) -> int:
    """What cuDriverGetVersion must say at least for the cubin made together with this PTX: 12000 for 12.0.

    A driver runs the machine code of all compilers of its own major version (CUDA's "minor version compatibility").
    Raises ValueError where the compiler did not name itself.
    """
    match = re.search(rb"^// Cuda compilation tools, release (\d+)\.", ptx, re.M)
    if not match:
        raise ValueError("the PTX does not say which CUDA made it")
    return 1000 * int(match[1])


def _kernels(cubin: bytes, elf: Elf) -> dict[str, Resources]:
    sections = {section.name: section for section in elf.sections}
    names = {symbol.index: symbol.name for symbol in elf.symbols}
    of_symbols: dict[tuple[int, str], int] = {}
    for attribute, value in _attributes(cubin, sections[".nv.info"]):
        if attribute in (_FRAME_SIZE, _STACK_SIZE, _REGISTERS):
            symbol, number = struct.unpack("<II", value)
            of_symbols[attribute, names[symbol]] = number
    reserved = _RESERVED if _RESERVED_SECTION in sections else 0
    found = {}
    for name, info in sections.items():
        kernel = name.removeprefix(".nv.info.")
        if kernel == name or f".text.{kernel}" not in sections:
            continue
        registers = of_symbols[_REGISTERS, kernel]
        shared = sections.get(f".nv.shared.{kernel}")
        found[kernel] = Resources(
            registers=registers,
            shared_bytes=shared.size - reserved if shared else 0,
            local_bytes=max(of_symbols[_FRAME_SIZE, kernel], of_symbols.get((_STACK_SIZE, kernel), 0)),
            most_threads=_most_threads(registers, dict(_attributes(cubin, info))),
        )
    return found


def _most_threads(registers: int, attributes: dict[int, bytes]) -> int:
    most = min(MOST_THREADS, WARP * warps_by_registers(registers))
    for attribute in (_MAX_THREADS, _REQUIRED_THREADS):
        if attribute in attributes:
            x, y, z = struct.unpack("<III", attributes[attribute])
            most = min(most, x * y * z)
    return most


def _attributes(cubin: bytes, section: Section) -> Iterator[tuple[int, bytes]]:
    """(number, value) of every attribute of a section; the value is empty where it is not stored apart."""
    at, end = section.offset, section.offset + section.size
    while at < end:
        form, attribute, size = struct.unpack_from("<BBH", cubin, at)
        at += 4
        if form not in _FORMATS:
            raise ValueError(f"{section.name} holds an attribute of an unknown format, {form}")
        if form != _SIZED:
            yield attribute, b""
            continue
        if at + size > end:
            raise ValueError(f"{section.name} is cut off")
        yield attribute, cubin[at : at + size]
        at += size
