"""The networks that are timed: single binary convolutions, and a ResNet-18-shaped binary network.

Every network comes as a pair: the binary model that bnncc compiles, and a float twin with the same shapes and weights
whose binary layers are plain convolutions without the sign in front and with zero padding. The twin is what the peers
run; it spares them the work that the binary model adds, so the comparison leans towards them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

Conv = Callable[[int, int, int], nn.Conv2d]

CONVOLUTIONS = {"56²×64": (56, 64), "28²×128": (28, 128), "14²×256": (14, 256), "7²×512": (7, 512)}
"""Name → (height and width, channels in and out) of the 3×3 convolutions of a ResNet-18, in the order they occur."""


def sign(x: torch.Tensor) -> torch.Tensor:
    """The sign of bitorch: +1 at zero and at NaN."""
    return torch.where(torch.sign(x) == 0, 1.0, torch.sign(x))


class BinaryConv2d(nn.Conv2d):
    """A 3×3 convolution of signs, padded with −1, by the signs of its weight, as bitorch's QConv2d computes it."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1) -> None:
        super().__init__(channels_in, channels_out, 3, stride, padding=1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padded = F.pad(sign(x), (1, 1, 1, 1), value=-1.0)
        return F.conv2d(padded, sign(self.weight), stride=self.stride)


def float_conv2d(channels_in: int, channels_out: int, stride: int = 1) -> nn.Conv2d:
    """The float twin of `BinaryConv2d`."""
    return nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False)


class Block(nn.Module):
    """A binary convolution and a batch norm with a shortcut of their own; where the shape changes, the shortcut is an
    average pool and a float 1×1 convolution."""

    def __init__(self, channels_in: int, channels_out: int, conv: Conv) -> None:
        super().__init__()
        stride = 1 if channels_in == channels_out else 2
        self.body = nn.Sequential(conv(channels_in, channels_out, stride), nn.BatchNorm2d(channels_out))
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(2, 2), nn.Conv2d(channels_in, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out)
            )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x) + self.shortcut(x)


class ResNetE18(nn.Module):
    """ResNetE-18 (arXiv 1906.08637) for 224×224 images, layer by layer as in bitorch 0.4.1: float 7×7 stem, sixteen
    binary 3×3 convolutions, float head."""

    def __init__(self, conv: Conv = BinaryConv2d, classes: int = 1000) -> None:
        super().__init__()
        widths = [64, 64, 128, 256, 512]
        self.stem = nn.Sequential(
            nn.Conv2d(3, 64, 7, 2, 3, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            nn.BatchNorm2d(64),
        )
        self.stages = nn.Sequential(
            *(
                nn.Sequential(Block(before, width, conv), *(Block(width, width, conv) for _ in range(3)))
                for before, width in itertools.pairwise(widths)
            )
        )
        self.head = nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, classes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.stages(self.stem(x)))


def convolution(size: int, channels: int) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """One binary 3×3 convolution, its float twin, and a float input of 1 × channels × size × size."""
    torch.manual_seed(0)
    binary, twin = BinaryConv2d(channels, channels), float_conv2d(channels, channels)
    twin.weight.data = sign(binary.weight.detach())
    return nn.Sequential(binary).eval(), nn.Sequential(twin).eval(), torch.randn(1, channels, size, size)


def resnet_e18() -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """The binary ResNet with random weights and batch norms, its float twin, and an image of 1 × 3 × 224 × 224."""
    torch.manual_seed(0)
    binary = ResNetE18()
    state = binary.state_dict()
    for name, module in binary.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(state[f"{name}.weight"], 0.5, 1.5)
            nn.init.normal_(state[f"{name}.bias"], 0.0, 0.1)
            state[f"{name}.running_mean"].normal_(0.0, 1.0)
            state[f"{name}.running_var"].uniform_(0.5, 2.0)
    weights = {f"{name}.weight" for name, module in binary.named_modules() if isinstance(module, BinaryConv2d)}
    for name in weights:
        # A binary convolution sums K terms of ±1: a variance of K keeps the network's values in range.
        state[name.replace("body.0.weight", "body.1.running_var")].mul_(state[name][0].numel())
    twin = ResNetE18(float_conv2d)
    twin.load_state_dict({name: sign(tensor) if name in weights else tensor for name, tensor in state.items()})
    return binary.eval(), twin.eval(), torch.randn(1, 3, 224, 224)
