"""What was built for the GPU, and the same networks on the CPU beside it, as what the GPU is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest

from benchmarks.cuda_inputs import awkward
from bnncc.runtime.errors import BnnccError
from bnncc.runtime.manifest import VersionEntry
from bnncc.runtime.session import Session
from bnncc.runtime.values import StoredValue

T = TypeVar("T")


@dataclass(frozen=True)
class Built:
    """The unpacked files, and the index that `benchmarks.cuda_build` describes."""

    files: Path
    index: dict[str, Any]

    def section(self, *keys: str) -> Any:
        """A part of the index; the test is skipped where only other parts were built."""
        entry: Any = self.index
        for key in keys:
            if key not in entry:
                pytest.skip(f"{'/'.join(keys)} was not built: leave out --only")
            entry = entry[key]
        return entry

    def path(self, name: str) -> Path:
        return self.files / name

    def expected(self, entry: dict[str, Any]) -> list[np.ndarray]:
        """What eager PyTorch computed of `inputs`."""
        with np.load(self.path(entry["expected"])) as arrays:
            return [arrays[f"arr_{i}"] for i in range(len(arrays.files))]

    def inputs(self, entry: dict[str, Any]) -> list[np.ndarray]:
        return [awkward(shape, seed) for seed, shape in enumerate(entry["shapes"])]


def as_tuple(outputs: Any) -> tuple[np.ndarray, ...]:
    """What a session returns, for one output as for several."""
    return outputs if isinstance(outputs, tuple) else (outputs,)


class OnTheCpu:
    """The reference of a parity check (`bnncc.runtime.parity.Reference`): the artifact of the same network for a CPU,
    which tests elsewhere hold to eager PyTorch. It takes one sample at a time, whatever the GPU's batch, and each that
    differs once."""

    def __init__(self, path: Path) -> None:
        self.session = Session(path)
        tensors = self.session.version["tensors"]
        self._stored = {value.id: value for value in map(StoredValue.of, tensors) if value is not None}
        self._renamed = _renamed(self.session.version)

    def __enter__(self) -> OnTheCpu:
        return self

    def __exit__(self, *reason: object) -> None:
        self.session.close()

    def outputs(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        samples = _each_once(inputs, lambda sample: as_tuple(self.session(*sample)))
        return [np.concatenate(parts) for parts in zip(*samples, strict=True)]

    def values(self, inputs: Sequence[np.ndarray], nodes: set[str]) -> dict[str, np.ndarray]:
        samples = _each_once(inputs, self._values)
        if lacking := nodes - samples[0].keys():
            raise BnnccError(f"the CPU's artifact has no values {', '.join(sorted(lacking))}")
        return {node: np.concatenate([sample[node] for sample in samples]) for node in nodes}

    def _values(self, sample: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """Every value of the network, read as soon as a step has made it, or just before a step reads it."""
        version = self.session.version
        for tensor, array in zip(version["inputs"], sample, strict=True):
            self.session.write(tensor, array)
        found: dict[str, np.ndarray] = {}
        for index, step in enumerate(version["steps"]):
            made = len(step["args"]) - step["outputs"]
            self._read(step["args"][:made], found)
            self.session.run_steps(index, 1)
            self._read(step["args"][made:], found)
        self._read(version["outputs"], found)
        return found

    def _read(self, tensors: Sequence[int], found: dict[str, np.ndarray]) -> None:
        for id_ in (same for tensor in tensors for same in (tensor, *self._renamed.get(tensor, ()))):
            value = self._stored.get(id_)
            if value is not None and value.node not in found:
                decoded = value.decode(self.session.read(id_))
                found[value.node] = decoded if value.order is None else decoded.transpose(np.argsort(value.order))


def _renamed(version: VersionEntry) -> dict[int, list[int]]:
    """Tensors that no step names, by the one that they are a reshape of: the last one before them in that memory."""
    named = {id_ for step in version["steps"] for id_ in step["args"]}
    last: dict[tuple[str, int], int] = {}
    found: dict[int, list[int]] = {}
    for tensor in sorted(version["tensors"], key=lambda tensor: tensor["id"]):
        place = tensor["space"], tensor["offset"]
        if tensor["id"] in named:
            last[place] = tensor["id"]
        elif place in last:
            found.setdefault(last[place], []).append(tensor["id"])
    return found


def _each_once(inputs: Sequence[np.ndarray], compute: Callable[[list[np.ndarray]], T]) -> list[T]:
    """What is computed of each sample of a batch, of equal ones once."""
    found: dict[tuple[bytes, ...], T] = {}
    keys = []
    for i in range(len(inputs[0])):
        sample = [array[i : i + 1] for array in inputs]
        keys.append(tuple(array.tobytes() for array in sample))
        if keys[-1] not in found:
            found[keys[-1]] = compute(sample)
    return [found[key] for key in keys]
