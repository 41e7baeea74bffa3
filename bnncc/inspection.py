"""`bnncc inspect MODEL`: what every layer of a model will become, before anything long begins.

The model is traced and passes through the graph passes, which takes seconds; no code is generated. What cannot be
compiled does not end the inspection: it is assumed to come from outside, and the layers around it are judged as usual.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tvm.ir import IRModule

from bnncc.compiler import import_model
from bnncc.dialect.plan import Layer
from bnncc.frontends.imported import UnsupportedOperator
from bnncc.frontends.torch import export_model, module_paths, operator_name, survey
from bnncc.models import is_onnx
from bnncc.passes import pipeline
from bnncc.passes.form_kernels import STEPS
from bnncc.passes.rewriter import LAYERS, origins_of
from bnncc.runtime.errors import BnnccError
from bnncc.targets.descriptor import get_targets

REFUSED = "refused"

# ATen's names for what the decomposed graph has, and what they are called.
_NAMES = {"_native_batch_norm_legit_no_training": "batch_norm", "constant_pad_nd": "pad"}

# Operators that say nothing about a layer.
_PLUMBING = frozenset(
    {"getitem", "view", "clone", "alias", "full", "full_like", "scalar_tensor", "permute", "unsqueeze"}
)


@dataclass(frozen=True)
class Finding:
    """What one module of the model, or one operator of its own forward, becomes.

    path: of the module; "" is the model's own forward.
    operator: of the layer with weights, else ATen's operators.
    becomes: "binary", "bitserial", "integer", "weight-only binary" (bits that are unpacked once, float arithmetic),
        "float", "folded" (into the layer after or before it, or into a constant), or "refused".
    layer: bits, multiply-accumulates and bytes, where it has weights.
    reason: why it is refused.
    """

    path: str
    operator: str
    becomes: str
    layer: Layer | None = None
    reason: str = ""


def inspect_model(
    model: Any, example_inputs: Sequence[torch.Tensor] | torch.Tensor | None = None, target: str = "native"
) -> list[Finding]:
    """The findings for a model, in the order of its graph; arguments as of `bnncc.compile`. Of a target that stands for
    several, they are those of the most demanding one.

    Raises:
        BnnccError: a model that cannot be traced, or whose values have dtypes or shapes that nothing can compute with.
    """
    spec = get_targets(target)[0]
    operators: dict[str, list[str]] = {}
    refused: list[Finding] = []
    if is_onnx(model):
        try:
            mod = import_model(model, example_inputs).mod
        except UnsupportedOperator as error:
            return [Finding("", "", REFUSED, reason=str(error))]
    else:
        program = export_model(model, example_inputs)
        imported, reasons = survey(program)
        mod = imported.mod
        paths = module_paths(program.graph)
        for node in program.graph.nodes:
            if node.op == "call_function":
                operators.setdefault(paths[node.name], []).append(operator_name(node).split(".")[0])
        refused = [
            Finding(paths[node.name], operator_name(node), REFUSED, reason=reasons[node.name])
            for node in program.graph.nodes
            if node.name in reasons
        ]
    try:
        lowered = pipeline.run(mod, spec)
    except BnnccError as error:
        return [*refused, Finding("", "", REFUSED, reason=str(error))]
    return _findings(lowered, operators, refused)


def _findings(lowered: IRModule, operators: dict[str, list[str]], refused: Sequence[Finding]) -> list[Finding]:
    attrs = lowered["main"].attrs
    computed = {path for note in attrs[STEPS].values() for path in json.loads(str(note))["layers"]}
    packed = {origin.path for origin in origins_of(lowered["main"]).values() if origin.bits}
    layers: dict[str, list[Layer]] = {}
    for row in attrs[LAYERS]:
        layer = Layer(**json.loads(str(row)))
        layers.setdefault(layer.path, []).append(layer)
    order = [*operators, *(path for path in layers if path not in operators)]
    found = []
    for path in order:
        own = [finding for finding in refused if finding.path == path]
        found += own
        if path in layers:
            found += [Finding(path, layer.op, becomes(layer), layer) for layer in layers[path]]
        elif names := _names(operators.get(path, ()), own):
            kind = "binary" if path in packed else "float" if path in computed else "folded"
            found.append(Finding(path, names, kind))
    return found


def _names(operators: Iterable[str], refused: Sequence[Finding]) -> str:
    named = {finding.operator.split(".")[0] for finding in refused}
    kept = (name for name in dict.fromkeys(operators) if name not in _PLUMBING and name not in named)
    return ", ".join(_NAMES.get(name, name) for name in kept)


def becomes(layer: Layer) -> str:
    """The kind of arithmetic of a layer with weights."""
    if layer.activation_bits == 32:
        return "float" if layer.weight_bits == 32 else "weight-only binary"
    return next((kind for kind in ("bitserial", "integer") if layer.op.startswith(kind)), "binary")
