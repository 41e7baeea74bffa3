"""runtime/c/cuda_abi.h against an installed cuda.h: numbers, the layout of the one structure, and every signature."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from driver_proxy import functions

SOURCES = Path(__file__).parents[2] / "runtime" / "c"


def cuda_header():
    """cuda.h of a toolkit, or of the pip package nvidia-cuda-runtime; None where there is none."""
    folders = [Path(os.environ[name]) for name in ("CUDA_PATH", "CUDA_HOME") if name in os.environ]
    folders.append(Path("/usr/local/cuda"))
    if (nvidia := find_spec("nvidia")) and nvidia.submodule_search_locations:
        folders += [folder for root in nvidia.submodule_search_locations for folder in Path(root).glob("c*")]
    return next((path for folder in folders if (path := folder / "include" / "cuda.h").is_file()), None)


@pytest.fixture(scope="module")
def header():
    path = cuda_header()
    if path is None:
        pytest.skip("no cuda.h is installed (pip install nvidia-cuda-runtime)")
    return path


def compiled(folder, *arguments):
    command = [sys.executable, "-m", "ziglang", "cc", "-std=gnu11", "-Wall", "-Werror", *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def enumerators():
    text = (SOURCES / "cuda_abi.h").read_text()
    return sorted(set(re.findall(r"\b(CU\w+) = \d+", text)))


NUMBERS = """
#include <stdio.h>
int main(void) {
  printf("%zu %zu %zu\\n", sizeof(CUdeviceptr), sizeof(CUresult), sizeof(CUdevice));
  printf("%zu\\n", sizeof(CUDA_KERNEL_NODE_PARAMS_v1));
"""


FIELDS = (
    "func", "gridDimX", "gridDimY", "gridDimZ", "blockDimX", "blockDimY", "blockDimZ", "sharedMemBytes", "kernelParams",
    "extra",
)  # fmt: skip


def test_numbers_and_layout(header, tmp_path):
    program = NUMBERS + "".join(f'  printf("{name} %d\\n", (int){name});\n' for name in enumerators())
    for field in FIELDS:
        place = f"__builtin_offsetof(CUDA_KERNEL_NODE_PARAMS_v1, {field})"
        program += f'  printf("{field} %zu %zu\\n", {place}, sizeof(((CUDA_KERNEL_NODE_PARAMS_v1 *)0)->{field}));\n'
    program += "}\n"
    shown = []
    for name, folder in (("cuda_abi.h", SOURCES), ("cuda.h", header.parent)):
        (tmp_path / "main.c").write_text(f'#include "{name}"\n{program}')
        compiled(tmp_path, f"-I{folder}", "main.c", "-o", "main")
        shown.append(subprocess.run(["./main"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout)
    assert shown[0] == shown[1] and len(shown[0].splitlines()) > 25


def kinds(parameters):
    """What the calling convention makes of them: pointers by what they point to, enumerations as int."""
    for parameter in parameters.split(","):
        words = re.findall(r"\w+|\*", parameter.replace("const", ""))
        base = " ".join(word for word in words[:-1] if word != "*")  # the last one is the parameter's name
        if base in ENUMERATIONS:
            base = "int"
        if base in ("unsigned", "cuuint32_t"):
            base = "unsigned int"
        if base == "CUDA_KERNEL_NODE_PARAMS":
            base += "_v1"
        yield base + "*" * words.count("*")


ENUMERATIONS = {
    "CUresult", "CUdevice", "CUdevice_attribute", "CUjit_option", "CUfunction_attribute", "CUpointer_attribute",
}  # fmt: skip


def test_signatures(header, tmp_path):
    """Of the names with which the functions are looked up; cuda.h has older ones for its own use."""
    (tmp_path / "theirs.c").write_text('#define __CUDA_API_VERSION_INTERNAL\n#include "cuda.h"\n')
    text = re.sub(r"\s+", " ", compiled(tmp_path, "-E", "-P", f"-I{header.parent}", "theirs.c"))
    theirs = dict(re.findall(r"CUresult (cu\w+)\(([^()]*)\);", text))
    ours = functions()
    assert len(ours) == 39
    for name, parameters in ours:
        assert list(kinds(parameters)) == list(kinds(theirs[name])), name
