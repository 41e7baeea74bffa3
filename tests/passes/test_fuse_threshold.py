"""Thresholds against the chain they replace, evaluated by eager PyTorch at every value the accumulator can take."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op as R_
from tvm.script import ir as I
from tvm.script import relax as R

from bnncc.dialect.ops import attributes, call, is_call
from bnncc.passes.fuse_threshold import FuseThreshold, thresholds_of
from bnncc.passes.rewriter import numpy_of

EPS = 1e-5


def const(value):
    return relax.const(np.asarray(value, "float32"))


def binary_conv(x, weight, **attrs):
    defaults = {
        "strides": (1, 1), "dilation": (1, 1), "groups": 1, "padding": (0, 0, 0, 0), "pad_value": -1,
        "data_layout": "NCHW",
    }  # fmt: skip
    return call("binary_conv2d", [x, const(weight)], **{**defaults, **attrs})


def sign(x, predicate="not_lt"):
    return call("sign", [x], predicate=predicate)


def emit(value, name=""):
    return relax.BlockBuilder.current().emit(value, name)


def batch_norm(x, gamma, beta, mean, variance):
    normalized = R_.nn.batch_norm(
        x, const(gamma), const(beta), const(mean), const(variance), axis=1, epsilon=EPS, training=False
    )
    return relax.TupleGetItem(emit(normalized), 0)


WEIGHT = np.ones((2, 4, 3, 3), "float32")  # accumulators −36, −34, …, 36


def test_batch_norm_and_sign(check):
    gamma, beta, mean, variance = (np.array(v, "float32") for v in ([1, -1], [0, 0], [3, 4], [1, 1]))
    flipped = np.stack([WEIGHT[0], -WEIGHT[1]])
    # acc ≥ 3 at odd sums only: the next attainable is 4. −acc ≥ −4.
    thresholds = np.array([4, -4], "int32")

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 4, 6, 6), "float32")) -> R.Tensor((1, 2, 4, 4), "float32"):
            with R.dataflow():
                s = R.bnncc.sign(x, predicate="gt")
                a = R.bnncc.binary_conv2d(
                    s, R.const(WEIGHT), strides=(1, 1), dilation=(1, 1), groups=1, padding=(0, 0, 0, 0), pad_value=-1,
                    data_layout="NCHW",
                )  # fmt: skip
                n = R.nn.batch_norm(
                    a, R.const(gamma), R.const(beta), R.const(mean), R.const(variance), axis=1, training=False
                )
                b = n[0]
                y = R.bnncc.sign(b, predicate="not_lt")
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((1, 4, 6, 6), "float32")) -> R.Tensor((1, 2, 4, 4), "float32"):
            with R.dataflow():
                s = R.bnncc.sign(x, predicate="gt")
                a = R.bnncc.binary_conv2d(
                    s, R.const(flipped), strides=(1, 1), dilation=(1, 1), groups=1, padding=(0, 0, 0, 0), pad_value=-1,
                    data_layout="NCHW",
                )  # fmt: skip
                y = R.bnncc.threshold(a, R.const(thresholds))
                R.output(y)
            return y

    check(FuseThreshold, Before, Expected)


def test_a_sign_right_behind_the_product(function, check):
    def expected(x):
        return call("threshold", [binary_conv(sign(x), WEIGHT), relax.const(np.array([0, 0], "int32"))])

    check(
        FuseThreshold,
        function((1, 4, 6, 6), lambda x: sign(binary_conv(sign(x), WEIGHT))),
        function((1, 4, 6, 6), expected),
    )


def test_linear(function, check):
    weight = np.ones((3, 8), "float32")

    def chain(x):
        return sign(R_.add(call("binary_dense", [sign(x), const(weight)]), const([[-2, 0.5, 100]])))

    def expected(x):
        dense = call("binary_dense", [sign(x), const(weight)])
        return call("threshold", [dense, relax.const(np.array([2, 0, -8], "int32"))])

    check(FuseThreshold, function((5, 8), chain), function((5, 8), expected))


# What a chain computes, once in Relax and once in eager PyTorch on an image of accumulators.


def prelu(x, slope):
    return R_.where(R_.greater(x, const(0.0)), x, R_.multiply(const(np.reshape(slope, (1, -1, 1, 1))), x))


def per_channel(values):
    return np.reshape(values, (1, -1, 1, 1)).astype("float32")


class Norm:
    def __init__(self, *statistics):
        self.statistics = [np.array(s, "float32") for s in statistics]

    def relax(self, x):
        return batch_norm(x, *self.statistics)

    def eager(self, x):
        gamma, beta, mean, variance = map(torch.from_numpy, self.statistics)
        return F.batch_norm(x, mean, variance, gamma, beta, eps=EPS)


class Scale:
    def __init__(self, values):
        self.values = per_channel(values)

    def relax(self, x):
        return R_.multiply(x, const(self.values))

    def eager(self, x):
        return x * torch.from_numpy(self.values)


class Bias(Scale):
    def relax(self, x):
        return R_.add(x, const(self.values))

    def eager(self, x):
        return x + torch.from_numpy(self.values)


class PReLU(Scale):
    def relax(self, x):
        return prelu(x, self.values)

    def eager(self, x):
        return F.prelu(x, torch.from_numpy(self.values.reshape(-1)))


class Clip:
    def __init__(self, low, high):
        self.bounds = (low, high)

    def relax(self, x):
        return R_.clip(x, *self.bounds)

    def eager(self, x):
        return F.hardtanh(x, *self.bounds)


class ReLU:
    def relax(self, x):
        return R_.nn.relu(x)

    def eager(self, x):
        return F.relu(x)


SIGNS = {
    "not_lt": lambda x: ~(x < 0),
    "gt": lambda x: x > 0,
    "ge": lambda x: x >= 0,
    "not_le": lambda x: ~(x <= 0),
}


def fused(weight, chain, predicate, **attrs):
    """(what stands before the threshold, the threshold or lookup) for a chain behind a convolution."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((1, weight.shape[1], 5, 5), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            value = builder.emit(binary_conv(emit(sign(x)), weight, **attrs))
            for stage in chain:
                value = builder.emit(stage.relax(value))
            result = builder.emit_output(sign(value, predicate))
        builder.emit_func_output(result)
    after = FuseThreshold(builder.get())["main"].body.blocks[0].bindings
    values = {b.var: b.value for b in after}
    last = next(b.value for b in after if is_call(b.value, "bnncc.threshold") or is_call(b.value, "bnncc.lookup"))
    return values[last.args[0]], last


