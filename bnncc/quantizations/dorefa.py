"""k-bit quantization of inputs and weights: DoReFa-Net (Zhou et al. 2016, https://arxiv.org/abs/1606.06160).

Both round half to even onto n = 2^bits − 1 steps and pass the gradient unchanged. One bit differs from the paper, as
bitorch's does: inputs become {0, 1}, weights {−1, +1} by the formula below, without the paper's scale E(|w|).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bnncc.quantizations.base import STE, Quantization, checked_bits
from bnncc.quantizations.config import config


class WeightDoReFaFunction(STE):
    @staticmethod
    def forward(ctx: Any, x: Tensor, maximum_bit_value: int) -> Tensor:  # type: ignore[override]
        squashed = torch.tanh(x)
        unit = squashed / (2.0 * squashed.abs().max()) + 0.5
        return 2.0 * (torch.round(unit * maximum_bit_value) / maximum_bit_value) - 1.0

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class WeightDoReFa(Quantization):
    """2·round(n·(tanh x / (2·max|tanh x|) + ½)) / n − 1, the maximum over the whole tensor; equation 9 of the paper.

    The maximum is taken of the tensor that comes in: of a weight that is a constant, of an input it changes with the
    data. A tensor of zeros has no such maximum and becomes NaN. One bit is not the sign: x = 1e-9 beside a maximum of 1
    becomes −1, since the half is rounded to even.
    bits: None is the configuration's `dorefa_bits`.
    """

    name = "weightdorefa"
    bit_width = config.dorefa_bits

    def __init__(self, bits: int | None = None) -> None:
        super().__init__()
        self.bit_width = checked_bits(config.dorefa_bits if bits is None else bits, self.name)

    def quantize(self, x: Tensor) -> Tensor:
        return WeightDoReFaFunction.apply(x, 2**self.bit_width - 1)

    def extra_repr(self) -> str:
        return f"bits={self.bit_width}"


class InputDoReFaFunction(STE):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: int) -> Tensor:  # type: ignore[override]
        maximum_bit_value = 2**bits - 1
        return torch.round(torch.clamp(x, 0, 1) * maximum_bit_value) / maximum_bit_value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class InputDoReFa(Quantization):
    """round(n·clamp(x, 0, 1)) / n: values 0, 1/n … 1, NaN where x is; equations 5 and 11 of the paper.

    bits: None is the configuration's `dorefa_bits`.
    """

    name = "inputdorefa"
    bit_width = config.dorefa_bits

    def __init__(self, bits: int | None = None) -> None:
        super().__init__()
        self.bit_width = checked_bits(config.dorefa_bits if bits is None else bits, self.name)

    def quantize(self, x: Tensor) -> Tensor:
        return InputDoReFaFunction.apply(x, self.bit_width)

    def extra_repr(self) -> str:
        return f"bits={self.bit_width}"
