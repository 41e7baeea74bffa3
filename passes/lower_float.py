"""Float convolutions and dense layers take padded inputs and weights laid out for the register tile.

    y = nn.conv2d(x, W, padding, data_layout="NHWC")   -->   p = nn.pad(x, …)
                                                             y = bnncc.conv2d(p, W'[G, OB, KH, KW, I, OL])
    p = nn.pad(x); y = nn.conv2d(p, W, groups=I)       -->   y = bnncc.depthwise_conv2d(x, W'[KH, KW, I], padding)
    y = nn.conv2d(x, W, groups=I, data_layout="NCHW")  -->   y = bnncc.depthwise_conv2d(x, W'[I, KH, KW], padding,
                                                                                        data_layout="NCHW")
    y = matmul(x, W)                                   -->   y = bnncc.dense(x, W'[OB, K, OL])
    v = bnncc.round_to(x) {form}; y = nn.conv2d(v, W)  -->   y = bnncc.conv2d(x, W'[G, O, KH, KW, I, 1]) {form}

After `ToNHWC`. Where the target pads while it reads, and channels fill vectors, `bnncc.conv2d` has the padding, unless
a copy that changes the layout can have it for nothing. Weights of ±1 (times a scale per channel), whose layer stays
float because its input is no sign, are stored as bits and unpacked once per instance (`bnncc.unpack_weights`). Products
of rounded floats are for targets that have `rounded_forms`, and for channels that fill vectors; elsewhere values are
rounded before the layer. Declines weights that are no constants.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op as R

from bnncc.dialect.ops import attributes, call, is_call, shape_of
from bnncc.dialect.plan import Layer
from bnncc.passes.fuse_binary_conv import binary_weight
from bnncc.passes.nhwc_operators import is_planar
from bnncc.passes.rewriter import Rewriter, is_const, module_pass, numpy_of, opt_ins_of

#: Forms of rounded floats, and the number that input channels are a multiple of where they lie in vectors of 16 bytes.
ROUNDED_CHANNELS = {"tf32": 4, "float16": 8}


class _Lower(Rewriter):
    def __init__(self, mod: Any, target: Any):
        super().__init__(mod)
        self.target = target
        self.opt_ins = opt_ins_of(self.func)

    def rewrite(self, var: Any, value: Any) -> Any | None:
        if is_call(value, "nn.conv2d") and is_const(value.args[1]):
            if is_planar(value):
                return self.planar(var, value)
            return self.conv(var, value) if attributes(value)["data_layout"] == "NHWC" else None
        if is_call(value, "matmul") and is_const(value.args[1]) and len(shape_of(value.args[0])) == 2:
            return self.dense(var, value)
        return None

    def conv(self, var: Any, value: relax.Call) -> Any:
        a = attributes(value)
        weight = numpy_of(value.args[1])
        out, per_group, kh, kw = weight.shape
        common = {
            "out_channels": out, "kernel_size": (kh, kw), "strides": a["strides"], "dilation": a["dilation"],
        }  # fmt: skip
        if per_group == 1 and out == a["groups"]:
            self.add_layer(var, "depthwise conv2d", weight, weight.nbytes, 32)
            depthwise = np.ascontiguousarray(weight[:, 0].transpose(1, 2, 0))
            x, padding = self.unpadded(value.args[0], a["padding"])
            around = {"padding": padding} if any(padding) else {}
            return call("depthwise_conv2d", [x, relax.const(depthwise)], **common, **around)
        form = self.form_of(var, weight)
        x = self.unrounded(value.args[0]) if form else value.args[0]
        x, around = self.padded(var, x, a["padding"], weight)
        packed = self.packed(var, weight, a["groups"], "conv2d", form)
        return call("conv2d", [x, packed], **common, **around, **({"form": form} if form else {}))

    def planar(self, var: Any, value: relax.Call) -> Any:
        a = attributes(value)
        weight = numpy_of(value.args[1])
        self.add_layer(var, "depthwise conv2d", weight, weight.nbytes, 32)
        return call(
            "depthwise_conv2d", [value.args[0], relax.const(np.ascontiguousarray(weight[:, 0]))],
            out_channels=weight.shape[0], kernel_size=weight.shape[2:], strides=a["strides"], dilation=a["dilation"],
            padding=a["padding"], data_layout="NCHW",
        )  # fmt: skip

    def dense(self, var: Any, value: relax.Call) -> Any:
        weight = np.ascontiguousarray(numpy_of(value.args[1]).T)[:, :, None, None]
        form = self.form_of(var, weight)
        x = self.unrounded(value.args[0]) if form else value.args[0]
        packed = self.packed(var, weight, 1, "linear", form)
        return call("dense", [x, packed], out_channels=weight.shape[0], **({"form": form} if form else {}))

    def form_of(self, var: Any, weight: np.ndarray) -> str:
        """What the operands of a layer are rounded to by a kernel that multiplies nothing else; "": it has none."""
        form = self.opt_ins.get(var.name, "")
        split = binary_weight(weight)
        known = form in self.target.rounded_forms and weight.shape[1] % ROUNDED_CHANNELS[form] == 0
        return form if known and (split is None or not split[0].all()) else ""

    def unrounded(self, x: Any) -> Any:
        """A layer's input as it was before `bnncc.round_to`. Zeros around it are zeros either way."""
        bound = self.builder.lookup_binding(x) if isinstance(x, relax.Var) else None
        if is_call(bound, "bnncc.round_to"):
            return bound.args[0]
        if is_call(bound, "nn.pad"):
            inner = self.builder.lookup_binding(bound.args[0]) if isinstance(bound.args[0], relax.Var) else None
            if is_call(inner, "bnncc.round_to"):
                return self.emit(relax.Call(bound.op, [inner.args[0]], bound.attrs, bound.ty_args), f"{x.name}__float")
        return x

    def packed(self, var: Any, weight: np.ndarray, groups: int, op: str, form: str) -> Any:
        """The weights [O, I/groups, KH, KW] as [G, OB, KH, KW, I, OL], or for a linear layer [OB, K, OL].

        form: if any, OL is 1, and two channels of float16 are a word.
        """
        if form:
            tiled = tile_weight(weight, groups, 1)
            if form == "float16":
                halves = tiled.astype(np.float16).reshape(*tiled.shape[:4], -1, 2)
                tiled = np.ascontiguousarray(halves).view(np.uint32)
            self.add_layer(var, op, weight, tiled.nbytes, 16 if form == "float16" else 32)
            return relax.const(np.ascontiguousarray(tiled[0, :, 0, 0]) if op == "linear" else tiled)
        lanes = self.target.conv_lanes(weight.shape[0] // groups)
        split = binary_weight(weight)
        if split is None or not split[0].all():
            tiled = tile_weight(weight, groups, lanes)
            self.add_layer(var, op, weight, tiled.nbytes, 32)
            return relax.const(np.ascontiguousarray(tiled[0, :, 0, 0]) if op == "linear" else tiled)
        signs, scale = split
        tiled = tile_weight(signs, groups, lanes)
        bits = np.packbits(tiled > 0, axis=-1, bitorder="little")
        alpha = np.ones(weight.shape[0], "float32") if scale is None else scale
        alpha = np.ascontiguousarray(tile_weight(alpha.reshape(-1, 1, 1, 1), groups, lanes)[:, :, 0, 0, 0])
        self.add_layer(var, f"weight-only binary {op}", weight, bits.nbytes, 1)
        unpack = call("unpack_weights", [relax.const(bits), relax.const(alpha)], shape=tiled.shape)
        unpacked = self.emit(unpack, f"{var.name}__weight")
        if op == "linear":
            return self.emit(R.reshape(unpacked, (tiled.shape[1], *tiled.shape[4:])), f"{var.name}__matrix")
        return unpacked

    def unpadded(self, x: Any, padding: Any) -> tuple[Any, tuple[int, int, int, int]]:
        """An image without the zeros that `nn.pad` put around it, and all the zeros around that."""
        pad = self.builder.lookup_binding(x) if isinstance(x, relax.Var) else None
        if not is_call(pad, "nn.pad"):
            return x, tuple(padding)
        a = attributes(pad)
        before, after = a["pad_width"][::2], a["pad_width"][1::2]
        sides = (before[1], before[2], after[1], after[2])
        pixels = not any((before[0], after[0], before[3], after[3])) and min(sides) >= 0
        if a["pad_mode"] != "constant" or not pixels or float(a.get("pad_value", 0.0)) != 0.0:
            return x, tuple(padding)
        return pad.args[0], tuple(p + q for p, q in zip(padding, sides, strict=True))

    def padded(self, var: Any, x: Any, padding: Any, weight: np.ndarray) -> tuple[Any, dict[str, Any]]:
        """An image with its zeros around it, or without them, and the attribute that says which."""
        bare, around = self.unpadded(x, padding)
        if any(around) and self.target.pads_while_reading and weight.shape[1] % ROUNDED_CHANNELS["tf32"] == 0:
            bound = self.builder.lookup_binding(bare) if isinstance(bare, relax.Var) else None
            if not is_call(bound, "permute_dims"):
                return bare, {"padding": around}
        if not any(padding):
            return x, {}
        top, left, bottom, right = padding
        stored = self.emit(R.nn.pad(x, [0, 0, top, bottom, left, right, 0, 0]), f"{var.name}__padded")
        return stored, {"zero_rows": (top, bottom)} if (top or bottom) and np.isfinite(weight).all() else {}

    def add_layer(self, var: Any, op: str, weight: np.ndarray, weight_bytes: int, weight_bits: int) -> None:
        shape = shape_of(var)
        planar = attributes(self.definition[var]).get("data_layout") == "NCHW"
        nchw = (shape[0], shape[3], shape[1], shape[2]) if len(shape) == 4 and not planar else shape
        pixels = int(np.prod(shape)) // weight.shape[0]
        path = origin.path if (origin := self.origin(var)) else ""
        row = Layer(path, op, nchw, 32, weight_bits, pixels * weight.size, weight_bytes)
        self.layers.append(json.dumps(dataclasses.asdict(row)))


def tile_weight(weight: np.ndarray, groups: int, lanes: int) -> np.ndarray:
    """[O, I/groups, KH, KW] as [G, OB, KH, KW, I, OL], each group's outputs filled up with zeros."""
    out, depth, kh, kw = weight.shape
    per_group = out // groups
    blocks = -(-per_group // lanes)
    filled = np.zeros((groups, blocks * lanes, depth, kh, kw), weight.dtype)
    filled[:, :per_group] = weight.reshape(groups, per_group, depth, kh, kw)
    tiled = filled.reshape(groups, blocks, lanes, depth, kh, kw).transpose(0, 1, 4, 5, 3, 2)
    return np.ascontiguousarray(tiled)


def LowerFloat(target: Any) -> Any:
    """The pass for a target: its float vector decides the register tile."""
    return module_pass(lambda mod: _Lower(mod, target).run(), "LowerFloat")
