"""Reads ELF files as far as linking needs: the machine, the sections, the symbols. Little-endian, 32 and 64 bits."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property

MACHINES = {62: "x86_64", 183: "aarch64", 40: "arm", 190: "cuda"}
"""ELF machine numbers of the architectures that artifacts and their device code are made for."""

_SYMBOL_TABLE, _DYNAMIC_SYMBOLS = 2, 11  # section types
_FILE = 4  # symbol type: the name of a source file


@dataclass(frozen=True)
class Section:
    """offset and size in bytes in the file; link: index of the section that this one refers to."""

    name: str
    kind: int
    offset: int
    size: int
    link: int


@dataclass(frozen=True)
class Symbol:
    """defined: whether this file holds it. index: its place in the table."""

    name: str
    defined: bool
    index: int


class Elf:
    """An ELF file in memory. Raises ValueError for anything else."""

    def __init__(self, data: bytes) -> None:
        if data[:4] != b"\x7fELF" or data[5] != 1:
            raise ValueError("not a little-endian ELF file")
        self._data = data
        self._wide = data[4] == 2

    @property
    def architecture(self) -> str:
        """ "x86_64", "aarch64", "arm", "cuda", or "machine N" for others."""
        (machine,) = struct.unpack_from("<H", self._data, 18)
        return MACHINES.get(machine, f"machine {machine}")

    @cached_property
    def sections(self) -> tuple[Section, ...]:
        (start,) = struct.unpack_from("<Q" if self._wide else "<I", self._data, 0x28 if self._wide else 0x20)
        size, count, names = struct.unpack_from("<HHH", self._data, 0x3A if self._wide else 0x2E)
        layout = struct.Struct("<IIQQQQII" if self._wide else "<IIIIIIII")
        raw = [layout.unpack_from(self._data, start + i * size) for i in range(count)]
        strings = raw[names][4]
        return tuple(
            Section(self._string(strings + name), kind, offset, length, link)
            for name, kind, _flags, _address, offset, length, link, _info in raw
        )

    def section(self, name: str) -> Section:
        """The section of this name. Raises KeyError."""
        for section in self.sections:
            if section.name == name:
                return section
        raise KeyError(name)

    @property
    def symbols(self) -> tuple[Symbol, ...]:
        """All named symbols of the symbol table, in its order."""
        return self._symbols(_SYMBOL_TABLE)

    @property
    def exported(self) -> tuple[Symbol, ...]:
        """What a shared library offers to others."""
        return tuple(symbol for symbol in self._symbols(_DYNAMIC_SYMBOLS) if symbol.defined)

    def _symbols(self, kind: int) -> tuple[Symbol, ...]:
        found = []
        layout = struct.Struct("<IBBHQQ" if self._wide else "<IIIBBH")
        for table in self.sections:
            if table.kind != kind:
                continue
            strings = self.sections[table.link].offset
            for index, at in enumerate(range(table.offset, table.offset + table.size, layout.size)):
                fields = layout.unpack_from(self._data, at)
                info, section = (fields[1], fields[3]) if self._wide else (fields[3], fields[5])
                if fields[0] and info & 0xF != _FILE:
                    found.append(Symbol(self._string(strings + fields[0]), section != 0, index))
        return tuple(found)

    def _string(self, offset: int) -> str:
        return self._data[offset : self._data.index(b"\0", offset)].decode()
