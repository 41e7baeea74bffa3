"""What arguments of the command line stand for: shapes, names, files of arrays. A mistake in one raises BnnccError."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

import numpy as np

from bnncc.runtime.container import read_manifest
from bnncc.runtime.errors import BnnccError

if TYPE_CHECKING:
    import torch


def examples(shapes: Sequence[str]) -> tuple[torch.Tensor, ...] | None:
    """Zeros of the shapes of `--input-shape`: "1,3,224,224"; None where there are none."""
    import torch  # takes seconds, which the commands that load no model need not wait

    if not shapes:
        return None
    found = []
    for shape in shapes:
        extents = shape.split(",")
        if not all(extent.strip().isdigit() and int(extent) > 0 for extent in extents):
            raise BnnccError(f"--input-shape {shape}: expected numbers with commas between, such as 1,3,224,224")
        found.append(torch.zeros(*map(int, extents)))
    return tuple(found)


def identifier(stem: str) -> str:
    """A C identifier from a file's name."""
    name = "".join(c if c.isascii() and c.isalnum() else "_" for c in stem)
    return name if name[:1].isalpha() else f"model_{name}"


def check_folder(*paths: Path | None) -> None:
    """Raises BnnccError where a file is to be written into a folder that does not exist."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise BnnccError(f"cannot write '{path}': there is no folder '{path.parent}'")


def load_numpy(path: Path, kind: type, example: str) -> Any:
    """What a NumPy file holds, if it is of that kind; without running code from it."""
    try:
        data = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError, BadZipFile) as error:
        raise BnnccError(f"'{path}' cannot be read: {error}; expected the file of {example}") from error
    if not isinstance(data, kind):
        raise BnnccError(f"'{path}' holds something else; expected the file of {example}")
    return data


def load_npz(path: Path, artifact: Path) -> tuple[tuple[np.ndarray, ...], np.ndarray | None]:
    """The inputs in the artifact's order, and the labels if there are any."""
    arrays, labels = load_arrays(path)
    names = [port["name"] for port in read_manifest(artifact)["inputs"]]
    if len(arrays) != len(names):
        raise BnnccError(f"'{path}' holds {', '.join(arrays) or 'no input'}; the inputs are {', '.join(names)}")
    return tuple(arrays[name] for name in (names if set(names) == set(arrays) else arrays)), labels


def load_arrays(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray | None]:
    """The arrays of an .npz file, and its labels if there are any."""
    arrays = dict(load_numpy(path, np.lib.npyio.NpzFile, "numpy.savez(path, x=…, labels=…)"))
    labels = arrays.pop("labels", None)
    return arrays, labels
