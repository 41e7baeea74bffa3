"""What the table in docs/support.md lists. To list more, yield a `Family` or add a row to one, and run `make docs`."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.ao.nn.quantized.reference as reference
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import bnncc.layers as layers
import bnncc.quantizations as quantizations

from .cells import Family, Make, module

_RANKS = (1, 2, 3)
_SIZES: Mapping[int, tuple[int, ...]] = {1: (2, 8, 11), 2: (2, 8, 7, 8), 3: (1, 8, 5, 4, 6)}
_LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}

Wrap = Callable[[nn.Module], nn.Module]


def sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


class _Binary(nn.Module):
    """A module of torch.nn on signs, with the signs of its weights."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight: Any = self.inner.weight
        return functional_call(self.inner, {"weight": sign(weight)}, (sign(x),))


# -- torch.nn convolutions -------------------------------------------------------------------------------------------

#: Option → arguments besides in_channels 8, out_channels 6, kernel_size 3, bias False.
_CONV: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "bias=True": {"bias": True},
    "kernel_size=1": {"kernel_size": 1},
    "kernel_size=2": {"kernel_size": 2},
    "stride=2": {"stride": 2},
    "dilation=2": {"dilation": 2, "padding": 2},
    "groups=2": {"groups": 2},
    "depthwise": {"groups": 8, "out_channels": 8},
    "depthwise, two outputs a channel": {"groups": 8, "out_channels": 16},
    "padding=1": {"padding": 1},
    "padding='valid'": {"padding": "valid"},
    "padding='same'": {"padding": "same"},
    "padding='same', even kernel": {"padding": "same", "kernel_size": 4},
    "padding='same', dilation=2": {"padding": "same", "dilation": 2},
    "padding='same', stride=2": {"padding": "same", "stride": 2},
    "padding_mode='reflect'": {"padding": 2, "padding_mode": "reflect"},
    "padding_mode='replicate'": {"padding": 2, "padding_mode": "replicate"},
    "padding_mode='circular'": {"padding": 2, "padding_mode": "circular"},
    "padding_mode='reflect', 'same', even kernel": {
        "padding": "same", "padding_mode": "reflect", "kernel_size": 4,
    },
}  # fmt: skip

_TRANSPOSED: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "bias=True": {"bias": True},
    "stride=2": {"stride": 2},
    "padding=1": {"padding": 1},
    "padding beyond the kernel": {"padding": 3, "kernel_size": 3, "stride": 2},
    "output_padding=1": {"stride": 2, "output_padding": 1},
    "output_padding=2, dilation=3": {"stride": 2, "dilation": 3, "output_padding": 2},
    "output_padding of the stride": {"stride": 2, "output_padding": 2},
    "dilation=2": {"dilation": 2},
    "groups=2": {"groups": 2, "stride": 2},
    "depthwise": {"groups": 8, "out_channels": 8, "stride": 2},
    "padding_mode='reflect'": {"padding": 1, "padding_mode": "reflect"},
}


def _built(cls: type, arguments: Mapping[str, Any]) -> nn.Module:
    return cls(**({"in_channels": 8, "out_channels": 6, "kernel_size": 3, "bias": False} | arguments))


def _cell(cls: type, rank: int, arguments: Mapping[str, Any], wrap: Wrap) -> Make:
    return lambda: (wrap(_built(cls, arguments)).eval(), torch.randn(_SIZES[rank]))


def _unbatched(cls: type, rank: int, wrap: Wrap) -> Make:
    return lambda: (wrap(_built(cls, {})).eval(), torch.randn(_SIZES[rank][1:]))


def _channels_last(cls: type, rank: int, wrap: Wrap) -> Make | None:
    if rank not in _LAYOUTS:
        return None

    def make() -> tuple[nn.Module, torch.Tensor]:
        inner = wrap(_built(cls, {"padding": 1}).to(memory_format=_LAYOUTS[rank]))
        return inner.eval(), torch.randn(_SIZES[rank]).to(memory_format=_LAYOUTS[rank])

    return make


