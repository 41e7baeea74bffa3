"""`bnncc.compile`: from a PyTorch or ONNX model to an artifact."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tvm import IRModule

from bnncc import cache
from bnncc.artifact import Artifact
from bnncc.calibration import calibrate, rounded_layers
from bnncc.dialect.plan import QuantizedLayer
from bnncc.frontends.imported import Imported
from bnncc.frontends.torch import export_model, to_relax
from bnncc.models import is_onnx
from bnncc.passes import pipeline
from bnncc.passes.lower_float import ROUNDED_CHANNELS
from bnncc.runtime.errors import BnnccError
from bnncc.targets import search, tuning
from bnncc.targets.cuda.descriptor import CudaSpec
from bnncc.targets.descriptor import AnyTarget, TargetSpec, get_targets
from bnncc.targets.emit import compile_kernels
from bnncc.targets.link import Version

Progress = Callable[[str, int, int], None]

CHANNELS_LAST = ("none", "inputs", "outputs", "both")
"""Values of `Options.channels_last`."""

FLOAT_LAYERS = ("float32", "int8", "tf32", "float16")
"""Values of `Options.float_layers`."""


@dataclass(frozen=True)
class Options:
    """How to compile.

    dump_ir: folder for the module after every pass, one file each; made if it is missing. Of a target that stands for
        several, each has its own folder in there.
    cache: take what the compile cache (`bnncc.cache`) holds of the same model for the same target, and keep the result
        there; not with `dump_ir`.
    channels_last: which images the artifact takes or gives as N, …, C (NHWC) instead of PyTorch's N, C, …: "inputs",
        "outputs", "both" or "none". Saves their transposition where the caller has them so. Shapes given to `compile`,
        and the tensors given to `validate`, stay in the model's axes.
    float_layers: "float32", or "int8": convolutions and dense layers that are neither binary nor quantized compute with
        8-bit integers where that is faster, and no longer what the model says; `validate` reports what it costs.
        "tf32", "float16": for GPUs, they multiply floats rounded to that on tensor cores, where their input channels
        are a multiple of 4, or 8.
    calibration: for "int8", typical inputs in the form that `validate` takes, or a mapping of input names to arrays:
        their activations give the ranges.
    keep_float: for all but "float32", paths of modules whose layers stay float nevertheless.
    tune: minutes for a search for better tiles (`bnncc.targets.search`), shared by all versions. It is kept in the
        tuning database (`bnncc.targets.tuning`), which every compilation reads.
    """

    dump_ir: str | Path | None = None
    channels_last: str = "none"
    cache: bool = True
    float_layers: str = "float32"
    calibration: Iterable[Any] | None = None
    keep_float: Sequence[str] = ()
    tune: float | None = None

    def __post_init__(self) -> None:
        if self.channels_last not in CHANNELS_LAST:
            raise BnnccError(f"channels_last is one of {', '.join(CHANNELS_LAST)}; {self.channels_last!r} was given")
        if self.float_layers not in FLOAT_LAYERS:
            raise BnnccError(f"float_layers is one of {', '.join(FLOAT_LAYERS)}; {self.float_layers!r} was given")
        if self.float_layers == "int8" and self.calibration is None:
            raise BnnccError(
                "float_layers='int8' needs calibration inputs, which show the ranges of the activations: pass "
                "calibration=[(x,), …]"
            )
        if self.float_layers != "int8" and self.calibration is not None:
            raise BnnccError("calibration inputs go with float_layers='int8'")
        if self.float_layers == "float32" and self.keep_float:
            raise BnnccError("keep_float goes with float_layers='int8', 'tf32' or 'float16'")
        if self.tune is not None and not (self.tune > 0 and math.isfinite(self.tune)):
            raise BnnccError(f"tune is a positive number of minutes; {self.tune:g} was given")


def compile(
    model: torch.nn.Module | torch.export.ExportedProgram | Any,
    example_inputs: Sequence[torch.Tensor] | torch.Tensor | None = None,
    target: str | AnyTarget = "native",
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
        target: a name from `bnncc targets`, or a processor name such as "znver4". A name that stands for several
            targets ("x86-64") gives an artifact with a version for each of them.
        name: of the model, a C identifier: the prefix of the artifact's C functions.
        progress: called as ``progress(stage, done, total)``.

    Raises:
        BnnccError: one line that says what cannot be compiled, and where in the model.
    """
    options = options or Options()
    specs = get_targets(target)
    asked = target if isinstance(target, str) else target.name
    report = progress or (lambda stage, done, total: None)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
        raise BnnccError(f"the model's name {name!r} is no C identifier: use letters, digits and underscores")
    database = tuning.Database.read(tuning.database_path())
    if options.tune:
        search.check(specs, database)
    processors = [spec for spec in specs if isinstance(spec, TargetSpec)]
    if options.calibration is not None and len(processors) < len(specs):
        raise BnnccError(f"float layers compute with int8 on processors, not on {asked}: leave that option out")
    if options.float_layers in ROUNDED_CHANNELS:
        _check_rounding(options.float_layers, specs)
    report("trace", 0, 1)
    imported = import_model(model, example_inputs)
    quantized: tuple[QuantizedLayer, ...] = ()
    if options.calibration is not None:
        report("calibrate", 0, 1)
        quantized = calibrate(imported, processors, options.calibration, options.keep_float)
    elif options.float_layers in ROUNDED_CHANNELS:
        quantized = rounded_layers(imported, options.float_layers, options.keep_float)
    cached = options.cache and not options.dump_ir
    digest = cache.module_digest(imported.mod) if cached else b""

    def entry() -> cache.Entry:
        return cache.Entry.of(digest, specs, name, options.channels_last, quantized, database.signature(specs))

    versions = entry().load() if cached and not options.tune else None
    tuned: list[search.Summary] = []
    if versions is None:
        versions = tuple(
            _compile_version(imported.mod, spec, name, options, quantized, report, database, tuned, len(specs))
            for spec in specs
        )
        if cached:
            entry().store(versions)
    return Artifact(name, asked, versions, options.float_layers, quantized, tuple(map(str, tuned)))


