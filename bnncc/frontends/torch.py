"""PyTorch → Relax: one canonical export, and an importer that keeps the user's names.

`export_model` fixes how a model becomes a graph; the compiler and the parity check both call it, so a node of the graph
has the same name on both sides. `to_relax` turns the graph into one Relax function in NCHW float semantics whose
variables are named as the graph's nodes, with the module path of each in a table. How a single ATen operator is
converted stands in `aten_*.py`; TVM's own PyTorch importer is not used because it drops arguments silently (`alpha` of
an addition, the indices of a max-pool) and raises bare assertions.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from tvm import relax
from tvm.ir import GenericConst

from bnncc.dialect import ops as dialect
from bnncc.dialect.torch_eval import can_evaluate, evaluate_call, to_constant, to_torch
from bnncc.frontends import aten_axes, aten_elementwise, aten_layers, aten_norms, aten_quantized  # noqa: F401  (they fill the table of converters)
from bnncc.frontends.converter import CONVERTERS, DTYPES, Emitter, Unsupported, bind_arguments, building_main
from bnncc.frontends.imported import ORIGINS_ATTR, ExportError, Imported, Port, UnsupportedOperator
from bnncc.frontends.reference_modules import traceable
from bnncc.frontends.torch_signature import dtype_message, input_ports, output_ports
from bnncc.runtime.errors import BnnccError

# Decompositions that PyTorch applies on export although they do not round as eager's own kernel does; kept whole, so
# that the graph computes bit for bit what the module computes.
_KEEP_WHOLE = (
    torch.ops.aten.silu.default,
    torch.ops.aten.hardswish.default,
    torch.ops.aten.hardsigmoid.default,
    torch.ops.aten.rrelu.default,  # in evaluation a leaky ReLU, but decomposed as if it drew noise
    # Those that would become arithmetic on index tensors.
    torch.ops.aten.roll.default,
    torch.ops.aten.upsample_nearest1d.vec,
    torch.ops.aten.upsample_nearest2d.vec,
    torch.ops.aten.upsample_nearest3d.vec,
    torch.ops.aten._upsample_nearest_exact1d.vec,
    torch.ops.aten._upsample_nearest_exact2d.vec,
    torch.ops.aten._upsample_nearest_exact3d.vec,
    torch.ops.aten.upsample_linear1d.vec,
    torch.ops.aten.upsample_bilinear2d.vec,
    torch.ops.aten.upsample_trilinear3d.vec,
    torch.ops.aten.upsample_bicubic2d.vec,
)


def _decompose_pad(x: Any, pad: list[int], mode: str = "constant", value: float | None = None) -> Any:
    """Padding by a constant is an operator of its own; the other modes stay whole."""
    if mode != "constant":
        return NotImplemented
    return torch.ops.aten.constant_pad_nd.default(x, pad, 0 if value is None else value)


def supported_operators() -> list[str]:
    """The ATen operators that can be compiled, as `name.overload`, sorted."""
    return sorted(CONVERTERS)


def export_model(
    model: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Sequence[torch.Tensor] | torch.Tensor | None = None,
) -> torch.export.ExportedProgram:
    """The decomposed graph of a model in evaluation mode: the one spelling of it that bnncc works on.

    Deterministic: the same model gives the same node names. The model itself is not changed.

    Args:
        model: a module in evaluation mode, or an exported program (decomposed again, which is harmless).
        example_inputs: the tensors `model` is called with; their shapes and dtypes become those of the artifact.
            Ignored for an exported program.

    Raises:
        ExportError: training mode, no example inputs, or a model that torch.export cannot trace.
    """
    table = torch.export.default_decompositions()
    for kept in _KEEP_WHOLE:
        table.pop(kept, None)
    table[torch.ops.aten.pad.default] = _decompose_pad
    with warnings.catch_warnings():
        # torch.export warns of its own use of its own classes, which no user can mend.
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        program = model if isinstance(model, torch.export.ExportedProgram) else _trace(model, example_inputs)
        return program.run_decompositions(table)


def _trace(model: torch.nn.Module, example_inputs: Any) -> torch.export.ExportedProgram:
    if not isinstance(model, torch.nn.Module):
        raise ExportError(
            f"cannot compile a {type(model).__name__}: expected a torch.nn.Module or a torch.export.ExportedProgram"
        )
    training = next((name for name, module in model.named_modules() if module.training), None)
    if training is not None:
        where = f"module '{training}'" if training else "the model"
        raise ExportError(f"{where} is in training mode: call model.eval() before compiling")
    if example_inputs is None:
        raise ExportError("no example inputs: pass a tuple of tensors whose shapes and dtypes the artifact will take")
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    # Without gradients, `with torch.no_grad()` blocks in a forward stay ordinary nodes instead of sub-graphs.
    try:
        with torch.no_grad():
            return torch.export.export(traceable(model), tuple(example_inputs), strict=False)
    except BnnccError:
        raise
    except Exception as error:
        line = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
        raise ExportError(
            f"torch.export cannot trace the model: {line}; the forward pass must be a fixed sequence of tensor "
            "operations on the example inputs"
        ) from error


def to_relax(program: torch.export.ExportedProgram) -> Imported:
    """Convert a graph that `export_model` returned.

    Raises:
        UnsupportedOperator: naming each operator that cannot be compiled and the module that uses it.
        ExportError: dynamic shapes, buffers changed by the forward pass, outputs that are not tensors, 16-bit or
            complex data.
    """
    paths = module_paths(program.graph)
    inputs = input_ports(program)
    outputs = output_ports(program)
    _check_values(program, paths)
    _check_operators(program.graph, paths, {})
    return _Importer(program, paths, {}).run(inputs, outputs)


def survey(program: torch.export.ExportedProgram) -> tuple[Imported, dict[str, str]]:
    """`to_relax` of a graph that may hold what cannot be compiled: the values of such nodes become further inputs.

    Returns the model, and name of a refused node → reason. Raises ExportError as `to_relax` does.
    """
    paths = module_paths(program.graph)
    inputs, outputs = input_ports(program), output_ports(program)
    _check_values(program, paths)
    refused: dict[str, str] = {}
    while True:
        try:
            _check_operators(program.graph, paths, refused)
            return _Importer(program, paths, refused).run(inputs, outputs), refused
        except UnsupportedOperator as error:
            if not error.refused.keys() - refused.keys():
                raise
            refused |= error.refused


def module_paths(graph: fx.Graph) -> dict[str, str]:
    """Node name → path of the module whose forward made it; nodes without a record take that of their first input."""
    paths: dict[str, str] = {}
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            paths[node.name] = next(reversed(stack.values()))[0]
        else:
            paths[node.name] = next((paths[source.name] for source in node.all_input_nodes), "")
    return paths


def _where(path: str) -> str:
    return f"module '{path}'" if path else "the model's own forward"


def _check_values(program: torch.export.ExportedProgram, paths: dict[str, str]) -> None:
    """Refuse what no conversion can express: dynamic shapes and data that the targets have no arithmetic for."""
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        values = node.meta.get("val")
        for value in values if isinstance(values, tuple | list) else (values,):
            if not isinstance(value, torch.Tensor):
                continue
            if any(not isinstance(extent, int) for extent in value.shape):
                raise ExportError(
                    f"{_where(paths[node.name])} makes a tensor whose shape depends on the input "
                    f"({', '.join(map(str, value.shape))}): artifacts have fixed shapes"
                )
            if value.dtype not in DTYPES:
                raise ExportError(dtype_message(f"a value in {_where(paths[node.name])}", value.dtype))


_HINTS = {
    "native_dropout.default": "dropout is active: call model.eval(), or pass training=False",
    "bernoulli.p": "dropout is active: call model.eval(), or pass training=False",
    "_native_batch_norm_legit_functional.default": "batch norm is in training mode: export after model.eval()",
    "batch_norm.default": "the graph is not decomposed: pass it through bnncc.frontends.torch.export_model",
    "conv2d.default": "the graph is not decomposed: pass it through bnncc.frontends.torch.export_model",
}


def operator_name(node: fx.Node) -> str:
    """The operator of a node, as in `supported_operators`; of another namespace than aten with that before it."""
    if isinstance(node.target, torch._ops.OpOverload):
        name = node.target.__name__
        return name if node.target.namespace == "aten" else f"{node.target.namespace}::{name}"
    return getattr(node.target, "__name__", str(node.target))


def _check_operators(graph: fx.Graph, paths: dict[str, str], known: Mapping[str, str]) -> None:
    """Name every operator that has no conversion, each with the first module that uses it, in one line.

    known: nodes to leave out.
    """
    missing: dict[str, str] = {}
    refused = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "output") or node.target is operator.getitem or node.name in known:
            continue
        name = operator_name(node)
        if node.op != "call_function" or name not in CONVERTERS:
            missing.setdefault(name, paths[node.name])
            refused[node.name] = _HINTS.get(name, f"{name} is not supported")
    if not missing:
        return
    uses = ", ".join(f"{name} ({_where(path)})" for name, path in missing.items())
    advice = next((_HINTS[name] for name in missing if name in _HINTS), None)
    advice = advice or (
        f"{len(CONVERTERS)} ATen operators are supported (bnncc.frontends.torch.supported_operators() lists them): "
        "express it with those, or leave that part of the model outside"
    )
    raise UnsupportedOperator(f"cannot compile {uses}: {advice}", refused)


class _Importer:
    """Walks the graph once. A converter returns the expression of the node's value; helpers it emits get a suffix."""

    def __init__(
        self, program: torch.export.ExportedProgram, paths: dict[str, str], refused: Mapping[str, str]
    ) -> None:
        """refused: nodes whose values become parameters of the function."""
        self.program = program
        self.refused = refused
        self.paths = paths
        self.env: dict[fx.Node, Any] = {}
        self.origins: dict[str, tuple[str, str]] = {}
        self.builder = relax.BlockBuilder()

    def run(self, inputs: tuple[Port, ...], outputs: tuple[Port, ...]) -> Imported:
        parameters = {port.name: relax.Var(port.name, relax.TensorType(port.shape, port.dtype)) for port in inputs}
        for port in inputs:
            self.origins[port.name] = (port.name, "")
        returned = {spec.arg.name for spec in self.program.graph_signature.output_specs}
        graph = self.program.graph
        # The outer names of the exported program's graph are the node names, so the builder never has to rename.
        assumed = {node: self._assumed(node) for node in graph.nodes if node.name in self.refused}
        self.env |= {node: values[0] if len(values) == 1 else values for node, values in assumed.items()}
        more = [value for values in assumed.values() for value in values if value is not None]
        with building_main(self.builder, [*parameters.values(), *more]):
            with self.builder.dataflow():
                self._bind_placeholders(parameters)
                for node in graph.nodes:
                    if node.op == "call_function" and node not in assumed:
                        self.env[node] = self._convert(node, node.name in returned)
                results = [self._result(node) for node in graph.output_node().args[0]]
                # What a refused operator reads would be dead otherwise.
                read = [self.env[source] for node in assumed for source in node.all_input_nodes]
                results += [
                    self.builder.emit_output(dialect.call("copy", [value]), f"{value.name}__read")
                    for value in read
                    if isinstance(value, relax.Var)
                ]
            self.builder.emit_func_output(results[0] if len(results) == 1 else relax.Tuple(results))
        mod = self.builder.get()
        table = {name: list(origin) for name, origin in self.origins.items()}
        mod.update_func(mod.get_global_var("main"), mod["main"].with_attr(ORIGINS_ATTR, table))
        return Imported(mod, dict(self.origins), inputs, outputs)

    def _assumed(self, node: fx.Node) -> tuple[relax.Var | None, ...]:
        """Parameters that stand for the values of a node."""
        values = node.meta["val"]
        values = values if isinstance(values, tuple | list) else (values,)
        return tuple(
            relax.Var(f"{node.name}__{i}", relax.TensorType(tuple(value.shape), DTYPES[value.dtype]))
            if isinstance(value, torch.Tensor)
            else None
            for i, value in enumerate(values)
        )

    def _bind_placeholders(self, parameters: dict[str, relax.Var]) -> None:
        program = self.program
        buffers = dict(program.named_buffers())
        tensors = {**buffers, **dict(program.named_parameters()), **program.constants}
        targets = {spec.arg.name: spec.target or "" for spec in program.graph_signature.input_specs}
        for node in program.graph.nodes:
            if node.op != "placeholder":
                continue
            if node.name in parameters:
                self.env[node] = parameters[node.name]
            elif node.users:
                self.env[node] = to_constant(tensors[targets[node.name]])

    def _convert(self, node: fx.Node, is_output: bool) -> Any:
        emitter = _NodeEmitter(self, node)
        if node.target is operator.getitem:
            value = self._element(node)
        else:
            arguments = bind_arguments(node, self.env)
            try:
                value = CONVERTERS[operator_name(node)](emitter, arguments)
            except Unsupported as reason:
                raise UnsupportedOperator(
                    f"cannot compile {operator_name(node)} in {_where(self.paths[node.name])}: {reason}",
                    {node.name: f"{operator_name(node)}: {reason}"},
                ) from None
        if not isinstance(value, relax.Expr) or isinstance(value, GenericConst):
            return value
        if isinstance(value, relax.Var) and not is_output:
            return value
        self.origins[node.name] = (node.name, self.paths[node.name])
        emit = self.builder.emit_output if is_output else self.builder.emit
        return emit(value, node.name)

    def _element(self, node: fx.Node) -> Any:
        source: Any = node.args[0]
        index: Any = node.args[1]
        value = self.env[source]
        element = value[index] if isinstance(value, tuple | list) else relax.TupleGetItem(value, index)
        if element is None:
            raise UnsupportedOperator(
                f"cannot compile output {index} of {operator_name(source)} in {_where(self.paths[source.name])}: "
                "only its first output is supported",
                {node.name: f"{operator_name(source)}: only its first output is supported"},
            )
        return element

    def _result(self, node: Any) -> relax.Expr:
        value = self.env[node]
        if isinstance(value, GenericConst):
            value = self.builder.emit_output(value, f"{node.name}__constant")
            self.origins[value.name] = (node.name, self.paths[node.name])
        return value


class _NodeEmitter(Emitter):
    """Emits helper bindings of one node under the node's name with a running suffix."""

    def __init__(self, importer: _Importer, node: fx.Node) -> None:
        super().__init__(node)
        self._importer = importer
        self._count = 0

    def value(self, expression: relax.Expr) -> torch.Tensor | None:
        if isinstance(expression, GenericConst):
            return to_torch(expression)
        call = self._importer.builder.lookup_binding(expression) if isinstance(expression, relax.Var) else None
        if not isinstance(call, relax.Call) or not can_evaluate(call):
            return None
        values = {arg: self.value(arg) for arg in call.args if isinstance(arg, relax.Var)}
        return None if any(value is None for value in values.values()) else evaluate_call(call, values)

    def emit(self, expression: relax.Expr) -> relax.Var:
        self._count += 1
        var = self._importer.builder.emit(expression, f"{self.node.name}__{self._count}")
        self._importer.origins[var.name] = ("", self._importer.paths[self.node.name])
        return var
