"""The signature of an exported program: its inputs and outputs as ports, and what of it an artifact cannot have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument
from torch.utils import _pytree as pytree

from bnncc.frontends.converter import DTYPES
from bnncc.frontends.imported import ExportError, Port


def input_ports(program: torch.export.ExportedProgram) -> tuple[Port, ...]:
    """The inputs in the order of the signature. Raises ExportError for one that is no tensor, dynamic or 16-bit."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    ports = []
    for spec in program.graph_signature.input_specs:
        if spec.kind is not InputKind.USER_INPUT:
            continue
        if not isinstance(spec.arg, TensorArgument):
            value = getattr(spec.arg, "value", None)
            raise ExportError(
                f"input '{spec.arg.name}' is {value!r}, not a tensor: fix its value inside the model, for example with "
                "a small wrapper module"
            )
        ports.append(_port(spec.arg.name, values[spec.arg.name], "input"))
    return tuple(ports)


def output_ports(program: torch.export.ExportedProgram) -> tuple[Port, ...]:
    """The outputs in eager's order, nested ones flattened. Raises ExportError also where the model keeps state."""
    specs = program.graph_signature.output_specs
    for spec in specs:
        if spec.kind is OutputKind.BUFFER_MUTATION:
            raise ExportError(
                f"the forward pass changes buffer '{spec.target}': artifacts keep no state between runs; update it "
                "outside forward, or put the module into evaluation mode"
            )
        if spec.kind is OutputKind.USER_INPUT_MUTATION:
            raise ExportError(
                f"the forward pass changes its input '{spec.target}' in place: use an out-of-place operation"
            )
    names = list(_output_names(program.call_spec.out_spec, len(specs)))
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    ports = []
    for name, spec in zip(names, specs, strict=True):
        if not isinstance(spec.arg, TensorArgument):
            value = spec.arg.value if isinstance(spec.arg, ConstantArgument) else spec.arg
            raise ExportError(f"output '{name}' is {value!r}, not a tensor: return tensors only")
        ports.append(_port(name, values[spec.arg.name], "output"))
    if not ports:
        raise ExportError("the model returns no tensor: return at least one")
    return tuple(ports)


def _output_names(spec: pytree.TreeSpec | None, count: int) -> Iterator[str]:
    """`output` for a single tensor, `output_0`, … for a tuple, the keys of a dict, joined by `_` where nested."""
    if spec is None:
        yield from (f"output_{i}" for i in range(count))
        return
    leaves, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(count)), spec))
    for path, _ in leaves:
        keys = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
        name = "_".join(keys)
        yield name if name and not name[0].isdigit() else "_".join(["output", *keys])


def _port(name: str, value: Any, what: str) -> Port:
    if any(not isinstance(extent, int) for extent in value.shape):
        shape = ", ".join(map(str, value.shape))
        raise ExportError(
            f"{what} '{name}' has a dynamic shape ({shape}): artifacts have fixed shapes; export without dynamic_shapes"
        )
    if value.dtype not in DTYPES:
        raise ExportError(dtype_message(f"{what} '{name}'", value.dtype))
    return Port(name, tuple(value.shape), DTYPES[value.dtype])


def dtype_message(what: str, dtype: torch.dtype) -> str:
    """Why `what`, of a dtype that is not in `DTYPES`, cannot be compiled, in a line."""
    return (
        f"{what} is {str(dtype).removeprefix('torch.')}: bnncc compiles float32, bool and integers of 8 to 64 bits; "
        "call model.float() and pass float32 inputs"
    )
