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
    pytest.mark.skipif(shutil.which("qemu-aarch64") is None, reason="needs qemu-aarch64"),
]


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


def _run(model: nn.Module, inputs: tuple[torch.Tensor, ...], folder: Path) -> list[np.ndarray]:
    artifact = compile_model(model.eval(), inputs, "rpi4")
    path = folder / "model.so"
    artifact.save(path, runner=runner_path(path))
    with open_device(path, "qemu") as device:
        return device.run([x.numpy() for x in inputs])


def test_sums_across_lanes(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    images = []
    for channels, side in _Convolutions.CASES:
        x = torch.randn(1, channels, side + 1, 7 + side, generator=generator)  # 8 pixels wide, so that vectors fill
        x[..., : side + 1] = x[..., : side + 1].abs()  # windows of +1 only: every byte counts to its end
        images.append(x)
    model = _Convolutions()
    for actual, expected in zip(_run(model, tuple(images), tmp_path), model(*images), strict=True):
        np.testing.assert_array_equal(actual, expected.numpy())


def test_max_pooling_keeps_nan_and_the_first_zero(tmp_path: Path) -> None:
    x = torch.randn(1, 16, 9, 10, generator=torch.Generator().manual_seed(2))
    flat = x.view(-1)
    for first, step, value in ((0, 7, -0.0), (3, 11, 0.0), (5, 37, np.nan), (2, 41, np.inf), (4, 43, -np.inf)):
        flat[first::step] = value
    pool = nn.MaxPool2d(2, 1)
    expected = pool(x).numpy()
    (actual,) = _run(nn.Sequential(pool), (x,), tmp_path)
    number = ~np.isnan(expected)
    assert np.signbit(expected[number & (expected == 0)]).any()
    np.testing.assert_array_equal(np.isnan(actual), ~number)
    np.testing.assert_array_equal(actual[number].view(np.uint32), expected[number].view(np.uint32))
