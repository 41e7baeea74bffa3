"""Packing, padding and pooling of bits against NumPy."""

from __future__ import annotations

import numpy as np
import pytest

from bnncc.dialect import computes, computes_images, reference
from bnncc.runtime.bits import BitLayout
from bnncc.targets import emit
from bnncc.targets.descriptor import TargetSpec
from bnncc.targets.rules import pack

from .kernels import TARGETS, Kernel

rng = np.random.default_rng(1)

PREDICATES = ["not_lt", "gt", "ge", "not_le", "ternary"]
SPECIAL = np.array([np.nan, 0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45], np.float32)


def _floats(*shape: int) -> np.ndarray:
    x = rng.standard_normal(shape).astype(np.float32)
    flat = x.reshape(-1)
    at = rng.choice(flat.size, min(flat.size, 64), replace=False)
    flat[at] = SPECIAL[rng.integers(0, SPECIAL.size, at.size)]
    return x


def _layout(target: TargetSpec, channels: int, groups: int = 1) -> BitLayout:
    return target.bit_layout(channels, groups)


def _packed(values: np.ndarray, layout: BitLayout, ternary: bool) -> np.ndarray:
    return (reference.pack_ternary if ternary else reference.pack_signs)(values, layout).view(np.uint8)


@pytest.mark.parametrize("predicate", PREDICATES)
@pytest.mark.parametrize("data_layout", ["NHWC", "NCHW"])
def test_predicates(target: TargetSpec, predicate: str, data_layout: str) -> None:
    """Zeros of both signs, NaN, infinities and denormals; padded pixels; two groups."""
    layout = _layout(target, 48, 2)
    x = _floats(2, 5, 7, 48)
    given = x if data_layout == "NHWC" else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    padding, ternary = (1, 2, 0, 1), predicate == "ternary"
    kernel = Kernel(
        target,
        lambda a: computes.pack(a, layout, predicate, padding=padding, pad_bit=1, data_layout=data_layout),
        given,
    )
    assert not emit.unscheduled(kernel.scheduled)
    values = reference.pad_pixels(reference.signs(x, predicate), padding, 0 if ternary else 1)
    np.testing.assert_array_equal(kernel(given), _packed(values, layout, ternary))


@pytest.mark.parametrize("channels", [1, 2, 31, 32, 33, 63, 64, 65, 128, 130, 200, 380])
@pytest.mark.parametrize("data_layout", ["NHWC", "NCHW"])
def test_channels_around_word_boundaries(target: TargetSpec, channels: int, data_layout: str) -> None:
    layout = _layout(target, channels)
    x = _floats(1, 3, 5, channels)
    given = x if data_layout == "NHWC" else np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    kernel = Kernel(target, lambda a: computes.pack(a, layout, "not_lt", data_layout=data_layout), given)
    np.testing.assert_array_equal(kernel(given), _packed(reference.signs(x, "not_lt"), layout, False))