def _check_rounding(form: str, specs: Sequence[AnyTarget]) -> None:
    """Raises BnnccError where a target has no tensor cores for floats that are so rounded."""
    for spec in specs:
        if not isinstance(spec, CudaSpec):
            raise BnnccError(
                f"float_layers={form!r} is for GPUs, and {spec.name} is a processor: leave it out, or use 'int8'"
            )
        if form not in spec.rounded_forms:
            known = " or ".join(map(repr, spec.rounded_forms))
            raise BnnccError(f"float_layers={form!r} needs sm_80 or later, and {spec.name} is older: use {known}")


def _compile_version(
    mod: IRModule,
    spec: AnyTarget,
    name: str,
    options: Options,
    quantized: Sequence[QuantizedLayer],
    report: Progress,
    database: tuning.Database,
    tuned: list[search.Summary],
    siblings: int,
) -> Version:
    """The imported module compiled for one target.

    tuned: what tuning came to goes here. siblings: versions of the artifact; if there are several, progress, dumped IR
    and kernels carry the target's name.
    """
    folder, stages, labelled = Path(options.dump_ir) if options.dump_ir else None, report, siblings > 1
    if labelled:
        folder = folder / spec.name if folder else None

        def stages(stage: str, done: int, total: int) -> None:
            report(f"{spec.name}: {stage}", done, total)

    dump = _Dump(folder) if folder else None
    lowered = pipeline.run(mod, spec, dump, stages, options.channels_last, quantized)
    plan = pipeline.plan_memory(lowered, name)
    kernels = {gvar.name_hint: func for gvar, func in lowered.functions_items() if gvar.name_hint != "main"}
    if labelled:
        suffix = "_" + re.sub(r"\W", "_", spec.name)
        kernels = {old + suffix: func.with_attr("global_symbol", old + suffix) for old, func in kernels.items()}
        init, steps = (
            tuple(replace(step, kernel=step.kernel + suffix) for step in part) for part in (plan.init, plan.steps)
        )
        plan = replace(plan, init=init, steps=steps)
    if options.tune and isinstance(spec, TargetSpec):
        calls = Counter(step.kernel for step in plan.steps)
        tuned.append(search.tune(kernels, calls, spec, database, 60 * options.tune / siblings, stages))
    stages("generate code", 0, 1)
    if isinstance(spec, CudaSpec):
        from bnncc.targets.cuda import emit as cuda  # a GPU's rules are not needed for processors

        plan, device = cuda.compile_kernels(IRModule(kernels), plan, spec, dump.text if dump else None)
        version = Version(plan, spec, device=device)
    else:
        version = Version(plan, spec, (compile_kernels(IRModule(kernels), spec, database.tiles(spec)),))
    stages("generate code", 1, 1)
    return version


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
        self.text(f"{stage}.py", pipeline.readable(mod))

    def text(self, name: str, text: str) -> None:
        """One more file, of whatever kind; of a GPU's kernels CUDA C and PTX."""
        path = self.folder / f"{self.count:02}_{name}"
        path.write_text(text, encoding="utf-8")
        self.count += 1