def _output_size(cls: type, rank: int, wrap: Wrap) -> Make:
    """The larger of the two sizes that stride 2 may have come from."""
    size = [2 * (extent - 1) + 3 + 1 for extent in _SIZES[rank][2:]]

    def make() -> tuple[nn.Module, torch.Tensor]:
        inner = _built(cls, {"stride": 2})
        if wrap is _Binary:
            weight = nn.Parameter(sign(inner.weight))  # type: ignore[arg-type]
            inner.weight = weight
            return module(lambda x, m: m(sign(x), output_size=size), inner), torch.randn(_SIZES[rank])
        return module(lambda x, m: m(x, output_size=size), inner), torch.randn(_SIZES[rank])

    return make


def _of_rank(name: str, rank: int, *, where: Any = nn) -> type:
    return getattr(where, name.format(rank))  # type: ignore[no-any-return]


def _conv_rows(name: str, options: Mapping[str, dict[str, Any]], wrap: Wrap, where: Any = nn) -> dict[str, list[Any]]:
    classes = {rank: _of_rank(name, rank, where=where) for rank in _RANKS}
    rows: dict[str, list[Any]] = {
        option: [_cell(cls, rank, arguments, wrap) for rank, cls in classes.items()]
        for option, arguments in options.items()
    }
    rows["without a batch"] = [_unbatched(cls, rank, wrap) for rank, cls in classes.items()]
    rows["channels_last"] = [_channels_last(cls, rank, wrap) for rank, cls in classes.items()]
    return rows


def _identity(inner: nn.Module) -> nn.Module:
    return inner


def _lazy(name: str) -> dict[str, list[Any]]:
    def make(rank: int, arguments: Mapping[str, Any]) -> tuple[nn.Module, torch.Tensor]:
        inner, x = _of_rank(name, rank)(6, 3, **arguments), torch.randn(_SIZES[rank])
        inner(x)
        return inner.eval(), x

    options: Mapping[str, dict[str, Any]] = {
        "after its first call": {},
        "after its first call, padding=1": {"padding": 1},
    }
    return {option: [functools.partial(make, rank, given) for rank in _RANKS] for option, given in options.items()}


def torch_nn() -> Iterator[Family]:
    """Document 004."""
    document = "torch.nn.modules.conv"
    for prefix, wrap in (("", _identity), ("binary ", _Binary)):
        ranks = [f"{n}d" for n in _RANKS]
        yield Family(f"{prefix}torch.nn.Conv", document, ranks, _conv_rows("Conv{}d", _CONV, wrap))
        rows = _conv_rows("ConvTranspose{}d", _TRANSPOSED, wrap)
        rows["output_size"] = [_output_size(_of_rank("ConvTranspose{}d", rank), rank, wrap) for rank in _RANKS]
        yield Family(f"{prefix}torch.nn.ConvTranspose", document, ranks, rows)
    yield Family("torch.nn.LazyConv", document, [f"{n}d" for n in _RANKS], _lazy("LazyConv{}d"))
    yield Family("torch.nn.LazyConvTranspose", document, [f"{n}d" for n in _RANKS], _lazy("LazyConvTranspose{}d"))


# -- bnncc.layers, as bitorch's ---------------------------------------------------------------------------------------

_PADDED: Mapping[str, dict[str, Any]] = {
    f"padding=1, pad_value={value}": {"padding": 1, "pad_value": value} for value in (-1, 0, 1, 0.5)
}
_WEIGHTS = ("sign", "approxsign", "swishsign", "progressive_sign", "steheaviside", "identity")
_DOREFA_BITS = (1, 2, 3, 4)


def _weight_quantizations() -> dict[str, Callable[[], Any]]:
    named: dict[str, Callable[[], Any]] = {name: (lambda name=name: name) for name in _WEIGHTS}
    return named | {
        f"weightdorefa, {bits} bit": functools.partial(quantizations.WeightDoReFa, bits) for bits in _DOREFA_BITS
    }


