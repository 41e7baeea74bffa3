"""k-bit activation with a learned clipping level."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from bnncc.quantizations.base import Quantization, checked_bits


class PactActFn(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(x, alpha)
        # Not clamp(max=alpha.item()): a graph would hold the number as an unknown of its own.
        clamped = torch.minimum(x.clamp(min=0), alpha)
        scale = (2**bits - 1) / alpha
        return torch.round(clamped * scale) / scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, alpha = ctx.saved_tensors
        outside = (x < 0) | (x > alpha)
        alpha_gradient = (gradient * (x >= alpha).to(gradient.dtype)).sum().reshape(alpha.shape)
        return gradient * (~outside).to(gradient.dtype), alpha_gradient, None


class Pact(Quantization):
    """round(clamp(x, 0, alpha)·s) / s with s = (2^bits − 1) / alpha; alpha is a parameter, a scalar that starts at 10.

    The gradient passes to x where 0 ≤ x ≤ alpha, and to alpha where x ≥ alpha. PACT (Choi et al. 2018,
    https://arxiv.org/abs/1805.06085), equations 1 to 3.
    bits: None is the layers' configuration's `pact_bits`.
    """

    name = "pact"

    def __init__(self, bits: int | None = None) -> None:
        super().__init__()
        if bits is None:
            # Late: the layers import the quantizations.
            from bnncc.layers.config import config

            bits = config.pact_bits
        self.bits = self.bit_width = checked_bits(bits, self.name)
        self.alpha = nn.Parameter(torch.tensor(10.0))

    def quantize(self, x: Tensor) -> Tensor:
        return PactActFn.apply(x, self.alpha, self.bits)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"
