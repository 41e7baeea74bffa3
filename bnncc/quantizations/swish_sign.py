"""The sign, with the gradient of a swish."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from bnncc.quantizations.base import Quantization
from bnncc.quantizations.config import config
from bnncc.quantizations.sign import binarize


class SwishSignFunction(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, beta: float = 1.0) -> Tensor:
        ctx.save_for_backward(x)
        ctx.beta = beta
        return binarize(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        beta = ctx.beta
        swish = (beta * (2 - beta * x * torch.tanh(beta * x / 2))) / (1 + torch.cosh(beta * x))
        return swish * gradient, None


class SwishSign(Quantization):
    """`binarize`; the gradient is scaled by β·(2 − βx·tanh(βx/2)) / (1 + cosh(βx)).

    BNN+ (Darabi et al. 2018, https://arxiv.org/abs/1812.11800), the derivative of its SwishSign.
    beta: how closely the swish follows the sign; None is the configuration's `beta`.
    """

    name = "swishsign"
    bit_width = 1

    def __init__(self, beta: float | None = None) -> None:
        super().__init__()
        self.beta = config.beta if beta is None else beta

    def quantize(self, x: Tensor) -> Tensor:
        return SwishSignFunction.apply(x, self.beta)

    def extra_repr(self) -> str:
        return f"beta={self.beta}"
