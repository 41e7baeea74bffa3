"""What a conversion of one ONNX operator has to work with, and the table of them all.

A converter gets a `Node` and returns the expression of its output, or one per output (None for an output it cannot
make). What stands in `CONVERTERS` is what bnncc supports, and every entry is compared with ONNX Runtime, or with
`onnx_evaluator` for QONNX, in tests/frontends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax import op as R

from bnncc.frontends.converter import DTYPES, Unsupported, is_zero
from bnncc.frontends.onnx_evaluator import QONNX_DOMAINS
from bnncc.frontends.onnx_graph import node_path

#: The dtypes that an artifact has arithmetic for, by their NumPy names.
SUPPORTED_DTYPES = frozenset(DTYPES.values())


class Node:
    """One node of the graph with its operands converted.

    inputs: expressions, None for an optional input that is not there; missing ones at the end are simply missing.
    constants: the values of those inputs that do not depend on the model's inputs.
    """

    def __init__(
        self,
        proto: onnx.NodeProto,
        opset: int,
        inputs: Sequence[relax.Expr | None],
        constants: Sequence[np.ndarray | None],
        emit: Callable[[relax.Expr], relax.Var],
    ) -> None:
        self.proto = proto
        self.opset = opset
        self.inputs = list(inputs)
        self.constants = list(constants)
        self.emit = emit
        self.path = node_path(proto)
        self.outputs = len(proto.output)
        self.attributes = {a.name: _plain(helper.get_attribute_value(a)) for a in proto.attribute}

    def attr(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def has(self, index: int) -> bool:
        return index < len(self.inputs) and self.inputs[index] is not None

    def input(self, index: int = 0) -> relax.Expr:
        """An operand as an expression."""
        if not self.has(index):
            raise Unsupported(f"its input {index} is missing")
        return self.inputs[index]

    def constant(self, index: int, what: str) -> np.ndarray:
        """The value of an operand that must be known when compiling; `what` names it to the user."""
        if not self.has(index):
            raise Unsupported(f"it has no {what}")
        value = self.constants[index]
        if value is None:
            raise Unsupported(f"its {what} is computed from the model's input; a constant one is supported")
        return value

    def setting(self, name: str, index: int) -> Any:
        """Integers that old operator sets have as an attribute, newer ones as a constant input; None for neither."""
        if name in self.attributes:
            return self.attributes[name]
        return self.constant(index, name).tolist() if self.has(index) else None

    def only_output(self, index: int, what: str) -> None:
        """Refuses a second output that is used."""
        if self.outputs > index and self.proto.output[index]:
            raise Unsupported(f"its output '{what}' is used; only the first output is supported")

    def cast(self, value: relax.Expr, dtype: str) -> relax.Expr:
        if dtype_of(value) == dtype:
            return value
        if dtype == "bool":
            return self.emit(R.logical_not(self.emit(is_zero(value))))
        return self.emit(R.astype(value, dtype))

    def bound(self, value: relax.Expr) -> relax.Expr:
        """An expression that may be an operand, and whose shape is known."""
        return self.emit(value) if isinstance(value, relax.Call) else value

    def together(self, *operands: relax.Expr) -> list[relax.Expr]:
        """Operands of an elementwise operator: constants of one element as scalars, variables of equal rank."""
        rank = max(len(shape_of(value)) for value in operands)
        return [self._aligned(value, rank) for value in operands]

    def _aligned(self, value: relax.Expr, rank: int) -> relax.Expr:
        shape = shape_of(value)
        if isinstance(value, GenericConst):
            lone = rank > 0 and shape and np.prod(shape) == 1
            return relax.const(value.value.numpy().reshape(()), dtype_of(value)) if lone else value
        if len(shape) == rank:
            return value
        return self.emit(R.reshape(value, (1,) * (rank - len(shape)) + shape))


Converter = Callable[[Node], Any]
CONVERTERS: dict[str, Converter] = {}


def converts(*names: str, domains: Sequence[str] = ("",)) -> Callable[[Converter], Converter]:
    """Registers a converter; operators of other domains stand in the table as `domain::name`."""

    def register(function: Converter) -> Converter:
        for name in names:
            for domain in domains:
                CONVERTERS[f"{domain}::{name}" if domain else name] = function
        return function

    return register


def qonnx(*names: str) -> Callable[[Converter], Converter]:
    return converts(*names, domains=QONNX_DOMAINS)


def operator_name(node: onnx.NodeProto) -> str:
    """The key of a node's operator in `CONVERTERS`."""
    return node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def shape_of(value: relax.Expr) -> tuple[int, ...]:
    return tuple(int(extent) for extent in value.ty.shape)


def dtype_of(value: relax.Expr) -> str:
    return str(value.ty.dtype)


def float32(value: Any) -> relax.Expr:
    """A constant of float32."""
    return relax.const(np.asarray(value, "float32"), "float32")


def _plain(value: Any) -> Any:
    return value.decode() if isinstance(value, bytes) else value
