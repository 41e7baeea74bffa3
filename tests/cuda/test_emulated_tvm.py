"""What TVM generates, on the emulator, against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from emulator import EmulationError, emulate
from tvm import s_tir, te
from tvm.s_tir import dlight
from tvm.script import ir as I
from tvm.script import tirx as T
from tvm.target import Target

TARGET = Target({"kind": "cuda", "arch": "sm_90"}, host=Target({"kind": "llvm", "mtriple": "x86_64-linux-gnu"}))


def _cuda_c(mod: tvm.IRModule) -> str:
    with TARGET:
        return str(tvm.compile(mod, target=TARGET).mod.imports[0].inspect_source())


def test_a_reduction_over_warps_and_shared_memory():
    x = te.placeholder((32, 256), "float32", "x")
    k = te.reduce_axis((0, 256), "k")
    total = te.compute((32,), lambda i: te.sum(x[i, k], axis=k), "total")
    y = te.compute((32,), lambda i: te.sqrt(total[i]) * 2.0, "y")
    mod = tvm.IRModule({"main": te.create_prim_func([x, y])})
    with TARGET:
        mod = dlight.ApplyDefaultSchedule(dlight.gpu.Reduction(), dlight.gpu.GeneralReduction())(mod)
    source = _cuda_c(mod)
    assert "__shfl_down_sync" in source and "__syncthreads" in source
    # Integers: their sums are exact in any order.
    a, out = np.random.default_rng(0).integers(0, 9, (32, 256)).astype(np.float32), np.zeros(32, np.float32)
    emulate(source).launch("main_kernel", (32,), (256,), 0, a, out)
    assert np.array_equal(out, np.sqrt(a.sum(1)) * 2)


@pytest.mark.parametrize(
    ("dtype", "lanes", "compute", "expected"),
    [
        ("float32", 4, lambda a, b: te.max(a * b, b), lambda a, b: np.maximum(a * b, b)),
        ("float16", 8, lambda a, b: a * b, lambda a, b: a * b),
        ("float16", 2, lambda a, b: te.max(a, b), np.maximum),
        ("int8", 16, lambda a, b: a + b, lambda a, b: a + b),
        ("uint32", 4, lambda a, b: tvm.tirx.popcount(a ^ b), lambda a, b: np.bitwise_count(a ^ b).astype(np.uint32)),
        ("int64", 2, lambda a, b: te.truncdiv(a, b), lambda a, b: np.trunc(a / b).astype(np.int64)),
    ],
)
def test_vectors_of_every_width(dtype, lanes, compute, expected):
    a, b = (te.placeholder((64, 64), dtype, name) for name in "ab")
    y = te.compute((64, 64), lambda i, j: compute(a[i, j], b[i, j]), "y")
    sch = s_tir.Schedule(te.create_prim_func([a, b, y]))
    blocks, threads, vector = sch.split(sch.fuse(*sch.get_loops(sch.get_sblock("y"))), [None, 64, lanes])
    sch.bind(blocks, "blockIdx.x")
    sch.bind(threads, "threadIdx.x")
    sch.vectorize(vector)
    rng = np.random.default_rng(1)
    arrays = [(rng.standard_normal((64, 64)) * 9 + 100).astype(dtype) for _ in range(2)]
    out = np.zeros((64, 64), dtype)
    emulate(_cuda_c(sch.mod)).launch("main_kernel", (64 // lanes,), (64,), 0, *arrays, out)
    assert np.array_equal(out, expected(*arrays))


@I.ir_module(s_tir=True)
class _Product:
    """16 rows and 8 columns of 256 bits: copied asynchronously, read by ldmatrix, multiplied on a tensor core."""

    @T.prim_func(s_tir=True)
    def main(A: T.Buffer((16, 8), "uint32"), B: T.Buffer((8, 8), "uint32"), C: T.Buffer((16, 8), "uint32")):
        T.func_attr({"global_symbol": "main", "tirx.is_scheduled": True, "tirx.noalias": True})
        T.launch_thread("blockIdx.x", 1)
        lane = T.launch_thread("threadIdx.x", 32)
        a = T.alloc_buffer((16, 8), "uint32", scope="shared.dyn")
        b = T.alloc_buffer((8, 8), "uint32", scope="shared")
        acc = T.alloc_buffer((4,), "uint32", scope="local")
        r = T.alloc_buffer((6,), "uint32", scope="local")
        for i in T.unroll(4):
            acc[i] = T.uint32(0)
        at = a.access_ptr("rw", offset=lane * 4)
        T.ptx.cp.async_.cg.shared.global_(at, T.address_of(A[lane // 2, lane % 2 * 4]), 16)
        if lane < 16:
            to = b.access_ptr("rw", offset=lane * 4)
            T.ptx.cp.async_.cg.shared.global_(to, T.address_of(B[lane // 2, lane % 2 * 4]), 16)
        T.ptx.cp.async_.commit_group()
        T.ptx.cp.async_.wait_group(0)
        T.tvm_storage_sync("shared")
        from_a = a.access_ptr("rw", offset=lane % 16 * 8 + lane // 16 * 4)
        T.ptx.ldmatrix.sync.aligned.m8n8.x4.shared.b16(r[0], r[1], r[2], r[3], from_a)
        from_b = b.access_ptr("rw", offset=lane % 8 * 8 + lane // 8 % 2 * 4)
        T.ptx.ldmatrix.sync.aligned.m8n8.x2.shared.b16(r[4], r[5], from_b)
        T.ptx.mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc(
            acc[0], acc[1], acc[2], acc[3], r[0], r[1], r[2], r[3], r[4], r[5], acc[0], acc[1], acc[2], acc[3]
        )  # fmt: skip
        for i in T.unroll(4):
            C[lane // 4 + 8 * (i // 2), lane % 4 * 2 + i % 2] = acc[i]


def test_a_product_on_tensor_cores():
    rng = np.random.default_rng(2)
    a, b = (rng.integers(0, 2**32, (rows, 8), np.uint32) for rows in (16, 8))
    out = np.zeros((16, 8), np.uint32)
    source = _cuda_c(_Product)
    emulate(source).launch("main_kernel", (1,), (32,), 512, a, b, out)
    assert np.array_equal(out, np.bitwise_count(a[:, None] ^ b[None]).sum(-1))
    # The same without what makes it right.
    for missing, message in (("async_wait_group_0();", "a wait_group is missing"), ("__syncthreads();", "race")):
        lines = [line for line in source.splitlines() if not line.strip().endswith(missing)]
        assert len(lines) == len(source.splitlines()) - 1
        with pytest.raises(EmulationError, match=message):
            emulate("\n".join(lines)).launch("main_kernel", (1,), (32,), 512, a, b, out)
