"""Defaults of the quantizations."""

from bnncc.config import Config


class QuantizationConfig(Config):
    """dorefa_bits: bits of `InputDoReFa` and `WeightDoReFa`. beta: steepness of `SwishSign`'s gradient."""

    name = "quantization_config"

    dorefa_bits = 1
    beta = 5.0


config = QuantizationConfig()
