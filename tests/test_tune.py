"""`bnncc compile --tune`: what it finds serves later compilations, whatever the cache holds; mistakes get one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import bnncc
from bnncc import compiler
from bnncc.cli import run
from bnncc.layers import QConv2d
from bnncc.passes import pipeline
from bnncc.runtime.errors import BnnccError
from bnncc.targets import search, tuning
from bnncc.targets.descriptor import native
from bnncc.targets.rules.candidates import candidates

X = torch.randn(1, 8, 12, 12, generator=torch.Generator().manual_seed(0))


def network():
    torch.manual_seed(0)
    return nn.Sequential(QConv2d(8, 40, 3), nn.BatchNorm2d(40), QConv2d(40, 24, 3)).eval()


@pytest.fixture(autouse=True)
def database(monkeypatch, tmp_path):
    """The path of a database that is not there yet; a cache of its own, and the model as a file in this folder."""
    monkeypatch.setenv("BNNCC_TUNING", str(tmp_path / "tuning.json"))
    monkeypatch.setenv("BNNCC_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    torch.export.save(torch.export.export(network(), (X,)), tmp_path / "model.pt2")
    return tmp_path / "tuning.json"


@pytest.fixture
def built(monkeypatch):
    """The tiles of every call of the code generator."""
    seen = []
    compile_kernels = compiler.compile_kernels

    def counted(mod, spec, tiles):
        seen.append(tiles)
        return compile_kernels(mod, spec, tiles)

    monkeypatch.setattr(compiler, "compile_kernels", counted)
    return seen


def record_another_tile(path):
    """Enters the second candidate of every kernel as the best; how many there are."""
    lowered = pipeline.run(compiler.import_model(network(), (X,)).mod, native())
    funcs = [func for gvar, func in lowered.functions_items() if gvar.name_hint != "main"]
    records = tuning.Database.read(path)
    asked = [request for func in funcs if (request := search.request_of(func, native()))]
    for request in asked:
        default, best = candidates(request, 2)
        records.add(native(), request, tuning.Record(default, best, 2.0, 1.0, "seconds"))
    records.write()
    return len(asked)


def answer(artifact):
    with artifact.load(threads=1) as session:
        return session(X.numpy())


def test_a_record_reaches_the_code_and_gets_past_the_cache(database, built):
    first = bnncc.compile(network(), (X,))
    assert record_another_tile(database) == 2
    second = bnncc.compile(network(), (X,))
    assert len(built) == 2
    assert first.versions[0].objects != second.versions[0].objects
    assert np.array_equal(answer(first), answer(second))
    assert bnncc.compile(network(), (X,)) == second
    bnncc.compile(network(), (X,), "x86-64-v2")
    assert len(built) == 3  # of another target, and nothing twice
    database.unlink()
    assert bnncc.compile(network(), (X,)) == first


def test_the_command_line_reads_records_before_its_cache(database, built):
    for _ in range(2):
        assert run(["compile", "model.pt2", "-o", "model.so"]) == 0
    assert len(built) == 1
    record_another_tile(database)
    for _ in range(2):
        assert run(["compile", "model.pt2", "-o", "model.so"]) == 0
    assert len(built) == 2


def test_tuning_fills_the_database_says_so_and_changes_no_output(database, capsys):
    expected = answer(bnncc.compile(network(), (X,)))
    assert run(["compile", "model.pt2", "-o", "model.so", "--tune", "5"]) == 0
    out = capsys.readouterr().out
    assert "tuned 2 kernels for native" in out and "% of the network's time" in out
    assert len(json.loads(database.read_text())["targets"][tuning.target_key(native())]) == 2
    with bnncc.runtime.load("model.so", threads=1) as session:
        assert np.array_equal(session(X.numpy()), expected)
    assert run(["compile", "model.pt2", "-o", "model.so", "--tune", "5"]) == 0
    assert "tuned 0 kernels" in capsys.readouterr().out


@pytest.mark.parametrize("minutes", ["0", "-1", "nan", "inf"])
def test_minutes_are_positive(minutes, capsys):
    assert run(["compile", "model.pt2", "-o", "model.so", "--tune", minutes]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f"--tune {minutes}: expected a positive number of minutes" in err
    with pytest.raises(BnnccError, match="tune is a positive number of minutes"):
        bnncc.Options(tune=float(minutes))


def test_minutes_are_a_number(capsys):
    assert run(["compile", "model.pt2", "-o", "model.so", "--tune", "soon"]) == 2
    assert "'soon' is not a valid float" in capsys.readouterr().err


@pytest.mark.parametrize("options", [[], ["--tune", "1"]])
def test_a_damaged_database_is_one_line(database, options, capsys):
    database.write_text("{")
    assert run(["compile", "model.pt2", "-o", "model.so", *options]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "tuning.json is no tuning database, or a damaged one; delete it" in err


def test_no_place_for_the_database_is_one_line(monkeypatch, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    for place, message in (("off", "BNNCC_TUNING=off"), (str(tmp_path / "file" / "t.json"), "t.json cannot be")):
        monkeypatch.setenv("BNNCC_TUNING", place)
        assert run(["compile", "model.pt2", "-o", "model.so", "--tune", "1"]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err
