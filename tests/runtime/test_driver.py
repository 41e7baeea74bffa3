"""The C side by itself: the thread pool under stress, and the binary interface that it shares with compiled kernels."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bnncc.runtime import cpu

SOURCES = Path(__file__).parents[2] / "runtime" / "c"
FLAGS = ("-target", "x86_64-linux-gnu.2.28", "-std=gnu11", "-O2", "-g0", "-fno-sanitize=undefined", "-Wall", "-Wextra")


def compile_and_run(tmp_path, *arguments):
    command = [sys.executable, "-m", "ziglang", "cc", *FLAGS, *map(str, arguments), "-lm", "-lpthread", "-o", "program"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and not result.stderr, result.stderr
    return subprocess.run(["./program"], cwd=tmp_path, capture_output=True, text=True, timeout=120)


def test_thread_pool(tmp_path):
    driver = [SOURCES / name for name in ("driver.c", "host.c", "pool.c", "cpu.c")]
    result = compile_and_run(tmp_path, f"-I{SOURCES}", Path(__file__).with_name("pool_test.c"), *driver)
    assert result.returncode == 0, result.stdout


LACKING = """
#include <stdio.h>
#include "cpu.h"
int main(void) {
  static const char *const words[] = {WORDS};
  char missing[64];
  for (size_t i = 0; i < sizeof words / sizeof *words; i++)
    if (cpu_lacks(words[i], missing, sizeof missing)) puts(missing);
}
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="asks an x86-64 processor")
def test_the_driver_finds_the_features_that_the_kernel_lists(tmp_path):
    """Every feature that a target may need, and one that no processor has."""
    descriptor = pytest.importorskip("bnncc.targets.descriptor")
    words = [*descriptor._CPUINFO.values(), "avx1024"]
    listed = cpu.host_features()
    assert listed
    program = "#define WORDS " + ", ".join(f'"{word}"' for word in words) + LACKING
    (tmp_path / "lacking.c").write_text(program)
    result = compile_and_run(tmp_path, f"-I{SOURCES}", "lacking.c", SOURCES / "cpu.c")
    assert result.stdout.split() == [word for word in words if word not in listed]
    known = re.findall(r'{"(\w+)", LEAF_', (SOURCES / "cpu.c").read_text())
    assert set(words) - set(known) == {"avx1024"}


LAYOUT = """
#include <stddef.h>
#include <stdio.h>
#define SHOW(type, field) printf("%s %zu %zu\\n", #field, offsetof(type, field), sizeof(((type *)0)->field))
int main(void) {
  SHOW(ANY, type_index); SHOW(ANY, zero_padding); SHOW(ANY, v_int64); SHOW(ANY, v_ptr);
  SHOW(DLTensor, data); SHOW(DLTensor, device); SHOW(DLTensor, ndim); SHOW(DLTensor, dtype); SHOW(DLTensor, shape);
  SHOW(DLTensor, strides); SHOW(DLTensor, byte_offset);
  SHOW(DLDevice, device_type); SHOW(DLDevice, device_id);
  SHOW(DLDataType, code); SHOW(DLDataType, bits); SHOW(DLDataType, lanes);
  printf("%zu %zu %d %d %d %d %d %d %d\\n", sizeof(ANY), sizeof(DLTensor), CPU, INT, UINT, FLOAT, BOOL, NONE, TENSOR);
}
"""


def test_structures_are_those_of_the_installed_tvm_ffi(tmp_path):
    headers = pytest.importorskip("tvm_ffi").__path__[0] + "/include"
    ours = (
        '#include "tvm_abi.h"\n#define ANY FFIAny\n'
        "enum { CPU = DL_CPU, INT = DL_INT, UINT = DL_UINT, FLOAT = DL_FLOAT, BOOL = DL_BOOL, NONE = FFI_NONE,\n"
        "       TENSOR = FFI_DLTENSOR_PTR };\n"
    )
    theirs = (
        "#include <tvm/ffi/c_api.h>\n#define ANY TVMFFIAny\n"
        "enum { CPU = kDLCPU, INT = kDLInt, UINT = kDLUInt, FLOAT = kDLFloat, BOOL = kDLBool, NONE = kTVMFFINone,\n"
        "       TENSOR = kTVMFFIDLTensorPtr };\n"
    )
    shown = []
    for name, text, include in (("ours.c", ours, SOURCES), ("theirs.c", theirs, headers)):
        (tmp_path / name).write_text(text + LAYOUT)
        shown.append(compile_and_run(tmp_path, f"-I{include}", name).stdout)
    assert shown[0] == shown[1] and len(shown[0].splitlines()) == 17


def test_hooks_are_those_of_the_installed_tvm():
    tvm = pytest.importorskip("tvm")
    header = (Path(tvm.__path__[0]) / "include/tvm/runtime/c_backend_api.h").read_text()
    code = re.sub(r"/\*.*?\*/|\s+", " ", header, flags=re.S)
    code = re.sub(r"\s+", " ", code)
    for declaration in (
        "typedef struct { void* sync_handle; int32_t num_task; } TVMParallelGroupEnv;",
        "typedef int (*FTVMParallelLambda)(int task_id, TVMParallelGroupEnv* penv, void* cdata);",
        "int TVMBackendParallelLaunch(FTVMParallelLambda flambda, void* cdata, int num_task);",
        "void* TVMBackendAllocWorkspace(int device_type, int device_id, uint64_t nbytes, int dtype_code_hint, "
        "int dtype_bits_hint);",
        "int TVMBackendFreeWorkspace(int device_type, int device_id, void* ptr);",
    ):
        assert declaration in code
