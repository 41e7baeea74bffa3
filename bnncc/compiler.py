"""`bnncc.compile`: from a PyTorch or ONNX model to an artifact."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tvm import IRModule

from bnncc.dialect.plan import Plan
from bnncc.frontends.torch import Imported, export_model, to_relax
from bnncc.models import is_onnx
from bnncc.passes import pipeline
from bnncc.runtime.errors import BnnccError
from bnncc.runtime.manifest import Manifest
from bnncc.runtime.session import Session
from bnncc.targets.descriptor import TargetSpec, get_target
from bnncc.targets.emit import compile_kernels
from bnncc.targets.link import build_manifest, link

Progress = Callable[[str, int, int], None]

# What kernels assume of the caller's buffers, in bytes: one float.
_IO_ALIGNMENT = 4


CHANNELS_LAST = ("none", "inputs", "outputs", "both")
"""Values of `Options.channels_last`."""


@dataclass(frozen=True)
class Options:
    """How to compile.

    dump_ir: folder for the module after every pass, one file each; made if it is missing.
    channels_last: which images the artifact takes or gives as N, …, C (NHWC) instead of PyTorch's N, C, …: "inputs",
        "outputs", "both" or "none". Saves their transposition where the caller has them so. Shapes given to `compile`,
        and the tensors given to `validate`, stay in the model's axes.
    """

    dump_ir: Path | None = None
    channels_last: str = "none"

    def __post_init__(self) -> None:
        if self.channels_last not in CHANNELS_LAST:
            raise BnnccError(f"channels_last is one of {', '.join(CHANNELS_LAST)}; {self.channels_last!r} was given")


@dataclass(frozen=True)
class Artifact:
    """A compiled network: its plan and its kernels' object code for one target."""

    plan: Plan
    target: TargetSpec
    objects: tuple[bytes, ...]

    @property
    def manifest(self) -> Manifest:
        """What `bnncc.runtime.load(path).manifest` shows: inputs, outputs, layers, steps, memory, target."""
        return build_manifest(self.plan, self.target, _IO_ALIGNMENT, {})

    def save(self, path: str | Path, header: str | Path | None = None, runner: str | Path | None = None) -> Path:
        """Links the artifact into the shared library `path`; each file appears whole or not at all.

        header: also write the C header of its functions. runner: also link a static executable that runs the network on
        .npy files.
        """
        link(
            self.plan, self.objects, self.target, Path(path),
            header=Path(header) if header else None, runner=Path(runner) if runner else None,
            io_alignment=_IO_ALIGNMENT,
        )  # fmt: skip
        return Path(path)

    def load(self, threads: int | None = None) -> Session:
        """A session on this machine, through a temporary file.

        Raises UnsupportedMachineError for an artifact of another machine.
        """
        with tempfile.TemporaryDirectory(prefix="bnncc-") as folder:
            return Session(self.save(Path(folder) / f"{self.plan.name}.so"), threads)


def compile(
    model: torch.nn.Module | torch.export.ExportedProgram | Any,
    example_inputs: Sequence[torch.Tensor] | torch.Tensor | None = None,
    target: str | TargetSpec = "native",
    *,
    name: str = "model",
    options: Options | None = None,
    progress: Progress | None = None,
) -> Artifact:
    """Compiles a model for a target.

    Args:
        model: a module in evaluation mode, an exported program, an `onnx.ModelProto` or the path of an `.onnx` file.
        example_inputs: tensors of the shapes and dtypes that the artifact will take; not needed for an exported
            program. Of an ONNX model they fix the shapes it leaves open; without them its batch becomes 1.
        target: a name from `bnncc targets`, or a processor name such as "znver4".
        name: of the model, a C identifier: the prefix of the artifact's C functions.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        BnnccError: one line that says what cannot be compiled, and where in the model.
    """
    options = options or Options()
    spec = get_target(target)
    report = progress or (lambda stage, done, total: None)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise BnnccError(f"the model's name {name!r} is no C identifier: use letters, digits and underscores")
    report("trace", 0, 1)
    imported = import_model(model, example_inputs)
    dump = _Dump(options.dump_ir) if options.dump_ir else None
    lowered = pipeline.run(imported.mod, spec, dump, report, options.channels_last)
    plan = pipeline.plan_memory(lowered, name)
    kernels = IRModule({gvar: func for gvar, func in lowered.functions_items() if gvar.name_hint != "main"})
    report("generate code", 0, 1)
    code = compile_kernels(kernels, spec)
    report("generate code", 1, 1)
    return Artifact(plan, spec, (code,))


def import_model(model: Any, example_inputs: Sequence[torch.Tensor] | torch.Tensor | None) -> Imported:
    """Any model that `compile` takes, in Relax."""
    if not is_onnx(model):
        return to_relax(export_model(model, example_inputs))
    from bnncc.frontends import onnx

    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    return onnx.to_relax(model, None if example_inputs is None else [tuple(t.shape) for t in example_inputs])


class _Dump:
    """Writes `NN_pass.py` for every pass: TVMScript, each line with the module of the user's model it stems from."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.count = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BnnccError(f"cannot write the IR to {folder}: {error.strerror}") from error

    def __call__(self, stage: str, mod: IRModule) -> None:
        path = self.folder / f"{self.count:02}_{stage}.py"
        path.write_text(pipeline.readable(mod), encoding="utf-8")
        self.count += 1
