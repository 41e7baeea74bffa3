"""What random networks are made of: each operation draws its options for the value at hand and makes a module.

Everything is biased towards trouble: zeros and −0 among weights, batch norms whose flip lies on a value that occurs,
strides, groups and paddings of every kind.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import bnncc.layers as layers
import bnncc.quantizations as quantizations
from bnncc.quantizations import InputDoReFa, Pact, Quantization, WeightDoReFa

from .branches import heaviside, sign

Draw = Callable[[st.SearchStrategy[Any]], Any]


class Kind(enum.IntEnum):
    """What a value's numbers are like, best first: the result of several operands is as bad as the worst.

    GRID: small multiples of a power of two, so that sums of them are exact in any order.
    FLOAT: of moderate size. TIED: the same, but some that are 0 in theory may be a rounding error instead; no sign may
    read them, because eager's own order of summation decides it. WILD: of any size. NAN: NaN and infinities too.
    """

    GRID = 0
    FLOAT = 1
    TIED = 2
    WILD = 3
    NAN = 4


@dataclass(frozen=True)
class Value:
    """A value of a network.

    exact: whether all that it depends on is bit-equal to eager. sample: what eager has. plain: whether its network is
    to stay exact. product: whether a layer of bits made it.
    """

    kind: Kind
    exact: bool
    sample: torch.Tensor
    plain: bool = False
    product: bool = False

    @property
    def channels(self) -> int:
        return self.sample.shape[1]

    @property
    def rank(self) -> int:
        """Axes of an image; 0 behind a flattening."""
        return self.sample.ndim - 2

    @property
    def tame(self) -> bool:
        return self.kind <= Kind.TIED


@dataclass(frozen=True)
class Made:
    """An operation with its options. The other fields are its result's, as in `Value`."""

    text: str
    make: Callable[[], nn.Module]
    kind: Kind
    exact: bool = True
    product: bool = False


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        return self.function(*x)


def _choice(draw: Draw, *options: Any) -> Any:
    return draw(st.sampled_from(options))


def _text(name: str, **options: Any) -> str:
    return f"{name}({', '.join(f'{key}={value}' for key, value in options.items())})"


# -- quantizations ---------------------------------------------------------------------------------------------------