def _input_quantizations() -> dict[str, Callable[[], Any]]:
    found = {name: make for name, make in _weight_quantizations().items() if not name.startswith("weightdorefa")}
    found |= {f"inputdorefa, {bits} bit": functools.partial(quantizations.InputDoReFa, bits) for bits in _DOREFA_BITS}
    return found | {f"pact, {bits} bit": functools.partial(quantizations.Pact, bits) for bits in _DOREFA_BITS}


def _quantized(make: Callable[..., nn.Module], shape: tuple[int, ...], **given: Callable[[], Any]) -> Make:
    return lambda: (make(**{name: value() for name, value in given.items()}).eval(), torch.randn(shape))


def bitorch_layers() -> Iterator[Family]:
    """Documents 000, 001 and 002."""
    document, ranks = "bitorch.layers", [f"{n}d" for n in _RANKS]
    for name in ("QConv{}d", "QConv{}d_NoAct"):
        rows = _conv_rows(name, {**_CONV, **_PADDED}, _identity, layers)
        yield Family(f"bnncc.layers.{name.replace('{}d', '')}", document, ranks, rows)
    weights = list(_weight_quantizations())
    for title, make, shape in (
        ("QConv2d", functools.partial(layers.QConv2d, 8, 6, 3, padding=1), (2, 8, 7, 8)),
        ("QLinear", functools.partial(layers.QLinear, 40, 6, bias=False), (3, 40)),
    ):
        rows = {
            inputs: [
                _quantized(make, shape, input_quantization=chosen, weight_quantization=other)
                for other in _weight_quantizations().values()
            ]
            for inputs, chosen in _input_quantizations().items()
        }
        yield Family(f"bnncc.layers.{title}: input × weight quantization", document, weights, rows)
    yield Family("other bnncc.layers", document, ["result"], {option: [make] for option, make in _others().items()})


def _others() -> dict[str, Make]:
    def indices() -> torch.Tensor:
        return torch.randint(0, 10, (3, 5))

    cells: dict[str, Make] = {
        "QLinear, bias=True": lambda: (layers.QLinear(40, 6).eval(), torch.randn(3, 40)),
        "PadModule": lambda: (layers.PadModule(1, 2, 0, 1, -1), torch.randn(2, 3, 5, 5)),
        "QEmbedding": lambda: (layers.QEmbedding(10, 6).eval(), indices()),
        "QEmbeddingBag, mode='mean'": lambda: (layers.QEmbeddingBag(10, 6).eval(), indices()),
        "QEmbeddingBag, mode='sum'": lambda: (layers.QEmbeddingBag(10, 6, mode="sum").eval(), indices()),
        "QEmbeddingBag, mode='max'": lambda: (layers.QEmbeddingBag(10, 6, mode="max").eval(), indices()),
        "InputPrintDebug": lambda: (layers.InputPrintDebug().eval(), torch.randn(2, 3)),
        "ShapePrintDebug": lambda: (layers.ShapePrintDebug().eval(), torch.randn(2, 3)),
        "WeightPrintDebug": lambda: (layers.WeightPrintDebug(nn.Linear(9, 4)).eval(), torch.randn(2, 9)),
        "InputGraphicalDebug": lambda: (layers.InputGraphicalDebug().eval(), torch.randn(2, 3, 4, 4)),
        "WeightGraphicalDebug": lambda: (
            layers.WeightGraphicalDebug(layers.QConv2d(3, 4, 3)).eval(), torch.randn(2, 3, 5, 5),
        ),
    }  # fmt: skip
    for name, make in _input_quantizations().items():
        cells[f"QActivation, {name}"] = lambda make=make: (layers.QActivation(make()).eval(), torch.randn(2, 3, 5, 5))
    cells["QActivation, weightdorefa"] = lambda: (layers.QActivation("weightdorefa").eval(), torch.randn(2, 3, 5, 5))
    cells["Pact"] = lambda: (layers.Pact(4).eval(), torch.randn(2, 3, 5, 5) * 6)
    return cells


