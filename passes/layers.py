"""What the passes share that fuse layers with weights: which calls are layers, and what surrounds their images."""

from __future__ import annotations

from typing import Any, ClassVar

from tvm import relax

from bnncc.dialect.ops import attributes, is_call, op_name
from bnncc.passes.rewriter import Rewriter


class LayerRewriter(Rewriter):
    """Rewrites convolutions and dense layers in the model's own layout."""

    #: Name of the pass, for its debug lines.
    name: ClassVar[str]

    def rewrite(self, var: Any, value: Any) -> Any | None:
        if op_name(value) in ("nn.conv1d", "nn.conv2d", "nn.conv3d"):
            return self.conv(var, value)
        return self.dense(var, value) if is_call(value, "matmul") else None

    def conv(self, var: Any, value: relax.Call) -> Any | None:
        raise NotImplementedError

    def dense(self, var: Any, value: relax.Call) -> Any | None:
        raise NotImplementedError

    def decline(self, var: Any, reason: str) -> Any:
        self.log.debug("%s: %s stays float: %s", self.name, var.name, reason)
        return None


def joint_padding(own: tuple[int, ...], pad: relax.Call) -> tuple[tuple[int, ...], float] | None:
    """((before each axis…, after each axis…), value) of a convolution's own zeros and a pad before it.

    None unless they are one constant around the image; 'same' with an even kernel pads with zeros twice.
    """
    a = attributes(pad)
    before, after = a["pad_width"][::2], a["pad_width"][1::2]
    value = float(a.get("pad_value", 0.0))
    if a["pad_mode"] != "constant" or any((*before[:2], *after[:2])) or min(*before, *after) < 0:
        return None
    if any(own) and value:
        return None
    return tuple(mine + more for mine, more in zip(own, (*before[2:], *after[2:]), strict=True)), value
