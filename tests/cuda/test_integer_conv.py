"""Binary, ternary, bitserial and byte convolutions as a GPU runs them, number for number against NumPy.

The emulator runs the very CUDA C of each architecture's instructions. Shapes lie around the boundaries of words, tiles
and windows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import tvm
from emulated import Emulated
from tvm import te

from bnncc.dialect import computes, computes_bytes, computes_planes, reference
from bnncc.passes.integer_layers import weight_form
from bnncc.passes.pack_bytes import pack_weight
from bnncc.passes.pack_planes import constants, pack_planes
from bnncc.runtime.bits import BitLayout, ByteLayout
from bnncc.targets.cuda.descriptor import CUDA_TARGETS

#: One architecture for each of the instructions that multiply tiles of bits.
ARCHITECTURES = ("cuda-sm_75", "cuda-sm_80", "cuda-sm_90", "cuda-sm_100")


@dataclass(frozen=True)
class Shape:
    """image: (N, H, W). padding: pixels on every side that are read as zeros."""

    image: tuple[int, int, int]
    channels: int
    out: int
    kernel: tuple[int, int] = (3, 3)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    padding: int = 0


@dataclass(frozen=True)
class Case:
    name: str
    inputs: tuple[np.ndarray, ...]
    compute: Callable[..., te.Tensor]
    expected: np.ndarray


def check(cases: Sequence[Case], target: str) -> None:
    """Runs all cases, the kernels of one module."""
    functions = {}
    for number, case in enumerate(cases):
        tensors = [te.placeholder(a.shape, str(a.dtype), f"arg{i}") for i, a in enumerate(case.inputs)]
        functions[f"k{number}"] = te.create_prim_func([*tensors, case.compute(*tensors)])
    emulated = Emulated(tvm.IRModule(functions), CUDA_TARGETS[target])
    wrong = []
    for number, case in enumerate(cases):
        (got,) = emulated(f"k{number}", *case.inputs)
        if not np.array_equal(got, case.expected):
            wrong.append(f"{case.name}: {np.count_nonzero(got != case.expected)} of {got.size}")
    assert not wrong, "\n".join(wrong)


def _signs(rng: np.random.Generator, shape: tuple[int, ...], ternary: bool = False) -> np.ndarray:
    values = rng.integers(0, 2, shape) * 2 - 1
    return (values * rng.integers(0, 2, shape) if ternary else values).astype(np.int8)


def binary(shape: Shape, ternary_x: bool = False, ternary_w: bool = False, counted: bool = False) -> Case:
    """counted: the terms of ternary weights are counted beforehand."""
    rng = np.random.default_rng(0)
    x = _signs(rng, (*shape.image, shape.channels), ternary_x)
    w = _signs(rng, (shape.out, shape.channels // shape.groups, *shape.kernel), ternary_w)
    layout = BitLayout.for_target(shape.channels, shape.groups, 32, 1)
    words = (reference.pack_ternary if ternary_x else reference.pack_signs)(x, layout)
    inputs = [words, reference.pack_conv_weights(w, layout, 1, ternary=ternary_w)]
    inputs += [np.abs(w).sum((1, 2, 3), dtype=np.int32)] if counted else []
    p = shape.padding

    def compute(a: te.Tensor, b: te.Tensor, n: te.Tensor | None = None) -> te.Tensor:
        return computes.binary_conv2d(
            a, b, depth=int(np.prod(w.shape[1:])), out_channels=shape.out, strides=shape.strides,
            dilation=shape.dilation, padding=(p, p, p, p), n_eff=n,
        )  # fmt: skip

    padded = reference.pad_pixels(x, (p, p, p, p), 0 if ternary_x else -1)  # words of 0
    expected = reference.conv2d(padded, w, shape.strides, shape.dilation, shape.groups)
    return Case(f"{shape} {ternary_x} {ternary_w}", tuple(inputs), compute, expected.astype(np.int32))


def planes(shape: Shape, bits: int, lowest: int, highest: int, odd: bool = False) -> Case:
    """Levels of so many bits, weights from lowest to highest."""
    rng = np.random.default_rng(1)
    levels = rng.integers(0, 1 << bits, (*shape.image, shape.channels))
    weight = rng.integers(lowest, highest + 1, (shape.out, shape.channels // shape.groups, *shape.kernel))
    weight = weight | 1 if odd else weight
    weight.flat[0], weight.flat[-1] = lowest, highest
    form, weight_planes = weight_form(weight)
    layout = BitLayout.for_target(shape.channels, shape.groups, 32, 1)
    x = np.stack([layout.pack((levels >> plane & 1).astype(bool)) for plane in range(bits)], axis=-2)
    w = pack_planes(weight, form, weight_planes, shape.groups, layout, 1)
    base, factor = constants(weight, form, weight_planes, bits, -1, 2)  # values −1, 1, 3, …

    def compute(a: te.Tensor, b: te.Tensor, c: te.Tensor) -> te.Tensor:
        return computes_planes.plane_conv2d(
            a, b, c, out_channels=shape.out, factor=factor, form=form, strides=shape.strides, dilation=shape.dilation
        )

    expected = reference.conv2d(2 * levels - 1, weight, shape.strides, shape.dilation, shape.groups)
    name = f"{shape} {bits} × {weight_planes} {form}"
    return Case(name, (x, w, base), compute, expected.astype(np.int32))


def of_bytes(shape: Shape, lowest: int = -128, highest: int = 127) -> Case:
    rng = np.random.default_rng(2)
    layout = ByteLayout(shape.channels, shape.groups, 128)
    levels = rng.integers(0, 256, (*shape.image, shape.channels))
    levels[0], levels[:, 0, 0] = 0, 255
    weight = rng.integers(lowest, highest + 1, (shape.out, shape.channels // shape.groups, *shape.kernel))
    weight[0] = lowest
    base = rng.integers(-99, 99, shape.out).astype(np.int32)
    inputs = layout.pack(levels), pack_weight(weight, shape.groups, layout, 1), base

    def compute(a: te.Tensor, b: te.Tensor, c: te.Tensor) -> te.Tensor:
        return computes_bytes.byte_conv2d(
            a, b, c, out_channels=shape.out, factor=3, wide=True, strides=shape.strides, dilation=shape.dilation
        )

    products = reference.conv2d(levels - 128, weight, shape.strides, shape.dilation, shape.groups)
    return Case(str(shape), inputs, compute, (base + 3 * products).astype(np.int32))


#: Depths that are parts of a step, whole steps and a rest; rows and columns that fill no tile; few rows.
SHAPES = (
    Shape((1, 7, 9), 64, 64, padding=1),
    Shape((3, 6, 5), 33, 40, (3, 3), (2, 3), (1, 1), 1, 1),
    Shape((1, 9, 8), 128, 96, (2, 3), (1, 1), (3, 2), 2),
    Shape((2, 5, 5), 256, 4, (1, 1), groups=4),
    Shape((5, 1, 1), 200, 70, (1, 1)),
    Shape((1, 6, 6), 96, 33, (5, 5)),
)
FEW_ROWS = (Shape((1, 1, 1), 1000, 33, (1, 1)), Shape((3, 1, 1), 4096, 40, (1, 1)), Shape((1, 3, 4), 65, 8, groups=1))


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_binary(target: str) -> None:
    check([binary(shape) for shape in (*SHAPES, *FEW_ROWS)], target)


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_ternary(target: str) -> None:
    kinds = [(True, False), (True, True), (False, True)]
    cases = [binary(shape, *kind) for shape, kind in itertools.product((SHAPES[1], SHAPES[3], *FEW_ROWS[:2]), kinds)]
    check([*cases, *(binary(shape, False, True, True) for shape in (SHAPES[0], FEW_ROWS[1]))], target)


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_planes(target: str) -> None:
    pairs: Iterator[Any] = iter([(1, -1, 1, True), (1, 0, 1), (1, -1, 0)])
    if target != "cuda-sm_100":  # where CudaSpec.most_plane_pairs is 1
        pairs = iter([(2, -3, 3, True), (2, -2, 1), (2, 0, 3), (4, -1, 1, True), (1, -8, 7), (3, 0, 1)])
    shapes = itertools.cycle((*SHAPES[:1], *SHAPES[2:], *FEW_ROWS))
    cases = [planes(next(shapes), *pair) for pair in pairs for _ in range(2)]
    check(cases, target)


@pytest.mark.parametrize("target", ("cuda-sm_75", "cuda-sm_90"))
def test_bytes(target: str) -> None:
    odd = Shape((2, 6, 7), 3, 20, padding=0), Shape((1, 4, 5), 33, 5), Shape((1, 5, 4), 12, 9, groups=3)
    cases = [of_bytes(shape) for shape in (*(s for s in SHAPES if not s.padding), *FEW_ROWS, *odd)]
    check([*cases, of_bytes(odd[0], -300, 200), of_bytes(odd[2], -255, 255)], target)
