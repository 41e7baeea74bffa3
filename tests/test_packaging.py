"""The wheel: what it contains, and that it runs an artifact where there is only NumPy."""

import importlib.metadata
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bnncc
from bnncc.layers import QConv2d

ROOT = Path(__file__).parents[1]
FOLDERS = {"bnncc": "bnncc", "passes": "bnncc/passes", "runtime": "bnncc/runtime", "targets": "bnncc/targets"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, so that nothing stale from `build/` gets in and nothing is left in the checkout."""
    source = tmp_path_factory.mktemp("source") / "bnncc"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", source / "dist", source]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (source / "dist").glob("*.whl")
    return path


def test_holds_every_module_and_source_file(wheel):
    expected = {
        f"{installed}/{file.relative_to(ROOT / folder)}"
        for folder, installed in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in (".py", ".c", ".h") or file.name == "py.typed"
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"bnncc/runtime/c/driver.c", "bnncc/py.typed", "bnncc/targets/rules/base.py"} <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_plain_install_asks_for_numpy_only(wheel):
    (name,) = (name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("METADATA"))
    metadata = zipfile.ZipFile(wheel).read(name).decode()
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert required == ["Requires-Dist: numpy>=1.24"]


@pytest.fixture(scope="module")
def bare_python(wheel, tmp_path_factory):
    """The interpreter of a virtual environment that holds NumPy, copied from here, and the wheel."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    top = {file.parts[0] for file in importlib.metadata.files("numpy") if file.parts[0] != ".."}
    for name in top:
        shutil.copytree(importlib.metadata.distribution("numpy").locate_file(name), site / name)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    return python


SCRIPT = """
import importlib.util, sys
import numpy as np
for absent in ("torch", "tvm", "click", "rich", "pip"):
    assert importlib.util.find_spec(absent) is None, absent
from bnncc.runtime import load
session = load(sys.argv[1])
np.save(sys.argv[3], session(np.load(sys.argv[2])))
"""


def test_an_artifact_runs_with_numpy_alone(bare_python, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(QConv2d(40, 24, 3, padding=1), nn.BatchNorm2d(24)).eval()
    x = torch.randn(1, 40, 6, 5)
    bnncc.compile(model, (x,)).save(tmp_path / "model.so")
    np.save(tmp_path / "x.npy", x.numpy())
    command = [bare_python, "-c", SCRIPT, "model.so", "x.npy", "y.npy"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with torch.no_grad():
        assert np.array_equal(np.load(tmp_path / "y.npy"), model(x).numpy())


def test_the_command_line_says_what_is_missing(bare_python, tmp_path):
    command = [bare_python, "-m", "bnncc", "targets"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        2,
        "error: the command line needs the package 'click': pip install 'bnncc[compile]'\n",
    )
