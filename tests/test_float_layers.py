"""The opt-in to int8 for float layers: what it takes, that the artifact computes just that, and what is left exact."""

import shutil
import warnings

import pytest
import torch
from torch import nn

import bnncc
from bnncc import Options
from bnncc.calibration import gains
from bnncc.compiler import import_model
from bnncc.dialect.ops import op_name
from bnncc.layers import QConv2d
from bnncc.runtime.device import runner_path
from bnncc.runtime.errors import BnnccError

GENERATOR = torch.Generator().manual_seed(3)
IMAGES = torch.randn(12, 4, 12, 10, generator=GENERATOR)
CALIBRATION, TEST = IMAGES[:8], IMAGES[8:]


class Network(nn.Module):
    """Float stem, binary convolutions around a float shortcut, a float depthwise layer, float head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU())
        self.first = nn.Sequential(QConv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.second = nn.Sequential(QConv2d(16, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32))
        self.shortcut = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 32, 1, bias=False), nn.BatchNorm2d(32))
        self.depthwise = nn.Conv2d(32, 32, 3, padding=1, groups=32)
        self.head = nn.Linear(32 * 30, 24)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        x = self.second(x) + self.shortcut(x)
        return self.head(self.depthwise(x).flatten(1))


@pytest.fixture(scope="module")
def model(with_drawn_norms):
    torch.manual_seed(0)
    model = Network()
    return with_drawn_norms(model)


def int8(**options):
    return Options(float_layers="int8", calibration=[CALIBRATION], **options)


@pytest.fixture(scope="module", params=["native", pytest.param("rpi5", marks=pytest.mark.qemu)])
def saved(request, model, tmp_path_factory):
    """(artifact's path, device it runs on, what compile returned)"""
    if request.param != "native" and shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed")
    path = tmp_path_factory.mktemp(request.param) / "network.so"
    artifact = bnncc.compile(model, (IMAGES[:1],), request.param, name="network", options=int8())
    artifact.save(path, runner=runner_path(path))
    return path, "local" if request.param == "native" else "qemu", artifact


def test_the_manifest_says_which_layers_are_not_the_models(saved):
    manifest = bnncc.runtime.read_manifest(saved[0])
    assert manifest["float_layers"] == "int8"
    assert [entry["path"] for entry in manifest["quantized"]] == ["stem.0", "shortcut.1", "head"]
    lows = [entry["low"] for entry in manifest["quantized"]]
    assert lows[0] == float(CALIBRATION.min()) and manifest["quantized"][0]["high"] == float(CALIBRATION.max())
    (version,) = manifest["versions"]
    kinds = {layer["path"]: layer["op"] for layer in version["layers"]}
    assert {path for path, op in kinds.items() if op.startswith("integer")} == {"stem.0", "shortcut.1", "head"}
    assert kinds["depthwise"] == "depthwise conv2d"  # has no integer kernel that gains
    marked = [step for step in version["steps"] if step["opt_in"] == "int8"]
    assert len(marked) == 3 and not any(step["exact"] for step in marked)


def test_the_artifact_computes_what_it_says_and_binary_layers_stay_exact(saved, model):
    path, device, _ = saved
    with torch.no_grad():
        labels = model(TEST).argmax(1)
    report = bnncc.validate(path, model, [TEST], labels, device, layer_batches=None)
    assert report.problems == []
    binary = [step for step in report.steps if "xnor" in step.op]
    assert binary and all(step.exact and step.isolated.mismatches == 0 for step in binary)
    quantizers = [step for step in report.steps if "pack_bytes" in step.op]
    assert quantizers and all(step.isolated.mismatches == 0 for step in quantizers if step.exact)
    layers = {report.layer(step): step for step in report.steps if step.opt_in and not step.packed}
    assert layers.keys() == {"stem.0", "shortcut.1", "head"}
    for step in layers.values():
        assert step.isolated.max_rel < 1e-5  # of the model with rounded layers, whose floats torch sums
        assert 1e-3 < step.cost.max_rel < 0.1  # of eager
        most, mean = step.steps_off
        assert 0 < mean < most < 20
    assert {"stem.0", "shortcut.1", "head"}.isdisjoint(report.inexact_layers)
    assert any(line.startswith("int8 by opt-in: stem.0, shortcut.1, head") for line in report.summary())
    assert any("instead of 100.00 %" in line for line in report.summary())


def test_without_the_opt_in_nothing_changes(model):
    manifest = bnncc.compile(model, (IMAGES[:1],)).manifest
    assert manifest["float_layers"] == "float32" and manifest["quantized"] == []
    assert not any(step["opt_in"] for step in manifest["versions"][0]["steps"])


def test_other_weights_are_found(saved, model):
    """A quantized layer is held to the model's own weights, not merely to something near eager."""
    path, device, _ = saved
    other = Network()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.stem[0].weight[:, 1, 0, 2] += 0.05
    report = bnncc.validate(path, other.eval(), [TEST[:1]], device=device)
    assert [problem.split(",")[0] for problem in report.problems] == ["stem.0"]


def test_inputs_beyond_the_calibrated_range_are_clipped(model):
    artifact = bnncc.compile(model, (IMAGES[:1],), options=int8())
    report = bnncc.validate(artifact, model, [TEST * 3])
    assert report.ok
    stem = next(step for step in report.steps if report.layer(step) == "stem.0" and not step.packed)
    assert stem.cost.max_rel > 0.1  # eager does not clip


@pytest.mark.parametrize("kept", [("stem",), ("stem.0", "head"), ("",)])
def test_layers_that_are_kept_float(kept, model):
    if kept == ("",):
        with pytest.raises(BnnccError, match="keep_float names module ''"):
            bnncc.compile(model, (IMAGES[:1],), options=int8(keep_float=kept))
        return
    artifact = bnncc.compile(model, (IMAGES[:1],), options=int8(keep_float=kept))
    left = {"stem.0", "shortcut.1", "head"} - {"stem.0", *kept}
    assert {layer.path for layer in artifact.quantized} == left


class Weights(nn.Module):
    """A float layer of quantized activations, and one of binary weights on floats."""

    def __init__(self):
        super().__init__()
        self.signs = nn.Conv2d(16, 32, 3, bias=False)
        self.weight = nn.Parameter(torch.where(torch.randn(24, 32, 3, 3, generator=GENERATOR) > 0, 0.3, -0.3))

    def forward(self, x):
        return torch.conv2d(self.signs(torch.where(x >= 0, 1.0, -1.0)), self.weight)


def test_what_is_quantized_on_one_side_is_rounded_on_the_other():
    module, x = Weights().eval(), torch.randn(4, 16, 8, 8, generator=GENERATOR)
    artifact = bnncc.compile(module, (x[:1],), options=Options(float_layers="int8", calibration=[x]))
    signs, weights = artifact.quantized
    assert signs.low is None and weights.low < 0 < weights.high
    layers = artifact.manifest["versions"][0]["layers"]
    assert [(layer["activation_bits"], layer["weight_bits"]) for layer in layers] == [(1, 8), (8, 1)]
    report = bnncc.validate(artifact, module, [x])
    assert report.ok and report.quantized_layers == ["signs", ""]
    assert all(step.opt_in for step in report.steps if "conv2d" in step.op)


def test_an_onnx_model(tmp_path):
    class Sign(nn.Module):
        def forward(self, x):
            return torch.where(x >= 0, 1.0, -1.0)

    body = nn.Conv2d(16, 16, 3, bias=False)
    body.weight.data = body.weight.data.sign()
    model = nn.Sequential(nn.Conv2d(4, 16, 3), nn.ReLU(), Sign(), body, nn.Flatten(), nn.Linear(16 * 48, 40)).eval()
    path = tmp_path / "model.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that this exporter will go; it needs no further package
        torch.onnx.export(model, (IMAGES[:1],), path, dynamo=False)
    artifact = bnncc.compile(path, options=int8())
    assert [layer.path for layer in artifact.quantized] == ["/0/Conv", "/5/Gemm"]
    report = bnncc.validate(artifact, path, [TEST])
    assert report.problems == [] and report.quantized_layers == ["/0/Conv", "/5/Gemm"]


def test_several_versions_round_the_same_layers(model):
    artifact = bnncc.compile(model, (IMAGES[:1],), "x86-64", options=int8())
    tables = [
        {(layer["path"], layer["weight_bits"]) for layer in version["layers"]}
        for version in artifact.manifest["versions"]
    ]
    assert len(tables) > 1 and all(table == tables[0] for table in tables)


def test_inputs_by_name(model):
    artifact = bnncc.compile(
        model, (IMAGES[:1],), options=Options(float_layers="int8", calibration={"x": CALIBRATION.numpy()})
    )
    assert len(artifact.quantized) == 3


# The choice of layers, from what was measured: (layer, shape of its input, gains with VNNI, gains with PMADDWD)
GAINS = [
    (nn.Conv2d(3, 64, 7, 2, 3), (1, 3, 224, 224), True, False),  # three channels cost as much as four
    (nn.Conv2d(1, 32, 3), (1, 1, 28, 28), False, False),
    (nn.Conv2d(64, 64, 3), (1, 64, 56, 56), True, True),
    (nn.Conv2d(64, 128, 1), (1, 64, 28, 28), True, True),
    (nn.Conv2d(64, 8, 1), (1, 64, 56, 56), False, False),  # packing the input costs more than it saves
    (nn.Linear(512, 1000), (1, 512), True, True),
    (nn.Linear(64, 10), (1, 64), False, False),
]


@pytest.mark.parametrize("case", GAINS, ids=lambda case: str(case[0]))
def test_layers_that_would_be_slower_stay_float(case):
    layer, shape, *expected = case
    block = import_model(layer.eval(), (torch.zeros(shape),)).mod["main"].body.blocks[0]
    call = next(b.value for b in block.bindings if op_name(b.value) in ("nn.conv2d", "matmul"))
    assert [gains(call, speed) for speed in (3.3, 1.3)] == expected


def calibrated(*inputs):
    return Options(float_layers="int8", calibration=list(inputs))


NAMED = {"x": CALIBRATION, "y": CALIBRATION}
MISTAKES = {
    "no calibration": (lambda: Options(float_layers="int8"), "needs calibration inputs"),
    "an unknown value": (
        lambda: Options(float_layers="int4"),
        "is one of float32, int8, tf32, float16; 'int4' was given",
    ),
    "calibration alone": (lambda: Options(calibration=[CALIBRATION]), "go with float_layers='int8'"),
    "no sample": (lambda: calibrated(), "calibration: no inputs were given"),
    "a wrong shape": (lambda: calibrated(CALIBRATION[:, :2]), r"calibration: input 'x'.*\(8, 2"),
    "a wrong dtype": (lambda: calibrated(CALIBRATION.double()), "calibration: .*float64"),
    "two inputs": (lambda: calibrated((CALIBRATION, CALIBRATION)), "has 1 inputs"),
    "two names": (lambda: Options(float_layers="int8", calibration=NAMED), "x, y was given; the inputs are x"),
    "infinite": (lambda: calibrated(CALIBRATION / 0), "not finite where module 'stem.0'"),
    "an unknown module": (
        lambda: int8(keep_float=["hed"]),
        "'hed', which has no float layer; float layers are in head",
    ),
    "a binary module": (lambda: int8(keep_float=["first"]), "'first', which has no float layer"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_clear_line(name, model):
    options, message = MISTAKES[name]
    with pytest.raises(BnnccError, match=message) as caught:
        bnncc.compile(model, (IMAGES[:1],), options=options())
    assert "\n" not in str(caught.value)
