"""What linking writes: self-contained libraries, headers, runners; and what it refuses."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bnncc import runtime
from bnncc.runtime.errors import ArtifactError, LinkError
from bnncc.targets import link as link_module
from bnncc.targets.elf import Elf
from bnncc.targets.link import link
from bnncc.targets.modelc import API, symbol_prefix

SOURCES = Path(__file__).parents[2] / "runtime" / "c"


def zig(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "ziglang", *map(str, arguments)], capture_output=True, text=True, **options
    )


def test_needs_the_c_library_alone(artifact):
    output = subprocess.run(["ldd", artifact], capture_output=True, text=True, check=True).stdout
    names = {line.split()[0].rpartition("/")[2] for line in output.splitlines()}
    assert names <= {"linux-vdso.so.1", "ld-linux-x86-64.so.2", "libc.so.6", "libm.so.6", "libpthread.so.0"}


@pytest.mark.parametrize("which", ["artifact", "arm_artifact", "arm32_artifact"])
def test_exports_the_api_alone(which, request):
    elf = Elf(request.getfixturevalue(which).read_bytes())
    assert {symbol.name for symbol in elf.exported} == {f"tiny_{function}" for function in API}


def test_starts_on_an_old_c_library(artifact):
    """glibc 2.28, of Debian 10 and Raspberry Pi OS "Buster", is the oldest that is supported."""
    versions = re.findall(rb"GLIBC_2\.(\d+)", artifact.read_bytes())
    assert versions and max(map(int, versions)) <= 28


def test_is_reproducible_and_small(tiny, artifact, tmp_path):
    again = tiny.build(tmp_path / "tiny.so")
    assert again.read_bytes() == artifact.read_bytes()
    assert artifact.stat().st_size < 64 * 1024
    assert str(tmp_path).encode() not in again.read_bytes()


@pytest.mark.parametrize("name", ["batch=1, 224².so", "-so ünd so.so"])
def test_takes_any_file_name(tiny, tmp_path, name):
    path = tiny.build(tmp_path / name)
    assert runtime.load(path).outputs


def test_the_manifest_holds_the_plan(tiny, artifact):
    plan, manifest = tiny.plan(), runtime.read_manifest(artifact)
    assert manifest["format"] == 3 and manifest["name"] == manifest["prefix"] == "tiny"
    assert manifest["target"] == "x86-64-v2" and manifest["arch"] == "x86_64"
    assert manifest["inputs"][1] == {"name": "n", "shape": [3], "dtype": "int64", "order": None}
    (version,) = manifest["versions"]
    assert (version["name"], version["cpu"], version["features"]) == ("x86-64-v2", "x86-64-v2", ["sse4_2"])
    assert version["inputs"] == [0, 1] and version["outputs"] == [5, 6]
    assert version["tensors"][4] == {
        "id": 4,
        "name": "h",
        "shape": [6, 1024],
        "dtype": "float32",
        "space": "arena",
        "offset": 0,
        "value": {"node": "mul", "order": [0, 1], "bits": None, "step": None},
    }
    assert version["steps"][0] == {
        "kernel": "affine", "op": "affine", "args": [0, 3, 4], "outputs": 1, "layers": ["body.0"], "exact": True,
        "opt_in": None,
    }  # fmt: skip
    assert version["layers"][0]["path"] == "body.0" and version["layers"][0]["macs"] == 6144
    assert version["arena_bytes"] == plan.arena_bytes and manifest["weights_bytes"] == plan.tensors[2].shape[0] * 4


def test_the_manifest_takes_more_entries(tiny, tmp_path):
    tiny.build(tmp_path / "a.so", manifest={"options": {"fast_math": False}})
    assert runtime.read_manifest(tmp_path / "a.so")["options"] == {"fast_math": False}
    with pytest.raises(ValueError, match=r"the manifest has its own versions"):
        tiny.build(tmp_path / "b.so", manifest={"versions": []})
    assert not (tmp_path / "b.so").exists()


C_PROGRAM = """
#include <math.h>
#include <stdio.h>
#include <string.h>
#include "my_net.h"
static float x[6 * 1024], y[6 * 1024 + 1];
int main(void) {
  int64_t n[3] = {1, 2, 3}, m[3];
  const void *inputs[] = {x, n};
  void *outputs[] = {y + 1, m};
  my_net_instance *net = my_net_create();
  if (!net) return puts(my_net_error()), 1;
  if (my_net_input_count() != 2 || my_net_output_count() != 2 || my_net_input(2) || my_net_output(-1)) return 2;
  const my_net_tensor *second = my_net_input(1);
  if (strcmp(second->name, "n") || strcmp(second->dtype, "int64") || second->ndim != 1 || second->shape[0] != 3 ||
      second->bytes != 24)
    return 3;
  if (!strstr(my_net_manifest(), "\\"my net\\"")) return 4;
  if (my_net_set_threads(net, 2) || my_net_run(net, inputs, outputs)) return puts(my_net_error()), 5;
  for (int i = 0; i < 6 * 1024; i++)
    if (fabsf(y[i + 1] - expf(1) - 1) > 1e-5f) return 6;
  if (m[0] != 2 || m[2] != 4) return 7;
  if (my_net_set_threads(net, -1) != -1 || !strstr(my_net_error(), "-1 threads")) return 8;
  inputs[1] = NULL;
  if (my_net_run(net, inputs, outputs) != -1 || strcmp(my_net_error(), "my net: input 1 is NULL")) return 9;
  my_net_destroy(net);
  my_net_destroy(NULL);
  return 0;
}
"""


ARM_LIBRARIES = Path("/usr/aarch64-linux-gnu")
needs_arm_libraries = pytest.mark.skipif(
    shutil.which("qemu-aarch64") is None or not (ARM_LIBRARIES / "lib").is_dir(),
    reason="qemu-aarch64 and glibc for AArch64 are not installed (Debian: qemu-user, libc6-arm64-cross)",
)


@pytest.mark.parametrize(
    ("machine", "command"),
    [
        ("X86", ["./main"]),
        pytest.param(
            "ARM",
            ["qemu-aarch64", "-L", str(ARM_LIBRARIES), "./main"],
            marks=[pytest.mark.qemu, needs_arm_libraries],
        ),
    ],
)
def test_a_c_program_uses_it(tiny, tmp_path, machine, command):
    machine = getattr(tiny, machine)
    tiny.build(tmp_path / "net.so", machine, name="my net", header=tmp_path / "my_net.h")
    (tmp_path / "main.c").write_text(C_PROGRAM)
    flags = ["-O2", "-g0", "-fno-sanitize=undefined", "-Wall", "-Wextra", "-Werror", "-Wl,-rpath,.", "-lm"]
    result = zig("cc", "-target", machine.zig, "main.c", "net.so", *flags, "-o", "main", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert subprocess.run(command, cwd=tmp_path, timeout=60).returncode == 0


def test_the_interface_of_a_gpu_works_on_the_cpu(tiny, tmp_path):
    tiny.build(tmp_path / "net.so", header=tmp_path / "tiny.h")
    program = Path(__file__).with_name("api_program.c")
    flags = ["-std=c99", "-pedantic", "-O2", "-fno-sanitize=undefined", "-Wall", "-Wextra", "-Werror", "-Wl,-rpath,."]
    sources = [program, "net.so", "-DALL=6144", "-I."]
    result = zig("cc", "-target", tiny.X86.zig, *sources, *flags, "-lm", "-o", "main", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    ran = subprocess.run(["./main"], cwd=tmp_path, timeout=60, capture_output=True, text=True)
    assert ran.returncode == 0 and ran.stdout == "x86-64-v2 on the CPU\n", ran.stdout


def test_a_cpp_program_can_include_the_header(tiny, tmp_path):
    tiny.build(tmp_path / "net.so", header=tmp_path / "tiny.h")
    (tmp_path / "main.cpp").write_text('#include "tiny.h"\nint main() { return tiny_create() == nullptr; }\n')
    result = zig("c++", "-target", tiny.X86.zig, "-Wall", "-Wextra", "-Werror", "-c", "main.cpp", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("system", ["x86_64-linux-gnu.2.28", "aarch64-linux-gnu.2.28", "arm-linux-gnueabihf.2.28"])
def test_the_driver_compiles_without_warnings(system, tmp_path):
    flags = ["-std=gnu11", "-Wall", "-Wextra", "-Wshadow", "-Werror", "-c"]
    result = zig("cc", "-target", system, *flags, *SOURCES.glob("*.c"), cwd=tmp_path)
    assert result.returncode == 0 and not result.stderr, result.stderr


@pytest.mark.parametrize(
    ("name", "prefix"), [("model", "model"), ("ResNet-18 (b1)", "ResNet_18__b1_"), ("3d", "_3d"), ("é", "_")]
)
def test_symbol_prefix(name, prefix):
    assert symbol_prefix(name) == prefix


@pytest.mark.parametrize("name", ["", "pthread", "timer"])
def test_refuses_names_that_would_clash(tiny, tmp_path, name):
    with pytest.raises(LinkError, match=rf"model name '{name}' cannot be used"):
        tiny.build(tmp_path / "a.so", name=name)
    assert not list(tmp_path.iterdir())


def test_odd_names_survive(tiny, tmp_path):
    name = 'q"uo\\te ??/ */ é 7\n'
    path = tiny.build(tmp_path / "a.so", name=name, header=tmp_path / "a.h")
    assert runtime.read_manifest(path)["name"] == name
    runtime.load(path).close()


def test_nothing_is_left_half_written(tiny, tmp_path, monkeypatch):
    old = tmp_path / "a.so"
    old.write_bytes(b"old")
    monkeypatch.setattr(link_module, "_driver_sources", lambda names: ["missing.c"])
    with pytest.raises(LinkError, match=r"zig cc failed for x86_64-linux-gnu.2.28: .*missing.c") as caught:
        tiny.build(old, header=tmp_path / "a.h", runner=tmp_path / "a-run")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.so"] and old.read_bytes() == b"old"


def test_a_place_that_cannot_be_written(tiny, tmp_path):
    with pytest.raises(ArtifactError, match=r"none/a\.so: cannot be written: No such file or directory"):
        tiny.build(tmp_path / "none" / "a.so")


def test_ziglang_missing(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(link_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LinkError, match=r"linking needs the package ziglang, .*pip install 'bnncc\[compile\]'"):
        tiny.build(tmp_path / "a.so")


def test_the_cache_moves_where_home_is_closed(monkeypatch, tmp_path):
    monkeypatch.delenv("ZIG_GLOBAL_CACHE_DIR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert link_module._environment(tmp_path)["ZIG_GLOBAL_CACHE_DIR"] == str(tmp_path / ".cache" / "zig")
    monkeypatch.setattr(link_module.os, "access", lambda *_: False)
    assert link_module._environment(tmp_path)["ZIG_GLOBAL_CACHE_DIR"].endswith(f"bnncc-zig-{os.getuid()}")
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", "/chosen")
    assert link_module._environment(tmp_path)["ZIG_GLOBAL_CACHE_DIR"] == "/chosen"


def test_what_is_made_of_a_large_model_is_not_kept(tiny, artifact, tmp_path, monkeypatch):
    """In Zig's cache, which nobody empties; the artifact is the same."""
    cache = tmp_path / "cache"
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(cache))

    def kept(name: str) -> int:
        assert tiny.build(tmp_path / name / "tiny.so").read_bytes() == artifact.read_bytes()
        return sum(path.name == "model.o" for path in cache.rglob("*"))

    for name in ("large", "small"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(link_module, "_MOST_KEPT", 0)
    assert kept("large") == 0
    monkeypatch.undo()
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(cache))
    assert kept("small") == 1


