"""What several threads share out: which loop, in how many parts, and that the number of threads changes no bit."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

import bnncc
from bnncc.dialect import computes
from bnncc.runtime.bits import BitLayout
from bnncc.targets.descriptor import get_target
from bnncc.targets.rules.base import balance

from .kernels import Kernel
from .test_emit import BinaryConv, Sign


def _binary_conv(rows: int, channels: int, out: int) -> str:
    """The scheduled kernel, as text, of a 3×3 convolution whose result has so many rows."""
    spec = get_target("x86-64-v4")
    layout = BitLayout.for_target(channels, 1, spec.word_bits, spec.max_lanes)
    lanes = spec.binary_lanes(out)
    x = np.zeros((1, rows + 2, 16, layout.words), layout.word_dtype)
    w = np.zeros((1, out // lanes, 3, 3, layout.words, lanes), layout.word_dtype)
    kernel = Kernel(spec, lambda a, b: computes.binary_conv2d(a, b, depth=9 * channels, out_channels=out), x, w)
    return str(kernel.scheduled["kernel"].script())


def _parallel(script: str) -> list[int]:
    return [int(extent) for extent in re.findall(r"T\.parallel\((?:T\.int64\()?(\d+)", script)]


def test_rows_are_shared_out_inside_the_loop_over_channels() -> None:
    """Each thread goes over all channels for its rows: one launch, and no two threads write into one pixel."""
    script = _binary_conv(28, 128, 128)
    assert _parallel(script) == [28]
    launch, parallel = script.index("pragma_parallel_launch_point"), script.index("T.parallel(")
    assert launch < parallel and script.count("pragma_parallel_launch_point") == 1


def test_few_rows_are_shared_out_together_with_channels() -> None:
    script = _binary_conv(7, 512, 512)
    assert "pragma_parallel_launch_point" not in script
    (tasks,) = _parallel(script)
    assert tasks > 7 and tasks % 7 == 0


def test_weights_that_stay_in_the_cache_need_no_launch_point() -> None:
    script = _binary_conv(28, 64, 64)
    assert "pragma_parallel_launch_point" not in script and _parallel(script) == [28]


@pytest.mark.parametrize(
    ("tasks", "share"), [(1, 1 / 4), (2, 1 / 2), (7, 7 / 9), (12, 1), (14, 14 / 16), (56, 56 / 57)]
)
def test_balance(tasks: int, share: float) -> None:
    assert balance(tasks) == pytest.approx(share, rel=1e-12)  # one division of small integers


class _Network(nn.Module):
    """Layers of every loop that is shared out: rows, rows within channels (with a rest of channels), both, planes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1), nn.MaxPool2d(2))
        self.first = nn.Sequential(BinaryConv(64, 192, 3, bias=False), nn.BatchNorm2d(192))
        self.second = nn.Sequential(BinaryConv(192, 192, 3, bias=False), nn.BatchNorm2d(192), nn.MaxPool2d(2))
        self.rest = nn.Sequential(nn.Conv2d(192, 176, 3, 1, 1), nn.ReLU())
        self.last = nn.Sequential(BinaryConv(176, 256, 3, 2, bias=False), nn.BatchNorm2d(256))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 1000))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.stem(x))
        return self.head(Sign()(self.last(self.rest(self.second(x)))))


def test_the_number_of_threads_changes_no_bit() -> None:
    torch.manual_seed(0)
    image = torch.randn(2, 3, 40, 36)
    artifact = bnncc.compile(_Network().eval(), (image,), options=bnncc.Options(cache=False))
    with artifact.load(threads=1) as session:
        expected = np.array(session(image.numpy()))
        for threads in (2, 3, 4, 5, 7, 8, 30):
            session.set_threads(threads)
            for _ in range(3):
                np.testing.assert_array_equal(session(image.numpy()), expected)
