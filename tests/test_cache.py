"""The compile cache: the same model is compiled once, a different one anew, and a broken entry costs nothing."""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn

import bnncc
from bnncc import cache, compiler
from bnncc.commands import bnncc as command
from bnncc.layers import QConv2d
from bnncc.targets.descriptor import get_target, get_targets

X = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def network(seed=0, channels=5):
    torch.manual_seed(seed)
    return nn.Sequential(QConv2d(3, channels, 3), nn.BatchNorm2d(channels), QConv2d(channels, 4, 1)).eval()


@pytest.fixture(autouse=True)
def entries(monkeypatch, tmp_path):
    """The cache's folder, empty; called, it counts the entries."""
    monkeypatch.setenv("BNNCC_CACHE", str(tmp_path / "cache"))
    return lambda: sorted((tmp_path / "cache").glob("*.zip"))


@pytest.fixture
def compiled(monkeypatch):
    """How many modules the passes saw."""
    seen = []
    run = compiler.pipeline.run

    def counted(mod, *args, **kwargs):
        seen.append(mod)
        return run(mod, *args, **kwargs)

    monkeypatch.setattr(compiler.pipeline, "run", counted)
    return seen


def key():
    digest = cache.module_digest(compiler.import_model(network(), (X,)).mod)
    return cache.Entry.of(digest, [get_target("rpi4")]).keys[0]


def same(a, b):
    assert a == b
    assert a.manifest == b.manifest


def test_the_second_time_nothing_is_compiled(compiled, entries):
    first = bnncc.compile(network(), (X,))
    second = bnncc.compile(network(), (X,))
    assert (len(compiled), len(entries())) == (1, 1)
    same(first, second)
    with second.load(threads=1) as session, torch.no_grad():
        assert np.array_equal(session(X.numpy()), network()(X).numpy())


@pytest.mark.parametrize(
    "change",
    [
        lambda: bnncc.compile(network(seed=1), (X,)),
        lambda: bnncc.compile(network(channels=6), (X,)),
        lambda: bnncc.compile(network(), (X[..., :5],)),
        lambda: bnncc.compile(network(), (X,), "x86-64-v2"),
        lambda: bnncc.compile(network(), (X,), name="other"),
        lambda: bnncc.compile(network(), (X,), options=bnncc.Options(channels_last="inputs")),
        lambda: bnncc.compile(network().append(nn.ReLU()).eval(), (X,)),
    ],
    ids=["weights", "width", "image", "target", "name", "options", "operator"],
)
def test_what_differs_is_compiled(change, compiled, entries):
    bnncc.compile(network(), (X,))
    change()
    assert (len(compiled), len(entries())) == (2, 2)


def test_one_changed_number_deep_in_a_batch_norm_is_seen():
    digests = set()
    for epsilon in (1e-5, np.nextafter(1e-5, 1)):
        model = network()
        model[1].eps = float(epsilon)
        digests.add(cache.module_digest(compiler.import_model(model, (X,)).mod))
    assert len(digests) == 2


def test_keys_are_the_same_in_another_process():
    code = "import runpy, sys; print(runpy.run_path(sys.argv[1])['key']())"
    other = subprocess.run([sys.executable, "-c", code, __file__], capture_output=True, text=True, check=True)
    assert other.stdout.split() == [key()]


def test_a_broken_entry_is_compiled_anew(compiled, entries):
    first = bnncc.compile(network(), (X,))
    (path,) = entries()
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    same(bnncc.compile(network(), (X,)), first)
    assert len(compiled) == 2
    flipped = bytearray(data)
    flipped[data.index(b"plan.json") + 40] ^= 1
    path.write_bytes(flipped)
    same(bnncc.compile(network(), (X,)), first)
    assert len(compiled) == 3


def entry(name):
    return cache.Entry((name,), (get_target("native"),))


def test_the_oldest_go_first(entries, monkeypatch):
    versions = bnncc.compile(network(), (X,)).versions
    size = entries()[0].stat().st_size
    for age, name in ((3, "old"), (1, "young"), (2, "middle")):
        entry(name).store(versions)
        path = cache.folder() / f"{name}.zip"
        os.utime(path, (path.stat().st_mtime - 100 * age,) * 2)
    monkeypatch.setattr(cache, "MOST_BYTES", int(3.5 * size))
    entry("new").store(versions)
    assert {path.stem for path in entries()} >= {"new", "young"}
    assert "old" not in {path.stem for path in entries()}


def test_entries_hold_every_part_of_a_plan():
    versions = bnncc.compile(network(), (X,)).versions
    entry("one").store(versions)
    assert entry("one").load() == versions
    changed = dataclasses.replace(versions[0], plan=dataclasses.replace(versions[0].plan, arena_bytes=1))
    entry("one").store([changed])
    assert entry("one").load() == (changed,)


def test_an_artifact_of_several_versions(compiled):
    same(bnncc.compile(network(), (X,), "x86-64"), bnncc.compile(network(), (X,), "x86-64"))
    assert len(compiled) == len(get_targets("x86-64"))


def test_it_can_be_turned_off(compiled, entries, monkeypatch, tmp_path):
    for _ in range(2):
        bnncc.compile(network(), (X,), options=bnncc.Options(cache=False))
        bnncc.compile(network(), (X,), options=bnncc.Options(dump_ir=str(tmp_path / "ir")))
    monkeypatch.setenv("BNNCC_CACHE", "off")
    bnncc.compile(network(), (X,))
    assert (len(compiled), entries()) == (5, [])


def test_a_folder_that_cannot_be_made_costs_nothing(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BNNCC_CACHE", str(tmp_path / "file" / "cache"))
    assert bnncc.compile(network(), (X,)).manifest


def test_command_line(tmp_path, compiled, entries):
    torch.export.save(torch.export.export(network(), (X,)), tmp_path / "model.pt2")
    arguments = ["compile", str(tmp_path / "model.pt2"), "-o", str(tmp_path / "model.so")]
    outputs = [CliRunner().invoke(command, [*arguments, *more]) for more in ([], [], ["--no-cache"])]
    assert [result.exit_code for result in outputs] == [0, 0, 0]
    assert len(compiled) == 2


def test_calibrated_ranges_are_part_of_the_key(compiled, entries):
    model, x = nn.Sequential(nn.Conv2d(4, 16, 3), QConv2d(16, 4, 1)).eval(), torch.randn(1, 4, 6, 6)

    def int8(calibration):
        return bnncc.compile(model, (x,), options=bnncc.Options(float_layers="int8", calibration=[calibration]))

    first, second = int8(x), int8(x)
    assert len(compiled) == 1
    same(first, second)
    assert int8(2 * x).quantized != first.quantized and len(compiled) == 2
    assert bnncc.compile(model, (x,)).quantized == () and len(compiled) == 3
