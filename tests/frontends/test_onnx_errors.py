"""What is said of an ONNX model that cannot be compiled or validated: one line, with the node."""

import re
import sys

import numpy as np
import pytest
from onnx import TensorProto

import bnncc
from bnncc.frontends.imported import ExportError, UnsupportedOperator
from bnncc.frontends.onnx import to_relax
from bnncc.models import load_model
from bnncc.onnx_reference import OnnxReference
from bnncc.runtime.errors import BnnccError

from .onnx_models import QONNX, model, node, shaped

RELU = [node("Relu", "x", "y")]
ERRORS = {
    "an unknown operator": (
        model([node("NonZero", "x", "i"), node("Cast", "i", "y", to=TensorProto.FLOAT)], {"x": [2, 3]}),
        "cannot compile NonZero (node 'i'): ",
    ),
    "an unknown domain": (
        model([node("MultiThreshold", "x x", "y", name="mt", domain=QONNX)], {"x": [2, 3]}),
        f"cannot compile {QONNX}::MultiThreshold (node 'mt'): ",
    ),
    "a use that is not supported": (
        model(
            [node("Resize", "x - s", "y", name="up", mode="linear")], {"x": [1, 1, 2, 2]}, {"s": np.ones(4, "float32")}
        ),
        "cannot compile Resize (node 'up'): mode 'linear'; supported is nearest",
    ),
    "a setting that is computed": (
        model([node("BatchNormalization", "x s s s s", "y", name="bn")], {"x": [1, 2, 2], "s": [2]}),
        "cannot compile BatchNormalization (node 'bn'): its scale is computed from the model's input",
    ),
    "training": (
        model([node("Dropout", "x r t", "y", name="drop")], {"x": [2]}, {"r": np.float32(0.5), "t": np.array(True)}),
        "cannot compile Dropout (node 'drop'): it is in training mode",
    ),
    "indices of a pool": (
        model([node("MaxPool", "x", "y i", kernel_shape=[2])], {"x": [1, 1, 4]}),
        "cannot compile MaxPool (node 'y'): its output 'Indices' is used",
    ),
    "integers divided": (
        model([node("Div", "x x", "q"), node("Cast", "q", "y", to=1)], {"x": np.array([1])}),
        "cannot compile Div (node 'q'): it divides int64; supported is float32",
    ),
    "half precision": (
        model([node("Cast", "x", "y", to=1)], {"x": np.zeros(2, "float16")}),
        "input 'x' is float16: bnncc compiles float32, bool and integers",
    ),
    "an open image": (model(RELU, {"x": ["N", 3, "H", "W"]}), "input 'x' is [N, 3, H, W]: artifacts have fixed shapes"),
    "an old operator set": (model(RELU, {"x": [1]}, opset=6), "the ONNX model is of operator set 6"),
    "no such value": (model([node("Relu", "z", "y")], {"x": [1]}), "the ONNX model is malformed: "),
    "shapes at odds": (
        model([node("MatMul", "x x", "y", name="mm")], {"x": [2, 3]}),
        "MatMul (node 'mm') does not fit its inputs, of shapes [2, 3], [2, 3]",
    ),
    "a missing attribute": (model([node("Concat", "x x", "y")], {"x": [1]}), "the ONNX model is malformed: "),
    "rounding": (
        model(
            [node("Quant", "x s s s", "y", name="q", domain=QONNX, rounding_mode="DICE")],
            {"x": [1]},
            {"s": np.float32(2)},
        ),
        "cannot compile qonnx.custom_op.general::Quant (node 'q'): rounding mode 'DICE'; supported are ROUND",
    ),
}


@pytest.mark.parametrize(("built", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_are_one_line(built, message, capfd):
    with pytest.raises((ExportError, UnsupportedOperator)) as caught:
        to_relax(built)
    text = str(caught.value)
    assert message in text and "\n" not in text
    assert capfd.readouterr() == ("", "")  # neither TVM nor ONNX print beside it


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 3, 3)], "input 'in/put' is [N, 2, 3]: the shape [1, 3, 3] does not fit"),
        ([(1, 6)], "input 'in/put' is [N, 2, 3]: the shape [1, 6] does not fit"),
        ([(0, 2, 3)], "input 'in/put' is [N, 2, 3]: the shape [0, 2, 3] does not fit"),
        ([(1, 2, 3)] * 2, "the model has 1 inputs, in/put [N, 2, 3], but 2 shapes were given"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ExportError, match=re.escape(message)):
        to_relax(shaped(), shapes)


def test_files_that_are_no_models(tmp_path):
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"this is not a protobuf")
    with pytest.raises(BnnccError, match="' is no ONNX model: "):
        bnncc.compile(path)
    with pytest.raises(BnnccError, match=r"there is no file 'absent\.onnx'"):
        load_model("absent.onnx")
    path.write_bytes(b"")
    with pytest.raises(BnnccError, match="' is no ONNX model: it holds no graph"):
        load_model(str(path))
    with pytest.raises(BnnccError, match=r"an \.onnx file holds its weights"):
        load_model(str(path), tmp_path / "weights.pt")


def test_a_missing_onnx_runtime_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    built = model(RELU, {"x": [1]})
    with pytest.raises(BnnccError, match="needs ONNX Runtime: pip install onnxruntime"):
        OnnxReference(built).outputs([np.zeros(1, "float32")])
