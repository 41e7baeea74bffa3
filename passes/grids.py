"""Which values lie on a grid: quantized activations and weights, whatever their quantizer is spelled like.

    round(clip(x, 0, 1) · n) / n                     n + 1 values, 1/n apart (DoReFa; PACT with its own bound)
    (clip(round(x / s) + z, lo, hi) − z) · s         hi − lo + 1 values, s apart (torch.ao)
    bnncc.sign(x)                                    −1 and +1
    bnncc.quantize(x, s)                             its levels

An expression that holds integers between two bounds is a root: bounds are followed through clamps and any monotone
arithmetic with numbers. What follows a root, element by element and with numbers only, is evaluated by torch at each of
these integers, so that the values found are eager's own, whatever their last bits are. They are a grid if they are
evenly spaced and 0 lies on one of their points, or halfway between two: then a value is an integer times a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tvm import relax

from bnncc.dialect import torch_eval
from bnncc.dialect.ops import attributes, dtype_of, op_name
from bnncc.passes.rewriter import is_const, numpy_of, scalar_of
from bnncc.runtime.bits import Levels

#: The most values of an activation: 8 bits.
MOST_LEVELS = 256

# How far a value may lie from its point on the grid, in steps: rounding errors of a few ulp.
_SLACK = 1e-3

# So few values may leave gaps that are no multiples of one of them: every scale is tried.
_FEW_VALUES = 64

# The same for a weight, as a share of the largest: its values are few, and so are the roundings that gave them.
_WEIGHT_SLACK = 8 * 2.0**-24

_ROUNDINGS = {"round", "floor", "ceil", "trunc"}
_SCALAR_ARITHMETIC = {"add", "subtract", "multiply", "divide", "maximum", "minimum"}
_MONOTONE = _SCALAR_ARITHMETIC | _ROUNDINGS | {
    "clip", "nn.relu", "tanh", "sigmoid", "negative", "astype", "bnncc.scale_shift"
}  # fmt: skip
#: Operators that move values or choose among them.
MOVES = {
    "nn.max_pool1d", "nn.max_pool2d", "nn.max_pool3d", "reshape", "permute_dims", "strided_slice", "broadcast_to",
    "flip", "bnncc.unfold_depth",
}  # fmt: skip


@dataclass(frozen=True)
class Grid:
    """The values of an activation: ``scale · (first + every · i)`` for i = 0, 1, … but for rounding.

    values: as eager has them, float32, ascending. every: 1, or 2 where 0 lies halfway between two values (bipolar).
    """

    values: np.ndarray
    scale: float
    first: int
    every: int

    @property
    def bits(self) -> int:
        return max(1, (len(self.values) - 1).bit_length())

    @property
    def step(self) -> float:
        """The distance of two neighbours."""
        return self.scale * self.every

    @property
    def exact(self) -> bool:
        """Whether every value is the integer times the scale, with nothing rounded away."""
        integers = self.first + self.every * np.arange(len(self.values))
        return _is_power_of_two(self.scale) and bool((self.values == self.scale * integers).all())


class Grids:
    """The grids of a function's variables. `definition`: variable → expression, as in `Rewriter`."""

    def __init__(self, definition: dict[Any, Any]):
        self.definition = definition
        self._known: dict[Any, Grid | None] = {}

    def of(self, var: Any) -> Grid | None:
        """The grid that a variable's values lie on, if there is one of at most `MOST_LEVELS` values."""
        if var not in self._known:
            values = self._values(var, MOST_LEVELS)
            self._known[var] = None if values is None else _grid(values)
        return self._known[var]

    def step(self, var: Any) -> float | None:
        """The largest distance of two neighbouring values of a quantized variable; also where there are many."""
        call = self.definition.get(var)
        if not isinstance(call, relax.Call) or not isinstance(var.ty, relax.TensorType):
            return None
        if dtype_of(var) != "float32":
            quantized = op_name(call) == "astype" and "int" in dtype_of(var) and self._is_integer(call.args[0])
            return 1.0 if quantized else None
        values = self._values(var, None)
        return None if values is None or len(values) < 2 else float(np.abs(np.diff(values, axis=0)).max())

    def _values(self, var: Any, most: int | None) -> np.ndarray | None:
        """What a variable is at each integer of its root, [integers] or [integers, …]; None if it has no root.

        most: the most integers there may be; without it two in the middle stand for all.
        """
        chain: list[Any] = []
        while isinstance(var, relax.Var):
            call: Any = self.definition.get(var)
            name = op_name(call)
            signs = _signs(call)
            if signs is not None:
                if most is None:
                    return None
                return self._evaluate(chain, var, torch.tensor(signs))
            if (levels := _levels(call)) is not None:
                return self._evaluate(chain, var, torch.from_numpy(levels))
            if self._is_integer(var) and (bounds := self._bounds(var)) is not None:
                low, high = bounds
                if most is None:
                    low = high = (low + high) // 2
                    high += 1
                if high - low + 1 > (most or 2):
                    return None
                return self._evaluate(chain, var, torch.arange(low, high + 1).float())
            if name in MOVES or name == "bnncc.insert_zeros":
                chain.append((var, None))
            elif name in _MONOTONE and self._operand(call, numbers=most is not None) is not None:
                chain.append((var, call))
            else:
                return None
            var = call.args[0]
        return None

    def _evaluate(self, chain: list[Any], root: Any, domain: torch.Tensor) -> np.ndarray | None:
        values = domain
        source = root
        for var, call in reversed(chain):
            if call is not None:
                rank = max((numpy_of(a).ndim for a in call.args if is_const(a)), default=0)
                shaped = values.reshape(-1, *[1] * (rank if values.ndim == 1 else values.ndim - 1))
                values = torch_eval.evaluate_call(call, {source: shaped if values.ndim == 1 else values})
            elif op_name(self.definition[var]) == "bnncc.insert_zeros" and not (values == 0).any():
                return None
            source = var
        if values.shape[0] != len(domain) and values.numel() != len(domain):
            return None
        result = values.numpy()
        return result.reshape(-1) if result.size == len(domain) else result

    def _operand(self, call: Any, *, numbers: bool) -> Any | None:
        """The variable that an operator reads beside numbers (or, if not `numbers`, beside constants)."""
        first, *others = call.args
        if not isinstance(first, relax.Var) or not torch_eval.can_evaluate(call):
            return None
        for other in others:
            if not isinstance(other, relax.Expr) or scalar_of(other) is not None:
                continue
            if not is_const(other) or (numbers and numpy_of(other).size != 1):
                return None
        return first

    def _is_integer(self, var: Any) -> bool:
        """Whether a variable holds integers, as floats."""
        call: Any = self.definition.get(var) if isinstance(var, relax.Var) else None
        name = op_name(call)
        if name in _ROUNDINGS:
            return True
        if name == "astype":
            return "int" in dtype_of(var) or self._is_integer(call.args[0])
        if name == "clip" or name in ("add", "subtract", "maximum", "minimum"):
            others = [scalar_of(a) for a in call.args[1:]]
            return self._is_integer(call.args[0]) and all(o is not None and o == round(o) for o in others)
        return False

    def _bounds(self, var: Any) -> tuple[int, int] | None:
        """The least and the greatest value of a variable, if both are finite."""
        low, high = self._interval(var, 32)
        return (int(low), int(high)) if np.isfinite([low, high]).all() and low <= high else None

    def _interval(self, var: Any, depth: int) -> tuple[float, float]:
        everything = (-np.inf, np.inf)
        call: Any = self.definition.get(var) if isinstance(var, relax.Var) else None
        if (signs := _signs(call)) is not None:
            return signs[0], signs[-1]
        name = op_name(call)
        if depth == 0 or (name not in _MONOTONE and name not in MOVES):
            return everything
        inner = self._interval(call.args[0], depth - 1)
        if name in MOVES:
            return everything if "pad_value" in attributes(call) else inner
        if self._operand(call, numbers=True) is None:
            return everything
        ends = torch_eval.evaluate_call(call, {call.args[0]: torch.tensor(inner)}).double().reshape(-1)
        return everything if ends.isnan().any() else (float(ends.min()), float(ends.max()))


