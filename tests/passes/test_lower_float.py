"""Float layers take padded inputs and tiled weights."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tvm import relax
from tvm.relax import op as R_
from tvm.script import ir as I
from tvm.script import relax as R

from bnncc.dialect.ops import attributes, call, is_call
from bnncc.passes.lower_float import LowerFloat, tile_weight
from bnncc.passes.rewriter import LAYERS, numpy_of
from bnncc.targets.cuda.descriptor import CUDA_TARGETS

RNG = np.random.default_rng(0)
W = RNG.normal(size=(8, 4, 3, 3)).astype("float32")  # 8 outputs: the lanes of AVX2


def const(value):
    return relax.const(np.ascontiguousarray(value, "float32"))


def nhwc(x, weight, **attrs):
    return R_.nn.conv2d(x, const(weight), data_layout="NHWC", kernel_layout="OIHW", out_dtype="float32", **attrs)


def test_a_convolution(check, v3):
    tiled = np.ascontiguousarray(W.transpose(2, 3, 1, 0)[None, None])  # [G, OB, KH, KW, I, OL]

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 6, 6, 4), "float32")) -> R.Tensor((1, 3, 4, 8), "float32"):
            with R.dataflow():
                y = R.nn.conv2d(
                    x, R.const(W), strides=[2, 2], padding=[1, 2, 0, 3], data_layout="NHWC", kernel_layout="OIHW"
                )
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((1, 6, 6, 4), "float32")) -> R.Tensor((1, 3, 5, 8), "float32"):
            with R.dataflow():
                p = R.nn.pad(x, (0, 0, 1, 0, 2, 3, 0, 0))
                y = R.bnncc.conv2d(
                    p, R.const(tiled), out_channels=8, kernel_size=(3, 3), strides=(2, 2), dilation=(1, 1),
                    zero_rows=(1, 0),
                )  # fmt: skip
                R.output(y)
            return y

    check(LowerFloat(v3), Before, Expected)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_zeros_count_where_a_weight_is_not_finite(apply, calls, v3, function, value):
    weight = W.copy()
    weight[0, 0, 0, 0] = value
    after = apply(LowerFloat(v3), function((1, 6, 6, 4), lambda x: nhwc(x, weight, padding=1)))
    (conv,) = (b.value for b in after["main"].body.blocks[0].bindings if is_call(b.value, "bnncc.conv2d"))
    assert "zero_rows" not in attributes(conv)


def test_padding_that_is_read(function, check):
    """On a GPU: zeros that the model pads with, and those of the convolution, around what they were put around."""
    target = CUDA_TARGETS["cuda-sm_90"]
    attrs = {"out_channels": 8, "kernel_size": (3, 3), "strides": (1, 1), "dilation": (1, 1)}

    def before(x):
        return nhwc(R_.nn.pad(x, (0, 0, 1, 0, 2, 3, 0, 0)), W, padding=(1, 1, 1, 1))

    tiled = const(tile_weight(W, 1, target.conv_lanes(8)))
    expected = function((1, 6, 6, 4), lambda x: call("conv2d", [x, tiled], **attrs, padding=(2, 3, 1, 4)))
    check(LowerFloat(target), function((1, 6, 6, 4), before), expected)


@pytest.mark.parametrize("network", ["narrow", "another layout", "ones"])
def test_do_not_read_padding(network, function, apply, calls):
    """Of channels that fill no vectors; where a copy is made anyway; of other values than zeros."""
    weight = W[:, :3] if network == "narrow" else W
    shape = (1, 6, 6, weight.shape[1])

    def before(x):
        if network == "another layout":
            x = R_.permute_dims(x, (0, 2, 1, 3))
        return nhwc(R_.nn.pad(x, (0, 0, 1, 1, 1, 1, 0, 0), pad_value=1.0 if network == "ones" else 0.0), weight)

    after = apply(LowerFloat(CUDA_TARGETS["cuda-sm_90"]), function(shape, before))
    assert calls(after)[-2:] == ["nn.pad", "bnncc.conv2d"]


def test_a_linear_layer(function, check, v3):
    weight = RNG.normal(size=(5, 7)).astype("float32")
    tiled = np.zeros((1, 7, 8), "float32")
    tiled[0, :, :5] = weight.T
    check(
        LowerFloat(v3),
        function((3, 7), lambda x: R_.matmul(x, const(weight.T))),
        function((3, 7), lambda x: call("dense", [x, const(tiled)], out_channels=5)),
    )


def test_depthwise(function, check, v3):
    weight = RNG.normal(size=(4, 1, 3, 3)).astype("float32")
    attrs = {"out_channels": 4, "kernel_size": (3, 3), "strides": (1, 1), "dilation": (2, 2)}
    check(
        LowerFloat(v3),
        function((1, 9, 9, 4), lambda x: nhwc(x, weight, groups=4, dilation=2)),
        function(
            (1, 9, 9, 4), lambda x: call("depthwise_conv2d", [x, const(weight[:, 0].transpose(1, 2, 0))], **attrs)
        ),
    )


def test_depthwise_on_planes(function, check, v3):
    weight = RNG.normal(size=(4, 1, 3, 3)).astype("float32")
    attrs = {"out_channels": 4, "kernel_size": (3, 3), "strides": (1, 1), "dilation": (1, 1), "padding": (1, 1, 1, 1)}
    check(
        LowerFloat(v3),
        function((1, 4, 9, 16), lambda x: R_.nn.conv2d(x, const(weight), padding=1, groups=4)),
        function(
            (1, 4, 9, 16), lambda x: call("depthwise_conv2d", [x, const(weight[:, 0])], **attrs, data_layout="NCHW")
        ),
    )


@pytest.mark.parametrize(
    ("width", "value", "taken"),
    [
        ((0, 0, 1, 0, 2, 3, 0, 0), 0.0, True),
        ((0, 0, 1, 0, 2, 3, 0, 0), 1.0, False),
        ((0, 0, 1, 1, 1, 1, 1, 2), 0.0, False),
    ],
)
def test_depthwise_takes_zeros_around_its_image(function, check, v3, width, value, taken):
    channels = 4 + width[6] + width[7]
    weight = RNG.normal(size=(channels, 1, 3, 3)).astype("float32")
    attrs = {"out_channels": channels, "kernel_size": (3, 3), "strides": (1, 1), "dilation": (1, 1)}
    packed = const(weight[:, 0].transpose(1, 2, 0))

    def pad(x):
        return relax.BlockBuilder.current().emit(R_.nn.pad(x, width, pad_value=value))

    def expected(x):
        if taken:
            return call("depthwise_conv2d", [x, packed], **attrs, padding=(2, 3, 1, 4))
        return call("depthwise_conv2d", [pad(x), packed], **attrs, padding=(1, 1, 1, 1))

    check(
        LowerFloat(v3),
        function((1, 9, 9, 4), lambda x: nhwc(pad(x), weight, groups=channels, padding=(1, 1, 1, 1))),
        function((1, 9, 9, 4), expected),
    )


def test_weight_only_binary_layers_store_bits(function, check, v3):
    alpha = np.linspace(0.1, 0.8, 8, dtype="float32")
    signs = np.sign(W)
    tiled = signs.transpose(2, 3, 1, 0)[None, None]
    bits = np.packbits(tiled > 0, axis=-1, bitorder="little")
    attrs = {"out_channels": 8, "kernel_size": (3, 3), "strides": (1, 1), "dilation": (1, 1)}

    def expected(x):
        packed = call("unpack_weights", [relax.const(bits), const(alpha.reshape(1, 1, 8))], shape=tiled.shape)
        return call("conv2d", [x, packed], **attrs)

    after = check(
        LowerFloat(v3),
        function((1, 6, 6, 4), lambda x: nhwc(x, signs * alpha.reshape(8, 1, 1, 1))),
        function((1, 6, 6, 4), expected),
    )
    (layer,) = (json.loads(str(row)) for row in after["main"].attrs[LAYERS])
    assert layer["op"] == "weight-only binary conv2d"
    assert (layer["weight_bits"], layer["activation_bits"], layer["weight_bytes"]) == (1, 32, W.size // 8)
    assert layer["output_shape"] == [1, 8, 4, 4] and layer["macs"] == 16 * W.size


def test_weight_only_binary_linear(function, apply, calls, v3):
    weight = np.where(RNG.normal(size=(16, 7)) > 0, 0.5, -0.5).astype("float32")
    after = apply(LowerFloat(v3), function((3, 7), lambda x: R_.matmul(x, const(weight.T))))
    assert calls(after) == ["bnncc.unpack_weights", "reshape", "bnncc.dense"]


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lanes", [1, 4, 8])
def test_tiles_hold_every_weight_once(groups, lanes):
    """A convolution computed from the tiles is the convolution."""
    weight = RNG.normal(size=(12, 3, 2, 2)).astype("float32")
    tiled = tile_weight(weight, groups, lanes)
    assert tiled.shape == (groups, -(-12 // groups // lanes), 2, 2, 3, lanes)
    x = torch.from_numpy(RNG.normal(size=(1, 3 * groups, 5, 5)).astype("float32"))
    eager = F.conv2d(x, torch.from_numpy(weight), groups=groups)
    windows = F.unfold(x, 2).reshape(groups, 3, 2, 2, 16).numpy()
    ours = np.einsum("gbijcl,gcijp->gblp", tiled, windows).reshape(groups, -1, 16)[:, : 12 // groups]
    np.testing.assert_allclose(ours.reshape(12, 16), eager.reshape(12, 16).numpy(), rtol=1e-5, atol=1e-5)


DECLINED = {
    "a weight that is no constant": ((1, 4, 4, 4), lambda x: R_.nn.conv2d(x, x, data_layout="NHWC")),
    "the model's layout": ((1, 4, 6, 6), lambda x: R_.nn.conv2d(x, const(W))),
    "a product of matrices of a batch": ((2, 3, 7), lambda x: R_.matmul(x, const(np.ones((7, 5))))),
    "two activations": ((4, 4), lambda x: R_.matmul(x, x)),
}


@pytest.mark.parametrize("network", DECLINED)
def test_do_not_lower(network, function, check_unchanged, v3):
    shape, body = DECLINED[network]
    check_unchanged(LowerFloat(v3), function(shape, body))


def test_do_not_store_ternary_weights_as_bits(function, apply, v3):
    after = apply(LowerFloat(v3), function((1, 6, 6, 4), lambda x: nhwc(x, np.sign(W) * (W > -1))))
    (conv,) = (b.value for b in after["main"].body.blocks[0].bindings if is_call(b.value, "bnncc.conv2d"))
    assert numpy_of(conv.args[1]).dtype == "float32" and attributes(conv)["out_channels"] == 8
