"""`bnncc.Artifact`: a compiled network before it is a file. Needs neither torch nor TVM."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bnncc.dialect.plan import QuantizedLayer
from bnncc.runtime.manifest import Manifest
from bnncc.runtime.session import Session
from bnncc.targets.link import Version, build_manifest, link

# What kernels assume of the caller's buffers, in bytes: one float.
_IO_ALIGNMENT = 4


@dataclass(frozen=True)
class Artifact:
    """A compiled network. versions: its plan and its kernels' object code, for each target that `target` stands for.

    float_layers: "float32", or by opt-in "int8", "tf32", "float16"; `quantized` are then the layers that it took.
    tuned: what tuning came to, a line for each version that was tuned.
    """

    name: str
    target: str
    versions: tuple[Version, ...]
    float_layers: str = "float32"
    quantized: tuple[QuantizedLayer, ...] = ()
    tuned: tuple[str, ...] = field(default=(), compare=False)

    @property
    def manifest(self) -> Manifest:
        """What `bnncc.runtime.load(path).manifest` shows: inputs, outputs; of each version layers, steps, memory."""
        return build_manifest(self.versions, _IO_ALIGNMENT, self._opt_in, self.target)

    @property
    def _opt_in(self) -> dict[str, Any]:
        """What the manifest says about float layers."""
        return {"float_layers": self.float_layers, "quantized": [asdict(layer) for layer in self.quantized]}

    def save(self, path: str | Path, header: str | Path | None = None, runner: str | Path | None = None) -> Path:
        """Links the artifact into the shared library `path`; each file appears whole or not at all.

        header: also write the C header of its functions. runner: also link a static executable that runs the network on
        .npy files.
        """
        link(
            self.versions, Path(path), target=self.target,
            header=Path(header) if header else None, runner=Path(runner) if runner else None,
            manifest=self._opt_in, io_alignment=_IO_ALIGNMENT,
        )  # fmt: skip
        return Path(path)

    def load(self, threads: int | None = None, version: str | None = None) -> Session:
        """A session on this machine, through a temporary file; arguments as of `bnncc.runtime.load`.

        Raises UnsupportedMachineError for an artifact of another machine.
        """
        with tempfile.TemporaryDirectory(prefix="bnncc-") as folder:
            return Session(self.save(Path(folder) / f"{self.name}.so"), threads, version=version)
