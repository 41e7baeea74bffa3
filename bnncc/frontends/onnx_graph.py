"""An ONNX model as bnncc works on it: checked, functions inlined, shapes fixed, constants computed.

`prepare` decides how a file becomes a graph; the compiler and the parity check both call it, so a value has the same
name, and a computed constant the same bits, on both sides.

A node whose inputs are all constants is computed here. Elementwise operations on whole weights stay nodes all the same:
the passes must see how a weight is made (a straight-through sign), and IEEE 754 fixes what they give.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import checker, helper, inliner, numpy_helper, shape_inference

from bnncc.frontends.imported import ExportError
from bnncc.frontends.onnx_evaluator import QONNX_DOMAINS, evaluate_node

#: The oldest operator set whose broadcasting is today's.
OLDEST_OPSET = 7

# Elementwise operators that are left in the graph when they work on constants: what they give is fixed by IEEE 754.
_KEPT = frozenset({
    "Abs", "Add", "And", "Cast", "Clip", "Div", "Equal", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual",
    "Max", "Min", "Mul", "Neg", "Not", "Or", "Sign", "Sub", "Where",
})  # fmt: skip

# Of these the shape of the input is enough.
_SHAPE_ONLY = ("Shape", "Size")

_RANDOM = ("Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike")


@dataclass(frozen=True)
class Prepared:
    """A model ready for conversion.

    model: inputs of static shape, no node that only makes constants but for operations on weights.
    inputs: names of the inputs that a caller gives, in order.
    constants: every value that does not depend on the inputs, those of remaining nodes included.
    shapes: name → (shape, element type of `onnx.TensorProto`) of every value ONNX can infer.
    fixed: for each input whose batch was chosen here, one line that says so.
    """

    model: onnx.ModelProto
    inputs: tuple[str, ...]
    constants: dict[str, np.ndarray]
    shapes: dict[str, tuple[tuple[int, ...], int]]
    fixed: tuple[str, ...]

    @property
    def opset(self) -> int:
        return next(int(entry.version) for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))


def read(source: str | Path | onnx.ModelProto) -> onnx.ModelProto:
    """A model from a file, external data included. Raises ExportError for what is no ONNX model."""
    if isinstance(source, onnx.ModelProto):
        return source
    if not Path(source).is_file():
        raise ExportError(f"there is no file '{source}'")
    try:
        model = onnx.load(source)
    except Exception as error:  # protobuf and the external data raise many kinds
        raise ExportError(f"'{source}' is no ONNX model: {_line(error)}") from error
    if not model.HasField("graph"):
        raise ExportError(f"'{source}' is no ONNX model: it holds no graph")
    return model


def node_path(node: onnx.NodeProto) -> str:
    """What a node is called in errors and tables: its name, or where it has none the value it makes."""
    return node.name or next((name for name in node.output if name), node.op_type)


def prepare(source: onnx.ModelProto, shapes: Sequence[Sequence[int]] | None = None) -> Prepared:
    """The one spelling of a model that bnncc works on; `source` is not changed.

    shapes: of the inputs, in order; without them an unnamed or symbolic batch becomes 1.
    Raises ExportError for a malformed model, one of an operator set older than `OLDEST_OPSET`, shapes that do not fit
    and shapes that stay open.
    """
    model = onnx.ModelProto()
    model.CopyFrom(source)
    _check(model)
    if model.functions:
        model = inliner.inline_local_functions(model)
    graph = model.graph
    held = {tensor.name for tensor in graph.initializer}
    users = [value for value in graph.input if value.name not in held]
    fixed = _fix_shapes(users, shapes)
    users = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in users]
    del graph.value_info[:]
    for value in graph.output:
        value.type.tensor_type.ClearField("shape")
    constants, inferred = _fold(model)
    _prune(graph)
    # Up to IR version 3 weights are listed as inputs too.
    del graph.input[:]
    graph.input.extend(users)
    return Prepared(model, tuple(value.name for value in users), constants, inferred, fixed)


def _check(model: onnx.ModelProto) -> None:
    for value in model.graph.output:
        # The checker insists on a shape; everything else infers it, and so does `_fold`.
        value.type.tensor_type.shape.SetInParent()
    try:
        checker.check_model(model)
    except Exception as error:
        raise ExportError(f"the ONNX model is malformed: {_line(error)}") from error
    if model.graph.sparse_initializer:
        raise ExportError("the ONNX model has sparse weights: bnncc compiles dense ones")
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    if not versions:
        raise ExportError("the ONNX model names no version of the standard operators: add an opset_import")
    if versions[0] < OLDEST_OPSET:
        raise ExportError(
            f"the ONNX model is of operator set {versions[0]}: bnncc compiles {OLDEST_OPSET} and later; convert it "
            "with onnx.version_converter.convert_version(model, 13)"
        )


def _fix_shapes(users: Sequence[onnx.ValueInfoProto], shapes: Sequence[Sequence[int]] | None) -> tuple[str, ...]:
    """Gives every input its static shape; says where the batch was chosen."""
    if shapes is not None and len(shapes) != len(users):
        names = ", ".join(f"{value.name} [{_shown(value)}]" for value in users)
        raise ExportError(f"the model has {len(users)} inputs, {names}, but {len(shapes)} shapes were given")
    notes = []
    for index, value in enumerate(users):
        if not value.type.HasField("tensor_type"):
            raise ExportError(f"input '{value.name}' is no tensor: bnncc compiles models of tensors")
        dims = _dims(value)
        if shapes is not None:
            given = [int(extent) for extent in shapes[index]]
            if not _fits(dims, given):
                raise ExportError(f"input '{value.name}' is [{_shown(value)}]: the shape {given} does not fit")
        elif dims is None or any(not isinstance(extent, int) for extent in dims[1:]):
            raise ExportError(
                f"input '{value.name}' is [{_shown(value)}]: artifacts have fixed shapes; give one with --input-shape "
                "or example_inputs"
            )
        elif dims and not isinstance(dims[0], int):
            given = [1, *(int(extent) for extent in dims[1:])]
            shape = ", ".join(map(str, given))
            notes.append(
                f"input '{value.name}' is [{_shown(value)}]: compiled for [{shape}]; --input-shape or example_inputs "
                "chooses another batch"
            )
        else:
            given = [int(extent) for extent in dims]
        value.type.tensor_type.ClearField("shape")
        value.type.tensor_type.shape.SetInParent()
        for extent in given:
            value.type.tensor_type.shape.dim.add().dim_value = extent
    return tuple(notes)


def _fits(dims: Sequence[int | str] | None, given: Sequence[int]) -> bool:
    if dims is None or len(dims) != len(given):
        return dims is None
    return all(d == g if isinstance(d, int) else g > 0 for d, g in zip(dims, given, strict=True))


def _dims(value: onnx.ValueInfoProto) -> list[int | str] | None:
    """The extents of a value; a name or "?" where one is open, None where the rank is."""
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]


def _shown(value: onnx.ValueInfoProto) -> str:
    dims = _dims(value)
    return "of unknown rank" if dims is None else ", ".join(map(str, dims))


def _fold(model: onnx.ModelProto) -> tuple[dict[str, np.ndarray], dict[str, tuple[tuple[int, ...], int]]]:
    """Computes what does not depend on the inputs, until nothing new comes of it; returns it, and all shapes."""
    graph = model.graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    while True:
        shapes = _infer(model)
        remaining = [node for node in graph.node if not _computed(node, model, constants, shapes)]
        if len(remaining) == len(graph.node):
            return constants, shapes
        del graph.node[:]
        graph.node.extend(remaining)


def _computed(node: onnx.NodeProto, model: onnx.ModelProto, constants: dict[str, np.ndarray], shapes: Any) -> bool:
    """Whether the node went away, its outputs being constants now."""
    names = [name for name in node.input if name]
    known = {name: constants[name] for name in names if name in constants}
    if node.op_type in _SHAPE_ONLY and names[0] in shapes:
        known[names[0]] = np.broadcast_to(np.float32(0), shapes[names[0]][0])
    if len(known) < len(set(names)) or _has_graph(node) or node.op_type in _RANDOM:
        return False
    if all(name in constants for name in node.output):
        return False  # computed in an earlier round, and kept
    try:
        values = evaluate_node(node, known, model.opset_import)
    except Exception as error:  # whatever the evaluator's NumPy raises
        raise ExportError(
            f"cannot compute the constant '{node.output[0]}' ({node.op_type}, node '{node_path(node)}'): {_line(error)}"
        ) from error
    named = dict(zip([name for name in node.output if name], values, strict=True))
    constants.update(named)
    if node.op_type in _KEPT and all(v.ndim >= 2 and v.dtype.kind in "fb" for v in values):
        return False
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in named.items())
    return True


def _has_graph(node: onnx.NodeProto) -> bool:
    return any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute)


def _infer(model: onnx.ModelProto) -> dict[str, tuple[tuple[int, ...], int]]:
    """Static shapes and element types. QONNX operators, which ONNX does not know, keep those of their input."""
    plain = onnx.ModelProto()
    plain.CopyFrom(model)
    for node in plain.graph.node:
        if node.domain in QONNX_DOMAINS:
            source = node.input[0]
            node.CopyFrom(helper.make_node("Identity", [source], [node.output[0]], node.name))
    try:
        inferred = shape_inference.infer_shapes(plain, check_type=True, strict_mode=False, data_prop=True)
    except Exception as error:
        raise ExportError(f"the shapes in the ONNX model contradict each other: {_line(error)}") from error
    graph = inferred.graph
    shapes = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = _dims(value) if value.type.HasField("tensor_type") else None
        if dims is not None and all(isinstance(extent, int) for extent in dims):
            shapes[value.name] = tuple(int(extent) for extent in dims), value.type.tensor_type.elem_type
    for tensor in graph.initializer:
        shapes[tensor.name] = tuple(tensor.dims), tensor.data_type
    return shapes


def _prune(graph: onnx.GraphProto) -> None:
    """Drops nodes and weights that no output needs."""
    needed = {value.name for value in graph.output}
    nodes = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            nodes.append(node)
            needed.update(node.input)
    del graph.node[:]
    graph.node.extend(reversed(nodes))
    weights = [tensor for tensor in graph.initializer if tensor.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(weights)


def _line(error: Exception) -> str:
    """The first line of a message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
