"""Float layers that are rounded to 8 bits: what becomes of the chosen ones, and what a quantizer computes."""

import numpy as np
import pytest
import torch
from tvm import relax
from tvm.relax import op as R_

from bnncc.dialect.ops import call
from bnncc.dialect.plan import QuantizedLayer
from bnncc.passes.form_kernels import FormKernels
from bnncc.passes.fuse_integer_conv import FuseIntegerConv
from bnncc.passes.pack_bytes import PackBytes
from bnncc.passes.quantize_float import QuantizeFloat, affine, quantize_weight
from bnncc.passes.rewriter import OPT_INS, opt_ins_of
from bnncc.passes.to_nhwc import ToNHWC
from bnncc.runtime.bits import Levels
from bnncc.targets.descriptor import get_target

RNG = np.random.default_rng(0)
SHAPE = (1, 8, 6, 6)
W = RNG.normal(size=(4, 8, 3, 3)).astype("float32")
DENSE = RNG.normal(size=(8, 5)).astype("float32")
NORM = relax.const(np.linspace(0.5, 2, 8, dtype="float32").reshape(1, 8, 1, 1))


def emit(value, name=""):
    return relax.BlockBuilder.current().emit(value, name)


def conv(x, weight=W, name="conv", **options):
    return emit(R_.nn.conv2d(x, relax.const(weight), **options), name)


def quantize(x, low, high, name=""):
    scale, first = affine(low, high)
    return emit(call("quantize", [x, relax.const(scale)], first=first, most=255), name)


def layer(name="conv", low=-1.0, high=3.0):
    return QuantizedLayer(name, "", low, high)


def compare(check, function, layers, before, expected, shape=SHAPE):
    """The rewriting, but for the table of opt-ins."""
    result = QuantizeFloat(layers)(function(shape, before))
    assert opt_ins_of(result["main"]) == {chosen.layer: "int8" for chosen in layers}
    wanted = function(shape, expected)
    wanted["main"] = wanted["main"].with_attr(OPT_INS, {chosen.layer: "int8" for chosen in layers})
    check(QuantizeFloat(layers), function(shape, before), wanted)


def test_a_convolution(check, function):
    compare(
        check, function, [layer()],
        lambda x: conv(emit(R_.multiply(x, NORM)), padding=1),
        lambda x: conv(quantize(emit(R_.multiply(x, NORM)), -1.0, 3.0), quantize_weight(W, 0), padding=1),
    )  # fmt: skip


def test_a_dense_layer(check, function):
    compare(
        check, function, [layer("head")],
        lambda x: emit(R_.matmul(x, relax.const(DENSE)), "head"),
        lambda x: emit(R_.matmul(quantize(x, -1.0, 3.0), relax.const(quantize_weight(DENSE, 1))), "head"),
        (2, 8),
    )  # fmt: skip


def test_zeros_around_the_input_come_behind_the_quantizer(check, function):
    compare(
        check, function, [layer()],
        lambda x: conv(emit(R_.nn.pad(x, [0, 0, 0, 0, 0, 1, 0, 1]))),
        lambda x: conv(emit(R_.nn.pad(quantize(x, -1.0, 3.0), [0, 0, 0, 0, 0, 1, 0, 1])), quantize_weight(W, 0)),
    )  # fmt: skip


@pytest.mark.parametrize("options", [{"pad_value": 1.0}, {"pad_mode": "reflect"}])
def test_other_padding_is_quantized_itself(options, check, function):
    around = [0, 0, 0, 0, 1, 1, 1, 1]
    compare(
        check, function, [layer()],
        lambda x: conv(emit(R_.nn.pad(x, around, **options))),
        lambda x: conv(quantize(emit(R_.nn.pad(x, around, **options)), -1.0, 3.0), quantize_weight(W, 0)),
    )  # fmt: skip


def test_an_input_that_the_model_quantizes_keeps_its_grid(check, function):
    def quantized(x):
        return emit(call("sign", [x], predicate="ge"))

    compare(
        check, function, [layer(low=None, high=None)],
        lambda x: conv(quantized(x)), lambda x: conv(quantized(x), quantize_weight(W, 0)),
    )  # fmt: skip


