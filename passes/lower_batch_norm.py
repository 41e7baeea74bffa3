"""Batch norms in evaluation mode become one fused multiply-add per element.

    y = nn.batch_norm(x, gamma, beta, mean, var)[0]   -->   y = bnncc.scale_shift(x, a, b)

    inv = 1 / sqrt(var + eps);  a = inv · gamma;  b = fma(−mean, a, beta);  y = fma(x, a, b)

which is, operation by operation, what ATen's CPU kernel evaluates, in IEEE arithmetic (torch.sqrt itself may be a
vector library's and differ in the last bit); b is read off that kernel, as its value at x = 0.

After `FuseThreshold`, which evaluates whole batch norms. Declines a batch norm whose statistics are no constants.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tvm import relax

from bnncc.dialect.ops import attributes, call, is_call
from bnncc.passes.rewriter import Rewriter, is_const, module_pass, numpy_of


class _Lower(Rewriter):
    def rewrite(self, var: Any, value: Any) -> Any | None:
        if not isinstance(value, relax.TupleGetItem) or value.index != 0:
            return None
        norm = self.builder.lookup_binding(value.tuple_value)
        if not is_call(norm, "nn.batch_norm") or not all(is_const(a) for a in norm.args[1:]):
            return None
        attrs = attributes(norm)
        gamma, beta, mean, variance = (numpy_of(a).copy() for a in norm.args[1:5])
        a = np.float32(1) / np.sqrt(variance + np.float32(attrs["epsilon"])) * gamma
        m, v, g, shift = (torch.from_numpy(array) for array in (mean, variance, gamma, beta))
        b = torch.nn.functional.batch_norm(torch.zeros(1, len(gamma)), m, v, g, shift, eps=attrs["epsilon"])[0].numpy()
        return call("scale_shift", [norm.args[0], relax.const(a), relax.const(b)], axis=attrs["axis"])


LowerBatchNorm = module_pass(lambda mod: _Lower(mod).run(), "LowerBatchNorm")
