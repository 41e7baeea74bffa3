"""Every spelling of a sign becomes one operator.

    s = sign(x); e = equal(s, 0); y = where(e, 1, s)          y = bnncc.sign(x, predicate="not_lt")
    y = where(x > 0, 1, -1)                            -->    y = bnncc.sign(x, predicate="gt")
    y = 2 * astype(x >= 0) - 1                                y = bnncc.sign(x, predicate="ge")
    y = sign(clip(x, -1, 1))                                  y = bnncc.sign(x, predicate="ternary")
    y = (where(x > 0, 1, -1) - x) + x                         y = bnncc.sign(x, predicate="gt", straight_through=1)
    y = (alpha * sign(w) - clip(w)) + clip(w)                 y = bnncc.sign(w, straight_through=1) * alpha
    y = (round(v) - v) + v with v = clip(x)                   y = round(v)

First in the pipeline: every later pass knows one form only. It must precede constant folding, because the
straight-through spelling of a scaled weight rounds: folded as written it would no longer be ±alpha. (Without a scale
nothing rounds as long as |x| ≤ 2²⁴, where float32 holds x ± 1; beyond, eager gives 0 or NaN, and this pass gives ±1.)
The last line is no sign, but LSQ's spelling of a rounding; between finite bounds it rounds nothing either: round(v) − v
is a multiple of v's last bit and at most ½.

How: an expression that reads x only through `sign`, `isnan` and comparisons with zero is constant on each of five
classes of x (negative, −0, +0, positive, NaN). The pass carries that table of five values through the graph, evaluated
by torch, and an expression whose table equals a predicate's is that predicate. Clamps around zero and tanh keep the
class, so that a sign behind them reads x itself.

What declines: comparisons with anything but zero; tables that are no ±1 quantizer ({0, 1} masks, scaled signs: their
factor stays a multiplication); spellings that give ±1 everywhere but make something else of NaN, such as
sign(x).masked_fill(x == 0, 1), whose NaN becomes 0: no bit can hold that, so they stay floats, exact but slow.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from tvm import relax
from tvm_ffi import structural_equal

from bnncc.dialect import torch_eval
from bnncc.dialect.ops import call, dtype_of, is_call, op_name, shape_of
from bnncc.passes.rewriter import Rewriter, is_const, module_pass, numpy_of, scalar_of

# One x of each class: negative, −0, +0, positive, NaN.
_CLASSES = (-0.5, -0.0, 0.0, 0.5, math.nan)

_TABLES = {
    (-1, 1, 1, 1, 1): "not_lt",
    (-1, -1, -1, 1, -1): "gt",
    (-1, 1, 1, 1, -1): "ge",
    (-1, -1, -1, 1, 1): "not_le",
    (-1, 0, 0, 1, 0): "ternary",
}

_COMPARISONS = {"equal", "not_equal", "greater", "greater_equal", "less", "less_equal"}

# Elementwise operators through which a table may pass.
_PASS_THROUGH = _COMPARISONS | {
    "add", "subtract", "multiply", "divide", "negative", "where", "astype", "abs", "sign", "maximum", "minimum",
    "logical_not", "logical_and", "logical_or", "full_like", "ones_like", "zeros_like", "clip", "isnan",
}  # fmt: skip


# x, an expression's values on its five classes, and whether a straight-through rounding was dropped.
_Table = tuple[Any, torch.Tensor, bool]


class _Canonicalize(Rewriter):
    def begin(self) -> None:
        self.tables: dict[Any, _Table] = {}
        # variable → the variable whose sign class it shares
        self.same_class: dict[Any, Any] = {}

    def rewrite(self, var: Any, value: Any) -> Any | None:
        old = self.definition[var]
        name = op_name(old)
        if name is None:
            return None
        if _keeps_class(old):
            self.same_class[var] = self.class_of(old.args[0])
        if (scaled := self.scaled_straight_through(old)) is not None:
            return scaled
        if (rounding := self.straight_through_rounding(old)) is not None:
            return self.replaced(rounding)
        table = self.straight_through(old) or self.table(name, old)
        if table is None:
            return None
        self.tables[var] = table
        x, values, rounded = table
        predicate = _TABLES.get(tuple(values.tolist())) if values.is_floating_point() else None
        if predicate is None or dtype_of(var) != dtype_of(x) or shape_of(var) != shape_of(x):
            self.explain(var, values)
            return None
        attrs = {"straight_through": 1} if rounded else {}
        return call("sign", [self.replaced(x)], predicate=predicate, **attrs)

    def class_of(self, expr: Any) -> Any:
        return self.same_class.get(expr, expr)

    def table(self, name: str, old: relax.Call) -> _Table | None:
        if name not in _PASS_THROUGH:
            return None
        args, root, rounded = [], None, False
        for arg in old.args:
            if (number := self.constant(arg)) is not None:
                args.append(number)
                continue
            if not isinstance(arg, relax.Var) and not is_const(arg):
                return None
            source, values, dropped = self.tables.get(arg, (self.class_of(arg), None, False))
            if values is None:
                if "float" not in dtype_of(arg) or not self.reads_only_class(name, old, arg):
                    return None
                values = torch.tensor(_CLASSES, dtype=getattr(torch, dtype_of(arg)))
            if root is not None and not source.same_as(root):
                return None
            root, rounded = source, rounded or dropped
            args.append(values)
        if root is None or not torch_eval.can_evaluate(old):
            return None
        return root, torch_eval.evaluate(f"relax.{name}", args, old.attrs).expand(len(_CLASSES)), rounded

    def constant(self, expr: Any) -> torch.Tensor | float | None:
        """The one value an operand has everywhere: of a literal, a constant of one element, `full`, or its negative."""
        if is_const(expr) and numpy_of(expr).size == 1:
            return torch.from_numpy(numpy_of(expr).copy()).reshape(())
        definition = self.definition.get(expr) if isinstance(expr, relax.Var) else None
        if is_call(definition, "full") or is_call(definition, "full_like"):
            value = self.constant(definition.args[1])
            dtype = getattr(torch, dtype_of(expr))
            return value.to(dtype) if isinstance(value, torch.Tensor) else None
        if is_call(definition, "negative"):
            value = self.constant(definition.args[0])
            return None if value is None else -value
        return scalar_of(expr)

    def reads_only_class(self, name: str, old: relax.Call, arg: Any) -> bool:
        """Whether the result depends on `arg` through its class alone."""
        if name in ("sign", "isnan", "full_like", "ones_like", "zeros_like"):
            return True
        others = [self.constant(a) for a in old.args if not a.same_as(arg)]
        return name in _COMPARISONS and len(others) == 1 and others[0] is not None and float(others[0]) == 0

    def straight_through(self, old: relax.Call) -> _Table | None:
        """(s − v) + v with s a table: s, but for eager's rounding."""
        found = self.around_rounding(old)
        if found is None or found not in self.tables:
            return None
        x, values, _ = self.tables[found]
        return x, values, True

    def scaled_straight_through(self, old: relax.Call) -> relax.Call | None:
        """(s · alpha − v) + v, the weight of ReActNet and Bi-Real Net: s · alpha, but for eager's rounding."""
        product = self.definition.get(self.around_rounding(old))
        if not is_call(product, "multiply"):
            return None
        for index, (s, alpha) in enumerate((product.args, reversed(product.args))):
            x, values, _ = self.tables.get(s, (None, None, False))
            predicate = None if values is None else _TABLES.get(tuple(values.tolist()))
            if predicate is not None and dtype_of(s) == dtype_of(x) and shape_of(s) == shape_of(x):
                sign = self.emit(call("sign", [self.replaced(x)], predicate=predicate, straight_through=1), "sign")
                factors = [sign, self.replaced(alpha)]
                return relax.Call(product.op, factors[::-1] if index else factors, product.attrs)
        return None

    def straight_through_rounding(self, old: relax.Call) -> Any | None:
        """The variable of round(v), where the call is (round(v) − v) + v and v has finite bounds."""
        found = self.around_rounding(old)
        rounding = self.definition.get(found)
        if (
            found is None
            or not is_call(rounding, "round")
            or not any(self.same(rounding.args[0], arg) for arg in old.args)
        ):
            return None
        clamp = self.definition.get(rounding.args[0])
        if not is_call(clamp, "clip") or not all(map(_is_finite, clamp.args[1:])):
            self.log.debug("CanonicalizeSign: %s stays a sum: it makes NaN of what is not clamped before", found.name)
            return None
        return found

    def around_rounding(self, old: relax.Call) -> Any | None:
        """s, where the call is (s − v) + v or v + (s − v)."""
        if not is_call(old, "add"):
            return None
        for difference, v in (old.args, reversed(old.args)):
            inner = self.definition.get(difference) if isinstance(difference, relax.Var) else None
            if is_call(inner, "subtract") and isinstance(inner.args[0], relax.Var) and self.same(inner.args[1], v):
                return inner.args[0]
        return None

    def same(self, a: Any, b: Any) -> bool:
        """Whether two expressions are one value: the same variable, or equal operators of the same operands."""
        if a.same_as(b):
            return True
        first, second = (self.definition.get(e) if isinstance(e, relax.Var) else e for e in (a, b))
        if not isinstance(first, relax.Call) or not isinstance(second, relax.Call):
            return bool(structural_equal(a, b))
        return (
            first.op.same_as(second.op)
            and len(first.args) == len(second.args)
            and bool(structural_equal(first.attrs, second.attrs))
            and all(self.same(p, q) for p, q in zip(first.args, second.args, strict=True))
        )

    def explain(self, var: Any, values: torch.Tensor) -> None:
        """A debug line for what is a sign but for NaN."""
        *numbers, nan = values.tolist()
        if values.is_floating_point() and set(numbers) == {-1.0, 1.0} and numbers[0] < numbers[3]:
            self.log.debug("CanonicalizeSign: %s stays float: it is ±1 but makes %s of NaN", var.name, nan)


def _is_finite(expr: Any) -> bool:
    number = scalar_of(expr)
    return number is not None and math.isfinite(number)


def _keeps_class(old: relax.Call) -> bool:
    """Clamps with lo < 0 < hi (on either side alone, too) and tanh keep the class of x: ±0 and NaN pass unchanged."""
    if is_call(old, "tanh"):
        return True
    bounds = [scalar_of(a) for a in old.args[1:]]
    if is_call(old, "clip"):
        lo, hi = bounds
        return lo is not None and hi is not None and lo < 0 < hi
    if is_call(old, "maximum") or is_call(old, "minimum"):
        bound = bounds[0]
        return bound is not None and (bound < 0 if is_call(old, "maximum") else bound > 0)
    return False


CanonicalizeSign = module_pass(lambda mod: _Canonicalize(mod).run(), "CanonicalizeSign")
