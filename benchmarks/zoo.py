"""The networks of the suite, from bitorch's own classes, their float twins, and their counterparts in larq-zoo.

A float twin has the shapes and weights of its network, but its binary layers are plain convolutions with zero padding
and without the sign in front: it spares the peers the work that the binary network adds, so that the comparison leans
towards them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx, nn

from benchmarks import bitorch_networks
from benchmarks.models import sign

Built = tuple[nn.Module, torch.Tensor]


@dataclass(frozen=True)
class Network:
    """build: the network in evaluation mode and an image of 1×3×224×224. larq: the class in larq-zoo of the same shape,
    None if there is none."""

    build: Callable[[], Built]
    larq: str | None


def melius_net_22() -> Built:
    """MeliusNet22 as published (arXiv 2001.05936) and as larq-zoo has it.

    bitorch 0.4.1 has all of its layers, but its `MeliusNet22` leaves out every improvement block and takes another
    stem, half of the work.
    """
    from bitorch.models.common_layers import get_initial_layers
    from bitorch.models.densenet import DenseLayer
    from bitorch.models.meliusnet import ImprovementBlock

    torch.manual_seed(0)
    growth, channels, layers = 64, 64, list(get_initial_layers("grouped_stem", 3, 64))
    for blocks, reduced in ((4, 160), (5, 224), (4, 256), (4, None)):
        for _ in range(blocks):
            layers.append(_Concatenated(DenseLayer(channels, growth, bn_size=0, dropout=0, dilation=1)))
            channels += growth
            layers.append(ImprovementBlock(growth, channels))
        layers.append(nn.BatchNorm2d(channels))
        if reduced:
            layers += [nn.MaxPool2d(2, 2), nn.ReLU(), nn.Conv2d(channels, reduced, 1, bias=False)]
            channels = reduced
    layers += [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    return bitorch_networks.settle(nn.Sequential(*layers), (1, 3, 224, 224))


class _Concatenated(nn.Module):
    """The input's channels, then the layer's."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, self.layer(x)], 1)


#: BiRealNet18 is ResnetE18 but for a ReLU behind the stem.
NETWORKS = {
    "QuickNetSmall": Network(lambda: bitorch_networks.build("QuickNetSmall"), "QuickNetSmall"),
    "QuickNet": Network(lambda: bitorch_networks.build("QuickNet"), "QuickNet"),
    "ResnetE18": Network(lambda: bitorch_networks.build("ResnetE18"), "BiRealNet"),
    "BinaryDenseNet28": Network(lambda: bitorch_networks.build("DenseNet28"), "BinaryDenseNet28"),
    "MeliusNet22": Network(melius_net_22, "MeliusNet22"),
}


def float_twin(model: nn.Module) -> fx.GraphModule:
    """The twin of a bitorch network, which it takes apart: build another one for other uses."""
    from bitorch.layers.qconv2d import QConv2d_NoAct

    for name, module in list(model.named_modules()):
        if isinstance(module, QConv2d_NoAct):
            plain = nn.Conv2d(
                module.in_channels, module.out_channels, module.kernel_size, module.stride, module.padding,
                module.dilation, module.groups, bias=False,
            )  # fmt: skip
            plain.weight.data = sign(module.weight.detach())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    # bitorch's modules keep other references to their layers, which cannot be copied; a traced graph has none.
    return fx.symbolic_trace(model.eval())
