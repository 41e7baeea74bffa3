"""Linear layer with quantized weights and inputs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bnncc.layers.config import config
from bnncc.layers.qactivation import HasActivation, QActivation
from bnncc.quantizations import Quantization, as_quantization


class QLinear(HasActivation, nn.Linear):
    """``quantize(x) · quantize(weight)ᵀ + bias``: float [..., in_features] to [..., out_features].

    The bias stays float. Other arguments are `nn.Linear`'s: in_features, out_features, bias=True, device, dtype.
    input_quantization, weight_quantization: a quantization or its name; None is the configuration's, the sign.
    gradient_cancellation_threshold: as in `QActivation`.
    """

    def __init__(
        self,
        *args: Any,
        input_quantization: str | Quantization | None = None,
        gradient_cancellation_threshold: float | None = None,
        weight_quantization: str | Quantization | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.weight_quantization = as_quantization(
            config.weight_quantization if weight_quantization is None else weight_quantization
        )
        self.activation = QActivation(input_quantization, gradient_cancellation_threshold)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.activation(x), self.weight_quantization(self.weight), self.bias)


# Where bitorch's QLinear is a factory of containers, this is the class inside; here both are one.
QLinearBase = QLinear
