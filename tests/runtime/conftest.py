"""Tiny artifacts made by hand: plans of two or three kernels, compiled by TVM alone, so that linking and running are
tested without the rest of the compiler."""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROWS, COLUMNS = 6, 1024

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-aarch64") is None, reason="qemu-aarch64 is not installed (Debian: qemu-user)"
)


@dataclass(frozen=True)
class Machine:
    """The part of a target descriptor that linking reads, and what TVM needs."""

    name: str
    arch: str
    cpu: str
    triple: str
    zig: str
    zig_static: str
    features: tuple[str, ...]


X86 = Machine(
    "x86-64-v2", "x86_64", "x86-64-v2", "x86_64-linux-gnu", "x86_64-linux-gnu.2.28", "x86_64-linux-musl", ("sse4_2",)
)
ARM = Machine(
    "aarch64", "aarch64", "generic", "aarch64-linux-gnu", "aarch64-linux-gnu.2.28", "aarch64-linux-musl", ("asimd",)
)
ARM32 = Machine(
    "armv7", "arm", "cortex-a7", "armv7-linux-gnueabihf", "arm-linux-gnueabihf.2.28", "arm-linux-musleabihf",
    ("neon", "vfpv4"),
)  # fmt: skip


@functools.cache
def kernels(machine: Machine, suffix: str = "") -> bytes:
    """Object code of: double (init), affine (a parallel loop), reverse (a workspace, and expf of libm), count. suffix:
    ends their names."""
    import tvm
    from tvm import IRModule, s_tir, te

    def prim(name: str, *tensors: Any) -> Any:
        return te.create_prim_func(list(tensors)).with_attr("global_symbol", name + suffix)

    x, w = te.placeholder((ROWS, COLUMNS), "float32", "x"), te.placeholder((COLUMNS,), "float32", "w")
    double = te.compute((COLUMNS,), lambda j: w[j] + w[j], "double")
    affine = te.compute((ROWS, COLUMNS), lambda i, j: x[i, j] * w[j] + 1.0, "affine")
    exp = te.compute((ROWS, COLUMNS), lambda i, j: te.exp(x[i, j]), "exp")
    reverse = te.compute((ROWS, COLUMNS), lambda i, j: exp[i, COLUMNS - 1 - j] + 1.0, "reverse")
    n = te.placeholder((3,), "int64", "n")
    count = te.compute((3,), lambda i: n[i] + 1, "count")
    schedule = s_tir.Schedule(IRModule({"affine": prim("affine", x, w, affine)}))
    schedule.parallel(schedule.get_loops(schedule.get_sblock("affine", "affine"))[0])
    functions = {
        "affine": schedule.mod["affine"],
        "double": prim("double", w, double),
        "reverse": prim("reverse", x, reverse),
        "count": prim("count", n, count),
    }
    module = IRModule({name + suffix: function for name, function in functions.items()})
    target = {"kind": "llvm", "mtriple": machine.triple, "mcpu": machine.cpu}
    if machine.arch == "arm":
        target["mfloat-abi"] = "hard"
    return bytes(_object_code(tvm.compile(module, target=tvm.target.Target(target))))


def _object_code(library: Any) -> bytes:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        library.mod.write_to_file(f"{folder}/k.o")
        return Path(f"{folder}/k.o").read_bytes()


def weights(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(COLUMNS).astype(np.float32)


def make_plan(name: str = "tiny", seed: int = 0, suffix: str = "") -> Any:
    """Inputs x float32 [6, 1024] and n int64 [3]; outputs exp(x * 2w + 1) reversed + 1, and n + 1. suffix: of the names
    of its kernels."""
    from bnncc.dialect.plan import Layer, Plan, Step, Tensor, Value

    shape = (ROWS, COLUMNS)
    size = ROWS * COLUMNS * 4
    tensors = (
        Tensor(0, "x", shape, "float32", "input", 0),
        Tensor(1, "n", (3,), "int64", "input", 1),
        Tensor(2, "w", (COLUMNS,), "float32", "weights", 64),
        Tensor(3, "w2", (COLUMNS,), "float32", "persistent", 0),
        Tensor(4, "h", shape, "float32", "arena", 0, Value("mul", (0, 1))),
        Tensor(5, "y", shape, "float32", "output", 0),
        Tensor(6, "m", (3,), "int64", "output", 1),
    )
    steps = (
        Step("affine" + suffix, "affine", (0, 3, 4), 1, ("body.0",), True),
        Step("reverse" + suffix, "reverse", (4, 5), 1, ("body.1",), False),
        Step("count" + suffix, "count", (1, 6), 1, ("body.2",), True),
    )
    layer = Layer("body.0", "affine", shape, 32, 32, ROWS * COLUMNS, COLUMNS * 4)
    blob = bytes(64) + weights(seed).tobytes()
    init = (Step("double" + suffix, "double", (2, 3), 1, (), True),)
    return Plan(name, tensors, init, steps, (0, 1), (5, 6), size, COLUMNS * 4, blob, (layer,))


def version(plan: Any, machine: Machine = X86, objects: tuple[bytes, ...] | None = None) -> Any:
    """The plan compiled for a machine; objects: instead of the kernels above."""
    from bnncc.targets.link import Version

    return Version(plan, machine, (kernels(machine),) if objects is None else objects)


def build(path: Path, machine: Machine = X86, *, name: str = "tiny", seed: int = 0, **options: Any) -> Path:
    from bnncc.targets.link import link

    link([version(make_plan(name, seed), machine)], path, **options)
    return path


def inputs(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    return (
        generator.standard_normal((ROWS, COLUMNS)).astype(np.float32),
        generator.integers(-(2**60), 2**60, 3, np.int64),
    )


def expected(x: np.ndarray, n: np.ndarray, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    affine = x * (2 * weights(seed)) + np.float32(1)
    return np.exp(affine)[:, ::-1] + np.float32(1), n + 1


class Tiny:
    """What the tests use of the functions above."""

    X86, ARM, ARM32 = X86, ARM, ARM32
    ROWS, COLUMNS = ROWS, COLUMNS
    kernels = staticmethod(kernels)
    plan = staticmethod(make_plan)
    version = staticmethod(version)
    build = staticmethod(build)
    weights = staticmethod(weights)
    inputs = staticmethod(inputs)
    expected = staticmethod(expected)

    @staticmethod
    def check(outputs: Any, x: np.ndarray, n: np.ndarray, seed: int = 0) -> None:
        y, m = outputs
        wanted_y, wanted_m = expected(x, n, seed)
        # One rounding of the exponent, which reaches 16, is 2^-20 of the result; targets differ in using fma.
        np.testing.assert_allclose(y, wanted_y, rtol=1e-5)
        np.testing.assert_array_equal(m, wanted_m)


@pytest.fixture(scope="session")
def tiny() -> type[Tiny]:
    return Tiny


@pytest.fixture(scope="session")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for this machine, shared: not to be changed."""
    return build(tmp_path_factory.mktemp("artifact") / "tiny.so")


@pytest.fixture(scope="session")
def arm_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact for AArch64 with its runner beside it, shared: not to be changed."""
    folder = tmp_path_factory.mktemp("arm")
    return build(folder / "tiny.so", ARM, runner=folder / "tiny-run")


@pytest.fixture(scope="session")
def arm32_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for 32-bit ARM."""
    folder = tmp_path_factory.mktemp("arm32")
    return build(folder / "tiny.so", ARM32, runner=folder / "tiny-run")
