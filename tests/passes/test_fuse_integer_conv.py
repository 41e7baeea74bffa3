"""Quantized activations times quantized weights: which grids are recognised, what is not fused, and exact integers."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from tvm import relax
from tvm.relax import op as R_

import bnncc
from bnncc.dialect.ops import attributes, call, op_name
from bnncc.layers import QConv2d, QLinear
from bnncc.passes.fuse_integer_conv import FuseIntegerConv
from bnncc.passes.grids import Grids, integer_weight
from bnncc.passes.integer_layers import weight_form
from bnncc.passes.pack_bytes import has_wide_pairs, pack_weight
from bnncc.passes.pack_planes import constants, pack_planes
from bnncc.quantizations import InputDoReFa, Pact, WeightDoReFa
from bnncc.runtime.bits import BitLayout, ByteLayout
from bnncc.targets.descriptor import get_target

from ..turns import in_turns

RNG = np.random.default_rng(0)
W = RNG.integers(-3, 4, (4, 8, 3, 3)).astype("float32")
SHAPE = (1, 8, 6, 6)
CHANNELWISE = np.linspace(1, 2, 8, dtype="float32").reshape(8, 1, 1)
WIDER = np.ones((4, 12, 3, 3), "float32")
DEPTHWISE = np.arange(-16, 56).reshape(8, 1, 3, 3).astype("float32")


def number(value):
    return relax.const(np.float32(value))


def dorefa(x, bits=2):
    n = number(2**bits - 1)
    return R_.divide(R_.round(R_.multiply(R_.clip(x, 0.0, 1.0), n)), n)


def affine(x, scale=0.1, zero=3, low=0, high=15):
    q = R_.clip(R_.add(R_.round(R_.multiply(x, number(1 / scale))), number(zero)), low, high)
    return R_.multiply(R_.subtract(q, number(zero)), number(scale))


def pact(x, alpha=6.0, bits=4):
    scale = number((2**bits - 1) / alpha)
    return R_.divide(R_.round(R_.multiply(R_.minimum(R_.maximum(x, number(0)), number(alpha)), scale)), scale)


def sign(x, predicate="not_lt"):
    return call("sign", [x], predicate=predicate)


def bipolar(x, bits=2):
    n = 2**bits - 1
    return R_.subtract(R_.multiply(dorefa(x, bits), number(2)), number(1)) if n else x


# quantizer → (levels, first, every, scale)
GRIDS = {
    "dorefa": (dorefa, 4, 0, 1, 1 / 3),
    "dorefa, 8 bits": (lambda x: dorefa(x, 8), 256, 0, 1, 1 / 255),
    "pact": (pact, 16, 0, 1, 6 / 15),
    "affine": (affine, 16, -3, 1, 0.1),
    "int8": (lambda x: affine(x, 0.02, -5, -128, 127), 256, -123, 1, 0.02),
    "bipolar": (bipolar, 4, -3, 2, 1 / 3),
    "explicit": (lambda x: call("quantize", [x, number(0.03)], first=-7, most=255), 256, -7, 1, 0.03),
    "sign": (sign, 2, -1, 2, 1.0),
    "ternary": (lambda x: sign(x, "ternary"), 3, -1, 1, 1.0),
    "max pool": (lambda x: R_.nn.max_pool2d(dorefa(x), 2, 2), 4, 0, 1, 1 / 3),
    "relu of affine": (lambda x: R_.nn.relu(affine(x)), None, 0, 1, 0.1),
    "a sigmoid": (lambda x: R_.divide(R_.round(R_.multiply(R_.sigmoid(x), number(7))), number(7)), 8, 0, 1, 1 / 7),
}  # fmt: skip


def grid_of(module):
    bindings = module["main"].body.blocks[0].bindings
    definition = {b.var: b.value for b in bindings}
    return Grids(definition).of(bindings[-1].var)


@pytest.mark.parametrize("name", GRIDS)
def test_grid(name, function):
    body, levels, first, every, scale = GRIDS[name]
    grid = grid_of(function(SHAPE, body))
    if levels is None:  # values that coincide are no grid
        assert grid is None
        return
    assert (len(grid.values), grid.first, grid.every) == (levels, first, every)
    assert grid.scale == pytest.approx(scale, rel=1e-6)
    expected = grid.scale * (grid.first + grid.every * np.arange(levels))
    np.testing.assert_allclose(grid.values, expected, rtol=1e-6, atol=1e-7)


NO_GRIDS = {
    "no quantizer": lambda x: R_.clip(x, 0.0, 1.0),
    "no bounds": lambda x: R_.round(x),
    "more than 8 bits": lambda x: dorefa(x, 9),
    "a scale per channel": lambda x: R_.multiply(R_.round(R_.clip(x, 0.0, 3.0)), relax.const(CHANNELWISE)),
    "a sum of two": lambda x: R_.add(dorefa(x), dorefa(x, 3)),
    "uneven steps": lambda x: R_.tanh(R_.round(R_.clip(x, 0.0, 3.0))),
    "0 off the grid": lambda x: R_.add(R_.round(R_.clip(x, 0.0, 3.0)), number(0.3)),
    "an average pool": lambda x: R_.nn.avg_pool2d(dorefa(x), 2),
}  # fmt: skip


@pytest.mark.parametrize("name", NO_GRIDS)
def test_no_grid(name, function):
    assert grid_of(function(SHAPE, NO_GRIDS[name])) is None


@pytest.mark.parametrize("scale", [1.0, 0.37, 2.0**-7])
@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("odd", [True, False])
def test_integers_of_a_weight(scale, bits, odd):
    integers = _random_weight(bits, odd, (4, 8, 3, 3))
    found, scales = integer_weight((integers * np.float32(scale)).astype("float32"), 15)
    # A common factor belongs to the scale.
    np.testing.assert_allclose(found * scales.reshape(-1, 1, 1, 1), integers * scale, rtol=1e-6)
    assert np.abs(found).max() <= np.abs(integers).max()


def test_integers_of_a_weight_with_a_scale_per_output():
    integers = _random_weight(3, False, (4, 8, 3, 3))
    scales = np.array([0.1, 0.2, 0.7, 3.0]).reshape(-1, 1, 1, 1)
    found, scale = integer_weight((integers * scales).astype("float32"), 15)
    np.testing.assert_array_equal(found, integers)
    np.testing.assert_allclose(scale, scales.reshape(-1), rtol=1e-6)
    assert integer_weight(RNG.normal(size=(4, 8, 3, 3)).astype("float32"), 15) is None
    assert integer_weight(np.full((4, 8), np.nan, "float32"), 15) is None


def _random_weight(bits, odd, shape):
    if odd:
        weight = 2 * RNG.integers(0, 2**bits, shape) - (2**bits - 1)
    else:
        weight = RNG.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), shape)
    return weight.astype("int64")


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("odd", [True, False])
@pytest.mark.parametrize("planes", [1, 2, 8])
def test_what_the_planes_mean(bits, odd, planes):
    """base + factor · S is the integer product, in NumPy, from the packed words themselves."""
    layout = BitLayout.for_target(37, 1, 32, 16)
    weight = _random_weight(bits, odd, (5, 37, 1, 1))
    form, weight_planes = weight_form(weight)
    assert form == ("xor" if odd else "and-") and weight_planes == bits
    words = pack_planes(weight, form, weight_planes, 1, layout, 8)[0, 0, 0, 0]  # [Q, K, OL]
    levels = RNG.integers(0, 2**planes, 37)
    a = np.stack([layout.pack((levels >> p & 1).astype(bool)) for p in range(planes)])  # [P, K]
    total = np.zeros(8, "int64")
    for p in range(planes):
        for q in range(weight_planes):
            pair = a[p][:, None] ^ words[q] if form == "xor" else a[p][:, None] & words[q]
            counts = np.unpackbits(pair.view(np.uint8).reshape(pair.shape[0], 8, -1), axis=-1).sum(axis=(0, 2))
            total += counts.astype("int64") * 2 ** (p + q) * (-1 if form == "and-" and q == weight_planes - 1 else 1)
    for first, every in ((0, 1), (-3, 1), (1 - 2**planes, 2)):
        base, factor = constants(weight, form, weight_planes, planes, first, every)
        expected = (first + every * levels) @ weight.reshape(5, 37).T
        np.testing.assert_array_equal(base + factor * total[:5], expected)


@pytest.mark.parametrize(
    ("low", "high", "parts"), [(-128, 127, 1), (-7, 7, 1), (-255, 0, 2), (-3, 252, 2), (0, 255, 3)]
)
@pytest.mark.parametrize("offset", [0, 128])
def test_what_the_bytes_mean(low, high, parts, offset):
    """Groups are filled to words with zeros, and a weight is the sum of its parts."""
    weight = RNG.integers(low, high + 1, (6, 5, 2, 3))
    weight.flat[:2] = low, high
    layout = ByteLayout(10, 2, offset)
    packed = pack_weight(weight, 2, layout, 4)  # [G, OB, KH, KW, R·K, OL, 4]
    assert packed.shape == (2, 1, 2, 3, 2 * parts, 4, 4) and packed.dtype == np.int8
    rows = packed.astype("int64").reshape(2, 2, 3, parts, 2, 4, 4).sum(axis=3)  # [G, KH, KW, K, OL, 4]
    rows = rows.transpose(0, 4, 3, 5, 1, 2).reshape(2, 4, 8, 2, 3)  # [G, OL, 4K, KH, KW]
    np.testing.assert_array_equal(rows[:, :3, :5].reshape(6, 5, 2, 3), weight)
    assert not rows[:, 3].any() and not rows[:, :, 5:].any()
    levels = RNG.integers(0, 256, (3, 10))
    stored = layout.pack(levels)
    assert stored.dtype == layout.dtype and stored.shape == (3, 16)
    np.testing.assert_array_equal(layout.unpack(stored), levels)


def test_wide_pairs():
    weight = np.zeros((1, 8, 1, 1), "int64")
    weight[0, 1:3] = -128  # neighbours, but of two pairs
    assert not has_wide_pairs(pack_weight(weight, 1, ByteLayout(8, 1, 128), 4))
    weight[0, 3] = -128
    assert has_wide_pairs(pack_weight(weight, 1, ByteLayout(8, 1, 128), 4))


# The pass


def conv(x, weight=W, **attrs):
    return R_.nn.conv2d(x, relax.const(weight), **attrs)


def _find(bindings, name):
    return next(b.value for b in bindings if op_name(b.value) == f"bnncc.{name}")


def test_convolution(function, apply):
    fused = apply(FuseIntegerConv, function(SHAPE, lambda x: conv(dorefa(x), W * np.float32(0.1), padding=1)))
    bindings = fused["main"].body.blocks[0].bindings
    conv_, scaled = (_find(bindings, name) for name in ("integer_conv2d", "rescale"))
    np.testing.assert_array_equal(conv_.args[1].value.numpy(), W)
    np.testing.assert_allclose(scaled.args[1].value.numpy().reshape(-1), 0.1 / 3, rtol=1e-6)
    a = attributes(conv_)
    assert (a["padding"], a["pad_steps"], a["first"], a["every"]) == ((1, 1, 1, 1), 0, 0, 1)


def test_padding_is_counted_in_steps(function, apply):
    pad = lambda x: R_.nn.pad(x, [0, 0, 0, 0, 1, 1, 1, 1], pad_value=-1.0)  # noqa: E731
    fused = apply(FuseIntegerConv, function(SHAPE, lambda x: conv(pad(dorefa(x)))))
    conv_ = _find(fused["main"].body.blocks[0].bindings, "integer_conv2d")
    assert attributes(conv_)["pad_steps"] == -3 and attributes(conv_)["padding"] == (1, 1, 1, 1)


def test_scales_that_are_powers_of_two_stay_exact(function, apply, calls):
    plain = apply(FuseIntegerConv, function(SHAPE, lambda x: conv(R_.round(R_.clip(x, 0.0, 3.0)))))
    assert calls(plain)[-1] == "bnncc.integer_conv2d"
    halves = apply(FuseIntegerConv, function(SHAPE, lambda x: conv(affine(x, 0.5), W / 4)))
    assert calls(halves)[-1] == "multiply"


DECLINED = {
    "an input on no grid": lambda x: conv(x),
    "9 bits": lambda x: conv(dorefa(x, 9)),
    "a float weight": lambda x: conv(dorefa(x), W + RNG.normal(size=W.shape).astype("float32")),
    "a weight of 9 bits": lambda x: conv(dorefa(x), RNG.integers(-256, 257, W.shape).astype("float32")),
    "5 bits in small groups": lambda x: conv(dorefa(x), DEPTHWISE, groups=8),
    "padding off the grid": lambda x: conv(R_.nn.pad(dorefa(x), [0, 0, 0, 0, 1, 1, 1, 1], pad_value=0.4)),
    "padding by reflection": lambda x: conv(R_.nn.pad(dorefa(x), [0, 0, 0, 0, 1, 1, 1, 1], pad_mode="reflect")),
    "padding of channels": lambda x: conv(R_.nn.pad(dorefa(x), [0, 0, 2, 2, 0, 0, 0, 0]), WIDER),
    "padding twice": lambda x: conv(R_.nn.pad(dorefa(x), [0, 0, 0, 0, 1, 1, 1, 1], pad_value=1.0), padding=1),
    "a weight that is no constant": lambda x: R_.nn.conv2d(dorefa(x), R_.reshape(x, SHAPE)),
}  # fmt: skip


@pytest.mark.parametrize("name", DECLINED)
def test_do_not_fuse(name, function, check_unchanged, reasons):
    check_unchanged(FuseIntegerConv, function(SHAPE, DECLINED[name]))
    assert "FuseIntegerConv:" in reasons()[-1] and "stays float" in reasons()[-1]


@pytest.mark.parametrize(("value", "fused"), [(0.0, True), (1.0, True), (np.float32(1 / 3), False), (-1.0, False)])
def test_a_depth_is_padded_with_whole_values_only(value, fused, function, apply, calls):
    """The slices that a window gathers are filled with a whole number."""
    pad = lambda x: R_.nn.pad(x, [0, 0, 0, 0, 1, 1, 0, 0, 0, 0], pad_value=float(value))  # noqa: E731
    weight = relax.const(RNG.integers(-3, 4, (4, 8, 3, 1, 1)).astype("float32"))
    mod = function((1, 8, 4, 3, 3), lambda x: R_.nn.conv3d(pad(dorefa(x)), weight))
    assert ("bnncc.integer_conv3d" in calls(apply(FuseIntegerConv, mod))) is fused


def test_zeros_twice_are_one_padding(function, apply):
    pad = lambda x: R_.nn.pad(x, [0, 0, 0, 0, 0, 1, 0, 1])  # noqa: E731
    fused = apply(FuseIntegerConv, function(SHAPE, lambda x: conv(pad(dorefa(x)), padding=1)))
    assert attributes(_find(fused["main"].body.blocks[0].bindings, "integer_conv2d"))["padding"] == (1, 1, 2, 2)


# Numbers, on this machine's kernels: networks of parallel branches, one compilation each


class _Branches(nn.Module):
    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, *inputs):
        return tuple(b(inputs[b.index]) for b in self.branches)


class _Integers(nn.Module):
    """Integers clipped to [low, high] times integer weights: eager's float sum is exact."""

    def __init__(self, index, weight, low, high, **options):
        super().__init__()
        self.index, self.low, self.high, self.options = index, low, high, options
        self.weight = nn.Parameter(torch.from_numpy(weight.astype("float32")))

    def forward(self, x):
        q = torch.clamp(torch.round(x), self.low, self.high)
        function = {2: F.linear, 3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[self.weight.ndim]
        return function(q, self.weight, **self.options)


CHANNELS = (1, 7, 8, 31, 33, 64, 65)

#: Kind of arithmetic → the pairs of bit planes up to which a target would choose bits.
KINDS = {"bitserial": 64, "integer": 0}


@pytest.mark.parametrize(("target", "weight_bits", "kind"), in_turns(("native", "x86-64-v3"), (1, 2, 3, 4), KINDS))
def test_integers_are_exact(target, weight_bits, kind):
    inputs = [torch.from_numpy(RNG.normal(0, 90, (2, c, 4, 5)).astype("float32")) for c in CHANNELS]
    branches = []
    for bits in range(1, 9):
        odd = (bits + weight_bits + (target == "native")) % 2 == 0  # each form on one of the two
        index = (bits + 3 * odd + weight_bits) % len(CHANNELS)
        low = (0, -3, -(2 ** (bits - 1)))[(bits + weight_bits) % 3]
        weight = _random_weight(weight_bits, odd, (5 + bits, CHANNELS[index], 3, 3))
        branches.append(_Integers(index, weight, low, low + 2**bits - 1, padding=1))
    _check_exact(branches, inputs, target, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_shapes_are_exact(kind):
    groups = _random_weight(2, True, (12, 8, 3, 3))
    cases = [
        ((2, 24, 9, 7), groups, {"groups": 3, "stride": 2}),
        ((2, 24, 9, 7), groups, {"groups": 3, "dilation": (2, 1), "padding": (0, 2)}),
        ((2, 24, 11), _random_weight(3, False, (6, 24, 3)), {"padding": 2, "stride": 2}),
        ((1, 6, 4, 5, 5), _random_weight(2, False, (4, 6, 3, 3, 3)), {"padding": 1}),
        ((1, 6, 4, 5, 5), _random_weight(2, True, (4, 3, 2, 3, 3)), {"groups": 2, "stride": (2, 1, 1)}),
        ((3, 70), _random_weight(4, False, (10, 70)), {}),
    ]
    branches = [_Integers(i, weight, -1, 6, **options) for i, (_, weight, options) in enumerate(cases)]
    inputs = [torch.from_numpy(RNG.normal(0, 4, shape).astype("float32")) for shape, _, _ in cases]
    _check_exact(branches, inputs, "native", kind)


def _check_exact(branches, inputs, target, kind):
    network = _Branches(branches).eval()
    artifact = bnncc.compile(network, tuple(inputs), replace(get_target(target), most_plane_pairs=KINDS[kind]))
    assert [layer["op"].split()[0] for layer in artifact.manifest["versions"][0]["layers"]] == [kind] * len(branches)
    assert all(step["exact"] for step in artifact.manifest["versions"][0]["steps"])
    results = artifact.load()(*(x.numpy() for x in inputs))
    for ours, eager in zip(results, network(*inputs), strict=True):
        np.testing.assert_array_equal(ours, eager.detach().numpy())


def test_layers():
    """Layers as they are trained: values of the parity check are levels of the planes, exact alone."""
    torch.manual_seed(0)
    options = {"kernel_size": 3, "padding": 1}
    network = nn.Sequential(
        QConv2d(8, 16, **options, input_quantization=InputDoReFa(2), weight_quantization=WeightDoReFa(1)),
        nn.BatchNorm2d(16),
        QConv2d(16, 16, **options, input_quantization=Pact(4), weight_quantization=WeightDoReFa(2), pad_value=0),
        nn.BatchNorm2d(16),
        QConv2d(16, 8, **options, input_quantization="sign", weight_quantization=WeightDoReFa(3)),
        nn.Flatten(),
        QLinear(8 * 36, 5, input_quantization=InputDoReFa(8), weight_quantization=WeightDoReFa(4)),
    ).eval()
    x = torch.rand(2, 8, 6, 6)
    artifact = bnncc.compile(network, (x,))
    widths = [(row["activation_bits"], row["weight_bits"]) for row in artifact.manifest["versions"][0]["layers"]]
    assert widths == [(2, 1), (4, 2), (1, 3), (8, 4)]
    report = bnncc.validate(artifact, network, [(torch.rand(2, 8, 6, 6),) for _ in range(3)])
    assert report.ok, report.problems
    assert report.quantized.elements
