"""Eager PyTorch as the reference of the parity check, and `bnncc.validate`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.export.graph_signature import InputKind
from torch.utils import _pytree as pytree

from bnncc.dialect.plan import QuantizedLayer
from bnncc.frontends.torch import export_model
from bnncc.models import is_onnx
from bnncc.runtime import parity
from bnncc.runtime.device import Device, open_device, runner_path
from bnncc.runtime.errors import BnnccError
from bnncc.runtime.manifest import Manifest, PortEntry, model_shape
from bnncc.runtime.report import ParityReport


class EagerReference:
    """What a PyTorch model computes on the CPU, outputs and any value inside.

    model: a module in evaluation mode, or an exported program. example_inputs: as `bnncc.compile` was given them; they
    decide the shapes, and so the graph whose nodes the artifact names. Not needed for an exported program.
    """

    def __init__(
        self,
        model: torch.nn.Module | torch.export.ExportedProgram,
        example_inputs: Sequence[torch.Tensor] | None = None,
    ) -> None:
        self._program = export_model(model, example_inputs)
        self._model = model if isinstance(model, torch.nn.Module) else model.module()

    def outputs(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        with torch.no_grad():
            result = self._model(*map(_tensor, inputs))
        return [tensor.numpy(force=True) for tensor in pytree.tree_leaves(result)]

    def values(self, inputs: Sequence[np.ndarray], nodes: set[str]) -> dict[str, np.ndarray]:
        unknown = nodes.difference(node.name for node in self._program.graph.nodes)
        if unknown:
            raise BnnccError(
                f"the reference has no value '{min(unknown)}', which the artifact holds: it is not the model that was "
                "compiled, or not in the form (module or exported program) that was compiled"
            )
        recorder = _Recorder(self._program.graph_module, nodes)
        with torch.no_grad():
            recorder.run(*self._arguments(inputs))
        return recorder.values

    def _arguments(self, inputs: Sequence[np.ndarray]) -> list[Any]:
        """The flat arguments of the exported graph: parameters, buffers and constants among the user's inputs."""
        program, user = self._program, iter(map(_tensor, inputs))
        held = {**program.state_dict, **program.constants}
        specs = program.graph_signature.input_specs
        return [next(user) if spec.kind is InputKind.USER_INPUT else held[str(spec.target)] for spec in specs]


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of some of its nodes."""

    def __init__(self, module: fx.GraphModule, nodes: set[str]) -> None:
        super().__init__(module)
        self.nodes = nodes
        self.values: dict[str, np.ndarray] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.name in self.nodes:
            self.values[n.name] = (result.dequantize() if result.is_quantized else result).numpy(force=True)
        return result


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(array) if array.flags.writeable else array.copy())


def validate(
    artifact: Any,
    reference: torch.nn.Module | torch.export.ExportedProgram | Any,
    inputs: Iterable[Any],
    labels: Any = None,
    device: str = "local",
    *,
    layer_batches: int | None = 4,
    progress: parity.Progress | None = None,
) -> ParityReport:
    """Compares an artifact with the model it was compiled from.

    Args:
        artifact: what `bnncc.compile` returned, or the path of a saved `.so`.
        reference: the model, in evaluation mode; of an ONNX model what ONNX Runtime computes (`bnncc.onnx_reference`).
        inputs: an iterable of tuples of tensors, one tensor for each input of the model. Each tuple may hold as many
            samples as it likes, in multiples of the artifact's batch; a single tensor stands for a tuple of one.
        labels: class numbers of all samples, for the accuracy of both.
        device: "local", or "qemu" for an artifact of another architecture.
        layer_batches: how many batches are also compared layer by layer; None means all of them.
        progress: called as ``progress(stage, done, total)``.

    Returns:
        ParityReport: `.ok`, `.summary()`, `.table()`, `.to_json()`, `.save("report.html")`.

    Raises:
        BnnccError: inputs that do not fit, another model as reference, an artifact that the device refuses.
    """
    with _opened(artifact, device) as opened:
        return parity.check(
            opened,
            _reference(reference, opened.manifest["inputs"]),
            inputs,
            labels,
            device_name=device,
            layer_batches=layer_batches,
            progress=progress,
            intended=_intended(reference, opened.manifest),
        )


def _reference(model: Any, ports: Sequence[PortEntry]) -> parity.Reference:
    if is_onnx(model):
        from bnncc.onnx_reference import OnnxReference

        return OnnxReference(model, [model_shape(port) for port in ports])
    return EagerReference(model, _examples(ports))


def _intended(model: Any, manifest: Manifest) -> parity.Intended | None:
    """The model with the layers quantized that the artifact's user opted in to, if there are any."""
    if not manifest.get("quantized"):
        return None
    from bnncc.calibration import QuantizedReference
    from bnncc.compiler import import_model

    layers = [QuantizedLayer(**entry) for entry in manifest["quantized"]]
    return QuantizedReference(import_model(model, _examples(manifest["inputs"])), layers)


def _examples(ports: Sequence[PortEntry]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.zeros(*model_shape(port), dtype=getattr(torch, port["dtype"])) for port in ports)


@contextmanager
def _opened(artifact: Any, device: str) -> Iterator[Device]:
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(artifact, str | Path):
            path = Path(artifact)
        else:
            path = Path(folder) / "model.so"
            artifact.save(path, runner=runner_path(path) if device == "qemu" else None)
        with open_device(path, device) as opened:
            yield opened