class Spelled(Quantization):
    """A quantization written out, as models have them."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def _straight_through(x: torch.Tensor) -> torch.Tensor:
    return (heaviside(x) - x).detach() + x


def _learned_step(x: torch.Tensor) -> torch.Tensor:
    v = torch.clamp(x / 0.21, -4, 3)
    return ((torch.round(v) - v).detach() + v) * 0.21


def _pact(bits: int, alpha: float) -> Quantization:
    pact = Pact(bits)
    pact.alpha.data.fill_(alpha)
    return pact


#: Signs that take anything, NaN too.
_SIGNS: Mapping[str, Callable[[], Quantization]] = {
    "sign": quantizations.Sign,
    "ternary": lambda: Spelled(torch.sign),
    "x >= 0": lambda: Spelled(lambda x: torch.where(x >= 0, 1.0, -1.0)),
    "x > 0": quantizations.SteHeaviside,
    "2 (x >= 0) - 1": lambda: Spelled(lambda x: 2 * (x >= 0).float() - 1),
    "approxsign": quantizations.ApproxSign,
    "swishsign": quantizations.SwishSign,
    "progressive sign": quantizations.ProgressiveSign,
    "sign, clamped": lambda: Spelled(lambda x: sign(torch.clamp(x, -1, 1))),
    "ternary of tanh": lambda: Spelled(lambda x: torch.sign(torch.tanh(x))),
    "masked fill": lambda: Spelled(lambda x: torch.sign(x).masked_fill(x == 0, 1.0)),
}

#: Others, of moderate numbers; those in _EXACT give small integers.
_LEVELS: Mapping[str, Callable[[], Quantization]] = {
    "straight-through": lambda: Spelled(_straight_through),
    "0.37 sign": lambda: Spelled(lambda x: 0.37 * sign(x)),
    "0.5 ternary": lambda: Spelled(lambda x: 0.5 * torch.sign(x)),
    **{f"dorefa {bits}": lambda bits=bits: InputDoReFa(bits) for bits in (1, 2, 3, 4, 8)},
    "pact 2 to 3": lambda: _pact(2, 3.0),
    "pact 4 to 2.5": lambda: _pact(4, 2.5),
    "rounded to ±7": lambda: Spelled(lambda x: torch.clamp(torch.round(x), -7, 7)),
    "learned step": lambda: Spelled(_learned_step),
}
_EXACT = ("straight-through", "0.5 ternary", "dorefa 1", "pact 2 to 3", "rounded to ±7")


def _per_output(weight: torch.Tensor, function: Callable[..., torch.Tensor]) -> torch.Tensor:
    return function(weight, dim=tuple(range(1, weight.ndim)), keepdim=True)


_WEIGHTS: Mapping[str, Callable[[], Quantization]] = {
    "sign": quantizations.Sign,
    "x > 0": quantizations.SteHeaviside,
    "ternary": lambda: Spelled(torch.sign),
    "dorefa 1": lambda: WeightDoReFa(1),
    "0.25 sign": lambda: Spelled(lambda w: 0.25 * sign(w)),
    "integers to 7": lambda: Spelled(lambda w: torch.clamp(torch.round(3 * w), -7, 7)),
    # XNOR-Net
    "mean |w| sign": lambda: Spelled(lambda w: _per_output(w.abs(), torch.mean) * sign(w)),
    # ReActNet
    "mean |w| sign, straight-through": lambda: Spelled(
        lambda w: (_per_output(w.abs(), torch.mean) * sign(w)).detach() - torch.clamp(w, -1, 1).detach()
        + torch.clamp(w, -1, 1)
    ),
    "mean |w| ternary": lambda: Spelled(lambda w: _per_output(w.abs(), torch.mean) * torch.sign(w)),
    **{f"dorefa {bits}": lambda bits=bits: WeightDoReFa(bits) for bits in (2, 3, 4)},
}  # fmt: skip
_EXACT_WEIGHTS = ("sign", "x > 0", "ternary", "dorefa 1", "0.25 sign", "integers to 7")


class RSign(Quantization):
    """sign(x + shift), the shift learned per channel: ReActNet's."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randint(-8, 9, (1, channels, *[1] * rank)) / 4)

    def quantize(self, x: torch.Tensor) -> torch.Tensor:
        return sign(x + self.shift)


def _quantizer(draw: Draw, x: Value) -> tuple[str, Callable[[], Quantization], Kind] | None:
    """The name of a quantization that may read x, what makes it, and the kind of its result."""
    if x.kind == Kind.TIED:
        return None
    names = [*_SIGNS]
    if x.tame and draw(st.integers(0, 2)) == 2:
        names = ["RSign", *(_EXACT if x.plain else _LEVELS)]
    name = _choice(draw, *names)
    if name == "RSign":
        channels, rank = x.channels, x.rank
        return name, lambda: RSign(channels, rank), Kind.GRID
    return name, {**_SIGNS, **_LEVELS}[name], Kind.GRID if name in _SIGNS or name in _EXACT else Kind.FLOAT


def quantize(draw: Draw, x: Value) -> Made | None:
    found = _quantizer(draw, x)
    if found is None:
        return None
    name, make, kind = found
    return Made(f"QActivation({name!r})", lambda: layers.QActivation(make()), kind)


# -- layers ----------------------------------------------------------------------------------------------------------

_CHANNELS = (1, 2, 3, 4, 8, 5, 7, 16, 12, 31, 32, 33, 40, 64, 65)


