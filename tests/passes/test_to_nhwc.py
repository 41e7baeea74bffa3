"""Images move to NHWC, and transpositions stand only where a graph enters or leaves."""

import numpy as np
import pytest
import torch
from tvm import relax
from tvm.relax import op as R_
from tvm.script import ir as I
from tvm.script import relax as R

from bnncc.dialect.ops import call
from bnncc.passes.rewriter import LAYERS, ORIGINS, Origin, origins_of
from bnncc.passes.to_nhwc import ToNHWC

RNG = np.random.default_rng(0)
W = RNG.normal(size=(6, 4, 3, 3)).astype("float32")
SHAPE = (2, 4, 7, 5)
BIAS = RNG.normal(size=(1, 4, 1, 1)).astype("float32")


def emit(value, name=""):
    return relax.BlockBuilder.current().emit(value, name)


def const(value):
    return relax.const(np.asarray(value, "float32"))


def test_convolution_and_what_follows(check):
    bias = BIAS.reshape(1, 1, 1, 4)
    w = RNG.normal(size=(4, 4, 3, 3)).astype("float32")

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 4, 7, 5), "float32")) -> R.Tensor((2, 4, 3, 3), "float32"):
            with R.dataflow():
                c = R.nn.conv2d(x, R.const(w), strides=[2, 1], padding=[0, 1, 0, 0])
                b = R.add(c, R.const(BIAS))
                r = R.nn.relu(b)
                y = R.nn.max_pool2d(r, pool_size=[1, 2], ceil_mode=True)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((2, 4, 7, 5), "float32")) -> R.Tensor((2, 4, 3, 3), "float32"):
            with R.dataflow():
                x__nhwc = R.permute_dims(x, [0, 2, 3, 1])
                c = R.nn.conv2d(
                    x__nhwc, R.const(w), strides=[2, 1], padding=[0, 1, 0, 0], data_layout="NHWC",
                    kernel_layout="OIHW", out_dtype="float32",
                )  # fmt: skip
                b = R.add(c, R.const(bias))
                r = R.nn.relu(b)
                y = R.nn.max_pool2d(r, pool_size=[1, 2], ceil_mode=True, layout="NHWC")
                y__nchw = R.permute_dims(y, [0, 3, 1, 2])
                R.output(y__nchw)
            return y__nchw

    check(ToNHWC(), Before, Expected)


def test_binary_operators_and_thresholds(function, check):
    signs = np.sign(W)
    t = relax.const(np.arange(6, dtype="int32"))
    attrs = {"strides": (1, 1), "dilation": (1, 1), "groups": 1, "padding": (1, 1, 1, 1), "pad_value": -1}

    def before(x):
        s = call("sign", [x], predicate="gt")
        return call("threshold", [call("binary_conv2d", [s, const(signs)], **attrs, data_layout="NCHW"), t])

    def expected(x):
        s = call("sign", [R_.permute_dims(x, [0, 2, 3, 1])], predicate="gt")
        acc = call("binary_conv2d", [s, const(signs)], **attrs, slices=1, data_layout="NHWC")
        return R_.permute_dims(call("threshold", [acc, t], axis=3), [0, 3, 1, 2])

    check(ToNHWC(), function(SHAPE, before), function(SHAPE, expected))


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        (lambda x: R_.mean(x, [2, 3]), lambda x: R_.mean(x, [1, 2])),
        (lambda x: R_.mean(x, [-1, -2]), lambda x: R_.mean(x, [1, 2])),
        (
            lambda x: R_.reshape(R_.mean(x, [2, 3], keepdims=True), (2, 4)),
            lambda x: R_.reshape(R_.mean(x, [1, 2], keepdims=True), (2, 4)),
        ),
        (
            lambda x: R_.reshape(R_.nn.adaptive_avg_pool2d(x, (1, 1)), (2, 4)),
            lambda x: R_.reshape(R_.nn.adaptive_avg_pool2d(x, (1, 1), layout="NHWC"), (2, 4)),
        ),
    ],
    ids=["mean", "negative axes", "kept axes", "adaptive pool"],
)
def test_a_network_that_ends_in_a_vector_moves_once(before, expected, function, check):
    check(
        ToNHWC(), function(SHAPE, before), function(SHAPE, lambda x: expected(emit(R_.permute_dims(x, [0, 2, 3, 1]))))
    )


