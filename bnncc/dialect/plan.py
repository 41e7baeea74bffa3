"""The plan: a compiled network as a straight line of kernel calls over planned memory.

The passes end in a `Plan`; code emission, linking, the manifest and the memory report read nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Space = Literal["input", "output", "arena", "persistent", "weights"]


@dataclass(frozen=True)
class Value:
    """Which value of the user's model a tensor holds, and how it is laid out.

    node: name of the node in the decomposed torch.export graph.
    order: axis permutation; axis i of the stored tensor is axis `order[i]` of the node's value. None: as it is.
    bits: for packed tensors, `BitLayout.to_json()` and the spatial padding around the value; None for plain arrays.
        With `levels`, the values that the planes count up, ascending.
    step: for quantized values, the distance of two neighbouring ones; None for all others.
    """

    node: str
    order: tuple[int, ...] | None = None
    bits: dict[str, Any] | None = None
    step: float | None = None


@dataclass(frozen=True)
class Tensor:
    """One buffer of the plan.

    space: "input"/"output" (the caller's memory, `offset` is the index), "arena" (scratch, reused between steps),
    "persistent" (filled by the init steps, kept for the life of an instance), "weights" (constant, in the artifact).
    offset: bytes from the start of the space, a multiple of 64.
    """

    id: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    space: Space
    offset: int
    value: Value | None = None


@dataclass(frozen=True)
class Step:
    """One kernel call. `args` are tensor ids in the kernel's parameter order, the `outputs` last of them written.

    opt_in: "int8", "tf32" or "float16" where it computes a layer that its user opted in to quantize; None: as the model
    says.
    """

    kernel: str
    op: str
    args: tuple[int, ...]
    outputs: int
    layers: tuple[str, ...]
    exact: bool
    opt_in: str | None = None


@dataclass(frozen=True)
class Layer:
    """A row of the per-layer table: widths in bits (32 for float), multiply-accumulates of a run, bytes of weights."""

    path: str
    op: str
    output_shape: tuple[int, ...]
    activation_bits: int
    weight_bits: int
    macs: int
    weight_bytes: int


@dataclass(frozen=True)
class QuantizedLayer:
    """A float layer that computes with fewer bits because its user opted in.

    layer: variable of its sum, before a bias. path: of its module. low, high: the range that its input is rounded in;
    None where its input is quantized by the model. form: "int8"; or "tf32", "float16": floats of fewer bits, which need
    no range.
    """

    layer: str
    path: str
    low: float | None
    high: float | None
    form: str = "int8"


@dataclass(frozen=True)
class Plan:
    """inputs, outputs: tensor ids in the order of the model's signature. `init` runs once, when an instance is made."""

    name: str
    tensors: tuple[Tensor, ...]
    init: tuple[Step, ...]
    steps: tuple[Step, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    arena_bytes: int
    persistent_bytes: int
    weights: bytes
    layers: tuple[Layer, ...] = field(default=())