def _window(draw: Draw, x: Value) -> dict[str, Any]:
    """Arguments that convolutions share; every second keeps the shape, so that branches meet again."""
    groups = _choice(draw, 1, 1, *_divisors(x.channels))
    if draw(st.booleans()):
        kernel = _choice(draw, 1, 3)
        return {"out_channels": x.channels, "kernel_size": kernel, "padding": kernel // 2, "groups": groups}
    out = _choice(draw, *_CHANNELS) if groups == 1 else groups * _choice(draw, 1, 2, 3)
    kernel = tuple(_choice(draw, *range(1, 1 + min(extent, 3))) for extent in x.sample.shape[2:])
    return {
        "out_channels": out, "kernel_size": kernel, "stride": _choice(draw, 1, 1, 2, 3),
        "padding": tuple(_choice(draw, 0, 1, 2) for _ in range(x.rank)),
        "dilation": _choice(draw, 1, 1, 2), "groups": groups,
    }  # fmt: skip


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _products(inputs: Kind, weight: str, plain: bool) -> tuple[Kind, bool]:
    """The kind of a sum of products of bits, and whether it is exact. plain: padded with integers, without a bias."""
    exact = inputs == Kind.GRID and weight in _EXACT_WEIGHTS and plain
    return (Kind.GRID if exact else Kind.TIED), exact


def binary_conv(draw: Draw, x: Value) -> Made | None:
    if not x.rank:
        return linear(draw, x)
    if (found := _quantizer(draw, x)) is None:
        return None
    name, activation, kind = found
    weight, window = _choice(draw, *(_EXACT_WEIGHTS if x.plain else _WEIGHTS)), _window(draw, x)
    padding = {"pad_value": _choice(draw, *(-1, 0, 1, 0.5)[: 3 + (not x.plain)])} if draw(st.booleans()) else {}
    if draw(st.integers(0, 7)) == 7:
        padding = {"padding_mode": _choice(draw, "reflect", "replicate", "circular")}
    bias = {"bias": True} if not x.plain and draw(st.integers(0, 7)) == 7 else {}
    kind, exact = _products(kind, weight, not bias and padding.get("pad_value") != 0.5)
    cls, channels = getattr(layers, f"QConv{x.rank}d"), x.channels
    given = window | padding | bias
    return Made(
        _text(cls.__name__, inputs=name, weights=weight, **given),
        lambda: cls(channels, **given, input_quantization=activation(), weight_quantization=_WEIGHTS[weight]()),
        kind, exact, True,
    )  # fmt: skip


class Transposed(nn.Module):
    """A transposed convolution of bits."""

    def __init__(self, inner: nn.Module, activation: Quantization, weight: Quantization) -> None:
        super().__init__()
        self.inner, self.activation, self.quantize = inner, layers.QActivation(activation), weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: Any = self.inner
        function = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}[x.ndim - 2]
        weight = self.quantize(inner.weight)
        return function(
            self.activation(x), weight, None, inner.stride, inner.padding, inner.output_padding, inner.groups,
            inner.dilation,
        )  # fmt: skip


def transposed_conv(draw: Draw, x: Value) -> Made | None:
    if not x.rank or (found := _quantizer(draw, x)) is None:
        return None
    name, activation, kind = found
    weight = _choice(draw, "sign", "ternary", "0.25 sign", "integers to 7", *["dorefa 2"] * (not x.plain))
    given = {
        "out_channels": _choice(draw, *_CHANNELS), "kernel_size": _choice(draw, 1, 2, 3),
        "stride": _choice(draw, 1, 2, 3), "padding": _choice(draw, 0, 1), "output_padding": _choice(draw, 0, 0, 1),
    }  # fmt: skip
    cls, channels = getattr(nn, f"ConvTranspose{x.rank}d"), x.channels
    kind, exact = _products(kind, weight, True)
    return Made(
        _text(f"binary {cls.__name__}", inputs=name, weights=weight, **given),
        lambda: Transposed(cls(channels, **given, bias=False), activation(), _WEIGHTS[weight]()),
        kind, exact, True,
    )  # fmt: skip


def linear(draw: Draw, x: Value) -> Made | None:
    """On what was flattened, or on the last axis of an image."""
    if (found := _quantizer(draw, x)) is None or (found[0] == "RSign" and x.rank):
        return None
    name, activation, kind = found
    weight, features = _choice(draw, *(_EXACT_WEIGHTS if x.plain else _WEIGHTS)), x.sample.shape[-1]
    given = {"out_features": _choice(draw, *_CHANNELS), "bias": not x.plain and draw(st.integers(0, 3)) == 3}
    kind, exact = _products(kind, weight, not given["bias"])
    return Made(
        _text("QLinear", inputs=name, weights=weight, **given),
        lambda: layers.QLinear(features, **given, input_quantization=activation(),
                               weight_quantization=_WEIGHTS[weight]()),
        kind, exact, True,
    )  # fmt: skip


