"""Float convolutions and dense layers as a GPU runs them, against float64 within the error bound of a sum of floats.

The emulator runs the CUDA C of both ways to copy: cp.async (sm_80 and later) and registers (sm_75). Every architecture
compiles the tiles of large layers, which must leave the registers that their occupancy needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tvm
from emulated import Emulated
from tvm import te

from bnncc.dialect import computes_float as F
from bnncc.dialect import reference
from bnncc.dialect.computes import pack
from bnncc.targets.cuda import emit, toolchain
from bnncc.targets.cuda.cubin import resources
from bnncc.targets.cuda.descriptor import CUDA_TARGETS
from bnncc.targets.cuda.occupancy import blocks_per_sm

SM_90 = CUDA_TARGETS["cuda-sm_90"]


@dataclass(frozen=True)
class Conv:
    """image: (N, H, W). padding: (top, left, bottom, right) zeros around it."""

    image: tuple[int, int, int]
    channels: int
    out: int
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    @property
    def terms(self) -> int:
        return self.kernel[0] * self.kernel[1] * self.channels // self.groups

    def inputs(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        weight = _normal(rng, self.out, self.channels // self.groups, *self.kernel)
        return _normal(rng, *self.image, self.channels), weight

    def laid_out(self, weight: np.ndarray) -> np.ndarray:
        return reference.block_conv_weights(weight, self.groups, SM_90.conv_lanes(self.out // self.groups))

    def compute(self, x: te.Tensor, w: te.Tensor, form: str = "") -> te.Tensor:
        return F.conv2d(
            x, w, out_channels=self.out, strides=self.strides, dilation=self.dilation, padding=self.padding, form=form
        )

    def exact(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        x, w = reference.pad_pixels(x, self.padding, 0).astype(np.float64), w.astype(np.float64)
        return reference.conv2d(x, w, self.strides, self.dilation, self.groups)


@dataclass(frozen=True)
class Dense:
    rows: int
    terms: int
    out: int

    def inputs(self, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
        return _normal(rng, self.rows, self.terms), _normal(rng, self.out, self.terms)

    def laid_out(self, weight: np.ndarray) -> np.ndarray:
        return reference.block_dense_weights(weight, SM_90.conv_lanes(self.out))

    def compute(self, x: te.Tensor, w: te.Tensor, form: str = "") -> te.Tensor:
        return F.dense(x, w, out_channels=self.out, form=form)

    def exact(self, x: np.ndarray, w: np.ndarray) -> np.ndarray:
        return x.astype(np.float64) @ w.astype(np.float64).T


CONVS = [
    Conv((1, 13, 11), 1, 20, (5, 5)), Conv((1, 29, 29), 3, 64, (7, 7), (2, 2)), Conv((3, 9, 9), 3, 33, (3, 3), (2, 2)),
    Conv((1, 8, 9), 4, 1), Conv((1, 9, 10), 7, 16, (5, 5), (1, 1), (2, 2)), Conv((1, 12, 12), 16, 130, (1, 1)),
    Conv((3, 7, 7), 16, 40, (3, 3), (1, 2)), Conv((1, 9, 9), 33, 65), Conv((2, 7, 6), 64, 64, (1, 1)),
    Conv((1, 6, 7), 130, 16), Conv((1, 14, 9), 12, 24, (3, 2), (1, 2), (3, 2), 2),
    Conv((3, 5, 5), 6, 3, (2, 2), groups=3),
    Conv((1, 1, 1), 64, 33, (1, 1)), Conv((9, 1, 1), 33, 7, (1, 1)), Conv((3, 1, 1), 130, 4, (1, 1)),
    Conv((1, 7, 7), 4, 5, (7, 7)), Conv((1, 40, 40), 17, 96, (1, 1)), Conv((1, 70, 70), 3, 32),
    Conv((1, 7, 9), 16, 33, padding=(1, 1, 1, 1)), Conv((2, 11, 8), 36, 20, (3, 2), (2, 3), (2, 3), 1, (2, 0, 1, 3)),
    Conv((1, 6, 5), 24, 39, (3, 3), (1, 2), (1, 1), 3, (0, 2, 2, 1)), Conv((3, 5, 6), 7, 9, padding=(1, 2, 3, 0)),
    Conv((1, 19, 18), 3, 64, (7, 7), (2, 2), padding=(3, 3, 3, 3)), Conv((1, 1, 2), 8, 40, padding=(1, 1, 1, 1)),
    Conv((2, 2, 2), 3, 5, (2, 2), (2, 2), padding=(1, 1, 1, 1)),
]  # fmt: skip
DENSES = [Dense(*sizes) for sizes in ((1, 64, 10), (1, 512, 1000), (5, 33, 17), (3, 1, 1), (8, 130, 96), (64, 128, 96))]
#: Layers of which there are tiles of every size on the largest GPU, and the threads of their blocks.
LARGE = {
    "128x128": (Conv((32, 58, 58), 64, 128), 256), "128x64": (Conv((32, 58, 58), 64, 64), 128),
    "padded": (Conv((32, 56, 56), 64, 128, padding=(1, 1, 1, 1)), 256),
    "stem": (Conv((32, 230, 230), 3, 64, (7, 7), (2, 2)), 128),
    "128x32": (Conv((32, 226, 226), 3, 32, (3, 3), (2, 2)), 128),
    "64x64": (Conv((8, 56, 28), 130, 64, (1, 1)), 64), "sliced": (Conv((1, 14, 14), 256, 512, (1, 1)), 256),
    "dot": (Dense(1, 2048, 1000), 512),
}  # fmt: skip


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape).astype(np.float32)


def bound(magnitudes: np.ndarray, terms: int) -> np.ndarray:
    """How far a sum of products of 32-bit floats may lie from the exact one, in whatever order it is summed.

    γ·Σ|x·w| with γ = n·u / (1 − n·u), u = 2⁻²⁴ and n roundings on the way of any term: as many as there are terms, and
    one more for each time that sums of 0 begin (Higham, Accuracy and Stability of Numerical Algorithms, 3.1).
    """
    n = (terms + 32) * 2.0**-24
    return n / (1 - n) * magnitudes


def function(compute: Callable[..., Any], arrays: Sequence[np.ndarray]) -> Any:
    tensors = [te.placeholder(a.shape, str(a.dtype), f"arg{i}") for i, a in enumerate(arrays)]
    results = compute(*tensors)
    return te.create_prim_func([*tensors, *(results if isinstance(results, tuple) else [results])])


def _check_sums(target: str, share: slice) -> None:
    rng = np.random.default_rng(0)
    layers = [(layer, *layer.inputs(rng)) for layer in (*CONVS, *DENSES)[share]]
    functions = {f"k{i}": function(a.compute, (x, a.laid_out(w))) for i, (a, x, w) in enumerate(layers)}
    emulated = Emulated(tvm.IRModule(functions), CUDA_TARGETS[target])
    for i, (layer, x, w) in enumerate(layers):
        (call,) = emulated.lowered.calls[f"k{i}"]
        assert call.shared_bytes, layer  # it is no naive loop
        (got,) = emulated(f"k{i}", x, layer.laid_out(w))
        error = np.abs(got - layer.exact(x, w))
        assert (error <= bound(layer.exact(np.abs(x), np.abs(w)), layer.terms)).all(), (layer, error.max())


@pytest.mark.parametrize(("target", "first"), [("cuda-sm_75", 0), ("cuda-sm_90", 1)])
def test_sums_of_each_layer_on_one_target(target: str, first: int) -> None:
    _check_sums(target, slice(first, None, 2))


@pytest.mark.conformance
@pytest.mark.parametrize("target", ["cuda-sm_75", "cuda-sm_90"])
def test_sums_of_every_layer(target: str) -> None:
    _check_sums(target, slice(None))


def rounded(values: np.ndarray, form: str) -> np.ndarray:
    """As `bnncc.dialect.scalars.rounded_to`."""
    if form == "float16":
        return values.astype(np.float16).astype(np.float32)
    return ((values.view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)


def words(weight: np.ndarray, layer: Conv | Dense, form: str) -> np.ndarray:
    """Weights that are rounded, as tensor cores take them."""
    values = rounded(weight, form)
    if isinstance(layer, Dense):
        laid_out = reference.block_dense_weights(values, 1)
    else:
        laid_out = reference.block_conv_weights(values, layer.groups, 1)
    if form == "tf32":
        return laid_out
    pairs = laid_out.reshape(*laid_out.shape[:-2], -1, 2)
    return np.ascontiguousarray(pairs.astype(np.float16)).view(np.uint32)


ROUNDED = [
    Conv((1, 9, 9), 8, 40), Conv((2, 7, 6), 64, 72, (1, 1)), Conv((1, 12, 8), 16, 24, (3, 2), (2, 3), (3, 2), 2),
    Conv((9, 1, 1), 24, 8, (1, 1)), Conv((1, 20, 20), 16, 130), Dense(1, 64, 10), Dense(5, 136, 33), Dense(70, 40, 96),
    Conv((2, 5, 9), 16, 40, padding=(1, 2, 0, 1)),
]  # fmt: skip


@pytest.mark.parametrize(
    ("target", "form"),
    [("cuda-sm_75", "float16"), ("cuda-sm_80", "tf32"), ("cuda-sm_90", "float16"), ("cuda-sm_90", "tf32")],
)
def test_sums_of_rounded_products(target: str, form: str) -> None:
    rng = np.random.default_rng(4)
    layers = [(layer, *layer.inputs(rng)) for layer in ROUNDED]
    functions = {}
    for i, (layer, x, w) in enumerate(layers):
        functions[f"k{i}"] = function(lambda x, w, a=layer: a.compute(x, w, form), (x, words(w, layer, form)))
    emulated = Emulated(tvm.IRModule(functions), CUDA_TARGETS[target])
    kernels = re.findall(r"^extern .*?^}", emulated.lowered.source, re.M | re.S)
    assert sum("mma_sync" in kernel for kernel in kernels) == len(layers)
    for i, (layer, x, w) in enumerate(layers):
        (got,) = emulated(f"k{i}", x, words(w, layer, form))
        near = rounded(x, form), rounded(w, form)
        error = np.abs(got - layer.exact(*near)) / bound(layer.exact(*map(np.abs, near)), layer.terms)
        assert error.max() <= 1, (layer, error.max())


@pytest.mark.parametrize("target", ["cuda-sm_75", "cuda-sm_80", "cuda-sm_90", "cuda-sm_120"])
def test_rounded_products_compile_without_spills(target: str) -> None:
    gpu = CUDA_TARGETS[target].gpu
    large, small = Conv((32, 58, 58), 64, 128), Conv((1, 14, 14), 256, 512, (1, 1))
    layers = {"large": large, "small": small, "one": Dense(1, 64, 96)}
    functions = {}
    for form in ("float16",) if target == "cuda-sm_75" else ("float16", "tf32"):
        for name, layer in layers.items():
            x, w = (np.zeros(a.shape, np.float32) for a in layer.inputs(np.random.default_rng(0)))
            inputs = (x, words(w, layer, form))
            functions[f"{name}_{form}"] = function(lambda x, w, a=layer, f=form: a.compute(x, w, f), inputs)
    lowered = emit.lower(emit.schedule(tvm.IRModule(functions), CUDA_TARGETS[target]), CUDA_TARGETS[target])
    image, _ = toolchain.compile_cuda(lowered.source, gpu.sm)
    of = resources(image)
    for (call,) in lowered.calls.values():
        assert of[call.function].local_bytes == 0, (call, of[call.function])
        assert blocks_per_sm(gpu, call.block[0], of[call.function].registers, call.shared_bytes) >= 1


@pytest.mark.parametrize("layer", [Conv((1, 19, 19), 3, 72, (3, 3), (2, 2)), Conv((3, 8, 8), 32, 64)], ids=str)
def test_epilogues_are_of_the_same_launch(layer: Conv) -> None:
    """Scale and shift, relu, a residual, and the signs of that: one kernel, whose every step rounds as eager does."""
    rng = np.random.default_rng(1)
    x, w = layer.inputs(rng)
    exact = layer.exact(x, w)
    a, b, residual = _normal(rng, layer.out), _normal(rng, layer.out), _normal(rng, *exact.shape)
    layout = SM_90.bit_layout(layer.out, 1)

    def compute(x: te.Tensor, w: te.Tensor, a: te.Tensor, b: te.Tensor, r: te.Tensor) -> tuple[te.Tensor, te.Tensor]:
        value = F.add(F.relu(F.scale_shift(layer.compute(x, w), a, b)), r)
        return value, pack(value, layout, "ge")

    inputs = (x, layer.laid_out(w), a, b, residual)
    emulated = Emulated(tvm.IRModule({"k": function(compute, inputs), "sums": function(layer.compute, inputs[:2])}))
    assert len(emulated.lowered.calls["k"]) == 1
    value, packed = emulated("k", *inputs)
    (sums,) = emulated("sums", *inputs[:2])
    # The product of two floats is exact in float64, and so is its sum with a float of a like size, but for rare ties.
    scaled = (sums.astype(np.float64) * a + b).astype(np.float32)
    expected = np.maximum(scaled, np.float32(0)) + residual
    assert np.array_equal(value, expected)
    assert np.array_equal(packed, np.ascontiguousarray(reference.pack_signs(value, layout)).view(np.uint8))


def test_signs_of_sums_need_no_sums_in_memory() -> None:
    layer = Conv((1, 18, 18), 3, 33)
    rng = np.random.default_rng(2)
    x, w = layer.inputs(rng)
    layout = SM_90.bit_layout(layer.out, 1)
    inputs = (x, layer.laid_out(w))
    functions = {
        "bits": function(lambda x, w: pack(layer.compute(x, w), layout, "ge"), inputs),
        "sums": function(layer.compute, inputs),
    }
    emulated = Emulated(tvm.IRModule(functions))
    assert len(emulated.lowered.calls["bits"]) == 1 and not emulated.lowered.scratch["bits"]
    (bits,), (sums,) = emulated("bits", *inputs), emulated("sums", *inputs)
    assert np.array_equal(bits, np.ascontiguousarray(reference.pack_signs(sums, layout)).view(np.uint8))


def test_runs_agree_bit_for_bit() -> None:
    """Warps that share a depth add their sums in one order."""
    layer = Conv((1, 7, 7), 256, 32, (1, 1))
    x, w = layer.inputs(np.random.default_rng(3))
    emulated = Emulated(tvm.IRModule({"k": function(layer.compute, (x, layer.laid_out(w)))}))
    first, second = (emulated("k", x, layer.laid_out(w))[0] for _ in range(2))
    assert np.array_equal(first, second)


def _lowered(target: str, layers: dict[str, tuple[Any, int]]) -> emit.Lowered:
    functions = {}
    for name, (layer, _) in layers.items():
        shapes = [np.broadcast_to(np.float32(0), a.shape) for a in _shapes(layer)]
        functions[f"k{name}"] = function(layer.compute, shapes)
    spec = CUDA_TARGETS[target]
    return emit.lower(emit.schedule(tvm.IRModule(functions), spec), spec)


def _shapes(layer: Conv | Dense) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(layer, Dense):
        return np.empty((layer.rows, layer.terms)), layer.laid_out(np.empty((layer.out, layer.terms), np.float32))
    weight = np.empty((layer.out, layer.channels // layer.groups, *layer.kernel), np.float32)
    return np.broadcast_to(0, (*layer.image, layer.channels)), layer.laid_out(weight)


@pytest.mark.parametrize(
    "target",
    [
        *("cuda-sm_75", "cuda-sm_90"),
        *(pytest.param(target, marks=pytest.mark.conformance) for target in ("cuda-sm_80", "cuda-sm_120")),
    ],
)
def test_tiles_compile_without_spills(target: str) -> None:
    lowered, gpu = _lowered(target, LARGE), CUDA_TARGETS[target].gpu
    image, _ = toolchain.compile_cuda(lowered.source, gpu.sm)
    of = resources(image)
    for calls in lowered.calls.values():
        (call,) = calls
        kernel, threads = of[call.function], call.block[0]
        assert kernel.local_bytes == 0, (call, kernel)
        shared = kernel.shared_bytes + call.shared_bytes
        assert shared <= gpu.most_shared
        resident = blocks_per_sm(gpu, threads, kernel.registers, shared)
        # Two warps for each of the four schedulers; shared memory of sm_75 holds sums for one.
        assert resident * threads >= (128 if target == "cuda-sm_75" else 256), (call, kernel, resident)


def test_inner_loops_are_multiply_adds() -> None:
    """In PTX, from which machine code differs little here: few loads, all of vectors, and little else."""
    names = ("128x128", "128x64", "padded", "stem", "64x64")
    lowered = _lowered("cuda-sm_90", {name: LARGE[name] for name in names})
    assert [lowered.calls[f"k{name}"][0].block[0] for name in names] == [LARGE[name][1] for name in names]
    _, ptx = toolchain.compile_cuda(lowered.source, "sm_90")
    kernels = re.split(r"\.visible \.entry ", ptx.decode())[1:]
    assert len(kernels) == len(names)
    for kernel in kernels:
        blocks = [re.findall(r"^\s+(?:@%p\d+ )?([a-z][\w.]*)", block, re.M) for block in kernel.split("$L__")]
        inner = max(blocks, key=lambda block: sum(name.startswith("fma") for name in block))
        fused, loads = (sum(name.startswith(kind) for name in inner) for kind in ("fma.rn.f32", "ld.shared"))
        # The positions of loads, which PTX adds up one by one, become constants of theirs in machine code.
        assert fused >= 0.8 * (len(inner) - loads) and loads <= fused / 10, (kernel[:80], fused, loads, len(inner))
        assert {name for name in inner if name.startswith("ld.")} <= {"ld.shared.v4.f32", "ld.shared.v2.f32"}
