"""The conversation with Larq Compute Engine's process, by a stand-in that needs no TensorFlow."""

import stat
import sys

import pytest

from benchmarks import lce, timing

_STAND_IN = """#!{python}
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if "model" in request:
        reply = {{"error": "no such model"}} if request["model"] == "NoNet" else {{}}
    elif "load" in request:
        reply = {{"loaded": len(request["options"])}}
    else:
        reply = {{"times": [float(request["run"]), 5.0, float(request["run"])]}}
    if request.get("model") == "Crash":
        raise SystemExit(1)
    print(json.dumps(reply), flush=True)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    python = tmp_path / "python"
    python.write_text(_STAND_IN.format(python=sys.executable))
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(lce, "BUILD", tmp_path)
    monkeypatch.setattr(lce, "MODELS", tmp_path / "models")
    worker = lce.Worker(python)
    yield worker
    worker.close()


def test_every_option_is_a_contender_beside_those_of_this_process(worker):
    contenders = {"here": lambda: None, **worker.runners("QuickNet")}
    medians = timing.interleaved_medians(contenders, 0.0, burst=0.0)
    assert [medians[name] for name in lce.OPTIONS] == [0.0, 1.0, 2.0]
    assert 0 <= medians["here"] < 1


def test_what_the_process_cannot_do_is_one_line(worker):
    with pytest.raises(lce.Unavailable, match="no such model"):
        worker.convert("NoNet")


def test_a_process_that_ends_is_named(worker):
    with pytest.raises(lce.Unavailable, match="process ended"):
        worker.convert("Crash")


def test_without_its_python_there_is_no_lce(monkeypatch, tmp_path):
    monkeypatch.setattr(lce, "VENV", tmp_path / "venv")
    monkeypatch.setattr(lce.shutil, "which", lambda name: None)
    lce.install.cache_clear()
    with pytest.raises(lce.Unavailable, match=r"needs python3\.11"):
        lce.install()


def test_the_best_of_lce_is_its_fastest_option():
    from benchmarks import peers

    row = peers.comparison({"bnncc": 1e-3, "bnncc, NHWC": 5e-4, "ORT fp32": 4e-3, "LCE default": 9e-3, "LCE x": 8e-3})
    assert row["times_faster"] == {"ORT fp32": 4.0, "LCE default": 9.0, "LCE x": 8.0, "LCE best": 8.0}
    assert row["median_ms"]["bnncc, NHWC"] == 0.5