def weight_only(draw: Draw, x: Value) -> Made | None:
    if not x.rank or not x.tame or x.plain:
        return None
    cls, channels, given = getattr(layers, f"QConv{x.rank}d_NoAct"), x.channels, _window(draw, x)
    weight = _choice(draw, "sign", "ternary", "mean |w| sign")
    kind = Kind.GRID if x.kind == Kind.GRID and weight != "mean |w| sign" else Kind.TIED
    return Made(
        _text(cls.__name__, weights=weight, **given),
        lambda: cls(channels, **given, weight_quantization=_WEIGHTS[weight]()),
        kind, False,
    )  # fmt: skip


def float_conv(draw: Draw, x: Value) -> Made | None:
    if not x.tame or x.plain:
        return None
    if not x.rank:
        features, out = x.channels, _choice(draw, *_CHANNELS)
        return Made(_text("Linear", out_features=out), lambda: nn.Linear(features, out), max(x.kind, Kind.FLOAT), False)
    cls, channels, given = getattr(nn, f"Conv{x.rank}d"), x.channels, _window(draw, x)
    return Made(_text(cls.__name__, **given), lambda: cls(channels, **given), max(x.kind, Kind.FLOAT), False)


# -- between layers --------------------------------------------------------------------------------------------------


def batch_norm(draw: Draw, x: Value) -> Made | None:
    """With statistics of what eager has there. Flips on values that occur and extreme variances only where all before
    is exact: elsewhere they blow rounding errors up."""
    if x.kind == Kind.WILD:
        return None
    flavours = ["moderate", "some γ 0"]
    if x.exact and x.tame:
        flavours += ["tie", "tie by rounding", "tiny variance", "huge variance"]
    flavour, eps = _choice(draw, *flavours), _choice(draw, 1e-5, 1e-3)
    kind = Kind.NAN if x.kind == Kind.NAN else Kind.WILD if flavour == "tiny variance" else Kind.FLOAT

    def make() -> nn.Module:
        cls = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[x.rank]
        norm = cls(x.channels, eps=eps)
        values = x.sample.transpose(0, 1).reshape(x.channels, -1).nan_to_num(0.0, 1.0, -1.0)
        norm.weight.data = torch.randn(x.channels)
        norm.bias.data = torch.randn(x.channels)
        spread = values.var(1, correction=0) + 0.1
        norm.running_var = spread * {"tiny variance": 1e-30, "huge variance": 1e30}.get(flavour, 1.0)
        norm.running_mean = values.mean(1) + torch.randn(x.channels) * spread.sqrt() * 0.5
        if flavour == "some γ 0":
            norm.weight.data *= torch.randint(2, (x.channels,))
        occurring = values[torch.arange(x.channels), torch.randint(values.shape[1], (x.channels,))]
        if flavour == "tie":
            norm.running_mean = occurring
            norm.bias.data.zero_()
        elif flavour == "tie by rounding":
            norm.bias.data.zero_()
            with torch.no_grad():
                there = norm.eval()(occurring.reshape(1, -1, *[1] * max(x.rank, 0)))
            norm.bias.data = -there.reshape(-1)
        return norm

    return Made(_text("BatchNorm", flavour=flavour, eps=eps), make, kind)


