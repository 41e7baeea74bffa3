"""Layers to build and train binary networks with, by bitorch's names and arguments.

Moving a model over is changing ``from bitorch.layers import …`` to ``from bnncc.layers import …``; state dicts load
both ways. Where bitorch does not do what its documentation says, these layers do; docs/layers.md lists the differences.
"""

from bnncc.layers.debug_layers import (
    InputGraphicalDebug,
    InputPrintDebug,
    ShapePrintDebug,
    WeightGraphicalDebug,
    WeightPrintDebug,
)
from bnncc.layers.pad import PadModule
from bnncc.layers.qactivation import QActivation
from bnncc.layers.qconv1d import QConv1d, QConv1d_NoAct, QConv1dBase
from bnncc.layers.qconv2d import QConv2d, QConv2d_NoAct, QConv2dBase
from bnncc.layers.qconv3d import QConv3d, QConv3d_NoAct, QConv3dBase
from bnncc.layers.qembedding import QEmbedding, QEmbeddingBag
from bnncc.layers.qlinear import QLinear, QLinearBase
from bnncc.quantizations import Pact

__all__ = [
    "InputGraphicalDebug",
    "InputPrintDebug",
    "Pact",
    "PadModule",
    "QActivation",
    "QConv1d",
    "QConv1dBase",
    "QConv1d_NoAct",
    "QConv2d",
    "QConv2dBase",
    "QConv2d_NoAct",
    "QConv3d",
    "QConv3dBase",
    "QConv3d_NoAct",
    "QEmbedding",
    "QEmbeddingBag",
    "QLinear",
    "QLinearBase",
    "ShapePrintDebug",
    "WeightGraphicalDebug",
    "WeightPrintDebug",
]
