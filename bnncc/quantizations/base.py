"""What every quantization shares, and the straight-through estimator that many of them train with."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor, nn
from torch.autograd import Function

from bnncc.runtime.errors import BnnccError


class ArgumentError(BnnccError, ValueError):
    """An argument of a layer or a quantization is none of what it may be."""


class STE(Function):
    """Straight-through estimator: the gradient passes unchanged (Bengio et al. 2013, https://arxiv.org/abs/1308.3432).

    A subclass adds the forward of one tensor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        raise NotImplementedError("a straight-through estimator needs a forward")

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient


class Quantization(nn.Module):
    """Base class. A subclass defines `quantize`, a `name` and a `bit_width`.

    name: how layers refer to it, as in ``QConv2d(..., input_quantization="sign")``.
    bit_width: bits that hold one quantized value; 32 is "not quantized".
    """

    name: str = "None"
    bit_width: int = -1

    @property
    def bitwidth(self) -> int:
        """Deprecated spelling of `bit_width`."""
        warnings.warn("'bitwidth' is deprecated, use 'bit_width'", DeprecationWarning, stacklevel=2)
        return self.bit_width

    def quantize(self, x: Tensor) -> Tensor:
        """Maps a float tensor of any shape to one of the same shape and dtype that takes at most 2^bit_width values."""
        raise NotImplementedError(f"{type(self).__name__} has no quantize()")

    def forward(self, x: Tensor) -> Tensor:
        return self.quantize(x)


def checked_bits(bits: int, what: str) -> int:
    """`bits`, if it is a number of bits that a quantized value can have."""
    if isinstance(bits, bool) or not isinstance(bits, int) or bits < 1:
        raise ArgumentError(f"{what} needs a whole number of bits from 1 on, not {bits!r}")
    return bits
