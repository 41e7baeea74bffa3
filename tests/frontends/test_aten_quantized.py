"""Quantization as torch.ao spells it: bit-equal to eager, ties included; its reference modules."""

import itertools

import numpy as np
import pytest
import torch
import torch.ao.nn.quantized.reference as reference
from torch import nn
from torch.ao.quantization import FakeQuantize, MinMaxObserver, PerChannelMinMaxObserver, get_default_qconfig_mapping
from torch.ao.quantization.quantize_fx import (
    _convert_to_reference_decomposed_fx,
    convert_to_reference_fx,
    prepare_fx,
)

import bnncc
from bnncc.dialect.torch_eval import evaluate_function
from bnncc.frontends.imported import ExportError, UnsupportedOperator
from bnncc.frontends.reference_modules import ReferenceModuleError, traceable
from bnncc.frontends.torch import export_model, to_relax

SCALES = (0.1, 1 / 3, 0.00214854861, 0.5)
BOUNDS = {torch.quint8: (0, 255), torch.qint8: (-128, 127)}


def _ties(scale: float, zero_point: int, low: int, high: int) -> torch.Tensor:
    """Values halfway between two integers, their neighbours, values far outside, and noise: [1, 2, N]."""
    middle = ((np.arange(low - 2, high + 2) - zero_point + 0.5) * scale).astype("float32")
    noise = np.random.default_rng(0).normal(0, 50 * scale, 333).astype("float32")
    beside = [np.nextafter(middle, np.float32(sign * np.inf)) for sign in (-1, 1)]
    far = np.array([0.0, -0.0, 1e6, -1e6], "float32")
    values = np.concatenate([middle, *beside, noise, far])
    return torch.from_numpy(np.stack([values, values[::-1]])[None].copy())


def _import(function, *inputs):
    class Model(nn.Module):
        def forward(self, *args):
            return function(*args)

    return to_relax(export_model(Model().eval(), inputs))


def _same(function, x):
    eager = function(x)
    ours = evaluate_function(_import(function, x).mod["main"], [x])[0]
    assert torch.equal(ours, eager), f"{(ours != eager).sum()} of {ours.numel()} differ"
    session = bnncc.compile(_module(function), (x,)).load()
    assert np.array_equal(session(x.numpy()), eager.numpy())


def _module(function):
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    return Model().eval()


ZEROS = {torch.quint8: (0, 3, 128), torch.qint8: (0, -5, 127)}
GRID = [(s, z, d) for d in BOUNDS for s, z in itertools.product(SCALES, ZEROS[d])]


@pytest.mark.parametrize(("scale", "zero_point", "dtype"), GRID)
def test_per_tensor(scale, zero_point, dtype):
    x = _ties(scale, zero_point, *BOUNDS[dtype])
    ours = evaluate_function(_import(_per_tensor(scale, zero_point, dtype), x).mod["main"], [x])[0]
    assert torch.equal(ours, _per_tensor(scale, zero_point, dtype)(x))


def _per_tensor(scale, zero_point, dtype):
    return lambda x: torch.quantize_per_tensor(x, scale, zero_point, dtype).dequantize()


def _per_channel(dtype, zero_points):
    scales = torch.tensor([0.1, 1 / 3])
    return lambda x: torch.ops.aten.quantize_per_channel(x, scales, torch.tensor(zero_points), 1, dtype).dequantize()


def _decomposed(x):
    q = torch.ops.quantized_decomposed.quantize_per_tensor(x, 0.057770922780036926, 51, 0, 127, torch.uint8)
    return torch.ops.quantized_decomposed.dequantize_per_tensor(q, 0.057770922780036926, 51, 0, 127, torch.uint8)


def _decomposed_per_channel(x):
    parameters = (torch.tensor([0.1, 1 / 3]), torch.tensor([3, -2]), 1, -8, 7, torch.int8)
    q = torch.ops.quantized_decomposed.quantize_per_channel(x, *parameters)
    return torch.ops.quantized_decomposed.dequantize_per_channel(q, *parameters)


