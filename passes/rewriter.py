"""What every pass shares: reading `main` as a list of bindings, and writing it again with some of them replaced.

`main` is one dataflow block in A-normal form. A pass subclasses `Rewriter` and overrides `rewrite`; whatever it does
not replace is copied. Variables that hold a value of the user's model keep the name of its node in the exported graph,
and `Origins` says which node and module each name stands for and how the value is laid out; both survive every pass.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import GenericConst, IRModule

from bnncc.runtime.errors import BnnccError

# Passes run under TVM, which makes a RuntimeError of any exception that it does not know.
tvm_ffi.register_error("BnnccError", BnnccError)

#: Attributes of `main`: where variables come from, and the rows of the per-layer table (`bnncc.dialect.plan.Layer`).
ORIGINS = "bnncc.origins"
LAYERS = "bnncc.layers"
#: Attribute of `main`, if there is any: variable of a layer that computes with other numbers than the model because its
#: user opted in → "int8".
OPT_INS = "bnncc.opt_ins"


_LAYOUT = ("order", "bits", "step")


@dataclass(frozen=True)
class Origin:
    """Where a variable's value comes from.

    node: name in the exported graph; "" for a helper, which belongs to the module but holds no value of the model.
    path: module path in the user's model ("" for the root).
    order: axis i of the variable is axis `order[i]` of the node's value; None for the same order.
    bits: for packed variables the layout and padding (`Value.bits` in `bnncc.dialect.plan`).
    step: for quantized values the distance of two neighbouring ones.
    """

    node: str
    path: str
    order: tuple[int, ...] | None = None
    bits: dict[str, Any] | None = None
    step: float | None = None

    @classmethod
    def parse(cls, fields: Any) -> Origin:
        """From the function attribute: [node, path] or [node, path, JSON of order, bits and step]."""
        node, path, *layout = (str(f) for f in fields)
        extra = json.loads(layout[0]) if layout else {}
        order = extra.get("order")
        return cls(node, path, None if order is None else tuple(order), extra.get("bits"), extra.get("step"))

    def fields(self) -> list[str]:
        layout = {key: value for key, value in asdict(self).items() if key in _LAYOUT and value is not None}
        return [self.node, self.path, json.dumps(layout)] if layout else [self.node, self.path]


def origins_of(func: relax.Function) -> dict[str, Origin]:
    """The origins table of `main`: variable name → origin."""
    table = func.attrs[ORIGINS] if _has(func, ORIGINS) else {}
    return {str(name): Origin.parse(fields) for name, fields in table.items()}


def opt_ins_of(func: relax.Function) -> dict[str, str]:
    """The table of opt-ins of `main`."""
    return {str(name): str(kind) for name, kind in func.attrs[OPT_INS].items()} if _has(func, OPT_INS) else {}


def _has(func: relax.Function, attribute: str) -> bool:
    return bool(func.attrs) and attribute in func.attrs


def numpy_of(const: GenericConst) -> Any:
    """The value of a constant as a NumPy array."""
    return const.value.numpy()


def is_const(expr: Any) -> bool:
    return isinstance(expr, GenericConst)


def scalar_of(expr: Any) -> float | None:
    """The number a 0-d constant or a literal holds; None for anything else."""
    if is_const(expr):
        return float(numpy_of(expr)) if numpy_of(expr).ndim == 0 else None
    return float(expr.value) if isinstance(expr, (tirx.IntImm, tirx.FloatImm)) else None


class Rewriter:
    """Rebuilds `main` binding by binding.

    Before a rewrite starts, `definition` (old variable → its expression) and `uses` (old variable → how often it is
    read, the function's outputs included) describe the function as it was.
    """

    log: ClassVar[logging.Logger] = logging.getLogger("bnncc.passes")

    def __init__(self, mod: IRModule):
        self.mod = mod
        self.func: relax.Function = mod["main"]
        self.origins = origins_of(self.func)
        self.layers = [str(row) for row in self.func.attrs[LAYERS]] if _has(self.func, LAYERS) else []
        if len(self.func.body.blocks) > 1:
            raise ValueError("main must be a single dataflow block")
        self.bindings = list(self.func.body.blocks[0].bindings) if self.func.body.blocks else []
        self.definition: dict[Any, Any] = {b.var: b.value for b in self.bindings}
        self.uses: Counter[Any] = Counter()
        self.users: dict[Any, list[Any]] = {}
        for binding in self.bindings:
            for operand in operands(binding.value):
                self.uses[operand] += 1
                self.users.setdefault(operand, []).append(binding.var)
        for operand in operands(self.func.body.body):
            self.uses[operand] += 1
        self._new: dict[Any, Any] = {}
        self.builder = relax.BlockBuilder()

    def rewrite(self, var: Any, value: Any) -> Any | None:
        """The new expression for a binding, its operands already replaced; None copies it.

        `var` is the old variable and `self.definition[var]` its old expression. New bindings made on the way are
        emitted by `self.emit`.
        """
        raise NotImplementedError

    def emit(self, value: Any, name: str, origin: Origin | None = None) -> Any:
        """Binds `value` to a new variable. Give an origin when it holds a value of the user's model."""
        if is_const(value) or isinstance(value, relax.Var):
            return value
        var = self.builder.emit(value, name)
        if origin is not None:
            self.origins[var.name] = origin
        return var

    def origin(self, var: Any) -> Origin | None:
        return self.origins.get(var.name)

    def replaced(self, expr: Any) -> Any:
        """An old operand in terms of the new function."""
        if isinstance(expr, relax.Var):
            return self._new.get(expr, expr)
        if isinstance(expr, relax.Tuple):
            return relax.Tuple([self.replaced(field) for field in expr.fields])
        return expr

    def finish(self, output: Any) -> Any:
        """The function's new result; layout passes override it to restore the caller's layout."""
        return output

    def params(self) -> list[Any]:
        """The new function's parameters, in order; one that is not the old one must be replaced in `begin`."""
        return list(self.func.params)

    def replace(self, old: Any, new: Any) -> None:
        """Has every reader of the old variable read `new`."""
        self._new[old] = new

    def run(self) -> IRModule:
        self.new_params = self.params()
        with self.builder.function("main", self.new_params):
            with self.builder.dataflow():
                self.begin()
                for binding in self.bindings:
                    old = binding.value
                    value = self._substituted(old)
                    new = self.rewrite(binding.var, value)
                    self._new[binding.var] = self._bind(binding.var, value if new is None else new)
                result = self.builder.emit_output(self.finish(self.replaced(self.func.body.body)))
            self.builder.emit_func_output(result)
        built = self.builder.get()
        main = built["main"]
        if self.func.attrs:
            main = main.with_attrs({k: v for k, v in self.func.attrs.items() if k != "global_symbol"})
        main = main.with_attr(ORIGINS, {name: origin.fields() for name, origin in sorted(self.origins.items())})
        built["main"] = main.with_attr(LAYERS, self.layers)
        return relax.transform.DeadCodeElimination()(built)

    def begin(self) -> None:
        """Called once, inside the new dataflow block, before the first binding."""

    def _bind(self, var: Any, value: Any) -> Any:
        if is_const(value) or isinstance(value, (relax.Var, relax.Tuple)):
            return value
        return self.emit(value, var.name)

    def _substituted(self, value: Any) -> Any:
        if isinstance(value, relax.Call):
            args = [self.replaced(a) for a in value.args]
            return relax.Call(value.op, args, value.attrs, value.ty_args)
        if isinstance(value, relax.TupleGetItem):
            source = self.replaced(value.tuple_value)
            return (
                source.fields[value.index]
                if isinstance(source, relax.Tuple)
                else relax.TupleGetItem(source, value.index)
            )
        return self.replaced(value)


def operands(expr: Any) -> list[Any]:
    """The variables an expression in A-normal form reads, one entry per read."""
    if isinstance(expr, relax.Var):
        return [expr]
    if isinstance(expr, relax.Tuple):
        return [v for field in expr.fields for v in operands(field)]
    if isinstance(expr, relax.TupleGetItem):
        return operands(expr.tuple_value)
    if isinstance(expr, relax.Call):
        return [v for arg in expr.args for v in operands(arg)]
    return []


def module_pass(transform: Any, name: str) -> Any:
    """A TVM module pass from a function IRModule → IRModule."""
    return tvm.transform.module_pass(lambda mod, _ctx: transform(mod), opt_level=0, name=name)
