"""Float kernels: convolutions within rounding of a float64 sum, everything else bit for bit against torch or NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tvm import te

from bnncc.dialect import computes_float as F
from bnncc.dialect import reference
from bnncc.dialect.computes_images import concat
from bnncc.dialect.computes_pack import pack
from bnncc.runtime.bits import BitLayout
from bnncc.targets import emit
from bnncc.targets.descriptor import TargetSpec

from .kernels import TARGETS, Kernel

rng = np.random.default_rng(2)


@pytest.fixture(params=[name for name in ("native", "x86-64-v3", "x86-64-v2") if name in TARGETS], scope="module")
def target(request: pytest.FixtureRequest) -> TargetSpec:
    """The others differ in how they count bits only."""
    return TARGETS[request.param]


def _floats(*shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def _integers(*shape: int) -> np.ndarray:
    """Floats whose products and sums are exact."""
    return rng.integers(-4, 5, shape).astype(np.float32)


def _nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def _nhwc(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).contiguous().numpy()


def _assert_close_sums(actual: np.ndarray, expected: np.ndarray, terms: int) -> None:
    """Sums of `terms` products of standard normals in another order: a few roundings of the partial sums."""
    tolerance = np.finfo(np.float32).eps * math.sqrt(terms) * 8
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * max(1.0, np.abs(expected).max()))


@pytest.mark.parametrize(
    ("image", "channels", "out", "kernel", "strides", "dilation", "groups"),
    [
        ((1, 9, 9), 3, 64, (7, 7), (2, 2), (1, 1), 1), ((2, 5, 6), 17, 33, (1, 1), (1, 1), (1, 1), 1),
        ((1, 11, 23), 8, 10, (3, 3), (1, 1), (1, 1), 1), ((1, 12, 8), 12, 24, (3, 2), (2, 3), (3, 2), 2),
        ((37, 1, 1), 32, 40, (1, 1), (1, 1), (1, 1), 1), ((3, 4, 4), 6, 3, (4, 4), (1, 1), (1, 1), 3),
        ((1, 9, 58), 16, 128, (3, 3), (1, 1), (1, 1), 1), ((1, 6, 7), 4, 1, (3, 3), (1, 1), (1, 1), 1),
    ],
)  # fmt: skip
def test_conv2d(target, image, channels, out, kernel, strides, dilation, groups) -> None:
    x, w = _floats(*image, channels), _floats(out, channels // groups, *kernel)
    a, b = _floats(out), _floats(out)
    packed = reference.block_conv_weights(w, groups, target.conv_lanes(out // groups))

    def f(x, w, a, b):
        y = F.conv2d(x, w, out_channels=out, strides=strides, dilation=dilation)
        return F.relu(F.scale_shift(y, a, b))

    built = Kernel(target, f, x, packed, a, b)
    assert not emit.unscheduled(built.scheduled)
    expected = np.maximum(reference.conv2d(x, w, strides, dilation, groups) * a + b, 0)
    _assert_close_sums(built(x, packed, a, b), expected, w[0].size)


# Tiles of one row and of several; windows of zeros only; a row whose every other position lies in the image.
@pytest.mark.parametrize(
    ("image", "kernel", "padding", "strides", "dilation"),
    [
        ((1, 9, 9), 3, (1, 1, 1, 1), (1, 1), (1, 1)), ((2, 6, 5), 3, (1, 1, 1, 1), (1, 1), (1, 1)),
        ((1, 8, 30), 7, (3, 3, 3, 3), (2, 2), (1, 1)), ((1, 1, 1), 3, (1, 1, 1, 1), (1, 1), (1, 1)),
        ((3, 2, 20), 3, (5, 0, 4, 2), (1, 1), (1, 1)), ((1, 7, 12), 3, (4, 1, 0, 1), (1, 1), (3, 2)),
        ((1, 10, 6), 5, (0, 2, 3, 2), (2, 1), (2, 1)), ((1, 4, 4), 1, (1, 1, 1, 1), (1, 1), (1, 1)),
    ],
)  # fmt: skip
def test_zeros_around_a_convolution(target: TargetSpec, image, kernel, padding, strides, dilation) -> None:
    x = reference.pad_pixels(_integers(*image, 6), padding, 0)
    w = _integers(32, 6, kernel, kernel)
    packed = reference.block_conv_weights(w, 1, target.conv_lanes(32))
    zero_rows = padding[0], padding[2]
    built = Kernel(
        target,
        lambda x, w: F.conv2d(x, w, out_channels=32, strides=strides, dilation=dilation, zero_rows=zero_rows),
        x, packed,
    )  # fmt: skip
    assert not emit.unscheduled(built.scheduled)
    expected = reference.conv2d(x, w, strides, dilation, 1)
    np.testing.assert_array_equal(built(x, packed), expected)
    # What lies in the rows of zeros is not read where a tile has one row.
    one_row = expected.shape[2] > 16 and kernel > 1
    x[:, : zero_rows[0]], x[:, x.shape[1] - zero_rows[1] :] = (np.nan, np.nan) if one_row else (0, 0)
    np.testing.assert_array_equal(built(x, packed), expected)


@pytest.mark.parametrize("sizes", [(16, 16), (160, 64, 64), (64, 16, 32), (48,)])
@pytest.mark.parametrize("what", ["itself", "elementwise", "pool", "bits"])
def test_concatenations(target: TargetSpec, sizes: tuple[int, ...], what: str) -> None:
    parts = [_floats(1, 6, 6, size) for size in sizes]
    layout = BitLayout.for_target(sum(sizes), 1, target.word_bits, target.max_lanes)

    def f(*tensors):
        joined = concat(*tensors)
        if what == "pool":
            return F.max_pool2d(F.relu(joined), (2, 2), (2, 2))
        if what == "bits":
            return pack(F.relu(joined), layout, "gt", padding=(1, 1, 1, 1))
        return F.relu(joined) if what == "elementwise" else joined

    built = Kernel(target, f, *parts)
    assert not emit.unscheduled(built.scheduled)
    joined = np.concatenate(parts, axis=3)
    expected = joined if what == "itself" else np.maximum(joined, 0)
    if what == "pool":
        expected = expected.reshape(1, 3, 2, 3, 2, -1).max(axis=(2, 4))
    if what == "bits":
        words = reference.pad_pixels(reference.pack_signs(expected, layout), (1, 1, 1, 1), 0)
        expected = np.ascontiguousarray(words).view(np.uint8)
    np.testing.assert_array_equal(built(*parts), expected)


@pytest.mark.parametrize(("rows", "depth", "out"), [(1, 64, 10), (1, 512, 1000), (5, 33, 17), (64, 128, 96), (3, 1, 1)])
def test_dense(target: TargetSpec, rows: int, depth: int, out: int) -> None:
    x, w, b = _floats(rows, depth), _floats(out, depth), _floats(out)
    packed = reference.block_dense_weights(w, target.conv_lanes(out))
    built = Kernel(target, lambda x, w, b: F.add(F.dense(x, w, out_channels=out), b), x, packed, b)
    assert not emit.unscheduled(built.scheduled)
    _assert_close_sums(built(x, packed, b), x.astype(np.float64) @ w.T + b, depth)


@pytest.mark.parametrize("channels", [3, 32, 50, 64, 144])
@pytest.mark.parametrize(("strides", "dilation"), [((1, 1), (1, 1)), ((2, 2), (1, 1)), ((1, 2), (2, 1))])
def test_depthwise_conv2d(target: TargetSpec, channels: int, strides: tuple, dilation: tuple) -> None:
    x, w, a = _floats(2, 9, 10, channels), _floats(3, 3, channels), _floats(channels)
    built = Kernel(
        target,
        lambda x, w, a: F.prelu(F.depthwise_conv2d(x, w, strides=strides, dilation=dilation), a),
        x, w, a,
    )  # fmt: skip
    assert not emit.unscheduled(built.scheduled)
    y = reference.conv2d(x, w.transpose(2, 0, 1)[:, None], strides, dilation, channels)
    _assert_close_sums(built(x, w, a), np.where(y > 0, y, y * a), 9)


@pytest.mark.parametrize("padding", [(1, 1, 1, 1), (0, 0, 1, 1), (2, 1, 0, 3), (0, 4, 0, 0)])
@pytest.mark.parametrize(("channels", "strides"), [(16, (1, 1)), (64, (2, 2)), (3, (1, 2))])
def test_depthwise_conv2d_with_zeros_around(target: TargetSpec, channels: int, strides: tuple, padding: tuple) -> None:
    x, w = _floats(2, 7, 8, channels), _floats(3, 3, channels)
    built = Kernel(target, lambda x, w: F.depthwise_conv2d(x, w, strides=strides, padding=padding), x, w)
    assert not emit.unscheduled(built.scheduled)
    padded = reference.pad_pixels(x, padding, 0)
    _assert_close_sums(
        built(x, w), reference.conv2d(padded, w.transpose(2, 0, 1)[:, None], strides, (1, 1), channels), 9
    )


SPECIAL = np.array([np.nan, 0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45, 1.0, -1.0, 0.5, -0.5, 3e38, -3e38], np.float32)


def _special(*shape: int) -> np.ndarray:
    x = _floats(*shape)
    x.reshape(-1)[: 2 * SPECIAL.size] = np.tile(SPECIAL, 2)
    return x


def _same_bits(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal to the bit, but for the payload of NaN."""
    np.testing.assert_array_equal(np.isnan(actual), np.isnan(expected))
    kept = ~np.isnan(expected)
    np.testing.assert_array_equal(actual[kept].view(np.uint32), expected[kept].view(np.uint32))


