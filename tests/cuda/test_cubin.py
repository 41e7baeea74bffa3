"""Resources read from a cubin are those that ptxas reports, for both forms of cubins; what is none is refused."""

import ctypes
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from bnncc.targets.cuda import toolchain
from bnncc.targets.cuda.cubin import least_driver, resources
from bnncc.targets.cuda.descriptor import ARCHITECTURES
from bnncc.targets.elf import Elf

SOURCE = r"""
extern "C" __global__ void plain(float* a) { a[threadIdx.x] = 1; }
extern "C" __global__ void __launch_bounds__(128) shared(float* a) {
  __shared__ float s[300];
  s[threadIdx.x] = a[threadIdx.x];
  __syncthreads();
  a[threadIdx.x] = s[127 - threadIdx.x];
}
extern "C" __global__ void dynamic(float* a) {
  extern __shared__ float d[];
  d[threadIdx.x] = a[threadIdx.x];
  __syncthreads();
  a[threadIdx.x] = d[31 - threadIdx.x];
}
extern "C" __global__ void __launch_bounds__(1024, 2) spilled(float* a) {
  float r[96];
#pragma unroll
  for (int i = 0; i < 96; i++) r[i] = a[i * 1024 + threadIdx.x];
  __syncthreads();
  for (int j = 0; j < 10; j++) {
#pragma unroll
    for (int i = 0; i < 96; i++) r[i] = r[i] * r[(i + 7) % 96] + a[i * 33 + j];
  }
#pragma unroll
  for (int i = 0; i < 96; i++) a[i * 1024 + threadIdx.x] = r[i];
}
extern "C" __global__ void stack(float* a, int n) {
  float r[64];
  for (int i = 0; i < 64; i++) r[i] = a[i];
  for (int i = 0; i < n; i++) r[(int)a[i + n] & 63] += 1;
  a[n] = r[n & 63];
}
extern "C" __global__ void __launch_bounds__(96) wide(float* a) {
  float r[200];
#pragma unroll
  for (int i = 0; i < 200; i++) r[i] = a[i * 96 + threadIdx.x];
#pragma unroll 1
  for (int j = 0; j < 9; j++) {
#pragma unroll
    for (int i = 0; i < 200; i++) r[i] = r[i] * r[(i + 1) % 200] + a[j];
  }
#pragma unroll
  for (int i = 0; i < 200; i++) a[i * 96 + threadIdx.x] = r[i];
}
"""
BOUNDS = {"shared": 128, "spilled": 1024, "wide": 96}


def reported(log):
    """(registers, static shared memory, stack frame with spills) by kernel, from the text of `ptxas -v`."""
    found = {}
    for part in log.split("Compiling entry function")[1:]:
        name = re.search(r"'(\w+)'", part)[1]
        shared = re.search(r"(\d+) bytes smem", part)
        frame, registers = re.search(r"(\d+) bytes stack frame", part), re.search(r"Used (\d+) registers", part)
        found[name] = (int(registers[1]), int(shared[1]) if shared else 0, int(frame[1]))
    return found


def by_nvrtc(source, sm):
    """(cubin, ptxas's text), both of NVRTC."""
    libraries = toolchain.nvrtc_libraries()
    if not libraries:
        pytest.skip("NVRTC is not installed: pip install 'bnncc[cuda]'")
    nvrtc, program = toolchain.Nvrtc(libraries[0]), ctypes.c_void_p()
    nvrtc._call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"k.cu", 0, None, None)
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={sm}".encode(), b"--ptxas-options=-v")
    nvrtc._call("nvrtcCompileProgram", program, 2, options)
    return nvrtc._read("CUBIN", program), nvrtc._read("ProgramLog", program).decode()


def by_ptxas(source, sm, folder):
    """The same of the toolkit's ptxas."""
    nvcc = toolchain.nvcc_program()
    ptxas = shutil.which("ptxas", path=nvcc.resolve().parent) if nvcc else None
    if not ptxas:
        pytest.skip("there is no CUDA toolkit")
    (folder / "k.ptx").write_bytes(toolchain.Nvcc(nvcc).compile(source, sm)[1])
    command = [ptxas, "-v", "-arch", sm, "k.ptx", "-o", "k.cubin"]
    log = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stderr
    return (folder / "k.cubin").read_bytes(), log


