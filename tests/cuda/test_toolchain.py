"""CUDA C to cubin and PTX: by NVRTC and by nvcc, for every architecture, and what is said where that cannot be."""

import re
import stat

import pytest
from tvm.backend.cuda.codegen import header_generator

from bnncc.runtime.errors import BnnccError
from bnncc.targets.cuda import toolchain
from bnncc.targets.cuda.cubin import resources
from bnncc.targets.cuda.descriptor import ARCHITECTURES
from bnncc.targets.elf import Elf

# What TVM writes before the kernels, and the types and constants that it relies on.
SOURCE = (
    header_generator(["math_constants"])
    + r"""
extern "C" __global__ void __launch_bounds__(64) first(const float* __restrict__ x, int64_t* __restrict__ y);
extern "C" __global__ void __launch_bounds__(64) first(const float* __restrict__ x, int64_t* __restrict__ y) {
  static_assert(sizeof(int8_t) == 1 && sizeof(uint16_t) == 2 && sizeof(uint32_t) == 4 && sizeof(uint64_t) == 8, "");
  static_assert((int8_t)-1 < 0 && (uint8_t)-1 > 0 && (int64_t)-1 < 0 && (uint64_t)-1 > 0, "");
  y[threadIdx.x] = x[threadIdx.x] < CUDART_INF_F ? 1 : 2;
}
extern "C" __global__ void __launch_bounds__(32) second(uint* __restrict__ y) {
  y[threadIdx.x] = (uint)((uchar)y[threadIdx.x]);
}
"""
)
SMS = [*ARCHITECTURES, "sm_90a"]


def nvrtc():
    libraries = toolchain.nvrtc_libraries()
    if not libraries:
        pytest.skip("NVRTC is not installed: pip install 'bnncc[cuda]'")
    return toolchain.Nvrtc(libraries[0])


def nvcc():
    program = toolchain.nvcc_program()
    if not program:
        pytest.skip("there is no nvcc")
    return toolchain.Nvcc(program)


@pytest.fixture(scope="module", params=[nvrtc, nvcc], ids=["nvrtc", "nvcc"])
def compiler(request):
    return request.param()


@pytest.mark.parametrize("sm", SMS)
def test_every_architecture(compiler, sm):
    cubin, ptx = compiler.compile(toolchain.self_contained(SOURCE), sm)
    assert Elf(cubin).architecture == "cuda"
    assert set(resources(cubin)) == {"first", "second"}
    assert re.search(rb"\.target (?:sm|compute)_(\w+)", ptx)[1].decode() == sm.removeprefix("sm_")
    assert set(re.findall(rb"\.entry (\w+)\(", ptx)) == {b"first", b"second"}
    assert not ptx.endswith(b"\0")


def test_the_same_source_gives_the_same_code(compiler):
    source = toolchain.self_contained(SOURCE)
    assert compiler.compile(source, "sm_80") == compiler.compile(source, "sm_80")


def test_the_default_is_nvrtc():
    nvrtc()
    assert toolchain.compiler("sm_90").identity.startswith("NVRTC ")
    cubin, ptx = toolchain.compile_cuda(SOURCE, "sm_90")
    assert set(resources(cubin)) == {"first", "second"} and b".entry first(" in ptx


def test_no_headers_are_needed():
    assert "#include" in SOURCE
    assert "#include" not in toolchain.self_contained(SOURCE)


def test_dynamic_shared_memory_of_several_types(compiler):
    """As TVM declares it in every kernel: all by one name, of whatever type."""
    kernel = """
extern "C" __global__ void __launch_bounds__(32) of_{1}({0}* x) {{
  extern __shared__ __align__({1}) {0} shared_ptr[];
  shared_ptr[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  x[threadIdx.x] = shared_ptr[31 - threadIdx.x];
}}
"""
    source = "".join(kernel.format(*kind) for kind in (("float", 64), ("int", 128), ("signed char", 16), ("int", 32)))
    found = resources(compiler.compile(toolchain.self_contained(source), "sm_80")[0])
    assert {name: kernel.shared_bytes for name, kernel in found.items()} == dict.fromkeys(
        ("of_64", "of_128", "of_16", "of_32"), 0
    )
    with pytest.raises(RuntimeError, match="shared_ptr"):
        compiler.compile(source, "sm_80")


def test_roundings(compiler):
    """Division and square root round correctly, denormals stay; only what is left open is contracted."""
    source = r"""
extern "C" __global__ void divide(float* x) { x[0] = x[1] / x[2]; }
extern "C" __global__ void root(float* x) { x[0] = sqrtf(x[1]); }
extern "C" __global__ void open(float* x) { x[0] = x[1] * x[2] + x[3]; }
extern "C" __global__ void twice(float* x) { x[0] = __fadd_rn(__fmul_rn(x[1], x[2]), x[3]); }
extern "C" __global__ void once(float* x) { x[0] = __fmaf_rn(x[1], x[2], x[3]); }
"""
    ptx = compiler.compile(source, "sm_80")[1].decode()
    used = {
        name: re.findall(r"^\s+((?:div|sqrt|mul|add|fma)\.[\w.]*f32)", body, re.M)
        for name, body in re.findall(r"\.entry (\w+)\(.*?\{(.*?)^\}", ptx, re.M | re.S)
    }
    assert used == {
        "divide": ["div.rn.f32"],
        "root": ["sqrt.rn.f32"],
        "open": ["fma.rn.f32"],
        "twice": ["mul.rn.f32", "add.rn.f32"],
        "once": ["fma.rn.f32"],
    }


