"""What is NEON's own (sums across lanes, maxima that keep NaN), under QEMU, bit for bit against eager PyTorch."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnncc.compiler import compile as compile_model
from bnncc.runtime.device import open_device, runner_path

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-aarch64 and qemu-arm"),
]
each_neon = pytest.mark.parametrize("target", ["rpi4", "rpi2", "rpi3-32"])


class _Convolutions(nn.Module):
    """Binary convolutions beside each other, one for each way to sum up the lanes."""

    CASES = ((512, 3), (256, 3), (128, 3), (128, 2), (64, 3), (32, 4), (16, 5))  # channels, side of the window

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for index, (channels, side) in enumerate(self.CASES):
            weight = torch.randint(0, 2, (16, channels, side, side), generator=generator) * 2.0 - 1
            weight[0], weight[1] = 1.0, -1.0  # sums at both ends
            self.register_buffer(f"weight{index}", weight)

    def forward(self, *images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        signs = (torch.where(x >= 0, 1.0, -1.0) for x in images)
        return tuple(F.conv2d(x, getattr(self, f"weight{i}")) for i, x in enumerate(signs))


def _run(model: nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path, target: str) -> list[np.ndarray]:
    artifact = compile_model(model.eval(), inputs, target)
    path = folder / "model.so"
    artifact.save(path, runner=runner_path(path))
    with open_device(path, "qemu") as device:
        return device.run([x.numpy() for x in inputs])


@pytest.mark.parametrize("target", ["rpi4", "rpi3", "rpi2", "rpi3-32"])
def test_sums_across_lanes(target: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    images = []
    for channels, side in _Convolutions.CASES:
        x = torch.randn(1, channels, side + 1, 7 + side, generator=generator)  # 8 pixels wide, so that vectors fill
        x[..., : side + 1] = x[..., : side + 1].abs()  # windows of +1 only: every byte counts to its end
        images.append(x)
    model = _Convolutions()
    for actual, expected in zip(_run(model, tuple(images), tmp_path, target), model(*images), strict=True):
        np.testing.assert_array_equal(actual, expected.numpy())


class _Windows(nn.Module):
    """Binary convolutions whose steps differ: rests of rows, strides and dilations, long rows, one row or column."""

    CASES = (
        # channels, height and width, window, strides, dilation
        (64, (5, 14), (3, 3), 1, 1),
        (128, (5, 9), (3, 3), 1, 1),
        (128, (7, 12), (3, 3), 2, 1),
        (128, (9, 11), (3, 3), 1, (3, 2)),
        (256, (4, 131), (3, 3), 1, 1),
        (384, (5, 6), (2, 3), (2, 1), 1),
        (512, (4, 4), (1, 1), 1, 1),
        (1280, (3, 6), (3, 3), 1, 1),
        (128, (3, 12), (1, 7), 1, 1),
        (128, (9, 3), (7, 1), 1, 1),
        (57, (4, 8), (3, 3), 1, 1),
    )

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for index, (channels, _, window, *_) in enumerate(self.CASES):
            weight = torch.randint(0, 2, (16, channels, *window), generator=generator) * 2.0 - 1
            self.register_buffer(f"weight{index}", weight)

    def forward(self, *images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        signs = [torch.where(x >= 0, 1.0, -1.0) for x in images]
        return tuple(
            F.conv2d(x, getattr(self, f"weight{n}"), None, strides, 0, dilation)
            for n, (x, (_, _, _, strides, dilation)) in enumerate(zip(signs, self.CASES, strict=True))
        )


@pytest.mark.parametrize("target", ["rpi3", "rpi4"])
def test_steps_of_every_window(target: str, tmp_path: Path) -> None:
    """On rpi3 the steps come in assembler."""
    generator = torch.Generator().manual_seed(1)
    images = tuple(torch.randn(1, c, *size, generator=generator) for c, size, *_ in _Windows.CASES)
    model = _Windows()
    for actual, expected in zip(_run(model, images, tmp_path, target), model(*images), strict=True):
        np.testing.assert_array_equal(actual, expected.numpy())


@each_neon
def test_max_pooling_keeps_nan_and_the_first_zero(target: str, tmp_path: Path) -> None:
    x = torch.randn(1, 16, 9, 10, generator=torch.Generator().manual_seed(2))
    flat = x.view(-1)
    for first, step, value in ((0, 7, -0.0), (3, 11, 0.0), (5, 37, np.nan), (2, 41, np.inf), (4, 43, -np.inf)):
        flat[first::step] = value
    pool = nn.MaxPool2d(2, 1)
    expected = pool(x).numpy()
    (actual,) = _run(nn.Sequential(pool), (x,), tmp_path, target)
    number = ~np.isnan(expected)
    assert np.signbit(expected[number & (expected == 0)]).any()
    np.testing.assert_array_equal(np.isnan(actual), ~number)
    np.testing.assert_array_equal(actual[number].view(np.uint32), expected[number].view(np.uint32))


class _Exact(nn.Module):
    """Operators that must be eager's bit for bit, on numbers around the smallest normal one."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.norm = nn.BatchNorm2d(16)
        self.norm.weight.data = torch.randn(16, generator=generator) * 1e-3
        self.norm.bias.data = torch.randn(16, generator=generator) * torch.tensor([1e-38, 1e-39, 1.0, 1e-42] * 4)
        self.prelu = nn.PReLU(16)
        self.prelu.weight.data = torch.rand(16, generator=generator)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            self.norm(x), self.prelu(x), F.relu(x), F.hardtanh(x), F.leaky_relu(x, 0.1), torch.clamp(x, 1e-40, 2e-39),
            x + y, x - y, x * y, x / y, -x, x.abs(), F.max_pool2d(x, 2),
            torch.round(x), torch.floor(x), torch.ceil(x), torch.trunc(x),
            torch.sign(x), torch.where(x >= 0, 1.0, -1.0), torch.where(x <= 0, 1.0, -1.0),
            torch.where(x < 0, 1.0, -1.0), torch.where(x > 0, 1.0, -1.0),
            torch.where(x < y, x, y), torch.where(x > y, x, y), (x <= y).float(), (x >= y).float(),
            (x == y).float(), (x != y).float(),
        )  # fmt: skip


