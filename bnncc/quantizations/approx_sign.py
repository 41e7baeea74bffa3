"""The sign, with the gradient of a piecewise quadratic."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from bnncc.quantizations.base import Quantization
from bnncc.quantizations.sign import binarize


class ApproxSignFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return binarize(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return (2.0 - 2.0 * x.abs()).clamp(min=0.0) * gradient


class ApproxSign(Quantization):
    """`binarize`; the gradient is scaled by 2 − 2|x| where |x| ≤ 1 and is 0 elsewhere.

    The ApproxSign of Bi-Real Net (Liu et al. 2018, https://arxiv.org/abs/1808.00278).
    """

    name = "approxsign"
    bit_width = 1

    def quantize(self, x: Tensor) -> Tensor:
        return ApproxSignFunction.apply(x)