# -- torch.ao.nn.quantized.reference ----------------------------------------------------------------------------------

_SCHEMES: Mapping[str, tuple[Any, Any, int | None]] = {
    "per tensor, quint8": (torch.per_tensor_affine, torch.quint8, None),
    "per tensor, qint8": (torch.per_tensor_affine, torch.qint8, None),
    "per tensor, qint32": (torch.per_tensor_affine, torch.qint32, None),
    "float16": (torch.per_tensor_affine, torch.float16, None),
    "per channel, quint8": (torch.per_channel_affine, torch.quint8, None),
    "per channel, qint8": (torch.per_channel_affine, torch.qint8, None),
    "per channel, qint32": (torch.per_channel_affine, torch.qint32, None),
    "per channel with float zero points, quint8": (torch.per_channel_affine_float_qparams, torch.quint8, None),
    "per tensor, 2 bits": (torch.per_tensor_affine, torch.qint8, 2),
    "per tensor, 3 bits": (torch.per_tensor_affine, torch.quint8, 3),
    "per channel, 4 bits": (torch.per_channel_affine, torch.qint8, 4),
}


def _qparams(scheme: tuple[Any, Any, int | None], channels: int, axis: int) -> dict[str, Any]:
    qscheme, dtype, bits = scheme
    per_channel = qscheme is not torch.per_tensor_affine
    zero = 7 if dtype is torch.quint8 else 0
    qparams: dict[str, Any] = {
        "qscheme": qscheme, "dtype": dtype, "axis": axis,
        "scale": torch.linspace(0.01, 0.03, channels) if per_channel else 0.02,
        "zero_point": torch.full((channels,), zero) if per_channel else zero,
    }  # fmt: skip
    if qscheme is torch.per_channel_affine_float_qparams:
        qparams["zero_point"] = torch.full((channels,), 0.25)
    if bits:
        lowest = 0 if dtype is torch.quint8 else -(1 << bits - 1)
        qparams |= {"is_decomposed": True, "quant_min": lowest, "quant_max": lowest + (1 << bits) - 1}
    return qparams


def _reference(name: str, scheme: tuple[Any, Any, int | None], arguments: Mapping[str, Any]) -> Make:
    axis = 1 if "Transpose" in name else 0

    def make() -> tuple[nn.Module, torch.Tensor]:
        if name == "Linear":
            inner, shape = nn.Linear(8, 6), (3, 8)
        else:
            inner, shape = _built(getattr(nn, name), arguments), _SIZES[int(name[-2])]
        channels = inner.weight.shape[axis]  # type: ignore[union-attr, index]
        return getattr(reference, name).from_float(inner, _qparams(scheme, channels, axis)).eval(), torch.randn(shape)

    return make


