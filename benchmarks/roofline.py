"""How long the steps of an artifact would take if nothing but the machine's limits held them up.

A step takes at least its multiply-accumulates by the limit of their kind, and at least its bytes by the bandwidth of
where they lie; whichever is larger is its bound. The network's roofline is the sum of the bounds of the steps that
compute; steps that only move values (permutations, padding, concatenation) are the compiler's own and have none.

Where bytes lie: what a step reads and writes beside its weights was just written, so it is in the second-level cache if
the step's tensors fit there, else in the next one that holds them. Weights were last read one run ago; they are where
the network's weights and arena fit together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bnncc.runtime.manifest import LayerEntry, StepEntry, VersionEntry, tensor_bytes

_MOVES = frozenset(("permute_dims", "pad", "concat", "reshape", "copy", "pad_bits", "strided_slice", "split"))
_MULTIPLIES = re.compile(r"conv|dense|linear|matmul")
#: A step's tensors are never here: the network's other tensors passed through the first cache meanwhile.
_TOO_NEAR = "L1"


@dataclass(frozen=True)
class Work:
    """What a step has to do. macs: by the pair of bits of activation and weight."""

    step: int
    kernel: str
    op: str
    layers: tuple[str, ...]
    macs: Mapping[tuple[int, int], int]
    activation_bytes: int
    weight_bytes: int

    @property
    def moves(self) -> bool:
        """Whether it computes nothing."""
        return not self.macs and set(self.op.split("+")) <= _MOVES


@dataclass(frozen=True)
class Bound:
    """Seconds that a step takes at least."""

    compute: float
    memory: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory)


def work_of(version: VersionEntry) -> list[Work]:
    """The work of every step, in order."""
    macs: list[dict[tuple[int, int], int]] = [{} for _ in version["steps"]]
    for layer in version["layers"]:
        share = macs[_step_of(layer, version["steps"], macs)]
        bits = (layer["activation_bits"], layer["weight_bits"])
        share[bits] = share.get(bits, 0) + layer["macs"]
    sizes = [tensor_bytes(t["shape"], t["dtype"]) for t in version["tensors"]]
    constant = [t["space"] in ("weights", "persistent") for t in version["tensors"]]
    return [
        Work(
            index,
            step["kernel"],
            step["op"],
            tuple(step["layers"]),
            macs[index],
            sum(sizes[i] for i in step["args"] if not constant[i]),
            sum(sizes[i] for i in step["args"] if constant[i]),
        )
        for index, step in enumerate(version["steps"])
    ]


def _step_of(layer: LayerEntry, steps: list[StepEntry], taken: list[dict[tuple[int, int], int]]) -> int:
    """The step that multiplies for a layer. One whose module runs twice takes the next step each time."""
    of_layer = [i for i, step in enumerate(steps) if layer["path"] in step["layers"]]
    multiply = [i for i in of_layer if _MULTIPLIES.search(steps[i]["op"])]
    if not of_layer:
        raise ValueError(f"no step computes layer {layer['path']}")
    return next((i for i in multiply if not taken[i]), (multiply or of_layer)[-1])


def bound(work: Work, version: VersionEntry, limits: Mapping[str, Any], isa: str) -> Bound:
    """The bound of a step of an artifact on one core, by `benchmarks.limit.measure`'s limits."""
    rates = {kind: 1e9 * entry["gops"] for kind, entry in limits["arithmetic"][isa].items()}
    compute = sum(2 * macs / _rate(bits, rates) for bits, macs in work.macs.items())
    everything = version["weights_bytes"] + version["arena_bytes"] + version["persistent_bytes"]
    near = work.activation_bytes / _bandwidth(work.activation_bytes, limits["memory"])
    return Bound(compute, near + work.weight_bytes / _bandwidth(everything, limits["memory"]))


def _rate(bits: tuple[int, int], rates: Mapping[str, float]) -> float:
    """Operations a second on operands of so many bits: by planes of bits or by products of bytes, if not floats."""
    if max(bits) > 8:
        return rates["float"]
    return max(rates["binary"] / (bits[0] * bits[1]), rates["int8"])


def _bandwidth(size: int, memory: Mapping[str, Mapping[str, Any]]) -> float:
    """Bytes a second from the nearest level that holds `size` bytes, reading or copying, whichever is faster."""
    levels = (entry for name, entry in memory.items() if name != _TOO_NEAR)
    level = next(entry for entry in levels if entry["bytes"] is None or entry["bytes"] >= size)
    return 1e9 * float(max(level["read_gbs"], level["copy_gbs"]))


def total(works: list[Work], version: VersionEntry, limits: Mapping[str, Any], isa: str) -> dict[str, float]:
    """Seconds: "all" is the roofline of the network, "layers" the part of the steps that multiply."""
    bounds = [(work, bound(work, version, limits, isa).seconds) for work in works]
    return {
        "all": sum(seconds for work, seconds in bounds if not work.moves),
        "layers": sum(seconds for work, seconds in bounds if work.macs),
    }
