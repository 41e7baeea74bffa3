"""The command line and GPUs: what it compiles, lists and shows, and what it refuses in one line."""

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from bnncc.cli import run
from bnncc.layers import QConv2d
from bnncc.runtime.container import read_manifest
from bnncc.targets.cuda import toolchain
from bnncc.targets.cuda.descriptor import CUDA_TARGETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, and an artifact of it for a GPU."""
    path = tmp_path_factory.mktemp("cuda")
    torch.manual_seed(0)
    layers = [QConv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64), QConv2d(64, 32, 1), nn.Flatten(), nn.Linear(960, 4)]
    torch.export.save(
        torch.export.export(nn.Sequential(*layers).eval(), (torch.ones(1, 16, 6, 5),)), path / "model.pt2"
    )
    assert run(["compile", str(path / "model.pt2"), "-t", "cuda-sm_90", "-o", str(path / "model.so")]) == 0
    return path


@pytest.fixture(autouse=True)
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def test_targets(capsys):
    assert run(["targets"]) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert CUDA_TARGETS.keys() <= rows.keys()
    assert "x86_64 + sm_90" in rows["cuda-sm_90"] and "tiles of bits" in rows["cuda-sm_90"]
    assert "aarch64 + sm_87" in rows["jetson-orin"] and "tiles of bytes" in rows["cuda-sm_120"]


def test_compile_says_what_was_written(capsys, tmp_path):
    options = ["-t", "jetson-orin", "-o", str(tmp_path / "m.so"), "--header", str(tmp_path / "m.h")]
    assert run(["compile", "model.pt2", *options]) == 0
    assert " for jetson-orin, of which " in capsys.readouterr().out
    assert "m_create" in (tmp_path / "m.h").read_text()
    manifest = read_manifest(tmp_path / "m.so")
    assert manifest["arch"] == "aarch64" and manifest["versions"][0]["device"]["sm"] == "sm_87"


def test_the_ir_ends_in_cuda_and_ptx(tmp_path):
    arguments = ["-t", "cuda-sm_80", "-o", str(tmp_path / "m.so"), "--dump-ir", str(tmp_path / "ir")]
    assert run(["compile", "model.pt2", *arguments]) == 0
    *_, source, ptx = sorted((tmp_path / "ir").iterdir())
    assert source.name.endswith("_kernels.cu") and ptx.name.endswith("_kernels.ptx")
    (version,) = read_manifest(tmp_path / "m.so")["versions"]
    for name in version["device"]["kernels"]:
        assert f" {name}(" in source.read_text() and f".entry {name}(" in ptx.read_text()


def test_inspect_shows_kernels(capsys):
    (version,) = read_manifest("model.so")["versions"]
    device = version["device"]
    assert run(["inspect", "model.so"]) == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert "target:  cuda-sm_90 (x86_64)" in lines
    assert "version: cuda-sm_90: sm_90; needs a driver of CUDA 12.0" in lines or "needs a driver of CUDA 13.0" in out
    assert " arena, " in out and " weights, on the GPU" in out
    launches = [launch for step in device["launches"] for launch in step]
    assert launches
    for launch in launches:
        kernel = device["kernels"][launch["function"]]
        (line,) = (line for line in lines if f" {launch['function']} " in line)
        cells = [cell.strip() for cell in line.split("│")[1:-1]]
        assert [math.prod(map(int, cell.split("×"))) for cell in cells[2:4]] == [
            math.prod(launch["grid"]),
            math.prod(launch["block"]),
        ]
        assert cells[4] == str(kernel["registers"])
        assert int(cells[7]) > 0 and 0 < int(cells[8].rstrip("%")) <= 100
    (total,) = (line.split("│")[2] for line in lines if "total" in line and line.count("│") == 10)
    assert int(total) == len(launches)


def test_inspect_as_json(capsys):
    assert run(["inspect", "model.so", "--json"]) == 0
    (version,) = json.loads(capsys.readouterr().out)["versions"]
    assert version["device"]["kind"] == "cuda" and version["device"]["kernels"]


def test_inspect_a_model(capsys):
    assert run(["inspect", "model.pt2", "-t", "cuda-sm_90"]) == 0
    assert "binary conv2d" in capsys.readouterr().out


COMPILE = ["compile", "model.pt2", "-t", "cuda-sm_90", "-o", "new.so"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*COMPILE, "-t", "cuda-sm_70"], "unknown target 'cuda-sm_70': did you mean cuda-sm_"),
        ([*COMPILE, "--tune", "1"], "cannot tune for target cuda-sm_90: the tiles of GPUs are chosen by rule"),
        ([*COMPILE, "--float-layers", "int8", "--calibrate", "x.npz"], "on processors, not on cuda-sm_90"),
    ],
)
def test_what_is_refused(arguments, message, capsys, folder):
    np.savez("x.npz", x=np.ones((1, 16, 6, 5), "float32"))
    assert run(arguments) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("error: ") and err.count("\n") == 1
    assert not (folder / "new.so").exists()


def test_nothing_to_compile_with(monkeypatch, capsys):
    monkeypatch.setattr(toolchain, "_compilers", lambda: ())
    assert run(COMPILE) == 2
    assert capsys.readouterr().err == (
        "error: compiling for CUDA needs NVRTC or nvcc, and neither is here. "
        "Do: pip install 'bnncc[cuda]', or set CUDA_HOME to a CUDA toolkit of 12.8 or later\n"
    )
