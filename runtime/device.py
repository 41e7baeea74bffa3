"""Devices: places where an artifact runs, all with one interface, for validating and timing it there.

"local" loads the artifact into this process; so do "cuda" and "cuda:1", which choose a GPU. "qemu" runs its runner, the
static executable that `bnncc compile -o model.so --runner model-run` builds, under qemu-user. The runner of
`DIR/NAME.so` is `DIR/NAME-run` (`runner_path`); that it belongs to the artifact is checked by comparing the manifests.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.typing import ArrayLike

from bnncc.runtime.container import read_manifest
from bnncc.runtime.errors import DeviceError, ExecutionError, InputError
from bnncc.runtime.manifest import Manifest, VersionEntry, tensor_bytes, version_named
from bnncc.runtime.session import Array, Session, check_inputs

DEVICES = ("local", "cuda:N", "qemu")


class Device(ABC):
    """An instance of an artifact somewhere. Tensor ids and step numbers are those of `version`, which runs there."""

    manifest: Manifest
    version: VersionEntry

    @abstractmethod
    def write(self, tensor: int, array: Array) -> None:
        """Stores an array of the tensor's bytes. Raises InputError for an unknown id, a constant, or a wrong size."""

    @abstractmethod
    def read(self, tensor: int) -> Array:
        """A copy of the tensor. Raises InputError for an unknown id."""

    @abstractmethod
    def run_steps(self, first: int, count: int) -> None:
        """Runs some steps on what was written and computed before. Raises ExecutionError."""

    @abstractmethod
    def bench(self, runs: int) -> list[float]:
        """Seconds of each run; of an emulator they say nothing about the machine it emulates."""

    @abstractmethod
    def set_threads(self, threads: int | None) -> None:
        """Changes how many threads compute; None for one per physical core."""

    @abstractmethod
    def close(self) -> None:
        """Ends it; may be called again."""

    def run(self, inputs: Sequence[ArrayLike]) -> list[Array]:
        """Runs the whole model; inputs and outputs in the manifest's order. Raises InputError, ExecutionError."""
        for tensor, array in zip(self.version["inputs"], check_inputs(self.manifest["inputs"], inputs), strict=True):
            self.write(tensor, array)
        self.run_steps(0, len(self.version["steps"]))
        return [self.read(tensor) for tensor in self.version["outputs"]]

    def __enter__(self) -> Device:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_device(artifact: str | os.PathLike[str], device: str = "local", threads: int | None = None) -> Device:
    """Opens an artifact on a device: "local", "cuda" or "cuda:N", "qemu".

    Raises:
        DeviceError: the device is unknown, or something it needs is missing.
        ArtifactError, UnsupportedMachineError, InputError, ExecutionError: as `bnncc.runtime.load`.
    """
    if device == "local":
        return LocalDevice(artifact, threads)
    if device.partition(":")[0] == "cuda":
        return LocalDevice(artifact, threads, device)
    if device == "qemu":
        manifest = read_manifest(artifact)
        return RunnerDevice([_emulator(manifest), str(_runner(artifact))], manifest, threads)
    raise DeviceError(f"unknown device '{device}'; devices are {', '.join(DEVICES)}")


def runner_path(artifact: str | os.PathLike[str]) -> Path:
    """Where an artifact's runner is kept: `model.so` -> `model-run` in the same folder."""
    path = Path(artifact)
    return path.with_name(f"{path.name.removesuffix('.so')}-run")


class LocalDevice(Device):
    """The artifact in this process. device: as for `bnncc.runtime.load`."""

    def __init__(self, artifact: str | os.PathLike[str], threads: int | None = None, device: str | None = None) -> None:
        self.session = Session(artifact, threads, device)
        self.manifest, self.version = self.session.manifest, self.session.version

    def write(self, tensor: int, array: Array) -> None:
        self.session.write(tensor, array)

    def read(self, tensor: int) -> Array:
        return self.session.read(tensor)

    def run_steps(self, first: int, count: int) -> None:
        self.session.run_steps(first, count)

    def run(self, inputs: Sequence[ArrayLike]) -> list[Array]:
        outputs = self.session(*inputs)  # in the caller's buffers, as users run it
        return list(outputs) if isinstance(outputs, tuple) else [outputs]

    def bench(self, runs: int) -> list[float]:
        return self.session.bench(runs)

    def set_threads(self, threads: int | None) -> None:
        self.session.set_threads(threads)

    def close(self) -> None:
        self.session.close()


