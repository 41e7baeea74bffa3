"""Several versions of a model in one artifact: which one runs, how one is forced, what they share."""

import dataclasses
import os
import platform
import shutil
import subprocess
import sys

import pytest

from bnncc import runtime
from bnncc.runtime import cpu
from bnncc.runtime.device import RunnerDevice
from bnncc.runtime.errors import BnnccError, ExecutionError, InputError, UnsupportedMachineError
from bnncc.targets.link import link

pytestmark = pytest.mark.skipif(platform.machine() != "x86_64", reason="the artifacts are for x86-64")

# Features of no processor, and of every x86-64 since 2009.
FUTURE, OLD = ("avx1024", "sse4_2"), ("sse4_2",)


def version(tiny, target, features, seed, **changes):
    """One version of the hand-made model; `seed` decides its weights, so that outputs tell which one ran."""
    machine = dataclasses.replace(tiny.X86, name=target, features=features)
    plan = dataclasses.replace(tiny.plan(seed=seed, suffix=f"_{target}"), **changes)
    return tiny.version(plan, machine, (tiny.kernels(tiny.X86, f"_{target}"),))


@pytest.fixture(scope="module")
def several(tiny, tmp_path_factory):
    """(path of an artifact with the versions future, new and old, seed of the weights of each)"""
    seeds = {"future": 1, "new": 2, "old": 3}
    versions = [version(tiny, name, FUTURE if name == "future" else OLD, seed) for name, seed in seeds.items()]
    folder = tmp_path_factory.mktemp("several")
    link(versions, folder / "tiny.so", target="some", header=folder / "tiny.h", runner=folder / "tiny-run")
    return folder / "tiny.so", seeds


def check(tiny, session, seed):
    x, n = tiny.inputs()
    tiny.check(session(x, n), x, n, seed)


def test_the_first_that_the_machine_can_run_is_taken(tiny, several):
    path, seeds = several
    with runtime.load(path) as session:
        assert session.version["name"] == "new"
        check(tiny, session, seeds["new"])


@pytest.mark.parametrize("name", ["new", "old"])
def test_a_version_can_be_forced(tiny, several, name, monkeypatch):
    path, seeds = several
    with runtime.load(path, version=name) as session:
        assert session.version == session.manifest["versions"][list(seeds).index(name)]
        check(tiny, session, seeds[name])
    monkeypatch.setenv("BNNCC_VERSION", name)
    with runtime.load(path) as session:
        assert session.version["name"] == name
        check(tiny, session, seeds[name])
    monkeypatch.setenv("BNNCC_VERSION", "old")
    with runtime.load(path, version=name) as session:
        assert session.version["name"] == name


def test_versions_run_beside_each_other(tiny, several):
    path, seeds = several
    with runtime.load(path, version="new") as new, runtime.load(path, version="old") as old:
        for _ in range(2):
            check(tiny, new, seeds["new"])
            check(tiny, old, seeds["old"])


def test_an_empty_variable_forces_nothing(several, monkeypatch):
    monkeypatch.setenv("BNNCC_VERSION", "")
    with runtime.load(several[0]) as session:
        assert session.version["name"] == "new"


def refusal(kind, *arguments, **options):
    with pytest.raises(kind) as caught:
        runtime.load(*arguments, **options)
    assert isinstance(caught.value, BnnccError) and "\n" not in str(caught.value)
    return str(caught.value)


def test_an_unknown_version_is_refused(several, monkeypatch):
    assert refusal(InputError, several[0], version="x") == "no version 'x'; the artifact holds future, new, old"
    monkeypatch.setenv("BNNCC_VERSION", "x")
    assert refusal(ExecutionError, several[0]) == "tiny: no version 'x'; the artifact holds future, new, old"


def test_a_version_that_the_machine_cannot_run_is_refused(several, monkeypatch):
    path = several[0]
    wanted = f"{path}: version future cannot run here: this CPU lacks avx1024"
    assert refusal(UnsupportedMachineError, path, version="future") == wanted
    wanted = "tiny: this CPU lacks 'avx1024', which version future was compiled for"
    monkeypatch.setenv("BNNCC_VERSION", "future")
    assert refusal(ExecutionError, path) == wanted
    monkeypatch.delenv("BNNCC_VERSION")
    monkeypatch.setattr(cpu, "host_features", lambda: None)
    assert refusal(ExecutionError, path, version="future") == wanted


def test_a_machine_that_can_run_none_is_refused(tiny, several, tmp_path, monkeypatch):
    """By Python, and by the driver for C programs."""
    link([version(tiny, "a", FUTURE, 0), version(tiny, "b", ("avx2048",), 0)], tmp_path / "b.so", target="some")
    message = refusal(UnsupportedMachineError, tmp_path / "b.so")
    assert "b.so: compiled for target some, this CPU lacks avx2048; compile with -t native" in message
    monkeypatch.setattr(cpu, "host_features", lambda: None)
    message = refusal(ExecutionError, tmp_path / "b.so")
    assert message == "tiny: this CPU lacks 'avx2048', which the artifact was compiled for"
    monkeypatch.setattr(cpu, "host_features", lambda: frozenset({"sse2"}))
    assert "target some, this CPU lacks sse4_2;" in refusal(UnsupportedMachineError, several[0])


