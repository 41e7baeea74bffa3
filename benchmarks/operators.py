"""Single operators on one thread: `python -m benchmarks.operators`.

A binary convolution is timed as a kernel, packed bits in and out as it stands between two binary layers, against the
limit of the instructions it was compiled for; a float layer as a model of its own against ONNX Runtime, and its kernel
against its bound (`benchmarks.roofline`).
"""

from __future__ import annotations

import argparse
import logging
import warnings
from typing import Any

import numpy as np
import torch

from benchmarks import lce, limit, models, peers, tables
from benchmarks.machine import terminal
from benchmarks.networks import step_report
from benchmarks.roofline import work_of
from benchmarks.stopwatch import Stopwatch
from benchmarks.timing import interleaved_medians
from bnncc.compiler import Options
from bnncc.compiler import compile as compile_model

#: Seconds that a timed call takes at least: a hundred times what reading the clock takes.
_CALL = 1e-4


def binary_kernel(
    size: int, channels: int, kernel: int, isa: str, limits: dict[str, Any], seconds: float
) -> dict[str, Any]:
    """The kernel of a binary convolution, threshold and packing included, among rounds of its limit's loop."""
    model, image = models.between_binary_layers(size, channels, kernel)
    best = limit.loops(isa)[limits["arithmetic"][isa]["binary"]["mix"]]
    with compile_model(model, (image,), target=isa).load(threads=1) as session:
        first, second = [work for work in work_of(session.version) if work.macs]
        macs = next(iter(first.macs.values()))
        times = max(1, round(_CALL * 1e9 * limits["arithmetic"][isa]["binary"]["gops"] / (2 * macs)))
        run = Stopwatch(session, [image.numpy()]).repeater(first.step, second.step - first.step, times)
        medians = interleaved_medians({"kernel": run, "limit": best.call}, seconds)
    gops, most = 2e-9 * macs * times / medians["kernel"], 1e-9 * best.operations / medians["limit"]
    return {
        "us": round(1e6 * medians["kernel"] / times, 2),
        "gops": round(gops, 1),
        "limit_gops": round(most, 1),
        "limit_by": best.name,
        "share_of_limit": round(gops / most, 3),
        "steps": second.step - first.step,
    }


def float_layer(name: str, limits: dict[str, Any], seconds: float) -> dict[str, Any]:
    """A float layer called from Python, among ONNX Runtime and torch; and its kernel by itself."""
    layer, x = models.float_layer(name)
    array = x.numpy()
    image = array.ndim == 4
    last = np.ascontiguousarray(np.moveaxis(array, 1, -1))
    options = Options(channels_last="both" if image else "none")
    with (
        compile_model(layer, (x,)).load(threads=1) as session,
        compile_model(layer, (x,), options=options).load(threads=1) as session_last,
    ):
        ours = {"bnncc": lambda: session(array)}
        if image:
            ours["bnncc, NHWC"] = lambda: session_last(last)
        others, _ = peers.runners(layer, x, which=("ORT fp32", "torch fp32"))
        medians = interleaved_medians({**ours, **others}, seconds)
        steps = step_report(session, array, limits, "native", seconds / 4)
    computing = [row for row in steps if not row["moves"]] or steps
    took = 1e-6 * max(0.01, sum(row["us"] for row in computing))  # of less, the clock knows nothing
    operations = 2 * sum(sum(row["macs"].values()) for row in computing)
    moved = sum(row["activation_bytes"] + row["weight_bytes"] for row in computing)
    return {
        **peers.comparison(medians),
        "kernel_us": round(1e6 * took, 2),
        **({"gflops": round(1e-9 * operations / took, 1)} if operations else {}),
        "gb_per_s": round(1e-9 * moved / took, 1),
        "bound_by": computing[0]["bound_by"],
        "share_of_bound": round(1e-6 * sum(row["bound_us"] for row in computing) / took, 3),
        "steps": steps,
    }


def one_convolution(shape: str, limits: dict[str, Any], seconds: float, worker: lce.Worker | None) -> dict[str, Any]:
    """The artifact of one binary 3×3 convolution called from Python, floats in and out, among its peers."""
    size, channels = models.CONVOLUTIONS[shape]
    binary, twin, x = models.convolution(size, channels)
    array = x.numpy()
    last = np.ascontiguousarray(array.transpose(0, 2, 3, 1))
    with torch.no_grad():
        expected = binary(x).numpy()
    options = Options(channels_last="both")
    with (
        compile_model(binary, (x,)).load(threads=1) as session,
        compile_model(binary, (x,), options=options).load(threads=1) as session_last,
    ):
        if not np.array_equal(session(array), expected):
            raise RuntimeError(f"{shape}: the artifact differs from eager: the timing means nothing")
        ours = {"bnncc": lambda: session(array), "bnncc, NHWC": lambda: session_last(last)}
        others, missing = peers.runners(twin, x, binary)
        elsewhere = worker.runners(f"{size}×{channels}") if worker else {}
        medians = interleaved_medians({**ours, **others, **elsewhere}, seconds)
    gops = 2e-9 * size**2 * 9 * channels**2 / medians["bnncc"]
    share = round(gops / limits["arithmetic"]["native"]["binary"]["gops"], 3)
    return {**peers.comparison(medians), "missing": missing, "gops": round(gops, 1), "share_of_limit": share}


def binary_kernels(name: str, limits: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Instruction set → the row of `binary_kernel`. name: "3×3, 56²×64"."""
    window, _, shape = name.partition(", ")
    kernel = int(window.partition("×")[0])
    isas = reversed(limits["arithmetic"])
    return {isa: binary_kernel(*models.CONVOLUTIONS[shape], kernel, isa, limits, seconds) for isa in isas}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.operators", description=__doc__.partition("\n")[0])
    parser.add_argument("only", nargs="?", default="", help="operators whose name contains this text")
    parser.add_argument("--isa", action="append", help=f"of binary kernels: {', '.join(limit.isas())}; default: all")
    parser.add_argument("--seconds", type=float, default=0.6, help="to measure each operator for")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    console = terminal()
    limits = limit.measure(options.isa)
    console.print(*limit.tables(limits))
    kernels = [f"{k}×{k}, {shape}" for k in models.KERNELS for shape in models.CONVOLUTIONS]
    if chosen := [name for name in kernels if options.only in name]:
        rows = {name: binary_kernels(name, limits, options.seconds) for name in chosen}
        console.print(*tables.kernels(rows))
    layers = [name for name in models.FLOAT_LAYERS if options.only in name]
    if layers and "native" in limits["arithmetic"]:
        rows = {name: float_layer(name, limits, 2 * options.seconds) for name in layers}
        console.print(*tables.layers(rows))


if __name__ == "__main__":
    main()
