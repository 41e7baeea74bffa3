"""The scale of a sign moves into the weights of the layer that reads it.

    p = multiply(bnncc.sign(x), alpha); y = nn.conv2d(p, W)   -->   y = nn.conv2d(bnncc.sign(x), alpha · W)

with nothing, padding, a max-pool or a reshape in between: a QONNX BipolarQuant, or a learned scale of activations.
After `FoldConstants`, since it reads weights; before `HoistReshape` and `FuseBinaryConv`, which expect a sign right
before its layer. `FuseBinaryConv` takes the scale out of the weights again, and knows when that rounds.

Declines: scales of more than one element; weights that are not binary, which the scale would round; padding with
anything but 0 or ±alpha.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op as R

from bnncc.dialect.ops import attributes, is_call, op_name
from bnncc.passes.fuse_binary_conv import binary_weight
from bnncc.passes.rewriter import Origin, Rewriter, is_const, module_pass, numpy_of

_LAYERS = ("nn.conv1d", "nn.conv2d", "nn.conv3d", "matmul")
_POOLS = ("nn.max_pool1d", "nn.max_pool2d", "nn.max_pool3d")


class _Sink(Rewriter):
    def begin(self) -> None:
        # old variable → (new variable that holds it without its scale, the scale)
        self.unscaled: dict[Any, tuple[Any, np.float32]] = {}

    def rewrite(self, var: Any, value: Any) -> Any | None:
        old = self.definition[var]
        if is_call(old, "multiply"):
            self.scaled_sign(var, old)
            return None
        if not isinstance(old, relax.Call) or not old.args or old.args[0] not in self.unscaled:
            return None
        if op_name(old) in _LAYERS:
            return self.layer(var, old)
        plain = self.moved(old, *self.unscaled[old.args[0]])
        if plain is not None:
            path = origin.path if (origin := self.origin(var)) else ""
            emitted = self.emit(plain, f"{var.name}__unscaled", Origin("", path))
            self.unscaled[var] = emitted, self.unscaled[old.args[0]][1]
        return None

    def scaled_sign(self, var: Any, old: relax.Call) -> None:
        for sign, scale in (old.args, reversed(old.args)):
            if is_const(scale) and numpy_of(scale).size == 1 and is_call(self.definition.get(sign), "bnncc.sign"):
                alpha = np.float32(numpy_of(scale).reshape(()))
                if alpha != 0 and np.isfinite(alpha):
                    self.unscaled[var] = self.replaced(sign), alpha

    def moved(self, old: relax.Call, source: Any, alpha: np.float32) -> relax.Call | None:
        """The operator on the unscaled value, if the scale may pass it."""
        name = op_name(old)
        if name == "reshape" or (name in _POOLS and alpha > 0):
            return relax.Call(old.op, [source, *old.args[1:]], old.attrs, old.ty_args)
        if name == "nn.pad":
            attrs = attributes(old)
            value = np.float32(attrs.get("pad_value", 0.0))
            unit = next((u for u in (0.0, 1.0, -1.0) if np.float32(u) * alpha == value), None)
            if attrs["pad_mode"] == "constant" and unit is not None:
                return R.nn.pad(source, list(attrs["pad_width"]), "constant", unit)
        return None

    def layer(self, var: Any, old: relax.Call) -> relax.Call | None:
        source, alpha = self.unscaled[old.args[0]]
        weight = old.args[1]
        axis = 1 if op_name(old) == "matmul" else 0
        if not is_const(weight) or binary_weight(numpy_of(weight), axis) is None:
            self.log.debug("SinkScale: %s keeps a scaled input: its weight is not binary", var.name)
            return None
        scaled = relax.const(numpy_of(weight) * alpha)
        return relax.Call(old.op, [source, scaled, *old.args[2:]], old.attrs, old.ty_args)


SinkScale = module_pass(lambda mod: _Sink(mod).run(), "SinkScale")