def assert_equal_to_eager(weight, chain, predicate, **attrs):
    """Every attainable accumulator gives the sign that eager gives."""
    accumulator, last = fused(weight, chain, predicate, **attrs)
    depth = int(np.prod(weight.shape[1:]))
    zeros = (attrs.get("pad_value") == 0 and any(attrs["padding"])) or not weight.all()
    values = np.arange(-depth, depth + 1, 1 if zeros else 2)
    # An image of them, so that ATen's vectorised loops run as they do in a network.
    image = torch.from_numpy(values.astype("float32")).expand(1, weight.shape[0], 1, -1).contiguous()
    eager = image
    for stage in chain:
        eager = stage.eager(eager)
    expected = SIGNS[predicate](eager)[0, :, 0].numpy()
    direction = numpy_of(accumulator.args[1]).reshape(weight.shape[0], -1) * weight.reshape(weight.shape[0], -1)
    turned = np.array([-1 if row.min() < 0 else 1 for row in direction])[:, None]
    if is_call(last, "bnncc.threshold"):
        ours = values[None] * turned >= numpy_of(last.args[1])[:, None]
    else:
        assert (turned == 1).all()
        a, table = attributes(last), numpy_of(last.args[1])
        index = (values - a["lowest"]) // a["step"]
        ours = table[:, index] != 0
    assert np.array_equal(ours, expected)
    return last


CHANNELS = 4


