"""Devices, and the runner executable that serves them."""

import shutil
import subprocess

import numpy as np
import pytest

from bnncc import runtime
from bnncc.runtime import device as device_module
from bnncc.runtime.errors import ArtifactError, DeviceError, ExecutionError, InputError

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-aarch64") is None, reason="qemu-aarch64 is not installed (Debian: qemu-user)"
)


@pytest.fixture(
    params=[
        "local",
        pytest.param("qemu", marks=[pytest.mark.qemu, needs_qemu]),
        pytest.param("qemu 32", marks=[pytest.mark.qemu, needs_qemu]),
    ]
)
def device(request, artifact, arm_artifact, arm32_artifact):
    which = {"local": artifact, "qemu": arm_artifact, "qemu 32": arm32_artifact}[request.param]
    with runtime.open_device(which, request.param.split()[0], 2) as device:
        yield device


def test_runs(tiny, device):
    for seed in range(5):
        x, n = tiny.inputs(seed)
        tiny.check(device.run([np.asfortranarray(x), n]), x, n)
    device.set_threads(1)
    tiny.check(device.run([x, n]), x, n)
    device.set_threads(None)
    tiny.check(device.run([x, n]), x, n)


def test_inspects(tiny, device):
    x, _ = tiny.inputs()
    device.write(0, x)
    device.run_steps(0, 1)
    np.testing.assert_allclose(device.read(4), x * device.read(3) + 1, rtol=1e-5, atol=1e-6)
    device.write(4, np.zeros_like(x))
    device.run_steps(1, 1)
    y = device.read(5)
    np.testing.assert_allclose(y, np.full(x.shape, 2.0), rtol=1e-6)
    y[0, 0] = 1  # the caller's own


def test_benches(device):
    seconds = device.bench(7)
    assert len(seconds) == 7 and all(0 < s < 10 for s in seconds)
    with pytest.raises(InputError, match=r"runs must be 1 or more; 0 was given"):
        device.bench(0)


def test_refuses(tiny, device):
    x, n = tiny.inputs()
    with pytest.raises(InputError, match=r"input 'x' has shape \(5, 1024\)"):
        device.run([x[:5], n])
    with pytest.raises(InputError, match=r"no tensor 99; the model has 7"):
        device.read(99)
    with pytest.raises(InputError, match=r"tensor 2 \('w'\) is a constant"):
        device.write(2, np.zeros(1024, np.float32))
    with pytest.raises(InputError, match=r"tensor 0.* takes 24576 bytes, 8192 (were given|were sent)"):
        device.write(0, x[:2])
    with pytest.raises(ExecutionError, match=r"steps 3 to 4 asked for, the model has 3"):
        device.run_steps(3, 1)
    with pytest.raises(InputError, match=r"threads must be 1 or more"):
        device.set_threads(0)
    tiny.check(device.run([x, n]), x, n)  # and goes on


def test_closed_devices_say_so(device):
    device.close()
    device.close()
    with pytest.raises((DeviceError, InputError), match=r"is closed"):
        device.read(0)


def test_unknown_device(artifact):
    with pytest.raises(DeviceError, match=r"unknown device 'quemu'; devices are local, cuda:N, qemu"):
        runtime.open_device(artifact, "quemu")


def test_missing_artifact(tmp_path):
    with pytest.raises(ArtifactError, match=r"no such file"):
        runtime.open_device(tmp_path / "none.so", "qemu")


def test_missing_qemu(arm_artifact, monkeypatch):
    monkeypatch.setattr(device_module.shutil, "which", lambda name: None)
    with pytest.raises(
        DeviceError, match=r"needs qemu-aarch64, which is not installed; on Debian: apt install qemu-us"
    ):
        runtime.open_device(arm_artifact, "qemu")


@needs_qemu
@pytest.mark.qemu
def test_missing_runner(arm_artifact, tmp_path):
    alone = shutil.copy(arm_artifact, tmp_path / "tiny.so")
    with pytest.raises(DeviceError, match=r"needs the runner .*/tiny-run, which is missing; compile with --runner"):
        runtime.open_device(alone, "qemu")


