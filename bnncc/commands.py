"""The commands of `bnncc`: what they take, and how results are shown. The work is done by the public functions."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.table import Table

from bnncc import __version__, arguments
from bnncc.runtime.container import read_manifest, write_whole
from bnncc.runtime.device import open_device
from bnncc.runtime.errors import BnnccError
from bnncc.terminal import artifact_facts, console, finding_table, kernel_table, layer_table, progress_bar, readable

_MODEL_HELP = """MODEL is a .pt2 file (torch.export.save), an .onnx file (QONNX operators included), or
package.module:callable whose callable returns a torch.nn.Module; then --input-shape says what it is called with, and
--weights loads a state dict."""

_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
_NEW_FILE = click.Path(dir_okay=False, path_type=Path)


def _epilog(*examples: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  {example}" for example in examples)


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_epilog(
        "bnncc compile model.pt2 -t rpi4 -o model.so     compile for a Raspberry Pi 4",
        "bnncc validate model.so --reference model.pt2 --data test.npz",
        "bnncc run model.so --input x.npy --output y.npy",
    ),
)
@click.version_option(__version__)
def bnncc() -> None:
    """Compiles binary neural networks from PyTorch or ONNX into one shared library that needs nothing but libc.

    Train in PyTorch, `compile` for a target, `validate` against the model itself, `run` anywhere.
    """


_device_option = click.option(
    "--device",
    default="local",
    show_default=True,
    help="local, cuda:1 to choose a GPU, or qemu for an artifact of another architecture; that takes the runner "
    "model-run beside model.so.",
)


def _model_options(function: Any) -> Any:
    for option in (
        click.option("--weights", type=_FILE, help="State dict of MODEL, read without running code from the file."),
        click.option(
            "--input-shape",
            "shapes",
            multiple=True,
            type=str,
            metavar="N,C,H,W",
            help="Shape of an input; once for each input of MODEL, in order. Not needed for .pt2; for .onnx only where "
            "it leaves more open than the batch, which is 1 by default.",
        ),
    ):
        function = option(function)
    return function


@bnncc.command(
    name="compile",
    short_help="Compiles a PyTorch or ONNX model into a shared library.",
    help="Compiles MODEL into one shared library.\n\n" + _MODEL_HELP,
    epilog=_epilog(
        "bnncc compile model.pt2 -o model.so",
        "bnncc compile nets.digits:Net --weights net.pt --input-shape 1,1,8,8 -t rpi4 -o digits.so",
        "bnncc compile model.pt2 -t rpi4 -o model.so --header model.h --runner model-run",
        "bnncc compile model.pt2 -o model.so --float-layers int8 --calibrate typical.npz",
        "bnncc compile model.pt2 -o model.so --tune 5           five minutes' search for faster kernels",
        "bnncc compile model.pt2 -o model.so --dump-ir ir/      the IR after every pass",
        "bnncc compile model.pt2 -t cuda-sm_90 -o model.so      for an NVIDIA GPU; --dump-ir shows the CUDA C, too",
    ),
)
@click.argument("model")
@click.option("-t", "--target", default="native", show_default=True, help="See `bnncc targets`.")
@click.option("-o", "--output", type=_NEW_FILE, required=True, help="The shared library to write.")
@click.option("--name", default=None, help="Name of the model and prefix of its C functions. [default: from --output]")
@_model_options
@click.option("--header", type=_NEW_FILE, help="Also write the C header of the artifact.")
@click.option("--runner", type=_NEW_FILE, help="Also write a static executable that runs the model on .npy files.")
@click.option(
    "--channels-last",
    type=click.Choice(["inputs", "outputs", "both"]),
    help="Take images, or give them, as N, H, W, C; PyTorch's N, C, H, W is the default.",
)
@click.option(
    "--float-layers",
    type=click.Choice(["float32", "int8", "tf32", "float16"]),
    default="float32",
    show_default=True,
    help="int8: float convolutions and linear layers compute with bytes; tf32, float16: on tensor cores of a GPU, with "
    "floats so rounded. `bnncc validate` says what that costs.",
)
@click.option("--calibrate", type=_FILE, help="For int8: typical inputs, a .npz file as for `bnncc validate --data`.")
@click.option(
    "--keep-float", multiple=True, metavar="PATH", help="A module whose layers stay as they are; may be repeated."
)
@click.option(
    "--tune",
    type=float,
    metavar="MINUTES",
    help="Search for faster tiles first. They are kept, so that later compilations need not.",
)
@click.option("--no-cache", is_flag=True, help="Compile anew, even if this model was compiled before.")
@click.option("--dump-ir", type=click.Path(file_okay=False, path_type=Path), help="Write the IR after every pass here.")
def compile_command(
    model: str,
    target: str,
    output: Path,
    name: str | None,
    weights: Path | None,
    shapes: tuple[str, ...],
    header: Path | None,
    runner: Path | None,
    channels_last: str | None,
    float_layers: str,
    calibrate: Path | None,
    keep_float: tuple[str, ...],
    tune: float | None,
    no_cache: bool,
    dump_ir: Path | None,
) -> None:
    from bnncc import cache
    from bnncc.artifact import Artifact
    from bnncc.targets import search, tuning
    from bnncc.targets.cuda import toolchain
    from bnncc.targets.cuda.descriptor import CudaSpec
    from bnncc.targets.descriptor import get_targets

    specs = get_targets(target)  # before minutes of loading and tracing: a typo is known at once
    for spec in specs:
        if isinstance(spec, CudaSpec):
            toolchain.compiler(spec.sm)  # and so is that nothing here can compile for it
    arguments.check_folder(output, header, runner)
    if (float_layers == "int8") != bool(calibrate):
        raise BnnccError(
            "--float-layers int8 and --calibrate inputs.npz go together: the inputs show the ranges of the activations"
        )
    if tune is not None:
        if not 0 < tune < float("inf"):
            raise BnnccError(f"--tune {tune:g}: expected a positive number of minutes")
        search.check(specs, tuning.Database.read(tuning.database_path()))
    calibration = arguments.load_arrays(calibrate)[0] if calibrate else None
    name = name or arguments.identifier(output.stem)
    cached = model.endswith(".pt2") and Path(model).is_file() and not no_cache and not dump_ir
    cached = cached and float_layers == "float32"

    def entry() -> cache.Entry:
        records = tuning.Database.read(tuning.database_path()).signature(specs)
        return cache.Entry.of(cache.file_digest(Path(model)), specs, name, channels_last, records)

    with progress_bar() as progress:
        versions = entry().load() if cached and not tune else None
        if versions:
            artifact = Artifact(name, target, versions)
        else:
            settings = {
                "dump_ir": dump_ir,
                "channels_last": channels_last or "none",
                "cache": not no_cache and not cached,
                "float_layers": float_layers,
                "calibration": calibration,
                "keep_float": keep_float,
                "tune": tune,
            }
            artifact = _compile(model, weights, shapes, target, name, settings, progress)
            if cached:
                entry().store(artifact.versions)
        artifact.save(output, header=header, runner=runner)
    size = output.stat().st_size
    weights_bytes = artifact.manifest["weights_bytes"]
    for line in artifact.tuned:
        click.echo(line)
    click.echo(f"{output}: {readable(size)} for {target}, of which {readable(weights_bytes)} are weights")


@bnncc.command(
    short_help="Runs an artifact on .npy files.",
    epilog=_epilog("bnncc run model.so --input x.npy", "bnncc run model.so --input a.npy --input b.npy --output y.npy"),
)
@click.argument("artifact", type=_FILE)
@click.option("--input", "inputs", type=_FILE, multiple=True, required=True, help="A .npy file; once for each input.")
@click.option("--output", type=_NEW_FILE, help="Where to write the output (.npy; .npz where there are several).")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use. [default: all cores]")
@_device_option
def run(artifact: Path, inputs: tuple[Path, ...], output: Path | None, threads: int | None, device: str) -> None:
    """Runs ARTIFACT, a .so, once on .npy files."""
    arguments.check_folder(output)
    arrays = [arguments.load_numpy(path, np.ndarray, "numpy.save") for path in inputs]
    with open_device(artifact, device, threads) as opened:
        names = [port["name"] for port in opened.manifest["outputs"]]
        results = opened.run(arrays)
    if output is None:
        for name, array in zip(names, results, strict=True):
            click.echo(f"{name} {array.dtype} {list(array.shape)}\n{np.array2string(array, threshold=100)}")
        return
    file = io.BytesIO()
    if len(results) == 1:
        np.save(file, results[0])
    else:
        named: dict[str, Any] = dict(zip(names, results, strict=True))
        np.savez(file, **named)
    write_whole(output, file.getvalue())


@bnncc.command(
    short_help="Times an artifact.",
    epilog=_epilog(
        "bnncc bench model.so", "bnncc bench model.so --threads 1 --runs 1000", "bnncc bench gpu.so --device cuda:1"
    ),
)
@click.argument("artifact", type=_FILE)
@click.option("--runs", type=click.IntRange(min=1), default=100, show_default=True, help="How many runs to time.")
@click.option("--threads", type=click.IntRange(min=1), help="Threads to use. [default: all cores]")
@_device_option
def bench(artifact: Path, runs: int, threads: int | None, device: str) -> None:
    """Times runs of ARTIFACT, a .so, on random inputs; on a GPU with the copies from and to the host."""
    with open_device(artifact, device, threads) as opened:
        seconds = sorted(opened.bench(runs))
    median, fastest, slowest = (1e3 * seconds[at] for at in (len(seconds) // 2, 0, -1))
    click.echo(f"median {median:.3f} ms, fastest {fastest:.3f} ms, slowest {slowest:.3f} ms of {runs} runs")
    if device == "qemu":
        click.echo("under qemu: this says nothing about the machine it emulates")


@bnncc.command(
    short_help="Compares an artifact with the model it was compiled from.",
    epilog=_epilog(
        "bnncc validate model.so --reference model.pt2 --data test.npz",
        "bnncc validate pi.so --reference model.pt2 --data test.npz --device qemu --report report.html",
    ),
)
@click.argument("artifact", type=_FILE)
@click.option("--reference", required=True, metavar="MODEL", help="The model, as it was given to `bnncc compile`.")
@click.option(
    "--data",
    type=_FILE,
    required=True,
    help="A .npz file: an array for each input, by name or in order, of any number of samples; `labels` if there are.",
)
@click.option("--weights", type=_FILE, help="State dict of the reference.")
@_device_option
@click.option("--all-layers", is_flag=True, help="Compare every batch layer by layer, not only the first few.")
@click.option("--report", "reports", type=_NEW_FILE, multiple=True, help="Also write the report (.json or .html).")
def validate(
    artifact: Path,
    reference: str,
    data: Path,
    weights: Path | None,
    device: str,
    all_layers: bool,
    reports: tuple[Path, ...],
) -> int:
    """Compares ARTIFACT with eager PyTorch, or ONNX Runtime, layer by layer and as a whole.

    Exit status 0: equal, up to float rounding where the report says so. 1: not equal. 2: it could not be compared.
    """
    from bnncc import eager
    from bnncc.models import load_model

    for path in reports:
        if path.suffix not in (".json", ".html"):
            raise BnnccError(f"--report {path}: the name must end in .json or .html")
    arguments.check_folder(*reports)
    with progress_bar() as progress:
        progress("loading the model", 0, 1)
        inputs, labels = arguments.load_npz(data, artifact)
        options: dict[str, Any] = {"layer_batches": None} if all_layers else {}
        report = eager.validate(
            artifact, load_model(reference, weights), [inputs], labels, device, progress=progress, **options
        )
    out = console()
    out.print(report.table())
    for line in report.summary():
        out.print(line, highlight=False, soft_wrap=True)
    for line in report.problems:
        out.print(line, style="red", highlight=False, soft_wrap=True)
    for path in reports:
        report.save(path)
    return 0 if report.ok else 1


@bnncc.command(
    short_help="Shows what a model will become, or what an artifact holds.",
    epilog=_epilog(
        "bnncc inspect model.pt2",
        "bnncc inspect nets.digits:Net --input-shape 1,1,8,8 -t rpi4",
        "bnncc inspect model.so",
        "bnncc inspect model.so --json | less",
    ),
)
@click.argument("subject", metavar="MODEL|ARTIFACT")
@click.option("-t", "--target", default="native", show_default=True, help="What a model is to be compiled for.")
@_model_options
@click.option("--json", "as_json", is_flag=True, help="The manifest, or the findings, as JSON.")
def inspect(subject: str, target: str, weights: Path | None, shapes: tuple[str, ...], as_json: bool) -> int:
    """Shows what every layer of MODEL will become, before it is compiled; MODEL is as for `bnncc compile`. Exit status
    1: some of it cannot be compiled.

    Of ARTIFACT, a .so, it shows what it holds, without running it: target, inputs, outputs, layers, memory.
    """
    if subject.endswith((".pt2", ".onnx")) or (":" in subject and not Path(subject).is_file()):
        return _inspect_model(subject, target, weights, shapes, as_json)
    if not Path(subject).is_file():
        raise BnnccError(f"there is no file '{subject}'; expected an artifact (.so), or a model as for `bnncc compile`")
    _inspect_artifact(Path(subject), as_json)
    return 0


def _inspect_model(model: str, target: str, weights: Path | None, shapes: tuple[str, ...], as_json: bool) -> int:
    from dataclasses import asdict

    from bnncc.inspection import REFUSED, inspect_model
    from bnncc.models import load_model

    examples = arguments.examples(shapes)
    if examples is None and not model.endswith((".pt2", ".onnx")):
        raise BnnccError(f"--input-shape is missing: say what '{model}' is called with, such as 1,3,224,224")
    findings = inspect_model(load_model(model, weights), examples, target)
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console().print(finding_table(findings))
    return int(any(finding.becomes == REFUSED for finding in findings))


def _inspect_artifact(artifact: Path, as_json: bool) -> None:
    manifest = read_manifest(artifact)
    if as_json:
        click.echo(json.dumps(manifest, indent=2))
        return
    out = console()
    for key, value in artifact_facts(manifest):
        out.print(f"{key + ':':9}{value}", highlight=False, soft_wrap=True)
    first = manifest["versions"][0]
    if len(manifest["versions"]) > 1:  # their layers are the same but for the bytes
        out.print(f"layers of {first['name']}:", highlight=False)
    out.print(layer_table(first["layers"]))
    if first["device"]:
        out.print(kernel_table(first["device"]))


@bnncc.command(short_help="Lists the targets.")
def targets() -> None:
    """Lists the targets to compile for; names of processors (znver4, cortex-a76, …) are accepted too."""
    from bnncc.targets.cuda.descriptor import CUDA_TARGETS
    from bnncc.targets.descriptor import TargetSpec, all_families, all_targets, native

    table = Table(box=None, pad_edge=False)
    for heading in ("target", "architecture", "vectors or tiles", "description"):
        table.add_column(heading)
    for target in (native(), *all_targets()):
        table.add_row(target.name, target.arch, f"{target.vector_bits} bit", target.description)
    for family in all_families():
        members = family.targets()
        bits = sorted({target.vector_bits for target in members if isinstance(target, TargetSpec)})
        table.add_row(family.name, members[0].arch, f"{bits[0]}-{bits[-1]} bit", family.description)
    for gpu in CUDA_TARGETS.values():
        operands = "bytes" if gpu.gpu.product == "s8" else "bits"
        table.add_row(gpu.name, f"{gpu.arch} + {gpu.sm}", f"tiles of {operands}", gpu.description)
    console().print(table)


def _compile(
    model: str, weights: Path | None, shapes: tuple[str, ...], target: str, name: str, settings: Any, progress: Any
) -> Any:
    """Loads and compiles what the command line names; settings: of `bnncc.Options`."""
    from bnncc import compiler
    from bnncc.models import load_model

    progress("loading the model", 0, 1)
    loaded, examples = load_model(model, weights), arguments.examples(shapes)
    if examples is None and not model.endswith((".pt2", ".onnx")):
        raise BnnccError(f"--input-shape is missing: say what '{model}' is called with, such as 1,3,224,224")
    if examples is None and model.endswith(".onnx"):
        from bnncc.frontends.onnx_graph import prepare

        for note in prepare(loaded).fixed:
            click.echo(note, err=True)
    return compiler.compile(
        loaded, examples, target, name=name, options=compiler.Options(**settings), progress=progress
    )