FUNCTIONS = {
    "per tensor": (_per_tensor(0.1, 3, torch.quint8), 0.1, 3),
    "per tensor, signed": (_per_tensor(1 / 3, -5, torch.qint8), 1 / 3, -5),
    "int32": (_per_tensor(1e-3, 0, torch.qint32), 1e-3, 0),
    "fake": (lambda x: torch.fake_quantize_per_tensor_affine(x, 0.1, 3, 0, 15), 0.1, 3),
    "fake, parameters as tensors": (
        lambda x: torch.fake_quantize_per_tensor_affine(
            x, torch.tensor(0.1), torch.tensor(3, dtype=torch.int32), 0, 15
        ),
        0.1,
        3,
    ),
    "fake per channel": (
        lambda x: torch.fake_quantize_per_channel_affine(
            x, torch.tensor([0.1, 0.1]), torch.tensor([3, -2], dtype=torch.int32), 1, -8, 7
        ),
        0.1,
        3,
    ),
    "decomposed": (_decomposed, 0.057770922780036926, 51),
    "decomposed per channel": (_decomposed_per_channel, 0.1, 3),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_bit_equal_to_eager(name):
    function, scale, zero_point = FUNCTIONS[name]
    _same(function, _ties(scale, zero_point, -20, 260))


@pytest.mark.parametrize("zero_points", [[0, 0], [3, 128]])
def test_per_channel_activations_are_refused_by_torch(zero_points):
    """torch.export itself refuses quantize_per_channel of an activation."""
    x = _ties(0.1, 3, 0, 255)
    with pytest.raises(ExportError, match="nyi in meta tensors"):
        _import(_per_channel(torch.quint8, zero_points), x)


def test_a_quantized_tensor_may_be_moved():
    def function(x):
        q = torch.quantize_per_tensor(x, 0.1, 3, torch.quint8)
        return torch.relu(q.reshape(-1, 4).permute(1, 0)[:3]).dequantize()

    _same(function, torch.randn(1, 2, 4))


def test_the_integers_of_a_quantized_tensor_are_refused():
    with pytest.raises(UnsupportedOperator, match="its integers"):
        _import(lambda x: torch.quantize_per_tensor(x, 0.1, 3, torch.quint8).mean().dequantize(), torch.randn(1, 2, 4))


# Reference modules

_FLOAT = {
    "Linear": (lambda: nn.Linear(6, 8), (3, 6)),
    "Conv1d": (lambda: nn.Conv1d(4, 8, 3, padding=1), (2, 4, 9)),
    "Conv2d": (lambda: nn.Conv2d(4, 8, 3, stride=2, groups=2), (2, 4, 9, 9)),
    "Conv3d": (lambda: nn.Conv3d(4, 8, 3, dilation=1), (1, 4, 5, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 8, 3, stride=2), (2, 4, 9)),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 8, 3, stride=2, output_padding=1), (2, 4, 5, 5)),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 8, 2), (1, 4, 3, 3, 3)),
}


def _qparams(qscheme, dtype, channels, axis, bits=None):
    per_channel = qscheme is not torch.per_tensor_affine
    scale = torch.linspace(0.01, 0.03, channels) if per_channel else 0.02
    low = {torch.quint8: 7, torch.qint8: 0, torch.qint32: 0}.get(dtype, 0)
    zero_point = torch.full((channels,), low) if per_channel else low
    if qscheme is torch.per_channel_affine_float_qparams:
        zero_point = torch.full((channels,), 0.25)
    qparams = {"qscheme": qscheme, "dtype": dtype, "scale": scale, "zero_point": zero_point, "axis": axis}
    if bits:
        signed = dtype is not torch.quint8
        qparams |= {"is_decomposed": True, "quant_min": -(1 << bits - 1) if signed else 0}
        qparams["quant_max"] = qparams["quant_min"] + (1 << bits) - 1
    return qparams