@pytest.mark.parametrize(
    ("name", "ours", "theirs"),
    [
        ("relu", F.relu, torch.relu),
        ("clip", lambda x: F.clip(x, -1.0, 1.0), torch.nn.functional.hardtanh),
        ("relu6", lambda x: F.clip(x, 0.0, 6.0), torch.nn.functional.relu6),
        ("clamp_min", lambda x: F.clip(x, 0.5, math.inf), lambda x: torch.clamp(x, min=0.5)),
        ("leaky_relu", lambda x: F.leaky_relu(x, 0.1), lambda x: torch.nn.functional.leaky_relu(x, 0.1)),
    ],
)
def test_elementwise_as_torch_computes_it(target: TargetSpec, name: str, ours, theirs) -> None:
    x = _special(2, 7, 5, 33)
    _same_bits(Kernel(target, ours, x)(x), theirs(torch.from_numpy(x)).numpy())


def test_prelu_as_torch_computes_it(target: TargetSpec) -> None:
    x, slope = _special(2, 7, 5, 32), _floats(32)
    expected = _nhwc(torch.nn.functional.prelu(_nchw(x), torch.from_numpy(slope)))
    _same_bits(Kernel(target, F.prelu, x, slope)(x, slope), expected)


def test_products_and_sums_round_as_torch_rounds_them(target: TargetSpec) -> None:
    x, y, a = _floats(1, 9, 9, 64), _floats(1, 9, 9, 64), _floats(64)
    built = Kernel(target, lambda x, y, a: F.add(F.multiply(x, a), y), x, y, a)
    expected = torch.from_numpy(x) * torch.from_numpy(a) + torch.from_numpy(y)
    _same_bits(built(x, y, a), expected.numpy())


