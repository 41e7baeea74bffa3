"""What the quantized convolutions of one, two and three dimensions share.

The order is bitorch's: quantize the input, pad it with a constant (−1 unless told otherwise, so that a binary input
stays binary), then convolve without padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from bnncc.layers.config import config
from bnncc.layers.qactivation import HasActivation, QActivation
from bnncc.quantizations import Quantization, as_quantization


class QuantizedWeightConv(nn.modules.conv._ConvNd):
    """A convolution with quantized weights that takes its input as it is; goes before `nn.Conv…d` among the bases.

    Other arguments are `nn.Conv…d`'s: in_channels, out_channels, kernel_size, stride=1, padding=0 (integers, 'same' or
    'valid'), dilation=1, groups=1, bias=False, padding_mode='zeros', device, dtype.
    weight_quantization: a quantization or its name; None is the configuration's, the sign.
    pad_value: what surrounds the input when `padding_mode` is 'zeros'; None is the configuration's `padding_value`, −1.

    Weights start as Glorot's normal distribution draws them, the bias as `nn.Conv…d`'s, and it stays float.
    """

    _convolution: Callable[..., Tensor]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = False,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        weight_quantization: str | Quantization | None = None,
        pad_value: float | None = None,
    ) -> None:
        # mypy takes the next class for _ConvNd; it is nn.Conv…d.
        super().__init__(  # type: ignore[call-arg]
            in_channels,
            out_channels,
            kernel_size,  # type: ignore[arg-type]
            stride,  # type: ignore[arg-type]
            padding,  # type: ignore[arg-type]
            dilation,  # type: ignore[arg-type]
            groups,  # type: ignore[arg-type]
            bias,  # type: ignore[arg-type]
            padding_mode,  # type: ignore[arg-type]
            device,
            dtype,
        )
        # The name is bitorch's: it stands in the state dict of a model whose quantizations have parameters.
        self._weight_quantize = as_quantization(
            config.weight_quantization if weight_quantization is None else weight_quantization
        )
        self.pad_value = config.padding_value if pad_value is None else float(pad_value)

    @property
    def weight_quantization(self) -> Quantization:
        return self._weight_quantize

    def reset_parameters(self) -> None:
        nn.init.xavier_normal_(self.weight)
        if self.bias is not None:
            bound = 1 / math.sqrt(self.weight[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def _apply_padding(self, x: Tensor) -> Tensor:
        widths = self._reversed_padding_repeated_twice
        if not any(widths):
            return x
        if self.padding_mode != "zeros":
            return F.pad(x, widths, mode=self.padding_mode)
        return F.pad(x, widths, value=self.pad_value)

    def forward(self, input: Tensor) -> Tensor:
        weight = self._weight_quantize(self.weight)
        padded = self._apply_padding(input)
        return self._convolution(padded, weight, self.bias, self.stride, 0, self.dilation, self.groups)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pad_value={self.pad_value}"


class QuantizedInputConv(HasActivation, QuantizedWeightConv):
    """Quantizes its input too; goes before a `QConv…d_NoAct` among the bases, whose arguments it takes, and

    input_quantization: a quantization or its name; None is the configuration's, the sign.
    gradient_cancellation_threshold: as in `QActivation`.
    """

    def __init__(
        self,
        *args: Any,
        input_quantization: str | Quantization | None = None,
        weight_quantization: str | Quantization | None = None,
        gradient_cancellation_threshold: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, weight_quantization=weight_quantization, **kwargs)
        self.activation = QActivation(input_quantization, gradient_cancellation_threshold)

    def forward(self, input_tensor: Tensor) -> Tensor:
        return super().forward(self.activation(input_tensor))
