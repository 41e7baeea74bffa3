"""The bias of a binary layer: where eager's own result is one rounding of product + bias, and where it is not.

Without a bias, or with the bias added by an operation of its own, eager's product is an exact integer and the sum is
rounded once: bit-equal. A bias *inside* `conv2d` or `linear` is where eager itself is inexact: oneDNN starts its
accumulators at the bias (convolutions), MKL adds the product up in blocks on top of it (linear layers of large K and
batch), so that partial sums of a fractional bias are rounded along the way, in an order that changes with shape and
threads. Such a step is marked inexact; bnncc gives the correctly rounded sum.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bnncc

from .branches import RUNS, BitReader, Case, awkward, check, run, sign, signs

_EPSILON = 2.0**-24  # half a unit in the last place of 1.0


class _Biased(nn.Module):
    """A binary layer, linear for a kernel of 0, with its bias inside the operator or added behind it."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int, bias: torch.Tensor, inside: bool, generator: torch.Generator
    ) -> None:
        super().__init__()
        self.register_buffer("weight", signs((outputs, inputs, *[kernel] * 2 * bool(kernel)), generator))
        self.register_buffer("bias", bias)
        self.kernel, self.inside = kernel, inside

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = F.conv2d if self.kernel else F.linear
        if self.inside:
            return layer(sign(x), self.weight, self.bias)
        return layer(sign(x), self.weight) + (self.bias[:, None, None] if self.kernel else self.bias)


# (inputs, outputs, kernel, shape of the input)
_LAYERS = (
    (64, 64, 3, (1, 64, 14, 14)), (512, 64, 3, (1, 512, 7, 7)), (256, 130, 1, (2, 256, 5, 4)),
    (64, 10, 0, (3, 64)), (1000, 130, 0, (8, 1000)), (4608, 64, 0, (33, 4608)),
)  # fmt: skip


def _layers(integer: bool, inside: bool) -> list[Case]:
    cases = []
    for inputs, outputs, kernel, shape in _LAYERS:
        generator = torch.Generator().manual_seed(inputs + kernel)
        bias = torch.randn(outputs, generator=generator) * 10 ** torch.empty(outputs).uniform_(
            -6, 3, generator=generator
        )
        module = _Biased(inputs, outputs, kernel, bias.round() if integer else bias, inside, generator)
        cases.append(Case(f"{inputs} → {outputs}, kernel {kernel}", module, awkward(shape, generator)))
    return cases


def _packed(case: Case) -> Case:
    """The same with a sign behind the bias."""
    outputs, kernel = case.module.weight.shape[0], case.module.kernel
    image = nn.Identity() if kernel else nn.Unflatten(1, (outputs, 1, 1))
    return Case(f"{case.name}, packed", nn.Sequential(case.module, image, BitReader(outputs)), case.input)


@pytest.mark.parametrize(("target", "share"), RUNS)
def test_bias_added_by_its_own_operation_is_bit_equal(target, share, tmp_path):
    cases = _layers(integer=False, inside=False)[share]
    check([*cases, *map(_packed, cases)], target, tmp_path)


@pytest.mark.parametrize(("target", "share"), RUNS)
def test_integer_bias_is_bit_equal(target, share, tmp_path):
    cases = _layers(integer=True, inside=True)[share]
    check([*cases, *map(_packed, cases)], target, tmp_path)


@pytest.mark.parametrize(("target", "share"), RUNS)
def test_bias_inside_the_operator_is_rounded_once(target, share, tmp_path):
    cases = _layers(integer=False, inside=True)[share]
    outputs = run(cases, target, tmp_path)
    for case, actual in zip(cases, outputs, strict=True):
        case.module.inside = False
        with torch.no_grad():
            rounded_once = case.module(case.input).numpy()
        assert np.array_equal(actual, rounded_once), case.name


def test_eager_itself_rounds_a_bias_inside_the_operator_more_than_once():
    """Not a property of bnncc, but of PyTorch's libraries on this machine: how far from one rounding eager may be."""
    differing = 0
    for case in _layers(integer=False, inside=True):
        with torch.no_grad():
            inside = case.module(case.input)
            case.module.inside = False
            behind = case.module(case.input)
        terms = case.module.weight[0].numel()
        reach = terms + case.module.bias.abs().max()  # no partial sum is larger
        assert ((inside - behind).abs() <= (terms + 1) * reach * _EPSILON).all(), case.name
        differing += int((inside != behind).sum())
    if not differing:
        pytest.skip("this machine's eager rounds the bias once")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kernel", [0, 1])
def test_manifest_names_the_step_inexact(kernel, packed):
    generator = torch.Generator().manual_seed(0)
    for bias, exact in ((torch.tensor([0.5, 1.0, -2.25]), False), (torch.tensor([1.0, 0.0, -2.0]), True)):
        shape = (1, 8, 2, 2) if kernel else (1, 8)
        case = Case("", _Biased(8, 3, kernel, bias, True, generator), torch.randn(shape, generator=generator))
        model = (_packed(case) if packed else case).module.eval()
        steps = bnncc.compile(model, (case.input,)).manifest["versions"][0]["steps"]
        assert all(step["exact"] for step in steps) is exact
