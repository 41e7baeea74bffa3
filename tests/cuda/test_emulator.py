"""The emulator: instructions against NumPy models written from the PTX ISA's text, and its checks against kernels that
do what is to be found. Matrix multiplications: test_emulated_mma.py."""

from __future__ import annotations

import re

import numpy as np
import pytest
from emulator import Checks, EmulatedModule, EmulationError, emulate

_KERNELS = r"""
extern "C" __global__ void ldmatrix(uint32_t* x, uint32_t* out, uint32_t* transposed) {
  __shared__ alignas(128) uint32_t tile[128];
  for (int i = 0; i < 4; i++) tile[threadIdx.x * 4 + i] = x[threadIdx.x * 4 + i];
  __syncthreads();
  uint32_t address = __cvta_generic_to_shared(&tile[threadIdx.x * 4]);
  uint32_t* o = out + threadIdx.x * 4; uint32_t* t = transposed + threadIdx.x * 4;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(o[0]), "=r"(o[1]), "=r"(o[2]), "=r"(o[3]) : "r"(address) : "memory");
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
      : "=r"(t[0]), "=r"(t[1]), "=r"(t[2]), "=r"(t[3]) : "r"(address) : "memory");
}
extern "C" __global__ void stmatrix(uint32_t* x, uint32_t* out) {
  __shared__ alignas(128) uint32_t tile[64];
  uint32_t address = __cvta_generic_to_shared(&tile[threadIdx.x % 16 * 4]);
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1, %2};"
      :: "r"(address), "r"(x[threadIdx.x]), "r"(x[threadIdx.x + 32]) : "memory");
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x]; out[threadIdx.x + 32] = tile[threadIdx.x + 32];
}
// Copies with a source of n[0] of 16 bytes, in two groups, of which the first is waited for first.
extern "C" __global__ void cp_async(uint32_t* x, int* n, uint32_t* out) {
  extern __shared__ alignas(128) uint32_t tile[];
  for (int group = 0; group < 2; group++) {
    uint32_t address = __cvta_generic_to_shared(&tile[group * 128 + threadIdx.x * 4]);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
        :: "r"(address), "l"(x + group * 128 + threadIdx.x * 4), "r"(n[0]) : "memory");
    asm volatile("cp.async.commit_group;");
  }
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  for (int i = 0; i < 4; i++) out[threadIdx.x * 4 + i] = tile[threadIdx.x * 4 + i];
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();
  for (int i = 0; i < 4; i++) out[128 + threadIdx.x * 4 + i] = tile[128 + (threadIdx.x ^ 1) * 4 + i];
}
extern "C" __global__ void cp_async_not_waited(uint32_t* x, uint32_t* out) {
  __shared__ alignas(16) uint32_t tile[256];
  for (int group = 0; group < 2; group++) {
    uint32_t address = __cvta_generic_to_shared(&tile[group * 128 + threadIdx.x * 4]);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" :: "r"(address), "l"(x + threadIdx.x * 4) : "memory");
    asm volatile("cp.async.commit_group;");
  }
  asm volatile("cp.async.wait_group 1;" ::: "memory");
  out[threadIdx.x] = tile[128 + threadIdx.x * 4];
}
extern "C" __global__ void cp_async_no_barrier(uint32_t* x, uint32_t* out) {
  __shared__ alignas(16) uint32_t tile[128];
  uint32_t address = __cvta_generic_to_shared(&tile[threadIdx.x * 4]);
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" :: "r"(address), "l"(x + threadIdx.x * 4) : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  out[threadIdx.x] = tile[threadIdx.x];
}
extern "C" __global__ void shuffles(int* x, int* out, uint32_t* votes) {
  int v = x[threadIdx.x], lane = threadIdx.x % 32;
  out[threadIdx.x] = __shfl_sync(0xffffffffu, v, 5, 16);
  out[64 + threadIdx.x] = __shfl_up_sync(0xffffffffu, v, 3, 32);
  out[128 + threadIdx.x] = __shfl_down_sync(0xffffffffu, v, 4, 8);
  out[192 + threadIdx.x] = __shfl_xor_sync(0xffffffffu, v, 9, 32);
  votes[threadIdx.x] = __ballot_sync(0xffffffffu, v & 1);
  votes[64 + threadIdx.x] = __any_sync(0xffffffffu, lane == 7) + 2 * __all_sync(0xffffffffu, lane < 31);
  // Half a warp by itself; the other half is elsewhere.
  if (lane >= 16) votes[128 + threadIdx.x] = __ballot_sync(0xffff0000u, v & 1);
  else votes[128 + threadIdx.x] = __activemask();
  votes[192 + threadIdx.x] = __reduce_add_sync(0xffffffffu, (uint32_t)v);
}
extern "C" __global__ void integers(uint32_t* x, uint32_t* out) {
  uint32_t a = x[0], b = x[1], c = x[2], lop, prmt;
  asm("lop3.b32 %0, %1, %2, %3, 0xCA;" : "=r"(lop) : "r"(a), "r"(b), "r"(c));
  asm("{ .reg .pred p; setp.lt.s32 p, %1, 0; selp.b32 %0, %2, %3, p; }" : "=r"(prmt) : "r"(a), "r"(b), "r"(c));
  out[0] = lop; out[1] = prmt;
  out[2] = __popc(a); out[3] = __clz(c >> 7); out[4] = __ffs(b << 5); out[5] = __brev(a);
  out[6] = __byte_perm(a, b, 0x5140); out[7] = __dp4a((int)a, (int)b, 7); out[8] = __funnelshift_r(a, b, 11);
  out[9] = __umulhi(a, b);
}
extern "C" __global__ void roundings(float* x, float* out) {
  float a = x[0], b = x[1], c = x[2];
  out[0] = __fadd_rn(__fmul_rn(a, b), c);
  out[1] = __fmaf_rn(a, b, c);
}
extern "C" __global__ void contraction(float* x, float* out) { out[2] = x[0] * x[1] + x[2]; }
extern "C" __global__ void two_dimensions(int* out) {
  out[((blockIdx.y * gridDim.x + blockIdx.x) * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x] =
      blockIdx.x * 1000 + blockIdx.y * 100 + threadIdx.y * 10 + threadIdx.x;
}
extern "C" __global__ void race(int* out) {
  __shared__ int tile[64];
  tile[threadIdx.x] = threadIdx.x;
  out[threadIdx.x] = tile[63 - threadIdx.x];
}
extern "C" __global__ void race_of_rewriting(int* out) {
  __shared__ int tile[64];
  for (int i = 0; i < 2; i++) {
    tile[threadIdx.x] = threadIdx.x + i;
    __syncthreads();
    out[threadIdx.x] = tile[63 - threadIdx.x];
  }
}
extern "C" __global__ void within_a_warp(int* out) {
  __shared__ int tile[64];
  tile[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 1];
}
extern "C" __global__ void between_warps(int* out) {
  __shared__ int tile[64];
  tile[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = tile[threadIdx.x ^ 32];
}
extern "C" __global__ void bytes_apart(uint32_t* out) {
  __shared__ alignas(4) unsigned char tile[64];
  tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  if (threadIdx.x < 16) out[threadIdx.x] = ((uint32_t*)tile)[threadIdx.x];
  __syncthreads();
  if (threadIdx.x < 16) ((uint32_t*)tile)[threadIdx.x] = 0;
  __syncthreads();
  out[threadIdx.x] += tile[threadIdx.x];
}
extern "C" __global__ void race_of_bytes(uint32_t* out) {
  __shared__ alignas(4) unsigned char tile[64];
  tile[threadIdx.x] = threadIdx.x;
  __syncwarp();
  out[threadIdx.x] = ((uint32_t*)tile)[threadIdx.x / 4 ^ 8];
}
extern "C" __global__ void unwritten(int* out) {
  __shared__ int tile[64];
  if (threadIdx.x < 63) tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}
extern "C" __global__ void too_far(int* x, int* out) { out[threadIdx.x] = x[threadIdx.x + 1]; }
extern "C" __global__ void misaligned(uint32_t* x, uint32_t* out) {
  *(uint4*)(out + 4 * threadIdx.x) = *(uint4*)(x + 4 * threadIdx.x + 1);
}
extern "C" __global__ void divergent_shuffle(int* out) {
  if (threadIdx.x != 9) out[threadIdx.x] = __shfl_sync(0xffffffffu, threadIdx.x, 0, 32);
}
extern "C" __global__ void divergent_barrier(int* out) {
  __shared__ int tile[32];
  tile[threadIdx.x] = 1;
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    tile[threadIdx.x] = 2;
    __syncthreads();
  }
  out[threadIdx.x] = tile[threadIdx.x];
}
extern "C" __global__ void outside(int* out) {
  int own[9] = {};
  out[0] = own[threadIdx.x];
}
extern "C" __global__ void in_place(int* out) { out[threadIdx.x] = out[threadIdx.x ^ 32]; }
extern "C" __global__ void of_another_block(int* x, int* out) {
  x[blockIdx.x * blockDim.x + threadIdx.x] = 1;
  __syncthreads();
  out[blockIdx.x * blockDim.x + threadIdx.x] = x[threadIdx.x];
}
extern "C" __global__ void two_values(int* out) { out[threadIdx.x / 2] = threadIdx.x; }
extern "C" __global__ void no_global_race(int* x, int* bytes, int* out) {
  int here = blockIdx.x * blockDim.x + threadIdx.x;
  out[here] = out[here] + x[threadIdx.x];
  __syncthreads();
  int other = out[here ^ 1];
  __syncthreads();
  out[here] += other;
  out[512 + threadIdx.x / 2] = 7;  // four times, but the same
  ((char*)bytes)[here] = 1;
}
extern "C" __global__ void division(int* x, int* out) { out[0] = 7 / x[0]; }
extern "C" __global__ void far(int* x, int* out) { out[0] = x[1 << 30]; }
extern "C" __global__ void too_deep(int* x, int* out) {
  volatile int own[60000];
  own[x[0]] = 1;
  out[0] = own[x[0] + 1];
}
extern "C" __global__ void __launch_bounds__(64) bounded(int* out) { out[threadIdx.x] = 1; }
"""


