"""The sign, with the straight-through gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnncc.quantizations.base import STE, Quantization


def binarize(x: Tensor) -> Tensor:
    """+1 where x ≥ 0 (also at −0 and NaN), −1 elsewhere. `torch.sign` alone would keep zeros."""
    sign = torch.sign(x)
    return torch.where(sign == 0, 1.0, sign)


class SignFunction(STE):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return binarize(x)


class Sign(Quantization):
    """`binarize`; the gradient passes unchanged (Hubara et al. 2016, https://arxiv.org/abs/1602.02830).

    Their cancellation of the gradient where |x| > 1 is `bnncc.layers.QActivation`'s.
    """

    name = "sign"
    bit_width = 1

    def quantize(self, x: Tensor) -> Tensor:
        return SignFunction.apply(x)
