"""Values and gradients of the quantizations: against bitorch itself, and against tables written by hand."""

import argparse
import copy
import pickle

import bitorch.layers
import bitorch.quantizations
import pytest
import torch
from torch import nn

from bnncc import quantizations
from bnncc.layers.config import config as layer_config
from bnncc.quantizations import (
    STE,
    ApproxSign,
    Identity,
    InputDoReFa,
    Pact,
    ProgressiveSign,
    Quantization,
    Sign,
    SteHeaviside,
    SwishSign,
    WeightDoReFa,
    as_quantization,
    quantization_from_name,
    quantization_names,
    register_custom_quantization,
)
from bnncc.quantizations.progressive_sign import config as progressive_config
from bnncc.runtime.errors import BnnccError

INFINITY, NAN = float("inf"), float("nan")
SPECIAL = [-INFINITY, -2.0, -1.0, -0.25, -1e-30, -0.0, 0.0, 1e-30, 0.25, 1.0, 2.0, INFINITY, NAN]
SIGN = [-1.0] * 5 + [1.0] * 8
STEP = [-1.0] * 7 + [1.0] * 5 + [-1.0]

NAMES = ["sign", "approxsign", "swishsign", "progressive_sign", "steheaviside"]
NAMES += ["inputdorefa", "weightdorefa", "identity"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("quantization", "expected"),
    [
        (Sign(), SIGN),
        (ApproxSign(), SIGN),
        (SwishSign(), SIGN),
        (ProgressiveSign().eval(), SIGN),
        (SteHeaviside(), STEP),
        (Identity(), SPECIAL),
        (InputDoReFa(), [0.0] * 9 + [1.0] * 3 + [NAN]),
        (InputDoReFa(2), [0.0] * 8 + [1 / 3, 1.0, 1.0, 1.0, NAN]),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_at_zeros_infinities_and_nan(quantization, expected, dtype):
    x = torch.tensor(SPECIAL, dtype=dtype)
    result = quantization(x)
    assert result.dtype == dtype
    torch.testing.assert_close(result, torch.tensor(expected, dtype=dtype), rtol=0, atol=0, equal_nan=True)


def test_dorefa_rounds_half_to_even():
    assert InputDoReFa(1)(torch.tensor([0.5, 0.50001])).tolist() == [0.0, 1.0]
    assert WeightDoReFa(1)(torch.tensor([1.0, 0.0, 1e-9, 0.1])).tolist() == [1.0, -1.0, -1.0, 1.0]


def values_and_gradients(quantization, values, dtype=torch.float32):
    """Of a sum weighted by 1, 2, 3 …, so that no two gradients are mistaken for each other."""
    x = torch.tensor(values, dtype=dtype, requires_grad=True)
    y = quantization(x)
    y.backward(torch.arange(1.0, 1.0 + len(values)))
    return y.detach(), x.grad


# The test vectors of bitorch 0.4.1 (tests/quantizations/test_quantizations.py): inputs, values, gradient factors.
SEVEN = [-1.5, -1.0, -0.3, 0.0, 0.3, 1.0, 1.5]
NINE = [-1.5, -1.0, -0.3, -0.1, 0.0, 0.1, 0.3, 1.0, 1.5]
STEP_AT_ZERO = [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0]
VECTORS = [
    (Sign(), 1, SEVEN, STEP_AT_ZERO, [1.0] * 7),
    (ProgressiveSign(), 1, SEVEN, [-1.0, -1.0, -0.3, 0.0, 0.3, 1.0, 1.0], [1.0] * 7),
    (
        ProgressiveSign(use_global_scaling=False, initial_scale=0.05),
        1,
        NINE,
        [-1.0, -1.0, -0.6, -0.2, 0.0, 0.2, 0.6, 1.0, 1.0],
        [1.0] * 9,
    ),
    (
        ProgressiveSign(use_global_scaling=False, initial_scale=0.5),
        1,
        [*NINE[:4], -0.05, 0.0, 0.05, *NINE[5:]],
        [-1.0, -1.0, -1.0, -1.0, -1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0],
        [1.0] * 11,
    ),
    (
        ProgressiveSign(use_global_scaling=False, initial_scale=0.2, custom_transform=lambda x: x),
        1,
        NINE,
        [-1.0, -1.0, -0.375, -0.125, 0.0, 0.125, 0.375, 1.0, 1.0],
        [1.0] * 9,
    ),
    (ApproxSign(), 1, SEVEN, STEP_AT_ZERO, [0.0, 0.0, 1.4, 2.0, 1.4, 0.0, 0.0]),
    (SteHeaviside(), 1, SEVEN, [-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
    (SwishSign(5.0), 1, SEVEN, STEP_AT_ZERO, [-0.03, -0.195, 1.562, 5.0, 1.562, -0.195, -0.03]),
    (InputDoReFa(bits=2), 2, SEVEN, [0.0, 0.0, 0.0, 0.0, 1 / 3, 1.0, 1.0], [1.0] * 7),
    (WeightDoReFa(bits=2), 2, SEVEN, [-1.0, -1.0, -1 / 3, 1 / 3, 1 / 3, 1.0, 1.0], [1.0] * 7),
    (InputDoReFa(bits=1), 1, SEVEN, [0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0], [1.0] * 7),
    (WeightDoReFa(bits=1), 1, SEVEN, [-1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0], [1.0] * 7),
]


@pytest.mark.parametrize(("quantization", "bits", "inputs", "expected", "factors"), VECTORS)
def test_bitorchs_vectors(quantization, bits, inputs, expected, factors):
    assert isinstance(quantization, quantization_from_name(quantization.name))
    assert quantization.bit_width == bits
    with pytest.deprecated_call():
        assert quantization.bitwidth == bits
    x = torch.tensor(inputs, requires_grad=True)
    y = quantization(x)
    # The vectors are rounded to three digits.
    assert torch.allclose(y, torch.tensor(expected), atol=0.001)
    y.backward(x)
    assert torch.allclose(x.grad, x * torch.tensor(factors), atol=0.001)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_equals_bitorch_to_the_bit(name, dtype, training):
    ours, theirs = quantization_from_name(name)(), bitorch.quantizations.quantization_from_name(name)()
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul(1.5).tolist()
    values += [value for value in SPECIAL if abs(value) < INFINITY]
    y, gradient = values_and_gradients(ours.train(training), values, dtype)
    expected, expected_gradient = values_and_gradients(theirs.train(training), values, dtype)
    assert torch.equal(y, expected.to(dtype))
    assert torch.equal(gradient, expected_gradient)
    assert ours.bit_width == theirs.bit_width


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("kind", ["InputDoReFa", "WeightDoReFa"])
def test_dorefa_equals_bitorch_at_every_width(kind, bits):
    values = torch.linspace(-1.5, 1.5, 1001).tolist()
    ours, theirs = (getattr(module, kind)(bits) for module in (quantizations, bitorch.quantizations))
    for mine, other in zip(values_and_gradients(ours, values), values_and_gradients(theirs, values), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0, 10.0, 1 / 3])
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_pact_equals_bitorch_in_values_and_both_gradients(bits, alpha):
    values = [*torch.linspace(-1.5, 12.0, 2001).tolist(), alpha, 0.0, -0.0, INFINITY, -INFINITY]
    ours, theirs = Pact(bits), bitorch.layers.Pact(bits)
    for pact in (ours, theirs):
        nn.init.constant_(pact.alpha, alpha)
    for mine, other in zip(values_and_gradients(ours, values), values_and_gradients(theirs, values), strict=True):
        assert torch.equal(mine, other)
    assert torch.equal(ours.alpha.grad, theirs.alpha.grad)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_bitorchs_pact_formula(alpha):
    pact = Pact(bits=2)
    pact.alpha = nn.Parameter(torch.tensor(alpha))
    x = torch.rand(100, requires_grad=True)
    y = pact(x)
    scale = 3.0 / alpha
    assert torch.equal(y, torch.round(torch.clamp(x, min=0, max=alpha) * scale) / scale)
    y.backward(x)
    assert torch.equal(x.grad, torch.where((x >= 0) & (x <= alpha), x, 0.0))


def test_pact_has_bitorchs_state():
    assert Pact().bits == bitorch.layers.Pact().bits == 4
    assert Pact().state_dict() == bitorch.layers.Pact().state_dict() == {"alpha": torch.tensor(10.0)}
    bitorch.layers.Pact().load_state_dict(Pact().state_dict())


def test_infinite_inputs_receive_no_gradient_from_approxsign():
    # bitorch's 2 − 2|x| times 0 makes this NaN.
    _, gradient = values_and_gradients(ApproxSign(), [INFINITY, -INFINITY])
    assert gradient.tolist() == [0.0, 0.0]


def test_heaviside_keeps_quiet(capsys):
    values_and_gradients(SteHeaviside(), SEVEN)
    assert capsys.readouterr().out == ""


def test_progressive_sign_follows_the_global_scale(monkeypatch):
    layer = ProgressiveSign()
    assert layer(torch.tensor([0.1])).item() == pytest.approx(0.1)
    monkeypatch.setattr(progressive_config, "progressive_sign_scale", 1.0)
    assert layer(torch.tensor([0.1])).item() == 1.0
    assert layer.current_scale == 1.0
    assert ProgressiveSign.default_transform(0.05) == bitorch.quantizations.ProgressiveSign.default_transform(0.05)
    assert layer.eval()(torch.tensor([0.0])).item() == 1.0


def test_an_explicit_zero_is_not_a_missing_argument(monkeypatch):
    monkeypatch.setattr(progressive_config, "progressive_sign_scale", 0.7)
    assert ProgressiveSign(use_global_scaling=False, initial_scale=0.0).scale == 0.0
    assert ProgressiveSign(beta=0).beta == 0
    assert SwishSign(0.0).beta == 0.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: as_quantization("sgin"), "no quantization is called 'sgin'; there are approxsign, .*, weightdorefa"),
        (lambda: as_quantization(1), "not int"),
        (lambda: InputDoReFa(0), "inputdorefa needs a whole number of bits from 1 on, not 0"),
        (lambda: WeightDoReFa(1.5), "weightdorefa .* not 1.5"),
        (lambda: Pact(-1), "pact .* not -1"),
        (lambda: ProgressiveSign(initial_scale=0.5), "pass use_global_scaling=False"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(make, message):
    with pytest.raises(BnnccError, match=message) as caught:
        make()
    assert isinstance(caught.value, ValueError), "code written for bitorch catches a ValueError"
    assert "\n" not in str(caught.value)


def test_names_are_bitorchs_and_read_with_any_underscores():
    assert set(quantization_names()) == {*NAMES, "pact"}
    assert set(bitorch.quantizations.quantization_names()) - {"scheduled_quantizer"} == set(NAMES)
    for written in ("approx_sign", "swish_sign", "ste_heaviside", "input_dorefa", "weight_dorefa", "progressive_sign"):
        assert quantization_from_name(written).name.replace("_", "") == written.replace("_", "")


class Ternary(Quantization):
    name = "ternary-for-this-test"
    bit_width = 2

    class _Function(STE):
        @staticmethod
        def forward(ctx, x):
            return torch.sign(x)

    def quantize(self, x):
        return self._Function.apply(x)


def test_a_custom_quantization_is_found_by_its_name(monkeypatch):
    monkeypatch.setattr(quantizations, "quantizations_by_name", dict(quantizations.quantizations_by_name))
    register_custom_quantization(Ternary)
    y, gradient = values_and_gradients(as_quantization("ternary-for-this-test"), [-3.0, 0.0, 2.0])
    assert (y.tolist(), gradient.tolist()) == ([-1.0, 0.0, 1.0], [1.0, 2.0, 3.0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
@pytest.mark.parametrize("name", [*NAMES, "pact"])
def test_survives_copying(name, duplicate):
    quantization = quantization_from_name(name)()
    x = torch.randn(20)
    assert torch.equal(duplicate(quantization)(x), quantization(x))


@pytest.mark.parametrize(
    ("config", "theirs"),
    [
        (layer_config, bitorch.layers.config.config),
        (quantizations.config.config, bitorch.quantizations.config.config),
        (progressive_config, bitorch.quantizations.progressive_sign.config),
    ],
    ids=lambda config: type(config).__module__,
)
def test_defaults_are_bitorchs(config, theirs):
    assert config.name == theirs.name
    assert config.attributes() == theirs._configurable_attributes
    assert [getattr(config, name) for name in config.attributes()] == [
        getattr(theirs, name) for name in config.attributes()
    ]


def test_defaults_come_from_the_command_line():
    config = type(layer_config)()
    parser = argparse.ArgumentParser()
    config.add_config_arguments(parser)
    arguments = ["--padding-value", "1", "--debug-activated", "--weight-quantization", "weightdorefa", "--pact-bits=3"]
    config.apply_args_to_configuration(parser.parse_args(arguments))
    assert (config.padding_value, config.debug_activated, config.pact_bits) == (1.0, True, 3)
    assert (config.weight_quantization, config.input_quantization) == ("weightdorefa", "sign")
    assert layer_config.padding_value == -1.0


@pytest.mark.parametrize(
    ("config", "name", "value", "read"),
    [
        (quantizations.config.config, "dorefa_bits", 3, lambda: WeightDoReFa().bit_width),
        (quantizations.config.config, "dorefa_bits", 3, lambda: InputDoReFa().bit_width),
        (quantizations.config.config, "beta", 2.0, lambda: SwishSign().beta),
        (layer_config, "pact_bits", 2, lambda: Pact().bits),
        (progressive_config, "progressive_sign_alpha", 3, lambda: ProgressiveSign().alpha),
        (progressive_config, "progressive_sign_beta", 5, lambda: ProgressiveSign().beta),
    ],
)
def test_defaults_are_read_when_a_quantization_is_built(monkeypatch, config, name, value, read):
    before = read()
    monkeypatch.setattr(config, name, value)
    assert read() == value != before
