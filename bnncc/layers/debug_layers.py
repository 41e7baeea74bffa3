"""Layers that change nothing and show what passes: printed, or drawn into matplotlib images.

They show every `debug_interval`-th forward, the first included, while `bnncc.layers.config.config.debug_activated` is
true. Exported and compiled they are nothing at all.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from bnncc.layers.config import config
from bnncc.quantizations import ArgumentError, Quantization


class _Debug(nn.Module):
    """debug_interval: forwards from one showing to the next. num_outputs: how many rows or images are shown.

    name: what printed lines begin with.
    """

    def __init__(self, debug_interval: int = 100, num_outputs: int = 10, name: str = "Debug") -> None:
        super().__init__()
        self._debug_interval = debug_interval
        self._num_outputs = num_outputs
        self.name = name
        self._forward_counter = 0

    def _due(self) -> bool:
        """Whether this forward is to be shown; counts it."""
        if torch.compiler.is_exporting():
            return False
        due = config.debug_activated and self._forward_counter % self._debug_interval == 0
        self._forward_counter += 1
        return due

    def _debug(self, x: Tensor) -> None:
        raise NotImplementedError


class _PrintDebug(_Debug):
    def _debug(self, x: Tensor) -> None:
        """Prints the first `num_outputs` entries along the first dimension."""
        x = x.detach()
        print(self.name, ":", x[: self._num_outputs] if x.dim() > 0 else x)


class _GraphicalDebug(_Debug):
    """figure: the matplotlib figure to redraw. images: what its `imshow` calls returned, `num_outputs` of them.

    Both may be set later. A deep copy draws into the same figure; a pickle holds neither.
    Raises ArgumentError, which is also a ValueError, when the number of images is another, or on the first drawing
    without them.
    """

    def __init__(
        self,
        figure: Any = None,
        images: list[Any] | None = None,
        debug_interval: int = 100,
        num_outputs: int = 10,
    ) -> None:
        super().__init__(debug_interval, num_outputs)
        self.set_figure(figure)
        self.set_images(images)

    def set_figure(self, figure: Any = None) -> None:
        self._figure = figure

    def set_images(self, images: list[Any] | None = None) -> None:
        if images is not None and len(images) != self._num_outputs:
            raise ArgumentError(
                f"number of given images ({len(images)}) must match number of desired outputs ({self._num_outputs})"
            )
        self._images = images

    def _debug(self, x: Tensor) -> None:
        """Draws the last two dimensions of every filter, one after the other, each scaled to 0…1.

        Of three dimensions, as of a 1-d convolution's weights, each row is a filter.
        """
        if self._figure is None or self._images is None:
            raise ArgumentError(f"{type(self).__name__} has nothing to draw into: call set_figure() and set_images()")
        x = x.detach().to("cpu", torch.float32)
        height = 1 if x.dim() in (0, 1, 3) else x.shape[-2]
        width = x.shape[-1] if x.dim() > 0 else 1
        for image, pixels in zip(self._images, x.reshape(-1, height, width), strict=False):
            pixels = pixels - pixels.min()
            # A constant filter stays 0 where dividing by its range would give NaN.
            image.set_data((pixels / pixels.max().clamp(min=torch.finfo(pixels.dtype).tiny)).numpy())
        self._figure.canvas.draw()

    def __deepcopy__(self, memo: dict[int, Any]) -> _GraphicalDebug:
        for shared in (self._figure, self._images):
            memo[id(shared)] = shared
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        duplicate.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return duplicate

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_figure": None, "_images": None}


class _InputDebug(_Debug):
    """Shows its input, of any shape, and returns it."""

    def forward(self, x: Tensor) -> Tensor:
        if self._due():
            self._debug(x)
        return x


class _WeightDebug(_Debug):
    """Runs `module`, then shows its weights as the module uses them: quantized, if it quantizes them.

    Other arguments follow as without `module`.
    """

    def __init__(self, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._debug_module = module

    def forward(self, x: Tensor) -> Tensor:
        result = self._debug_module(x)
        if self._due():
            weight: Any = self._debug_module.weight
            quantization = getattr(self._debug_module, "weight_quantization", None)
            with torch.no_grad():
                self._debug(quantization(weight) if isinstance(quantization, Quantization) else weight)
        return result


class InputPrintDebug(_InputDebug, _PrintDebug):
    """Prints the first rows of its input."""


class InputGraphicalDebug(_InputDebug, _GraphicalDebug):
    """Draws its input."""


class WeightPrintDebug(_WeightDebug, _PrintDebug):
    """Runs a module and prints the first rows of its weights."""


class WeightGraphicalDebug(_WeightDebug, _GraphicalDebug):
    """Runs a module and draws its weights."""


class ShapePrintDebug(_PrintDebug):
    """Prints the shape of its input."""

    def forward(self, x: Tensor) -> Tensor:
        if self._due():
            self._debug(torch.tensor(x.shape))
        return x
