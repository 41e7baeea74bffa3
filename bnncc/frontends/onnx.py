"""ONNX and QONNX → Relax, with the names of the user's graph.

`to_relax` turns a prepared graph into one Relax function in NCHW float semantics whose variables are named as the
values of the graph, with the node of each in a table: what `frontends.torch` does for a torch.export graph. How a
single operator is converted stands in `onnx_*.py`. TVM's own ONNX importer is not used: its variables have no names
that lead back to the user's graph, it does not know QONNX, and it leaves open how a batch norm rounds, on which every
sign behind it depends.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper
from tvm import IRModule, relax
from tvm.ir import GenericConst

from bnncc.frontends import onnx_elementwise, onnx_layers, onnx_shapes  # noqa: F401  (they fill the table of converters)
from bnncc.frontends.converter import Unsupported, building_main
from bnncc.frontends.imported import ORIGINS_ATTR, ExportError, Imported, Port, UnsupportedOperator
from bnncc.frontends.onnx_converter import CONVERTERS, SUPPORTED_DTYPES, Node, dtype_of, operator_name, shape_of
from bnncc.frontends.onnx_graph import Prepared, node_path, prepare, read
from bnncc.frontends.onnx_quant import as_integers

_LOG = logging.getLogger("bnncc")


def supported_operators() -> list[str]:
    """The operators that can be compiled, those of other domains as `domain::name`, sorted.

    On top of these, anything that only computes with constants and shapes (Shape, ConstantOfShape, Range, …) is
    evaluated when compiling.
    """
    return sorted(CONVERTERS)


def to_relax(model: str | Path | onnx.ModelProto, shapes: Sequence[Sequence[int]] | None = None) -> Imported:
    """Convert a model.

    Args:
        model: the path of an `.onnx` file, or the model itself.
        shapes: of the inputs, in order; they must fit those of the model. Without them an open batch becomes 1, which
            is logged.

    Raises:
        ExportError: no ONNX model or a malformed one, shapes that stay open or do not fit, unsupported dtypes.
        UnsupportedOperator: naming each operator that cannot be compiled and the node that uses it.
    """
    prepared = prepare(read(model), shapes)
    for note in prepared.fixed:
        _LOG.info(note)
    _check_operators(prepared.model.graph)
    return _Importer(prepared).run()


def _check_operators(graph: onnx.GraphProto) -> None:
    """Name every operator that has no conversion, each with the first node that uses it, in one line."""
    missing: dict[str, str] = {}
    for node in graph.node:
        if operator_name(node) not in CONVERTERS:
            missing.setdefault(operator_name(node), node_path(node))
    if missing:
        uses = ", ".join(f"{name} (node '{path}')" for name, path in missing.items())
        raise UnsupportedOperator(
            f"cannot compile {uses}: {len(CONVERTERS)} ONNX and QONNX operators are supported "
            "(bnncc.frontends.onnx.supported_operators() lists them): express it with those, or leave that part of the "
            "model outside"
        )


def _variable_names(graph: onnx.GraphProto) -> dict[str, str]:
    """Value → a unique identifier that looks like it. Two underscores in a row are left to helper bindings."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for value in (*(v.name for v in graph.input), *(name for node in graph.node for name in node.output if name)):
        stem = re.sub(r"_+", "_", re.sub(r"\W", "_", value, flags=re.ASCII)).strip("_") or "value"
        stem = f"v_{stem}" if stem[0].isdigit() or stem == "main" else stem
        name, count = stem, 1
        while name in taken:
            count += 1
            name = f"{stem}_{count}"
        taken.add(name)
        names[value] = name
    return names


