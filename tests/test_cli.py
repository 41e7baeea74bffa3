"""The command line: what it prints, what it writes, and one clear line for every mistake."""

import json
import re
import sys

import numpy as np
import pytest
import torch
from torch import nn

from bnncc.cli import run
from bnncc.layers import QConv2d

SHAPE = "1,8,6,5"
NETS = """
import torch
from torch import nn
from bnncc.layers import QConv2d

def net():
    return nn.Sequential(QConv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(16, 4))

class Bessel(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(Special())
    def forward(self, x):
        return self.inner(x)

class Special(nn.Module):
    def forward(self, x):
        return torch.special.i0(x)

number = 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, weights, data and a compiled artifact; tests run inside it."""
    path = tmp_path_factory.mktemp("cli")
    (path / "cli_nets.py").write_text(NETS)
    sys.path.insert(0, str(path))
    import cli_nets

    torch.manual_seed(0)
    model = cli_nets.net().eval()
    x = torch.randn(1, 8, 6, 5)
    torch.save(model.state_dict(), path / "weights.pt")
    floats = nn.Sequential(nn.Conv2d(8, 16, 3), QConv2d(16, 4, 3), nn.Flatten()).eval()
    torch.export.save(torch.export.export(floats, (x,)), path / "float.pt2")
    torch.export.save(torch.export.export(model, (x,)), path / "model.pt2")
    torch.export.save(torch.export.export(cli_nets.net().eval(), (x,)), path / "other.pt2")
    np.save(path / "x.npy", x.numpy())
    images = torch.randn(6, 8, 6, 5)
    with torch.no_grad():
        labels = model(images).argmax(1)
        np.save(path / "expected.npy", model(x).numpy())
    np.savez(path / "data.npz", x=images.numpy(), labels=labels.numpy())
    assert run(["compile", str(path / "model.pt2"), "-o", str(path / "model.so"), "--name", "tiny"]) == 0
    yield path
    sys.path.remove(str(path))


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def lines(capsys):
    """(stdout, stderr) of the last command."""
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_compile_writes_everything_that_was_asked_for(folder, tmp_path, capsys):
    options = ["--header", tmp_path / "m.h", "--runner", tmp_path / "m-run", "--dump-ir", tmp_path / "ir"]
    arguments = ["compile", "cli_nets:net", "--weights", "weights.pt", "--input-shape", SHAPE, "-o", tmp_path / "m.so"]
    assert run([str(argument) for argument in [*arguments, *options]]) == 0
    out, err = lines(capsys)
    assert "m.so: " in out and "for native" in out and err == ""
    assert {path.name for path in tmp_path.iterdir()} == {"m.so", "m.h", "m-run", "ir"}
    dumped = sorted(path.name for path in (tmp_path / "ir").iterdir())
    assert len(dumped) > 5 and "R.sign" in (tmp_path / "ir" / dumped[0]).read_text()


def test_compile_with_float_layers_in_int8(tmp_path, capsys):
    np.savez(tmp_path / "typical.npz", x=np.load("data.npz")["x"])
    options = ["--float-layers", "int8", "--calibrate", str(tmp_path / "typical.npz")]
    assert run(["compile", "float.pt2", "-o", str(tmp_path / "q.so"), *options]) == 0
    assert run(["inspect", str(tmp_path / "q.so")]) == 0
    assert "opt-in:  int8 in 0" in lines(capsys)[0]
    arguments = ["validate", str(tmp_path / "q.so"), "--reference", "float.pt2", "--data", "data.npz"]
    assert run(arguments) == 0
    out, _ = lines(capsys)
    assert "int8 by opt-in: 0" in out and "cost of that:" in out
    assert run(["compile", "float.pt2", "-o", str(tmp_path / "f.so"), *options, "--keep-float", "0"]) == 0
    assert run(["inspect", str(tmp_path / "f.so")]) == 0
    assert "opt-in" not in lines(capsys)[0]


def test_run_prints_the_outputs(capsys):
    assert run(["run", "model.so", "--input", "x.npy"]) == 0
    out, _ = lines(capsys)
    assert "float32 [1, 4]" in out


