"""A sign of anything that depends on a binary accumulator alone becomes an integer comparison.

    acc = bnncc.binary_conv2d(s, W)
    y = bnncc.sign(nn.batch_norm(acc · alpha + b))   -->   y = bnncc.threshold(bnncc.binary_conv2d(s, W'), t)

The chain between accumulator and sign is evaluated by torch at every value the accumulator can take, and t is read off
the result; no algebra on floats, so that no tie can fall to the other side. A channel where the sign falls as the
accumulator grows (gamma < 0) has its weights inverted in W', so that all comparisons have one direction; where it is
constant (gamma = 0) t lies beyond the range. A channel that is not monotone (PReLU with a negative slope) makes the
layer a table: bnncc.lookup(acc, table).

After `FuseBinaryConv`; before batch norms are lowered, since torch must evaluate them as eager does. Declines chains
that read anything besides one accumulator and per-channel constants (a residual), accumulators with other readers (the
float chain is computed for them anyway, and bit-equal), ternary signs, and inexact accumulators (`bnncc.rescale`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tvm import relax

from bnncc.dialect import torch_eval, torch_operators
from bnncc.dialect.kernels import ELEMENTWISE, is_exact
from bnncc.dialect.ops import attributes, call, is_call, op_name, shape_of
from bnncc.passes.fuse_binary_conv import is_ternary
from bnncc.passes.rewriter import Origin, Rewriter, is_const, module_pass, numpy_of

# Elementwise operators whose value IEEE 754 fixes, whatever the shape they run on, and batch norm.
_CHAIN = {f"{n}" for n in ELEMENTWISE if f"relax.{n}" in torch_operators.SHAPE_INDEPENDENT} | {"nn.batch_norm"}

_ACCUMULATORS = ("bnncc.binary_conv1d", "bnncc.binary_conv2d", "bnncc.binary_conv3d", "bnncc.binary_dense")


class _Fuse(Rewriter):
    def begin(self) -> None:
        self.reason = ""  # why the latest chain was declined

    def rewrite(self, var: Any, value: Any) -> Any | None:
        if not is_call(value, "bnncc.sign"):
            return None
        attrs = attributes(value)
        if attrs["predicate"] not in ("not_lt", "gt", "ge", "not_le"):
            return None
        found = self.chain(self.definition[var].args[0])
        if found is None:
            self.log.debug("FuseThreshold: %s stays float: %s", var.name, self.reason)
            return None
        accumulator, chain = found
        return self.fuse(var, accumulator, chain, attrs["predicate"])

    def chain(self, end: Any) -> tuple[Any, list[Any]] | None:
        """The accumulator and the variables between it and `end`, in order, if nothing else is read or reads them."""
        accumulator, chain, pending = None, set(), [end]
        while pending:
            var = pending.pop()
            if var in chain or (accumulator is not None and var.same_as(accumulator)):
                continue
            definition = self.definition.get(var)
            if op_name(definition) in _ACCUMULATORS:
                if accumulator is not None:
                    return self.decline("it depends on two accumulators")
                accumulator = var
                continue
            operands = self.elementwise_operands(definition)
            if operands is None:
                return self.decline(f"{var.name} is not a per-channel function of an accumulator")
            chain.add(var)
            pending += operands
        if accumulator is None:
            return self.decline("it depends on no accumulator")
        inside = chain | {accumulator}
        for var in inside:
            outside = [u for u in self.users.get(var, []) if u not in inside]
            expected = 1 if var.same_as(end) else 0
            if len(outside) > expected or self.uses[var] != len(self.users.get(var, [])):
                return self.decline(f"{var.name} is read elsewhere as well")
        return accumulator, [b.var for b in self.bindings if b.var in chain]

    def elementwise_operands(self, definition: Any) -> list[Any] | None:
        """The variables a per-channel elementwise operation reads, or None if it is none."""
        if isinstance(definition, relax.TupleGetItem):
            return [definition.tuple_value] if definition.index == 0 else None
        if op_name(definition) not in _CHAIN:
            return None
        for const in (a for a in definition.args if is_const(a)):
            if not is_call(definition, "nn.batch_norm") and not _per_channel(shape_of(const), shape_of(definition)):
                return None
        return [a for a in definition.args if isinstance(a, relax.Var)]

    def fuse(self, var: Any, accumulator: Any, chain: list[Any], predicate: str) -> Any:
        binary = self.definition[accumulator]
        weight = numpy_of(binary.args[1])
        depth = int(np.prod(weight.shape[1:]))
        values = attainable(binary, weight, depth, is_ternary(binary.args[0], self.definition))
        bits = self.evaluate(accumulator, chain, values, predicate)
        thresholds, falling = thresholds_of(bits, values)
        calls = [c for c in (self.definition[v] for v in chain) if isinstance(c, relax.Call)]
        inexact = {} if all(is_exact(c) or is_call(c, "nn.batch_norm") for c in calls) else {"inexact": 1}
        if thresholds is None:
            table = bits.astype("uint8")
            step = int(values[1] - values[0]) if len(values) > 1 else 1
            return call("lookup", [self.replaced(accumulator), relax.const(np.ascontiguousarray(table.T))],
                        lowest=int(values[0]), step=step, **inexact)  # fmt: skip
        source = self.replaced(accumulator)
        if falling.any():
            flipped = weight * np.where(falling, -1, 1).astype("float32").reshape(-1, *[1] * (weight.ndim - 1))
            inverted = relax.Call(binary.op, [self.replaced(binary.args[0]), relax.const(flipped)], binary.attrs)
            origin = self.origin(accumulator)
            source = self.emit(inverted, f"{accumulator.name}__inverted", Origin("", origin.path) if origin else None)
        return call("threshold", [source, relax.const(thresholds)], **inexact)

    def evaluate(self, accumulator: Any, chain: list[Any], values: np.ndarray, predicate: str) -> np.ndarray:
        """The sign's bit for each attainable value and channel, bool [values, channels], computed by torch."""
        channels = shape_of(self.definition[accumulator].args[1])[0]
        rank = len(shape_of(accumulator))
        domain = torch.from_numpy(values.astype("float32")).reshape(-1, *[1] * (rank - 1))
        known: dict[Any, Any] = {accumulator: domain.expand(-1, channels, *[1] * (rank - 2)).contiguous()}
        last = accumulator
        for last in chain:
            value = self.definition[last]
            if isinstance(value, relax.TupleGetItem):
                known[last] = known[value.tuple_value][value.index]
            else:
                known[last] = torch_eval.evaluate_call(value, known)
        result = known[last].expand(len(values), channels, *[1] * (rank - 2)).reshape(len(values), channels)
        return torch_operators.sign_bits(result, predicate).numpy()

    def decline(self, reason: str) -> Any:
        self.reason = reason
        return None


