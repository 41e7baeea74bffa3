"""Binary convolutions on the machine's own instruction set and on older ones, bit for bit against NumPy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from bnncc.dialect import computes, computes_float, reference
from bnncc.runtime.bits import BitLayout
from bnncc.targets import emit
from bnncc.targets.descriptor import TargetSpec, get_target

from .kernels import Kernel

rng = np.random.default_rng(0)


def _signs(*shape: int, ternary: bool = False) -> np.ndarray:
    values = rng.integers(0, 2, shape) * 2 - 1
    return (values * rng.integers(0, 2, shape) if ternary else values).astype(np.int8)


def _operands(
    target: TargetSpec, x: np.ndarray, w: np.ndarray, groups: int, ternary_x: bool = False, ternary_w: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    layout = BitLayout.for_target(x.shape[-1], groups, target.word_bits, target.max_lanes)
    words = (reference.pack_ternary if ternary_x else reference.pack_signs)(x, layout)
    lanes = target.binary_lanes(w.shape[0] // groups)
    return words, reference.pack_conv_weights(w, layout, lanes, ternary=ternary_w)


def _check_conv(
    target: TargetSpec,
    x: np.ndarray,
    w: np.ndarray,
    strides: tuple,
    dilation: tuple,
    groups: int,
    counting: str = "words",
    **ternary: bool,
) -> None:
    words, packed = _operands(target, x, w, groups, **ternary)
    kernel = Kernel(
        target,
        lambda a, b: computes.binary_conv2d(
            a, b, depth=int(np.prod(w.shape[1:])), out_channels=w.shape[0], strides=strides, dilation=dilation,
            counting=counting,
        ),
        words,
        packed,
    )  # fmt: skip
    assert not emit.unscheduled(kernel.scheduled)
    expected = reference.conv2d(x, w, strides, dilation, groups)
    np.testing.assert_array_equal(kernel(words, packed), expected)


@pytest.mark.parametrize("channels", [1, 2, 31, 32, 33, 63, 64, 65, 128, 130])
def test_channels_around_word_boundaries(target: TargetSpec, channels: int) -> None:
    _check_conv(target, _signs(1, 6, 9, channels), _signs(20, channels, 3, 3), (1, 1), (1, 1), 1)


# Pixels and channels that no register tile divides; one pixel; one channel; a batch of single pixels.
@pytest.mark.parametrize(
    ("image", "out"),
    [
        ((3, 3, 3), 64), ((1, 3, 3), 1), ((1, 4, 19), 33), ((2, 15, 7), 64), ((1, 5, 25), 40), ((37, 3, 3), 48),
        ((1, 17, 33), 96), ((1, 6, 6), 17), ((1, 31, 16), 80),
    ],
)  # fmt: skip
def test_ragged_tiles(target: TargetSpec, image: tuple[int, int, int], out: int) -> None:
    _check_conv(target, _signs(*image, 64), _signs(out, 64, 3, 3), (1, 1), (1, 1), 1)


@pytest.mark.parametrize(
    ("kernel", "strides", "dilation", "groups"),
    [
        ((1, 1), (1, 1), (1, 1), 1), ((3, 3), (2, 2), (1, 1), 1), ((2, 3), (2, 3), (3, 2), 2),
        ((4, 4), (1, 1), (1, 1), 4), ((2, 2), (2, 2), (1, 1), 1), ((3, 1), (2, 3), (1, 1), 2),
        ((5, 5), (1, 1), (2, 1), 8), ((1, 1), (2, 2), (1, 1), 1),
    ],
)  # fmt: skip
def test_windows_and_groups(target: TargetSpec, kernel: tuple, strides: tuple, dilation: tuple, groups: int) -> None:
    _check_conv(target, _signs(2, 11, 12, 48), _signs(32, 48 // groups, *kernel), strides, dilation, groups)


def _added_up(target: TargetSpec) -> str:
    """How bits are added up before they are counted: as the target does it, or else in the way that needs nothing."""
    return "carry_save" if target.counting == "words" else target.counting


@pytest.mark.parametrize("channels", [1, 64, 130, 320, 576])
@pytest.mark.parametrize("kernel", [(1, 1), (3, 3), (2, 5), (11, 3)])
def test_bits_added_up_before_they_are_counted(target: TargetSpec, channels: int, kernel: tuple) -> None:
    """Windows of fewer, as many and more words than carry-save adders, and than bytes, take at once."""
    x, w = _signs(1, 12, 9, channels), _signs(24, channels, *kernel)
    _check_conv(target, x, w, (1, 2), (1, 1), 1, counting=_added_up(target))


def test_avx2_counts_in_bytes() -> None:
    """Of other instructions than LLVM's own: else the layers would be right, but slower."""
    target = get_target("x86-64-v3")
    words, packed = _operands(target, _signs(1, 6, 9, 64), _signs(20, 64, 3, 3), 1)
    kernel = Kernel(
        target,
        lambda a, b: computes.binary_conv2d(a, b, depth=576, out_channels=20, counting=target.counting),
        words,
        packed,
    )
    assert 'T.popcount(T.reinterpret("uint8x32"' in kernel.scheduled["kernel"].script()