def test_run_writes_an_npy_file(folder, tmp_path):
    assert run(["run", "model.so", "--input", "x.npy", "--output", str(tmp_path / "y.npy"), "--threads", "1"]) == 0
    # The pooling and the float head sum in another order than eager.
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), np.load(folder / "expected.npy"), rtol=1e-5, atol=1e-5)


def test_bench_says_how_long_runs_take(capsys):
    assert run(["bench", "model.so", "--runs", "3", "--threads", "1"]) == 0
    out, _ = lines(capsys)
    assert re.fullmatch(r"median [\d.]+ ms, fastest [\d.]+ ms, slowest [\d.]+ ms of 3 runs", out.strip())


def test_validate_says_equal(tmp_path, capsys):
    report = tmp_path / "report.json"
    arguments = ["validate", "model.so", "--reference", "model.pt2", "--data", "data.npz", "--report", str(report)]
    assert run(arguments) == 0
    out, _ = lines(capsys)
    assert "0 sign flips" in out and "top-1 agreement: 100.00 %" in out and "accuracy: 100.00 % (eager 100.00 %)" in out
    assert json.loads(report.read_text())["ok"] is True


def test_validate_against_other_weights_exits_1(capsys):
    assert run(["validate", "model.so", "--reference", "other.pt2", "--data", "data.npz"]) == 1
    out, _ = lines(capsys)
    assert "NOT EQUAL" in out and "wrong when fed with eager's own input" in out


def test_inspect_shows_target_layers_and_memory(capsys):
    assert run(["inspect", "model.so"]) == 0
    out, _ = lines(capsys)
    for text in ("tiny (bnncc", "native", "float32 [1, 8, 6, 5]", "binary conv2d", "1 × 1", "arena", "total"):
        assert text in out


def test_inspect_as_json(capsys):
    assert run(["inspect", "model.so", "--json"]) == 0
    assert json.loads(lines(capsys)[0])["name"] == "tiny"


def test_targets(capsys):
    assert run(["targets"]) == 0
    out, _ = lines(capsys)
    assert all(name in out for name in ("native", "x86-64-v2", "x86-64-v3", "x86-64-v4", "rpi4", "aarch64"))


@pytest.mark.parametrize("command", [[], ["compile"], ["run"], ["validate"], ["inspect"]])
def test_help_teaches_by_example(command, capsys):
    assert run([*command, "--help"]) == 0
    out, _ = lines(capsys)
    assert "Examples:" in out and "\n    bnncc " in out