def test_batch_norm_as_torch_computes_it(target: TargetSpec) -> None:
    x = _floats(2, 9, 9, 48)
    gamma, beta, mean = _floats(3, 48)
    var = np.abs(_floats(48)) + np.float32(0.1)
    a = (np.float32(1) / np.sqrt(var + np.float32(1e-5))) * gamma
    b = (-mean.astype(np.float64) * a + beta).astype(np.float32)
    expected = torch.nn.functional.batch_norm(
        _nchw(x), *(torch.from_numpy(v) for v in (mean, var, gamma, beta)), training=False, eps=1e-5
    )
    _same_bits(Kernel(target, F.scale_shift, x, a, b)(x, a, b), _nhwc(expected))


@pytest.mark.parametrize(
    ("image", "pool", "strides", "padding", "ceil_mode"),
    [
        ((1, 8, 8, 64), (2, 2), (2, 2), 0, False), ((2, 13, 11, 17), (3, 3), (2, 2), 1, False),
        ((1, 7, 10, 32), (3, 2), (2, 3), 1, True), ((1, 5, 5, 3), (5, 5), (1, 1), 0, False),
    ],
)  # fmt: skip
def test_pooling_as_torch_computes_it(target, image, pool, strides, padding, ceil_mode) -> None:
    x = _special(*image)
    sides = (padding,) * 4
    built = Kernel(target, lambda x: F.max_pool2d(x, pool, strides, sides, ceil_mode=ceil_mode), x)
    assert not emit.unscheduled(built.scheduled)
    expected = torch.nn.functional.max_pool2d(_nchw(x), pool, strides, padding, ceil_mode=ceil_mode)
    _same_bits(built(x), _nhwc(expected))
    x = _floats(*image)
    for counted in (False, True):
        built = Kernel(
            target,
            lambda x: F.avg_pool2d(x, pool, strides, sides, ceil_mode=ceil_mode, count_include_pad=counted),  # noqa: B023
            x,
        )
        expected = torch.nn.functional.avg_pool2d(
            _nchw(x), pool, strides, padding, ceil_mode=ceil_mode, count_include_pad=counted
        )
        _assert_close_sums(built(x), _nhwc(expected), math.prod(pool))