BAD = r"""
extern "C" __global__ void good(int* x) { x[0] = 1; }
extern "C" __global__ void __launch_bounds__(64) bad(int* x);
extern "C" __global__ void __launch_bounds__(64) bad(int* x) {
  x[0] = nothing;
}
extern "C" __global__ void after(int* x) { x[0] = 1; }
"""


def test_an_error_in_the_source_names_the_kernel(compiler):
    with pytest.raises(RuntimeError) as error:
        compiler.compile(BAD, "sm_90")
    assert str(error.value) == (
        f"{compiler.identity} refuses the CUDA source for sm_90, kernel bad: "
        'kernels.cu(5): error: identifier "nothing" is undefined'
    )


def test_an_instruction_that_the_architecture_lacks_names_the_kernel(compiler):
    registers = ", ".join(f'"r"(x[{i}])' for i in range(6))
    source = f"""
extern "C" __global__ void before(int* x) {{ x[0] = 1; }}
extern "C" __global__ void tile(int* x) {{
  int d0, d1, d2, d3;
  asm volatile("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc "
    "{{%0, %1, %2, %3}}, {{%4, %5, %6, %7}}, {{%8, %9}}, {{%4, %5, %6, %7}};"
    : "=r"(d0), "=r"(d1), "=r"(d2), "=r"(d3) : {registers});
  x[0] = d0 + d1 + d2 + d3;
}}
"""
    compiler.compile(source, "sm_80")
    with pytest.raises(RuntimeError, match=r"refuses the CUDA source for sm_75, kernel tile: ptxas .*sm_80 or higher"):
        compiler.compile(source, "sm_75")


@pytest.fixture
def machine(monkeypatch):
    """A machine that has what a test puts there; `machine(libraries, program)`."""

    def has(libraries=(), program=None):
        monkeypatch.setattr(toolchain, "nvrtc_libraries", lambda: list(libraries))
        monkeypatch.setattr(toolchain, "nvcc_program", lambda: program)

    toolchain._compilers.cache_clear()
    yield has
    toolchain._compilers.cache_clear()


def test_no_compiler(machine):
    machine()
    with pytest.raises(BnnccError) as error:
        toolchain.compile_cuda(SOURCE, "sm_90")
    assert str(error.value) == (
        "compiling for CUDA needs NVRTC or nvcc, and neither is here. "
        "Do: pip install 'bnncc[cuda]', or set CUDA_HOME to a CUDA toolkit of 12.8 or later"
    )


def test_a_library_that_is_none(machine, tmp_path):
    library = tmp_path / "libnvrtc.so.12"
    library.write_bytes(b"nothing")
    machine([library])
    with pytest.raises(BnnccError, match=r"cannot load .*libnvrtc\.so\.12: .*Do: pip install 'bnncc\[cuda\]'"):
        toolchain.compile_cuda(SOURCE, "sm_90")


def script(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


OLD = 'case $1 in --version) echo "release 11.4, V11.4.1";; --list-gpu-code) printf "sm_75\\nsm_80\\n";; esac'


def test_a_compiler_that_is_too_old(machine, tmp_path):
    machine(program=script(tmp_path / "nvcc", OLD))
    assert toolchain.compiler("sm_80").identity == "nvcc 11.4.1"
    with pytest.raises(BnnccError) as error:
        toolchain.compiler("sm_90")
    assert str(error.value).startswith("no compiler here makes code for sm_90 (nvcc 11.4.1 knows sm_75, sm_80). Do: ")


def test_a_compiler_that_fails(machine, tmp_path):
    machine(program=script(tmp_path / "nvcc", "echo no licence; exit 1"))
    with pytest.raises(BnnccError, match=r"nvcc --list-gpu-code failed: no licence\. Do: "):
        toolchain.compiler("sm_80")


def test_the_first_that_knows_the_architecture_is_taken(machine, tmp_path):
    library = nvrtc()
    machine(toolchain.nvrtc_libraries(), script(tmp_path / "nvcc", OLD.replace("sm_80", "sm_999")))
    assert toolchain.compiler("sm_75").identity == library.identity
    assert toolchain.compiler("sm_999").identity == "nvcc 11.4.1"


def test_nvcc_of_cuda_home_comes_first(monkeypatch, tmp_path):
    ours, other = script(tmp_path / "home/bin/nvcc", OLD), script(tmp_path / "path/nvcc", OLD)
    monkeypatch.setenv("PATH", str(other.parent))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert toolchain.nvcc_program() == other
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert toolchain.nvcc_program() == ours


def test_of_several_libraries_the_oldest_comes_first(monkeypatch, tmp_path):
    for name in ("cu13/lib/libnvrtc.so.13", "cuda_nvrtc/lib/libnvrtc.so.12", "cuda_nvrtc/lib/libnvrtc.alt.so.12"):
        path = tmp_path / "nvidia" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr("importlib.util.find_spec", lambda name: spec)
    assert [path.name for path in toolchain.nvrtc_libraries()] == ["libnvrtc.so.12", "libnvrtc.so.13"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert toolchain.nvrtc_libraries() == []
