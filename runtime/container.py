"""The artifact's file: an ELF shared library with 64 bytes at its end that make it checkable without executing it.

    offset from the end   field
    -64                   uint32  format version (`manifest.FORMAT`)
    -60                   uint32  0
    -56                   uint64  where the manifest's JSON lies in the file
    -48                   uint64  bytes of it
    -40                   8 bytes b"BNNCCart"
    -32                   SHA-256 of everything before it

The last 40 bytes keep their meaning in every format version, so that altered files are told from newer ones.
The loader of the system ignores what follows the ELF image; tools that rewrite the library (strip, patchelf)
remove or invalidate the trailer, and the artifact is then refused as altered.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from bnncc.runtime.errors import ArtifactError
from bnncc.runtime.manifest import FORMAT, Manifest

_TRAILER = struct.Struct("<IIQQ8s32s")
_MAGIC = b"BNNCCart"
_DIGEST_BYTES = 32
_BLOCK = 1 << 20


def seal(image: bytes, manifest_offset: int, manifest_bytes: int, version: int = FORMAT) -> bytes:
    """The ELF image with its trailer appended."""
    head = _TRAILER.pack(version, 0, manifest_offset, manifest_bytes, _MAGIC, bytes(_DIGEST_BYTES))[:-_DIGEST_BYTES]
    return image + head + hashlib.sha256(image + head).digest()


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[int]:
    """A file descriptor for reading the artifact. Raises ArtifactError with one line when it cannot be had."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file") from None
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be opened: {error.strerror}") from None
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def check(descriptor: int, path: str | os.PathLike[str]) -> tuple[Manifest, str]:
    """Checks the whole file and returns its manifest and its digest (hexadecimal).

    Raises:
        ArtifactError: the file is no artifact, is truncated or altered, or has another format version.
    """
    try:
        size = os.fstat(descriptor).st_size
        head = os.pread(descriptor, 64, 0)
        trailer = os.pread(descriptor, _TRAILER.size, max(0, size - _TRAILER.size))
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be read: {error.strerror}") from None
    if not head:
        raise ArtifactError(f"{path}: the file is empty")
    if not head.startswith(b"\x7fELF"):
        raise ArtifactError(f"{path}: not a bnncc artifact (a shared library written by bnncc compile is expected)")
    if trailer[-len(_MAGIC) - _DIGEST_BYTES : -_DIGEST_BYTES] != _MAGIC:
        promised = _elf_bytes(head)
        if size < promised:
            raise ArtifactError(f"{path}: truncated: {size} bytes, its headers promise {promised}; copy it again")
        raise ArtifactError(f"{path}: no bnncc artifact, or truncated: it does not end as one; copy it again")
    version, _, offset, length, _, digest = _TRAILER.unpack(trailer)
    if _digest(descriptor, size - _DIGEST_BYTES) != digest:
        raise ArtifactError(f"{path}: altered: its content does not match its SHA-256; copy or compile it again")
    if version != FORMAT:
        raise ArtifactError(
            f"{path}: artifact format {version}, this bnncc reads format {FORMAT}; "
            + ("install a newer bnncc" if version > FORMAT else "compile the model again")
        )
    manifest = json.loads(os.pread(descriptor, length, offset))
    return cast(Manifest, manifest), digest.hex()


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of an artifact for any machine; the file is checked, nothing of it is executed.

    Raises:
        ArtifactError: see `check`.
    """
    with opened(path) as descriptor:
        return check(descriptor, path)[0]


def write_whole(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Writes a file so that it appears whole or not at all, also over an older one that is in use.

    mode: permission bits before the umask. Raises ArtifactError when the place cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ArtifactError(f"{path}: cannot be written: {error.strerror}") from None


def _elf_bytes(head: bytes) -> int:
    """Where the ELF image ends: its section headers come last. 0 when the header itself is cut off."""
    layout: tuple[Any, ...] = ("<Q", 0x28, 0x3A) if head[4:5] == b"\x02" else ("<I", 0x20, 0x2E)
    try:
        (start,) = struct.unpack_from(layout[0], head, layout[1])
        entry, count = struct.unpack_from("<HH", head, layout[2])
    except struct.error:
        return len(head) + 1
    return int(start + entry * count)


def _digest(descriptor: int, length: int) -> bytes:
    state, at = hashlib.sha256(), 0
    while at < length and (block := os.pread(descriptor, min(_BLOCK, length - at), at)):
        state.update(block)
        at += len(block)
    return state.digest()
