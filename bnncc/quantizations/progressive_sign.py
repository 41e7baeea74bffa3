"""A slope that grows into the sign while a network trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from bnncc.config import Config
from bnncc.quantizations.base import STE, ArgumentError, Quantization
from bnncc.quantizations.sign import SignFunction

# Keeps the slope finite at temperature 1.
EPSILON = 1e-7


class ProgressiveSignConfig(Config):
    """progressive_sign_scale: progress of training, 0 at its start and (close to) 1 at its end; read at every forward.

    progressive_sign_alpha, progressive_sign_beta: of the default transform, between 2 and 10.
    """

    name = "progressive_sign_config"

    progressive_sign_scale = 0.0
    progressive_sign_alpha = 4
    progressive_sign_beta = 10


config = ProgressiveSignConfig()


class ProgressiveSignFunctionTrain(STE):
    @staticmethod
    def forward(ctx: Any, x: Tensor, temperature: float) -> Tensor:  # type: ignore[override]
        return F.hardtanh(x / max(1.0 - temperature, EPSILON))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class ProgressiveSign(Quantization):
    """In training, hardtanh(x / (1 − temperature)); in evaluation, the sign. The gradient passes unchanged.

    Accuracy in the first epochs can differ much between the two; at temperature 1 they agree.

    use_global_scaling: take the scale from the configuration, where one assignment sets it for all layers.
    initial_scale: without global scaling, what `scale` starts with; None is the configuration's.
    custom_transform: from the scale to the temperature, both 0…1; None is `default_transform`. A module-level function
        if the model is to be pickled.
    alpha, beta: of the default transform; None is the configuration's.
    """

    name = "progressive_sign"
    bit_width = 1

    def __init__(
        self,
        use_global_scaling: bool = True,
        initial_scale: float | None = None,
        custom_transform: Callable[[float], float] | None = None,
        alpha: float | None = None,
        beta: float | None = None,
    ) -> None:
        super().__init__()
        if initial_scale is not None and use_global_scaling:
            raise ArgumentError(
                "progressive_sign: initial_scale has no effect with global scaling; pass use_global_scaling=False too, "
                "or set the configuration's progressive_sign_scale"
            )
        self.global_scaling = use_global_scaling
        self.scale = config.progressive_sign_scale if initial_scale is None else initial_scale
        self.custom_transform = custom_transform
        self.alpha = config.progressive_sign_alpha if alpha is None else alpha
        self.beta = config.progressive_sign_beta if beta is None else beta

    @property
    def current_scale(self) -> float:
        return config.progressive_sign_scale if self.global_scaling else self.scale

    @staticmethod
    def default_transform(scale: float, alpha: float | None = None, beta: float | None = None) -> float:
        """1 − alpha^(−beta · scale): the temperature rises fast at the start and slowly at the end."""
        alpha = config.progressive_sign_alpha if alpha is None else alpha
        beta = config.progressive_sign_beta if beta is None else beta
        return 1 - alpha ** (-beta * scale)

    def transform(self, scale: float) -> float:
        """The temperature at a scale."""
        if self.custom_transform is not None:
            return self.custom_transform(scale)
        return self.default_transform(scale, self.alpha, self.beta)

    def quantize(self, x: Tensor) -> Tensor:
        if self.training:
            return ProgressiveSignFunctionTrain.apply(x, self.transform(self.current_scale))
        return SignFunction.apply(x)
