"""The parity check: does an artifact, on its device, compute what the model computes?

Every batch runs end to end. Some batches are also looked at step by step, in two ways: the whole run, reading each
value of the model after the step that makes it; and each step alone, fed with eager's own inputs, where an exact step
must be bit-equal. A batch whose outputs differ by more than rounding is always looked at step by step.

The verdict (`ParityReport.ok`): every exact step is bit-equal alone; every inexact one (a float sum in another order
than eager's) is within `TOLERANCE`, or, where it ends in quantized values, within one quantization step; in the whole
run nothing differs that is not downstream of an inexact step; and a
batch in which no sign flipped has outputs within `RUN_TOLERANCE`.

Layers that their user opted in to quantize (`opt_in` of a step) compute something else than the model. They, and what
follows them in a whole run, are held by the same rules to `Intended`: the model with these layers quantized. How far
they are from eager is counted besides, and decides nothing.

This module needs NumPy only. What eager computes comes through `Reference`; `bnncc.eager` has the one for PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from bnncc.runtime.device import Device
from bnncc.runtime.errors import BnnccError, InputError
from bnncc.runtime.manifest import PortEntry, StepEntry, VersionEntry, from_model_axes, model_shape, to_model_axes
from bnncc.runtime.report import Difference, ParityReport, StepParity
from bnncc.runtime.values import StoredValue

#: Largest difference of one inexact step fed with eager's input, relative to the largest magnitude in the tensor. Sums
#: of 10⁴ float32 terms in another order stay below 10⁻⁵ of it; a wrong weight does not stay below 10⁻⁴. Where such a
#: step ends in bits, it is the share of them that may flip: those whose sum is that close to 0.
TOLERANCE = 1e-4

#: The same for the outputs of a whole run in which no sign flipped: the errors of all inexact steps together.
RUN_TOLERANCE = 1e-3

#: Batches looked at step by step because their outputs differ; more of them would say nothing new.
MAX_SUSPECTS = 16

Progress = Callable[[str, int, int], None]


class Reference(Protocol):
    """What the model itself computes. Arrays are in the model's own axes."""

    def outputs(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The model's outputs, nested ones flattened."""
        ...

    def values(self, inputs: Sequence[np.ndarray], nodes: set[str]) -> dict[str, np.ndarray]:
        """The values of these nodes; raises BnnccError for a node that the model does not have."""
        ...


class Intended(Protocol):
    """What the model computes with the layers quantized that the artifact was compiled so. Arrays as in `Reference`."""

    def outputs(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]: ...

    def values(self, known: Mapping[str, np.ndarray], nodes: set[str]) -> dict[str, np.ndarray]:
        """The values of these nodes, given those of others."""
        ...


@dataclass(frozen=True)
class _Unit:
    """One step with the steps it needs to be run alone: its own scratch inputs are made by `steps` before it.

    inputs: ids of the values it reads. outputs: the values it is judged by; empty for a step that only makes scratch
    memory. opt_in: as of its step, or of one that it needs.
    """

    steps: tuple[int, ...]
    exact: bool
    downstream: bool
    inputs: tuple[int, ...]
    outputs: tuple[StoredValue, ...]
    opt_in: str | None


def check(
    device: Device,
    reference: Reference,
    inputs: Iterable[Any],
    labels: Any = None,
    *,
    device_name: str = "local",
    layer_batches: int | None = 4,
    progress: Progress | None = None,
    intended: Intended | None = None,
) -> ParityReport:
    """Runs the artifact on `device` against `reference`.

    inputs: tuples of arrays (or single arrays), one for each input of the model; their first axis is a multiple of the
        artifact's, and they are cut into its batches. labels: class numbers of all samples, in order.
    layer_batches: how many batches are also looked at step by step; None means all.
    intended: needed for an artifact with an opt-in.
    Raises BnnccError for inputs or labels that do not fit, and for a reference that is another model.
    """
    run = _Run(device, reference, device_name, intended)
    truth = None if labels is None else np.asarray(labels).reshape(-1)
    batches = list(cut_batches(device.manifest["inputs"], inputs))
    if not batches:
        raise InputError("no inputs to compare on: give at least one sample")
    suspects = 0
    for done, batch in enumerate(batches):
        if progress:
            progress("comparing with eager", done, len(batches))
        chosen = layer_batches is None or done < layer_batches
        flips = run.trace(batch) if chosen else None
        deviation = run.outputs(batch)
        if flips is None and deviation > RUN_TOLERANCE and suspects < MAX_SUSPECTS:
            suspects += 1
            flips = run.trace(batch)
        if flips == 0 and deviation > RUN_TOLERANCE:
            run.unexplained = max(run.unexplained, deviation)
    if progress:
        progress("comparing with eager", len(batches), len(batches))
    return run.finish(truth)


class _Run:
    """The state of one check: the device, the reference, and the report as it grows."""

    def __init__(self, device: Device, reference: Reference, device_name: str, intended: Intended | None) -> None:
        self.device = device
        self.reference = reference
        self.intended = intended
        manifest, version = device.manifest, device.version
        self.manifest, self.version = manifest, version
        self.report = ParityReport(manifest["name"], version["name"], device_name, tolerance=TOLERANCE)
        paths = [entry["path"] for entry in manifest.get("quantized", ())]
        self.report.quantized_layers = list(dict.fromkeys(paths))
        self.values = {value.id: value for value in map(StoredValue.of, version["tensors"]) if value is not None}
        self.nodes = {value.node for value in self.values.values()}
        self.units = _units(version, self.values)
        self.rows = [_rows(version["steps"][unit.steps[-1]], unit) for unit in self.units]
        self.report.steps = [row for rows in self.rows for row in rows]
        self.batch_size = (*manifest["inputs"][0]["shape"], 1)[0]
        scores = manifest["outputs"][0]["shape"]
        self.classifies = len(scores) == 2 and scores[1] > 1
        self.predicted: list[np.ndarray] = []
        self.expected: list[np.ndarray] = []
        self.unexplained = 0.0

    def outputs(self, batch: tuple[np.ndarray, ...]) -> float:
        """Runs one batch end to end; returns the largest relative difference of its outputs from what is intended."""
        ports = self.manifest["outputs"]
        given = [from_model_axes(*pair) for pair in zip(self.manifest["inputs"], batch, strict=True)]
        device = [to_model_axes(*pair) for pair in zip(ports, self.device.run(given), strict=True)]
        eager = self.reference.outputs(batch)
        names = [port["name"] for port in ports]
        if [a.shape for a in device] != [b.shape for b in eager]:
            shapes = ", ".join(f"{name} {a.shape}" for name, a in zip(names, device, strict=True))
            raise BnnccError(
                f"the artifact returns {shapes} but the reference {[b.shape for b in eager]}: "
                "the reference is not the model that was compiled"
            )
        for a, b in zip(device, eager, strict=True):
            self.report.outputs.merge(Difference.between(a, b))
        wanted = self.intended.outputs(batch) if self.intended else eager
        largest = max(Difference.between(a, b).max_rel for a, b in zip(device, wanted, strict=True))
        self.report.samples += self.batch_size
        if self.classifies:
            self.predicted.append(device[0].argmax(-1).reshape(-1))
            self.expected.append(eager[0].argmax(-1).reshape(-1))
        return largest

    def trace(self, batch: tuple[np.ndarray, ...]) -> int:
        """Looks at one batch step by step; returns the flips of signs and quantized values in its whole run."""
        values = self.reference.values(batch, self.nodes)
        encoded = {id_: value.encode(values[value.node]) for id_, value in self.values.items()}
        self.report.traced += self.batch_size
        flips = self._trace_whole(batch, encoded)
        self._trace_alone(values, encoded)
        return flips

    def _intended_run(self, batch: tuple[np.ndarray, ...]) -> dict[int, np.ndarray]:
        """What the tensors are to hold in a whole run of a network with an opt-in; empty for any other."""
        if self.intended is None:
            return {}
        ports = [self.values.get(tensor) for tensor in self.version["inputs"]]
        known = {value.node: array for value, array in zip(ports, batch, strict=True) if value}
        values = self.intended.values(known, self.nodes)
        return {id_: value.encode(values[value.node]) for id_, value in self.values.items()}

    def _trace_whole(self, batch: tuple[np.ndarray, ...], encoded: dict[int, np.ndarray]) -> int:
        intended = self._intended_run(batch)
        ports = self.manifest["inputs"]
        for tensor, port, array in zip(self.version["inputs"], ports, batch, strict=True):
            self.device.write(tensor, from_model_axes(port, array))
        flips = 0
        for unit, rows in zip(self.units, self.rows, strict=True):
            self.device.run_steps(unit.steps[-1], 1)
            for value, row in zip(unit.outputs, rows, strict=True):
                found = self._compare(value, encoded[value.id], row.whole)
                if value.id in intended:
                    found = self._compare(value, intended[value.id], Difference())
                flips += found if row.packed or row.step else 0
        return flips

    def _trace_alone(self, values: dict[str, np.ndarray], encoded: dict[int, np.ndarray]) -> None:
        for unit, rows in zip(self.units, self.rows, strict=True):
            if not rows:
                continue
            for index in unit.steps:
                arguments, _ = _arguments(self.version["steps"][index])
                # Just before its step, not earlier: the arena gives memory that is read no more to somebody else.
                for id_ in arguments:
                    if id_ in encoded:
                        self.device.write(id_, encoded[id_])
                self.device.run_steps(index, 1)
            expected = self._quantized(unit, values) if unit.opt_in else encoded
            for value, row in zip(unit.outputs, rows, strict=True):
                self._compare(value, expected[value.id], row.isolated)
                if unit.opt_in:
                    self._compare(value, encoded[value.id], row.cost)
                    row.see(values[value.node])

    def _quantized(self, unit: _Unit, values: dict[str, np.ndarray]) -> dict[int, np.ndarray]:
        """What the tensors are to hold that a quantized layer writes when fed with eager's values."""
        if self.intended is None:
            raise BnnccError("the artifact has quantized layers: compare it by bnncc.validate, which knows them")
        known = {self.values[id_].node: values[self.values[id_].node] for id_ in unit.inputs}
        made = self.intended.values(known, {value.node for value in unit.outputs})
        return {value.id: value.encode(made[value.node]) for value in unit.outputs}

    def _compare(self, value: StoredValue, expected: np.ndarray, difference: Difference) -> int:
        """Adds what the device holds of `value` now to `difference`; returns the number of mismatches."""
        stored = self.device.read(value.id)
        found = Difference.between(value.decode(stored), value.decode(expected))
        if value.layout is not None and not found.mismatches:
            # Equal values in unequal words: a padding pixel or padding bit is wrong, and the next layer reads it.
            found.mismatches = int(np.count_nonzero(stored != expected))
        difference.merge(found)
        return found.mismatches

    def finish(self, labels: np.ndarray | None) -> ParityReport:
        report = self.report
        if self.predicted:
            predicted, expected = np.concatenate(self.predicted), np.concatenate(self.expected)
            report.top1_agreement = float((predicted == expected).mean())
            if labels is not None:
                _check_labels(labels, predicted)
                report.accuracy = float((predicted == labels).mean())
                report.eager_accuracy = float((expected == labels).mean())
        elif labels is not None:
            raise InputError("labels were given, but the model's first output is not [samples, classes]")
        report.problems = list(_problems(report, self.unexplained))
        return report


def _problems(report: ParityReport, unexplained: float) -> Iterator[str]:
    wrong = False
    for step in report.steps:
        alone, whole, what = step.isolated, step.whole, "bits" if step.packed else "values"
        finding = ""
        if not step.ok(report.tolerance):
            finding = f"{alone.mismatches} of {alone.elements} {what} wrong when fed with eager's own input"
            if step.step and not step.exact:
                finding += f", by up to {alone.max_abs:.3g}, more than one quantization step ({step.step:.3g})"
            elif not step.exact:
                finding += (
                    f", by up to {alone.max_rel:.2g} of the largest; summation order explains {report.tolerance:g}"
                )
        elif not step.downstream and whole.mismatches:
            finding = f"{whole.mismatches} of {whole.elements} {what} wrong in the whole run, after exact steps only"
        if finding:
            wrong = True
            yield f"{step.name} ({step.op}): {finding}"
    if wrong:
        return  # differing outputs are explained
    outputs = report.outputs
    if outputs.mismatches and not any(step.downstream for step in report.steps):
        yield f"outputs: {outputs.mismatches} of {outputs.elements} values wrong although every step is exact"
    elif unexplained:
        yield (
            f"outputs: wrong by {unexplained:.2g} of their largest value though no sign flipped; "
            f"rounding explains {RUN_TOLERANCE:g}"
        )


def cut_batches(ports: list[PortEntry], inputs: Iterable[Any]) -> Iterator[tuple[np.ndarray, ...]]:
    """Cuts what the caller gave into batches of the artifact's own shape."""
    for item in inputs:
        arrays = item if isinstance(item, tuple | list) else (item,)
        if len(arrays) != len(ports):
            raise InputError(f"the artifact has {len(ports)} inputs, but {len(arrays)} arrays were given together")
        arrays = [_array(array) for array in arrays]
        counts = {_pieces(port, array) for port, array in zip(ports, arrays, strict=True)}
        if len(counts) > 1:
            raise InputError(f"the inputs hold different numbers of samples: {[array.shape[:1] for array in arrays]}")
        for piece in range(counts.pop()):
            yield tuple(
                array[piece * port["shape"][0] : (piece + 1) * port["shape"][0]] if port["shape"] else array
                for port, array in zip(ports, arrays, strict=True)
            )


def _array(value: Any) -> np.ndarray:
    return value.detach().numpy(force=True) if hasattr(value, "detach") else np.asarray(value)


def _pieces(port: PortEntry, array: np.ndarray) -> int:
    """How many batches of this input's shape lie in `array`, one after the other along the first axis."""
    shape = model_shape(port)
    if str(array.dtype) != port["dtype"]:
        raise InputError(f"input '{port['name']}' is {port['dtype']}, but {array.dtype} was given")
    if array.shape == shape:
        return 1
    fits = bool(shape) and array.ndim == len(shape) and array.shape[1:] == shape[1:] and array.shape[0] > 0
    if not fits or array.shape[0] % shape[0]:
        hint = f" (or a multiple of {shape[0]} in the first axis)" if shape else ""
        raise InputError(f"input '{port['name']}' has shape {shape}{hint}, but {array.shape} was given")
    return array.shape[0] // shape[0]


def _check_labels(labels: np.ndarray, predicted: np.ndarray) -> None:
    if labels.shape != predicted.shape:
        raise InputError(f"{labels.size} labels were given for {predicted.size} samples")


def _arguments(step: StepEntry) -> tuple[list[int], list[int]]:
    """Ids of the tensors a step reads, and of those it writes."""
    split = len(step["args"]) - step["outputs"]
    return step["args"][:split], step["args"][split:]


def _rows(step: StepEntry, unit: _Unit) -> list[StepParity]:
    """One row for each value of the model that the step makes."""
    facts = (unit.steps[-1], step["op"], tuple(step["layers"]), unit.exact)
    return [StepParity(*facts, _is_packed(value), unit.downstream, value.step, unit.opt_in) for value in unit.outputs]


def _is_packed(value: StoredValue) -> bool:
    return value.layout is not None and value.levels is None


def _units(version: VersionEntry, values: dict[int, StoredValue]) -> list[_Unit]:
    """One unit a step: with it, the earlier steps that make those of its inputs that stand for no value."""
    units: list[_Unit] = []
    place = _places(version)
    made = _made(version, values)
    maker: dict[_Place, int] = {}
    inexact: set[_Place] = set()
    for index, step in enumerate(version["steps"]):
        reads, writes = _arguments(step)
        needed = {index}
        for id_ in reads:
            if id_ not in values and place[id_] in maker:
                needed.update(units[maker[place[id_]]].steps)
        exact = all(version["steps"][i]["exact"] for i in needed)
        downstream = not exact or any(place[id_] in inexact for id_ in reads)
        inputs = {id_ for i in needed for id_ in _arguments(version["steps"][i])[0] if id_ in values}
        outputs = tuple(values[id_] for id_ in made[index])
        opt_in = next((kind for i in needed if (kind := version["steps"][i].get("opt_in"))), None)
        units.append(_Unit(tuple(sorted(needed)), exact, downstream, tuple(sorted(inputs)), outputs, opt_in))
        for id_ in writes:
            maker[place[id_]] = index
            (inexact.add if downstream else inexact.discard)(place[id_])
    return units


_Place = tuple[str, int]


def _places(version: VersionEntry) -> dict[int, _Place]:
    """Where a tensor lies. Steps are tied by memory, not by id: a reshape is another tensor of the same memory."""
    return {tensor["id"]: (tensor["space"], tensor["offset"]) for tensor in version["tensors"]}


def _made(version: VersionEntry, values: dict[int, StoredValue]) -> list[list[int]]:
    """Of every step, the values it makes: what it writes, or where that is no value, the reshape of it that is one."""
    place = _places(version)
    made: list[list[int]] = []
    maker: dict[_Place, tuple[int, int]] = {}  # place → step, tensor

    def name(id_: int) -> None:
        index, written = maker.get(place[id_], (0, id_))
        if written != id_ and id_ in values and written not in values and id_ not in made[index]:
            made[index].append(id_)

    for index, step in enumerate(version["steps"]):
        reads, writes = _arguments(step)
        for id_ in reads:
            name(id_)
        made.append([id_ for id_ in writes if id_ in values])
        maker.update({place[id_]: (index, id_) for id_ in writes})
    for id_ in version["outputs"]:
        name(id_)
    return made
