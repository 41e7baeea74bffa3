"""For kernels that are written as loops and vectors, where schedules cannot say what they do with the rest of a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import tvm_ffi
from tvm import tirx
from tvm.tirx.script.builder import ir as T


def substituted(expr: Any, block: Any, at: tuple[Any, ...]) -> Any:
    """An expression of a block at another place of the block's axes."""
    places = (tirx.const(index, "int32") if isinstance(index, int) else index for index in at)
    return placed(expr, dict(zip((iv.var for iv in block.iter_vars), places, strict=True)))


def placed(expr: Any, values: dict[Any, Any]) -> Any:
    """An expression with others in the place of some of its variables."""
    return tvm_ffi.structural_map(expr, (tirx.Var, lambda var: values.get(var, var)))


def parts(length: int, lanes: int) -> Iterator[tuple[int, int]]:
    """(start, size) of vectors of powers of two, at most `lanes`, that make up a length."""
    at = 0
    while at < length:
        while lanes > length - at:
            lanes //= 2
        yield at, lanes
        at += lanes


def over(length: int, lanes: int, body: Callable[[Any, int], None]) -> None:
    """`body(start, size)` for whole vectors in a loop, and for the parts of the rest."""
    if whole := length // lanes:
        with T.serial(0, whole) as v:
            body(v * lanes, lanes)
    for at, size in parts(length % lanes, lanes):
        body(whole * lanes + at, size)


def store(buffer: Any, value: Callable[[Any], Any], at: Callable[[Any], list[Any]], start: Any, size: int) -> None:
    """`buffer[at(i)] = value(i)` for the `size` indices of one vector."""
    if size == 1:
        T.buffer_store(buffer, value(start), at(start))
        return
    with T.vectorized(0, size) as lane:
        T.buffer_store(buffer, value(start + lane), at(start + lane))