def _signs(call: Any) -> list[float] | None:
    name = op_name(call)
    if name == "bnncc.sign":
        return [-1.0, 0.0, 1.0] if attributes(call)["predicate"] == "ternary" else [-1.0, 1.0]
    return [-1.0, 1.0] if name in ("bnncc.threshold", "bnncc.lookup") else None


def _levels(call: Any) -> np.ndarray | None:
    """The values that an explicit quantizer gives."""
    if op_name(call) != "bnncc.quantize":
        return None
    a = attributes(call)
    return Levels.affine(float(numpy_of(call.args[1])), a["first"], a["most"]).values


def _grid(values: np.ndarray) -> Grid | None:
    if values.ndim != 1 or len(values) < 2 or values.dtype != np.float32 or not (np.diff(values) > 0).all():
        return None
    wide = values.astype("float64")
    index = np.arange(len(values))
    step = (wide[-1] - wide[0]) / (len(values) - 1)
    if np.abs(wide - (wide[0] + step * index)).max() > _SLACK * step:
        return None
    for every in (1, 2):
        scale = step / every
        first = round(wide[0] / scale)
        points = first + every * index
        furthest = int(np.abs(points).argmax())
        if np.abs(wide / scale - points).max() <= _SLACK:
            return Grid(values, float(wide[furthest] / points[furthest]), first, every)
    return None


def integer_weight(weight: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Splits a weight [O, …] into integers of at most `most` in magnitude, int32, and their scale, float64 [O] (equal
    for all outputs if one scale serves), or None. ``weight = integers · scale`` but for rounding.
    """
    rows = weight.reshape(len(weight), -1).astype("float64")
    if not np.isfinite(rows).all():
        return None
    common = _integers(rows.reshape(1, -1), most)
    if common is not None:
        integers, scale = common
        return integers.reshape(weight.shape), np.repeat(scale, len(weight))
    found = [_integers(row[None], most) for row in rows]
    if any(part is None for part in found):
        return None
    integers = np.concatenate([part[0] for part in found if part]).reshape(weight.shape)
    return integers, np.concatenate([part[1] for part in found if part])


def _integers(row: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray] | None:
    """One scale for [1, K]."""
    values = np.unique(np.abs(row))
    if not values[-1]:
        return np.zeros(row.shape, "int32"), np.ones(1)
    least = values[-1] / (2 * most)
    gaps = np.diff(np.concatenate([[0.0], values]))
    gaps = gaps[gaps > least]  # smaller ones are rounding errors between equal values
    if not len(gaps):
        return None
    scales = [gaps.min() / parts for parts in (1, 2, 3)]
    if len(values) <= _FEW_VALUES:
        scales += [values[-1] / n for n in range(1, most + 1)]
    for scale in scales:
        integers = np.rint(row / scale)
        if np.abs(integers).max() <= most and np.abs(row / scale - integers).max() <= _SLACK * most:
            scale = float((row * integers).sum() / (integers**2).sum())
            if np.abs(row / scale - integers).max() <= _WEIGHT_SLACK * np.abs(integers).max():
                exact = np.float64(np.float32(scale))
                return integers.astype("int32"), np.array([exact if (integers * exact == row).all() else scale])
    return None


def _is_power_of_two(value: float) -> bool:
    return value > 0 and float(np.frexp(value)[0]) == 0.5
