"""The list of passes as a whole: networks in, planned kernels out, with eager PyTorch's own bits."""

import importlib
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import tvm
from torch import nn
from tvm import relax

from bnncc.frontends.torch import export_model, to_relax
from bnncc.passes import pipeline
from bnncc.passes.rewriter import ORIGINS
from bnncc.targets.descriptor import get_target


def binarize(x):
    return torch.where(x >= 0, 1.0, -1.0)


class BinaryConv(nn.Conv2d):
    """Signs of the input by `quantize`, padded with `pad_value`, times binary weights (ternary ones on demand)."""

    def __init__(self, *args, pad_value=-1.0, pad=0, quantize=binarize, ternary=False, **kwargs):
        super().__init__(*args, bias=False, **kwargs)
        self.pad_value, self.pad, self.quantize = pad_value, pad, quantize
        if ternary:
            self.weight.data[:, ::2] = 0

    def forward(self, x):
        padded = F.pad(self.quantize(x), (self.pad,) * 4, value=self.pad_value) if self.pad else self.quantize(x)
        weight = torch.sign(self.weight)
        return F.conv2d(padded, weight, None, self.stride, self.padding, self.dilation, self.groups)


class BinaryLinear(nn.Linear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, bias=False, **kwargs)

    def forward(self, x):
        return F.linear(binarize(x), binarize(self.weight))


def norm(channels, seed=0):
    """A batch norm with factors of both signs, one of them 0."""
    layer = nn.BatchNorm2d(channels)
    g = torch.Generator().manual_seed(seed)
    layer.weight.data = torch.randn(channels, generator=g)
    layer.weight.data[0] = 0
    layer.bias.data = torch.randn(channels, generator=g)
    layer.running_mean = 5 * torch.randn(channels, generator=g)
    layer.running_var = torch.rand(channels, generator=g) + 0.1
    return layer


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.first = nn.Sequential(BinaryConv(channels, channels, 3, pad=1), norm(channels, 1))
        self.second = nn.Sequential(BinaryConv(channels, channels, 3, pad=1), norm(channels, 2))
        self.activation = nn.PReLU(channels)
        self.activation.weight.data = torch.linspace(-0.5, 0.5, channels)

    def forward(self, x):
        x = self.activation(self.first(x)) + x
        return self.second(x) + x