COMPILE = ["compile", "cli_nets:net", "--input-shape", SHAPE, "-o", "new.so"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["complie"], "No such command 'complie'"),
        (["compile"], "Missing argument 'MODEL'"),
        ([*COMPILE, "-t", "rp4"], "unknown target 'rp4': did you mean rpi4?"),
        ([*COMPILE, "-t", "x86-64-v9"], "did you mean x86-64-v"),
        (["compile", "nope.pt2", "-o", "new.so"], "there is no file 'nope.pt2'"),
        (["compile", "x.npy", "-o", "new.so"], "'x.npy' is no model: MODEL is a .pt2 file, an .onnx file or"),
        (["compile", "net.onnx", "-o", "new.so"], "there is no file 'net.onnx'"),
        (["compile", "cli_nets:net", "-o", "new.so"], "--input-shape is missing"),
        (["compile", "cli_nets:nets", "--input-shape", SHAPE, "-o", "new.so"], "'cli_nets' has no 'nets'"),
        (["compile", "cli_nest:net", "--input-shape", SHAPE, "-o", "new.so"], "cannot import 'cli_nest'"),
        (["compile", "cli_nets:number", "--input-shape", SHAPE, "-o", "new.so"], "is a int, neither a module nor"),
        ([*COMPILE, "--weights", "x.npy"], "'x.npy' does not hold this model's state dict"),
        ([*COMPILE, "--input-shape", "1,a"], "--input-shape 1,a: expected numbers"),
        (["compile", "cli_nets:net", "--input-shape", "1,8,6,5", "-o", "no/new.so"], "there is no folder 'no'"),
        (
            ["compile", "cli_nets:net", "--input-shape", "1,7,6,5", "-o", "new.so"],
            "torch.export cannot trace the model",
        ),
        (["compile", "cli_nets:Bessel", "--input-shape", "1,4", "-o", "new.so"], "i0.default (module 'inner.0')"),
        ([*COMPILE, "--float-layers", "int8"], "--float-layers int8 and --calibrate inputs.npz go together"),
        ([*COMPILE, "--float-layers", "int4", "--calibrate", "data.npz"], "'int4' is not one of 'float32', 'int8'"),
        ([*COMPILE, "--calibrate", "data.npz"], "--float-layers int8 and --calibrate inputs.npz go together"),
        ([*COMPILE, "--float-layers", "int8", "--calibrate", "two.npz"], "a, b was given; the inputs are"),
        (["run", "absent.so", "--input", "x.npy"], "File 'absent.so' does not exist"),
        (["run", "x.npy", "--input", "x.npy"], "not a bnncc artifact"),
        (["run", "model.so", "--input", "data.npz"], "'data.npz' holds something else"),
        (["run", "model.so", "--input", "cli_nets.py"], "'cli_nets.py' cannot be read"),
        (["run", "model.so", "--input", "wrong.npy"], "has shape (2, 8, 6, 5)"),
        (["run", "model.so", "--input", "empty.npy"], "is empty and has shape (0, 8, 6, 5)"),
        (["run", "model.so", "--input", "double.npy"], "has dtype float64"),
        (
            ["run", "model.so", "--input", "x.npy", "--device", "pi"],
            "unknown device 'pi'; devices are local, cuda:N, qemu",
        ),
        (["run", "model.so", "--input", "x.npy", "--output", "no/y.npy"], "there is no folder 'no'"),
        (["run", "truncated.so", "--input", "x.npy"], "truncated"),
        (["run", "altered.so", "--input", "x.npy"], "altered"),
        (
            ["validate", "model.so", "--reference", "cli_nets:net", "--data", "data.npz"],
            "not in the form (module or exported",
        ),
        (["validate", "model.so", "--reference", "model.pt2", "--data", "x.npy"], "'x.npy' holds something else"),
        (["validate", "model.so", "--reference", "model.pt2", "--data", "two.npz"], "holds a, b; the inputs are"),
        (["validate", "model.so", "--reference", "model.pt2", "--data", "data.npz", "--device", "pi"], "'pi'"),
        (
            ["validate", "model.so", "--reference", "model.pt2", "--data", "data.npz", "--report", "r.txt"],
            "must end in .json or .html",
        ),
        (["inspect", "x.npy"], "not a bnncc artifact"),
    ],
)
def test_every_mistake_is_one_line_on_stderr_and_status_2(arguments, message, folder, capsys):
    x = np.load("x.npy")
    np.save("wrong.npy", np.concatenate([x, x]))
    np.save("empty.npy", x[:0])
    np.save("double.npy", x.astype(np.float64))
    np.savez("two.npz", a=x, b=x)
    artifact = (folder / "model.so").read_bytes()
    (folder / "truncated.so").write_bytes(artifact[:-1000])
    (folder / "altered.so").write_bytes(artifact[:5000] + bytes([artifact[5000] ^ 1]) + artifact[5001:])
    before = {path.name for path in folder.iterdir()}
    assert run(arguments) == 2
    out, err = lines(capsys)
    assert message in err and err.startswith("error: ") and err.count("\n") == 1 and out == ""
    assert {path.name for path in folder.iterdir()} - {"__pycache__"} == before - {"__pycache__"}


def test_a_bug_is_not_dressed_up_as_an_error(monkeypatch):
    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("bnncc.models.load_model", broken)
    with pytest.raises(ZeroDivisionError):
        run(COMPILE)


def test_interrupted(monkeypatch, folder):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bnncc.models.load_model", interrupted)
    assert run(COMPILE) == 130
    assert not (folder / "new.so").exists()


def test_a_model_is_a_callable_or_a_module(monkeypatch):
    import cli_nets

    from bnncc.models import load_model

    monkeypatch.setattr(cli_nets, "ready", nn.Sequential(QConv2d(1, 1, 1)), raising=False)
    assert load_model("cli_nets:ready") is cli_nets.ready and not cli_nets.ready.training
    assert isinstance(load_model("cli_nets:Bessel"), cli_nets.Bessel)
