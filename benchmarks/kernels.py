"""The binary 3×3 kernels by themselves against what the machine's vector units can do at best, on one thread.

Run: TVM_NUM_THREADS=1 python -m benchmarks.kernels [target]
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

os.environ.setdefault("TVM_NUM_THREADS", "1")

import numpy as np
import tvm
from tvm import te

from benchmarks.limit import arithmetic
from benchmarks.models import CONVOLUTIONS
from bnncc.dialect import computes, computes_float
from bnncc.runtime.bits import BitLayout
from bnncc.targets import emit
from bnncc.targets.descriptor import TargetSpec, get_target


def kernel(size: int, channels: int, target: TargetSpec) -> Callable[[], None]:
    """A call of convolution + batch norm + residual, with its signs packed, on random operands."""
    rng = np.random.default_rng(0)
    layout = BitLayout.for_target(channels, 1, target.word_bits, target.max_lanes)
    lanes = target.binary_lanes(channels)
    shapes = {
        "x": ((1, size + 2, size + 2, layout.words), layout.word_dtype),
        "w": ((1, channels // lanes, 3, 3, layout.group_words, lanes), layout.word_dtype),
        "a": ((channels,), "float32"),
        "b": ((channels,), "float32"),
        "residual": ((1, size, size, channels), "float32"),
    }
    tensors = [te.placeholder(shape, dtype, name) for name, (shape, dtype) in shapes.items()]
    x, w, a, b, residual = tensors
    dot = computes.binary_conv2d(x, w, depth=9 * channels, out_channels=channels)
    y = computes_float.add(computes_float.scale_shift(computes_float.to_float(dot), a, b), residual)
    bits = computes.pack(y, layout, "not_lt")
    func = te.create_prim_func([*tensors, y, bits]).with_attr("global_symbol", "kernel")
    run = emit.build(tvm.IRModule({"kernel": func}), target)["kernel"]
    arrays = []
    for shape, dtype in shapes.values():
        data = rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize)
        array = np.frombuffer(data, dtype).reshape(shape) if dtype != "float32" else rng.standard_normal(shape)
        arrays.append(tvm.runtime.tensor(array.astype(dtype)))
    outputs = [tvm.runtime.empty(tuple(map(int, t.shape)), str(t.dtype)) for t in (y, bits)]
    return lambda: run(*arrays, *outputs)


def fastest(call: Callable[[], None], seconds: float = 0.4) -> float:
    """Seconds of the fastest of many calls: neighbours on this machine only ever slow one down."""
    call()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


def main() -> None:
    target = get_target(sys.argv[1] if len(sys.argv) > 1 else "native")
    limit = arithmetic("native")["binary"]["gops"]
    print(f"{target.name} ({target.cpu}); xor, popcount, add from registers on this machine: {limit:.0f} GOPS")
    for name, (size, channels) in CONVOLUTIONS.items():
        seconds = fastest(kernel(size, channels, target))
        gops = 2e-9 * size * size * channels * channels * 9 / seconds
        print(f"  {name:8s} {seconds * 1e6:7.1f} µs  {gops:6.0f} GOPS  {gops / limit:4.0%} of the limit")


if __name__ == "__main__":
    main()