class _BetweenQuantizers(nn.Module):
    """dequantize – module – quantize, as a backend meets a reference module in a graph with quantized activations."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.quantize_per_tensor(x, 0.03, 120, torch.quint8).dequantize()
        return torch.quantize_per_tensor(self.inner(x), 0.05, 128, torch.quint8).dequantize()


def _between_quantizers(make: Make) -> Make:
    def wrapped() -> tuple[nn.Module, torch.Tensor]:
        inner, x = make()
        return _BetweenQuantizers(inner).eval(), x

    return wrapped


def reference_modules() -> Iterator[Family]:
    """Document 003: with quantized weights alone, and between quantized activations."""
    names = ["Linear", *(f"Conv{n}d" for n in _RANKS), *(f"ConvTranspose{n}d" for n in _RANKS)]
    document = "torch.ao.nn.quantized.reference"
    rows: dict[str, list[Any]] = {
        option: [_reference(name, scheme, {}) for name in names] for option, scheme in _SCHEMES.items()
    }
    per_tensor = _SCHEMES["per tensor, qint8"]
    for option, arguments in _CONV.items():
        rows[option] = [
            _reference(n, per_tensor, arguments) if n.startswith("Conv") and n[4].isdigit() else None for n in names
        ]
    for option, arguments in _TRANSPOSED.items():
        label = f"{option}, transposed"
        rows[label] = [_reference(n, per_tensor, arguments) if "Transpose" in n else None for n in names]
    yield Family("torch.ao.nn.quantized.reference", document, names, rows)
    quantized = {option: [make and _between_quantizers(make) for make in cells] for option, cells in rows.items()}
    yield Family("torch.ao.nn.quantized.reference between quantized activations", document, names, quantized)


# -- other operators --------------------------------------------------------------------------------------------------

_IMAGE = (2, 8, 7, 8)

#: Operators on images [2, 8, 7, 8], as modules or functions.
_OPERATORS: Mapping[str, Any] = {
    "BatchNorm2d": lambda: nn.BatchNorm2d(8),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "GroupNorm": lambda: nn.GroupNorm(4, 8),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8, affine=True),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(3),
    "MaxPool2d": lambda: nn.MaxPool2d(3, 2, 1),
    "MaxPool2d, ceil_mode, dilation": lambda: nn.MaxPool2d(2, 2, dilation=2, ceil_mode=True),
    "AvgPool2d": lambda: nn.AvgPool2d(3, 2, 1),
    "AdaptiveAvgPool2d(1)": lambda: nn.AdaptiveAvgPool2d(1),
    "AdaptiveAvgPool2d((4, 3))": lambda: nn.AdaptiveAvgPool2d((4, 3)),
    "AdaptiveAvgPool2d((9, 3))": lambda: nn.AdaptiveAvgPool2d((9, 3)),
    "AdaptiveMaxPool2d((4, 3))": lambda: nn.AdaptiveMaxPool2d((4, 3)),
    "Upsample, nearest": lambda: nn.Upsample(scale_factor=2),
    "Upsample, nearest to any size": lambda: nn.Upsample(size=(9, 5)),
    "Upsample, nearest-exact": lambda: nn.Upsample(size=(9, 5), mode="nearest-exact"),
    "Upsample, bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "Upsample, bilinear, align_corners": lambda: nn.Upsample(size=(9, 5), mode="bilinear", align_corners=True),
    "Upsample, bicubic": lambda: nn.Upsample(scale_factor=1.5, mode="bicubic"),
    "ReflectionPad2d": lambda: nn.ReflectionPad2d((1, 2, 3, 0)),
    "ReplicationPad2d": lambda: nn.ReplicationPad2d(2),
    "CircularPad2d": lambda: nn.CircularPad2d((1, 2, 3, 0)),
    "ZeroPad2d": lambda: nn.ZeroPad2d(1),
    "ChannelShuffle": lambda: nn.ChannelShuffle(4),
    "PixelShuffle": lambda: nn.PixelShuffle(2),
    "Flatten": nn.Flatten,
    "Unfold": lambda: nn.Unfold(3),
    "Softmax": lambda: nn.Softmax(1),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "MultiheadAttention": lambda: module(lambda x, m: m(x[:, 0], x[:, 1], x[:, 2])[0], nn.MultiheadAttention(8, 2)),
    "TransformerEncoderLayer": lambda: module(lambda x, m: m(x[:, 0]), nn.TransformerEncoderLayer(8, 2, 16)),
    "LSTM": lambda: module(lambda x, m: m(x[:, 0])[0], nn.LSTM(8, 4)),
    "GRU": lambda: module(lambda x, m: m(x[:, 0])[0], nn.GRU(8, 4)),
    "Linear on images": lambda: nn.Linear(8, 5),
    **{name: getattr(nn, name) for name in (
        "ReLU", "ReLU6", "LeakyReLU", "PReLU", "RReLU", "ELU", "CELU", "SELU", "GELU", "SiLU", "Mish", "Softplus",
        "Sigmoid", "Tanh", "Hardtanh", "Hardsigmoid", "Hardswish", "Hardshrink", "Softshrink", "Tanhshrink", "Softsign",
        "LogSigmoid",
    )},
    "GELU, tanh": lambda: nn.GELU(approximate="tanh"),
    "copysign": lambda: module(lambda x: torch.copysign(torch.ones_like(x), x)),
    "heaviside": lambda: module(lambda x: torch.heaviside(x, torch.ones(()))),
    "cat": lambda: module(lambda x: torch.cat([x, x + 1], 1)),
    "stack": lambda: module(lambda x: torch.stack([x, -x], 1)),
    "chunk": lambda: module(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)),
    "roll": lambda: module(lambda x: x.roll(2, 1)),
    "flip": lambda: module(lambda x: x.flip(2)),
    "index by constants": lambda: module(lambda x: x[:, torch.tensor([3, 1, 2])]),
    "squeeze and excite": lambda: module(
        lambda x, m: x * torch.sigmoid(m(x.mean((2, 3), keepdim=True))), nn.Conv2d(8, 8, 1)
    ),
    "normalize": lambda: module(lambda x: F.normalize(x, dim=1)),
    "std": lambda: module(lambda x: x.std(1)),
}  # fmt: skip


def _behind_a_sign(function: Callable[[torch.Tensor], torch.Tensor], channels: int = 8) -> Make:
    """A binary convolution of what the function makes of signs."""

    def make() -> tuple[nn.Module, torch.Tensor]:
        inner = nn.Conv2d(channels, 6, 3, padding=1, bias=False)
        inner.weight = nn.Parameter(sign(inner.weight))
        return module(lambda x, m: m(function(sign(x))), inner), torch.randn(_IMAGE)

    return make


_MOVED_SIGNS: Mapping[str, Make] = {
    "cat": _behind_a_sign(lambda s: torch.cat([s, s.flip(1)], 1), 16),
    "channel shuffle": _behind_a_sign(lambda s: F.channel_shuffle(s, 4)),
    "slice of channels": _behind_a_sign(lambda s: s[:, 2:6], 4),
    "chunk": _behind_a_sign(lambda s: s.chunk(2, 1)[1], 4),
    "chosen channels": _behind_a_sign(lambda s: s[:, torch.tensor([3, 1, 2, 0, 5, 4, 7, 6])]),
    "max_pool2d": _behind_a_sign(lambda s: F.max_pool2d(s, 2)),
    "avg_pool2d": _behind_a_sign(lambda s: F.avg_pool2d(s, 2)),
    "adaptive_max_pool2d": _behind_a_sign(lambda s: F.adaptive_max_pool2d(s, (4, 3))),
    "interpolate, nearest": _behind_a_sign(lambda s: F.interpolate(s, scale_factor=2)),
    "flip": _behind_a_sign(lambda s: s.flip(2)),
    "roll": _behind_a_sign(lambda s: s.roll(1, 3)),
    "pad, reflect": _behind_a_sign(lambda s: F.pad(s, (1, 2, 2, 1), mode="reflect")),
    "pad by 1": _behind_a_sign(lambda s: F.pad(s, (1, 2, 2, 1), value=1.0)),
    "dropout": _behind_a_sign(lambda s: F.dropout(s, training=False)),
}


def operators() -> Iterator[Family]:
    """What else a network with binary layers has."""

    def cell(make: Callable[[], nn.Module]) -> Make:
        return lambda: (make().eval(), torch.randn(_IMAGE))

    rows: dict[str, list[Any]] = {name: [cell(make)] for name, make in _OPERATORS.items()}
    rows["Embedding"] = [lambda: (nn.Embedding(10, 6), torch.randint(0, 10, (2, 5)))]
    rows["EmbeddingBag"] = [lambda: (nn.EmbeddingBag(10, 6), torch.randint(0, 10, (2, 5)))]
    yield Family("other operators", "what a network has besides", ["result"], rows)
    moved = {name: [make] for name, make in _MOVED_SIGNS.items()}
    yield Family("between a sign and a binary convolution", "what a network has besides", ["result"], moved)


FAMILIES: Mapping[str, Family] = {
    family.title: family
    for families in (bitorch_layers, reference_modules, torch_nn, operators)
    for family in families()
}
