"""Blocks per multiprocessor, against NVIDIA's own calculation where a CUDA toolkit brings it."""

import itertools
import shutil
import subprocess

import pytest

from bnncc.targets.cuda import toolchain
from bnncc.targets.cuda.descriptor import ARCHITECTURES
from bnncc.targets.cuda.occupancy import blocks_per_sm, warps_by_registers

# Reads "threads registers shared" lines, writes blocks; the device's properties are arguments.
PROGRAM = r"""
#include <cuda_occupancy.h>
#include <cstdio>
#include <cstdlib>
int main(int, char** args) {
  cudaOccDeviceProp device;
  device.computeMajor = atoi(args[1]), device.computeMinor = atoi(args[2]);
  device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = atoi(args[3]);
  device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.warpSize = 32, device.numSms = 1;
  device.sharedMemPerBlock = 49152, device.sharedMemPerMultiprocessor = atoi(args[4]);
  device.sharedMemPerBlockOptin = atoi(args[5]);
  device.reservedSharedMemPerBlock = device.computeMajor >= 8 ? 1024 : 0;
  cudaOccDeviceState state;
  int threads, registers, shared;
  while (scanf("%d %d %d", &threads, &registers, &shared) == 3) {
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = shared;
    kernel.numBlockBarriers = 1;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared)) return 1;
    printf("%d\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.fixture(scope="module")
def nvidias(tmp_path_factory):
    """NVIDIA's calculation: a function of an architecture and a list of (threads, registers, shared)."""
    nvcc, gxx = toolchain.nvcc_program(), shutil.which("g++")
    header = nvcc and next(nvcc.resolve().parents[1].glob("**/include/cuda_occupancy.h"), None)
    if not header or not gxx:
        pytest.skip("there is no CUDA toolkit, or no g++")
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "occupancy.cpp").write_text(PROGRAM)
    command = [gxx, "-I", header.parent, "occupancy.cpp", "-o", "occupancy"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)

    def ask(gpu, cases):
        arguments = [*gpu.capability, gpu.threads_per_sm, gpu.shared_per_sm, gpu.most_shared]
        text = "".join(f"{' '.join(map(str, case))}\n" for case in cases)
        command = [folder / "occupancy", *map(str, arguments)]
        return list(
            map(int, subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout.split())
        )

    return ask


@pytest.mark.parametrize("sm", ARCHITECTURES)
def test_as_nvidia_calculates(sm, nvidias):
    gpu = ARCHITECTURES[sm]
    cases = list(
        itertools.product(
            (1, 32, 33, 64, 96, 128, 160, 256, 384, 512, 1024),
            (1, 8, 16, 17, 24, 32, 33, 40, 48, 64, 65, 96, 128, 129, 168, 192, 255),
            (0, 1, 1000, 1024, 9000, 16384, 33000, 49152, 65536, 99 * 1024, 100 * 1024, 163 * 1024, 227 * 1024),
        )
    )
    assert [blocks_per_sm(gpu, *case) for case in cases] == nvidias(gpu, cases)


def test_by_hand():
    gpu = ARCHITECTURES["sm_90"]
    assert blocks_per_sm(gpu, 32, 16, 0) == 32  # of 64 warps: a multiprocessor holds 32 blocks
    assert blocks_per_sm(gpu, 256, 32, 0) == 8  # 64 warps
    assert blocks_per_sm(gpu, 256, 128, 0) == 2  # 16 warps of 4096 registers
    assert blocks_per_sm(gpu, 256, 128, 113 * 1024) == 2  # 228 KB hold two of 113 and a reserved one each
    assert blocks_per_sm(gpu, 256, 128, 114 * 1024) == 1
    assert blocks_per_sm(gpu, 512, 255, 0) == 0  # 16 warps of 8192 registers do not fit
    assert blocks_per_sm(gpu, 256, 128, 228 * 1024) == 0


def test_warps_by_registers():
    assert [warps_by_registers(count) for count in (8, 9, 32, 33, 168, 169, 255)] == [256, 128, 64, 48, 12, 8, 8]