def test_a_last_chunk_of_fewer_words(target: TargetSpec) -> None:
    x, w = _signs(1, 3, 5, 37 * 64), _signs(24, 37 * 64, 1, 2)
    _check_conv(target, x, w, (1, 1), (1, 1), 1, counting=_added_up(target))


@pytest.mark.parametrize(("channels", "size"), [(576, 3), (36 * 64, 1)])
@pytest.mark.parametrize("agree", [0, 1])
def test_carries_of_words_that_are_all_ones(target: TargetSpec, agree: int, channels: int, size: int) -> None:
    """Words of which a byte could hold the counts of all but a few, too."""
    x, w = np.ones((1, 5, 6, channels), np.int8), np.full((16, channels, size, size), 2 * agree - 1, np.int8)
    _check_conv(target, x, w, (1, 1), (1, 1), 1, counting=_added_up(target))


@pytest.mark.parametrize(("groups", "out"), [(2, 2), (3, 15), (4, 12), (2, 40)])
def test_groups_that_fill_no_vector(target: TargetSpec, groups: int, out: int) -> None:
    _check_conv(target, _signs(1, 5, 6, 12), _signs(out, 12 // groups, 3, 3), (1, 1), (1, 1), groups)


@pytest.mark.parametrize(("ternary_x", "ternary_w"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("channels", [3, 64, 130, 300])
def test_ternary(target: TargetSpec, channels: int, ternary_x: bool, ternary_w: bool) -> None:
    x, w = _signs(1, 6, 8, channels, ternary=ternary_x), _signs(24, channels, 3, 3, ternary=ternary_w)
    _check_conv(target, x, w, (1, 1), (1, 1), 1, ternary_x=ternary_x, ternary_w=ternary_w)


def test_ternary_weights_with_their_own_depths(target: TargetSpec) -> None:
    x, w = _signs(1, 6, 8, 65), _signs(24, 65, 3, 3, ternary=True)
    words, packed = _operands(target, x, w, 1, ternary_w=True)
    terms = np.abs(w).sum((1, 2, 3), dtype=np.int32)
    kernel = Kernel(
        target,
        lambda a, b, n: computes.binary_conv2d(a, b, depth=0, out_channels=24, n_eff=n),
        words, packed, terms,
    )  # fmt: skip
    np.testing.assert_array_equal(kernel(words, packed, terms), reference.conv2d(x, w))


@pytest.mark.parametrize("agree", [0, 1])
def test_sums_that_overflow_narrow_accumulators(target: TargetSpec, agree: int) -> None:
    """5×5×3072 terms that all agree or all differ: more than 16 bits hold."""
    x = np.ones((1, 6, 6, 3072), np.int8)
    w = np.full((4, 3072, 5, 5), 2 * agree - 1, np.int8)
    w[1] = _signs(3072, 5, 5)
    _check_conv(target, x, w, (1, 1), (1, 1), 1)


def test_channels_that_divide_into_no_equal_chunks(target: TargetSpec) -> None:
    """37 bytes: a prime number above the 31 steps that a byte accumulator holds."""
    _check_conv(target, _signs(1, 4, 5, 296), _signs(16, 296, 3, 3), (1, 1), (1, 1), 1)


def test_padding_correction(target: TargetSpec) -> None:
    x, w = _signs(1, 5, 6, 64), _signs(16, 64, 3, 3)
    padded = reference.pad_pixels(x, (1, 1, 1, 1), -1)
    words, packed = _operands(target, padded, w, 1)
    rows = np.array([0, 1, 1, 1, 2], np.int32)
    cols = np.array([0, 1, 1, 1, 1, 2], np.int32)
    outside = {0: [0], 1: [], 2: [2]}
    correction = np.zeros((3, 3, 16), np.int32)
    for r, c in itertools.product(range(3), repeat=2):
        mask = np.zeros((3, 3), bool)
        mask[outside[r], :] = True
        mask[:, outside[c]] = True
        correction[r, c] = w[..., mask].sum((1, 2), dtype=np.int32)
    kernel = Kernel(
        target,
        lambda a, b, *at: computes.padding_correction(
            computes.binary_conv2d(a, b, depth=576, out_channels=16), *at
        ),
        words, packed, correction, rows, cols,
    )  # fmt: skip
    expected = reference.conv2d(reference.pad_pixels(x, (1, 1, 1, 1), 0), w)
    np.testing.assert_array_equal(kernel(words, packed, correction, rows, cols), expected)


def _threshold_case(target: TargetSpec, image: tuple, channels: int, out: int, groups_after: int) -> None:
    x, w = _signs(*image, channels), _signs(out, channels, 3, 3)
    words, packed = _operands(target, x, w, 1)
    layout = BitLayout.for_target(out, groups_after, target.word_bits, target.max_lanes)
    t = rng.integers(-20, 20, out).astype(np.int32)
    kernel = Kernel(
        target,
        lambda a, b, t: computes.threshold_pack(
            computes.binary_conv2d(a, b, depth=9 * channels, out_channels=out), t, layout
        ),
        words, packed, t,
    )  # fmt: skip
    assert not emit.unscheduled(kernel.scheduled)
    expected = layout.pack(reference.conv2d(x, w) >= t).view(np.uint8)
    np.testing.assert_array_equal(kernel(words, packed, t), expected)


@pytest.mark.parametrize("out", [1, 8, 32, 33, 64, 65, 96, 128, 130, 256, 320])
def test_threshold_pack(target: TargetSpec, out: int) -> None:
    _threshold_case(target, (1, 6, 11), 64, out, 1)


@pytest.mark.parametrize(("image", "out", "groups"), [((2, 7, 9), 64, 2), ((5, 3, 3), 128, 1), ((1, 4, 15), 48, 4)])
def test_threshold_pack_of_other_shapes(target: TargetSpec, image: tuple, out: int, groups: int) -> None:
    _threshold_case(target, image, 32, out, groups)


def test_threshold_at_the_ends_of_int32(target: TargetSpec) -> None:
    x, w = _signs(1, 4, 4, 64), _signs(64, 64, 3, 3)
    words, packed = _operands(target, x, w, 1)
    layout = BitLayout.for_target(64, 1, target.word_bits, target.max_lanes)
    t = np.where(np.arange(64) % 2, np.iinfo(np.int32).max, np.iinfo(np.int32).min).astype(np.int32)
    kernel = Kernel(
        target,
        lambda a, b, t: computes.threshold_pack(computes.binary_conv2d(a, b, depth=576, out_channels=64), t, layout),
        words, packed, t,
    )  # fmt: skip
    np.testing.assert_array_equal(layout.unpack(kernel(words, packed, t).view(layout.word_dtype))[0, 0, 0], t < 0)


def test_lookup_pack(target: TargetSpec) -> None:
    x, w = _signs(1, 5, 6, 33), _signs(64, 33, 3, 3)
    words, packed = _operands(target, x, w, 1)
    layout = BitLayout.for_target(64, 1, target.word_bits, target.max_lanes)
    depth = 33 * 9
    table = rng.integers(0, 2, (64, depth + 1)).astype(np.uint8)
    kernel = Kernel(
        target,
        lambda a, b, t: computes.lookup_pack(
            computes.binary_conv2d(a, b, depth=depth, out_channels=64), t, layout, lowest=-depth, step=2
        ),
        words, packed, table,
    )  # fmt: skip
    index = (reference.conv2d(x, w) + depth) // 2
    bits = np.take_along_axis(table.T[None, None], index[0][:, :, None, :].transpose(0, 1, 2, 3), axis=2)[:, :, 0]
    np.testing.assert_array_equal(kernel(words, packed, table), layout.pack(bits[None] > 0).view(np.uint8))


@pytest.mark.parametrize(
    ("image", "channels", "out", "padding"),
    [
        ((1, 9, 10), 64, 64, (0, 0, 0, 0)), ((1, 9, 10), 64, 64, (1, 1, 1, 1)), ((2, 6, 9), 32, 130, (0, 1, 2, 0)),
        ((1, 5, 5), 128, 256, (1, 1, 1, 1)), ((3, 3, 3), 16, 96, (0, 0, 0, 0)),
    ],
)  # fmt: skip
def test_float_epilogue_with_residual_and_packed_copy(
    target: TargetSpec, image: tuple, channels: int, out: int, padding: tuple
) -> None:
    """Batch norm, residual, PReLU: one kernel writes the floats and their signs."""
    x, w = _signs(*image, channels), _signs(out, channels, 3, 3)
    words, packed = _operands(target, x, w, 1)
    layout = BitLayout.for_target(out, 1, target.word_bits, target.max_lanes)
    dot = reference.conv2d(x, w)
    a, b, slope = rng.standard_normal((3, out)).astype(np.float32)
    residual = rng.standard_normal(dot.shape).astype(np.float32)

    def f(x, w, a, b, residual, slope):
        y = computes_float.to_float(computes.binary_conv2d(x, w, depth=9 * channels, out_channels=out))
        y = computes_float.prelu(computes_float.add(computes_float.scale_shift(y, a, b), residual), slope)
        return y, computes.pack(y, layout, "not_lt", padding=padding, pad_bit=1)

    args = (words, packed, a, b, residual, slope)
    kernel = Kernel(target, f, *args)
    assert not emit.unscheduled(kernel.scheduled)
    y, bits = kernel(*args)
    # One rounding of dot·a + b: float64 holds the product of a float32 and a small integer exactly.
    normed = (dot * a.astype(np.float64) + b).astype(np.float32) + residual
    expected = np.where(normed > 0, normed, normed * slope)
    np.testing.assert_array_equal(y, expected)
    signs = reference.pad_pixels(reference.signs(expected, "not_lt"), padding, 1)
    np.testing.assert_array_equal(bits, reference.pack_signs(signs, layout).view(np.uint8))


def test_two_float_outputs(target: TargetSpec) -> None:
    x, w = _signs(1, 6, 9, 64), _signs(32, 64, 3, 3)
    words, packed = _operands(target, x, w, 1)
    scale = rng.standard_normal(32).astype(np.float32)

    def f(x, w, scale):
        y = computes_float.to_float(computes.binary_conv2d(x, w, depth=576, out_channels=32))
        return computes_float.multiply(y, scale), computes_float.relu(y)

    kernel = Kernel(target, f, words, packed, scale)
    dot = reference.conv2d(x, w).astype(np.float32)
    scaled, positive = kernel(words, packed, scale)
    np.testing.assert_array_equal(scaled, dot * scale)
    np.testing.assert_array_equal(positive, np.maximum(dot, 0))