class RunnerDevice(Device):
    """A runner started by some command, spoken to through its standard streams; runtime/c/serve.h is the protocol."""

    _QUIT, _MANIFEST, _WRITE, _READ, _RUN_STEPS, _BENCH, _THREADS, _VERSION = range(8)
    _REQUEST, _REPLY = struct.Struct("<IiiI"), struct.Struct("<II")

    def __init__(self, command: list[str], manifest: Manifest, threads: int | None = None) -> None:
        """command: what starts the runner, without --serve. manifest: of the artifact it must belong to."""
        self.manifest = manifest
        self._command = command
        try:
            self._process = subprocess.Popen(
                [*command, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise DeviceError(f"{command[0]}: cannot be started: {error.strerror}") from None
        try:
            self._check_manifest()
            self.version = version_named(manifest, self._ask(self._VERSION).decode())
            self.set_threads(threads)
        except BaseException:
            self.close()
            raise

    def write(self, tensor: int, array: Array) -> None:
        self._known(tensor)
        try:
            self._ask(self._WRITE, tensor, data=np.ascontiguousarray(array).tobytes())
        except ExecutionError as error:  # the runner refuses constants and wrong sizes
            raise InputError(str(error)) from None

    def read(self, tensor: int) -> Array:
        entry = self.version["tensors"][self._known(tensor)]
        data = self._ask(self._READ, tensor)
        if len(data) != tensor_bytes(entry["shape"], entry["dtype"]):
            raise DeviceError(f"{self._command[-1]} sent {len(data)} bytes for tensor {tensor}")
        return np.frombuffer(data, entry["dtype"]).reshape(entry["shape"]).copy()

    def run_steps(self, first: int, count: int) -> None:
        self._ask(self._RUN_STEPS, first, count)

    def bench(self, runs: int) -> list[float]:
        if runs < 1:
            raise InputError(f"runs must be 1 or more; {runs} was given")
        self._ask(self._RUN_STEPS, 0, len(self.version["steps"]))  # warms up
        return list(np.frombuffer(self._ask(self._BENCH, 0, runs), "<f8").tolist())

    def set_threads(self, threads: int | None) -> None:
        if threads is not None and threads < 1:
            raise InputError(f"threads must be 1 or more, or None for one per physical core; {threads} was given")
        self._ask(self._THREADS, threads or 0)

    def close(self) -> None:
        streams = (self._process.stdin, self._process.stdout, self._process.stderr)
        for stream in streams[:2]:  # at the end of its input the runner ends by itself
            if stream:
                _close_quietly(stream)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if streams[2]:
            _close_quietly(streams[2])

    def _known(self, tensor: int) -> int:
        if not 0 <= tensor < len(self.version["tensors"]):
            raise InputError(f"no tensor {tensor}; the model has {len(self.version['tensors'])}")
        return tensor

    def _check_manifest(self) -> None:
        if json.loads(self._ask(self._MANIFEST)) != self.manifest:
            raise DeviceError(
                f"{self._command[-1]} is the runner of another artifact; compile both in one command with --runner"
            )

    def _ask(self, operation: int, first: int = 0, count: int = 0, data: bytes = b"") -> bytes:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None or stdin.closed:
            raise DeviceError(f"the session with {self._command[-1]} is closed")
        try:
            stdin.write(self._REQUEST.pack(operation, first, count, len(data)))
            stdin.write(data)
            stdin.flush()
        except OSError:
            raise self._died() from None
        head = stdout.read(self._REPLY.size)
        if len(head) < self._REPLY.size:
            raise self._died()
        failed, length = self._REPLY.unpack(head)
        reply = stdout.read(length)
        if len(reply) < length:
            raise self._died()
        if failed:
            raise ExecutionError(reply.decode(errors="replace"))
        return reply

    def _died(self) -> DeviceError:
        code = self._process.wait()
        words = self._process.stderr.read().decode(errors="replace").split("\n") if self._process.stderr else []
        said = next((line for line in reversed(words) if line.strip()), "")
        name = " ".join(self._command)
        if -code == signal.SIGILL:
            return DeviceError(
                f"{name} met an instruction that the emulated CPU lacks, as qemu does AVX-512; "
                f"compile for a smaller target than {self.manifest['target']}"
            )
        why = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        return DeviceError(f"{name} {why}{': ' + said.strip() if said else ''}")


def _emulator(manifest: Manifest) -> str:
    name = f"qemu-{manifest['arch']}"
    path = shutil.which(name) or shutil.which(f"{name}-static")
    if path is None:
        raise DeviceError(f"device qemu needs {name}, which is not installed; on Debian: apt install qemu-user")
    return path


def _runner(artifact: str | os.PathLike[str]) -> Path:
    path = runner_path(artifact)
    if not path.is_file():
        raise DeviceError(
            f"device qemu needs the runner {path}, which is missing; "
            f"compile with --runner {path.name} beside {Path(artifact).name}"
        )
    return path


def _close_quietly(stream: IO[bytes]) -> None:
    with contextlib.suppress(OSError):  # a pipe whose reader is gone
        stream.close()
