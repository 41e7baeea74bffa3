"""What `ToNHWC` does with the operators that know about images: one function each, old call → new call on 4-D images.

A function returns None where the operator is to stay in the model's layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op as R

from bnncc.dialect.ops import attributes, call, op_name, shape_of
from bnncc.passes.rewriter import is_const, numpy_of

#: Pixels of a row, counted in strides, below which vectors along it have too much of a rest. Measured on AVX-512.
_ROW = 14

Operator = Callable[[Any, relax.Call], Any]


def _in_two_axes(a: dict[str, Any], rank: int) -> dict[str, Any]:
    """Strides, dilation and padding of a window over an image's last two axes; height 1 where there is one axis."""
    spatial = rank - 2
    before, after = a["padding"][:spatial], a["padding"][spatial:]
    if spatial == 1:
        return {
            "strides": (1, a["strides"][0]),
            "dilation": (1, a["dilation"][0]),
            "padding": (0, before[0], 0, after[0]),
        }
    return {
        "strides": tuple(a["strides"][-2:]),
        "dilation": tuple(a["dilation"][-2:]),
        "padding": (*before[-2:], *after[-2:]),
    }


def _unfolded(p: Any, old: relax.Call, kernel: int, pad_value: int) -> Any:
    """The image of a 3-D operand whose depth the convolution's window has gathered into the channels."""
    a = attributes(old)
    depth = shape_of(old.args[0])[2]
    before, after = a["padding"][0], a["padding"][3]
    unfold = call(
        "unfold_depth", [p.image(old.args[0])],
        depth=depth, kernel=kernel, stride=a["strides"][0], dilation=a["dilation"][0], padding=(before, after),
        pad_value=pad_value, groups=a["groups"],
    )  # fmt: skip
    return p.emit(unfold, f"{old.args[0].name}__unfolded")


def _two_axis_weight(weight: np.ndarray) -> np.ndarray:
    """[O, I/G, (KD,) (KH,) KW] as [O, (KD·)I/G, KH, KW]."""
    if weight.ndim == 3:
        return weight[:, :, None]
    if weight.ndim == 5:
        out, per_group, kd, kh, kw = weight.shape
        return np.ascontiguousarray(weight.transpose(0, 2, 1, 3, 4).reshape(out, kd * per_group, kh, kw))
    return weight


def _conv(p: Any, old: relax.Call) -> Any | None:
    a = attributes(old)
    if not is_const(old.args[1]) or a["data_layout"] not in ("NCW", "NCHW", "NCDHW"):
        return None
    weight = numpy_of(old.args[1])
    source = _unfolded(p, old, weight.shape[2], 0) if weight.ndim == 5 else p.image(old.args[0])
    return R.nn.conv2d(
        source, relax.const(_two_axis_weight(weight)), **_in_two_axes(a, weight.ndim),
        groups=a["groups"], data_layout="NHWC", kernel_layout="OIHW", out_dtype="float32",
    )  # fmt: skip


def _binary_conv(p: Any, old: relax.Call) -> Any:
    a = attributes(old)
    weight = numpy_of(old.args[1])
    deep = weight.ndim == 5
    source = _unfolded(p, old, weight.shape[2], a["pad_value"]) if deep else p.image(old.args[0])
    return call(
        "binary_conv2d", [source, relax.const(_two_axis_weight(weight))], **_in_two_axes(a, weight.ndim),
        groups=a["groups"], pad_value=a["pad_value"], slices=weight.shape[2] if deep else 1, data_layout="NHWC",
    )  # fmt: skip


def _integer_conv(p: Any, old: relax.Call) -> Any:
    a = attributes(old)
    weight = numpy_of(old.args[1])
    source = _unfolded(p, old, weight.shape[2], a["pad_value"]) if weight.ndim == 5 else p.image(old.args[0])
    kept = {key: a[key] for key in ("groups", "pad_steps", "pad_value", "first", "every")}
    return call(
        "integer_conv2d", [source, relax.const(_two_axis_weight(weight)), old.args[2]],
        **_in_two_axes(a, weight.ndim), **kept, data_layout="NHWC",
    )  # fmt: skip


def _with_axis(p: Any, old: relax.Call) -> Any | None:
    """Operators whose per-channel constants are vectors along `axis`."""
    if len(shape_of(old.args[0])) < 3:
        return None
    attrs = attributes(old) | {"axis": 3}
    return call(str(op_name(old)).removeprefix("bnncc."), [p.image(old.args[0]), *old.args[1:]], **attrs)


