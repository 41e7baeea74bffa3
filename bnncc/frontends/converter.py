"""What a conversion of one ATen operator has to work with, and the table of them all.

A converter gets the operator's arguments by their schema names, defaults filled in, with tensors already converted, and
returns the expression of the value; intermediate results go through `Emitter.emit`. What stands in `CONVERTERS` is what
bnncc supports, and every entry is compared with eager in tests/frontends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx
from tvm import relax
from tvm.relax import op as R

DTYPES = {
    torch.float32: "float32",
    torch.bool: "bool",
    torch.int8: "int8",
    torch.uint8: "uint8",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
}


class Unsupported(Exception):
    """A use of a supported operator that cannot be compiled; the text says what is supported instead."""


class Emitter:
    """What a converter sees of the graph around it: the node, and a way to name intermediate results."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the node's value."""
        return tuple(self.node.meta["val"].shape)

    @property
    def dtype(self) -> str:
        """Dtype of the node's value."""
        return DTYPES[self.node.meta["val"].dtype]

    def emit(self, expression: relax.Expr) -> relax.Var:
        """Bind an intermediate result."""
        raise NotImplementedError

    def value(self, expression: relax.Expr) -> torch.Tensor | None:
        """What an expression of constants alone evaluates to; None for anything that depends on the inputs."""
        raise NotImplementedError

    def cast(self, value: Any, dtype: str) -> relax.Expr:
        """A tensor or a Python number as a Relax expression of a dtype."""
        if not isinstance(value, relax.Expr):
            return relax.const(value, dtype)
        if value.ty.dtype == dtype:
            return value
        if dtype == "bool":
            return self.emit(R.logical_not(self.emit(is_zero(value))))
        return self.emit(R.astype(value, dtype))

    def operands(self, *values: Any) -> list[relax.Expr]:
        """Operands of a comparison in the dtype that PyTorch promotes them to."""
        samples: list[Any] = [arg.meta["val"] if isinstance(arg, fx.Node) else arg for arg in self.node.args[:2]]
        dtype = torch.result_type(*samples)
        if dtype not in DTYPES:
            raise Unsupported(f"it compares as {str(dtype).removeprefix('torch.')}; use float32 or integers")
        return [self.cast(value, DTYPES[dtype]) for value in values]


Converter = Callable[[Emitter, Any], Any]
CONVERTERS: dict[str, Converter] = {}


def converts(*names: str) -> Callable[[Converter], Converter]:
    def register(function: Converter) -> Converter:
        for name in names:
            CONVERTERS[name] = function
        return function

    return register


def is_zero(x: relax.Expr) -> relax.Expr:
    """False at NaN, as PyTorch has it; TVM's own `!=` and its casts to bool take NaN for zero."""
    return R.equal(x, relax.const(0, str(x.ty.dtype)))


def bind_arguments(node: fx.Node, env: dict[fx.Node, Any]) -> SimpleNamespace:
    """A node's arguments by the names of the operator's schema, defaults filled in, nodes replaced by their values."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound: dict[str, Any] = {}
    positional = iter(node.args)
    for argument in schema.arguments:
        if argument.name in node.kwargs:
            value: Any = node.kwargs[argument.name]
        elif argument.kwarg_only:
            value = argument.default_value
        else:
            value = next(positional, argument.default_value)
        bound[argument.name] = fx.node.map_arg(value, lambda source: env.get(source))
    return SimpleNamespace(**bound)


@contextmanager
def building_main(builder: relax.BlockBuilder, parameters: Sequence[relax.Var]) -> Iterator[None]:
    """The scope of a function `main`. An error inside ends the function first: TVM warns on stderr of open ones."""
    failure = None
    with builder.function("main", list(parameters)):
        try:
            yield
        except Exception as error:
            failure = error
            builder.emit_func_output(relax.Tuple([]))
    if failure is not None:
        raise failure