@needs_qemu
@pytest.mark.qemu
def test_runner_of_another_artifact(tiny, arm_artifact, tmp_path):
    tiny.build(tmp_path / "tiny.so", tiny.ARM, seed=9)
    shutil.copy(arm_artifact.with_name("tiny-run"), tmp_path / "tiny-run")
    with pytest.raises(DeviceError, match=r"tiny-run is the runner of another artifact; compile both in one command"):
        runtime.open_device(tmp_path / "tiny.so", "qemu")


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo some words >&2; exit 3", r"ended with status 3: some words"),
        ("kill -SEGV $$", r"was ended by signal 11"),
        ("kill -ILL $$", r"met an instruction that the emulated CPU lacks"),
    ],
)
def test_a_dying_runner(artifact, tmp_path, script, message):
    program = tmp_path / "run"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    with pytest.raises(DeviceError, match=message) as caught:
        device_module.RunnerDevice([str(program)], runtime.read_manifest(artifact))
    assert "\n" not in str(caught.value)


def test_a_runner_that_cannot_be_started(artifact):
    with pytest.raises(DeviceError, match=r"/no/such: cannot be started: No such file"):
        device_module.RunnerDevice(["/no/such"], runtime.read_manifest(artifact))


@pytest.fixture
def runner(arm_artifact, tmp_path):
    """Runs the runner under qemu in an empty folder."""

    def run(*arguments):
        command = ["qemu-aarch64", arm_artifact.with_name("tiny-run"), *map(str, arguments)]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)

    return run


@needs_qemu
@pytest.mark.qemu
class TestCommandLine:
    @pytest.fixture(autouse=True)
    def _files(self, tiny, tmp_path):
        self.x, self.n = tiny.inputs()
        np.save(tmp_path / "x.npy", self.x)
        np.save(tmp_path / "n.npy", self.n)
        self.files = ("--input", "x.npy", "--input", "n.npy")

    def test_runs(self, tiny, runner, tmp_path):
        result = runner(*self.files, "--output", "y.npy", "--output", "m.npy", "--threads", 2)
        assert result.returncode == 0, result.stderr
        tiny.check((np.load(tmp_path / "y.npy"), np.load(tmp_path / "m.npy")), self.x, self.n)
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.npy", "n.npy", "x.npy", "y.npy"]

    def test_benches_and_describes_itself(self, runner, arm_artifact):
        assert "5 runs of aarch64: min" in runner("--bench", 5).stdout
        help_text = runner("--help")
        assert help_text.returncode == 0 and "input  x float32 (6, 1024)" in help_text.stdout
        assert "output m int64 (3,)" in help_text.stdout
        import json

        assert json.loads(runner("--manifest").stdout) == runtime.read_manifest(arm_artifact)
        assert runner().returncode == 2

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda x: x[:5], r"x.npy: input 'x' wants shape (6, 1024), the file has (5, 1024)"),
            (lambda x: x.astype(np.float64), r"x.npy: input 'x' wants dtype float32 (<f4), the file has <f8"),
            (np.asfortranarray, r"x.npy: the array is in Fortran order"),
            (lambda x: np.array([{}], object), r"x.npy: input 'x' wants dtype float32 (<f4), the file has |O"),
        ],
    )
    def test_refuses_wrong_arrays(self, runner, tmp_path, change, message):
        np.save(tmp_path / "x.npy", change(self.x), allow_pickle=True)
        result = runner(*self.files, "--output", "y.npy")
        assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1
        assert not (tmp_path / "y.npy").exists()

    @pytest.mark.parametrize("keep", [0, 7, 60, 1000])
    def test_refuses_truncated_arrays(self, runner, tmp_path, keep):
        (tmp_path / "x.npy").write_bytes((tmp_path / "x.npy").read_bytes()[:keep])
        result = runner(*self.files, "--output", "y.npy")
        assert result.returncode == 1 and "x.npy: " in result.stderr and result.stderr.count("\n") == 1

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--input", "x.npy"), "the model has 2 inputs, 1 given"),
            (("--input", "none.npy", "--input", "n.npy"), "none.npy: No such file"),
            (("--bench", "many"), "--bench wants a whole number from 1 up, not 'many'"),
            (("--threads", "2000", "--bench", "1"), "2000 threads asked for; 1 to 1024 are supported"),
            (("--outputs", "y.npy"), "unknown option '--outputs'; see --help"),
            (("--input",), "--input wants a value"),
        ],
    )
    def test_refuses_wrong_options(self, runner, arguments, message):
        result = runner(*arguments)
        assert result.returncode in (1, 2) and message in result.stderr and result.stderr.count("\n") == 1

    def test_an_output_that_cannot_be_written(self, runner):
        result = runner(*self.files, "--output", "none/y.npy")
        assert result.returncode == 1 and "none/y.npy" in result.stderr