@pytest.fixture(scope="module")
def kernels() -> EmulatedModule:
    return emulate(_KERNELS)


def test_ldmatrix_distributes_rows_and_columns(kernels):
    x = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)  # matrix, row, column
    out, transposed = np.zeros((32, 4), np.uint32), np.zeros((32, 4), np.uint32)
    kernels.launch("ldmatrix", (1,), (32,), 0, x.view(np.uint32), out, transposed)
    for lane in range(32):
        for i in range(4):
            assert out[lane, i].tolist() == int(x[i, lane // 4, lane % 4 * 2 : lane % 4 * 2 + 2].view(np.uint32)[0])
            column = np.ascontiguousarray(x[i, lane % 4 * 2 : lane % 4 * 2 + 2, lane // 4])
            assert transposed[lane, i] == column.view(np.uint32)[0]


def test_stmatrix_is_the_inverse(kernels):
    x, out = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    kernels.launch("stmatrix", (1,), (32,), 0, x, out)
    assert np.array_equal(x, out)  # a row is four words of four neighbouring lanes


@pytest.mark.parametrize("filled", [16, 8, 0])
def test_cp_async_brings_the_bytes_and_zeros(kernels, filled):
    x, out = np.arange(1, 257, dtype=np.uint32).reshape(2, 32, 4), np.zeros((2, 32, 4), np.uint32)
    kernels.launch("cp_async", (1,), (32,), 1024, x, np.array([filled], np.int32), out)
    x[:, :, filled // 4 :] = 0
    assert np.array_equal(out[0], x[0])
    assert np.array_equal(out[1], x[1][np.arange(32) ^ 1])


def test_shuffles_and_votes(kernels):
    x = np.random.default_rng(6).integers(0, 1000, 64).astype(np.int32)
    out, votes = np.zeros((4, 64), np.int32), np.zeros((4, 64), np.uint32)
    kernels.launch("shuffles", (1,), (64,), 0, x, out, votes)
    lane = np.arange(64)
    assert np.array_equal(out[0], x[lane // 16 * 16 + 5])
    assert np.array_equal(out[1], x[np.where(lane % 32 < 3, lane, lane - 3)])
    assert np.array_equal(out[2], x[np.where(lane % 8 + 4 > 7, lane, np.minimum(lane + 4, 63))])
    assert np.array_equal(out[3], x[lane ^ 9])
    ballots = [int(np.packbits(half & 1, bitorder="little").view(np.uint32)[0]) for half in x.reshape(2, 32)]
    assert np.array_equal(votes[0], np.repeat(ballots, 32))
    assert np.array_equal(votes[1], np.full(64, 1))
    halves = [(0xFFFF, ballot & 0xFFFF0000) for ballot in ballots]
    assert np.array_equal(votes[2], np.repeat(np.ravel(halves), 16))
    assert np.array_equal(votes[3], np.repeat(x.reshape(2, 32).sum(1), 32))


def test_integer_instructions(kernels):
    a, b, c = 0x9ABCDEF1, 0x12345678, 0x0F0FF0F0
    out = np.zeros(10, np.uint32)
    kernels.launch("integers", (1,), (1,), 0, np.array([a, b, c], np.uint32), out)
    signed = [np.array([v], np.uint32).view(np.int8).astype(np.int64) for v in (a, b)]
    expected = [
        (a & b) | (~a & c),  # the table 0xca: a ? b : c
        b,  # a is negative
        a.bit_count(),
        32 - (c >> 7).bit_length(),
        ((b << 5) & -(b << 5)).bit_length(),
        int(f"{a:032b}"[::-1], 2),
        (a & 0xFF) | (b & 0xFF) << 8 | (a >> 8 & 0xFF) << 16 | (b >> 8 & 0xFF) << 24,
        int(signed[0] @ signed[1]) + 7,
        (b << 32 | a) >> 11,
        a * b >> 32,
    ]
    assert out.tolist() == [v & 0xFFFFFFFF for v in expected]


def test_kernels_that_state_their_roundings_do_not_contract():
    source = "\n".join(k for k in re.split(r"(?=extern)", _KERNELS) if re.search("void (roundings|contraction)", k))
    x = np.array([1 + 2**-12, 1 + 2**-12, -1], np.float32)
    apart, together = np.float32(2**-11), np.float32(2**-11 + 2**-24)
    for contract in (False, True):
        out = np.zeros(3, np.float32)
        module = emulate(source, contract=contract)
        module.launch("roundings", (1,), (1,), 0, x, out)
        module.launch("contraction", (1,), (1,), 0, x, out)
        assert out.tolist() == [apart, together, together if contract else apart]


def test_indices_of_two_dimensions(kernels):
    out = np.zeros((2, 3, 4, 5), np.int32)  # block y, block x, thread y, thread x
    kernels.launch("two_dimensions", (3, 2), (5, 4), 0, out)
    y, x, j, i = np.indices(out.shape)
    assert np.array_equal(out, x * 1000 + y * 100 + j * 10 + i)


@pytest.mark.parametrize(
    ("kernel", "sizes", "threads", "message"),
    [
        ("race", [64], 64, r"race in shared memory .* writes what thread \d+ read, without"),
        ("race_of_rewriting", [64], 64, r"race in shared memory .* thread 0 reads what thread 63 wrote"),
        ("between_warps", [64], 64, r"race in shared memory .* thread 32 writes what thread 0 read"),
        ("cp_async_no_barrier", [128, 32], 32, r"race in shared memory .* reads what thread 0 wrote"),
        ("cp_async_not_waited", [128, 32], 32, r"a wait_group is missing"),
        ("race_of_bytes", [64], 64, r"byte \d+: thread 32 writes what several threads of warp 0 read"),
        ("unwritten", [64], 64, r"thread 63: byte 252 of shared memory is read before it is written"),
        ("too_far", [64, 64], 64, r"thread 63: read of 4 bytes at byte 256 of buffer 0, which has 256"),
        ("misaligned", [65, 64], 16, r"line \d+: access at .* not aligned to 16 bytes"),
        ("divergent_shuffle", [32], 32, r"lanes fffffdff are at shfl.idx \(line \d+\) .* lanes 00000200 have ended"),
        ("divergent_barrier", [32], 32, r"is at __syncthreads \(line \d+\) while thread 0 is at"),
        ("outside", [32], 32, r"thread 9: line \d+: index 9 is outside the array"),
        (
            "in_place",
            [64],
            64,
            r"thread 32: race in global memory at byte 0 of buffer 0.* it reads what thread 0 of block number 0 wrote",
        ),
        ("two_values", [64], 64, r"thread 1: race in global memory .* another value than thread 0 of block number 0"),
        ("division", [1, 1], 1, r"thread 0 divides by zero"),
        ("far", [1, 1], 1, r"thread 0: read of 4 bytes at byte \d+ of buffer \d"),
        ("too_deep", [1, 1], 1, r"thread 0 touches memory at .* nobody's"),
        ("bounded", [128], 128, r"128 threads, but __launch_bounds__\(64\)"),
    ],
)
def test_what_is_wrong_is_told(kernels, kernel, sizes, threads, message):
    with pytest.raises(EmulationError, match=f"kernel {kernel}"):
        kernels.launch(kernel, (1,), (threads,), 0, *(np.zeros(n, np.int32) for n in sizes))
    with pytest.raises(EmulationError, match=message):
        kernels.launch(kernel, (1,), (threads,), 0, *(np.zeros(n, np.int32) for n in sizes))


def test_a_warp_may_synchronise_itself(kernels):
    out = np.zeros(64, np.int32)
    kernels.launch("within_a_warp", (1,), (64,), 0, out)
    assert np.array_equal(out, np.arange(64) ^ 1)


def test_blocks_are_not_ordered(kernels):
    x, out = np.zeros(128, np.int32), np.zeros(128, np.int32)
    kernels.launch("of_another_block", (1,), (64,), 0, x, out)
    with pytest.raises(EmulationError, match=r"block \(1, 0, 0\): .* reads what thread \d+ of block number 0 wrote"):
        kernels.launch("of_another_block", (2,), (64,), 0, x, out)


def test_what_is_ordered_is_no_race(kernels):
    x, out = np.arange(64, dtype=np.int32), np.zeros(1024, np.int32)
    kernels.launch("no_global_race", (2,), (64,), 0, x, np.zeros(32, np.int32), out)
    assert np.array_equal(out[:128], np.tile(x + (x ^ 1), 2))


def test_memory_that_arguments_share(kernels):
    both = np.zeros(96, np.int32)
    kernels.launch("of_another_block", (1,), (32,), 0, both[:32], both[32:])
    with pytest.raises(EmulationError, match="race in global memory"):
        kernels.launch("no_global_race", (1,), (64,), 0, both[:64], np.zeros(32, np.int32), both[32:])


def test_bytes_of_a_word_are_apart(kernels):
    out = np.zeros(64, np.uint32)
    kernels.launch("bytes_apart", (1,), (64,), 0, out)
    assert np.array_equal(out[:16], np.arange(64, dtype=np.uint8).view(np.uint32))


def test_checks_can_be_left_out(kernels):
    kernels.launch("unwritten", (1,), (64,), 0, np.zeros(64, np.int32), checks=Checks.ALL & ~Checks.UNINITIALISED)
    kernels.launch("race", (1,), (64,), 0, np.zeros(64, np.int32), checks=Checks(0))


def test_limits_of_the_architecture(kernels):
    arrays = np.zeros(256, np.uint32), np.array([16], np.int32), np.zeros(256, np.uint32)
    with pytest.raises(EmulationError, match="at most 49152, and together 232448"):
        kernels.launch("cp_async", (1,), (32,), 228 * 1024, *arrays)
    with pytest.raises(EmulationError, match="no GPU runs blocks of"):
        kernels.launch("cp_async", (1,), (1025,), 1024, *arrays)


def test_an_unknown_instruction_is_named():
    source = 'extern "C" __global__ void k(int* x) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }'
    with pytest.raises(EmulationError, match=r"wgmma\.fence\.sync\.aligned"):
        emulate(source)


def test_wrong_arguments_are_told(kernels):
    with pytest.raises(EmulationError, match="takes 1 arguments, not 2"):
        kernels.launch("race", (1,), (64,), 0, np.zeros(64, np.int32), np.zeros(64, np.int32))
    with pytest.raises(EmulationError, match="argument 0 is not a writable array in C order"):
        kernels.launch("race", (1,), (64,), 0, np.zeros((64, 2), np.int32)[:, 0])
