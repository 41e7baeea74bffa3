"""Expressions of constants become constants, with the values torch gives them.

    w1 = sign(const); w2 = multiply(w1, alpha); y = conv2d(x, w2)   -->   y = conv2d(x, const')

After the signs are canonical (see there), before every pass that looks at weights. torch evaluates, because a folded
weight must equal eager's to the last bit. Declines operators torch_eval does not know.
"""

from __future__ import annotations

from typing import Any

from tvm import relax

from bnncc.dialect import torch_eval
from bnncc.passes.rewriter import Rewriter, is_const, module_pass


class _Fold(Rewriter):
    def rewrite(self, var: Any, value: Any) -> Any | None:
        if not isinstance(value, relax.Call) or not value.args:
            return None
        tensors = [a for a in value.args if isinstance(a, relax.Var) or is_const(a)]
        if not tensors or not all(is_const(a) for a in tensors):
            return None
        if not torch_eval.can_evaluate(value):
            self.log.debug("FoldConstants: %s is constant but %s is not evaluated", var.name, value.op)
            return None
        return torch_eval.to_constant(torch_eval.evaluate_call(value))


FoldConstants = module_pass(lambda mod: _Fold(mod).run(), "FoldConstants")
