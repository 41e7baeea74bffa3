"""What `python -m benchmarks.cuda build` writes and a machine with a GPU reads: one compressed file in a folder.

Inside are artifacts, cubins, expectations and the sources of float twins, with `index.json`, which says what is what.
The same weights are in the artifacts of every batch, and the compression sees that. Reading needs the standard library
alone.
"""

from __future__ import annotations

import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FORMAT = 1
INDEX, BUNDLE = "index.json", "bundle.tar.xz"

#: Bytes that the folder may have: what can be carried to a machine with a GPU in one go.
MOST_BYTES = 64 << 20

# A window that holds an artifact and the one before it, which is of the same network: files are sorted by name.
_FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "dict_size": 24 << 20}]


class FolderError(Exception):
    """A folder that cannot be used, in one line."""


def pack(files: Path, folder: Path) -> int:
    """Writes the files, `INDEX` among them, into `folder`; returns the bytes. Equal files give an equal bundle.

    Raises FolderError for more than `MOST_BYTES`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / BUNDLE
    with (
        lzma.open(target, "wb", format=lzma.FORMAT_XZ, filters=_FILTERS) as compressed,
        tarfile.open(fileobj=compressed, mode="w", format=tarfile.USTAR_FORMAT) as archive,
    ):
        for path in sorted(files.iterdir()):
            entry = tarfile.TarInfo(path.name)  # nothing of when and by whom
            entry.size, entry.mode = path.stat().st_size, 0o644
            archive.addfile(entry, io.BytesIO(path.read_bytes()))
    size = target.stat().st_size
    if size > MOST_BYTES:
        target.unlink()
        raise FolderError(f"{target} would take {size} bytes, more than {MOST_BYTES}: build less with --only")
    return size


@contextmanager
def opened(folder: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The unpacked files, which go when the context ends, and the index. Raises FolderError."""
    bundle = folder / BUNDLE
    if not bundle.is_file():
        raise FolderError(f"{folder} has no {BUNDLE}: make it with python -m benchmarks.cuda build {folder}")
    with tempfile.TemporaryDirectory(prefix="bnncc-gpu-") as name:
        files = Path(name)
        try:
            with tarfile.open(bundle, "r:xz") as archive:
                archive.extractall(files, filter="data")
            index: dict[str, Any] = json.loads((files / INDEX).read_text(encoding="utf-8"))
        except (tarfile.TarError, lzma.LZMAError, EOFError, OSError, ValueError) as error:
            raise FolderError(f"{bundle} cannot be read ({error}): build it again") from None
        if index.get("format") != FORMAT:
            raise FolderError(f"{bundle} has format {index.get('format')}, this bnncc reads {FORMAT}: build it again")
        yield files, index