def _pool(p: Any, old: relax.Call) -> Any | None:
    a = attributes(old)
    rank = len(shape_of(old.args[0]))
    make = R.nn.max_pool2d if "max" in str(op_name(old)) else R.nn.avg_pool2d
    if rank == 5:
        return _pool_in_depth(p, old, a, make)
    return make(
        p.image(old.args[0]), pool_size=a["pool_size"] if rank == 4 else (1, a["pool_size"][0]),
        **_in_two_axes(a, rank), ceil_mode=a["ceil_mode"], count_include_pad=a["count_include_pad"], layout="NHWC",
    )  # fmt: skip


def _pool_in_depth(p: Any, old: relax.Call, a: dict[str, Any], make: Any) -> Any | None:
    """First over each image, then over the depth: a maximum or a mean may be taken axis by axis."""
    n, c, depth, *_ = shape_of(old.args[0])
    if a["dilation"] != (1, 1, 1) or (any(a["padding"]) and not a["count_include_pad"] and make is R.nn.avg_pool2d):
        return None
    common = {"ceil_mode": a["ceil_mode"], "count_include_pad": a["count_include_pad"], "layout": "NHWC"}
    flat = p.emit(
        make(p.image(old.args[0]), pool_size=a["pool_size"][1:], **_in_two_axes(a, 5), **common),
        f"{old.args[0].name}__pooled",
        p.helper,
    )
    _, height, width, _ = shape_of(flat)
    columns = p.emit(R.reshape(flat, (n, depth, height * width, c)), f"{old.args[0].name}__columns")
    pooled = p.emit(
        make(
            columns, pool_size=(a["pool_size"][0], 1), strides=(a["strides"][0], 1),
            padding=(a["padding"][0], 0, a["padding"][3], 0), **common,
        ),
        f"{old.args[0].name}__pooled_columns",
        p.helper,
    )  # fmt: skip
    return R.reshape(pooled, (n * shape_of(pooled)[1], height, width, c))


def _adaptive_pool(p: Any, old: relax.Call) -> Any:
    return R.nn.adaptive_avg_pool2d(p.image(old.args[0]), attributes(old)["output_size"], layout="NHWC")


def _mean(p: Any, old: relax.Call) -> Any | None:
    """Over whole images."""
    a = attributes(old)
    shape = shape_of(old.args[0])
    rank = len(shape)
    if rank < 3 or {axis % rank for axis in a["axis"] or ()} != set(range(2, rank)):
        return None
    image = p.image(old.args[0])
    if rank == 5:
        image = p.emit(
            R.reshape(image, (shape[0], shape[2] * shape[3], shape[4], shape[1])), f"{old.args[0].name}__deep"
        )
    return R.mean(image, axis=[1, 2], keepdims=a["keepdims"])


def _pad(p: Any, old: relax.Call) -> Any | None:
    a = attributes(old)
    rank = len(shape_of(old.args[0]))
    before, after = a["pad_width"][::2], a["pad_width"][1::2]
    if rank == 3:
        width = [before[0], after[0], 0, 0, before[2], after[2], before[1], after[1]]
    elif rank == 4:
        width = [side[axis] for axis in (0, 2, 3, 1) for side in (before, after)]
    else:
        return None
    return R.nn.pad(p.image(old.args[0]), width, pad_mode=a["pad_mode"], pad_value=float(a.get("pad_value", 0.0)))


def _reshape(p: Any, old: relax.Call) -> Any | None:
    """Flattening a 1×1 image needs no transposition."""
    source, target = shape_of(old.args[0]), shape_of(old)
    if len(source) >= 3 and set(source[2:]) == {1} and target == source[:2]:
        return R.reshape(p.image(old.args[0]), target)
    return None


def _concat(p: Any, old: relax.Call) -> Any | None:
    """Along the channels."""
    fields = old.args[0].fields
    axis = attributes(old)["axis"]
    if any(len(shape_of(f)) < 3 for f in fields) or axis % len(shape_of(fields[0])) != 1:
        return None
    return R.concat([p.image(field) for field in fields], axis=3)


def _image_axis(rank: int, axis: int) -> int | None:
    """Where an axis of a value lies in its image; None for the depth, which is part of the image's first axis."""
    return {3: {0: 0, 1: 3, 2: 2}, 4: {0: 0, 1: 3, 2: 1, 3: 2}, 5: {1: 3, 3: 1, 4: 2}}[rank].get(axis)


