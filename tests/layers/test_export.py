"""The layers as torch.export and the front end see them: plain operators, nothing of training, the canonical sign."""

import pytest
import torch
from torch import nn

import bnncc.layers
from bnncc.dialect.ops import attributes, is_call
from bnncc.frontends.torch import export_model, to_relax
from bnncc.layers import (
    InputGraphicalDebug,
    InputPrintDebug,
    PadModule,
    QActivation,
    QConv2d,
    QLinear,
    ShapePrintDebug,
    WeightPrintDebug,
)
from bnncc.layers.config import config
from bnncc.passes.canonicalize_sign import CanonicalizeSign

SIZES = {1: (9,), 2: (7, 8), 3: (5, 6, 7)}
BINARY = {"sign": "not_lt", "approxsign": "not_lt", "swishsign": "not_lt", "progressive_sign": "not_lt"}
BINARY["steheaviside"] = "gt"
NAMES = [*BINARY, "inputdorefa", "weightdorefa", "identity", "pact"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_clean(program, layer, x):
    """The graph computes what the layer computes, by ATen operators, from parameters alone."""
    assert torch.equal(program.module()(x), layer(x))
    calls = [node for node in program.graph.nodes if node.op not in ("placeholder", "output")]
    assert all(node.op == "call_function" and node.target.namespace == "aten" for node in calls)
    assert set(program.state_dict) == {name for name, _ in layer.named_parameters()}
    assert not program.constants
    assert not program.graph_signature.buffers_to_mutate
    assert len(program.graph_signature.user_outputs) == 1


def quantized_layers():
    for name in NAMES:
        both = {"input_quantization": name, "weight_quantization": name}
        yield f"activation-{name}", QActivation(name), (2, 5)
        yield f"linear-{name}", QLinear(6, 3, **both), (2, 6)
        # What a quantization becomes does not depend on the dimensions; one of two spellings in each will do.
        for dimensions in (1, 2, 3) if name in ("sign", "weightdorefa") else (2,):
            layer = getattr(bnncc.layers, f"QConv{dimensions}d")(4, 6, 3, 2, 1, groups=2, bias=True, **both)
            yield f"conv{dimensions}d-{name}", layer, (2, 4, *SIZES[dimensions])
    for dimensions in (1, 2, 3):
        layer = getattr(bnncc.layers, f"QConv{dimensions}d_NoAct")(4, 6, 3, padding="same", dilation=2)
        yield f"noact{dimensions}d", layer, (2, 4, *SIZES[dimensions])


@pytest.mark.parametrize(("layer", "shape"), [pytest.param(*row, id=name) for name, *row in quantized_layers()])
def test_exports_and_converts(layer, shape):
    x = torch.randn(shape)
    program = export_model(layer.eval(), (x,))
    assert_clean(program, layer, x)
    to_relax(program)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("dimensions", [1, 2, 3])
def test_every_padding_mode_exports(dimensions, mode):
    layer = getattr(bnncc.layers, f"QConv{dimensions}d")(4, 6, 3, padding="same", padding_mode=mode).eval()
    x = torch.randn(2, 4, *SIZES[dimensions])
    assert_clean(export_model(layer, (x,)), layer, x)


def predicates(program):
    """Of the canonical signs in a program, in order."""
    mod = CanonicalizeSign(to_relax(program).mod)
    values = [binding.value for block in mod["main"].body.blocks for binding in block.bindings]
    return [attributes(value)["predicate"] for value in values if is_call(value, "bnncc.sign")]


@pytest.mark.parametrize("name", BINARY)
def test_every_binary_quantization_becomes_the_canonical_sign(name):
    layer = QConv2d(4, 6, 3, padding=1, input_quantization=name, weight_quantization=name).eval()
    assert predicates(export_model(layer, (torch.randn(1, 4, 5, 5),))) == [BINARY[name]] * 2


def test_exports_the_same_with_gradients_on():
    layer = QConv2d(4, 6, 3, padding=1, input_quantization="approxsign").eval()
    x = torch.randn(1, 4, 5, 5)
    program = export_model(torch.export.export(layer, (x,), strict=False))
    assert_clean(program, layer, x)
    assert predicates(program) == ["not_lt", "not_lt"]


def test_debug_layers_vanish(monkeypatch, capsys):
    monkeypatch.setattr(config, "debug_activated", True)
    layers = (InputPrintDebug(1), ShapePrintDebug(1), InputGraphicalDebug(), WeightPrintDebug(QLinear(6, 3), 1))
    x = torch.randn(2, 6)
    programs = [export_model(model.eval(), (x,)) for model in (nn.Sequential(*layers), QLinear(6, 3))]
    assert capsys.readouterr().out == ""
    operators = [[node.target for node in program.graph.nodes if node.op == "call_function"] for program in programs]
    assert operators[0] == operators[1]


def test_pad_module_exports():
    layer, x = PadModule(1, 2, 0, 1, padding_value=-1).eval(), torch.randn(1, 2, 3, 4)
    program = export_model(layer, (x,))
    assert_clean(program, layer, x)
    to_relax(program)
