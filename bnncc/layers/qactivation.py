"""Quantization of activations, with gradient cancellation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from bnncc.layers.config import config
from bnncc.quantizations import Quantization, as_quantization


class GradientCancellation(Function):
    """Identity; the gradient is 0 where |x| exceeds the threshold, and at NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.threshold = threshold
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return torch.where(x.abs() <= ctx.threshold, gradient, 0.0), None


class QActivation(nn.Module):
    """Quantizes a float tensor of any shape; the result has its shape and dtype.

    activation: a quantization or its name; None is the configuration's `input_quantization`, the sign.
    gradient_cancellation_threshold: inputs of larger magnitude receive no gradient (Hubara et al. 2016,
        https://arxiv.org/abs/1602.02830, equation 4); 0 lets all through, None is the configuration's, 1.
    """

    def __init__(
        self,
        activation: str | Quantization | None = None,
        gradient_cancellation_threshold: float | None = None,
    ) -> None:
        super().__init__()
        self.activation_function = as_quantization(config.input_quantization if activation is None else activation)
        self.gradient_cancellation_threshold = (
            config.gradient_cancellation_threshold
            if gradient_cancellation_threshold is None
            else gradient_cancellation_threshold
        )

    def forward(self, input_tensor: Tensor) -> Tensor:
        if self.gradient_cancellation_threshold > 0 and torch.is_grad_enabled():
            input_tensor = GradientCancellation.apply(input_tensor, self.gradient_cancellation_threshold)
        return self.activation_function(input_tensor)

    def extra_repr(self) -> str:
        return f"gradient_cancellation_threshold={self.gradient_cancellation_threshold}"


class HasActivation:
    """What a layer says of the quantization of its input, `activation`."""

    activation: QActivation

    @property
    def input_quantization(self) -> Quantization:
        return self.activation.activation_function

    @property
    def gradient_cancellation_threshold(self) -> float:
        return self.activation.gradient_cancellation_threshold
