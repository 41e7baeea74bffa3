"""Small ONNX models for tests."""

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

QONNX = "qonnx.custom_op.general"


def model(nodes, inputs, weights=None, outputs=("y",), *, opset=17, name="graph"):
    """A model of these nodes. inputs: name → shape (float32) or array (for its shape and dtype)."""
    infos = []
    for key, value in inputs.items():
        array = isinstance(value, np.ndarray)
        element = helper.np_dtype_to_tensor_dtype(value.dtype) if array else TensorProto.FLOAT
        infos.append(helper.make_tensor_value_info(key, element, list(value.shape if array else value)))
    initializers = [numpy_helper.from_array(np.asarray(value), key) for key, value in (weights or {}).items()]
    graph = helper.make_graph(
        list(nodes), name, infos, [onnx.ValueInfoProto(name=key) for key in outputs], initializers
    )
    for value in graph.output:
        value.type.tensor_type.elem_type = TensorProto.FLOAT
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid(QONNX, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def node(kind, inputs, outputs="y", *, name="", domain="", **attributes):
    """A node; inputs and outputs as one string, names separated by blanks, `-` for one left out."""
    split = [["" if part == "-" else part for part in text.split()] for text in (inputs, outputs)]
    return helper.make_node(kind, *split, name=name, domain=domain, **attributes)


def shaped():
    """A graph that computes a shape from its input's, has a folded constant, and names that are no identifiers."""
    weights = {"first": np.array(0), "axes": np.array([0]), "rest": np.array([-1]), "half": np.float32(0.5)}
    nodes = [
        node("Sign", "in/put", "/a/Sign_output_0", name="/a/Sign"),
        node("Mul", "/a/Sign_output_0 half", "/a.Sign.output-0"),
        node("Shape", "in/put", "shape"),
        node("Gather", "shape first", "batch"),
        node("Unsqueeze", "batch axes", "batch1"),
        node("Concat", "batch1 rest", "flat", axis=0),
        node("Reshape", "/a.Sign.output-0 flat", "out put", name="/flatten"),
    ]
    built = model([], {"in/put": ["N", 2, 3]}, weights)
    built.graph.node.extend(nodes[:-1])
    built.graph.node.append(helper.make_node("Reshape", ["/a.Sign.output-0", "flat"], ["out put"], name="/flatten"))
    built.graph.output[0].name = "out put"
    return built
