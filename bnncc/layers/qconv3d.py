"""Quantized convolutions in three dimensions."""

from torch import nn
from torch.nn import functional as F

from bnncc.layers.conv import QuantizedInputConv, QuantizedWeightConv


class QConv3d_NoAct(QuantizedWeightConv, nn.Conv3d):
    """Quantized weights; float [N, C, D, H, W] (or without N) to [N, out_channels, …].

    Arguments and order of work are `QuantizedWeightConv`'s.
    """

    _convolution = staticmethod(F.conv3d)


class QConv3d(QuantizedInputConv, QConv3d_NoAct):
    """Quantized input and weights; float [N, C, D, H, W] (or without N) to [N, out_channels, …].

    Arguments are `QuantizedWeightConv`'s and `QuantizedInputConv`'s.
    """


# Where bitorch's QConv3d is a factory of containers, this is the class inside; here both are one.
QConv3dBase = QConv3d