@pytest.mark.parametrize("shape", [(2, 7, 7, 64), (1, 3, 5, 10), (4, 1, 1, 33)])
def test_global_mean(target: TargetSpec, shape: tuple) -> None:
    x = _floats(*shape)
    built = Kernel(target, lambda x: F.mean(x, (1, 2)), x)
    assert not emit.unscheduled(built.scheduled)
    _assert_close_sums(built(x), x.astype(np.float64).mean((1, 2)), shape[1] * shape[2])


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((2, 5, 7, 7), (2, 3)), ((1, 3, 16, 16), (-1, -2)), ((1, 33, 5, 5), (2, 3)), ((3, 40, 31), (2,)),
        ((2, 4, 3), (1, 2)), ((1, 1, 1), (1, 2)), ((6, 17), (1,)), ((2, 3, 4, 8, 2), (2, 3, 4)),
    ],
)  # fmt: skip
def test_means_of_runs(target: TargetSpec, shape: tuple, axes: tuple) -> None:
    x = _floats(*shape)
    for keepdims in (False, True):
        built = Kernel(target, lambda x: F.relu(F.mean(x, axes, keepdims=keepdims)), x)  # noqa: B023
        assert {k.attrs[emit.SCHEDULED_BY] for k in built.scheduled.functions.values()} == {"sums of runs"}
        expected = np.maximum(x.astype(np.float64).mean(axes, keepdims=keepdims), 0)
        terms = math.prod(shape[axis] for axis in axes)
        _assert_close_sums(built(x), expected, terms)


