"""An ONNX model as the reference of the parity check.

ONNX Runtime runs it, operator by operator: its graph optimisations merge batch norms into convolutions and so round in
other places than the graph says. A model with QONNX operators, which ONNX Runtime does not have, runs in
`frontends.onnx_evaluator` instead. Both run the graph that the compiler converts (`frontends.onnx_graph.prepare`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from bnncc.frontends.onnx_evaluator import QONNX_DOMAINS, evaluator
from bnncc.frontends.onnx_graph import prepare, read
from bnncc.runtime.errors import BnnccError


class OnnxReference:
    """What an ONNX model computes, outputs and any value inside; the counterpart of `bnncc.eager.EagerReference`.

    model: a model or the path of one. shapes: of its inputs, as `bnncc.compile` was given them. runtime: "onnxruntime",
    "reference" (NumPy), or None to take ONNX Runtime for models without QONNX operators.
    Raises BnnccError where ONNX Runtime is missing or cannot run the model.
    """

    def __init__(
        self,
        model: str | Path | onnx.ModelProto,
        shapes: Sequence[Sequence[int]] | None = None,
        runtime: str | None = None,
    ) -> None:
        self._prepared = prepare(read(model), shapes)
        graph = self._prepared.model.graph
        custom = any(node.domain in QONNX_DOMAINS for node in graph.node)
        self._runtime = runtime or ("reference" if custom else "onnxruntime")
        self._outputs = [value.name for value in graph.output]
        self._known = {*self._prepared.inputs, *(name for node in graph.node for name in node.output)}
        self._sessions: dict[tuple[str, ...], Any] = {}

    def outputs(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        return self._run(tuple(self._outputs), inputs)

    def values(self, inputs: Sequence[np.ndarray], nodes: set[str]) -> dict[str, np.ndarray]:
        unknown = nodes.difference(self._known, self._outputs)
        if unknown:
            raise BnnccError(
                f"the reference has no value '{min(unknown)}', which the artifact holds: it is not the model that was "
                "compiled"
            )
        given = dict(zip(self._prepared.inputs, inputs, strict=True))
        wanted = tuple(sorted(nodes.difference(given)))
        found = dict(zip(wanted, self._run(wanted, inputs), strict=True)) if wanted else {}
        return {name: found[name] if name in found else given[name] for name in nodes}

    def _run(self, names: tuple[str, ...], inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        feeds = {name: np.ascontiguousarray(array) for name, array in zip(self._prepared.inputs, inputs, strict=True)}
        if names not in self._sessions:
            model = _with_outputs(self._prepared.model, names)
            self._sessions[names] = evaluator(model) if self._runtime == "reference" else _session(model)
        return [np.asarray(value) for value in self._sessions[names].run(list(names), feeds)]


def _with_outputs(model: onnx.ModelProto, names: Sequence[str]) -> onnx.ModelProto:
    """The model with these values as its outputs."""
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    declared = {value.name: value for value in model.graph.output}
    del changed.graph.output[:]
    changed.graph.output.extend(declared.get(name, onnx.ValueInfoProto(name=name)) for name in names)
    return changed


def _session(model: onnx.ModelProto) -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise BnnccError("validating against an ONNX model needs ONNX Runtime: pip install onnxruntime") from error
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no base class
        line = next((text.strip() for text in str(error).splitlines() if text.strip()), type(error).__name__)
        raise BnnccError(f"ONNX Runtime {onnxruntime.__version__} cannot run the reference: {line}") from error