def channelwise(strategy):
    return st.lists(strategy, min_size=CHANNELS, max_size=CHANNELS)


@st.composite
def norms(draw, depth):
    """Batch norms whose flip lies on an attainable value, one float beside it, or anywhere."""
    gamma = draw(channelwise(st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.3, -0.7, 1e-30, -1e30])))
    variance = draw(channelwise(st.sampled_from([0.0, 1e-12, 1.0, 0.37, 1e12, 3e38])))
    mean = draw(channelwise(st.integers(-depth, depth)))
    beta = draw(channelwise(st.sampled_from([0.0, -0.0, 0.1, -3.0])))
    nudge = draw(channelwise(st.sampled_from([-np.inf, 0, np.inf])))
    mean = [np.nextafter(np.float32(m), np.float32(n)) if n else m for m, n in zip(mean, nudge, strict=True)]
    return Norm(gamma, beta, mean, variance)


def stages(depth):
    number = st.floats(-2 * depth, 2 * depth, width=32)
    return st.one_of(
        norms(depth),
        channelwise(number).map(Bias),
        channelwise(st.integers(-depth, depth)).map(Bias),  # ties
        channelwise(st.sampled_from([-1.0, 0.0, 0.1, 1.0, 3.7])).map(Scale),
        channelwise(st.sampled_from([-0.5, 0.0, 0.25, 1.0])).map(PReLU),
        st.just(Clip(-1.0, 1.0)),
        st.just(Clip(-3.5, 0.25)),
        st.just(ReLU()),
    )


@st.composite
def layers(draw):
    shape = (CHANNELS, *draw(st.sampled_from([(1, 1, 1), (5, 1, 1), (7, 3, 3), (64, 1, 1)])))
    depth = int(np.prod(shape[1:]))
    terms = [-1.0, 1.0] if draw(st.booleans()) else [-1.0, 0.0, 1.0]
    weight = np.random.default_rng(draw(st.integers(0, 99))).choice(terms, shape).astype("float32")
    weight[:, 0, 0, 0] = 1  # so that the test can see which channels were turned round
    attrs = {"padding": (1, 1, 1, 1), "pad_value": draw(st.sampled_from([-1, 0, 1]))}
    return weight, draw(st.lists(stages(depth), max_size=3)), draw(st.sampled_from(sorted(SIGNS))), attrs


@settings(max_examples=60, deadline=None)
@given(layers())
def test_any_chain_decides_as_eager_does(layer):
    weight, chain, predicate, attrs = layer
    assert_equal_to_eager(weight, chain, predicate, **attrs)


@settings(max_examples=40, deadline=None)
@given(norms(63), st.sampled_from(sorted(SIGNS)), st.sampled_from([0, 1]))
def test_batch_norm_is_a_threshold_never_a_table(norm, predicate, pad_value):
    weight = np.ones((CHANNELS, 7, 3, 3), "float32")
    last = assert_equal_to_eager(weight, [norm], predicate, padding=(1, 1, 1, 1), pad_value=pad_value)
    assert is_call(last, "bnncc.threshold")


@pytest.mark.parametrize("gamma", [1.0, -1.0, 0.0])
@pytest.mark.parametrize("beta", [0.0, -0.0, 1.0, -1.0])
@pytest.mark.parametrize("predicate", sorted(SIGNS))
def test_a_tie_on_the_flip(gamma, beta, predicate):
    """(acc − 5)·gamma is ±0 at an attainable accumulator; gamma = 0 leaves beta, whatever its sign."""
    weight = np.ones((CHANNELS, 7, 3, 3), "float32")
    norm = Norm([gamma] * CHANNELS, [beta] * CHANNELS, [5] * CHANNELS, [1] * CHANNELS)
    assert_equal_to_eager(weight, [norm], predicate, padding=(0, 0, 0, 0))


