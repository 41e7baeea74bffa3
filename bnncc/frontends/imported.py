"""What every front end makes of a model: one Relax function, its ports, and the errors that say why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from tvm import IRModule

from bnncc.runtime.errors import BnnccError

ORIGINS_ATTR = "bnncc.origins"
"""Attribute of `main`: `Imported.origins`."""


class ExportError(BnnccError):
    """The model cannot be turned into one static graph."""


class UnsupportedOperator(BnnccError):
    """The model uses operators that bnncc does not compile.

    refused: name of a node of the graph → the reason, as far as they are known.
    """

    def __init__(self, message: str, refused: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.refused = dict(refused or {})


@dataclass(frozen=True)
class Port:
    """An input or output of the model: name, static shape, dtype by its NumPy name ("float32")."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Imported:
    """A model in Relax.

    mod: IRModule with one function `main`, float semantics, NCHW, parameters as constants. Several outputs are a tuple.
    origins: variable name → (name of the node whose value it is, module path; '' is the model itself). A node's value
        carries the node's name; helper bindings carry it with a suffix `__1`, `__2`, … and have no node ('').
    inputs: in the order of the model's signature. outputs: in the order eager returns them, nested ones flattened.
    """

    mod: IRModule
    origins: dict[str, tuple[str, str]]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