SCHEMES = [
    (torch.per_tensor_affine, torch.quint8, None),
    (torch.per_tensor_affine, torch.qint8, None),
    (torch.per_tensor_affine, torch.qint32, None),
    (torch.per_tensor_affine, torch.float16, None),
    (torch.per_channel_affine, torch.quint8, None),
    (torch.per_channel_affine, torch.qint8, None),
    (torch.per_channel_affine, torch.qint32, None),
    (torch.per_channel_affine, torch.float16, None),
    (torch.per_channel_affine_float_qparams, torch.quint8, None),
    (torch.per_tensor_affine, torch.qint8, 2),
    (torch.per_tensor_affine, torch.quint8, 3),
    (torch.per_channel_affine, torch.qint8, 4),
    (torch.per_channel_affine, torch.quint8, 2),
]


@pytest.mark.parametrize("name", _FLOAT)
def test_reference_modules(name):
    """Every scheme in one network of parallel branches: one compilation for each class."""
    torch.manual_seed(0)
    make, shape = _FLOAT[name]
    axis = 1 if "Transpose" in name else 0

    def branch(qscheme, dtype, bits):
        module = make()
        channels = module.weight.shape[axis]
        return getattr(reference, name).from_float(module, _qparams(qscheme, dtype, channels, axis, bits))

    branches = nn.ModuleList(branch(*scheme) for scheme in SCHEMES)

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.branches = branches

        def forward(self, x):
            return tuple(b(x) for b in self.branches)

    network = Network().eval()
    before = {key: id(value) for key, value in network.named_modules()}
    x = torch.randn(shape)
    report = bnncc.validate(bnncc.compile(network, (x,)), network, [(x,)])
    assert report.ok, report.problems
    assert before == {key: id(value) for key, value in network.named_modules()}
    assert all("get_weight" not in vars(b) for b in branches)


def test_the_weight_is_folded_to_its_own_value():
    module = reference.Conv2d.from_float(nn.Conv2d(3, 4, 3), _qparams(torch.per_channel_affine, torch.qint8, 4, 0))
    model = nn.Sequential(module, nn.ReLU()).eval()
    copy = traceable(model)
    assert copy is not model and copy[0] is not module and copy[0].bias is module.bias
    assert torch.equal(copy[0].get_weight(), module.get_weight())
    assert traceable(nn.Sequential(nn.ReLU())) is not None


def _network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()


@pytest.mark.parametrize("backend", ["fbgemm", "qnnpack"])
@pytest.mark.parametrize("convert", [convert_to_reference_fx, _convert_to_reference_decomposed_fx])
def test_whole_graphs(backend, convert):
    x = torch.randn(2, 3, 12, 12)
    prepared = prepare_fx(_network(), get_default_qconfig_mapping(backend), (x,))
    prepared(x)
    network = convert(prepared).eval()  # the modules that fuse convolution and ReLU come in training mode
    artifact = bnncc.compile(network, (x,))
    batches = [(torch.randn(2, 3, 12, 12),) for _ in range(4)]
    report = bnncc.validate(artifact, network, batches)
    assert report.ok, report.problems


# Fake quantization


def test_fake_quantize_modules():
    torch.manual_seed(0)
    for_tensor = FakeQuantize(MinMaxObserver, quant_min=0, quant_max=15, dtype=torch.quint8)
    for_channels = FakeQuantize(
        PerChannelMinMaxObserver, quant_min=-8, quant_max=7, dtype=torch.qint8, ch_axis=1,
        qscheme=torch.per_channel_symmetric,
    )  # fmt: skip
    off = FakeQuantize(MinMaxObserver, quant_min=0, quant_max=3, dtype=torch.quint8)
    off.disable_fake_quant()
    model = nn.Sequential(for_tensor, for_channels, off)
    x = torch.randn(2, 3, 5, 5)
    model(x)
    with pytest.raises(ReferenceModuleError, match="module '0' still observes"):
        export_model(model.eval(), (x,))
    for module in model:
        module.disable_observer()
    report = bnncc.validate(bnncc.compile(model.eval(), (x,)), model, [(torch.randn(2, 3, 5, 5) * 3,)])
    assert report.ok and not report.outputs.mismatches