def _in_depth(index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Positions [..., OUT] along the depth of [N, C, D, H, W] as positions [..., N·OUT] among its N·D images."""
    first = np.arange(shape[0]).repeat(index.shape[-1]) * shape[2]
    return np.ascontiguousarray(np.tile(index, shape[0]) + first.astype("int32"))


def _along_axis(p: Any, old: relax.Call) -> Any | None:
    """Operators that read other positions along one axis, named by constants whose last axis is that of the result."""
    shape = shape_of(old.args[0])
    rank = len(shape)
    if rank not in (3, 4, 5) or not all(is_const(c) for c in old.args[1:]) or len(shape_of(old)) != rank:
        return None
    a = attributes(old)
    constants = [numpy_of(c) for c in old.args[1:]]
    axis = _image_axis(rank, a["axis"])
    if axis is None:
        if a["axis"] != 2:
            return None
        axis = 0
        constants = [_in_depth(constants[0], shape), *(np.tile(c, shape[0]) for c in constants[1:])]
    image, arguments = p.image(old.args[0]), [relax.const(c) for c in constants]
    if op_name(old) == "take":
        return R.take(image, arguments[0], axis)
    return call(str(op_name(old)).removeprefix("bnncc."), [image, *arguments], **(a | {"axis": axis}))


def _flip(p: Any, old: relax.Call) -> Any | None:
    rank = len(shape_of(old.args[0]))
    axis = _image_axis(rank, attributes(old)["axis"] % rank) if rank in (3, 4, 5) else None
    return None if axis is None else R.flip(p.image(old.args[0]), axis)


def _strided_slice(p: Any, old: relax.Call) -> Any | None:
    rank = len(shape_of(old.args[0]))
    axes, *bounds = ([int(field.value) for field in argument.fields] for argument in old.args[1:])
    moved = [_image_axis(rank, axis % rank) if rank in (3, 4, 5) else None for axis in axes]
    return None if None in moved else R.strided_slice(p.image(old.args[0]), moved, *bounds)


#: Operations of a window over planes, which are written out.
_WINDOW = 64


def is_planar(old: Any) -> bool:
    """Whether a pool, mean or depthwise convolution has a good kernel on the planes of an NCHW image."""
    name = op_name(old)
    if name not in ("nn.max_pool2d", "nn.avg_pool2d", "nn.conv2d", "nn.adaptive_avg_pool2d", "mean"):
        return False
    a = attributes(old)
    if name in ("nn.adaptive_avg_pool2d", "mean"):
        shape = shape_of(old.args[0])
        image = len(shape) == 4 and shape[2] * shape[3] >= _ROW
        if name == "mean":
            return image and {axis % 4 for axis in a["axis"] or ()} == {2, 3}
        return image and a["layout"] == "NCHW" and tuple(a["output_size"]) == (1, 1)
    if name != "nn.conv2d":
        layout, kernel, served = a["layout"], a["pool_size"], True
    elif is_const(old.args[1]):
        (out, per_group, *kernel), layout = shape_of(old.args[1]), a["data_layout"]
        served = per_group == 1 and out == a["groups"]
    else:
        return False
    wide = shape_of(old.args[0])[3] >= _ROW * a["strides"][1]
    return served and layout == "NCHW" and wide and a["strides"][1] <= 2 and kernel[0] * kernel[1] <= _WINDOW


#: Operators below that are as well off in the model's layout.
ANY_LAYOUT = frozenset({"bnncc.scale_shift", "concat"})

OPERATORS: dict[str, Operator] = {
    **dict.fromkeys(("nn.conv1d", "nn.conv2d", "nn.conv3d"), _conv),
    **dict.fromkeys(("bnncc.binary_conv1d", "bnncc.binary_conv2d", "bnncc.binary_conv3d"), _binary_conv),
    **dict.fromkeys(("bnncc.integer_conv1d", "bnncc.integer_conv2d", "bnncc.integer_conv3d"), _integer_conv),
    **dict.fromkeys(("bnncc.scale_shift", "bnncc.threshold", "bnncc.lookup"), _with_axis),
    **dict.fromkeys(("nn.max_pool1d", "nn.max_pool2d", "nn.max_pool3d"), _pool),
    **dict.fromkeys(("nn.avg_pool1d", "nn.avg_pool2d", "nn.avg_pool3d"), _pool),
    "nn.adaptive_avg_pool2d": _adaptive_pool,
    "mean": _mean,
    "nn.pad": _pad,
    "reshape": _reshape,
    "concat": _concat,
    **dict.fromkeys(("take", "bnncc.resample", "bnncc.pool_axis"), _along_axis),
    "flip": _flip,
    "strided_slice": _strided_slice,
}
