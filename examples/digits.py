"""Trains a small residual binary network on real images, compiles it for this machine and for a Raspberry Pi 4, proves
that both compute what PyTorch computes, and shows what that buys. `make demo` runs it.

The images are scikit-learn's digits (1,797 scans of 8×8 pixels, part of the package), a fifth of them held out.
"""

from __future__ import annotations

import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import bnncc
from bnncc.layers import QConv2d, QLinear
from bnncc.runtime.device import runner_path
from bnncc.terminal import console, layer_table, progress_bar, readable

FOLDER = Path("build/demo")
SEED, EPOCHS, BATCH, LEARNING_RATE = 0, 20, 64, 3e-3
TEST_SHARE = 5
LEAST_ACCURACY = 0.95


class Block(nn.Module):
    """Binary 3×3 convolution and batch norm beside a shortcut; with stride 2, the shortcut averages and stays float."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = QConv2d(inputs, outputs, 3, stride=stride, padding=1, input_quantization="approxsign")
        self.norm = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride > 1:
            widen = nn.Conv2d(inputs, outputs, 1, bias=False)
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride), widen, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)) + self.shortcut(x)


class Digits(nn.Module):
    """Float stem, two stages of binary residual blocks, a binary linear layer, float head; input float [N, 1, 8, 8]."""

    def __init__(self, width: int = 32, hidden: int = 128) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.stage1 = nn.Sequential(Block(width, width), Block(width, width))
        self.stage2 = nn.Sequential(Block(width, 2 * width, stride=2), Block(2 * width, 2 * width))
        self.pool = nn.AvgPool2d(2)
        self.hidden = QLinear(2 * width * 4, hidden, bias=False, input_quantization="approxsign")
        self.norm = nn.BatchNorm1d(hidden)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.stem(x)))
        x = self.hidden(self.pool(x).flatten(1))
        return self.head(self.norm(x))


def load_images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) to train with, and the held-out ones; images float32 [N, 1, 8, 8] in −1…1."""
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 8 - 1, dtype=torch.float32).reshape(-1, 1, 8, 8)
    labels = torch.tensor(digits)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    test, train = order[: len(order) // TEST_SHARE], order[len(order) // TEST_SHARE :]
    return (images[train], labels[train]), (images[test], labels[test])


def train(images: Tensor, labels: Tensor, progress: Callable[[str, int, int], None]) -> Digits:
    """A trained network in evaluation mode."""
    torch.manual_seed(SEED)
    model = Digits()
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        progress("training", epoch, EPOCHS)
        for batch in torch.randperm(len(images)).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return model.eval()


def compile_and_validate(
    model: Digits, test: tuple[Tensor, Tensor], accuracy: float, target: str, device: str, out: Console
) -> Path:
    """Writes the artifact, compares it with eager PyTorch on every test image and says what came out."""
    path = FOLDER / f"digits-{target}.so"
    images, labels = test
    with progress_bar() as progress:
        artifact = bnncc.compile(model, (images[:1],), target, name="digits", progress=progress)
        artifact.save(path, header=path.with_suffix(".h"), runner=runner_path(path))
    if target == "native":
        out.print(layer_table(artifact.manifest["versions"][0]["layers"]))
    out.print(f"\n[bold]{target}[/bold]", "" if device == "local" else f"(under {device})")
    if device == "qemu" and shutil.which("qemu-aarch64") is None:
        out.print("  not validated: qemu-aarch64 is not installed (Debian: apt install qemu-user)", style="yellow")
        return path
    with progress_bar() as progress:
        report = bnncc.validate(path, model, [images], labels, device, layer_batches=None, progress=progress)
    for line in report.summary():
        out.print(f"  {line}", highlight=False, soft_wrap=True)
    report.save(path.with_suffix(".html"))
    if not report.ok:
        raise SystemExit("\n".join(report.problems))
    reached = report.accuracy or 0.0
    if abs(reached - accuracy) * len(labels) > 1:
        raise SystemExit(f"eager classifies {accuracy:.2%} of the images right, the artifact {reached:.2%}")
    return path


def size_table(model: Digits, artifacts: list[Path]) -> Table:
    """Sizes against the float checkpoint; the binary part is the weights of the binary layers."""
    checkpoint = FOLDER / "digits.pt"
    torch.save(model.state_dict(), checkpoint)
    binary = [module.weight for module in model.modules() if isinstance(module, QConv2d | QLinear)]
    float_bytes = sum(weight.numel() * weight.element_size() for weight in binary)
    layers = bnncc.runtime.read_manifest(artifacts[0])["versions"][0]["layers"]
    packed_bytes = sum(layer["weight_bytes"] for layer in layers if layer["weight_bits"] == 1)
    if packed_bytes * 8 > float_bytes:
        raise SystemExit(f"the binary layers take {packed_bytes} bytes, more than an eighth of {float_bytes}")
    table = Table(title="sizes")
    for heading in ("", "whole file", "binary layers"):
        table.add_column(heading, justify="left" if not heading else "right")
    table.add_row("float checkpoint", readable(checkpoint.stat().st_size), readable(float_bytes))
    for path in artifacts:
        table.add_row(path.name, readable(path.stat().st_size), readable(packed_bytes))
    return table


def median_time(run: Callable[[], object], runs: int = 200) -> float:
    """Seconds of one call: the median of `runs`, after a warm-up."""
    seconds = []
    for _ in range(runs + 20):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[20:])


def time_table(model: Digits, artifact: Path, image: Tensor) -> Table:
    """Time per image, one image at a time on one thread, all called from Python."""
    path = FOLDER / "digits.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this exporter will go; it needs no further package
        torch.onnx.export(model, (image,), path, dynamo=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    peer = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    (port,) = peer.get_inputs()
    session = bnncc.runtime.load(artifact, threads=1)
    array = image.numpy()
    with torch.no_grad():
        times = {
            "eager PyTorch": median_time(lambda: model(image)),
            "ONNX Runtime": median_time(lambda: peer.run(None, {port.name: array})),
            "bnncc": median_time(lambda: session(array)),
        }
    table = Table(title="time per image, one thread")
    table.add_column("")
    table.add_column("µs", justify="right")
    table.add_column("bnncc is faster by", justify="right")
    for name, seconds in times.items():
        ratio = "" if name == "bnncc" else f"{seconds / times['bnncc']:.1f}×"
        table.add_row(name, f"{seconds * 1e6:.0f}", ratio)
    return table


def main() -> None:
    out = console()
    torch.set_num_threads(1)  # images this small keep one core busy; more threads would wait for each other
    FOLDER.mkdir(parents=True, exist_ok=True)
    training, test = load_images()
    start = time.perf_counter()
    with progress_bar() as progress:
        model = train(*training, progress)
    with torch.no_grad():
        accuracy = float(np.mean((model(test[0]).argmax(1) == test[1]).numpy()))
    out.print(
        f"trained on {len(training[0]):,} images in {time.perf_counter() - start:.0f} s; "
        f"{accuracy:.2%} of {len(test[0])} test images right\n",
        highlight=False,
    )
    if accuracy < LEAST_ACCURACY:
        raise SystemExit(f"that is less than {LEAST_ACCURACY:.0%}: the training went wrong")
    artifacts = [
        compile_and_validate(model, test, accuracy, "native", "local", out),
        compile_and_validate(model, test, accuracy, "rpi4", "qemu", out),
    ]
    out.print()
    out.print(size_table(model, artifacts))
    out.print(time_table(model, artifacts[0], test[0][:1]))
    out.print(f"artifacts, C headers, runners and parity reports are in {FOLDER}")


if __name__ == "__main__":
    main()
