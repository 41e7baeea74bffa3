"""The single layers that are timed, each as a model by itself, binary ones with the float twin that the peers run.

A twin has the same shape and weights, but its binary layers are plain convolutions with zero padding and without the
sign in front: it spares the peers work, so that the comparison leans towards them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

CONVOLUTIONS = {"56²×64": (56, 64), "28²×128": (28, 128), "14²×256": (14, 256), "7²×512": (7, 512)}
"""Name → (height and width, channels in and out) of the binary convolutions of a ResNet-18, in the order they occur."""

KERNELS = (3, 1)
"""Heights and widths of the window that they are timed with."""


def sign(x: torch.Tensor) -> torch.Tensor:
    """The sign of bitorch: +1 at zero and at NaN."""
    return torch.where(torch.sign(x) == 0, 1.0, torch.sign(x))


class BinaryConv2d(nn.Conv2d):
    """A convolution of signs, padded with −1, by the signs of its weight, as bitorch's QConv2d computes it."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__(channels, channels, kernel, padding=kernel // 2, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pad = self.kernel_size[0] // 2
        padded = F.pad(sign(x), (pad, pad, pad, pad), value=-1.0) if pad else sign(x)
        return F.conv2d(padded, sign(self.weight))


def convolution(size: int, channels: int, kernel: int = 3) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """One binary convolution, its float twin, and a float input of 1 × channels × size × size."""
    torch.manual_seed(0)
    binary = BinaryConv2d(channels, kernel)
    twin = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, bias=False)
    twin.weight.data = sign(binary.weight.detach())
    return nn.Sequential(binary).eval(), nn.Sequential(twin).eval(), torch.randn(1, channels, size, size)


def between_binary_layers(size: int, channels: int, kernel: int) -> tuple[nn.Module, torch.Tensor]:
    """Two binary convolutions with a batch norm between them: the first takes packed bits and gives packed bits."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_var.mul_(channels * kernel**2)  # type: ignore[union-attr]
    layers = BinaryConv2d(channels, kernel), norm, BinaryConv2d(channels, kernel)
    return nn.Sequential(*layers).eval(), torch.randn(1, channels, size, size)


class Elementwise(nn.Module):
    """What stands between the layers of a residual network: batch norm, PReLU, an addition, a clamp."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.activation, self.clamp = nn.BatchNorm2d(channels), nn.PReLU(channels), nn.Hardtanh()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        clamped: torch.Tensor = self.clamp(self.activation(self.norm(x)) + x)
        return clamped


FLOAT_LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "stem 7×7 /2, 3→64 at 224²": (nn.Conv2d(3, 64, 7, 2, 3, bias=False), (1, 3, 224, 224)),
    "stem 3×3 /2, 3→32 at 224²": (nn.Conv2d(3, 32, 3, 2, 1, bias=False), (1, 3, 224, 224)),
    "3×3, 16→64 at 56²": (nn.Conv2d(16, 64, 3, 1, 1, bias=False), (1, 16, 56, 56)),
    "3×3, 64→64 at 56²": (nn.Conv2d(64, 64, 3, 1, 1, bias=False), (1, 64, 56, 56)),
    "3×3 /2, 64→128 at 56²": (nn.Conv2d(64, 128, 3, 2, 1, bias=False), (1, 64, 56, 56)),
    "3×3, 256→256 at 14²": (nn.Conv2d(256, 256, 3, 1, 1, bias=False), (1, 256, 14, 14)),
    "3×3, 32→64 in 8 groups at 112²": (nn.Conv2d(32, 64, 3, 1, 1, groups=8, bias=False), (1, 32, 112, 112)),
    "1×1, 64→128 at 28²": (nn.Conv2d(64, 128, 1, bias=False), (1, 64, 28, 28)),
    "1×1, 256→512 at 7²": (nn.Conv2d(256, 512, 1, bias=False), (1, 256, 7, 7)),
    "depthwise 3×3, 64 at 56²": (nn.Conv2d(64, 64, 3, 1, 1, groups=64, bias=False), (1, 64, 56, 56)),
    "depthwise 3×3 /2, 64 at 56²": (nn.Conv2d(64, 64, 3, 2, 1, groups=64, bias=False), (1, 64, 56, 56)),
    "depthwise 5×5, 64 at 56²": (nn.Conv2d(64, 64, 5, 1, 2, groups=64, bias=False), (1, 64, 56, 56)),
    "dense 512→1000": (nn.Linear(512, 1000), (1, 512)),
    "max pool 3×3 /2, 64 at 112²": (nn.MaxPool2d(3, 2, 1), (1, 64, 112, 112)),
    "average pool 2×2 /2, 64 at 56²": (nn.AvgPool2d(2, 2), (1, 64, 56, 56)),
    "global average pool, 512 at 7²": (nn.AdaptiveAvgPool2d(1), (1, 512, 7, 7)),
    "batch norm, PReLU, add, clamp, 64 at 56²": (Elementwise(64), (1, 64, 56, 56)),
    "softmax of 64 × 1000": (nn.Softmax(-1), (64, 1000)),
}
"""Name → (layer, shape of its input)."""


def float_layer(name: str) -> tuple[nn.Module, torch.Tensor]:
    """One layer of `FLOAT_LAYERS` in evaluation mode, and an input."""
    torch.manual_seed(0)
    layer, shape = FLOAT_LAYERS[name]
    return nn.Sequential(layer).eval(), torch.randn(shape)
