"""The trainable layers, in one, two and three dimensions: values against torch's own operators, gradients, copies."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bnncc.layers
from bnncc.layers import Pact, PadModule, QActivation, QConv2d, QEmbedding, QEmbeddingBag, QLinear
from bnncc.layers.config import config
from bnncc.quantizations import ApproxSign, InputDoReFa, SteHeaviside, binarize

DIMENSIONS = [1, 2, 3]
SIZES = {1: (9,), 2: (7, 8), 3: (5, 6, 7)}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def layer_class(dimensions, suffix=""):
    return getattr(bnncc.layers, f"QConv{dimensions}d{suffix}")


def convolution(dimensions):
    return getattr(F, f"conv{dimensions}d")


@pytest.mark.parametrize("pad_value", [None, -1.0, 0.0, 1.0, 0.5])
@pytest.mark.parametrize(
    ("arguments", "widths"),
    [
        ({"kernel_size": 3}, (0, 0)),
        ({"kernel_size": 3, "padding": 1}, (1, 1)),
        ({"kernel_size": 3, "padding": 2, "stride": 2, "bias": True}, (2, 2)),
        ({"kernel_size": 4, "padding": "same"}, (1, 2)),
        ({"kernel_size": 3, "padding": "valid", "groups": 2}, (0, 0)),
        ({"kernel_size": 2, "padding": "same", "dilation": 3, "groups": 4}, (1, 2)),
    ],
)
@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_conv_quantizes_then_pads_then_convolves(dimensions, arguments, widths, pad_value):
    layer = layer_class(dimensions)(4, 8, **arguments, pad_value=pad_value)
    x = torch.randn(2, 4, *SIZES[dimensions])
    padded = F.pad(binarize(x), widths * dimensions, value=-1.0 if pad_value is None else pad_value)
    weight = binarize(layer.weight)
    expected = convolution(dimensions)(padded, weight, layer.bias, layer.stride, 0, layer.dilation, layer.groups)
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer(x[0]), layer(x[:1])[0]), "without the batch dimension"


def test_each_dimension_has_its_own_width():
    layer = QConv2d(3, 5, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2))
    x = torch.randn(1, 3, 7, 8)
    padded = F.pad(binarize(x), [1, 1, 2, 2], value=-1.0)
    assert torch.equal(layer(x), F.conv2d(padded, binarize(layer.weight), None, (2, 1), 0, (1, 2)))


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_noact_takes_its_input_as_it_is_and_still_pads_minus_one(dimensions):
    layer = layer_class(dimensions, "_NoAct")(3, 5, 3, padding=1)
    x = torch.randn(1, 3, *SIZES[dimensions])
    padded = F.pad(x, [1, 1] * dimensions, value=-1.0)
    assert torch.equal(layer(x), convolution(dimensions)(padded, binarize(layer.weight)))


@pytest.mark.parametrize("arguments", [{"padding": 2}, {"padding": "same"}, {"padding": 1, "stride": 2, "groups": 3}])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_every_padding_mode_is_honoured(dimensions, mode, arguments):
    layer = layer_class(dimensions)(3, 6, 4, padding_mode=mode, **arguments)
    reference = getattr(nn, f"Conv{dimensions}d")(3, 6, 4, padding_mode=mode, bias=False, **arguments)
    reference.weight = nn.Parameter(binarize(layer.weight))
    x = torch.randn(2, 3, *SIZES[dimensions])
    assert torch.equal(layer(x), reference(binarize(x)))


@pytest.mark.parametrize("dimensions", DIMENSIONS)
def test_conv_has_no_bias_unless_asked(dimensions):
    assert layer_class(dimensions)(3, 5, 3).bias is None
    layer = layer_class(dimensions)(3, 500, 3, bias=True)
    # As nn.Conv's documentation has it: uniform up to √(groups / (C_in · kernel size)).
    bound = 1 / math.sqrt(3 * 3**dimensions)
    assert 0.9 * bound < layer.bias.abs().max() <= bound
    x = torch.randn(1, 3, *SIZES[dimensions])
    assert torch.equal(layer(x), convolution(dimensions)(binarize(x), binarize(layer.weight), layer.bias))


def test_conv_takes_the_positional_arguments_of_torch():
    arguments = (4, 8, 3, 1, 1, 1, 2, True, "reflect", "cpu", torch.float64)
    layer, reference = QConv2d(*arguments), nn.Conv2d(*arguments)
    for name in ("stride", "padding", "dilation", "groups", "padding_mode"):
        assert getattr(layer, name) == getattr(reference, name)
    assert layer.weight.dtype == layer.bias.dtype == torch.float64


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(9,), (5, 9), (2, 3, 9)])
def test_linear(shape, bias):
    layer = QLinear(9, 4, bias)
    x = torch.randn(shape)
    assert torch.equal(layer(x), F.linear(binarize(x), binarize(layer.weight), layer.bias))


@pytest.mark.parametrize(
    "layer",
    [
        QConv2d(2, 2, 1, input_quantization="approx_sign", weight_quantization=SteHeaviside()),
        QLinear(2, 2, input_quantization="approxsign", weight_quantization="steheaviside"),
    ],
    ids=["conv", "linear"],
)
def test_quantizations_are_chosen_by_name_or_module(layer):
    assert isinstance(layer.input_quantization, ApproxSign)
    assert isinstance(layer.weight_quantization, SteHeaviside)
    assert layer.gradient_cancellation_threshold == 1.0


def test_a_quantization_may_have_parameters_and_bits():
    layer = QConv2d(2, 2, 1, input_quantization="pact", weight_quantization=InputDoReFa(3))
    assert set(layer.state_dict()) == {"weight", "activation.activation_function.alpha"}
    nn.init.constant_(layer.input_quantization.alpha, 0.5)
    layer(torch.randn(1, 2, 4, 4)).sum().backward()
    assert layer.input_quantization.alpha.grad.abs() > 0


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(None, [0.0, 1.0, 1.0, 1.0, 0.0]), (0.25, [0.0, 0.0, 1.0, 0.0, 0.0]), (0.0, [1.0] * 5), (0, [1.0] * 5)],
)
def test_gradient_cancellation(threshold, expected):
    x = torch.tensor([-1.5, -1.0, 0.0, 0.5, 1.5], requires_grad=True)
    QActivation(gradient_cancellation_threshold=threshold)(x).sum().backward()
    assert x.grad.tolist() == expected


def test_cancellation_does_not_touch_the_weights():
    layer = QLinear(2, 1, bias=False)
    nn.init.constant_(layer.weight, 7.0)
    layer(torch.tensor([[0.5, -0.5]])).sum().backward()
    assert layer.weight.grad.tolist() == [[1.0, -1.0]]


def test_defaults_are_read_when_a_layer_is_built(monkeypatch):
    before = QConv2d(1, 1, 1)
    monkeypatch.setattr(config, "input_quantization", "steheaviside")
    monkeypatch.setattr(config, "weight_quantization", "weightdorefa")
    monkeypatch.setattr(config, "padding_value", 0.0)
    monkeypatch.setattr(config, "gradient_cancellation_threshold", 0.5)
    for layer in (QConv2d(1, 1, 1), QLinear(1, 1)):
        assert (layer.input_quantization.name, layer.weight_quantization.name) == ("steheaviside", "weightdorefa")
        assert layer.gradient_cancellation_threshold == 0.5
    assert (before.pad_value, QConv2d(1, 1, 1).pad_value) == (-1.0, 0.0)
    assert before.input_quantization.name == "sign"


def test_pad_module():
    x = torch.randn(1, 2, 3, 4)
    assert torch.equal(PadModule(1, 2, 3, 4, padding_value=-1)(x), F.pad(x, (1, 2, 3, 4), value=-1))


def every_layer():
    layers = {"QLinear": (QLinear(6, 3), (2, 6)), "QActivation": (QActivation("approxsign"), (2, 6))}
    layers["Pact"] = (Pact(2), (2, 6))
    layers["PadModule"] = (PadModule(1, 1), (2, 6))
    for dimensions in DIMENSIONS:
        shape = (2, 4, *SIZES[dimensions])
        for suffix in ("", "_NoAct"):
            layers[f"QConv{dimensions}d{suffix}"] = (layer_class(dimensions, suffix)(4, 8, 3, padding=1), shape)
    return layers


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(("layer", "shape"), every_layer().values(), ids=every_layer())
def test_survives_copying(layer, shape, duplicate):
    x = torch.randn(shape)
    twin = duplicate(layer)
    assert torch.equal(twin(x), layer(x))
    assert repr(twin) == repr(layer)
    for parameter, other in zip(twin.parameters(), layer.parameters(), strict=True):
        assert torch.equal(parameter, other) and parameter is not other


def test_a_state_dict_holds_parameters_only():
    assert list(QConv2d(4, 8, 3).state_dict()) == ["weight"]
    assert list(QConv2d(4, 8, 3, bias=True).state_dict()) == ["weight", "bias"]
    assert list(QLinear(4, 8).state_dict()) == ["weight", "bias"]


def test_embeddings():
    table, indices = QEmbedding(10, 5), torch.tensor([[1, 2], [3, 1]])
    assert torch.equal(table(indices), binarize(table.weight)[indices])
    bags = QEmbeddingBag(10, embedding_dim=5, mode="sum", output_quantization="identity")
    assert torch.equal(bags(indices), binarize(bags.weight)[indices].sum(1))
