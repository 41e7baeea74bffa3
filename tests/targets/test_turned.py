"""Convolutions whose results are turned to NCHW in their kernel, bit for bit against NumPy."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest

from bnncc.dialect import computes, computes_float, reference
from bnncc.passes.pack_bits import reduction_in_lanes
from bnncc.runtime.bits import BitLayout
from bnncc.targets import emit
from bnncc.targets.descriptor import TargetSpec
from bnncc.targets.rules.turned import choose_chunk

from .kernels import Kernel
from .test_lane_conv import TARGET as LANES

rng = np.random.default_rng(5)

TO_NCHW = (0, 3, 1, 2)


def _integers(*shape: int) -> np.ndarray:
    """Floats whose products and sums are exact."""
    return rng.integers(-4, 5, shape).astype(np.float32)


def _signs(*shape: int) -> np.ndarray:
    return (rng.integers(0, 2, shape) * 2 - 1).astype(np.int8)


def _assert_turned(kernel: Kernel) -> None:
    """No tensor in NHWC lies between the convolution and its transposition."""
    buffers = kernel.scheduled["kernel"].body.block.alloc_buffers
    assert buffers and {buffer.scope() for buffer in buffers} == {"local"}


def _float_conv(target: TargetSpec, x: np.ndarray, w: np.ndarray, groups: int = 1, strides: tuple = (1, 1)) -> Kernel:
    packed = reference.block_conv_weights(w, groups, target.conv_lanes(len(w) // groups))
    shift = _integers(len(w))

    def f(x: Any, w: Any, shift: Any) -> Any:
        y = computes_float.conv2d(x, w, out_channels=int(shift.shape[0]), strides=strides)
        return computes_float.permute(computes_float.relu(computes_float.add(y, shift)), TO_NCHW)

    kernel = Kernel(target, f, x, packed, shift)
    assert not emit.unscheduled(kernel.scheduled)
    expected = np.maximum(reference.conv2d(x, w, strides, (1, 1), groups) + shift, 0)
    np.testing.assert_array_equal(kernel(x, packed, shift), expected.transpose(TO_NCHW))
    return kernel


# Rows in one chunk and in several; widths that no tile divides, and that are prime; more columns than a chunk takes; a
# single row, a single column; batches; more than one chunk of channels.
@pytest.mark.parametrize(
    ("image", "out"),
    [
        ((1, 6, 16), 32), ((1, 7, 7), 64), ((3, 5, 13), 48), ((1, 4, 31), 16), ((2, 3, 113), 80), ((1, 3, 230), 32),
        ((1, 3, 18), 16), ((1, 40, 3), 16), ((3, 14, 14), 128), ((1, 19, 37), 112), ((1, 4, 259), 64),
    ],
)  # fmt: skip
def test_float_images(target: TargetSpec, image: tuple[int, int, int], out: int) -> None:
    _assert_turned(_float_conv(target, _integers(*image, 5), _integers(out, 5, 3, 3)))


@pytest.mark.parametrize(("channels", "out", "groups"), [(8, 32, 4), (16, 64, 2), (3, 48, 3)])
def test_groups(target: TargetSpec, channels: int, out: int, groups: int) -> None:
    w = _integers(out, channels // groups, 3, 3)
    _assert_turned(_float_conv(target, _integers(2, 11, 10, channels), w, groups, (1, 2)))


def test_large_weights(target: TargetSpec) -> None:
    """They are kept in the cache, and the images run past them."""
    _assert_turned(_float_conv(target, _integers(2, 9, 10, 64), _integers(64, 64, 3, 3)))


# Fewer pixels than a square of vectors, and channels that no vector divides: the transposition is a loop behind.
@pytest.mark.parametrize(("image", "out"), [((1, 3, 4), 32), ((1, 8, 9), 2), ((2, 1, 1), 16)])
def test_what_is_left_to_loops(target: TargetSpec, image: tuple[int, int, int], out: int) -> None:
    _float_conv(target, _integers(*image, 4), _integers(out, 4, 1, 1))


# In words, and in bytes of which two steps add up.
@pytest.mark.parametrize(
    ("image", "channels", "out"),
    [((1, 9, 9), 64, 64), ((2, 7, 15), 130, 32), ((1, 30, 30), 32, 16), ((3, 6, 58), 64, 96), ((1, 16, 9), 512, 48)],
)
def test_binary(target: TargetSpec, image: tuple[int, int, int], channels: int, out: int) -> None:
    x, w = _signs(*image, channels), _signs(out, channels, 3, 3)
    layout = BitLayout.for_target(channels, 1, target.word_bits, target.max_lanes)
    words = reference.pack_signs(x, layout)
    packed = reference.pack_conv_weights(w, layout, target.binary_lanes(out))
    _assert_turned(_binary_conv(target, words, packed, x, w))


@pytest.mark.parametrize(
    ("image", "channels", "out"), [((1, 9, 10), 128, 64), ((2, 6, 18), 64, 32), ((3, 5, 8), 256, 16)]
)
def test_binary_in_lanes(image: tuple[int, int, int], channels: int, out: int) -> None:
    x, w = _signs(*image, channels), _signs(out, channels, 3, 3)
    layout = BitLayout.for_target(channels, 1, 8, LANES.max_lanes)
    packed = reduction_in_lanes(reference.pack_conv_weights(w, layout, LANES.lane_block), 16)
    _assert_turned(_binary_conv(LANES, reference.pack_signs(x, layout), packed, x, w, in_lanes=16))


def _binary_conv(
    target: TargetSpec, words: np.ndarray, packed: np.ndarray, x: np.ndarray, w: np.ndarray, **options: int
) -> Kernel:
    scale = _integers(len(w))

    def f(a: Any, b: Any, scale: Any) -> Any:
        dot = computes.binary_conv2d(a, b, depth=math.prod(w.shape[1:]), out_channels=len(w), **options)
        y = computes_float.multiply(computes_float.to_float(dot), scale)
        return computes_float.permute(y, TO_NCHW)

    kernel = Kernel(target, f, words, packed, scale)
    assert not emit.unscheduled(kernel.scheduled)
    expected = reference.conv2d(x, w, (1, 1), (1, 1)).astype(np.float32) * scale
    np.testing.assert_array_equal(kernel(words, packed, scale), expected.transpose(TO_NCHW))
    return kernel


def test_chunks() -> None:
    """They divide the image, consist of whole tiles, and are no shorter than a square of vectors."""
    sizes = (1, 2, 7, 8, 9, 13, 14, 31, 56, 112, 230)
    for height, width, size in itertools.product(sizes, sizes, (4, 8)):
        if height * width < size:
            continue
        for cols, channels in itertools.product((1, 2, 4, 7, 14), (2, 8, 16, 32)):
            if 3 * channels < size:
                continue
            rows = height if cols >= width and height <= 4 else 1
            chunk = choose_chunk(2, height, width, 3 * channels, (rows, min(cols, width), channels), size)
            case = f"{height}×{width}, {cols}×{channels}: {chunk}"
            assert height % chunk.rows == width % chunk.cols == 3 * channels % chunk.channels == 0, case
            assert chunk.rows % rows == 0 and chunk.channels % channels == 0, case
            assert chunk.cols == width or (chunk.rows == 1 and chunk.cols % min(cols, width) == 0), case
            assert chunk.pixels >= size and chunk.channels >= size, case