def test_means_that_are_no_runs_are_left_to_loop_nests(target: TargetSpec) -> None:
    x, y = _floats(2, 6, 20), _floats(2, 6, 20)
    for f in (lambda x, y: F.mean(x, (0, 2)), lambda x, y: F.add(F.mean(x, (2,), keepdims=True), y)):
        built = Kernel(target, f, x, y)
        assert {k.attrs[emit.SCHEDULED_BY] for k in built.scheduled.functions.values()} == {"loop nests"}
        expected = x.astype(np.float64).mean((0, 2))
        if built(x, y).ndim == 3:
            expected = x.astype(np.float64).mean(2, keepdims=True) + y
        _assert_close_sums(built(x, y), expected, 40)


@pytest.mark.parametrize("shape", [(1, 3, 7, 7), (2, 5, 4, 16), (1, 6, 8, 5), (2, 16, 56, 1)])
def test_channels_in_the_middle(target: TargetSpec, shape: tuple) -> None:
    """Images in the model's own layout: the axes behind the channels are one, and of a whole tensor all are."""
    x, y, a = _floats(*shape), _floats(*shape), _floats(shape[1])
    built = Kernel(target, lambda x, y, a: (F.multiply(x, a, axis=1), F.relu(F.add(x, y))), x, y, a)
    assert not emit.unscheduled(built.scheduled)
    scaled, total = built(x, y, a)
    np.testing.assert_array_equal(scaled, x * a[:, None, None])
    np.testing.assert_array_equal(total, np.maximum(x + y, 0))


@pytest.mark.parametrize(
    "shape",
    [
        (3, 10), (1, 1), (2, 2), (2, 16), (3, 64), (2, 65), (5, 300), (2, 1000), (1, 5000),
        (13, 130), (24, 200), (64, 1000),  # rows in several tasks
    ],
)  # fmt: skip
def test_softmax(target: TargetSpec, shape: tuple) -> None:
    x = _floats(*shape)
    x[0, -1] = -np.inf if shape[1] > 1 else 0
    built = Kernel(target, F.softmax, x)
    assert not emit.unscheduled(built.scheduled)
    np.testing.assert_allclose(built(x), torch.softmax(torch.from_numpy(x), -1).numpy(), rtol=1e-6)


def test_special_values_in_a_softmax(target: TargetSpec) -> None:
    """NaN and a row of −inf are NaN throughout; what is far below the largest is 0, also where it would be denormal."""
    x = _floats(5, 70) * np.float32(40)
    x[0, 3], x[1], x[2, ::2] = np.nan, -np.inf, -np.inf
    x[3] = np.linspace(-150, 0, 70)
    y, expected = Kernel(target, F.softmax, x)(x), torch.softmax(torch.from_numpy(x).double(), -1).numpy()
    np.testing.assert_array_equal(np.isnan(y), np.isnan(expected))
    tiny = np.float64(np.finfo(np.float32).tiny)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=tiny)  # x − max rounds by up to 2⁻¹⁷
    assert not y[2, ::2].any()


def test_what_is_fused_with_a_softmax(target: TargetSpec) -> None:
    x, a = _floats(3, 37), _floats(37)

    def f(x, a):
        y = F.multiply(F.softmax(F.relu(x)), a)
        return te.compute(y.shape, lambda *at: (y(*at) * 100).astype("int32"))

    for g, dtype in ((f, np.int32), (lambda x, a: F.add(F.softmax(F.relu(x)), a), np.float32)):
        built = Kernel(target, g, x, a)
        assert {k.attrs[emit.SCHEDULED_BY] for k in built.scheduled.functions.values()} == {"softmax"}
        y = torch.softmax(torch.relu(torch.from_numpy(x)), -1).numpy()
        expected = y * a * 100 if dtype is np.int32 else y + a
        np.testing.assert_allclose(built(x, a), expected, atol=1.0 if dtype is np.int32 else 1e-6)


