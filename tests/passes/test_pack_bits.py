"""Binary operators on packed words; packed weights and padding corrections against PyTorch."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op as R_

from bnncc.dialect.ops import attributes, call, is_call
from bnncc.passes.pack_bits import PackBits, pack_weight, reduction_in_lanes, zero_padding_correction
from bnncc.passes.rewriter import LAYERS, ORIGINS, Origin, numpy_of, origins_of
from bnncc.runtime.bits import BitLayout

RNG = np.random.default_rng(0)
SHAPE = (1, 6, 5, 64)
W = RNG.choice([-1.0, 1.0], (4, 64, 3, 3)).astype("float32")


def emit(value, name=""):
    return relax.BlockBuilder.current().emit(value, name)


def sign(x, predicate="not_lt"):
    return emit(call("sign", [x], predicate=predicate), "s")


def conv(source, weight=W, name="y", **attrs):
    defaults = {
        "strides": (1, 1), "dilation": (1, 1), "groups": 1, "padding": (0, 0, 0, 0), "pad_value": -1, "slices": 1,
        "data_layout": "NHWC",
    }  # fmt: skip
    return emit(call("binary_conv2d", [source, relax.const(weight)], **{**defaults, **attrs}), name)


LAYOUT = {"channels": 64, "groups": 1, "word_bits": 64, "lanes": 8}
LANES = 4  # of the accumulators on AVX2: words in a vector


def xnor(words, weight, args=(), **attrs):
    defaults = {
        "out_channels": 4, "depth": 576, "kernel_size": (3, 3), "strides": (1, 1), "dilation": (1, 1), "n_eff": 0,
        "corrected": 0, "counting": "bytes",
    }  # fmt: skip
    packed = relax.const(pack_weight(weight, 1, 64, 8, LANES))
    return emit(call("xnor_conv2d", [words, packed, *args], **{**defaults, **attrs}))


def pack(x, **attrs):
    defaults = {"predicate": "not_lt", "planes": 1, "padding": (0, 0, 0, 0), "pad_bit": 0, "data_layout": "NHWC"}
    return emit(call("pack", [x], **{**defaults, **LAYOUT, **attrs}))


def words(bits, shape):
    return emit(R_.memory.view(bits, shape, "uint64"))


def test_a_layer(function, check, v3):
    def expected(x):
        bits = pack(x, padding=(1, 1, 1, 1), pad_bit=1)
        return R_.astype(xnor(words(bits, (1, 8, 7, 1)), W), "float32")

    check(
        PackBits(v3),
        function(SHAPE, lambda x: conv(sign(x), padding=(1, 1, 1, 1), pad_value=1)),
        function(SHAPE, expected),
    )


def test_thresholds_stay_packed(function, check, v3):
    square = RNG.choice([-1.0, 1.0], (64, 64, 1, 1)).astype("float32")
    t = relax.const(np.arange(64, dtype="int32"))
    one = {"kernel_size": (1, 1), "depth": 64}

    def before(x):
        hidden = emit(call("threshold", [conv(sign(x), square, "a"), t], axis=3), "h")
        return conv(hidden, padding=(0, 0, 1, 1))

    def expected(x):
        acc = xnor(words(pack(x), (1, 6, 5, 1)), square, out_channels=64, **one)
        bits = emit(call("threshold_pack", [acc, t], **LAYOUT))
        padded = emit(call("pad_bits", [bits], padding=(0, 0, 1, 1), pad_bit=0, **LAYOUT))
        return R_.astype(xnor(words(padded, (1, 7, 6, 1)), W), "float32")

    check(PackBits(v3), function(SHAPE, before), function(SHAPE, expected))


def test_a_pool_of_signs_is_a_pool_of_bits(function, check, v3):
    """Rounded up, the last windows reach over the edge."""

    def before(x):
        pooled = R_.nn.max_pool2d(sign(x), pool_size=2, strides=2, ceil_mode=True, layout="NHWC")
        return conv(emit(pooled))

    def expected(x):
        pooled = call(
            "max_pool2d_bits", [pack(x)], pool_size=(2, 2), strides=(2, 2), padding=(0, 0, 0, 1), planes=1, **LAYOUT
        )
        return R_.astype(xnor(words(emit(pooled), (1, 3, 3, 1)), W), "float32")

    check(PackBits(v3), function(SHAPE, before), function(SHAPE, expected))


def test_the_models_layout_is_packed_at_once(function, apply, calls, v3):
    after = apply(PackBits(v3), function((1, 64, 6, 5), lambda x: conv(sign(emit(R_.permute_dims(x, [0, 2, 3, 1]))))))
    assert calls(after) == ["bnncc.pack", "memory.view", "bnncc.xnor_conv2d", "astype"]
    assert attributes(first(after, "bnncc.pack"))["data_layout"] == "NCHW"


def first(mod, name):
    return next(b.value for b in mod["main"].body.blocks[0].bindings if is_call(b.value, name))


def test_do_not_pack_the_models_layout_where_others_read_the_image(function, apply, v3):
    def body(x):
        image = emit(R_.permute_dims(x, [0, 2, 3, 1]))
        return R_.add(conv(sign(image), padding=(1, 1, 1, 1), weight=np.tile(W, (16, 1, 1, 1))), image)

    assert attributes(first(apply(PackBits(v3), function((1, 64, 6, 5), body)), "bnncc.pack"))["data_layout"] == "NHWC"


def several(body):
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType(SHAPE, "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            result = builder.emit_output(relax.Tuple(list(body(x))))
        builder.emit_func_output(result)
    return builder.get()


def test_equal_packs_are_one(apply, calls, v3):
    def body(x):
        s = sign(x)
        return conv(s, name="a"), conv(s, -W, name="b")

    assert calls(apply(PackBits(v3), several(body))).count("bnncc.pack") == 1


@pytest.mark.parametrize("other", [{"padding": (1, 1, 1, 1)}, {"groups": 2, "weight": W[:, :32]}])
def test_do_not_share_a_pack_of_another_layout(other, apply, calls, v3):
    def body(x):
        s = sign(x)
        return conv(s, name="a"), conv(s, name="b", **other)

    assert calls(apply(PackBits(v3), several(body))).count("bnncc.pack") == 2


def test_the_float_sign_stays_for_who_needs_floats(apply, calls, v3):
    def body(x):
        s = sign(x)
        return conv(s), emit(R_.add(s, x))

    names = calls(apply(PackBits(v3), several(body)))
    assert "bnncc.sign" in names and "bnncc.pack" in names
    assert "bnncc.sign" not in calls(apply(PackBits(v3), several(lambda x: [conv(sign(x))])))


@pytest.mark.parametrize(
    ("predicate", "weight", "padding", "expected"),
    [
        ("not_lt", W, 0, {"planes": 1, "n_eff": 0, "corrected": 0, "args": 2}),
        ("not_lt", W, 1, {"planes": 1, "n_eff": 0, "corrected": 1, "args": 5}),
        ("not_lt", W * (W[0] > 0), 0, {"planes": 1, "n_eff": 1, "corrected": 0, "args": 3}),
        ("not_lt", W * (W[0] > 0), 1, {"planes": 1, "n_eff": 1, "corrected": 1, "args": 6}),
        ("ternary", W, 1, {"planes": 2, "n_eff": 0, "corrected": 0, "args": 2}),
        ("ternary", W * (W[0] > 0), 1, {"planes": 2, "n_eff": 0, "corrected": 0, "args": 2}),
    ],
    ids=["binary", "padded with 0", "ternary weight", "ternary weight padded", "ternary input", "ternary both"],
)
def test_operands(predicate, weight, padding, expected, function, apply, v3):
    """What zeros cost: an operand that counts them, a correction for those of the padding, or a second plane."""
    body = lambda x: conv(sign(x, predicate), weight, padding=(padding,) * 4, pad_value=0)  # noqa: E731
    after = apply(PackBits(v3), function(SHAPE, body))
    product, packed = first(after, "bnncc.xnor_conv2d"), first(after, "bnncc.pack")
    a = attributes(product)
    assert expected == {
        "planes": attributes(packed)["planes"], "n_eff": a["n_eff"], "corrected": a["corrected"],
        "args": len(product.args),
    }  # fmt: skip
    if a["n_eff"]:
        assert numpy_of(product.args[2]).tolist() == np.abs(weight).reshape(4, -1).sum(axis=1).tolist()


def test_linear(function, apply, calls, v3):
    weight = RNG.choice([-1.0, 1.0], (5, 64)).astype("float32")
    body = lambda x: call("binary_dense", [sign(x), relax.const(weight)])  # noqa: E731
    after = apply(PackBits(v3), function((3, 64), body))
    assert calls(after) == ["reshape", "bnncc.pack", "memory.view", "bnncc.xnor_conv2d", "astype", "reshape"]
    assert attributes(first(after, "bnncc.xnor_conv2d"))["depth"] == 64


def test_rows_of_the_layer_table_and_origins(apply, v3):
    mod = several(lambda x: [conv(sign(x), padding=(1, 1, 1, 1))])
    table = {"s": Origin("where", "conv.act", (0, 2, 3, 1)).fields(), "y": Origin("conv2d", "conv").fields()}
    mod["main"] = mod["main"].with_attrs({ORIGINS: table, LAYERS: []})
    main = apply(PackBits(v3), mod)["main"]
    assert [json.loads(str(row)) for row in main.attrs[LAYERS]] == [
        {
            "path": "conv", "op": "binary conv2d", "output_shape": [1, 4, 6, 5], "activation_bits": 1,
            "weight_bits": 1, "macs": 30 * W.size, "weight_bytes": W.size // 8,
        }
    ]  # fmt: skip
    origin = origins_of(main)["s__bits_padded"]
    assert (origin.node, origin.path, origin.order) == ("where", "conv.act", (0, 2, 3, 1))
    assert origin.bits == {**LAYOUT, "planes": 1, "padding": [1, 1, 1, 1], "pad_value": -1}


def test_do_not_touch_floats(function, check_unchanged, v3):
    check_unchanged(PackBits(v3), function(SHAPE, lambda x: R_.add(sign(x), x)))


# Numbers.

GROUPS = st.sampled_from([1, 2, 3])


@st.composite
def weights(draw):
    groups, out, depth = draw(GROUPS), draw(st.integers(1, 9)), draw(st.sampled_from([1, 7, 8, 9, 31, 32, 33, 64, 65]))
    kernel = draw(st.sampled_from([(1, 1), (2, 3), (3, 3)]))
    terms = draw(st.sampled_from([[-1.0, 1.0], [-1.0, 0.0, 1.0]]))
    rng = np.random.default_rng(draw(st.integers(0, 999)))
    return rng.choice(terms, (groups * out, depth, *kernel)).astype("float32"), groups


@settings(max_examples=60, deadline=None)
@given(weights(), st.sampled_from([8, 32, 64]), st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 16]))
def test_packed_weights_unpack_to_themselves(drawn, word_bits, max_lanes, lanes):
    weight, groups = drawn
    out, depth, kh, kw = weight.shape
    layout = BitLayout.for_target(depth, 1, word_bits, max_lanes)
    packed = pack_weight(weight, groups, word_bits, layout.lanes, lanes)
    planes = packed if packed.ndim == 7 else packed[:, :, :, :, None]
    assert packed.dtype == layout.word_dtype and packed.flags.c_contiguous
    assert planes.shape == (groups, -(-out // groups // lanes), kh, kw, planes.shape[4], layout.group_words, lanes)
    # [G, OB, KH, KW, planes, K, OL] → [G·O, planes, KH, KW, K]
    rows = planes.transpose(0, 1, 6, 4, 2, 3, 5).reshape(groups, -1, *planes.shape[4:5], kh, kw, layout.group_words)
    rows, beyond = rows[:, : out // groups], rows[:, out // groups :]
    assert not beyond.any()
    bits = layout.unpack(rows.reshape(out, -1, kh, kw, layout.group_words)).transpose(1, 0, 4, 2, 3)
    values = np.where(bits[0], 1, -1) * (bits[1] if len(bits) > 1 else 1)
    assert np.array_equal(values, weight)
    assert (len(bits) == 2) == (not weight.all())


@settings(max_examples=60, deadline=None)
@given(
    weights(),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.tuples(*[st.integers(0, 3)] * 4),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
)
def test_correction_turns_padding_with_minus_one_into_padding_with_zero(drawn, size, padding, strides, dilation):
    weight, groups = drawn
    top, left, bottom, right = padding
    reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    if size[0] + top + bottom < reach[0] or size[1] + left + right < reach[1]:
        return
    channels = weight.shape[1] * groups
    x = torch.from_numpy(RNG.choice([-1.0, 1.0], (1, channels, *size)).astype("float32"))
    attrs = {"padding": padding, "strides": strides, "dilation": dilation, "groups": groups}

    def eager(value):
        padded = F.pad(x, (left, right, top, bottom), value=value)
        return F.conv2d(padded, torch.from_numpy(weight), None, strides, 0, dilation, groups)[0].numpy()

    correction, rows, cols = zero_padding_correction(weight, (1, *size, channels), attrs)
    assert {a.dtype.name for a in (correction, rows, cols)} == {"int32"}
    added = correction[rows[:, None], cols[None, :]].transpose(2, 0, 1)  # [OH, OW, O] → [O, OH, OW]
    assert np.array_equal(eager(-1.0) + added, eager(0.0))


def test_relu_of_a_product_is_one_of_integers(function, check, v3):
    def expected(x):
        positive = emit(R_.maximum(xnor(words(pack(x), (1, 6, 5, 1)), W), relax.const(0, "int32")))
        return R_.astype(positive, "float32")

    check(
        PackBits(v3),
        function(SHAPE, lambda x: R_.nn.relu(conv(sign(x)))),
        function(SHAPE, expected),
    )


def test_do_not_turn_the_relu_of_a_sum_into_integers(function, calls, v3):
    after = PackBits(v3)(function(SHAPE, lambda x: R_.nn.relu(emit(R_.add(conv(sign(x)), relax.const(0.5))))))
    assert "nn.relu" in calls(after) and "maximum" not in calls(after)


@pytest.mark.parametrize(("channels", "copies"), [(512, 1), (128, 1), (64, 2), (32, 4)])
def test_reduction_in_lanes_keeps_the_bytes_of_each_output(channels, copies):
    weight = RNG.choice([-1.0, 1.0], (16, channels, 2, 3)).astype("float32")
    layout = BitLayout.for_target(channels, 1, 8, 8)
    vectors = reduction_in_lanes(pack_weight(weight, 1, 8, layout.lanes, 8), 16)
    assert vectors.shape == (2, 2, 3, max(1, channels // 128), 8, 16)
    own = np.moveaxis(vectors, 4, 1).reshape(16, 2, 3, -1)  # [O, KH, KW, bytes]
    size = channels // 8
    for copy in range(copies):
        bits = layout.unpack(own[..., copy * size : (copy + 1) * size])
        np.testing.assert_array_equal(bits, weight.transpose(0, 2, 3, 1) > 0)