@each_neon
def test_denormals(target: str, tmp_path: Path) -> None:
    """NEON of 32-bit ARM takes them for 0; eager does not, nor may an exact step."""
    generator = torch.Generator().manual_seed(1)
    least, tiny = 1.401298e-45, 1.1754942e-38
    odd = torch.tensor(
        [0.0, -0.0, float("nan"), float("inf"), -float("inf"), least, -least, 1e-40, -1e-40, tiny, -tiny,
         1.2e-38, -1.2e-38, 3e38, -3e38, 0.5, -0.5, 1.5, 2.5]
    )  # fmt: skip
    inputs = []
    for _ in range(2):
        shape = (2, 16, 10, 8)
        chosen = odd[torch.randint(len(odd), shape, generator=generator)]
        normal = torch.randn(shape, generator=generator)
        inputs.append(torch.where(torch.rand(shape, generator=generator) < 0.6, chosen, normal))
    model = _Exact().eval()
    with torch.no_grad():
        expected = [y.numpy() for y in model(*inputs)]
    for index, (actual, wanted) in enumerate(
        zip(_run(model, (inputs[0], inputs[1]), tmp_path, target), expected, strict=True)
    ):
        number = ~np.isnan(wanted)
        np.testing.assert_array_equal(np.isnan(actual), ~number, err_msg=f"output {index}")
        np.testing.assert_array_equal(
            actual[number].view(np.uint32), wanted[number].view(np.uint32), err_msg=f"output {index}"
        )


class _Integers(nn.Module):
    """Four bits times weights of eight, both ends of what products of bytes give."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 20, 3, bias=False)
        weight = torch.randint(-127, 128, (20, 24, 3, 3), generator=torch.Generator().manual_seed(0))
        weight[0], weight[1] = 127, -127
        self.conv.weight.data = weight.float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(torch.round(torch.clamp(x, 0, 1) * 255))


@each_neon
def test_chains_of_selections(target: str, tmp_path: Path) -> None:
    """Lanes, comparisons and selections read their operands several times: a tree that doubles with every link."""

    class Chain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for step in range(2):
                x = torch.maximum(F.leaky_relu(x - 0.25 * step, 0.125), -x)
            return x

    x = torch.randn(1, 4, 4, 8, generator=torch.Generator().manual_seed(2))
    (actual,) = _run(Chain(), (x,), tmp_path, target)
    np.testing.assert_array_equal(actual, Chain()(x).numpy())


@each_neon
def test_comparisons_of_single_values_know_denormals(target: str, tmp_path: Path) -> None:
    """Eight pixels of one block of channels: a loop of comparisons alone, which LLVM vectorised with NEON's."""

    class Levels(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.conv1d(torch.where(x >= 0, 1.0, -1.0), weight)

    weight = torch.tensor([[[3.0], [-7.0]], [[2.0], [5.0]]])
    values = [float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-40, -1e-40, 1.0]
    x = torch.tensor([values, values[1:] + values[:1]])[None]
    (actual,) = _run(Levels(), (x,), tmp_path, target)
    np.testing.assert_array_equal(actual, Levels()(x).numpy())


@each_neon
def test_products_of_bytes(target: str, tmp_path: Path) -> None:
    x = torch.rand(1, 24, 7, 9, generator=torch.Generator().manual_seed(3))
    x[..., :4] = 1.0
    model = _Integers()
    artifact = compile_model(model.eval(), (x,), target)
    assert {layer["op"].split()[0] for layer in artifact.manifest["versions"][0]["layers"]} == {"integer"}
    (actual,) = _run(model, (x,), tmp_path, target)
    np.testing.assert_array_equal(actual, model(x).detach().numpy())
