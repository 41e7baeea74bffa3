"""Target x86-64: one artifact with a version for every level of x86-64, each as exact as if it were alone."""

import numpy as np
import pytest
import torch
from torch import nn

import bnncc
from bnncc.cli import run
from bnncc.inspection import inspect_model
from bnncc.layers import QConv2d, QLinear
from bnncc.runtime import cpu
from bnncc.runtime.errors import UnsupportedMachineError
from bnncc.targets.descriptor import get_targets

NAMES = [target.name for target in get_targets("x86-64")]

pytestmark = pytest.mark.skipif(cpu.host_architecture() != "x86_64", reason="the artifact is for x86-64")


@pytest.fixture(scope="module")
def model(with_drawn_norms):
    """Binary layers of odd channels, with batch norms between: every value of it is exact."""
    torch.manual_seed(0)
    model = nn.Sequential(
        QConv2d(13, 37, 3, padding=1), nn.BatchNorm2d(37), QConv2d(37, 19, 3, stride=2), nn.BatchNorm2d(19),
        nn.Flatten(), QLinear(19 * 5 * 4, 7, bias=False), nn.BatchNorm1d(7),
    )  # fmt: skip
    return with_drawn_norms(model)


@pytest.fixture(scope="module")
def images():
    return torch.randn(2, 13, 11, 9, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def compiled(model, images, tmp_path_factory):
    """(artifact, path where it is saved, stages that the progress showed)"""
    stages = []
    folder = tmp_path_factory.mktemp("versions")
    artifact = bnncc.compile(
        model, (images[:1],), "x86-64", options=bnncc.Options(dump_ir=folder / "ir"),
        progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    return artifact, artifact.save(folder / "model.so"), stages


def runnable():
    """Names of the versions that this machine can run, best first."""
    listed = cpu.host_features()
    return [t.name for t in get_targets("x86-64") if listed is None or listed.issuperset(t.features)]


@pytest.mark.parametrize("name", NAMES)
def test_every_version_is_bit_equal(compiled, model, images, name, monkeypatch):
    if name not in runnable():
        with pytest.raises(UnsupportedMachineError, match=f"version {name} cannot run here: this CPU lacks"):
            bnncc.runtime.load(compiled[1], version=name)
        return
    with bnncc.runtime.load(compiled[1], version=name) as session, torch.no_grad():
        assert session.version["name"] == name
        for image in images.split(1):
            np.testing.assert_array_equal(session(image.numpy()), model(image).numpy())
    monkeypatch.setenv("BNNCC_VERSION", name)
    report = bnncc.validate(compiled[1], model, [images], layer_batches=None)
    assert report.ok and report.target == name and all(step.exact for step in report.steps)


def test_the_best_is_taken(compiled):
    with compiled[0].load() as session:
        assert session.version["name"] == runnable()[0]


def test_the_manifest_says_what_every_version_is(compiled):
    artifact, path, _ = compiled
    manifest = bnncc.runtime.read_manifest(path)
    assert manifest == artifact.manifest
    assert (manifest["target"], manifest["arch"]) == ("x86-64", "x86_64")
    assert [version["name"] for version in manifest["versions"]] == NAMES
    for version, target in zip(manifest["versions"], get_targets("x86-64"), strict=True):
        assert version["features"] == sorted(target.features)
        assert [layer["path"] for layer in version["layers"]] == ["0", "2", "5"]
        suffix = target.name.replace("-", "_")
        assert all(step["kernel"].endswith(f"_{suffix}") for step in (*version["init"], *version["steps"]))


def test_what_versions_share_is_stored_once(compiled):
    artifact, path, _ = compiled
    each = sum(len(version.plan.weights) for version in artifact.versions)
    assert artifact.manifest["weights_bytes"] < each
    code = sum(len(version.objects[0]) for version in artifact.versions)
    assert path.stat().st_size < artifact.manifest["weights_bytes"] + code + (64 << 10)  # the driver


def test_the_command_line_shows_and_obeys_versions(compiled, images, tmp_path, capsys, monkeypatch):
    path = str(compiled[1])
    assert run(["inspect", path]) == 0
    out = capsys.readouterr().out
    assert "target:  x86-64 (x86_64)" in out and f"layers of {NAMES[0]}:" in out
    assert all(f"version: {target.name}: {target.cpu}; needs " in out for target in get_targets("x86-64"))
    np.save(tmp_path / "x.npy", images[:1].numpy())
    monkeypatch.setenv("BNNCC_VERSION", "x86-64-v2")
    assert run(["run", path, "--input", str(tmp_path / "x.npy")]) == 0
    monkeypatch.setenv("BNNCC_VERSION", "x86-64-v9")
    capsys.readouterr()
    assert run(["run", path, "--input", str(tmp_path / "x.npy")]) == 2
    _, err = capsys.readouterr()
    assert err == f"error: model: no version 'x86-64-v9'; the artifact holds {', '.join(NAMES)}\n"


def test_what_a_model_becomes_is_shown_for_the_best(model, images):
    best = inspect_model(model, (images[:1],), "x86-64")
    assert best == inspect_model(model, (images[:1],), NAMES[0]) and len(best) >= 3


def test_progress_and_dumps_name_the_version(compiled):
    _, path, stages = compiled
    assert stages.count("trace") == 1
    for name in NAMES:
        assert f"{name}: generate code" in stages
        assert "R.sign" in (path.parent / "ir" / name / "00_imported.py").read_text()
