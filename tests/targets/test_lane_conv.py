"""Binary convolutions with the reduction in the lanes, bit for bit against NumPy, with the portable sums across lanes.

NEON's own sums run under QEMU, in the conformance grid of the target rpi4.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from bnncc.dialect import computes, computes_float, reference
from bnncc.passes.pack_bits import reduction_in_lanes
from bnncc.runtime.bits import BitLayout
from bnncc.targets import emit
from bnncc.targets.descriptor import get_target, native

from .kernels import Kernel

rng = np.random.default_rng(3)

TARGET = replace(
    native(), name="lanes", word_bits=8, popcount="bytes", vector_bits=128, max_lanes=8, masks=False, lane_bytes=16
)


def _signs(*shape: int) -> np.ndarray:
    return (rng.integers(0, 2, shape) * 2 - 1).astype(np.int8)


def _operands(x: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    layout = BitLayout.for_target(x.shape[-1], 1, 8, TARGET.max_lanes)
    packed = reference.pack_conv_weights(w, layout, TARGET.lane_block)
    return reference.pack_signs(x, layout), reduction_in_lanes(packed, 16)


def _check(x: np.ndarray, w: np.ndarray, strides: tuple = (1, 1), dilation: tuple = (1, 1)) -> None:
    words, packed = _operands(x, w)
    kernel = Kernel(
        TARGET,
        lambda a, b: computes.binary_conv2d(
            a, b, depth=math.prod(w.shape[1:]), out_channels=len(w), strides=strides, dilation=dilation, in_lanes=16
        ),
        words,
        packed,
    )
    assert not emit.unscheduled(kernel.scheduled)
    np.testing.assert_array_equal(kernel(words, packed), reference.conv2d(x, w, strides, dilation))


# One pixel to a vector, then 2, 4 and 8 of them; parts of a pixel; channels that leave padding bits.
@pytest.mark.parametrize("channels", [128, 121, 64, 57, 32, 16, 12, 256, 384, 1024])
def test_channels(channels: int) -> None:
    _check(_signs(1, 5, 18, channels), _signs(16, channels, 3, 3))


# Tiles with a rest along the image and none; a batch of single pixels; one block of outputs and an odd number of them.
@pytest.mark.parametrize(
    ("image", "out"),
    [((1, 3, 3), 8), ((2, 4, 9), 24), ((1, 5, 25), 40), ((37, 3, 3), 48), ((1, 17, 33), 96), ((3, 4, 10), 80)],
)
def test_ragged_tiles(image: tuple[int, int, int], out: int) -> None:
    _check(_signs(*image, 128), _signs(out, 128, 3, 3))


@pytest.mark.parametrize("width", [4, 6, 8, 12, 16, 30])
def test_vectors_of_two_pixels(width: int) -> None:
    _check(_signs(2, 4, width, 64), _signs(24, 64, 3, 3))


@pytest.mark.parametrize(
    ("kernel", "strides", "dilation"),
    [((1, 1), (1, 1), (1, 1)), ((3, 3), (2, 2), (1, 1)), ((2, 3), (2, 3), (3, 2)), ((5, 1), (1, 1), (2, 1))],
)
def test_windows(kernel: tuple, strides: tuple, dilation: tuple) -> None:
    _check(_signs(2, 11, 12, 256), _signs(16, 256, *kernel), strides, dilation)
    if strides[1] == 1:
        _check(_signs(2, 11, 12 + dilation[1] * (kernel[1] - 1), 64), _signs(16, 64, *kernel), strides, dilation)


# Steps to a chunk: 2 to 18 in one, the rows of 512 channels, the positions of 1280, parts of a position of 4608; where
# all differ, every byte holds its most, and 5×5×3072 terms are more than 16 bits hold.
@pytest.mark.parametrize("agree", [0, 1])
@pytest.mark.parametrize(
    ("channels", "kernel"),
    [(128, (1, 2)), (128, (1, 3)), (128, (2, 2)), (128, (3, 3)), (256, (3, 3)), (512, (3, 3)), (1280, (3, 3)),
     (4608, (1, 1)), (3072, (5, 5)), (64, (3, 3)), (64, (5, 5)), (32, (4, 4))],
)  # fmt: skip
def test_sums_at_their_ends(channels: int, kernel: tuple[int, int], agree: int) -> None:
    x = np.ones((1, 6, 6 if kernel[1] == 3 else 3 + kernel[1], channels), np.int8)
    w = np.full((8, channels, *kernel), 2 * agree - 1, np.int8)
    w[1] = _signs(channels, *kernel)
    _check(x, w)


@pytest.mark.parametrize(
    ("channels", "out", "image"), [(64, 64, (1, 6, 10)), (128, 256, (2, 5, 9)), (32, 8, (1, 4, 6))]
)
def test_threshold_pack(channels: int, out: int, image: tuple[int, int, int]) -> None:
    x, w = _signs(*image, channels), _signs(out, channels, 3, 3)
    words, packed = _operands(x, w)
    layout = BitLayout.for_target(out, 1, 8, TARGET.max_lanes)
    t = rng.integers(-20, 20, out).astype(np.int32)

    def f(a, b, t):
        dot = computes.binary_conv2d(a, b, depth=9 * channels, out_channels=out, in_lanes=16)
        return computes.threshold_pack(dot, t, layout)

    kernel = Kernel(TARGET, f, words, packed, t)
    assert not emit.unscheduled(kernel.scheduled)
    np.testing.assert_array_equal(kernel(words, packed, t), layout.pack(reference.conv2d(x, w) >= t).view(np.uint8))


@pytest.mark.parametrize(
    ("channels", "out", "image", "padding"),
    [(64, 64, (1, 9, 10), (1, 1, 1, 1)), (128, 96, (2, 6, 9), (0, 1, 2, 0)), (256, 128, (3, 3, 3), (0, 0, 0, 0))],
)
def test_float_epilogue_with_residual_and_packed_copy(
    channels: int, out: int, image: tuple[int, int, int], padding: tuple[int, int, int, int]
) -> None:
    x, w = _signs(*image, channels), _signs(out, channels, 3, 3)
    words, packed = _operands(x, w)
    layout = BitLayout.for_target(out, 1, 8, TARGET.max_lanes)
    dot = reference.conv2d(x, w)
    a, b = rng.standard_normal((2, out)).astype(np.float32)
    residual = rng.standard_normal(dot.shape).astype(np.float32)

    def f(x, w, a, b, residual):
        y = computes_float.to_float(computes.binary_conv2d(x, w, depth=9 * channels, out_channels=out, in_lanes=16))
        y = computes_float.add(computes_float.scale_shift(computes_float.relu(y), a, b), residual)
        return y, computes.pack(y, layout, "not_lt", padding=padding, pad_bit=1)

    args = (words, packed, a, b, residual)
    kernel = Kernel(TARGET, f, *args)
    assert not emit.unscheduled(kernel.scheduled)
    y, bits = kernel(*args)
    # One rounding of max(dot, 0)·a + b: float64 holds the product of a float32 and a small integer exactly.
    expected = (np.maximum(dot, 0) * a.astype(np.float64) + b).astype(np.float32) + residual
    np.testing.assert_array_equal(y, expected)
    signs = reference.pad_pixels(reference.signs(expected, "not_lt"), padding, 1)
    np.testing.assert_array_equal(bits, reference.pack_signs(signs, layout).view(np.uint8))


def test_where_it_does_not_suit() -> None:
    """Bytes of a pixel that fill no vector, strides over vectors of pixels, widths and outputs with a rest, depths that
    are not worth it, and processors without."""
    rpi4 = get_target("rpi4")
    assert rpi4.reduction_lanes(16, 9, 7, 2, 128) == 16
    assert rpi4.reduction_lanes(8, 9, 56, 1, 64) == 16
    for case in (
        (12, 9, 56, 1, 64),
        (24, 9, 56, 1, 64),
        (8, 9, 56, 2, 64),
        (8, 9, 7, 1, 64),
        (16, 9, 7, 1, 60),
        (16, 1, 7, 1, 64),
    ):
        assert rpi4.reduction_lanes(*case) == 0
    assert get_target("x86-64-v3").reduction_lanes(16, 9, 56, 1, 64) == 0
