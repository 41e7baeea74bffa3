"""bitorch's own networks, from its own classes, against eager: `python -m benchmarks.bitorch_networks`.

Every network is compiled for this machine and validated layer by layer, two of them for a Raspberry Pi 4 under QEMU as
well; the reports go to benchmarks/results/bitorch-networks.json. Weights are bitorch's initial ones. Batch norms
have drawn factors and the statistics of a few random images, because the initial 1 and 0 would hide a mistake.
"""

from __future__ import annotations

import argparse
import json
import logging
import tempfile
import time
import warnings
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from benchmarks.machine import machine, versions
from bnncc.compiler import compile as compile_model
from bnncc.eager import validate
from bnncc.runtime.device import runner_path

RESULT = Path(__file__).parent / "results" / "bitorch-networks.json"

#: Class in `bitorch.models` → channels of its input, classes, and the side of its image.
NETWORKS = {
    "LeNet": (1, 10, 28),
    "Resnet18V1": (3, 1000, 224),
    "Resnet50V1": (3, 1000, 224),
    "ResnetE18": (3, 1000, 224),
    "ResnetE34": (3, 1000, 224),
    "DenseNet28": (3, 1000, 224),
    "MeliusNet22": (3, 1000, 224),
    "QuickNetSmall": (3, 1000, 224),
    "QuickNet": (3, 1000, 224),
}

#: Networks that are also compiled for a Raspberry Pi 4 and run under QEMU.
ON_THE_PI = ("LeNet", "QuickNetSmall")


def build(name: str, side: int | None = None) -> tuple[nn.Module, torch.Tensor]:
    """A network in evaluation mode, and an image for it.

    side: of the image in pixels; None for the usual one. bitorch chooses another stem for any side but 224.
    """
    import bitorch.models

    channels, classes, usual = NETWORKS[name]
    shape = (1, channels, side or usual, side or usual)  # bitorch takes a list of 224×224 for a small image
    torch.manual_seed(0)
    return settle(getattr(bitorch.models, name)(input_shape=shape, num_classes=classes), shape)


def settle(model: nn.Module, shape: tuple[int, ...]) -> tuple[nn.Module, torch.Tensor]:
    """The model in evaluation mode with batch norms as after some training, and an image of that shape for it."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = None  # the mean over all batches
            nn.init.normal_(module.weight)  # negative ones, too
            nn.init.normal_(module.bias, std=0.1)
    with torch.no_grad():
        model.train()(torch.randn(4, *shape[1:]))
    return model.eval(), torch.randn(shape)


def check(name: str, target: str, side: int | None = None) -> dict[str, Any]:
    """Compiles a network for "native" or "rpi4" and validates it; the row of the report."""
    model, image = build(name, side)
    device = "local" if target == "native" else "qemu"
    start = time.perf_counter()
    artifact = compile_model(model, (image,), target, name=name)
    compiled = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.so"
        artifact.save(path, runner=runner_path(path) if device == "qemu" else None)
        report = validate(path, model, [(image,)], device=device)
        size = path.stat().st_size
    exact = [step for step in report.steps if step.exact]
    version = artifact.manifest["versions"][0]
    return {
        "ok": report.ok,
        "input": list(image.shape),
        "layers": dict(Counter(layer["op"] for layer in version["layers"])),
        "binary_macs": sum(layer["macs"] for layer in version["layers"] if layer["activation_bits"] < 32),
        "float_macs": sum(layer["macs"] for layer in version["layers"] if layer["activation_bits"] == 32),
        "weights_bytes": version["weights_bytes"],
        "arena_bytes": version["arena_bytes"],
        "library_bytes": size,
        "compile_seconds": round(compiled, 1),
        "exact_steps": len(exact),
        "exact_elements": sum(step.isolated.elements for step in exact),
        "exact_mismatches": sum(step.isolated.mismatches for step in exact),
        "bits": report.sign_flips.elements,
        "sign_flips": report.sign_flips.mismatches,
        "first_flip": report.first_flip,
        "largest_difference": report.outputs.max_abs,
        "relative_difference": report.outputs.max_rel,
        "top1_agreement": report.top1_agreement,
        "problems": report.problems,
    }


def main() -> None:
    """Checks what the arguments ask for; rows of earlier runs stay in the file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bitorch_networks", description=__doc__)
    parser.add_argument("--only", default="", help="networks whose name contains this text")
    parser.add_argument("--target", choices=("native", "rpi4"), help="this target alone")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    out = Console(highlight=False)
    report: dict[str, Any] = json.loads(RESULT.read_text()) if RESULT.exists() else {"networks": {}}
    report |= {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
    }
    for name in (name for name in NETWORKS if options.only in name):
        for target in ("native", *(["rpi4"] if name in ON_THE_PI else [])):
            if options.target in (None, target):
                row = check(name, target)
                report["networks"].setdefault(name, {})[target] = row
                RESULT.write_text(json.dumps(report, indent=2) + "\n")
                out.print(_line(name, target, row), style="" if row["ok"] else "red")


def _line(name: str, target: str, row: dict[str, Any]) -> str:
    return (
        f"{name:14} {target:7} {'ok' if row['ok'] else 'DIFFERS'}: {row['exact_mismatches']} of "
        f"{row['exact_elements']:,} exact elements differ, {row['sign_flips']} of {row['bits']:,} signs flipped, "
        f"outputs within {row['relative_difference']:.1e}; compiled in {row['compile_seconds']} s"
    )


if __name__ == "__main__":
    main()
