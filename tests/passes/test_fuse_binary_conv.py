"""Products of signs with binary weights become binary operators, and nothing else does."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tvm import relax
from tvm.relax import op as R_
from tvm.script import ir as I
from tvm.script import relax as R

from bnncc.dialect.ops import attributes, call, is_call
from bnncc.passes.fuse_binary_conv import FuseBinaryConv, binary_weight
from bnncc.passes.rewriter import numpy_of

RNG = np.random.default_rng(0)
W = RNG.choice([-1.0, 1.0], (4, 8, 3, 3)).astype("float32")
DENSE = RNG.choice([-1.0, 1.0], (5, 8)).astype("float32")
TERNARY = np.where(W[0] > 0, W, np.float32(0))
ALPHA = np.array([0.5, 0.1, 3.0, 1.0], "float32").reshape(4, 1, 1, 1)


def sign(x, predicate="not_lt", **attrs):
    return call("sign", [x], predicate=predicate, **attrs)


def pad(x, width=(0, 0, 0, 0, 1, 2, 3, 4), value=-1.0, mode="constant"):
    return R_.nn.pad(x, list(width), pad_value=value, pad_mode=mode)


def conv(x, weight=W, **attrs):
    return R_.nn.conv2d(x, weight if isinstance(weight, relax.Expr) else relax.const(weight), **attrs)


def binary_conv(x, weight=W, **attrs):
    defaults = {
        "strides": (1, 1), "dilation": (1, 1), "groups": 1, "padding": (0, 0, 0, 0), "pad_value": 0,
        "data_layout": "NCHW",
    }  # fmt: skip
    return call("binary_conv2d", [x, relax.const(weight)], **{**defaults, **attrs})


SHAPE = (1, 8, 6, 6)


def rows_of(x, axis=2):
    """A gather, as of padding by reflection."""
    return R_.take(x, relax.const(np.array([1, 0, 1, 2, 3, 4, 5, 4], "int32")), axis)


def spread(x):
    """What a transposed convolution of stride 2 reads."""
    return call("insert_zeros", [x], strides=(2, 2))


def test_padded_convolution(check):
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 8, 6, 6), "float32")) -> R.Tensor((1, 4, 3, 3), "float32"):
            with R.dataflow():
                s = R.bnncc.sign(x, predicate="not_lt")
                p = R.nn.pad(s, (0, 0, 0, 0, 1, 1, 1, 1), pad_value=-1.0)
                y = R.nn.conv2d(p, R.const(W), strides=[2, 2])
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((1, 8, 6, 6), "float32")) -> R.Tensor((1, 4, 3, 3), "float32"):
            with R.dataflow():
                s = R.bnncc.sign(x, predicate="not_lt")
                y = R.bnncc.binary_conv2d(
                    s, R.const(W), strides=(2, 2), dilation=(1, 1), groups=1, padding=(1, 1, 1, 1), pad_value=-1,
                    data_layout="NCHW",
                )  # fmt: skip
                R.output(y)
            return y

    check(FuseBinaryConv, Before, Expected)


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (lambda x: conv(sign(x)), lambda x: binary_conv(sign(x))),
        (lambda x: conv(sign(x), padding=1), lambda x: binary_conv(sign(x), padding=(1, 1, 1, 1))),
        (
            lambda x: conv(sign(x), padding=(1, 0, 2, 3), dilation=2),
            lambda x: binary_conv(sign(x), padding=(1, 0, 2, 3), dilation=(2, 2)),
        ),
        (
            lambda x: conv(sign(x), W[:, :4], groups=2, strides=(2, 1)),
            lambda x: binary_conv(sign(x), W[:, :4], groups=2, strides=(2, 1)),
        ),
        (lambda x: conv(pad(sign(x))), lambda x: binary_conv(sign(x), padding=(1, 3, 2, 4), pad_value=-1)),
        (lambda x: conv(pad(sign(x), value=1.0)), lambda x: binary_conv(sign(x), padding=(1, 3, 2, 4), pad_value=1)),
        (lambda x: conv(pad(sign(x), value=0.0)), lambda x: binary_conv(sign(x), padding=(1, 3, 2, 4), pad_value=0)),
        (
            lambda x: conv(pad(sign(x, "ternary"), value=0.0)),
            lambda x: binary_conv(sign(x, "ternary"), padding=(1, 3, 2, 4), pad_value=0),
        ),
        (
            lambda x: conv(R_.nn.max_pool2d(sign(x), pool_size=2, strides=2)),
            lambda x: binary_conv(R_.nn.max_pool2d(sign(x), pool_size=2, strides=2)),
        ),
        (
            # What PyTorch makes of 'same' with an even kernel.
            lambda x: conv(pad(sign(x), value=0.0), padding=1),
            lambda x: binary_conv(sign(x), padding=(2, 4, 3, 5), pad_value=0),
        ),
        (lambda x: conv(rows_of(sign(x))), lambda x: binary_conv(rows_of(sign(x)))),
        (
            lambda x: conv(spread(sign(x)), padding=1),
            lambda x: binary_conv(sign(spread(sign(x)), "ternary"), padding=(1, 1, 1, 1)),
        ),
        (lambda x: conv(sign(x), TERNARY), lambda x: binary_conv(sign(x), TERNARY)),
        (
            lambda x: conv(sign(x), W * ALPHA),
            lambda x: call("rescale", [binary_conv(sign(x)), relax.const(ALPHA.reshape(1, 4, 1, 1))]),
        ),
        (
            lambda x: conv(sign(x), W * 0.25 * (ALPHA > 0.2)),
            # Powers of two round nothing.
            lambda x: R_.multiply(
                binary_conv(sign(x), np.where(ALPHA > 0.2, W, np.float32(0))),
                relax.const(np.array([0.25, 1, 0.25, 0.25], "float32").reshape(1, 4, 1, 1)),
            ),
        ),
    ],
)
def test_convolution(before, expected, function, check):
    check(FuseBinaryConv, function(SHAPE, before), function(SHAPE, expected))


def test_linear(function, check):
    check(
        FuseBinaryConv,
        function((3, 8), lambda x: R_.matmul(sign(x), relax.const(DENSE.T.copy()))),
        function((3, 8), lambda x: call("binary_dense", [sign(x), relax.const(DENSE)])),
    )


def test_linear_with_a_scale_per_output(function, check):
    alpha = np.array([[0.5], [2.0], [0.3], [1.0], [1.0]], "float32")
    check(
        FuseBinaryConv,
        function((3, 8), lambda x: R_.matmul(sign(x), relax.const((DENSE * alpha).T.copy()))),
        function(
            (3, 8),
            lambda x: call(
                "rescale", [call("binary_dense", [sign(x), relax.const(DENSE)]), relax.const(alpha.reshape(1, 5))]
            ),
        ),
    )


@pytest.mark.parametrize("value", [-1, 0, 1])
@pytest.mark.parametrize("groups", [1, 2])
def test_what_the_attributes_mean(value, groups, function, apply):
    """The fused operator's attributes describe the convolution that eager computes."""
    weight = W[:, : 8 // groups]
    before = function(SHAPE, lambda x: conv(pad(sign(x), value=float(value)), weight, groups=groups, strides=2))
    fused = apply(FuseBinaryConv, before)["main"].body.blocks[0].bindings[-2].value
    assert is_call(fused, "bnncc.binary_conv2d")
    a = attributes(fused)
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).sign()
    top, left, bottom, right = a["padding"]
    padded = F.pad(x, (left, right, top, bottom), value=a["pad_value"])
    ours = F.conv2d(
        padded, torch.from_numpy(numpy_of(fused.args[1])), None, a["strides"], 0, a["dilation"], a["groups"]
    )
    eager = F.conv2d(F.pad(x, (3, 4, 1, 2), value=float(value)), torch.from_numpy(weight), None, 2, 0, 1, groups)
    assert torch.equal(ours, eager)


