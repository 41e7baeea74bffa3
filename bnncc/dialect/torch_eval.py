"""What each Relax operator computes, by the PyTorch function that eager itself runs.

Constant folding and threshold derivation evaluate Relax expressions through `torch_operators.TABLE`, so the values they
bake into an artifact are PyTorch's own, to the last bit. Operators that are not in the table are left alone by both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import tvm
from tvm import relax
from tvm.ir import GenericConst

from bnncc.dialect import torch_windows  # noqa: F401  (its import adds to the table)
from bnncc.dialect.torch_operators import ATTRIBUTES, TABLE

Argument = Any
"""A torch.Tensor, a Python number, a tuple of ints (shapes) or a tuple of tensors (operands of a concatenation)."""


def to_torch(value: GenericConst | tvm.runtime.Tensor) -> torch.Tensor:
    """A constant as a tensor of its own: shape (0-d included) and dtype (bool included) kept."""
    array = (value.value if isinstance(value, GenericConst) else value).numpy()
    return torch.from_numpy(np.array(array))


def to_constant(tensor: torch.Tensor) -> GenericConst:
    """A tensor as a Relax constant: shape and dtype kept, memory contiguous."""
    array = tensor.detach().cpu().contiguous().numpy()
    return relax.const(array, str(array.dtype))


def evaluate(op_name: str, args: Sequence[Argument], attrs: Mapping[str, Any] | Any = None) -> Any:
    """The value of one operator; a tuple of tensors for operators that return several.

    Args:
        op_name: "relax.add", "relax.nn.relu", ….
        args: the operands in the operator's order.
        attrs: the operator's attributes, a mapping or the `attrs` of a Relax call.

    Raises:
        KeyError: an operator outside the table; ask `can_evaluate` first.
    """
    with torch.no_grad():
        return TABLE[op_name](*args, **_Attributes(attrs).of(op_name))


def can_evaluate(call: Any) -> bool:
    """Whether `evaluate_call` has a function for this call (whatever its operands are)."""
    if not isinstance(call, relax.Call) or not isinstance(call.op, tvm.ir.Op) or call.op.name not in TABLE:
        return False
    attributes = _Attributes(call.attrs)
    layouts = (attributes.get(name) for name in ("data_layout", "kernel_layout", "layout", "out_layout"))
    return all(layout in _PLAIN_LAYOUTS for layout in layouts)


def evaluate_call(call: relax.Call, values: Mapping[relax.Var, Any] | None = None) -> Any:
    """The value of a call whose operands are constants or variables found in `values`."""
    arguments = [_argument(argument, values or {}) for argument in call.args]
    return evaluate(call.op.name, arguments, call.attrs)


def evaluate_function(function: relax.Function, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run a Relax function whose every operator is in the table: the meaning of the graph, in PyTorch's arithmetic."""
    result = _argument(function.body.body, evaluate_from(function, dict(zip(function.params, inputs, strict=True))))
    return result if isinstance(result, tuple) else (result,)


def evaluate_from(
    function: relax.Function, known: Mapping[relax.Var, Any], wanted: Sequence[relax.Var] | None = None
) -> dict[relax.Var, Any]:
    """The values of variables of a function, from those of others: at least of `wanted`, or of all that there are.

    Nothing is computed that `known` gives, or that only its definition reads. Raises KeyError where neither the known
    values nor constants lead to a wanted one, and for operators outside the table.
    """
    bindings = [binding for block in function.body.blocks for binding in block.bindings]
    needed = None if wanted is None else set(wanted) - known.keys()
    if needed is not None:
        for binding in reversed(bindings):
            if binding.var in needed:
                needed.update(var for var in _reads(binding.value) if var not in known)
    values = dict(known)
    for binding in bindings:
        if binding.var not in values and (needed is None or binding.var in needed):
            value = binding.value
            values[binding.var] = (
                evaluate_call(value, values) if isinstance(value, relax.Call) else _argument(value, values)
            )
    return values


def _reads(expression: Any) -> list[relax.Var]:
    """The variables that an expression in A-normal form reads."""
    if isinstance(expression, relax.Var):
        return [expression]
    if isinstance(expression, relax.TupleGetItem):
        return _reads(expression.tuple_value)
    parts = getattr(expression, "args", getattr(expression, "fields", ()))
    return [var for part in parts for var in _reads(part)]


def _argument(expression: Any, values: Mapping[relax.Var, Any]) -> Argument:
    if isinstance(expression, GenericConst):
        return to_torch(expression)
    if isinstance(expression, relax.ShapeExpr):
        return tuple(int(extent) for extent in expression.values)
    if isinstance(expression, relax.Tuple):
        return tuple(_argument(field, values) for field in expression.fields)
    if isinstance(expression, relax.TupleGetItem):
        return _argument(expression.tuple_value, values)[expression.index]
    if isinstance(expression, tvm.tirx.IntImm | tvm.tirx.FloatImm):
        return expression.value
    return values[expression]


_PLAIN_LAYOUTS = {None, "", "NCW", "NCHW", "NCDHW", "OIW", "OIHW", "OIDHW", "IOW", "IOHW"}


class _Attributes:
    """Attributes by name, from a mapping or from a Relax call, as plain Python values."""

    def __init__(self, attrs: Any) -> None:
        self._attrs = attrs

    def get(self, name: str) -> Any:
        if self._attrs is None:
            return None
        if isinstance(self._attrs, Mapping):
            return _plain(self._attrs.get(name))
        return _plain(getattr(self._attrs, name, None))

    def of(self, op_name: str) -> dict[str, Any]:
        return {name: self.get(name) for name in ATTRIBUTES.get(op_name, ())}


def _plain(value: Any) -> Any:
    if isinstance(value, tvm.tirx.IntImm | tvm.tirx.FloatImm):
        return value.value
    if isinstance(value, str) or value is None:
        return value
    if isinstance(value, Sequence) or type(value).__name__ == "Array":
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | float):
        return value
    return str(value)
