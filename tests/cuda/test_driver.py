"""The driver of CUDA artifacts on the emulated GPU, with a network made by hand: what it must do is in driver_cases.py
and driver_failures.py, and driver_proxy.c, between it and the GPU, watches it and makes calls fail."""

import ast
import dataclasses
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from driver_proxy import build_library, build_proxy

from bnncc import runtime
from bnncc.dialect.plan import Layer, Plan, Step, Tensor, Value
from bnncc.runtime.device import RunnerDevice
from bnncc.runtime.errors import InputError, UnsupportedMachineError
from bnncc.targets.elf import Elf
from bnncc.targets.launch import DeviceCode, Launch, Resources
from bnncc.targets.link import Version, link
from bnncc.targets.modelc import API

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "runtime" / "c"
CASES = [
    (file, function.name)
    for file in ("driver_cases.py", "driver_failures.py")
    for function in ast.parse((HERE / file).read_text()).body
    if isinstance(function, ast.FunctionDef) and [argument.arg for argument in function.args.args] == ["path"]
]
ROWS, COLUMNS = 6, 64
IMAGE = b"stands for a cubin of driver_kernels.cu\0"
PTX = b"// Cuda compilation tools, release 13.0, V13.0.88\n.version 9.0\n.target sm_90\n"

on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the artifacts are linked for x86-64")


@dataclasses.dataclass(frozen=True)
class Host:
    """What linking reads of a target for a GPU: the machine around it."""

    name: str = "cuda-sm_90"
    arch: str = "x86_64"
    cpu: str = "sm_90"
    zig: str = "x86_64-linux-gnu.2.28"
    zig_static: str = "x86_64-linux-musl"
    features: tuple[str, ...] = ()


ARM = Host("jetson-orin", "aarch64", "sm_87", "aarch64-linux-gnu.2.28", "aarch64-linux-musl")


def make_plan():
    """Inputs x float32 [6, 64] and n int64 [3]; outputs exp(x * 2w + 1) reversed + 1, and n + 1. The second step is
    two kernels, with scratch between them, and y has another name there, as if it were reshaped."""
    shape = (ROWS, COLUMNS)
    size = ROWS * COLUMNS * 4
    tensors = (
        Tensor(0, "x", shape, "float32", "input", 0),
        Tensor(1, "n", (3,), "int64", "input", 1),
        Tensor(2, "w", (COLUMNS,), "float32", "weights", 64),
        Tensor(3, "w2", (COLUMNS,), "float32", "persistent", 0),
        Tensor(4, "h", shape, "float32", "arena", 64, Value("mul", (0, 1))),
        Tensor(5, "scratch", shape, "float32", "arena", 64 + size),
        Tensor(6, "y", shape, "float32", "output", 0),
        Tensor(7, "m", (3,), "int64", "output", 1),
        Tensor(8, "flat", (ROWS * COLUMNS,), "float32", "output", 0),
    )
    steps = (
        Step("affine", "affine", (0, 3, 4), 1, ("body.0",), True),
        Step("reverse", "reverse", (4, 8), 1, ("body.1",), False),
        Step("count", "count", (1, 7), 1, ("body.2",), True),
    )
    weights = bytes(64) + np.random.default_rng(0).standard_normal(COLUMNS).astype(np.float32).tobytes()
    init = (Step("double", "double", (2, 3), 1, (), True),)
    layers = (Layer("body.0", "affine", shape, 32, 32, ROWS * COLUMNS, COLUMNS * 4),)
    return Plan("tiny", tensors, init, steps, (0, 1), (6, 7), 64 + 2 * size, COLUMNS * 4, weights, layers)


def make_large_plan():
    """One kernel that adds 1 to 2.44 MiB, which the driver copies in three parts."""
    shape = (640000,)
    tensors = (Tensor(0, "x", shape, "float32", "input", 0), Tensor(1, "y", shape, "float32", "output", 0))
    return Plan("large", tensors, (), (Step("add", "add", (0, 1), 1, (), True),), (0,), (1,), 0, 0, b"")


def make_large_code():
    launch = Launch("large_kernel", (1, 1, 1), (64, 1, 1), 0, (0, 1))
    return DeviceCode("sm_90", IMAGE, PTX, ((launch,),), {"large_kernel": Resources(32, 0, 0, 64)})


def make_code(sm="sm_90"):
    block = (16, 1, 1)
    launches = (
        (Launch("double_kernel", (4, 1, 1), block, 0, (2, 3)),),
        (Launch("affine_kernel", (2, 3, 4), block, 96 * 1024, (4, 3, 0)),),
        (
            Launch("exp_kernel", (24, 1, 1), block, 0, (4, 5)),
            Launch("flip_kernel", (12, 1, 1), (4, 4, 2), 1024, (5, 8)),
        ),
        (Launch("count_kernel", (1, 1, 1), (3, 1, 1), 0, (1, 7)),),
    )
    names = {launch.function for step in launches for launch in step}
    return DeviceCode(sm, IMAGE, PTX, launches, {name: Resources(32, 128, 0, 64) for name in names})


