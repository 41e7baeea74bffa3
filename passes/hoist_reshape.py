"""Operators that only move values move above a sign, so that it stands right before the layer it quantizes for.

    s = bnncc.sign(x); y = reshape(s, shape)                    -->   r = reshape(x, shape); y = bnncc.sign(r)
    s = bnncc.sign(a); t = bnncc.sign(b); y = concat((s, t))    -->   c = concat((a, b)); y = bnncc.sign(c)
    y = reshape(x, shape of x)                                  -->   y = x
    y = concat((x,))                                            -->   y = x

After `CanonicalizeSign`, before `FuseBinaryConv`. Exact, since a sign is elementwise. A sign with other readers stays
for them. A reshape that changes nothing (bitorch's activations end in one) would keep an image out of NHWC. Declines
signs of differing predicates side by side, and a gather of pixels (`take` along another axis than the channels), which
has a kernel on bits.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from bnncc.dialect.ops import attributes, call, is_call, op_name, shape_of
from bnncc.passes.rewriter import Rewriter, module_pass

_MOVES = (
    "reshape", "permute_dims", "squeeze", "expand_dims", "flatten", "strided_slice", "broadcast_to", "flip", "take",
)  # fmt: skip


class _Hoist(Rewriter):
    def rewrite(self, var: Any, value: Any) -> Any | None:
        if is_call(value, "concat"):
            return self.concat(var, value)
        if is_call(value, "take") and attributes(value)["axis"] != 1:
            return None
        if is_call(value, "reshape") and shape_of(var) == shape_of(value.args[0]):
            return value.args[0]
        if op_name(value) not in _MOVES or not isinstance(value.args[0], relax.Var):
            return None
        sign = self.builder.lookup_binding(value.args[0])
        if not is_call(sign, "bnncc.sign"):
            return None
        moved = relax.Call(value.op, [sign.args[0], *value.args[1:]], value.attrs, value.ty_args)
        return call("sign", [self.emit(moved, f"{var.name}__before_sign")], **attributes(sign))

    def concat(self, var: Any, value: relax.Call) -> Any | None:
        fields = value.args[0].fields if isinstance(value.args[0], relax.Tuple) else []
        if len(fields) == 1:
            return fields[0]
        found = [self.builder.lookup_binding(f) if isinstance(f, relax.Var) else None for f in fields]
        signs = [s for s in found if is_call(s, "bnncc.sign")]
        if not signs or len(signs) < len(fields):
            return None
        if len({attributes(s)["predicate"] for s in signs}) > 1:
            return None
        joined = relax.Call(value.op, [relax.Tuple([s.args[0] for s in signs])], value.attrs)
        return call("sign", [self.emit(joined, f"{var.name}__before_sign")], **attributes(signs[0]))


HoistReshape = module_pass(lambda mod: _Hoist(mod).run(), "HoistReshape")
