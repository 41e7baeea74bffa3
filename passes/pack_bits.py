"""Binary operators take packed words; signs become packing kernels.

    s = bnncc.sign(x)                                  p = bnncc.pack(x, padding, pad_bit, layout)
    y = bnncc.binary_conv2d(s, W, padding)     -->     a = bnncc.xnor_conv2d(memory.view(p, words), packed W)
                                                       y = astype(a, "float32")
    b = bnncc.threshold(y, t)                          q = bnncc.threshold_pack(a, t, layout)
    r = nn.relu(y)                                     r = astype(maximum(a, 0), "float32")

After `ToNHWC`. A layer packs what it reads, in the layout it reads (groups, padding); equal packs are one. The float
spelling of a sign stays for readers that need floats and is dead otherwise. Zero padding of ±1 values is padding with
−1 and a correction: for every window that reaches outside, the sum of the weights it lost, which depends on the pixel
only through which rows and columns of the window lie outside. Ternary values pad with zero exactly. Declines nothing:
what reaches it is binary.
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
from bnncc.passes.fuse_binary_conv import is_ternary
from bnncc.passes.rewriter import Origin, Rewriter, module_pass, numpy_of
from bnncc.runtime.bits import BitLayout

_TO_NHWC = (0, 2, 3, 1)
_NO_PADDING = (0, 0, 0, 0)


class _Pack(Rewriter):
    def __init__(self, mod: Any, target: Any):
        super().__init__(mod)
        self.target = target
        self.packed: dict[Any, Any] = {}
        self.accumulators: dict[Any, Any] = {}  # old binary_conv2d variable → its int32 accumulator

    def rewrite(self, var: Any, value: Any) -> Any | None:
        old = self.definition[var]
        if is_call(old, "bnncc.binary_conv2d"):
            return self.conv(var, old)
        if is_call(old, "bnncc.binary_dense"):
            return self.dense(var, old)
        if is_call(old, "nn.relu") and old.args[0] in self.accumulators and len(shape_of(var)) == 4:
            positive = R.maximum(self.accumulators[old.args[0]], relax.const(0, "int32"))
            return R.astype(self.emit(positive, f"{var.name}__positive"), "float32")
        return None

    # -- layers --------------------------------------------------------------------------------------------------

    def conv(self, var: Any, old: relax.Call) -> Any:
        a = attributes(old)
        weight = numpy_of(old.args[1])
        accumulator = self.product(var, old.args[0], weight, a, "binary conv2d")
        self.accumulators[var] = accumulator
        return R.astype(accumulator, "float32")

    def dense(self, var: Any, old: relax.Call) -> Any:
        weight = numpy_of(old.args[1])[:, :, None, None]
        one = {"strides": (1, 1), "dilation": (1, 1), "groups": 1, "padding": _NO_PADDING, "pad_value": -1}
        accumulator = self.product(var, old.args[0], weight, one, "binary linear")
        self.accumulators[var] = accumulator
        # The image of a dense layer is 1×N pixels; its float form drops the unit axes again.
        floats = self.emit(R.astype(accumulator, "float32"), f"{var.name}__pixels")
        return R.reshape(floats, shape_of(var))

    def product(self, var: Any, source: Any, weight: np.ndarray, a: dict[str, Any], op: str) -> Any:
        """Emits the int32 accumulator [N, OH, OW, O] of a layer with ±1/0 weight [O, I/groups, KH, KW]."""
        out, per_group, kh, kw = weight.shape
        groups, slices = a["groups"], a.get("slices", 1)
        ternary = self.is_ternary(source)
        layout = self.layout(per_group * groups, groups * slices)
        deep = is_call(self.definition.get(source), "bnncc.unfold_depth")  # of one slice, too: its depth may be padded
        unfold = attributes(self.definition[source]) if deep else None
        depth_padding = unfold["padding"] if unfold else (0, 0)
        zero_padded = a["pad_value"] == 0 and any((*a["padding"], *depth_padding)) and not ternary
        # Padding with bits 0 may be the convolution's own business.
        read = self.target.pads_while_reading and a["pad_value"] != 1 and not ternary
        before, within = (_NO_PADDING, a["padding"]) if read else (a["padding"], _NO_PADDING)
        bits = self.bits_of(source, layout, before, int(a["pad_value"] == 1), ternary)
        words = self.view(bits, layout)
        ternary_weight = not weight.all()
        in_lanes = 0
        if groups == 1 and not (ternary or ternary_weight) and layout.word_bits == 8:
            wide = shape_of(words)[2] + within[1] + within[3]
            width = (wide - (kw - 1) * a["dilation"][1] - 1) // a["strides"][1] + 1
            in_lanes = self.target.reduction_lanes(layout.bytes, kh * kw, width, a["strides"][1], out)
        lanes = self.target.lane_block if in_lanes else self.target.binary_lanes(out // groups)
        packed = pack_weight(weight, groups, layout.word_bits, layout.lanes, lanes, slices)
        args = [words, relax.const(reduction_in_lanes(packed, in_lanes) if in_lanes else packed)]
        if ternary_weight and not ternary:
            args.append(relax.const(np.abs(weight).reshape(out, -1).sum(axis=1).astype("int32")))
        if zero_padded:
            args += [relax.const(c) for c in zero_padding_correction(weight, shape_of(source), a, unfold)]
        product = call(
            "xnor_conv2d", args,
            out_channels=out, depth=per_group * kh * kw, kernel_size=(kh, kw), strides=a["strides"],
            dilation=a["dilation"], n_eff=int(ternary_weight and not ternary), corrected=int(zero_padded),
            **({"in_lanes": in_lanes} if in_lanes else {}), **({"padding": tuple(within)} if any(within) else {}),
            **({} if self.target.counting == "words" else {"counting": self.target.counting}),
        )  # fmt: skip
        path = origin.path if (origin := self.origin(var)) else ""
        accumulator = self.emit(product, f"{var.name}__acc", Origin("", path))
        n, oh, ow, _ = shape_of(accumulator)
        self.add_layer(
            Layer(
                path=path,
                op=op,
                output_shape=shape_of(var) if len(shape_of(var)) == 2 else (n, out, oh, ow),
                activation_bits=2 if ternary else 1,
                weight_bits=2 if ternary_weight else 1,
                macs=n * oh * ow * weight.size,
                weight_bytes=numpy_of(args[1]).nbytes,
            )
        )
        return accumulator

    def add_layer(self, layer: Layer) -> None:
        self.layers.append(json.dumps(dataclasses.asdict(layer)))

    # -- packed values -------------------------------------------------------------------------------------------

    def layout(self, channels: int, groups: int) -> BitLayout:
        return self.target.bit_layout(channels, groups)  # type: ignore[no-any-return]

    def is_ternary(self, source: Any) -> bool:
        definition = self.definition.get(source)
        if is_call(definition, "bnncc.unfold_depth"):
            return self.is_ternary(definition.args[0])
        return is_ternary(source, self.definition)

    def bits_of(self, source: Any, layout: BitLayout, padding: Any, pad_bit: int, ternary: bool) -> Any:
        """The packed bytes of a ±1 valued old variable, padded."""
        padding = tuple(padding)
        key = (source, layout, padding, pad_bit if any(padding) else 0)
        if key not in self.packed:
            self.packed[key] = self.make_bits(source, layout, padding, pad_bit, ternary)
        return self.packed[key]

    def make_bits(self, source: Any, layout: BitLayout, padding: Any, pad_bit: int, ternary: bool) -> Any:
        definition = self.definition[source]
        origin = self.packed_origin(source, layout, padding, pad_bit, ternary)
        name = f"{source.name}__bits" + ("_padded" if any(padding) else "")
        form = layout.to_json()
        if is_call(definition, "bnncc.sign"):
            x, data_layout = self.image_of(definition.args[0])
            packed = call(
                "pack", [x], predicate=attributes(definition)["predicate"], planes=2 if ternary else 1,
                padding=padding, pad_bit=pad_bit, data_layout=data_layout, **form,
            )  # fmt: skip
            return self.emit(packed, name, origin)
        if is_call(definition, "bnncc.unfold_depth"):
            return self.unfolded(source, definition, padding, pad_bit, ternary)
        if any(padding):
            inner = self.bits_of(source, layout, _NO_PADDING, 0, ternary)
            return self.emit(call("pad_bits", [inner], padding=padding, pad_bit=pad_bit, **form), name, origin)
        if is_call(definition, "take"):
            inner = self.bits_of(definition.args[0], layout, _NO_PADDING, 0, ternary)
            return self.emit(R.take(inner, definition.args[1], attributes(definition)["axis"]), name, origin)
        if is_call(definition, "nn.max_pool2d"):
            a = attributes(definition)
            inner = self.bits_of(definition.args[0], layout, _NO_PADDING, 0, ternary)
            pooled = call(
                "max_pool2d_bits", [inner], pool_size=a["pool_size"], strides=a["strides"],
                padding=_pool_padding(shape_of(inner), shape_of(source), a), planes=2 if ternary else 1, **form,
            )  # fmt: skip
            return self.emit(pooled, name, origin)
        accumulator = self.accumulators[definition.args[0]]
        a = attributes(definition)
        form |= {"inexact": a["inexact"]} if "inexact" in a else {}
        if is_call(definition, "bnncc.threshold"):
            return self.emit(call("threshold_pack", [accumulator, definition.args[1]], **form), name, origin)
        looked_up = call("lookup_pack", [accumulator, definition.args[1]], lowest=a["lowest"], step=a["step"], **form)
        return self.emit(looked_up, name, origin)

    def unfolded(self, source: Any, definition: relax.Call, padding: Any, pad_bit: int, ternary: bool) -> Any:
        """The slices of a 3-D convolution beside each other: whole words move, each slice a group of the layout."""
        a = attributes(definition)
        inner_layout = self.layout(shape_of(source)[3] // a["kernel"], a["groups"])
        inner = self.bits_of(definition.args[0], inner_layout, padding, pad_bit, ternary)
        attrs = {**a, **inner_layout.to_json(), "unfold_groups": a["groups"], "pad_bit": int(a["pad_value"] == 1)}
        return self.emit(call("unfold_depth_bits", [inner], **attrs), f"{source.name}__bits")

    def image_of(self, x: Any) -> tuple[Any, str]:
        """What a packing kernel reads for an old variable: an image, straight from NCHW where only it needs that."""
        new = self.replaced(x)
        if len(shape_of(new)) == 2:
            rows, size = shape_of(new)
            return self.emit(R.reshape(new, (1, 1, rows, size)), f"{x.name}__image"), "NHWC"
        definition = self.builder.lookup_binding(new) if isinstance(new, relax.Var) else None
        moved = is_call(definition, "permute_dims") and attributes(definition)["axes"] == _TO_NHWC
        if definition is not None and moved and self.uses[x] == 1:
            return definition.args[0], "NCHW"
        return new, "NHWC"

    def view(self, bits: Any, layout: BitLayout) -> Any:
        """The same memory as words."""
        if layout.word_bits == 8:
            return bits
        shape = (*shape_of(bits)[:-1], layout.words)
        return self.emit(R.memory.view(bits, shape, layout.word_dtype), f"{bits.name}__words")

    def packed_origin(self, source: Any, layout: BitLayout, padding: Any, pad_bit: int, ternary: bool) -> Origin | None:
        origin = self.origin(source)
        if origin is None:
            return None
        pad_value = 0 if ternary else 2 * pad_bit - 1
        bits = {**layout.to_json(), "planes": 1 + ternary, "padding": list(padding), "pad_value": pad_value}
        return Origin(origin.node, origin.path, origin.order, bits)


def pack_weight(
    weight: np.ndarray, groups: int, word_bits: int, block_lanes: int, lanes: int, slices: int = 1
) -> np.ndarray:
    """Weights [O, slices·I/groups, KH, KW] of ±1/0 as words [G, OB, KH, KW, (2,) K, OL]; two planes if any is zero.

    slices: parts of the input channels whose bits each fill whole words (the depth of a 3-D convolution).
    """
    out, per_group, kh, kw = weight.shape
    layout = BitLayout(per_group, slices, word_bits, block_lanes)
    pixels = weight.transpose(0, 2, 3, 1)
    planes = [pixels > 0] if weight.all() else [pixels > 0, pixels != 0]
    words = np.stack([layout.pack(plane) for plane in planes], axis=3)  # [O, KH, KW, planes, K]
    blocks = -(-(out // groups) // lanes)
    filled = np.zeros((groups, blocks * lanes, *words.shape[1:]), words.dtype)
    filled[:, : out // groups] = words.reshape(groups, out // groups, *words.shape[1:])
    tiled = filled.reshape(groups, blocks, lanes, kh, kw, len(planes), -1).transpose(0, 1, 3, 4, 5, 6, 2)
    return np.ascontiguousarray(tiled[:, :, :, :, 0] if len(planes) == 1 else tiled)


def reduction_in_lanes(packed: np.ndarray, lanes: int) -> np.ndarray:
    """Bytes [1, OB, KH, KW, K, OL] of weights as [OB, KH, KW, V, OL, lanes]: a vector of the reduction for each output
    channel. Fewer than `lanes` bytes repeat, for the pixels beside each other in a vector of the input."""
    blocks, kh, kw, size, outputs = packed.shape[1:]
    by_channel = np.swapaxes(packed[0], -1, -2)
    if size < lanes:
        by_channel = np.tile(by_channel, lanes // size)
    vectors = by_channel.reshape(blocks, kh, kw, outputs, -1, lanes)
    return np.ascontiguousarray(np.swapaxes(vectors, 3, 4))


def zero_padding_correction(
    weight: np.ndarray, source: tuple[int, ...], a: dict[str, Any], unfold: dict[str, Any] | None = None
) -> list[np.ndarray]:
    """What an input padded with −1 lacks against one padded with 0: the sum of the weights that lie outside.

    weight [O, slices·I/groups, KH, KW]; source: shape [N, H, W, C] of the input image; a: the convolution's attributes;
    unfold: those of the `unfold_depth` before it. Returns correction int32 [row classes, column classes, O] and int32
    classes of the output's rows [OH] and columns [OW]; with a depth, correction has a first axis for the classes of the
    output's images, int32 [N], which come last.
    """
    images, height, width, _ = source
    slices = unfold["kernel"] if unfold else 1
    out, channels, kh, kw = weight.shape
    taps = weight.reshape(out, slices, channels // slices, kh, kw).sum(axis=2, dtype="int64")  # [O, slices, KH, KW]
    top, left, bottom, right = a["padding"]
    inside_y, rows = _classes(height, kh, a["strides"][0], a["dilation"][0], top, bottom)
    inside_x, cols = _classes(width, kw, a["strides"][1], a["dilation"][1], left, right)
    inside_z, depths = np.ones((1, 1), bool), np.zeros(1, "int32")
    if unfold:
        inside_z, depths = _classes(unfold["depth"], slices, unfold["stride"], unfold["dilation"], *unfold["padding"])
    inside = inside_z[:, None, None, :, None, None] & inside_y[:, None, None, :, None] & inside_x[:, None, None, :]
    correction = np.einsum("zrcdij,odij->zrco", (~inside).astype("int64"), taps).astype("int32")
    if not unfold:
        return [correction[0], rows, cols]
    return [correction, rows, cols, np.tile(depths, images // len(depths))]


def _pool_padding(source: tuple[int, ...], pooled: tuple[int, ...], a: dict[str, Any]) -> tuple[int, int, int, int]:
    """(top, left, bottom, right) of a pool [N, H, W, …] → [N, OH, OW, …] whose last windows may reach further out,
    because the output's size was rounded up."""
    top, left = a["padding"][:2]
    bottom, right = (
        (pooled[i] - 1) * a["strides"][i - 1] + a["pool_size"][i - 1] - source[i] - before
        for i, before in ((1, top), (2, left))
    )
    return top, left, max(bottom, 0), max(right, 0)


def _classes(
    size: int, kernel: int, stride: int, dilation: int, before: int, after: int
) -> tuple[np.ndarray, np.ndarray]:
    """Which of a window's positions lie inside, bool [classes, kernel], and the class of each output, int32 [OUT]."""
    count = (size + before + after - dilation * (kernel - 1) - 1) // stride + 1
    at = np.arange(count)[:, None] * stride + np.arange(kernel)[None] * dilation - before
    classes, index = np.unique((at >= 0) & (at < size), axis=0, return_inverse=True)
    return classes, index.reshape(-1).astype("int32")


def PackBits(target: Any) -> Any:
    """The pass for a target (`bnncc.targets.descriptor.TargetSpec`): its word size and lanes decide the layouts."""
    return module_pass(lambda mod: _Pack(mod, target).run(), "PackBits")
