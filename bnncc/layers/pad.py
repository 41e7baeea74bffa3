"""Padding as a layer."""

from torch import Tensor, nn
from torch.nn import functional as F


class PadModule(nn.Module):
    """Surrounds the last two dimensions of a tensor [..., H, W] with a constant; widths are in pixels."""

    def __init__(
        self,
        padding_left: int = 0,
        padding_right: int = 0,
        padding_top: int = 0,
        padding_bottom: int = 0,
        padding_value: float = 0,
    ) -> None:
        super().__init__()
        self.padding_tensor = (padding_left, padding_right, padding_top, padding_bottom)
        self.padding_value = padding_value

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding_tensor, value=self.padding_value)

    def extra_repr(self) -> str:
        return f"{self.padding_tensor}, padding_value={self.padding_value}"
