"""What the stages of all kernels share: their roles, which schedules recognise them by, and small helpers.

Every compute takes TE tensors and attributes and returns TE tensors, so that an anchor, its elementwise epilogue and a
packing stage compose into one PrimFunc (`te.create_prim_func`). Schedules live in `bnncc.targets.rules`; they recognise
a stage by its block annotation `ROLE`, never by its name:

    binary_conv2d        popcounts of one convolution, axes [N, OH, OW, G, OB, OL] + reduction [KH, KW, K]
    binary_conv2d.chunk  the same over at most 31 byte steps, axes [N, OH, OW, G, OB, OL, chunks] + reduction
    binary_conv2d.bytes  the same of bytes of words, axes [N, OH, OW, G, OB, chunks, OL] + reduction
    binary_conv2d.total  the sum of the chunks in a wider type
    binary_conv2d.lanes  popcounts of bytes that stay apart, axes [N, OH, OW / pixels of a vector, OB, chunks, OL, lane]
    binary_conv2d.lane_total  the sum of chunks and lanes in a wider type, axes [N, OH, OW, 1, OB, OL]
    byte_conv2d          dot products of bytes, axes [N, OH, OW, G, OB, OL] + reduction [KH, KW, K, 4]
    pack.bits            eight comparisons of a block of channels as one integer, reduction over the bit
    pack.words           the same for 32 channels of an NCHW image, axes [N, word, tile, pixel] + reduction over bits
    pack                 that integer narrowed to a byte
    levels               quantized values as small integers, before their bits are packed
    pad                  pixels around an image
    conv2d               float products, axes [N, OH, OW, G, OB, OL] + reduction [KH, KW, CI], or of float16
                         [KH, KW, CI / 2, 2]
    dense                float products, axes [N, OB, OL] + reduction [K] or [K / 2, 2]
    depthwise            float products, axes [N, OH, OW, C] + reduction [KH, KW]
    planar.rows          an image [N, C, H, W] as a window over planes reads it
    planar.max, .sum     windows over the planes of that image, axes [N, C, OH, OW] + reduction [KH, KW]; `Window`
    planar.products      the same, times a weight [C, KH, KW]
    softmax.*            the steps of a softmax over rows, each row by row
    permute              a transposition
    concat               tensors beside each other along the last axis
    reduction            pooling, means: any other reduction

Elementwise stages have no role.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from tvm import te, tirx

#: Key of the block annotation that tells a schedule rule what a stage is.
ROLE = "bnncc.role"
#: Key of the annotation of "pack.bits" that says how many bytes a block of the layout has.
LANES = "bnncc.lanes"
#: Key of the annotation of "pack.bits" that says whether some of the lanes of a vector can be padding and others not.
UNEVEN = "bnncc.uneven"
#: Key of the annotation of "pack.bits" that says whether bit i of a pixel is channel i (padding: bits beyond the last).
IN_ORDER = "bnncc.in_order"
#: Key of the annotation of "binary_conv2d.lane_total" that says how many popcounts of a byte each lane has summed.
STEPS = "bnncc.steps"
#: Key of the annotation of "binary_conv2d" that says how many words a step of its reduction takes, if more than one.
GROUP = "bnncc.group"
#: Key of the annotation of a stage ``depth − 2 · mismatches``: its depth. A reader may take the mismatches instead.
DEPTH = "bnncc.depth"
#: Key of the annotation of "byte_conv2d" that says whether two products may need more than 16 bits.
WIDE = "bnncc.wide"

#: Key of the annotation of a "binary_conv2d.total" of bit planes: what its pairs are, "xor", "and" or "and-".
FORM = "bnncc.form"

#: Key of the annotation of "conv2d" and "dense" that says what their operands are rounded to, where they are:
#: "tf32" or "float16". Weights are so rounded already; of float16 they are, two channels of the input to a word.
ROUNDED = "bnncc.rounded"

#: Key of the annotation of "conv2d" that says how many of the first and last rows of its input are zeros, where finite
#: weights make them count for nothing.
ZERO_ROWS = "bnncc.zero_rows"

#: Key of the annotation of a "reduction" that sums runs of values beside each other: how many to a run.
RUN_LENGTH = "bnncc.run_length"
#: Key of the annotation of "concat" that says of how many channels the runs are that all come from one tensor.
RUN = "bnncc.run"

#: Key of the annotation of "planar.max", "planar.sum" and "planar.products": the fields of their `Window`.
WINDOW = "bnncc.window"


class Window(NamedTuple):
    """Where a window over an image reads: pixel x of a row at stride · x + dilation · k − left for k < width."""

    height: int
    width: int
    stride_y: int
    stride_x: int
    dilation_y: int
    dilation_x: int
    top: int
    left: int

    @property
    def area(self) -> int:
        return self.height * self.width


#: (top, left, bottom, right)
Padding = tuple[int, int, int, int]

#: predicate → (comparison of a float with 0, whether the bit is its negation)
COMPARE: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "not_lt": (lambda x: x < tirx.const(0.0, "float32"), True),
    "gt": (lambda x: x > tirx.const(0.0, "float32"), False),
    "ge": (lambda x: x >= tirx.const(0.0, "float32"), False),
    "not_le": (lambda x: x <= tirx.const(0.0, "float32"), True),
}


def staged(shape: Sequence[Any], f: Callable[..., Any], name: str, role: str) -> te.Tensor:
    """`te.compute` whose block carries its role."""
    return te.compute(tuple(shape), f, name=name, attrs={ROLE: role})


def extents(tensor: te.Tensor) -> tuple[int, ...]:
    return tuple(int(extent) for extent in tensor.shape)


def window(size: int, kernel: int, stride: int, dilation: int) -> int:
    return (size - dilation * (kernel - 1) - 1) // stride + 1


def mismatches_of(x: te.Tensor) -> tuple[te.Tensor, int] | None:
    """The mismatches and the depth where `x` is ``depth − 2 · mismatches``, both int32."""
    attrs = x.op.attrs
    return (x.op.input_tensors[0], int(attrs[DEPTH])) if attrs and DEPTH in attrs else None


def nearest(index: Any, size: int, before: int, after: int) -> Any:
    """The index, or the edge where it lies in the padding: a maximum over a window minds no element seen twice."""
    if before > 0:
        index = tirx.max(index, 0)
    return tirx.min(index, size - 1) if after > 0 else index
