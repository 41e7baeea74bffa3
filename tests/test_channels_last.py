"""`Options.channels_last`: images of every rank go in and come out as N, …, C, and nothing else changes."""

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import bnncc
from bnncc.commands import bnncc as command
from bnncc.layers import QConv1d, QConv2d, QConv3d
from bnncc.runtime.container import read_manifest
from bnncc.runtime.errors import BnnccError

CONV = {3: (QConv1d, nn.BatchNorm1d), 4: (QConv2d, nn.BatchNorm2d), 5: (QConv3d, nn.BatchNorm3d)}


def network(rank):
    torch.manual_seed(rank)
    conv, norm = CONV[rank]
    return nn.Sequential(conv(5, 9, 3, padding=1), norm(9), conv(9, 6, 3, stride=2)).eval()


class Everything(nn.Module):
    """Inputs of ranks 2 and 4, one read in both layouts; outputs: an input, images, scores, a transposed image."""

    def __init__(self):
        super().__init__()
        self.conv = QConv2d(4, 8, 3, padding=1)

    def forward(self, x, v):
        y = self.conv(x)
        return x, y, x.flatten(1) * v, y.transpose(2, 3)


def last(array):
    return np.ascontiguousarray(np.moveaxis(array, 1, -1)) if array.ndim > 2 else array


@pytest.mark.parametrize("rank", CONV)
@pytest.mark.parametrize("where", ["inputs", "outputs", "both"])
def test_every_rank(rank, where):
    model, x = network(rank), torch.randn(2, 5, *(7, 6, 5)[: rank - 2])
    artifact = bnncc.compile(model, (x,), options=bnncc.Options(channels_last=where))
    given = last(x.numpy()) if where != "outputs" else x.numpy()
    with torch.no_grad():
        expected = model(x).numpy()
    expected = last(expected) if where != "inputs" else expected
    with artifact.load(threads=1) as session:
        assert np.array_equal(session(given), expected)
    assert artifact.manifest["inputs"][0]["shape"] == list(given.shape)
    report = bnncc.validate(artifact, model, [(torch.cat([x, -x]),)])
    assert report.ok, report.summary()
    assert report.samples == 4


@pytest.mark.parametrize("where", ["none", "inputs", "outputs", "both"])
def test_several_inputs_and_outputs(where):
    torch.manual_seed(0)
    model = Everything().eval()
    x, v = torch.randn(2, 4, 5, 3), torch.randn(2, 60)
    artifact = bnncc.compile(model, (x, v), options=bnncc.Options(channels_last=where))
    given = [a.numpy() if where in ("none", "outputs") else last(a.numpy()) for a in (x, v)]
    with torch.no_grad():
        expected = [a.numpy() if where in ("none", "inputs") else last(a.numpy()) for a in model(x, v)]
    with artifact.load(threads=1) as session:
        for found, wanted in zip(session(*given), expected, strict=True):
            assert np.array_equal(found, wanted)
    orders = [port["order"] for ports in ("inputs", "outputs") for port in artifact.manifest[ports]]
    moved = [[None, [0, 2, 3, 1]][flag] for flag in (where in ("inputs", "both"), where in ("outputs", "both"))]
    assert [list(order) if order else None for order in orders] == [
        moved[0], None, moved[1], moved[1], None, moved[1]
    ]  # fmt: skip
    assert bnncc.validate(artifact, model, [(x, v)]).ok


def test_an_image_that_is_given_as_it_is_read_is_not_moved():
    x = torch.randn(1, 64, 8, 8)
    model = nn.Sequential(QConv2d(64, 64, 3, padding=1)).eval()
    artifact = bnncc.compile(model, (x,), options=bnncc.Options(channels_last="both"))
    assert [step["op"] for step in artifact.manifest["versions"][0]["steps"] if "permute" in step["op"]] == []
    assert any("permute" in step["op"] for step in bnncc.compile(model, (x,)).manifest["versions"][0]["steps"])


def test_an_unknown_value_is_refused():
    with pytest.raises(BnnccError, match=r"channels_last is one of none, inputs, outputs, both; 'nhwc' was given"):
        bnncc.Options(channels_last="nhwc")


def test_command_line(tmp_path):
    model, x = network(4), torch.randn(1, 5, 7, 6)
    torch.export.save(torch.export.export(model, (x,)), tmp_path / "model.pt2")
    out = tmp_path / "model.so"
    arguments = ["compile", str(tmp_path / "model.pt2"), "-o", str(out), "--channels-last", "both"]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0, result.output
    assert read_manifest(out)["inputs"][0]["shape"] == [1, 7, 6, 5]
    np.savez(tmp_path / "data.npz", x=x.numpy())
    arguments = ["validate", str(out), "--reference", str(tmp_path / "model.pt2"), "--data", str(tmp_path / "data.npz")]
    assert CliRunner().invoke(command, arguments).exit_code == 0
