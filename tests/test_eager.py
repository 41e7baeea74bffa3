"""`bnncc.validate` on compiled networks: right ones pass on every device, broken ones fail and are found."""

import shutil

import numpy as np
import pytest
import torch
from torch import nn

import bnncc
from bnncc.eager import EagerReference
from bnncc.layers import QConv2d, QLinear
from bnncc.runtime import parity
from bnncc.runtime.device import open_device, runner_path
from bnncc.runtime.errors import BnnccError
from bnncc.runtime.values import StoredValue


class Residual(nn.Module):
    """Float stem, two binary convolutions with batch norm and shortcuts, pooling, binary linear, float head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.first = nn.Sequential(QConv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.second = nn.Sequential(QConv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16))
        self.third = nn.Sequential(QConv2d(16, 24, 3, stride=2), nn.BatchNorm2d(24), QConv2d(24, 24, 1))
        self.hidden = QLinear(24 * 9, 32, bias=False)
        self.norm = nn.BatchNorm1d(32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.first(x)
        x = x + self.second(x)
        return self.head(self.norm(self.hidden(self.third(x).flatten(1))))


@pytest.fixture(scope="module")
def model(with_drawn_norms):
    torch.manual_seed(0)
    model = Residual()
    return with_drawn_norms(model)


@pytest.fixture(scope="module")
def images():
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=["native", pytest.param("rpi4", marks=pytest.mark.qemu)])
def saved(request, model, images, tmp_path_factory):
    """(artifact's path, device it runs on)"""
    if request.param == "rpi4" and shutil.which("qemu-aarch64") is None:
        pytest.skip("qemu-aarch64 is not installed")
    path = tmp_path_factory.mktemp(request.param) / "residual.so"
    bnncc.compile(model, (images[:1],), request.param, name="residual").save(path, runner=runner_path(path))
    return path, "local" if request.param == "native" else "qemu"


def test_a_right_artifact_is_ok_and_every_binary_layer_exact(saved, model, images):
    path, device = saved
    with torch.no_grad():
        labels = model(images).argmax(1)
    report = bnncc.validate(path, model, [images], labels, device, layer_batches=None)
    assert report.problems == []
    assert (report.samples, report.traced, report.accuracy, report.eager_accuracy) == (5, 5, 1.0, 1.0)
    convolutions = [step for step in report.steps if "xnor" in step.op]
    assert len(convolutions) >= 5 and all(step.exact and step.isolated.mismatches == 0 for step in convolutions)
    assert {path.split(".")[0] for step in report.steps for path in step.layers} >= {"stem", *BINARY, "head"}


BINARY = {"first", "second", "third", "hidden"}


class Spoiled:
    """A device that flips one bit of what one step wrote."""

    def __init__(self, device, step):
        self.device, self.step = device, step
        self.manifest, self.version = device.manifest, device.version

    def __getattr__(self, name):
        return getattr(self.device, name)

    def run_steps(self, first, count):
        for index in range(first, first + count):
            self.device.run_steps(index, 1)
            if index == self.step:
                id_ = self.version["steps"][index]["args"][-1]
                array = self.device.read(id_)
                # The middle of the tensor: no padding pixel, and not a padding bit of few channels.
                array.view(np.uint8).reshape(-1)[array.nbytes // 2 & ~3] ^= 1
                self.device.write(id_, array)

    def run(self, inputs):
        for tensor, array in zip(self.version["inputs"], inputs, strict=True):
            self.device.write(tensor, array)
        self.run_steps(0, len(self.version["steps"]))
        return [self.device.read(tensor) for tensor in self.version["outputs"]]


def test_one_flipped_bit_in_any_exact_step_is_found_and_named(saved, model, images):
    path, device = saved
    reference = EagerReference(model, (images[:1],))
    with open_device(path, device) as opened:
        tensors = opened.version["tensors"]
        steps = dict(enumerate(opened.version["steps"]))
        targets = [i for i, step in steps.items() if step["exact"] and StoredValue.of(tensors[step["args"][-1]])]
        assert len(targets) >= 6
        for index in targets:
            report = parity.check(Spoiled(opened, index), reference, [images[:1]])
            assert not report.ok, steps[index]
            (blamed,) = {step.index for step in report.steps if not step.ok(report.tolerance)}
            assert blamed == index
            assert report.problems[0].startswith(", ".join(steps[index]["layers"]))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 1), QConv2d(16, 8, 3)).eval()


def test_an_artifact_that_was_never_saved(small, images):
    assert bnncc.validate(bnncc.compile(small, (images[:1],)), small, [(images[:2],)]).ok


def test_an_exported_program_as_reference(small, images):
    program = torch.export.export(small, (images[:1],))
    assert bnncc.validate(bnncc.compile(program), program, [images[:2]]).ok


def test_batches_of_the_artifact(small, images):
    artifact = bnncc.compile(small, (images[:2],))
    report = bnncc.validate(artifact, small, [images[:4], images[:2]])
    assert report.ok and report.samples == 6
    with pytest.raises(BnnccError, match=r"shape \(2, 3, 8, 8\) \(or a multiple of 2"):
        bnncc.validate(artifact, small, [images])


def test_another_model_as_reference(saved, images):
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 10)).eval()
    with pytest.raises(BnnccError, match="it is not the model that was compiled"):
        bnncc.validate(saved[0], other, [images], device=saved[1])


def test_the_same_model_with_other_weights_is_not_ok(saved, images):
    torch.manual_seed(5)
    report = bnncc.validate(saved[0], Residual().eval(), [images], device=saved[1])
    assert not report.ok


def test_a_model_in_training_mode(saved, images):
    with pytest.raises(BnnccError, match="training mode"):
        bnncc.validate(saved[0], Residual(), [images], device=saved[1])


def test_reference_values_are_eagers_own(model, images):
    """The recorded graph computes what the module computes, bit for bit, and leaves it as it was."""
    reference = EagerReference(model, (images[:1],))
    x = images[:1].numpy()
    (last,) = (node.args[0][0] for node in reference._program.graph.nodes if node.op == "output")
    assert np.array_equal(reference.values([x], {last.name})[last.name], reference.outputs([x])[0])


def test_a_value_that_is_one_only_once_reshaped_has_its_row():
    """A pool over three axes is two sums, the second written as columns: inexact, and said to be."""
    model = nn.Sequential(nn.ReLU(), nn.AvgPool3d(2, 1, 1), nn.ReLU()).eval()
    x = torch.randn(2, 5, 4, 3, 4)
    report = bnncc.validate(bnncc.compile(model, (x,)), model, [x])
    assert report.ok
    assert [(step.layers, step.exact) for step in report.steps if "avg_pool" in step.op] == [(("1",), False)]
