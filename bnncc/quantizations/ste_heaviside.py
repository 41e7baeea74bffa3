"""The step at zero, with a clipped straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from bnncc.quantizations.base import Quantization


class SteHeavisideFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        step = torch.where(x > 0, 1.0, -1.0)
        return step if step.dtype == x.dtype else step.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * (x.abs() <= 1)


class SteHeaviside(Quantization):
    """+1 where x > 0, −1 elsewhere, at ±0 and NaN too; the gradient passes where |x| ≤ 1 and is 0 elsewhere."""

    name = "steheaviside"
    bit_width = 1

    def quantize(self, x: Tensor) -> Tensor:
        return SteHeavisideFunction.apply(x)