def test_a_chain_that_turns_back_becomes_a_table():
    weight = np.ones((CHANNELS, 7, 1, 1), "float32")
    chain = [PReLU([-1.0] * CHANNELS), Bias([-2.5, 0.0, 1.0, -100.0])]  # |acc| − 2.5 …
    last = assert_equal_to_eager(weight, chain, "ge", padding=(0, 0, 0, 0))
    assert is_call(last, "bnncc.lookup")
    assert attributes(last) == {"lowest": -7, "step": 2}
    assert numpy_of(last.args[1]).tolist()[0] == [1, 1, 1, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("pooled", [False, True])
def test_ternary_inputs_give_every_integer(pooled, function, apply):
    """With zeros among the terms the sum also takes the values between: 0 here, which 0.5 − acc must not lose."""

    def body(x):
        s = sign(x, "ternary")
        s = R_.nn.max_pool2d(s, pool_size=(2, 2)) if pooled else s
        return sign(R_.subtract(const(0.5), binary_conv(s, np.ones((1, 3, 1, 1), "float32"))), "ge")

    after = apply(FuseThreshold, function((1, 3, 4, 4), body))["main"].body.blocks[0].bindings
    (last,) = (b.value for b in after if is_call(b.value, "bnncc.threshold"))
    assert numpy_of(last.args[1]).tolist() == [0]  # −acc ≥ 0, not −acc ≥ 1


SHAPE = (1, 4, 6, 6)


def accumulator(x):
    return emit(binary_conv(sign(x), WEIGHT))


DECLINED = {
    "a residual": lambda x: sign(R_.add(accumulator(x), R_.strided_slice(x, [1, 2, 3], [0, 1, 1], [2, 5, 5]))),
    "two accumulators": lambda x: sign(R_.add(accumulator(x), accumulator(x))),
    "a ternary sign": lambda x: sign(accumulator(x), "ternary"),
    "an inexact rescale": lambda x: sign(call("rescale", [accumulator(x), const(per_channel([0.3, 0.7]))])),
    "a constant along the width": lambda x: sign(R_.add(accumulator(x), const(np.arange(4)))),
    "a constant for every element": lambda x: sign(R_.add(accumulator(x), const(np.zeros((1, 2, 4, 4))))),
    "a pool": lambda x: sign(R_.nn.avg_pool2d(accumulator(x), pool_size=2)),
    "tanh, which depends on the shape": lambda x: sign(R_.subtract(R_.tanh(accumulator(x)), const(0.5))),
    "a sign of the input": lambda x: sign(x),
}


@pytest.mark.parametrize("network", DECLINED)
def test_do_not_fuse(network, function, check_unchanged):
    check_unchanged(FuseThreshold, function(SHAPE, DECLINED[network]))


def shared(which):
    def body(x):
        product = accumulator(x)
        shifted = emit(R_.add(product, const(1.0)))
        other = product if which == "the accumulator" else shifted
        return R_.add(sign(shifted), other)

    return body


@pytest.mark.parametrize("which", ["the accumulator", "a link of the chain"])
def test_do_not_fuse_what_is_read_elsewhere(which, function, check_unchanged, reasons):
    check_unchanged(FuseThreshold, function(SHAPE, shared(which)))
    assert any("is read elsewhere as well" in line for line in reasons())


def test_do_not_fuse_an_accumulator_that_is_an_output(check_unchanged):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            product = builder.emit(binary_conv(emit(sign(x)), WEIGHT))
            result = builder.emit_output(relax.Tuple([emit(sign(product)), product]))
        builder.emit_func_output(result)
    check_unchanged(FuseThreshold, builder.get())


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_thresholds_of_every_pattern(length):
    """Over a few values, every pattern of bits: monotone ones become thresholds, the others none."""
    values = np.arange(length) * 2 - 3
    for pattern in itertools.product([False, True], repeat=length):
        bits = np.array(pattern)[:, None]
        thresholds, falling = thresholds_of(bits, values)
        if thresholds is None:
            assert sum(a != b for a, b in itertools.pairwise(pattern)) > 1
        else:
            assert ((np.where(falling, -1, 1) * values[:, None] >= thresholds) == bits).all()
