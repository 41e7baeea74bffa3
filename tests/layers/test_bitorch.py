"""The layers beside those of bitorch itself: values, gradients, state dicts, training."""

import copy
import importlib.util
from pathlib import Path

import bitorch
import bitorch.layers
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bnncc.layers

SIZES = {1: (9,), 2: (7, 8), 3: (5, 6, 7)}


def twins(name, *arguments, **options):
    """The same layer of both packages, each built after the same seed."""
    pair = []
    for package in (bnncc.layers, bitorch.layers):
        torch.manual_seed(0)
        pair.append(getattr(package, name)(*arguments, **options))
    return pair


def everything(layer, x):
    """Outputs, and the gradients of the input and of every parameter, for the same upstream gradient."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    return [y, x.grad, *(parameter.grad for parameter in layer.parameters())]


def assert_same(ours, theirs, x):
    for mine, other in zip(everything(ours, x), everything(theirs, x), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 4, "padding": "same", "input_quantization": "approxsign"},
        {"kernel_size": 3, "stride": 2, "groups": 2, "gradient_cancellation_threshold": 0.5},
        {"kernel_size": 2, "dilation": 2, "padding": "valid", "weight_quantization": "steheaviside"},
        {"kernel_size": 3, "padding": 1, "groups": 4, "pad_value": 1.0, "input_quantization": "swishsign"},
        {"kernel_size": 3, "padding": 1, "input_quantization": "inputdorefa", "weight_quantization": "weightdorefa"},
    ],
    ids=str,
)
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_convolutions(dimensions, options):
    x = torch.randn(2, 4, *SIZES[dimensions], generator=torch.Generator().manual_seed(2))
    assert_same(*twins(f"QConv{dimensions}d", 4, 8, **options), x)
    options = {k: v for k, v in options.items() if k not in ("input_quantization", "gradient_cancellation_threshold")}
    assert_same(*twins(f"QConv{dimensions}d_NoAct", 4, 8, **options), x)


@pytest.mark.parametrize("quantization", ["sign", "approxsign", "swishsign", "progressive_sign", "steheaviside"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(bias, quantization):
    pair = twins("QLinear", 20, 30, bias, input_quantization=quantization, weight_quantization=quantization)
    assert_same(*pair, torch.randn(5, 20))


@pytest.mark.parametrize("inputs", [[0.0, 0.0], [1.0, 0.0], [-1.0, 1.0], [0.3, -0.3], [1e12, -1e12]])
@pytest.mark.parametrize("quantization", ["sign", bnncc.quantizations.Sign()])
def test_the_vectors_of_its_linear_test(inputs, quantization):
    layer = bnncc.layers.QLinear(2, 2, bias=False, weight_quantization=quantization, input_quantization=quantization)
    layer.weight = nn.Parameter(torch.tensor([[0.3, -1.4], [-0.3, 2.6]]))
    a, b = bnncc.layers.QActivation(quantization)(torch.tensor(inputs)).tolist()
    assert layer(torch.tensor(inputs)).tolist() == [a - b, b - a]


@pytest.mark.parametrize("threshold", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(("dimensions", "size"), [(1, (5,)), (2, (5, 5)), (3, (4, 4, 4))])
@pytest.mark.parametrize("suffix", ["", "_NoAct"])
def test_the_formula_of_its_convolution_tests(suffix, dimensions, size, threshold):
    options = {} if suffix else {"input_quantization": "sign", "gradient_cancellation_threshold": threshold}
    layer = getattr(bnncc.layers, f"QConv{dimensions}d{suffix}")(2, 2, kernel_size=3, padding=1, **options)
    inputs = torch.rand(1, 2, *size) * 2 - 1
    values, gradient, *_ = everything(layer, inputs)
    x = inputs.clone().requires_grad_()
    padded = F.pad(x if suffix else layer.activation(x), [1, 1] * dimensions, value=-1.0)
    expected = getattr(F, f"conv{dimensions}d")(padded, layer.weight_quantization(layer.weight))
    expected.backward(torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)))
    assert torch.equal(values, expected)
    assert torch.equal(gradient, x.grad)
    assert torch.equal(padded, layer._apply_padding(x if suffix else layer.activation(x)))


@pytest.mark.parametrize("threshold", [None, 0.5, 2.0])
def test_activation(threshold):
    pair = twins("QActivation", "sign", threshold)
    assert_same(*pair, torch.tensor([-3.0, -1.0, -0.3, 0.0, 0.3, 1.0, 3.0, float("nan"), float("inf")]))


@pytest.mark.parametrize("name", ["QEmbedding", "QEmbeddingBag"])
def test_embeddings(name):
    ours, theirs = twins(name, 12, embedding_dim=6)
    indices = torch.tensor([[0, 3, 11], [5, 5, 2]])
    assert torch.equal(ours(indices), theirs(indices))
    theirs.load_state_dict(ours.state_dict())


def test_every_name_is_there():
    # What runs a layer on bitorch's own engines; bnncc compiles models instead.
    elsewhere = {"CustomImplementationMixin", "convert"}
    assert set(bitorch.layers.__all__) - elsewhere <= set(bnncc.layers.__all__)


def small_model(layers):
    return nn.Sequential(
        layers.QConv2d(4, 8, 3, padding=1, input_quantization="approxsign"),
        nn.BatchNorm2d(8),
        layers.QConv2d_NoAct(8, 8, 3, stride=2),
        layers.Pact(2),
        nn.Flatten(),
        layers.QLinear(8 * 9, 3),
    )


def test_state_dicts_interchange_both_ways():
    ours, theirs = small_model(bnncc.layers), small_model(bitorch.layers)
    x = torch.randn(2, 4, 8, 8)
    assert not torch.equal(ours.eval()(x), theirs.eval()(x))
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))
    others = small_model(bnncc.layers).eval()
    theirs.load_state_dict(others.state_dict())
    assert torch.equal(others(x), theirs(x))
    assert list(ours.state_dict()) == list(theirs.state_dict())


def demo():
    """The module of examples/digits.py; the examples are no package."""
    path = Path(__file__).parents[2] / "examples" / "digits.py"
    spec = importlib.util.spec_from_file_location("digits", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_demo_network_trains_to_the_same_state(monkeypatch):
    digits = demo()
    (images, labels), _ = digits.load_images()
    states = []
    for package in (bnncc.layers, bitorch.layers):
        monkeypatch.setattr(digits, "QConv2d", package.QConv2d)
        monkeypatch.setattr(digits, "QLinear", package.QLinear)
        torch.manual_seed(0)
        model = digits.Digits()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.Adam(model.parameters(), digits.LEARNING_RATE)
        for step in range(10):
            batch = slice(step * digits.BATCH, (step + 1) * digits.BATCH)
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        states.append(model.state_dict())
        assert not any(torch.equal(value, before[name]) for name, value in states[-1].items())
    ours, theirs = states
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_where_it_leaves_its_documentation():
    """Each is a row of the table in docs/layers.md; ours are tested in test_layers.py and test_quantizations.py."""
    theirs, x = bitorch.layers.QConv2d, torch.randn(1, 2, 5, 5)
    torch.manual_seed(0)
    usual = theirs(2, 2, 3, padding=1)(x)
    for ignored in ({"pad_value": 0.0}, {"padding_mode": "reflect"}):
        torch.manual_seed(0)
        assert torch.equal(theirs(2, 2, 3, padding=1, **ignored)(x), usual)
        torch.manual_seed(0)
        assert not torch.equal(bnncc.layers.QConv2d(2, 2, 3, padding=1, **ignored)(x), usual)
    assert bitorch.layers.QActivation("sign", 0.0).gradient_cancellation_threshold == 1.0
    with pytest.raises(AssertionError):
        theirs(2, 2, 3, bias=True)
    with pytest.raises(TypeError):
        theirs(2, 2, 3, 1, 1, 1, 1, False)
    with pytest.raises(RuntimeWarning):
        bitorch.quantizations.ProgressiveSign(initial_scale=0.5)
    assert bitorch.quantizations.SteHeaviside()(x.double()).dtype == torch.float32
    with pytest.raises((RecursionError, AttributeError, KeyError)):
        copy.deepcopy(theirs(2, 2, 3))