DECLINED = {
    "an input that is no sign": lambda x: conv(x),
    "a ReLU": lambda x: conv(R_.nn.relu(sign(x))),
    "a sum of signs": lambda x: conv(R_.add(sign(x), sign(x, "gt"))),
    "a float weight": lambda x: conv(sign(x), W + 0.5),
    "a weight with two magnitudes in a channel": lambda x: conv(sign(x), W * (1 + (W[0] > 0))),
    "a weight with infinities": lambda x: conv(sign(x), W * np.float32(np.inf)),
    "a weight with NaN": lambda x: conv(sign(x), np.where(W > 0, np.float32(np.nan), W)),
    "a weight that is no constant": lambda x: conv(sign(x), R_.reshape(x, (1, 8, 6, 6))),
    "padding with 0.5": lambda x: conv(pad(sign(x), value=0.5)),
    "padding with −2": lambda x: conv(pad(sign(x), value=-2.0)),
    "padding by reflection": lambda x: conv(pad(sign(x), width=(0, 0, 0, 0, 1, 1, 1, 1), mode="reflect")),
    "padding of channels": lambda x: conv(pad(sign(x), (0, 0, 2, 2, 0, 0, 0, 0)), np.ones((4, 12, 3, 3), "float32")),
    "padding twice": lambda x: conv(pad(sign(x)), padding=1),
    "a pad of a pad": lambda x: conv(pad(pad(sign(x)))),
    "a pad before the sign's input": lambda x: conv(R_.nn.relu(pad(x))),
    "ternary padded with −1": lambda x: conv(pad(sign(x, "ternary"))),
    "ternary padded with +1": lambda x: conv(pad(sign(x, "ternary"), value=1.0)),
    "channels in another order": lambda x: conv(rows_of(sign(x), axis=1)),
    "zeros between floats": lambda x: conv(spread(x)),
    "an average pool of signs": lambda x: conv(R_.nn.avg_pool2d(sign(x), pool_size=2)),
}


