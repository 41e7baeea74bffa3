"""Quantized convolutions in two dimensions."""

from torch import nn
from torch.nn import functional as F

from bnncc.layers.conv import QuantizedInputConv, QuantizedWeightConv


class QConv2d_NoAct(QuantizedWeightConv, nn.Conv2d):
    """Quantized weights; float [N, C, H, W] (or without N) to [N, out_channels, …].

    Arguments and order of work are `QuantizedWeightConv`'s.
    """

    _convolution = staticmethod(F.conv2d)


class QConv2d(QuantizedInputConv, QConv2d_NoAct):
    """Quantized input and weights; float [N, C, H, W] (or without N) to [N, out_channels, …].

    Arguments are `QuantizedWeightConv`'s and `QuantizedInputConv`'s.
    """


# Where bitorch's QConv2d is a factory of containers, this is the class inside; here both are one.
QConv2dBase = QConv2d
