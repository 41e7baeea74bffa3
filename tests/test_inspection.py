"""`bnncc inspect MODEL`: every layer is listed with what it becomes, and what is refused does not hide the rest."""

import json

import pytest
import torch
from torch import nn

from bnncc.cli import run
from bnncc.inspection import inspect_model
from bnncc.layers import QConv2d, QLinear


class Running(nn.Module):
    def forward(self, x):
        return torch.cumsum(x, 1)


class Net(nn.Module):
    """A layer of each kind, one operator that nothing can compile in a module and one in the model's own forward."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.first = QConv2d(8, 8, 3, padding=1)
        self.between = nn.BatchNorm2d(8)
        self.second = QConv2d(8, 16, 3, stride=2)
        self.running = Running()
        self.stored = QConv2d(16, 16, 1, input_quantization="identity")
        self.fc = QLinear(16, 4, input_quantization="identity", weight_quantization="identity")

    def forward(self, x):
        x = self.second(self.between(self.first(self.norm(self.stem(x)))))
        best = torch.topk(x.flatten(1), 3)[0]
        return self.fc(self.stored(self.running(x).relu()).mean((2, 3))), best


EXAMPLE = torch.zeros(1, 3, 9, 9)


def test_every_layer_is_listed_with_what_it_becomes():
    found = {(f.path, f.becomes): f for f in inspect_model(Net().eval(), EXAMPLE)}
    kinds = {path: kind for path, kind in found if path in dict(Net().named_children())}
    assert kinds == {
        "stem": "float", "norm": "float", "first": "binary", "between": "folded", "second": "binary",
        "running": "refused", "stored": "weight-only binary", "fc": "float",
    }  # fmt: skip
    assert found["first", "binary"].layer.macs == 8 * 8 * 9 * 49
    assert (found["first", "binary"].layer.activation_bits, found["first", "binary"].layer.weight_bits) == (1, 1)
    assert "cumsum" in found["running", "refused"].reason
    assert found["", "refused"].operator == "topk.default"


def test_the_command_says_what_cannot_be_compiled(tmp_path, capsys):
    path = tmp_path / "net.pt2"
    torch.export.save(torch.export.export(Net().eval(), (EXAMPLE,)), path)
    assert run(["inspect", str(path)]) == 1
    out = capsys.readouterr().out
    for text in ("first", "binary conv2d", "1 × 1", "batch_norm", "refused: cumsum.default is not supported", "total"):
        assert text in out
    assert run(["inspect", str(path), "--json"]) == 1
    assert {row["becomes"] for row in json.loads(capsys.readouterr().out)} >= {"binary", "float", "refused"}


def test_a_use_of_an_operator_that_is_refused():
    class Shared(nn.Module):
        def forward(self, x):
            return torch.nn.functional.avg_pool2d(x, 2, divisor_override=3)

    (found,) = (f for f in inspect_model(nn.Sequential(Shared(), nn.Conv2d(3, 3, 1)).eval(), EXAMPLE) if f.reason)
    assert (found.path, found.becomes) == ("0", "refused")
    assert "divisor_override" in found.reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere.so"], "no file"), (["tests.nets:Net"], "--input-shape"), (["nowhere.pt2"], "no file")],
)
def test_errors(arguments, message, capsys):
    assert run(["inspect", *arguments]) == 2
    assert message in capsys.readouterr().err