def test_pad_and_concatenation(function, check):
    def before(x):
        padded = emit(R_.nn.pad(x, [0, 1, 2, 3, 4, 5, 6, 7], pad_value=0.5))
        return R_.mean(emit(R_.concat([padded, emit(R_.nn.relu(padded))], axis=1)), [2, 3])

    def expected(x):
        padded = emit(R_.nn.pad(R_.permute_dims(x, [0, 2, 3, 1]), [0, 1, 4, 5, 6, 7, 2, 3], pad_value=0.5))
        return R_.mean(emit(R_.concat([padded, emit(R_.nn.relu(padded))], axis=3)), [1, 2])

    check(ToNHWC(), function(SHAPE, before), function(SHAPE, expected))


def test_a_reader_that_is_not_known_gets_the_models_layout(function, check):
    """The value is permuted back once, however many such readers there are."""

    def before(x):
        r = emit(R_.nn.max_pool2d(x, pool_size=2, strides=2))
        return R_.add(emit(R_.reshape(r, (48,))), emit(R_.reshape(emit(R_.cumsum(r, 2)), (48,))))

    def expected(x):
        r = emit(R_.nn.max_pool2d(emit(R_.permute_dims(x, [0, 2, 3, 1])), pool_size=2, strides=2, layout="NHWC"))
        back = emit(R_.permute_dims(r, [0, 3, 1, 2]))
        return R_.add(emit(R_.reshape(back, (48,))), emit(R_.reshape(emit(R_.cumsum(back, 2)), (48,))))

    check(ToNHWC(), function(SHAPE, before), function(SHAPE, expected))


UNCHANGED = {
    "vectors": ((3, 8), lambda x: R_.nn.relu(R_.matmul(x, const(np.ones((8, 8)))))),
    "a mean over one axis": (SHAPE, lambda x: R_.mean(x, [3])),
    "a mean over channels": (SHAPE, lambda x: R_.mean(x, [1, 2])),
    "a flattening": (SHAPE, lambda x: R_.reshape(x, (2, 140))),
    "elementwise operators": (SHAPE, lambda x: R_.nn.relu(R_.concat([R_.abs(x), x], axis=1))),
    "a concatenation of rows": (SHAPE, lambda x: R_.concat([x, x], axis=2)),
    "a weight that is no constant": (SHAPE, lambda x: R_.nn.conv2d(x, x)),
}


@pytest.mark.parametrize("network", UNCHANGED)
def test_do_not_move(network, function, check_unchanged):
    shape, body = UNCHANGED[network]
    check_unchanged(ToNHWC(), function(shape, body))


PLANAR = (1, 4, 28, 28)
D = RNG.normal(size=(4, 1, 3, 3)).astype("float32")
STAY = {
    "a pool": lambda x: R_.nn.max_pool2d(x, pool_size=3, strides=2, padding=1),
    "a depthwise convolution": lambda x: R_.nn.relu(R_.nn.conv2d(x, const(D), padding=1, groups=4)),
    "a chain": lambda x: R_.nn.relu(R_.nn.avg_pool2d(R_.nn.relu(R_.nn.conv2d(x, const(D), groups=4)), pool_size=3)),
    "a mean": lambda x: R_.mean(R_.nn.relu(x), [2, 3]),
    "a global pool": lambda x: R_.reshape(R_.nn.adaptive_avg_pool2d(x, (1, 1)), (1, 4)),
    "a pool that is flattened": lambda x: R_.reshape(R_.nn.max_pool2d(x, pool_size=2, strides=2), (1, 784)),
}
MOVE = {
    "beside a convolution": lambda x: R_.add(
        R_.nn.conv2d(x, const(RNG.normal(size=(4, 4, 1, 1)))), R_.nn.max_pool2d(x, pool_size=3, padding=1)
    ),
    "behind a convolution": lambda x: R_.nn.max_pool2d(R_.nn.conv2d(x, const(W)), pool_size=2),
    "a global pool behind a convolution": lambda x: R_.nn.adaptive_avg_pool2d(R_.nn.conv2d(x, const(W)), (1, 1)),
    "a pool to a few pixels": lambda x: R_.nn.adaptive_avg_pool2d(x, (2, 2)),
    "short rows": lambda x: R_.nn.max_pool2d(R_.strided_slice(x, [3], [0], [9]), pool_size=2),
    "a long stride": lambda x: R_.nn.max_pool2d(x, pool_size=2, strides=3),
    "a large window": lambda x: R_.nn.avg_pool2d(x, pool_size=9),
    "more channels out": lambda x: R_.nn.conv2d(x, const(RNG.normal(size=(8, 1, 3, 3))), groups=4),
}


