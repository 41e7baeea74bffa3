"""Larq Compute Engine as a peer: in a virtual environment of its own under build/, made on first use.

Its wheel needs Python 3.11 and another NumPy, TensorFlow and protobuf than bnncc's, so it runs in `lce_worker.py`.
Where it cannot be installed, `start` says so in one line and the other peers are measured without it.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BUILD = Path(__file__).parent.parent / "build"
VENV = BUILD / "lce-venv"
MODELS = BUILD / "lce-models"
#: larq-zoo brings larq; both need Keras 2, which TensorFlow calls tf_keras since its 2.16.
REQUIREMENTS = (
    "larq-compute-engine==0.16.0", "larq-zoo==2.4.0", "larq==0.14.0", "tensorflow-cpu==2.19.1", "tf_keras==2.19.0",
    "setuptools<81",
)  # fmt: skip

#: What a user can choose; "best" is the fastest of them.
OPTIONS: dict[str, dict[str, bool]] = {
    "LCE default": {},
    "LCE indirect": {"use_indirect_bgemm": True},
    "LCE indirect, XNNPACK": {"use_indirect_bgemm": True, "use_xnnpack": True},
}


class Unavailable(Exception):
    """LCE cannot be measured here; the message is one line."""


@dataclass(frozen=True)
class Runner:
    """A model in the worker, as a contender of `benchmarks.timing`."""

    worker: Worker
    index: int

    def burst(self, seconds: float) -> list[float]:
        return list(self.worker.ask(run=self.index, seconds=seconds)["times"])


class Worker:
    """The process that runs LCE."""

    def __init__(self, python: Path) -> None:
        MODELS.mkdir(parents=True, exist_ok=True)
        self._log = (BUILD / "lce.log").open("w")
        self._process = subprocess.Popen(
            [python, Path(__file__).with_name("lce_worker.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True,
        )  # fmt: skip

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request. Raises Unavailable with the worker's reason."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise Unavailable(f"Larq Compute Engine's process ended; see {self._log.name}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer

    def convert(self, model: str) -> Path:
        """The file of a model, which is built and converted if it is not there; see `lce_worker` for its name."""
        file = MODELS / f"{model}.tflite"
        self.ask(model=model, file=str(file))
        return file

    def runners(self, model: str) -> dict[str, Runner]:
        """The model under every option."""
        file = self.convert(model)
        return {
            name: Runner(self, self.ask(load=str(file), options=options)["loaded"]) for name, options in OPTIONS.items()
        }

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._log.close()


def start() -> Worker:
    """The worker. Raises Unavailable."""
    return Worker(install())


@functools.cache
def install() -> Path:
    """The Python of the virtual environment, which is made if it is not there as asked for. Raises Unavailable."""
    python, stamp = VENV / "bin" / "python", VENV / "installed.txt"
    wanted = "\n".join(REQUIREMENTS)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    base = shutil.which("python3.11")
    if base is None:
        raise Unavailable("Larq Compute Engine needs python3.11, which is not on the PATH")
    shutil.rmtree(VENV, ignore_errors=True)
    for command in (
        [base, "-m", "venv", str(VENV)],
        [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *REQUIREMENTS],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            reasons = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no reason given"]
            raise Unavailable(f"Larq Compute Engine cannot be installed: {reasons[0]}")
    stamp.write_text(wanted)
    return python