# Networks whose every operator is exact, whatever the target.
NETWORKS = {
    "one convolution": (lambda: BinaryConv(20, 9, 3, pad=1), (2, 20, 7, 6)),
    "a 1×1 convolution of one word": (lambda: BinaryConv(8, 4, 1), (1, 8, 3, 3)),
    "a 1×1 convolution, full lanes": (lambda: BinaryConv(64, 16, 1), (1, 64, 3, 3)),
    "padded with +1": (lambda: BinaryConv(20, 9, 3, pad=1, pad_value=1.0, stride=2), (1, 20, 7, 6)),
    "padded with 0": (lambda: BinaryConv(20, 9, 3, padding=1, stride=2), (1, 20, 7, 6)),
    "padded with 0 around one pixel": (lambda: BinaryConv(20, 9, 3, padding=1), (1, 20, 1, 1)),
    "padded with 0, dilated": (lambda: BinaryConv(40, 9, 3, padding=(2, 3), dilation=2), (1, 40, 6, 9)),
    "groups": (lambda: BinaryConv(24, 10, 3, pad=1, groups=2), (1, 24, 5, 5)),
    "depthwise": (lambda: BinaryConv(8, 8, 3, padding=1, groups=8), (1, 8, 5, 5)),
    "ternary inputs": (lambda: BinaryConv(20, 9, 3, padding=1, quantize=torch.sign), (1, 20, 7, 6)),
    "ternary inputs padded with −1": (lambda: BinaryConv(20, 9, 3, pad=1, quantize=torch.sign), (1, 20, 7, 6)),
    "ternary weights": (lambda: BinaryConv(20, 9, 3, padding=1, ternary=True), (1, 20, 7, 6)),
    "ternary both": (lambda: BinaryConv(20, 9, 3, pad=0, quantize=torch.sign, ternary=True), (1, 20, 7, 6)),
    "an even kernel": (lambda: BinaryConv(20, 9, 4, padding="same"), (1, 20, 7, 6)),
    "thresholds": (
        lambda: nn.Sequential(BinaryConv(20, 17, 3, pad=1), norm(17), BinaryConv(17, 8, 3, pad=1)),
        (2, 20, 7, 6),
    ),
    "thresholds of ternary inputs": (
        lambda: nn.Sequential(
            BinaryConv(20, 17, 3, padding=1, quantize=torch.sign), norm(17), BinaryConv(17, 8, 3, padding=1)
        ),
        (2, 20, 7, 6),
    ),
    "hardtanh between": (
        lambda: nn.Sequential(BinaryConv(9, 9, 3, pad=1), norm(9), nn.Hardtanh(), BinaryConv(9, 8, 3)),
        (1, 9, 7, 6),
    ),
    "a table": (
        lambda: nn.Sequential(BinaryConv(9, 9, 3, pad=1), nn.PReLU(9, -1.0), norm(9), BinaryConv(9, 8, 3, pad=1)),
        (1, 9, 7, 6),
    ),
    "a table of one channel": (
        lambda: nn.Sequential(BinaryConv(9, 1, 3), nn.PReLU(1, -1.0), norm(1), BinaryConv(1, 8, 3, pad=1)),
        (1, 9, 7, 6),
    ),
    "max-pool of signs": (
        lambda: nn.Sequential(BinaryConv(20, 17, 3, quantize=lambda x: F.max_pool2d(binarize(x), 2))),
        (1, 20, 9, 8),
    ),
    "max-pool of signs, padded": (
        lambda: BinaryConv(20, 17, 3, pad=1, quantize=lambda x: F.max_pool2d(binarize(x), 3, 2, 1)),
        (1, 20, 9, 8),
    ),
    "max-pool of signs, rounded up": (
        lambda: BinaryConv(20, 17, 3, pad=1, quantize=lambda x: F.max_pool2d(binarize(x), 2, ceil_mode=True)),
        (1, 20, 9, 7),
    ),
    "max-pool of signs, dilated": (
        lambda: BinaryConv(20, 17, 3, pad=1, quantize=lambda x: F.max_pool2d(binarize(x), 2, 1, dilation=2)),
        (1, 20, 9, 7),
    ),
    "max-pool of ternary signs, padded": (
        lambda: BinaryConv(20, 17, 3, quantize=lambda x: F.max_pool2d(torch.sign(x), 3, 2, 1)),
        (1, 20, 9, 8),
    ),
    "max-pool before the sign": (
        lambda: nn.Sequential(BinaryConv(20, 17, 3, pad=1), nn.MaxPool2d(2), norm(17), BinaryConv(17, 4, 1)),
        (1, 20, 9, 8),
    ),
    "linear": (lambda: nn.Sequential(BinaryLinear(37, 20), BinaryLinear(20, 5)), (3, 37)),
    "linear of one": (lambda: BinaryLinear(8, 1), (1, 8)),
    "flattened": (
        lambda: nn.Sequential(BinaryConv(20, 6, 3), norm(6), nn.Flatten(), BinaryLinear(6 * 20, 5)),
        (2, 20, 7, 6),
    ),
    "residual": (lambda: Residual(20), (1, 20, 6, 5)),
    "a sign that is an output too": (lambda: SignAndProduct(), (1, 12, 5, 5)),
    "inputs and constants as outputs": (lambda: Outputs(), (1, 12, 5, 5)),
    "float elementwise": (lambda: nn.Sequential(nn.ReLU(), nn.PReLU(), nn.Hardtanh(), norm(12)), (2, 12, 5, 5)),
}