@pytest.mark.parametrize("network", STAY)
def test_windows_stay_where_the_target_has_kernels_on_planes(network, function, check_unchanged, apply, calls):
    before = function(PLANAR, STAY[network])
    check_unchanged(ToNHWC(planar_windows=True), before)
    assert calls(apply(ToNHWC(), before))[0] == "permute_dims"


@pytest.mark.parametrize("network", MOVE)
def test_do_not_leave_windows_in_the_models_layout(network, function, apply, calls):
    after = apply(ToNHWC(planar_windows=True), function(PLANAR, MOVE[network]))
    assert calls(after)[0] == "permute_dims"


def test_do_not_leave_windows_where_the_caller_holds_channels_last(function, apply, calls):
    after = apply(ToNHWC("both", planar_windows=True), function(PLANAR, STAY["a pool"]))
    assert calls(after) == ["nn.max_pool2d"]


@pytest.mark.parametrize("constant", [(4, 1, 1), (1, 4, 1, 1), (5,), (7, 1), (1, 1, 7, 5), (2, 4, 7, 5), (), (1,)])
def test_constants_broadcast_as_before(constant, function, apply, evaluate):
    value = const(RNG.normal(size=constant))
    before = function(SHAPE, lambda x: R_.subtract(value, R_.multiply(R_.flip(x, 1), value)))
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    assert torch.equal(evaluate(apply(ToNHWC(), before), x), evaluate(before, x))


@pytest.mark.parametrize("shape", [(2, 4, 6), (2, 4, 3, 5, 6)], ids=["a sequence", "a volume"])
def test_other_ranks_become_images(shape, function, apply, evaluate, calls):
    channel = const(RNG.normal(size=(4, *[1] * (len(shape) - 2))))
    before = function(shape, lambda x: R_.nn.relu(R_.add(R_.multiply(R_.flip(x, 1), channel), x)))
    after = apply(ToNHWC(), before)
    assert calls(after) == ["permute_dims", "reshape", "flip", "multiply", "add", "nn.relu", "reshape", "permute_dims"]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(evaluate(after, x), evaluate(before, x))


def test_do_not_move_constants_that_vary_with_the_depth(function, check_unchanged):
    depth = const(RNG.normal(size=(1, 1, 3, 1, 1)))
    check_unchanged(ToNHWC(), function((2, 4, 3, 5, 6), lambda x: R_.multiply(x, depth)))


def test_names_say_how_a_value_lies(apply):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(builder.emit(R_.cumsum(builder.emit(R_.nn.max_pool2d(x), "r"), 1), "f"))
        builder.emit_func_output(result)
    mod = builder.get()
    table = {name: Origin(name, "stem").fields() for name in ("x", "r", "f")}
    mod["main"] = mod["main"].with_attrs({ORIGINS: table, LAYERS: []})
    orders = {name: origin.order for name, origin in origins_of(apply(ToNHWC(), mod)["main"]).items()}
    assert orders == {"x": None, "x__nhwc": (0, 2, 3, 1), "r": (0, 2, 3, 1), "r__nchw": None, "f": None}