def test_the_manifest_records_all(tiny, several):
    manifest = runtime.read_manifest(several[0])
    assert (manifest["target"], manifest["arch"]) == ("some", "x86_64")
    assert [port["name"] for port in manifest["inputs"]] == ["x", "n"]
    assert [v["name"] for v in manifest["versions"]] == ["future", "new", "old"]
    assert [v["features"] for v in manifest["versions"]] == [sorted(FUTURE), [*OLD], [*OLD]]
    assert [v["steps"][0]["kernel"] for v in manifest["versions"]] == ["affine_future", "affine_new", "affine_old"]


def test_equal_constants_are_stored_once(tiny, several, tmp_path):
    one = tiny.COLUMNS * 4
    manifest = runtime.read_manifest(several[0])
    assert manifest["weights_bytes"] == 3 * one
    assert [v["tensors"][2]["offset"] for v in manifest["versions"]] == [0, one, 2 * one]
    link([version(tiny, name, OLD, 0) for name in ("a", "b")], tmp_path / "same.so", target="some")
    manifest = runtime.read_manifest(tmp_path / "same.so")
    assert manifest["weights_bytes"] == one
    assert [v["tensors"][2]["offset"] for v in manifest["versions"]] == [0, 0]
    for name in ("a", "b"):
        with runtime.load(tmp_path / "same.so", version=name) as session:
            check(tiny, session, 0)


def test_tensors_and_steps_are_those_of_the_version(tiny, several):
    path, seeds = several
    x, _ = tiny.inputs()
    for name in ("new", "old"):
        with runtime.load(path, version=name) as session:
            session.write(0, x)
            session.run_steps(0, 1)
            assert (session.read(2) == tiny.weights(seeds[name])).all()
            assert (session.read(3) == 2 * tiny.weights(seeds[name])).all()


def test_the_runner_takes_the_same(tiny, several, monkeypatch):
    path, seeds = several
    x, n = tiny.inputs()
    command = [str(path.with_name("tiny-run"))]
    for name in ("new", "old"):
        if name == "old":
            monkeypatch.setenv("BNNCC_VERSION", name)
        with RunnerDevice(command, runtime.read_manifest(path)) as device:
            assert device.version["name"] == name
            tiny.check(device.run([x, n]), x, n, seeds[name])
        said = subprocess.run([*command, "--bench", "1"], capture_output=True, text=True, check=True).stdout
        assert said.startswith(f"1 runs of {name}: min")
    monkeypatch.setenv("BNNCC_VERSION", "future")
    result = subprocess.run([*command, "--bench", "1"], capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.count("\n") == 1
    assert "this CPU lacks 'avx1024', which version future was compiled for" in result.stderr
    said = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout
    assert said.endswith("\n  future\n  new\n  old\n")


C_PROGRAM = """
#include <stdio.h>
#include <string.h>
#include "tiny.h"
int main(void) {
  tiny_instance *best = tiny_create(), *old = tiny_create_version("old");
  if (!best || !old) return puts(tiny_error()), 1;
  if (strcmp(tiny_version(best), "new") || strcmp(tiny_version(old), "old")) return 2;
  if (tiny_create_version("x") || !strstr(tiny_error(), "no version 'x'")) return 3;
  tiny_destroy(best);
  tiny_destroy(old);
  return 0;
}
"""


def test_a_c_program_chooses(tiny, several, tmp_path):
    path, _ = several
    (tmp_path / "main.c").write_text(C_PROGRAM)
    command = [sys.executable, "-m", "ziglang", "cc", "-target", tiny.X86.zig, "-Wall", "-Wextra", "-Werror", "-g0"]
    command += ["main.c", f"-I{path.parent}", str(path), "-o", "main"]
    built = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    environment = {**os.environ, "LD_LIBRARY_PATH": str(path.parent)}
    assert subprocess.run(["./main"], cwd=tmp_path, env=environment, timeout=60).returncode == 0


# What of the real levels runs on processors that qemu emulates: its own AVX-512 is none.
EMULATED = {
    "Haswell": "x86-64-v3",
    "Skylake-Server": "x86-64-v3",
    "Haswell,-bmi2": "x86-64-v2",
    "Haswell,-xsave": "x86-64-v2",  # the system does not save the registers of AVX
    "Nehalem": "x86-64-v2",
}


@pytest.mark.qemu
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="qemu-x86_64 is not installed (Debian: qemu-user)")
def test_emulated_processors_get_their_level(tiny, tmp_path):
    from bnncc.targets.descriptor import get_targets

    versions = [version(tiny, t.name.replace("-", "_"), t.features, 0) for t in get_targets("x86-64")]
    link(versions, tmp_path / "tiny.so", target="x86-64", runner=tmp_path / "tiny-run")
    for processor, level in EMULATED.items():
        command = ["qemu-x86_64", "-cpu", processor, str(tmp_path / "tiny-run"), "--bench", "1"]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.stdout.startswith(f"1 runs of {level.replace('-', '_')}: "), (processor, result)
    command = ["qemu-x86_64", "-cpu", "qemu64", str(tmp_path / "tiny-run"), "--bench", "1"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and "this CPU lacks 'popcnt', which the artifact was compiled for" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "other"}, r"versions of one model have different names: \['tiny', 'other'\]"),
        ({"outputs": (5,)}, r"versions of one model have different outputs"),
    ],
)
def test_refuses_versions_of_different_models(tiny, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        link([version(tiny, "a", OLD, 0), version(tiny, "b", OLD, 0, **change)], tmp_path / "a.so", target="some")


def test_refuses_versions_of_different_architectures(tiny, tmp_path):
    other = tiny.version(tiny.plan(), tiny.ARM)
    with pytest.raises(ValueError, match=r"versions of one model have different architectures"):
        link([version(tiny, "a", OLD, 0), other], tmp_path / "a.so", target="some")