@pytest.mark.parametrize(
    ("shape", "order"),
    [
        ((1, 32, 32, 24), (0, 3, 1, 2)), ((1, 1024, 3, 4), (0, 2, 3, 1)),  # rows a page apart
        ((2, 7, 9, 24), (0, 3, 1, 2)), ((1, 16, 16, 64), (0, 3, 1, 2)), ((3, 17, 5, 5), (0, 2, 3, 1)),
        ((9, 13), (1, 0)), ((1, 1, 9, 33), (0, 3, 1, 2)), ((2, 3, 20, 20), (0, 2, 3, 1)), ((2, 5, 4, 4), (1, 0, 2, 3)),
    ],
)  # fmt: skip
def test_permute(target: TargetSpec, shape: tuple, order: tuple) -> None:
    x = _floats(*shape)
    built = Kernel(target, lambda x: F.permute(x, order), x)
    assert not emit.unscheduled(built.scheduled)
    np.testing.assert_array_equal(built(x), x.transpose(order))


# One channel and few columns stay loops; two and three channels are interleaved. Channels and columns that squares and
# vectors divide and not; one row; a border on one side.
@pytest.mark.parametrize(
    ("shape", "padding"),
    [
        ((1, 3, 10, 12), (3, 2, 1, 0)), ((2, 16, 5, 9), (1, 1, 1, 1)), ((1, 64, 14, 14), (1, 1, 1, 1)),
        ((3, 21, 4, 13), (0, 3, 2, 0)), ((1, 8, 1, 31), (2, 0, 0, 1)), ((1, 5, 6, 7), (0, 0, 4, 0)),
        ((1, 33, 30, 40), (0, 1, 0, 0)), ((1, 16, 9, 3), (1, 1, 1, 1)),
        ((2, 2, 5, 11), (1, 1, 1, 1)), ((3, 3, 8, 4), (2, 0, 0, 1)), ((1, 3, 7, 33), (1, 1, 1, 1)),
        ((2, 3, 5, 3), (1, 1, 1, 1)), ((1, 1, 6, 20), (1, 1, 1, 1)), ((3, 4, 5, 8), (0, 1, 1, 0)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [0.0, 0.5])
def test_padding_while_transposing(target: TargetSpec, shape: tuple, padding: tuple, value: float) -> None:
    x = _floats(*shape)
    built = Kernel(target, lambda x: F.pad(F.permute(x, (0, 2, 3, 1)), padding, value), x)
    assert not emit.unscheduled(built.scheduled)
    rule = "transposition with padding" if shape[1] > 1 and shape[3] >= 4 else "loop nests"
    assert built.scheduled["kernel"].attrs[emit.SCHEDULED_BY] == rule
    np.testing.assert_array_equal(built(x), reference.pad_pixels(x.transpose(0, 2, 3, 1), padding, value))


@pytest.mark.parametrize(("groups", "out"), [(1, 40), (2, 6)])
def test_unpack_weights(target: TargetSpec, groups: int, out: int) -> None:
    w = np.where(rng.integers(0, 2, (out, 5, 3, 3)) > 0, 1, -1).astype(np.float32)
    alpha = np.abs(_floats(out))
    lanes = target.conv_lanes(out // groups)
    bits = reference.pack_weight_signs(w, groups, lanes)
    blocked = reference.block_outputs(alpha, groups, lanes)
    built = Kernel(target, lambda b, a: F.unpack_weights(b, lanes, a), bits, blocked)
    expected = reference.block_conv_weights(w * alpha[:, None, None, None], groups, lanes)
    np.testing.assert_array_equal(built(bits, blocked), expected)


def test_an_elementwise_chain_without_a_convolution(target: TargetSpec) -> None:
    x, y, a = _floats(1, 7, 7, 24), _floats(1, 7, 7, 24), _floats(24)

    def f(x: te.Tensor, y: te.Tensor, a: te.Tensor) -> te.Tensor:
        return F.relu(F.subtract(F.multiply(F.add(x, y), a), y))

    built = Kernel(target, f, x, y, a)
    assert not emit.unscheduled(built.scheduled)
    np.testing.assert_array_equal(built(x, y, a), np.maximum((x + y) * a - y, 0))