def build(path, host=Host(), code=None, plan=None, **options):
    link([Version(plan or make_plan(), host, device=code or make_code())], path, **options)
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """Shared: not to be changed."""
    folder = tmp_path_factory.mktemp("cuda")
    return build(folder / "tiny.so", runner=folder / "tiny-run", header=folder / "tiny.h")


@pytest.fixture(scope="module")
def gpu(emulated_gpu, tmp_path_factory):
    """The variables with which a process finds two emulated GPUs behind the proxy."""
    emulated_gpu.add((HERE / "driver_kernels.cu").read_text(), "sm_90", IMAGE, PTX)
    folder = tmp_path_factory.mktemp("proxy")
    build_proxy(folder)
    variables = emulated_gpu.environment(devices=2, capability=90)
    return {**variables, "LD_LIBRARY_PATH": str(folder), "BNNCC_BEHIND": str(emulated_gpu.library)}


def run(command, variables=None):
    """The command's process. variables: of its environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("BNNCC_", "CUDA_"))}
    command = [str(word) for word in command]
    return subprocess.run(command, env=environment | (variables or {}), capture_output=True, text=True, timeout=120)


def zig(*arguments, **options):
    command = [sys.executable, "-m", "ziglang", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


@on_x86
@pytest.mark.parametrize(("file", "case"), CASES)
def test_on_the_emulated_gpu(gpu, artifact, tmp_path, file, case):
    if case == "an_architecture_of_its_own_runs_nowhere_else":
        artifact = build(tmp_path / "tiny.so", code=make_code("sm_90a"))
    if case == "large_inputs_are_copied_in_parts":
        artifact = build(tmp_path / "large.so", code=make_large_code(), plan=make_large_plan())
    result = run([sys.executable, HERE / file, case, artifact], gpu)
    assert result.returncode == 0, result.stderr


LOAD = "import sys; from bnncc import runtime; runtime.load(sys.argv[1])"
HAS_LIBCUDA = "import ctypes; ctypes.CDLL('libcuda.so.1')"


@on_x86
@pytest.mark.parametrize("by", ["python", "runner"])
def test_without_a_driver(artifact, by):
    """On this machine as it is."""
    if run([sys.executable, "-c", HAS_LIBCUDA]).returncode == 0:
        pytest.skip("the NVIDIA driver is installed here")
    runner = artifact.with_name("tiny-run")
    result = run([sys.executable, "-c", LOAD, artifact] if by == "python" else [runner, "--bench", 1])
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].partition(": ")[2] == (
        "tiny: compiled for a GPU (cuda-sm_90), but the NVIDIA driver cannot be opened: libcuda.so.1: cannot open "
        "shared object file: No such file or directory; install the driver, or compile for a CPU, as with -t native"
    )


@on_x86
def test_with_the_driver_of_long_ago(artifact, tmp_path):
    (tmp_path / "old.c").write_text('__attribute__((visibility("default"))) int cuInit(unsigned f) { return (int)f; }')
    build_library(tmp_path, tmp_path / "old.c")
    result = run([sys.executable, "-c", LOAD, artifact], {"LD_LIBRARY_PATH": str(tmp_path)})
    assert result.stderr.splitlines()[-1].endswith(
        "tiny: the NVIDIA driver is too old: its libcuda.so.1 has no cuDriverGetVersion; update it to one for CUDA 13.0"
    )


@on_x86
def test_the_runner(gpu, artifact, tmp_path):
    generator = np.random.default_rng(3)
    x, n = generator.standard_normal((ROWS, COLUMNS)).astype(np.float32), np.arange(3)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "n.npy", n)
    files = ["--input", "x.npy", "--input", "n.npy", "--output", "y.npy", "--output", "m.npy"]
    files = [str(tmp_path / word) if word.endswith(".npy") else word for word in files]
    result = run([artifact.with_name("tiny-run"), *files, "--bench", 3], gpu)
    assert result.returncode == 0 and "3 runs of cuda-sm_90" in result.stdout, result.stderr
    weights = np.random.default_rng(0).standard_normal(COLUMNS).astype(np.float32)
    wanted = np.exp(x * (2 * weights) + np.float32(1))[:, ::-1] + np.float32(1)
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted, rtol=1e-5)  # expf of two libraries
    np.testing.assert_array_equal(np.load(tmp_path / "m.npy"), n + 1)


@on_x86
def test_a_runner_that_serves(gpu, artifact, monkeypatch):
    for name, value in gpu.items():
        monkeypatch.setenv(name, value)
    with RunnerDevice([str(artifact.with_name("tiny-run"))], runtime.read_manifest(artifact)) as device:
        x, n = np.zeros((ROWS, COLUMNS), np.float32), np.arange(3)
        y, m = device.run((x, n))
        np.testing.assert_allclose(y, np.full(x.shape, np.exp(np.float32(1)) + 1), rtol=1e-6)
        np.testing.assert_array_equal(m, n + 1)
        np.testing.assert_array_equal(device.read(2) * 2, device.read(3))
        with pytest.raises(InputError, match="is a constant"):
            device.write(2, np.zeros(COLUMNS, np.float32))
        assert len(device.bench(2)) == 2


@on_x86
def test_a_c_program_uses_it(gpu, artifact, tmp_path):
    program = HERE.parent / "runtime" / "api_program.c"
    flags = ["-std=c99", "-pedantic", "-O2", "-fno-sanitize=undefined", "-Wall", "-Wextra", "-Werror", "-lm"]
    flags += [f"-DALL={ROWS * COLUMNS}", f"-I{artifact.parent}", f"-Wl,-rpath,{artifact.parent}"]
    result = zig("cc", "-target", Host().zig, program, artifact, *flags, "-o", "main", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run([tmp_path / "main"], gpu)
    assert result.returncode == 0 and result.stdout == "cuda-sm_90 on a GPU\n", result.stdout


def test_needs_the_c_library_alone(artifact):
    """And one of long ago: glibc 2.28, in which dlopen has a library of its own."""
    for path in (artifact, artifact.with_name("tiny-run")):
        names = set(re.findall(rb"\0(lib[a-z]+\.so\.\d+)", path.read_bytes()))
        assert names - {b"libcuda.so.1"} <= {b"libc.so.6", b"libm.so.6", b"libpthread.so.0", b"libdl.so.2"}
        versions = re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes())
        assert versions and max(map(int, versions)) <= 28
    assert {symbol.name for symbol in Elf(artifact.read_bytes()).exported} == {f"tiny_{function}" for function in API}
    assert b"__tvm_ffi" not in artifact.read_bytes()


@pytest.fixture(scope="module")
def arm_artifact(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda-arm")
    return build(folder / "tiny.so", ARM, make_code("sm_87"), runner=folder / "tiny-run")


def test_is_linked_for_another_host(arm_artifact):
    for path in (arm_artifact, arm_artifact.with_name("tiny-run")):
        assert Elf(path.read_bytes()).architecture == "aarch64"
    assert runtime.read_manifest(arm_artifact)["versions"][0]["device"]["sm"] == "sm_87"


@on_x86
def test_the_machine_around_the_gpu_is_checked_first(arm_artifact):
    with pytest.raises(UnsupportedMachineError) as caught:
        runtime.load(arm_artifact)
    assert str(caught.value) == (
        f"{arm_artifact}: compiled for aarch64 (target jetson-orin), this machine is x86_64; compile for it"
    )


def test_the_manifest_describes_the_launches(artifact):
    (version,) = runtime.read_manifest(artifact)["versions"]
    device = version["device"]
    assert (device["kind"], device["sm"], device["driver"], device["ptx_bytes"]) == ("cuda", "sm_90", 13000, len(PTX))
    resources = {"registers": 32, "shared_bytes": 128, "local_bytes": 0, "most_threads": 64}
    names = ["affine_kernel", "count_kernel", "double_kernel", "exp_kernel", "flip_kernel"]
    assert device["kernels"] == {name: resources for name in names}
    assert [[launch["function"] for launch in step] for step in device["launches"]] == [
        ["double_kernel"], ["affine_kernel"], ["exp_kernel", "flip_kernel"], ["count_kernel"],
    ]  # fmt: skip
    assert device["launches"][1][0] == {
        "function": "affine_kernel", "grid": [2, 3, 4], "block": [16, 1, 1], "shared_bytes": 98304, "args": [4, 3, 0],
    }  # fmt: skip


def changed(code, step, **changes):
    launches = list(code.launches)
    launches[step] = (dataclasses.replace(launches[step][0], **changes), *launches[step][1:])
    return dataclasses.replace(code, launches=tuple(launches))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: dataclasses.replace(c, launches=c.launches[1:]), "launches of 3 steps for 4"),
        (lambda c: dataclasses.replace(c, resources={}), "step double: kernel double_kernel is not among the kernels"),
        (
            lambda c: changed(c, 1, block=(128, 1, 1)),
            r"step affine: kernel affine_kernel cannot have blocks of",
        ),
        (lambda c: changed(c, 1, block=(0, 1, 1)), r"kernel affine_kernel cannot have blocks of \(0, 1, 1\)"),
        (lambda c: changed(c, 1, args=(0, 3, 99)), "kernel affine_kernel takes tensors that the plan does not have"),
        (lambda c: changed(c, 1, args=(3, 3, 0)), r"step affine: no kernel takes its output \[4\]"),
        (lambda c: dataclasses.replace(c, sm="90"), "'90' is no architecture of a GPU"),
        (lambda c: dataclasses.replace(c, ptx=b""), "the PTX does not say which CUDA made it"),
    ],
)
def test_refuses_code_that_contradicts_the_plan(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        build(tmp_path / "a.so", code=change(make_code()))
    assert not list(tmp_path.iterdir())


def test_a_gpu_takes_no_object_files(tmp_path):
    with pytest.raises(ValueError, match="version cuda-sm_90 has object files, and its steps run on a GPU"):
        link([Version(make_plan(), Host(), (b"",), make_code())], tmp_path / "a.so")