class SignAndProduct(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = BinaryConv(12, 5, 3, pad=1, quantize=lambda x: x)

    def forward(self, x):
        signs = binarize(x)
        return signs, self.conv(signs), signs + x


class Outputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("constant", torch.arange(6.0).reshape(2, 3))

    def forward(self, x):
        y = F.relu(x)
        return x, y, y.reshape(1, -1), self.constant + 1, y


class Branches(nn.Module):
    """Networks beside each other, each with an input of its own: one export and one compilation for all."""

    def __init__(self, names):
        super().__init__()
        torch.manual_seed(0)
        self.networks = nn.ModuleList([NETWORKS[name][0]() for name in names])

    def forward(self, *inputs):
        return [network(x) for network, x in zip(self.networks, inputs, strict=True)]


def imported(names):
    """(the networks in Relax, their inputs, what eager makes of them)"""
    generator = torch.Generator().manual_seed(7)
    inputs = tuple(torch.randn(NETWORKS[name][1], generator=generator) for name in names)
    for x in inputs:
        x[..., 0] = 0.0
    branches = Branches(names).eval()
    with torch.no_grad():
        eager = branches(*inputs)
    return to_relax(export_model(branches, inputs)).mod, inputs, eager


def run(names, target, execute, dump=None):
    """Network → ([what its kernels compute], [what eager does])."""
    mod, inputs, eager = imported(names)
    outputs = iter(execute(pipeline.run(mod, get_target(target), dump), *(x.numpy() for x in inputs)))
    table = {}
    for name, expected in zip(names, eager, strict=True):
        several = expected if isinstance(expected, tuple) else (expected,)
        table[name] = [next(outputs) for _ in several], [e.numpy() for e in several]
    return table


@pytest.fixture(scope="module")
def stages():
    return {}


@pytest.fixture(scope="module")
def results(execute, stages):
    """Of all networks on a machine with words of 64 bits; `stages` holds the module after every pass."""
    return run(list(NETWORKS), "x86-64-v3", execute, stages.__setitem__)


@pytest.mark.parametrize("network", NETWORKS)
def test_bit_equal_to_eager(network, results):
    for ours, eager in zip(*results[network], strict=True):
        assert np.array_equal(ours, eager)


@pytest.mark.parametrize("target", ["x86-64-v4", "rpi4"])
def test_bit_equal_to_eager_with_words_of_32_and_8_bits(target, execute):
    names = ["groups", "padded with 0", "thresholds", "ternary both", "linear", "max-pool of signs, padded"]
    for name, (ours, eager) in run(names, target, execute).items():
        assert np.array_equal(ours[0], eager[0]), name


def test_every_stage_is_well_formed_and_readable(results, stages):
    """A dump shows the path of the user's module behind a line instead of tables of names."""
    assert [*stages][:: len(stages) - 1] == ["imported", "FormKernels"]
    for stage in stages.values():
        relax.analysis.well_formed(stage)
    text = pipeline.readable(stages["PackBits"])
    assert ORIGINS not in text and "R.bnncc.xnor_conv2d" in text
    assert next(line for line in text.splitlines() if "R.bnncc.pack(" in line).endswith("# networks.0")


def test_a_dump_parses_back(v3):
    """Of a network without weights: TVM 0.27 can print arrays only as references to metadata that it cannot write."""
    stages = {}
    network = BinaryConv(8, 4, 1, quantize=binarize).eval()
    network.forward = lambda x: F.max_pool2d(F.pad(binarize(x), (1, 1, 1, 1), value=-1.0), 2) + 0.5
    pipeline.run(to_relax(export_model(network, torch.randn(1, 8, 5, 5))).mod, v3, dump=stages.__setitem__)
    for stage in stages.values():
        tvm.ir.assert_structural_equal(tvm.script.from_source(stage.script()), stage)


def passes():
    return [p.info.name for _, phase in pipeline.phases(get_target("rpi4")) for p in phase]


def test_the_order_that_passes_need():
    order = passes()
    assert order[0] == "CanonicalizeSign" and order[-1] == "FormKernels"
    needed = [
        "FoldConstants", "FuseBinaryConv", "FuseThreshold", "LowerBatchNorm", "ToNHWC", "PackBits", "OwnOutputs",
    ]  # fmt: skip
    assert [order.index(name) for name in needed] == sorted(order.index(name) for name in needed)


@pytest.mark.parametrize("name", dict.fromkeys(passes()))
def test_a_pass_says_what_it_does_where_and_what_it_declines(name):
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
    text = importlib.import_module(f"bnncc.passes.{snake}").__doc__
    assert "-->" in text
    assert re.search(r"\b([Aa]fter|[Bb]efore|[Ff]irst|[Ll]ast)\b", text)
    assert re.search(r"[Dd]eclines?\b|\bstays?\b", text)


def test_progress_counts_the_passes(v3):
    seen = []
    mod = to_relax(export_model(nn.ReLU().eval(), torch.randn(1, 4))).mod
    pipeline.run(mod, v3, progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert [s[1] for s in seen] == list(range(len(seen))) and {s[2] for s in seen} == {len(seen)}