def test_bits_that_llvm_sees_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the unrolling LLVM meets loops over lanes; its vectorizer of straight-line code lost bits of them."""
    monkeypatch.setattr(emit, "_unrolled", lambda func, scheduled: scheduled)
    monkeypatch.setattr(pack, "partition", lambda sch, loop: None)
    if "x86-64-v2" not in TARGETS:
        pytest.skip("this machine runs no x86-64 code")
    target = TARGETS["x86-64-v2"]
    layout, x = _layout(target, 380), _floats(1, 3, 5, 380)
    kernel = Kernel(target, lambda a: computes.pack(a, layout, "not_lt"), x)
    np.testing.assert_array_equal(kernel(x), _packed(reference.signs(x, "not_lt"), layout, False))


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 16), (4, 4), (3, 11), (13, 13), (20, 30)])
def test_images_of_any_size_from_nchw(target: TargetSpec, height: int, width: int) -> None:
    layout = _layout(target, 64)
    x = _floats(2, 64, height, width)
    kernel = Kernel(
        target, lambda a: computes.pack(a, layout, "gt", padding=(1, 1, 1, 1), data_layout="NCHW"), x
    )  # fmt: skip
    values = reference.pad_pixels(reference.signs(x.transpose(0, 2, 3, 1), "gt"), (1, 1, 1, 1), -1)
    np.testing.assert_array_equal(kernel(x), _packed(values, layout, False))


@pytest.mark.parametrize("channels", [64, 65, 96])
@pytest.mark.parametrize("bit", [0, 1])
def test_pad_bits_keeps_padding_channels_zero(target: TargetSpec, channels: int, bit: int) -> None:
    layout = _layout(target, channels)
    values = reference.signs(_floats(1, 4, 5, channels), "not_lt")
    packed = _packed(values, layout, False)
    kernel = Kernel(target, lambda a: computes.pad_bits(a, layout, (0, 1, 2, 3), bit), packed)
    expected = _packed(reference.pad_pixels(values, (0, 1, 2, 3), 2 * bit - 1), layout, False)
    np.testing.assert_array_equal(kernel(packed), expected)


@pytest.mark.parametrize("ternary", [False, True])
@pytest.mark.parametrize("channels", [1, 64, 130, 200])
@pytest.mark.parametrize(
    ("image", "pool", "strides", "padding"),
    [
        ((7, 7), (2, 2), (2, 2), (0, 0, 0, 0)), ((8, 5), (3, 3), (2, 1), (1, 1, 1, 1)),
        ((8, 5), (3, 2), (2, 3), (1, 0, 0, 1)),
    ],
)  # fmt: skip
def test_max_pool2d_bits(
    target: TargetSpec, channels: int, ternary: bool, image: tuple, pool: tuple, strides: tuple, padding: tuple
) -> None:
    layout = _layout(target, channels)
    values = reference.signs(_floats(1, *image, channels), "ternary" if ternary else "not_lt")
    packed = _packed(values, layout, ternary)
    kernel = Kernel(
        target, lambda a: computes.max_pool2d_bits(a, pool, strides, padding, planes=1 + ternary), packed
    )  # fmt: skip
    assert not emit.unscheduled(kernel.scheduled)
    expected = reference.max_pool(values, pool, strides, padding)
    np.testing.assert_array_equal(kernel(packed), _packed(expected, layout, ternary))


def test_min_pool_of_inverted_bits(target: TargetSpec) -> None:
    layout = _layout(target, 64)
    values = reference.signs(_floats(1, 6, 6, 64), "not_lt")
    packed = _packed(values, layout, False)
    kernel = Kernel(target, lambda a: computes.max_pool2d_bits(a, (2, 2), (2, 2), inverted=True), packed)
    expected = -reference.max_pool(-values, (2, 2), (2, 2), (0, 0, 0, 0))
    np.testing.assert_array_equal(kernel(packed), _packed(expected, layout, False))


@pytest.mark.parametrize("pad_bit", [0, 1])
@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize(("channels", "groups"), [(33, 33), (34, 17), (66, 2), (40, 1)])
def test_slices_of_bits_beside_each_other(
    target: TargetSpec, channels: int, groups: int, depth: int, pad_bit: int
) -> None:
    """The depth of a 3-D convolution, gathered from packed images; slices beyond it hold one bit everywhere."""
    layout = BitLayout.for_target(channels, groups, 32, 16)
    x = rng.integers(0, 256, (depth, 4, 4, layout.bytes), np.uint8)
    kernel = Kernel(
        target,
        lambda t: computes_images.unfold_depth(
            t, depth=depth, kernel=3, stride=1, dilation=1, padding=(1, 1), groups=groups,
            outside=computes.constant_byte(layout, pad_bit),
        ),
        x,
    )  # fmt: skip
    outside = np.broadcast_to(layout.constant_bytes(pad_bit), (1, 4, 4, layout.bytes))
    padded = np.concatenate([outside, x, outside])
    slices = np.stack([padded[k : k + depth] for k in range(3)], axis=-2)  # [D, H, W, 3, bytes]
    grouped = slices.reshape(depth, 4, 4, 3, groups, layout.group_bytes).swapaxes(-3, -2)
    np.testing.assert_array_equal(kernel(x), grouped.reshape(depth, 4, 4, -1))