def test_two_layers_share_a_quantizer(check, function):
    def two(x, read, weight):
        return emit(R_.add(conv(read, weight, "a"), conv(read, weight, "b")))

    compare(
        check, function, [layer("a"), layer("b")],
        lambda x: two(x, x, W), lambda x: two(x, quantize(x, -1.0, 3.0), quantize_weight(W, 0)),
    )  # fmt: skip


def test_do_not_quantize_what_was_not_chosen(function, check):
    compare(check, function, [], lambda x: conv(x), lambda x: conv(x))
    compare(
        check, function, [layer("b")],
        lambda x: emit(R_.add(conv(x, W, "a"), conv(x, W, "b"))),
        lambda x: emit(R_.add(conv(x, W, "a"), conv(quantize(x, -1.0, 3.0), quantize_weight(W, 0), "b"))),
    )  # fmt: skip


def test_the_integers_are_the_existing_kernels_and_packing_is_the_quantizer(function, calls):
    """Nothing computes the rounded floats: bytes are packed from the input itself, and the sum says it is inexact."""
    target = get_target("x86-64-v3")
    mod = QuantizeFloat([layer()])(function(SHAPE, lambda x: conv(x, padding=1)))
    for step in (FuseIntegerConv, ToNHWC(), PackBytes(target)):
        mod = step(mod)
    names = calls(mod)
    assert "bnncc.quantize" not in names and "nn.conv2d" not in names
    assert names[:3] == ["permute_dims", "bnncc.pack_bytes", "bnncc.byte_conv2d"] and "bnncc.rescale" in names


def test_scales_that_are_powers_of_two_do_not_make_an_opt_in_exact(function, calls):
    """The sum of integers is exact, the weights are not the model's."""
    weight = np.where(RNG.random(W.shape) < 0.5, 127.0, -1.0).astype("float32") * 0.5
    mod = QuantizeFloat([layer(low=0.0, high=255.0)])(function(SHAPE, lambda x: conv(x, weight)))
    assert calls(FuseIntegerConv(mod))[-1] == "bnncc.rescale"
    mod["main"] = mod["main"].without_attr(OPT_INS)
    assert calls(FuseIntegerConv(mod))[-1] == "multiply"


RANGES = [(-1.0, 1.0), (0.0, 6.0), (0.1, 2.0), (-3.0, -0.5), (-1e-3, 7.0), (0.0, 0.0), (-5.5, 0.0)]


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_the_levels_span_the_range_and_zero(low, high):
    scale, first = affine(low, high)
    values = Levels.affine(scale, first, 255).values
    assert 0.0 in values and len(values) == 256
    assert values[0] <= low + scale and values[-1] >= high - scale
    if low < high:
        assert values[-1] - values[0] == pytest.approx(max(high, 0) - min(low, 0), rel=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_rounded_channel_by_channel(axis):
    weight = RNG.normal(size=(6, 7)).astype("float32")
    weight[2] = weight[:, 3] = 0
    rounded = np.moveaxis(quantize_weight(weight, axis), axis, 0)
    for row, original in zip(rounded, np.moveaxis(weight, axis, 0), strict=True):
        step = np.abs(original).max() / 127
        assert np.abs(row - original).max() <= 0.5001 * step
        assert np.abs(row).max() == np.abs(original).max() and len(np.unique(row)) <= 255


@pytest.mark.parametrize(("low", "high"), RANGES)
def test_every_side_rounds_alike_ties_included(low, high, function, evaluate, execute):
    """torch's evaluation, NumPy's and the kernel's: the same float for every input, halfway between levels as well."""
    scale, first = affine(low, high)
    levels = Levels.affine(scale, first, 255)
    middle = (levels.values[1:] + levels.values[:-1]) / 2
    near = [np.nextafter(middle, np.float32(side)) for side in (-1e9, 1e9)]
    x = np.concatenate([levels.values, middle, *near, [-1e9, 1e9, np.float32(-0.0)]]).astype("float32")
    mod = function(x.shape, lambda v: quantize(v, low, high))
    expected = levels.values[levels.of(x)]
    np.testing.assert_array_equal(evaluate(mod, torch.from_numpy(x)).numpy(), expected)
    np.testing.assert_array_equal(execute(FormKernels()(mod), x)[0], expected)
