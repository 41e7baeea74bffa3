"""Float layers that their user opted in to quantize get inputs and weights of fewer bits.

    y = nn.conv2d(x, W)   -->   v = bnncc.quantize(x, scale) {first, most=255}
                                y = nn.conv2d(v, W')

where W' is W rounded to −127 … 127 times a scale of each output channel, and v one of 256 values that span the range
of x, with 0 among them, so that padding by zeros stays exact. Zeros that a pad puts around x are put around v. What
makes integer sums of that is `FuseIntegerConv`, as for a model that is quantized itself. Where the form is a float's,

    y = nn.conv2d(x, W)   -->   v = bnncc.round_to(x) {form}
                                y = nn.conv2d(v, W')

and `LowerFloat` makes a product of rounded floats of that. The rewritten layers are
entered in the table of opt-ins (`rewriter.OPT_INS`): their results are not the model's.

Last of the canonicalising passes: what a layer reads has its final name, which the ranges go by
(`bnncc.calibration`), and signs still have theirs. Declines nothing: the layers were chosen before.

Sources of the scheme: signed symmetric weights per channel, affine activations per tensor, min–max ranges that include
zero, all of ONNX Runtime's and torch.ao's static quantization; Jacob et al., arXiv 1712.05877, section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax

from bnncc.dialect.ops import attributes, call, is_call
from bnncc.dialect.plan import QuantizedLayer
from bnncc.passes.layers import LayerRewriter
from bnncc.passes.rewriter import OPT_INS, Origin, module_pass, numpy_of

#: Largest level of an activation, and largest integer of a weight.
MOST_LEVEL, MOST_WEIGHT = 255, 127


class _Quantize(LayerRewriter):
    name = "QuantizeFloat"

    def __init__(self, mod: Any, layers: Sequence[QuantizedLayer]):
        super().__init__(mod)
        self.chosen = {layer.layer: layer for layer in layers}
        self.quantized: dict[Any, Any] = {}

    def conv(self, var: Any, value: relax.Call) -> Any | None:
        return self.layer(var, value, 0)

    def dense(self, var: Any, value: relax.Call) -> Any | None:
        return self.layer(var, value, 1)

    def layer(self, var: Any, value: relax.Call, axis: int) -> Any | None:
        """axis: of the weight's output channels."""
        layer = self.chosen.get(var.name)
        if layer is None:
            return None
        source = self.definition[var].args[0]
        own = numpy_of(value.args[1])
        weight = relax.const(quantize_weight(own, axis) if layer.form == "int8" else round_weight(own, layer.form))
        return relax.Call(value.op, [self.input(source, layer), weight], value.attrs, value.ty_args)

    def input(self, source: Any, layer: QuantizedLayer) -> Any:
        """The layer's input, rounded; what only puts zeros around it comes behind that."""
        inner = self.definition[source].args[0] if is_zero_pad(self.definition.get(source)) else source
        if layer.form == "int8" and (layer.low is None or layer.high is None):
            return self.replaced(source)
        if (inner, layer.low, layer.high) not in self.quantized:
            rounded = self.rounded(self.replaced(inner), layer)
            helper = Origin("", layer.path)
            self.quantized[inner, layer.low, layer.high] = self.emit(rounded, f"{inner.name}__{layer.form}", helper)
        rounded = self.quantized[inner, layer.low, layer.high]
        if inner.same_as(source):
            return rounded
        pad = self.definition[source]
        return self.emit(relax.Call(pad.op, [rounded], pad.attrs, pad.ty_args), f"{source.name}__{layer.form}")

    @staticmethod
    def rounded(x: Any, layer: QuantizedLayer) -> Any:
        if layer.form != "int8":
            return call("round_to", [x], form=layer.form)
        assert layer.low is not None and layer.high is not None
        scale, first = affine(layer.low, layer.high)
        return call("quantize", [x, relax.const(scale)], first=first, most=MOST_LEVEL)

    def run(self) -> Any:
        mod = super().run()
        mod["main"] = mod["main"].with_attr(OPT_INS, {name: layer.form for name, layer in self.chosen.items()})
        return mod


def round_weight(weight: np.ndarray, form: str) -> np.ndarray:
    """Finite weights as `bnncc.dialect.scalars.rounded_to` has them, float32."""
    if form == "float16":
        return weight.astype(np.float16).astype(np.float32)
    return ((weight.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def is_zero_pad(expr: Any) -> bool:
    """Whether an expression is a tensor with zeros around it."""
    if not is_call(expr, "nn.pad"):
        return False
    a = attributes(expr)
    return a["pad_mode"] == "constant" and float(a.get("pad_value", 0.0)) == 0.0


def affine(low: float, high: float) -> tuple[np.float32, int]:
    """(scale, first) of 256 values ``scale · (first + level)`` that span a range; 0 is one of them."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / MOST_LEVEL)
    return (scale, round(low / float(scale))) if scale > 0 else (np.float32(1), 0)


def quantize_weight(weight: np.ndarray, axis: int) -> np.ndarray:
    """The nearest integers of −127 … 127 times a scale of each output channel, as float32. axis: of the channels."""
    others = tuple(i for i in range(weight.ndim) if i != axis)
    scale = np.abs(weight.astype("float64")).max(axis=others, keepdims=True) / MOST_WEIGHT
    scale[scale == 0] = 1
    return np.ascontiguousarray(np.rint(weight / scale) * scale, "float32")


def QuantizeFloat(layers: Sequence[QuantizedLayer]) -> Any:
    """The pass for the layers that were chosen."""
    return module_pass(lambda mod: _Quantize(mod, layers).run(), "QuantizeFloat")
