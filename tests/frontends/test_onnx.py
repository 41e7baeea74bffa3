"""ONNX models as a whole: names, shapes, constants, what is compiled and validated, what cannot be and what is said."""

import logging

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

import bnncc
from bnncc.cli import run
from bnncc.frontends.imported import ORIGINS_ATTR
from bnncc.frontends.onnx import supported_operators, to_relax
from bnncc.frontends.onnx_graph import prepare
from bnncc.layers import QConv2d, QLinear
from bnncc.onnx_reference import OnnxReference
from bnncc.runtime.errors import BnnccError

from .onnx_models import QONNX, model, node, shaped


def numbers(seed):
    return np.random.default_rng(seed)


def batch_norm(weights, name, channels, generator):
    """Adds the statistics of a batch norm to `weights`; returns their names as one string."""
    parts = {
        "gamma": generator.standard_normal(channels),
        "beta": generator.standard_normal(channels),
        "mean": generator.standard_normal(channels) * 3,
        "var": generator.random(channels) * 20 + 0.5,
    }
    weights.update({f"{name}.{part}": value.astype("float32") for part, value in parts.items()})
    return " ".join(f"{name}.{part}" for part in parts)


def binarised(name, source, target):
    """sign with sign(0) = 1, as larq and bitorch export it."""
    return [
        node("Sign", source, f"{name}/sign", name=f"{name}/Sign"),
        node("Equal", f"{name}/sign zero", f"{name}/is_zero", name=f"{name}/Equal"),
        node("Where", f"{name}/is_zero one {name}/sign", target, name=f"{name}/Where"),
    ]