def attainable(binary: relax.Call, weight: np.ndarray, depth: int, ternary: bool) -> np.ndarray:
    """Every value the accumulator can take, ascending, int64: without zeros among the terms every second integer.

    `ternary`: whether the operator's input takes the value 0.
    """
    attrs = attributes(binary)
    zeros = ternary or not weight.all() or (attrs.get("pad_value", 1) == 0 and any(attrs.get("padding", ())))
    return np.arange(-depth, depth + 1, 1 if zeros else 2)


def thresholds_of(bits: np.ndarray, values: np.ndarray) -> tuple[np.ndarray | None, np.ndarray]:
    """(t int32 [channels], falling bool [channels]): bit = (acc ≥ t), after acc → −acc in falling channels.

    t is None when some channel is not monotone.
    """
    rises = (~bits[:-1] & bits[1:]).sum(axis=0)
    falls = (bits[:-1] & ~bits[1:]).sum(axis=0)
    falling = falls > 0
    if (rises + falls > 1).any():
        return None, falling
    beyond = int(values[-1]) + 1
    padded = np.append(values, beyond)
    rising_at = padded[np.where(bits.any(axis=0), bits.argmax(axis=0), len(values))]
    # The last value whose bit is 1, negated: −acc ≥ −last.
    last_one = values[len(values) - 1 - bits[::-1].argmax(axis=0)]
    return np.where(falling, -last_one, rising_at).astype("int32"), falling


def _per_channel(const: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether a constant of this shape broadcasts along nothing but axis 1."""
    aligned = (1,) * (len(shape) - len(const)) + tuple(const)
    return len(aligned) == len(shape) and all(e == 1 for axis, e in enumerate(aligned) if axis != 1)


FuseThreshold = module_pass(lambda mod: _Fuse(mod).run(), "FuseThreshold")
