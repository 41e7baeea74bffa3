"""Windows over the planes of NCHW images: the values of eager, and the bits of the kernels on NHWC."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bnncc.dialect import computes_float, computes_planar
from bnncc.targets import emit
from bnncc.targets.descriptor import TargetSpec

from ..turns import in_turns
from .kernels import TARGETS, Kernel

rng = np.random.default_rng(6)

#: (image, window, strides, dilation, padding, rounding up); rows around whole vectors of 4, 8 and 16.
WINDOWS = [
    ((12, 28), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), False), ((12, 31), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), True),
    ((5, 15), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), False), ((6, 16), (2, 2), (2, 2), (1, 1), (0, 0, 0, 0), False),
    ((7, 17), (5, 5), (1, 1), (1, 1), (2, 2, 2, 2), False), ((9, 33), (2, 3), (1, 2), (3, 2), (1, 0, 0, 3), False),
    ((40, 112), (3, 3), (2, 2), (1, 1), (1, 1, 1, 1), False), ((70, 70), (3, 3), (1, 1), (1, 1), (1, 1, 1, 1), False),
    ((3, 20), (3, 1), (1, 1), (1, 1), (0, 0, 0, 0), False), ((4, 1), (1, 1), (1, 1), (1, 1), (0, 0, 0, 0), False),
    ((8, 14), (8, 8), (2, 2), (1, 1), (3, 4, 3, 4), False), ((11, 23), (3, 3), (3, 2), (1, 1), (1, 1, 1, 1), True),
    ((14, 14), (7, 7), (1, 1), (1, 1), (3, 3, 3, 3), False), ((13, 45), (5, 5), (2, 2), (1, 1), (2, 2, 2, 2), False),
    ((12, 57), (7, 7), (2, 2), (1, 1), (3, 3, 3, 3), False), ((10, 50), (5, 5), (1, 1), (2, 2), (4, 4, 4, 4), False),
]  # fmt: skip


#: The widths of vectors.
_NAMES = [name for name in ("native", "x86-64-v3", "x86-64-v2") if name in TARGETS]


@pytest.fixture(params=_NAMES, scope="module")
def target(request: pytest.FixtureRequest) -> TargetSpec:
    return TARGETS[request.param]


def _image(*shape: int) -> np.ndarray:
    """Floats with zeros of both signs, infinities and NaN among them."""
    x = rng.standard_normal(shape).astype(np.float32)
    for value, share in ((np.nan, 50), (0.0, 3), (-0.0, 3), (-np.inf, 20), (np.inf, 50)):
        x.reshape(-1)[rng.integers(0, x.size, x.size // share + 1)] = value
    return x


def _nhwc(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.transpose(0, 2, 3, 1))


def _run(target: TargetSpec, f: Any, *arrays: np.ndarray, rule: str = "windows over planes") -> np.ndarray:
    built = Kernel(target, f, *arrays)
    assert {f.attrs[emit.SCHEDULED_BY] for f in built.scheduled.functions.values()} == {rule}
    result: np.ndarray = built(*arrays)
    return result


def _same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(actual.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize(("target", "case"), in_turns(_NAMES, WINDOWS), indirect=["target"])
def test_the_bits_of_the_kernels_on_nhwc(target: TargetSpec, case: Any) -> None:
    image, window, strides, dilation, padding, ceil_mode = case
    x = _image(2, 3, *image)

    def both(name: str, *weights: tuple[np.ndarray, np.ndarray], **attrs: Any) -> None:
        def kernel(module: Any) -> Any:
            def f(x: Any, *w: Any) -> Any:
                return getattr(module, name)(x, *(w or (window, strides)), padding=padding, **attrs)

            return f

        planar = _run(target, kernel(computes_planar), x, *(w for w, _ in weights))
        last = _run(target, kernel(computes_float), _nhwc(x), *(w for _, w in weights), rule="loop nests")
        np.testing.assert_array_equal(np.isnan(_nhwc(planar)), np.isnan(last))
        _same_bits(np.nan_to_num(_nhwc(planar)), np.nan_to_num(last))

    both("max_pool2d", dilation=dilation, ceil_mode=ceil_mode)
    w = rng.standard_normal((3, *window)).astype(np.float32)
    both("depthwise_conv2d", (w, np.ascontiguousarray(w.transpose(1, 2, 0))), strides=strides, dilation=dilation)
    if dilation == (1, 1):
        both("avg_pool2d", ceil_mode=ceil_mode, count_include_pad=False)
        both("avg_pool2d", ceil_mode=ceil_mode, count_include_pad=True)


@pytest.mark.parametrize(
    ("target", "height", "width"),
    in_turns(_NAMES, (1, 5, 7, 11, 24), (1, 3, 4, 9, 15, 17, 24, 29, 33, 40, 63)),
    indirect=["target"],
)
def test_every_end_of_a_row(target: TargetSpec, width: int, height: int) -> None:
    """Vectors that begin early, of fewer lanes, and in parts, in tiles of any number of rows: one channel, a batch."""
    x, w = rng.integers(-4, 5, (3, 1, height, width)).astype(np.float32), rng.integers(-4, 5, (1, 5, 5))
    w = w.astype(np.float32)
    actual = _run(target, lambda x, w: computes_planar.depthwise_conv2d(x, w, padding=(2, 2, 2, 2)), x, w)
    expected = torch.nn.functional.conv2d(torch.from_numpy(x), torch.from_numpy(w)[:, None], padding=2)
    np.testing.assert_array_equal(actual, expected.numpy())


@pytest.mark.parametrize("ceil_mode", [False, True])
def test_a_maximum_as_torch_computes_it(target: TargetSpec, ceil_mode: bool) -> None:
    """NaN wins, of zeros the first: the same bits, those of NaN too."""
    x = _image(2, 5, 13, 37)
    pooled = _run(target, lambda x: computes_planar.max_pool2d(x, (3, 3), (2, 2), (1, 1, 1, 1), ceil_mode=ceil_mode), x)
    _same_bits(pooled, torch.nn.functional.max_pool2d(torch.from_numpy(x), 3, 2, 1, ceil_mode=ceil_mode).numpy())


def test_what_is_fused_before_and_behind(target: TargetSpec) -> None:
    """An elementwise chain is computed while the image is read, and one behind it reads other tensors at its pixels."""
    x, other, a = _image(1, 3, 8, 38), _image(1, 3, 4, 19), rng.standard_normal(3).astype(np.float32)

    def f(x: Any, other: Any, a: Any) -> Any:
        pooled = computes_planar.max_pool2d(computes_float.relu(x), (2, 2), (2, 2))
        return computes_float.add(computes_float.multiply(pooled, a, axis=1), other)

    pooled = torch.nn.functional.max_pool2d(torch.relu(torch.from_numpy(x)), 2, 2)
    expected = pooled * torch.from_numpy(a)[:, None, None] + torch.from_numpy(other)
    np.testing.assert_array_equal(_run(target, f, x, other, a), expected.numpy())


def test_two_results_are_left_to_loop_nests(target: TargetSpec) -> None:
    x = _image(1, 2, 6, 16)

    def f(x: Any) -> Any:
        pooled = computes_planar.max_pool2d(x, (2, 2), (2, 2))
        return pooled, computes_float.relu(pooled)

    built = Kernel(target, f, x)
    assert {f.attrs[emit.SCHEDULED_BY] for f in built.scheduled.functions.values()} == {"loop nests"}
    expected = torch.nn.functional.max_pool2d(torch.from_numpy(x), 2, 2)
    for actual, wanted in zip(built(x), (expected, torch.relu(expected)), strict=True):
        np.testing.assert_array_equal(actual, wanted.numpy())