def residual_bnn():
    """Float stem, two binary blocks with shortcuts (padded −1 and 0), a ternary one, pooling, a binary linear layer."""
    generator = numbers(0)
    weights = {
        "zero": np.float32(0), "one": np.float32(1), "minus_one": np.float32(-1),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "stem.weight": generator.standard_normal((16, 3, 3, 3)).astype("float32"),
        "stem.bias": generator.standard_normal(16).astype("float32"),
        "head.weight": generator.standard_normal((10, 32)).astype("float32"),
        "head.bias": generator.standard_normal(10).astype("float32"),
        "w1": np.sign(generator.standard_normal((16, 16, 3, 3))).astype("float32"),
        "w2": generator.standard_normal((16, 16, 3, 3)).astype("float32"),
        "w3": np.sign(generator.standard_normal((24, 16, 3, 3))).astype("float32"),
        "w4": np.sign(generator.standard_normal((20, 24, 2, 2))).astype("float32"),
        "w5": np.sign(generator.standard_normal((32, 20))).astype("float32"),
    }  # fmt: skip
    bn = [batch_norm(weights, f"bn{i}", c, generator) for i, c in enumerate((16, 16, 16, 24, 20, 32))]
    nodes = [
        node("Conv", "input stem.weight stem.bias", "stem", name="/stem/Conv", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("BatchNormalization", f"stem {bn[0]}", "x0", name="/stem/BatchNormalization"),
        *binarised("/block1", "x0", "b1"),
        node("Pad", "b1 pads minus_one", "p1", name="/block1/Pad"),
        node("Conv", "p1 w1", "c1", name="/block1/Conv"),
        node("BatchNormalization", f"c1 {bn[1]}", "n1", name="/block1/BatchNormalization"),
        node("Add", "n1 x0", "x1", name="/block1/Add"),
        *binarised("/block2", "x1", "b2"),
        *binarised("/block2/weight", "w2", "w2_signs"),
        node("Conv", "b2 w2_signs", "c2", name="/block2/Conv", pads=[1, 1, 1, 1]),
        node("BatchNormalization", f"c2 {bn[2]}", "n2", name="/block2/BatchNormalization"),
        node("PRelu", "n2 slope", "a2", name="/block2/PRelu"),
        node("Add", "a2 x1", "x2", name="/block2/Add"),
        node("Relu", "x2", "r2", name="/block3/Relu"),
        node("Sign", "r2", "b3", name="/block3/Sign"),
        node("Conv", "b3 w3", "c3", name="/block3/Conv", strides=[2, 2]),
        node("BatchNormalization", f"c3 {bn[3]}", "n3", name="/block3/BatchNormalization"),
        *binarised("/block4", "n3", "b4"),
        node("MaxPool", "b4", "m4", name="/block4/MaxPool", kernel_shape=[2, 2]),
        node("Conv", "m4 w4", "c4", name="/block4/Conv", dilations=[1, 1]),
        node("BatchNormalization", f"c4 {bn[4]}", "n4", name="/block4/BatchNormalization"),
        *binarised("/block5", "n4", "b5"),
        node("Flatten", "b5", "f5", name="/block5/Flatten"),
        node("Gemm", "f5 w5", "g5", name="/block5/Gemm", transB=1),
        node("BatchNormalization", f"g5 {bn[5]}", "n5", name="/block5/BatchNormalization"),
        node("Gemm", "n5 head.weight head.bias", "output", name="/head/Gemm", transB=1),
    ]
    weights["slope"] = generator.standard_normal((16, 1, 1)).astype("float32")
    return model(nodes, {"input": ["N", 3, 16, 16]}, weights, ["output"])


@pytest.fixture(scope="module")
def network():
    return residual_bnn()


@pytest.fixture(scope="module")
def images():
    return numbers(1).standard_normal((6, 3, 16, 16)).astype("float32")


def test_a_residual_network_is_exact(network, images, tmp_path):
    path = tmp_path / "network.onnx"
    onnx.save(network, path)
    artifact = bnncc.compile(path)
    report = bnncc.validate(artifact, path, [images])
    assert report.ok, report.problems
    binary = [step for step in report.steps if "xnor" in step.op or "threshold" in step.op]
    assert len(binary) >= 5 and all(step.exact for step in binary)
    # Only the stem and the head sum floats.
    inexact = {layer for step in report.steps if not step.exact for layer in step.layers}
    assert inexact == {"/stem/Conv", "/stem/BatchNormalization", "/block1/Where", "/head/Gemm"}
    layers = {layer["path"]: layer["op"] for layer in artifact.manifest["versions"][0]["layers"]}
    assert layers == {
        "/stem/Conv": "conv2d", "/block1/Conv": "binary conv2d", "/block2/Conv": "binary conv2d",
        "/block3/Conv": "binary conv2d", "/block4/Conv": "binary conv2d", "/block5/Gemm": "binary linear",
        "/head/Gemm": "linear",
    }  # fmt: skip


def test_another_batch(network, images):
    session = bnncc.compile(network, [torch.zeros(3, 3, 16, 16)]).load()
    assert session.inputs[0]["shape"] == [3, 3, 16, 16]
    expected = OnnxReference(network, [(3, 3, 16, 16)]).outputs([images[:3]])[0]
    # The float stem and head sum in another order than ONNX Runtime.
    np.testing.assert_allclose(session(images[:3]), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_what_pytorch_exports_compiles(tmp_path):
    """The exporter's spelling: signs of weights as nodes, shapes computed for flatten, module paths as node names."""
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 8, 3), QConv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.PReLU(16), nn.MaxPool2d(2),
        QConv2d(16, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Flatten(), QLinear(8 * 9, 5, bias=False),
    ]  # fmt: skip
    path, x = str(tmp_path / "net.onnx"), torch.randn(2, 3, 8, 8)
    network = nn.Sequential(*layers).eval()
    torch.onnx.export(network, (x,), path, input_names=["x"], dynamo=False, dynamic_axes={"x": {0: "batch"}})
    artifact = bnncc.compile(path)
    report = bnncc.validate(artifact, path, [x])
    assert report.ok, report.problems
    found = {layer["path"]: layer["op"] for layer in artifact.manifest["versions"][0]["layers"]}
    assert found == {
        "/0/Conv": "conv2d", "/1/Conv": "binary conv2d", "/5/Conv": "binary conv2d", "/8/MatMul": "binary linear"
    }  # fmt: skip


def qonnx_bnn(scale):
    """8-bit stem, BipolarQuant activations and weights with a scale, 2-bit Quant behind them, as Brevitas exports."""
    generator = numbers(2)
    weights = {
        "one": np.float32(1), "zero": np.float32(0), "two": np.float32(2), "eight": np.float32(8),
        "scale": np.float32(scale), "step": np.float32(0.125), "wide": np.float32(0.5),
        "stem.weight": generator.standard_normal((16, 3, 3, 3)).astype("float32"),
        "w1": generator.standard_normal((16, 16, 3, 3)).astype("float32"),
        "w2": generator.standard_normal((24, 16, 3, 3)).astype("float32"),
        "w3": generator.standard_normal((10, 24)).astype("float32"),
    }  # fmt: skip
    bn = [batch_norm(weights, f"bn{i}", c, generator) for i, c in enumerate((16, 16, 24))]

    def quant(kind, inputs, output, **attributes):
        return node(kind, inputs, output, name=f"{output}_{kind}", domain=QONNX, **attributes)

    eight = {"signed": 1, "narrow": 1, "rounding_mode": "ROUND"}
    two = {"signed": 0, "narrow": 0, "rounding_mode": "ROUND"}
    nodes = [
        quant("Quant", "input step zero eight", "q0", **eight),
        quant("Quant", "stem.weight step zero eight", "stem.q", **eight),
        node("Conv", "q0 stem.q", "c0", name="stem", pads=[1, 1, 1, 1]),
        node("BatchNormalization", f"c0 {bn[0]}", "n0", name="bn0"),
        quant("BipolarQuant", "n0 scale", "b0"),
        quant("BipolarQuant", "w1 one", "w1.q"),
        node("Conv", "b0 w1.q", "c1", name="conv1", pads=[1, 1, 1, 1]),
        node("BatchNormalization", f"c1 {bn[1]}", "n1", name="bn1"),
        node("Relu", "n1", "r1", name="relu1"),
        quant("Quant", "r1 wide zero two", "q1", **two),
        quant("Quant", "w2 wide zero two", "w2.q", signed=1, narrow=1, rounding_mode="ROUND"),
        node("Conv", "q1 w2.q", "c2", name="conv2", strides=[2, 2]),
        node("BatchNormalization", f"c2 {bn[2]}", "n2", name="bn2"),
        node("GlobalAveragePool", "n2", "p2", name="pool"),
        quant("Trunc", "p2 step zero eight two", "t2", rounding_mode="FLOOR"),
        node("Flatten", "t2", "f2", name="flatten"),
        quant("BipolarQuant", "w3 scale", "w3.q"),
        node("Gemm", "f2 w3.q", "output", name="head", transB=1),
    ]
    return model(nodes, {"input": [1, 3, 9, 9]}, weights, ["output"], name="qonnx")


@pytest.mark.parametrize("scale", [1.0, 0.25, 0.3])
def test_a_qonnx_network_is_exact(scale, tmp_path):
    network = qonnx_bnn(scale)
    images = numbers(3).standard_normal((4, 3, 9, 9)).astype("float32")
    artifact = bnncc.compile(network)
    report = bnncc.validate(artifact, network, [images])
    assert report.ok, report.problems
    layers = {layer["path"]: layer["op"] for layer in artifact.manifest["versions"][0]["layers"]}
    assert layers["conv1"] == "binary conv2d"
    exact = {layer for step in artifact.manifest["versions"][0]["steps"] if step["exact"] for layer in step["layers"]}
    assert ("conv1" in exact) == (scale != 0.3)  # the reference's own sum of ±0.3 rounds
    assert "conv2" in exact  # two bits by two bits
    # The numbers in this network are multiples of powers of two, so that not even its float layers round.
    if scale != 0.3:
        mismatches = {step.name: step.isolated.mismatches for step in report.steps if "pool" not in step.layers}
        assert not any(mismatches.values()), mismatches


def test_two_bit_activations_are_the_references(tmp_path):
    """A 2-bit Quant on activations and weights, bit for bit, at ties and beyond the range."""
    generator = numbers(4)
    weights = {
        "w": generator.standard_normal((8, 4, 3, 3)).astype("float32"),
        "scale": np.float32(0.5), "wscale": np.float32(0.25), "zero": np.float32(0), "bits": np.float32(2),
    }  # fmt: skip
    attributes = {"domain": QONNX, "narrow": 0, "rounding_mode": "ROUND"}
    network = model(
        [
            node("Quant", "x scale zero bits", "q", name="act", signed=0, **attributes),
            node("Quant", "w wscale zero bits", "wq", signed=1, **attributes),
            node("Conv", "q wq", "y", name="conv", pads=[1, 1, 1, 1]),
        ],
        {"x": [1, 4, 6, 6]}, weights,
    )  # fmt: skip
    x = (generator.integers(-6, 20, (1, 4, 6, 6)) / 8).astype("float32")
    expected = OnnxReference(network).outputs([x])[0]
    np.testing.assert_array_equal(bnncc.compile(network).load()(x), expected)


def test_quantize_and_dequantize_are_onnx_runtimes(tmp_path):
    """An 8-bit network as ONNX Runtime's quantizer writes it: per-tensor activations, per-channel weights."""
    generator = numbers(5)
    weights = {
        "w": generator.integers(-127, 128, (6, 3, 3, 3)).astype("int8"),
        "w.scale": np.exp2(generator.integers(-9, -6, 6)).astype("float32"), "w.zero": np.zeros(6, "int8"),
        "scale": np.float32(2**-5), "zero": np.uint8(117), "out": np.float32(0.043), "out_zero": np.int8(-3),
    }  # fmt: skip
    network = model(
        [
            node("QuantizeLinear", "x scale zero", "xq"),
            node("DequantizeLinear", "xq scale zero", "xd"),
            node("DequantizeLinear", "w w.scale w.zero", "wd", axis=0),
            node("Conv", "xd wd", "c", name="conv"),
            node("Relu", "c", "r"),
            node("QuantizeLinear", "r out out_zero", "rq"),
            node("DequantizeLinear", "rq out out_zero", "y"),
        ],
        {"x": [1, 3, 8, 8]}, weights,
    )  # fmt: skip
    x = (generator.standard_normal((1, 3, 8, 8)) * 2).astype("float32")
    session = bnncc.compile(network).load()
    # Powers of two times small integers: the convolution rounds nothing, so that everything is equal.
    np.testing.assert_array_equal(session(x), OnnxReference(network).outputs([x])[0])


# Names, shapes, constants


def test_variables_are_named_after_values():
    imported = to_relax(shaped())
    assert imported.origins == {
        "in_put": ("in/put", ""),
        "a_Sign_output_0": ("/a/Sign_output_0", "/a/Sign"),
        "a_Sign_output_0_2": ("/a.Sign.output-0", "/a.Sign.output-0"),
        "out_put": ("out put", "/flatten"),
    }
    assert [port.name for port in (*imported.inputs, *imported.outputs)] == ["in_put", "out_put"]
    assert imported.outputs[0].shape == (1, 6)
    table = {str(k): tuple(map(str, v)) for k, v in imported.mod["main"].attrs[ORIGINS_ATTR].items()}
    assert table == imported.origins


def test_an_open_batch_becomes_one_and_says_so(caplog):
    with caplog.at_level(logging.INFO, "bnncc"):
        imported = to_relax(shaped())
    assert imported.inputs[0].shape == (1, 2, 3)
    assert "input 'in/put' is [N, 2, 3]: compiled for [1, 2, 3]" in caplog.text
    assert to_relax(shaped(), [(5, 2, 3)]).outputs[0].shape == (5, 6)


def test_values_are_found_by_their_onnx_names():
    reference = OnnxReference(shaped())
    x = np.array([[[1, -2, 0], [4, 0, -3]]], "float32")
    values = reference.values([x], {"in/put", "/a.Sign.output-0"})
    np.testing.assert_array_equal(values["/a.Sign.output-0"], np.sign(x) / 2)
    np.testing.assert_array_equal(values["in/put"], x)
    with pytest.raises(BnnccError, match="the reference has no value 'conv1', which the artifact holds"):
        reference.values([x], {"conv1"})


def test_constants_are_computed_once_but_weights_keep_their_making():
    """A straight-through scale: the pass that knows it must see it; the mean, which rounds, must not differ."""
    weight = numbers(6).standard_normal((4, 4, 1, 1)).astype("float32")
    nodes = [
        node("Abs", "w", "abs"),
        node("ReduceMean", "abs", "alpha", axes=[1, 2, 3]),
        node("Sign", "w", "s"),
        node("Mul", "s alpha", "ws"),
        node("Conv", "x ws", "y"),
    ]
    prepared = prepare(model(nodes, {"x": [1, 4, 2, 2]}, {"w": weight}))
    assert [n.op_type for n in prepared.model.graph.node] == ["Sign", "Mul", "Conv"]
    np.testing.assert_array_equal(prepared.constants["ws"], np.sign(weight) * prepared.constants["alpha"])


def test_functions_and_old_files_are_read():
    """Model-local functions, and weights listed among the inputs as up to IR version 3."""
    body = helper.make_function(
        "local", "Twice", ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    built = model(
        [node("Twice", "x", "t", domain="local"), node("Mul", "t w", "y")], {"x": [1, 3]}, {"w": np.float32(3)}
    )
    built.opset_import.append(helper.make_opsetid("local", 1))
    built.functions.append(body)
    assert len(to_relax(built).inputs) == 1

    old = model([node("Mul", "x w", "y")], {"x": [1, 3], "w": np.float32([2])}, {"w": np.float32([2])}, opset=9)
    old.ir_version = 3
    imported = to_relax(old)
    assert [port.name for port in imported.inputs] == ["x"]


def test_inputs_and_constants_as_outputs():
    built = model(
        [node("Identity", "x", "same"), node("Add", "w w", "sum"), node("Relu", "x", "y")],
        {"x": [2, 3]}, {"w": np.ones((2, 3), "float32")}, ["same", "sum", "y"],
    )  # fmt: skip
    x = numbers(7).standard_normal((2, 3)).astype("float32")
    found = bnncc.compile(built).load()(x)
    for got, want in zip(found, OnnxReference(built).outputs([x]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_integers_are_compared_as_they_are():
    built = model(
        [node("Equal", "x v", "e"), node("Cast", "e", "y", to=1)], {"x": np.array([1, 2])}, {"v": np.array([1, 3])}
    )
    np.testing.assert_array_equal(bnncc.compile(built).load()(np.array([1, 2])), np.float32([1, 0]))


def test_comparisons_with_a_vector_and_with_themselves():
    """x = x is false for NaN, which a compiler likes to forget."""
    built = model(
        [
            node("Equal", "x v", "e"), node("Where", "e one v", "a"),
            node("Equal", "x x", "s"), node("Where", "s one v", "b"),
        ],
        {"x": [1, 3]}, {"v": np.float32([1, 2, 4]), "one": np.float32(1)}, ["a", "b"],
    )  # fmt: skip
    x = np.float32([[1, np.nan, 3]])
    for got, want in zip(bnncc.compile(built).load()(x), OnnxReference(built).outputs([x]), strict=True):
        np.testing.assert_array_equal(got, want)


def test_the_command_line(network, images, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    onnx.save(network, "net.onnx")
    np.savez("data.npz", images)
    assert run(["compile", "net.onnx", "-o", "net.so"]) == 0
    assert "input 'input' is [N, 3, 16, 16]: compiled for [1, 3, 16, 16]" in capsys.readouterr().err
    assert run(["validate", "net.so", "--reference", "net.onnx", "--data", "data.npz"]) == 0
    capsys.readouterr()
    assert run(["compile", "net.onnx", "-o", "net.so", "--input-shape", "1,3,16,17"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "is [N, 3, 16, 16]: the shape [1, 3, 16, 17] does not fit" in err


def test_supported_operators_are_listed():
    names = supported_operators()
    assert "Conv" in names and f"{QONNX}::BipolarQuant" in names and names == sorted(names)