class _Importer:
    """Walks the graph once. A converter returns the expression of the node's value; helpers it emits get a suffix."""

    def __init__(self, prepared: Prepared) -> None:
        self.prepared = prepared
        self.graph = prepared.model.graph
        self.names = _variable_names(self.graph)
        self.env: dict[str, Any] = {}
        self.wholes: dict[str, Any] = {}  # quantized value → the floats that hold its integers
        self.constants = dict(prepared.constants)
        self.held = {tensor.name for tensor in self.graph.initializer}
        self.outputs = [value.name for value in self.graph.output]
        self.readers: Counter[str] = Counter(self.outputs)
        for node in self.graph.node:
            readers = node.input[1:] if node.op_type == "DequantizeLinear" else node.input
            self.readers.update(set(readers))
        self.origins: dict[str, tuple[str, str]] = {}
        self.builder = relax.BlockBuilder()

    def run(self) -> Imported:
        parameters = [self._parameter(name) for name in self.prepared.inputs]
        with building_main(self.builder, parameters):
            with self.builder.dataflow():
                for node in self.graph.node:
                    self._add(node)
                results = [self._result(name) for name in self.outputs]
            self.builder.emit_func_output(results[0] if len(results) == 1 else relax.Tuple(results))
        mod: IRModule = self.builder.get()
        table = {name: list(origin) for name, origin in self.origins.items()}
        mod.update_func(mod.get_global_var("main"), mod["main"].with_attr(ORIGINS_ATTR, table))
        inputs = tuple(Port(v.name, shape_of(v), dtype_of(v)) for v in parameters)
        outputs = tuple(
            Port(self.names.get(name, name), shape_of(value), dtype_of(value))
            for name, value in zip(self.outputs, results, strict=True)
        )
        return Imported(mod, dict(self.origins), inputs, outputs)

    def _parameter(self, name: str) -> relax.Var:
        shape, element = self.prepared.shapes[name]
        dtype = str(helper.tensor_dtype_to_np_dtype(element))
        if dtype not in SUPPORTED_DTYPES:
            raise ExportError(_dtype_message(f"input '{name}'", dtype))
        var = relax.Var(self.names[name], relax.TensorType(shape, dtype))
        self.env[name] = var
        self.origins[self.names[name]] = (name, "")
        return var

    def _add(self, proto: onnx.NodeProto) -> None:
        name, path = operator_name(proto), node_path(proto)
        stem, count = self.names[next(filter(None, proto.output))], 0

        def emit(expression: relax.Expr) -> relax.Var:
            nonlocal count
            count += 1
            var = self.builder.emit(expression, f"{stem}__{count}")
            self.origins[var.name] = ("", path)
            return var

        inputs = [self._operand(proto, value) if value else None for value in proto.input]
        constants = [self.constants.get(value) if value else None for value in proto.input]
        node = Node(proto, self.prepared.opset, inputs, constants, emit)
        try:
            made = CONVERTERS[name](node)
            if proto.op_type == "QuantizeLinear":
                made = self._quantized(node, made)
            values = made if isinstance(made, list) else [made]
            for output, value in zip(proto.output, values, strict=False):
                if output and value is not None:
                    self._bind(output, value, path)
        except Unsupported as reason:
            raise UnsupportedOperator(f"cannot compile {name} (node '{path}'): {reason}") from None
        except (RuntimeError, ValueError) as error:  # TVM's type inference, for operands that do not go together
            shapes = ", ".join(str(list(shape_of(value))) for value in inputs if value is not None)
            raise ExportError(f"{name} (node '{path}') does not fit its inputs, of shapes {shapes}") from error

    def _operand(self, proto: onnx.NodeProto, name: str) -> relax.Expr:
        if proto.op_type == "DequantizeLinear" and name in self.wholes:
            return self.wholes[name]
        if name in self.env:
            return self.env[name]
        value = self.constants[name]
        dtype = str(value.dtype)
        if dtype in SUPPORTED_DTYPES:
            self.env[name] = relax.const(np.ascontiguousarray(value), dtype)
            return self.env[name]
        # A constant of another dtype may still be a setting that is read as numbers.
        return None

    def _quantized(self, node: Node, whole: relax.Expr) -> relax.Expr | None:
        """The floats alone, unless something wants the integers."""
        name = node.proto.output[0]
        var = self.builder.emit(whole, f"{self.names[name]}__whole")
        self.origins[var.name] = ("", node.path)
        self.wholes[name] = var
        return as_integers(node, var) if self.readers[name] else None

    def _bind(self, name: str, value: relax.Expr, path: str) -> None:
        if isinstance(value, GenericConst) or (isinstance(value, relax.Var) and name not in self.outputs):
            self.env[name] = value
            return
        emit = self.builder.emit_output if name in self.outputs else self.builder.emit
        var = emit(value, self.names[name])
        self._check_type(name, var, path)
        self.env[name] = var
        self.origins[var.name] = (name, path)

    def _check_type(self, name: str, var: relax.Var, path: str) -> None:
        """What Relax infers must be what ONNX infers; a difference would be a wrong conversion."""
        dtype = dtype_of(var)
        if dtype not in SUPPORTED_DTYPES:
            raise ExportError(_dtype_message(f"value '{name}' (node '{path}')", dtype))
        expected = self.prepared.shapes.get(name)
        if expected is None:
            return
        shape, element = expected
        wanted = str(helper.tensor_dtype_to_np_dtype(element))
        if (shape, wanted) != (shape_of(var), dtype):
            raise ExportError(
                f"node '{path}' makes {dtype} {list(shape_of(var))} where ONNX says {wanted} {list(shape)}: the model "
                "is malformed, or this is an error in bnncc"
            )

    def _result(self, name: str) -> relax.Expr:
        value = self.env[name] if name in self.env else self._constant_output(name)
        if isinstance(value, GenericConst) or value.name in (v for v in map(self.names.get, self.prepared.inputs)):
            value = self.builder.emit_output(value, f"{self.names.get(name, 'output')}__output")
            self.origins[value.name] = (name, "")
        return value

    def _constant_output(self, name: str) -> relax.Expr:
        value = self.constants[name]
        if str(value.dtype) not in SUPPORTED_DTYPES:
            raise ExportError(_dtype_message(f"output '{name}'", str(value.dtype)))
        return relax.const(np.ascontiguousarray(value), str(value.dtype))


def _dtype_message(what: str, dtype: str) -> str:
    return f"{what} is {dtype}: bnncc compiles float32, bool and integers of 8 to 64 bits; export the model in float32"