def broken(plan, **changes):
    return dataclasses.replace(plan, **changes)


def moved(plan, position, **changes):
    tensors = list(plan.tensors)
    tensors[position] = dataclasses.replace(tensors[position], **changes)
    return dataclasses.replace(plan, tensors=tuple(tensors))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: broken(p, arena_bytes=64), r"tensor 4 \(h\) does not lie in its space arena"),
        (lambda p: moved(p, 2, offset=32), r"tensor 2 \(w\) does not lie in its space weights"),
        (lambda p: moved(p, 2, id=9), r"tensor 9 \(w\) stands at position 2"),
        (lambda p: broken(p, outputs=(5, 5)), r"an output is listed twice"),
        (lambda p: broken(p, inputs=(0, 4)), r"tensor 4 \(h\) is an input in space arena"),
        (lambda p: broken(p, steps=p.steps[:2]), r"no step writes output \[6\]"),
        (lambda p: broken(p, steps=(dataclasses.replace(p.steps[0], args=(0, 99, 4)),)), r"not tensors of the plan"),
        (
            lambda p: broken(p, steps=(dataclasses.replace(p.steps[0], args=(4, 3, 0)), *p.steps[1:])),
            r"writes tensor 0 in space input",
        ),
        (
            lambda p: broken(p, steps=(dataclasses.replace(p.steps[0], kernel="no"), *p.steps[1:])),
            r"no object file defines kernel no",
        ),
    ],
)
def test_refuses_plans_that_contradict_themselves(tiny, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        link([tiny.version(change(tiny.plan()))], tmp_path / "a.so")


def test_refuses_objects_of_another_machine_or_with_other_needs(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"an object file is for x86_64, the target is aarch64"):
        link([tiny.version(tiny.plan(), tiny.ARM, (tiny.kernels(tiny.X86),))], tmp_path / "a.so")
    source = tmp_path / "k.c"
    source.write_text("extern int (*__TVMFFIFunctionCall)(void); int f(void) { return __TVMFFIFunctionCall(); }")
    assert zig("cc", "-target", tiny.X86.zig, "-c", source, "-o", tmp_path / "k.o").returncode == 0
    with pytest.raises(ValueError, match=r"a kernel calls __TVMFFIFunctionCall, which only TVM's runtime has"):
        objects = (tiny.kernels(tiny.X86), (tmp_path / "k.o").read_bytes())
        link([tiny.version(tiny.plan(), tiny.X86, objects)], tmp_path / "a.so")
