"""Defaults of the layers."""

from __future__ import annotations

from bnncc.config import Config
from bnncc.quantizations import Quantization, as_quantization


class LayerConfig(Config):
    """What a layer takes where its argument is None.

    input_quantization, weight_quantization: names. padding_value: what convolutions pad with.
    gradient_cancellation_threshold: of `QActivation`. pact_bits: of `Pact`.
    debug_activated: whether the debug layers show anything; read at every forward.
    """

    name = "layer_config"

    input_quantization = "sign"
    weight_quantization = "sign"
    debug_activated = False
    padding_value = -1.0
    gradient_cancellation_threshold = 1.0
    pact_bits = 4

    def get_quantization_function(self, quantization: str | Quantization) -> Quantization:
        """The module that a name or a module stands for; raises ArgumentError."""
        return as_quantization(quantization)


config = LayerConfig()
