"""Quantized convolutions in one dimension."""

from torch import nn
from torch.nn import functional as F

from bnncc.layers.conv import QuantizedInputConv, QuantizedWeightConv


class QConv1d_NoAct(QuantizedWeightConv, nn.Conv1d):
    """Quantized weights; float [N, C, L] (or without N) to [N, out_channels, …].

    Arguments and order of work are `QuantizedWeightConv`'s.
    """

    _convolution = staticmethod(F.conv1d)


class QConv1d(QuantizedInputConv, QConv1d_NoAct):
    """Quantized input and weights; float [N, C, L] (or without N) to [N, out_channels, …].

    Arguments are `QuantizedWeightConv`'s and `QuantizedInputConv`'s.
    """


# Where bitorch's QConv1d is a factory of containers, this is the class inside; here both are one.
QConv1dBase = QConv1d
