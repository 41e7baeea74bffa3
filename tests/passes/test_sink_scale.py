"""The scale of a sign moves into the weights of the layer that reads it."""

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op as R_
from tvm.script import ir as I
from tvm.script import relax as R

from bnncc.dialect.ops import call
from bnncc.passes.fuse_binary_conv import FuseBinaryConv
from bnncc.passes.sink_scale import SinkScale

SHAPE = (1, 4, 6, 6)
SIGNS = np.where(np.random.default_rng(0).random((5, 4, 3, 3)) < 0.5, -1, 1).astype("float32")


def const(value):
    return relax.const(np.asarray(value, "float32"))


def emit(value):
    return relax.BlockBuilder.current().emit(value)


def sign(x):
    return emit(call("sign", [x], predicate="ge"))


def scaled(x, alpha=0.25):
    return emit(R_.multiply(sign(x), const(alpha)))


def test_a_scaled_sign_before_a_convolution(check):
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 1, 2, 2), "float32")) -> R.Tensor((1, 1, 2, 2), "float32"):
            with R.dataflow():
                s = R.bnncc.sign(x, predicate="ge")
                p = R.multiply(s, R.const(0.5, "float32"))
                y = R.nn.conv2d(p, R.const([[[[-1.0]]]], "float32"))
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((1, 1, 2, 2), "float32")) -> R.Tensor((1, 1, 2, 2), "float32"):
            with R.dataflow():
                s = R.bnncc.sign(x, predicate="ge")
                y = R.nn.conv2d(s, R.const([[[[-0.5]]]], "float32"))
                R.output(y)
            return y

    check(SinkScale, Before, Expected)


@pytest.mark.parametrize(("alpha", "pad", "unit"), [(0.25, 0.0, 0.0), (0.3, 0.3, 1.0), (-0.7, 0.7, -1.0)])
def test_through_padding(function, check, alpha, pad, unit):
    widths = [0, 0, 0, 0, 1, 1, 1, 1]
    alpha, pad = float(np.float32(alpha)), float(np.float32(pad))

    def before(x):
        return R_.nn.conv2d(emit(R_.nn.pad(scaled(x, alpha), widths, "constant", pad)), const(SIGNS))

    def expected(x):
        return R_.nn.conv2d(emit(R_.nn.pad(sign(x), widths, "constant", unit)), relax.const(SIGNS * np.float32(alpha)))

    check(SinkScale, function(SHAPE, before), function(SHAPE, expected))


def test_through_a_pool_and_a_reshape_into_a_linear_layer(function, check):
    weight = np.sign(np.random.default_rng(1).standard_normal((36, 5))).astype("float32")

    def before(x):
        pooled = emit(R_.nn.max_pool2d(scaled(x, 3.0), [2, 2], strides=[2, 2]))
        return R_.matmul(emit(R_.reshape(pooled, (1, 36))), relax.const(weight))

    def expected(x):
        pooled = emit(R_.nn.max_pool2d(sign(x), [2, 2], strides=[2, 2]))
        return R_.matmul(emit(R_.reshape(pooled, (1, 36))), relax.const(weight * np.float32(3)))

    check(SinkScale, function(SHAPE, before), function(SHAPE, expected))


@pytest.mark.parametrize(
    "body",
    [
        lambda x: R_.nn.conv2d(scaled(x), const(np.arange(5 * 4 * 9).reshape(5, 4, 3, 3))),
        lambda x: R_.nn.conv2d(emit(R_.multiply(sign(x), const(np.full((1, 4, 1, 1), 0.5)))), const(SIGNS)),
        lambda x: R_.nn.conv2d(emit(R_.nn.pad(scaled(x), [0, 0, 0, 0, 1, 1, 1, 1], "constant", 1.0)), const(SIGNS)),
        lambda x: R_.nn.conv2d(emit(R_.nn.max_pool2d(scaled(x, -1.5), [2, 2])), const(SIGNS)),
        lambda x: R_.nn.conv2d(emit(R_.multiply(x, const(0.5))), const(SIGNS)),
    ],
    ids=["a float weight", "a scale per channel", "padding of another value", "a negative scale pooled", "no sign"],
)
def test_do_not_sink(function, check_unchanged, body):
    check_unchanged(SinkScale, function(SHAPE, body))


def test_a_power_of_two_stays_exact(function, check):
    """Eager's products and sums are then exact, whatever their order: the scale is an ordinary multiplication."""
    attrs = {"strides": (1, 1), "dilation": (1, 1), "groups": 1, "pad_value": 0, "data_layout": "NCHW"}

    def expected(x):
        accumulator = emit(call("binary_conv2d", [sign(x), const(SIGNS)], padding=(0, 0, 0, 0), **attrs))
        return R_.multiply(accumulator, const(np.full((1, 5, 1, 1), 0.25)))

    check(
        FuseBinaryConv,
        function(SHAPE, lambda x: R_.nn.conv2d(sign(x), const(SIGNS * 0.25))),
        function(SHAPE, expected),
    )
