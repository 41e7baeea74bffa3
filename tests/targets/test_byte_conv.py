"""Dot products of bytes: equal to NumPy on every target, in the instructions that the target names."""

from __future__ import annotations

import re

import numpy as np
import pytest
from tvm import te

from bnncc.dialect import computes_bytes
from bnncc.passes.pack_bytes import pack_weight
from bnncc.runtime.bits import ByteLayout
from bnncc.targets import emit
from bnncc.targets.descriptor import get_target

from .kernels import TARGETS, Kernel, prim_func
from .test_assembly import hottest

RNG = np.random.default_rng(0)

#: Target → what a product of bytes looks like, and how many there are at least in the inner loop.
INSTRUCTIONS = {
    "znver4": r"\bvpdpbusd\b",
    "icelake-server": r"\bvpdpbusd\b",
    "x86-64-v4": r"\bvpmaddwd\b.*zmm",
    "x86-64-v3": r"\bvpmaddwd\b.*ymm",
    "x86-64-v2": r"\bpmaddwd\b",
    "rpi4": r"\bsadalp\b",
    "cortex-a76": r"\bsdot\b",
}


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize(("channels", "groups", "out"), [(3, 1, 1), (4, 1, 5), (16, 2, 12), (33, 1, 40)])
def test_products(name, channels, groups, out):
    target = TARGETS[name]
    layout = ByteLayout(channels * groups, groups, target.byte_offset)
    levels = RNG.integers(0, 256, (2, 7, 6, channels * groups))
    levels[0] = 0 if target.byte_offset else 255  # the largest bytes
    weight = RNG.integers(-128, 128, (out * groups, channels, 3, 2))
    weight[0] = -128
    base = RNG.integers(-99, 99, out * groups).astype("int32")
    x = layout.pack(levels)
    w = pack_weight(weight, groups, layout, target.byte_lanes(out))
    kernel = Kernel(
        target,
        lambda x, w, base: computes_bytes.byte_conv2d(x, w, base, out_channels=out * groups, factor=2, wide=True),
        x, w, base,
    )  # fmt: skip
    assert not emit.unscheduled(kernel.scheduled)
    expected = np.zeros((2, 5, 5, out * groups), "int64")
    stored = levels - layout.offset
    for g in range(groups):
        own, rows = stored[..., g * channels : (g + 1) * channels], slice(g * out, (g + 1) * out)
        for i, j in np.ndindex(3, 2):
            expected[..., rows] += own[:, i : i + 5, j : j + 5] @ weight[rows, :, i, j].T
    np.testing.assert_array_equal(kernel(x, w, base), base + 2 * expected)


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_inner_loop(name):
    target = get_target(name)
    lanes = target.byte_lanes(64)
    x = te.placeholder((1, 30, 30, 64), ByteLayout(64, 1, target.byte_offset).dtype, "x")
    w = te.placeholder((1, 64 // lanes, 3, 3, 16, lanes, 4), "int8", "w")
    base = te.placeholder((64,), "int32", "base")
    y = computes_bytes.byte_conv2d(x, w, base, out_channels=64, factor=1)
    body = hottest(emit.assembly(prim_func([x, w, base], [y]), target), INSTRUCTIONS[name])
    assert sum(bool(re.search(INSTRUCTIONS[name], line)) for line in body) >= 8
    spilt = [line for line in body if re.search(r"\(%rsp|\[sp\b", line)]
    assert not spilt, spilt