@pytest.mark.parametrize("sm", ARCHITECTURES)
@pytest.mark.parametrize("by", ["nvrtc", "ptxas"])
def test_as_ptxas_reports(by, sm, tmp_path):
    cubin, log = by_nvrtc(SOURCE, sm) if by == "nvrtc" else by_ptxas(SOURCE, sm, tmp_path)
    found = resources(cubin)
    assert {name: (r.registers, r.shared_bytes, r.local_bytes) for name, r in found.items()} == reported(log)
    assert found["shared"].shared_bytes == 1200 and found["dynamic"].shared_bytes == 0
    assert found["stack"].local_bytes >= 256 and found["spilled"].local_bytes > 0 and found["wide"].local_bytes == 0
    assert {name: found[name].most_threads for name in BOUNDS} == BOUNDS
    assert found["wide"].registers >= 200


@pytest.mark.parametrize("sm", ["sm_80", "sm_90", "sm_120"])
def test_a_module_without_shared_memory(sm):
    """Architectures that reserve some count it where a kernel has none, too."""
    cubin, log = by_nvrtc('extern "C" __global__ void one(float* a) { a[threadIdx.x] = 1; }', sm)
    assert {name: (r.registers, r.shared_bytes, r.local_bytes) for name, r in resources(cubin).items()} == reported(log)


def test_the_driver_that_is_needed():
    """Of the compiler's major version; the ELF of CUDA 13 for sm_90 has another ABI version than that of CUDA 12."""
    if nvcc := toolchain.nvcc_program():
        compiler = toolchain.Nvcc(nvcc)
        _, ptx = compiler.compile(SOURCE, "sm_90")
        assert least_driver(ptx) == 1000 * int(compiler.identity.split()[1].split(".")[0])
    cubin, ptx = toolchain.compile_cuda(SOURCE, "sm_90")
    assert least_driver(ptx) == (12000 if cubin[7:9] == b"\x33\x07" else 13000)
    with pytest.raises(ValueError, match="does not say which CUDA"):
        least_driver(b".version 8.8\n.target sm_90\n")


def test_registers_bound_the_block():
    """Without bounds, as many threads as registers allow: eight warps of 169 to 255 each."""
    body = SOURCE[SOURCE.index("  float r[200]") :].replace(" * 96", " * 256")
    cubin, _ = by_nvrtc(f'extern "C" __global__ void unbound(float* a) {{\n{body}', "sm_80")
    assert 169 <= resources(cubin)["unbound"].registers <= 255 and resources(cubin)["unbound"].most_threads == 256


@pytest.fixture(scope="module")
def cubin():
    return by_nvrtc(SOURCE, "sm_90")[0]


def test_what_is_no_cubin_is_refused(cubin):
    program = Path(sys.executable).read_bytes()
    with pytest.raises(
        ValueError, match=f"not a cubin that can be read: for {Elf(program).architecture}, not for a GPU"
    ):
        resources(program)
    with pytest.raises(ValueError, match="not a cubin that can be read: not a little-endian ELF file"):
        resources(b"PK\3\4" + cubin[4:])
    with pytest.raises(ValueError, match="not a cubin that can be read"):
        resources(b"")


@pytest.mark.parametrize("part", [0.001, 0.01, 0.1, 0.5, 0.9])
def test_a_cubin_cut_off_is_refused(cubin, part):
    with pytest.raises(ValueError, match="not a cubin that can be read: "):
        resources(cubin[: int(part * len(cubin))])


def test_damaged_attributes_are_refused(cubin):
    offset = Elf(cubin).section(".nv.info.shared").offset
    for damage, reason in (
        (struct.pack("<B", 77), "an attribute of an unknown format, 77"),
        (b"\4\5\xff\xff", "cut off"),
    ):
        broken = cubin[:offset] + damage + cubin[offset + len(damage) :]
        with pytest.raises(ValueError, match=f"not a cubin that can be read: .nv.info.shared .*{reason}"):
            resources(broken)