@pytest.mark.parametrize("network", DECLINED)
def test_do_not_fuse(network, function, check_unchanged, reasons):
    check_unchanged(FuseBinaryConv, function(SHAPE, DECLINED[network]))
    assert "FuseBinaryConv:" in reasons()[-1] and "stays float" in reasons()[-1]


@pytest.mark.parametrize(
    "body",
    [
        lambda x: R_.matmul(x, relax.const(DENSE.T.copy())),
        lambda x: R_.matmul(sign(x), relax.const(DENSE.T * np.linspace(1, 2, 8, dtype="float32").reshape(8, 1))),
        lambda x: R_.matmul(sign(x), R_.permute_dims(sign(x))),
        lambda x: R_.matmul(relax.const(DENSE), sign(x)),
    ],
    ids=["an input that is no sign", "a scale per input", "two activations", "a constant on the left"],
)
def test_do_not_fuse_linear(body, function, check_unchanged):
    check_unchanged(FuseBinaryConv, function((8, 8), body))


def test_a_pad_before_a_sign_is_a_pad_of_floats(function, check):
    """sign(pad(x, −0.5)) pads with −0.5, whose sign is another matter."""
    check(
        FuseBinaryConv,
        function(SHAPE, lambda x: conv(sign(pad(x, value=-0.5)))),
        function(SHAPE, lambda x: binary_conv(sign(pad(x, value=-0.5)))),
    )


def test_split_of_a_weight():
    assert binary_weight(np.full((2, 3), 0.5, "float32"))[1].tolist() == [0.5, 0.5]
    signs, scale = binary_weight(np.array([[0.0, -0.0], [0.2, -0.2]], "float32"))
    assert signs.tolist() == [[0, 0], [1, -1]] and scale.tolist() == [1, np.float32(0.2)]
    assert binary_weight(np.array([[1.0, np.nextafter(np.float32(1), np.float32(0))]], "float32")) is None
    assert binary_weight(np.array([[1.0, 0.5]], "float32"), channel_axis=1)[1].tolist() == [1, 0.5]