class RPReLU(nn.Module):
    """PReLU(x − γ) + ζ, all three learned per channel: ReActNet's."""

    def __init__(self, channels: int, rank: int) -> None:
        super().__init__()
        shape = (1, channels, *[1] * rank)
        self.before, self.after = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
        self.prelu = nn.PReLU(channels)
        self.prelu.weight.data = torch.rand(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.prelu(x - self.before) + self.after


def activation(draw: Draw, x: Value) -> Made | None:
    name = _choice(
        draw, "ReLU", "Hardtanh", "Hardtanh(-3, 5)", "ReLU6", "LeakyReLU(0.1)", "LeakyReLU(-0.25)", "PReLU()",
        "PReLU(channels)", "RPReLU",
    )  # fmt: skip
    channels, rank = x.channels, x.rank

    def make() -> nn.Module:
        if name.startswith("PReLU"):
            prelu = nn.PReLU(channels if "channels" in name else 1)
            prelu.weight.data = torch.randn(prelu.weight.shape)
            return prelu
        return {
            "ReLU": nn.ReLU, "Hardtanh": nn.Hardtanh, "Hardtanh(-3, 5)": lambda: nn.Hardtanh(-3.0, 5.0),
            "ReLU6": nn.ReLU6, "LeakyReLU(0.1)": lambda: nn.LeakyReLU(0.1),
            "LeakyReLU(-0.25)": lambda: nn.LeakyReLU(-0.25), "RPReLU": lambda: RPReLU(channels, rank),
        }[name]()  # fmt: skip

    clamps = name.startswith(("ReLU", "Hardtanh"))
    kind = x.kind if clamps else max(x.kind, Kind.FLOAT)
    return Made(name, make, Kind.FLOAT if kind == Kind.WILD and name != "ReLU" and clamps else kind)


def constant(draw: Draw, x: Value) -> Made | None:
    """Adds to it or scales it, by one number or one for each channel."""
    add, where = draw(st.booleans()), _choice(draw, "scalar", "channels")
    shape = (1, x.channels, *[1] * x.rank)
    if where == "scalar":
        number = _choice(draw, 1.0, -1.0, 0.5, -0.25, 0.1)
        text, kind = f"{'+' if add else '×'} {number}", x.kind if number != 0.1 else max(x.kind, Kind.FLOAT)
        return Made(text, lambda: Apply((lambda v: v + number) if add else (lambda v: v * number)), kind)

    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.constant = nn.Parameter(torch.randn(shape))

        def forward(self, v: torch.Tensor) -> torch.Tensor:
            return v + self.constant if add else v * self.constant

    return Made(f"{'+' if add else '×'} one a channel", Constant, max(x.kind, Kind.FLOAT))


def pool(draw: Draw, x: Value) -> Made | None:
    if not x.rank:
        return None
    name = _choice(draw, "MaxPool", "AvgPool", "AdaptiveMaxPool", "AdaptiveAvgPool")
    if "Avg" in name and (x.plain or not x.tame):
        return None
    cls = getattr(nn, f"{name}{x.rank}d")
    if name.startswith("Adaptive"):
        given: dict[str, Any] = {"output_size": _choice(draw, 1, 2)}
    else:
        kernel = _choice(draw, 2, 3)
        given = {
            "kernel_size": kernel, "stride": _choice(draw, 1, 2), "padding": _choice(draw, 0, 1),
            "ceil_mode": draw(st.booleans()),
        }  # fmt: skip
    if "Max" in name:
        return Made(_text(cls.__name__, **given), lambda: cls(**given), x.kind)
    kind = Kind.FLOAT if x.kind == Kind.GRID else Kind.TIED
    return Made(_text(cls.__name__, **given), lambda: cls(**given), kind, False)


def move(draw: Draw, x: Value) -> Made | None:
    """What only moves values."""
    moves: dict[str, Callable[[], nn.Module]] = {"chunk(2)[0]": lambda: Apply(lambda v: v.chunk(2, 1)[0])}
    moves["chunk(2)[-1]"] = lambda: Apply(lambda v: v.chunk(2, 1)[-1])
    groups = _choice(draw, *_divisors(x.channels))
    if x.rank:
        moves["Flatten()"] = nn.Flatten
        moves[f"ChannelShuffle({groups})"] = lambda: nn.ChannelShuffle(groups)
        moves["flip(2)"] = lambda: Apply(lambda v: v.flip(2))
        moves["Upsample(2)"] = lambda: nn.Upsample(scale_factor=2)
    name = _choice(draw, *moves)
    return Made(name, moves[name], x.kind)


Operation = Callable[[Draw, Value], Made | None]


def _times(*operations: tuple[Operation, int]) -> list[Operation]:
    return [operation for operation, times in operations for _ in range(times)]


#: What stands between layers, and layers; how often each is drawn. Simple ones first: failures shrink towards them.
BETWEEN = _times((activation, 3), (constant, 2), (quantize, 2), (batch_norm, 6), (move, 2), (pool, 2))
LAYERS = _times((linear, 1), (binary_conv, 6), (transposed_conv, 1), (weight_only, 1), (float_conv, 1))
#: What becomes a threshold between two layers of bits, and the second one.
CHAIN = _times((activation, 1), (constant, 1), (batch_norm, 2))
BINARY = _times((linear, 1), (binary_conv, 4))
