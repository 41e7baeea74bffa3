"""Weight chains fold to the values that torch gives them."""

import numpy as np
import pytest
import torch
from tvm import relax
from tvm.relax import op as R_
from tvm.script import ir as I
from tvm.script import relax as R

from bnncc.dialect.ops import call
from bnncc.passes.canonicalize_sign import CanonicalizeSign
from bnncc.passes.fold_constants import FoldConstants
from bnncc.passes.rewriter import is_const, numpy_of

WEIGHT = np.array([[[[-0.3]], [[0.0]]], [[[2.0]], [[-0.0]]]], "float32")


def test_a_binarized_weight(check):
    signs, scale = np.where(WEIGHT >= 0, 1, -1).astype("float32"), np.array([0.5, 0.1], "float32").reshape(2, 1, 1, 1)
    product = signs * scale

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 2, 3, 3), "float32")) -> R.Tensor((1, 2, 3, 3), "float32"):
            with R.dataflow():
                w1 = R.bnncc.sign(R.const(WEIGHT), predicate="ge")
                w2 = R.multiply(w1, R.const(scale))
                y = R.nn.conv2d(x, w2)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((1, 2, 3, 3), "float32")) -> R.Tensor((1, 2, 3, 3), "float32"):
            with R.dataflow():
                y = R.nn.conv2d(x, R.const(product))
                R.output(y)
            return y

    check(FoldConstants, Before, Expected)


def constant_of(mod):
    """The constant that the first operator of `main` takes as its second operand."""
    value = mod["main"].body.blocks[0].bindings[0].value
    assert is_const(value.args[1])
    return numpy_of(value.args[1])


def test_torch_does_the_arithmetic(function, apply):
    """alpha = mean|w| per channel: a sum whose last bit depends on who adds."""
    weight = torch.randn(8, 37, generator=torch.Generator().manual_seed(0))

    def body(x):
        alpha = R_.mean(R_.abs(relax.const(weight.numpy())), axis=[1], keepdims=True)
        return R_.multiply(x, R_.multiply(call("sign", [relax.const(weight.numpy())], predicate="ternary"), alpha))

    after = apply(FoldConstants, function((8, 37), body))
    expected = weight.sign() * weight.abs().mean(dim=1, keepdim=True)
    assert np.array_equal(constant_of(after), expected.numpy())


def straight_through(w, alpha):
    return R_.add(R_.subtract(R_.multiply(alpha, R_.sign(w)), R_.clip(w, -1.0, 1.0)), R_.clip(w, -1.0, 1.0))


def test_a_scaled_straight_through_weight_is_canonical_first(function, apply):
    """Folded as written, ReActNet's weights are no longer ±alpha; after `CanonicalizeSign` they are."""
    weight = torch.randn(64, generator=torch.Generator().manual_seed(0))
    alpha = torch.tensor(0.1)
    before = function(
        (64,), lambda x: R_.multiply(x, straight_through(relax.const(weight.numpy()), relax.const(alpha.numpy())))
    )
    assert len(np.unique(constant_of(apply(FoldConstants, before)))) > 2
    folded = constant_of(apply(FoldConstants, apply(CanonicalizeSign, before)))
    assert np.array_equal(folded, (alpha * weight.sign()).numpy())


def test_a_plain_straight_through_does_not_round(function, apply):
    """(s − w) + w is s in float32 for every |w| ≤ 2²⁴, so that the canonical form equals what eager computes."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4096, generator=generator) * 2.0 ** torch.randint(-30, 24, (4096,), generator=generator)
    weight = weight.clamp(-(2.0**24), 2.0**24)
    before = function((4096,), lambda x: R_.multiply(x, R_.add(R_.subtract(R_.sign(w(weight)), w(weight)), w(weight))))
    folded = constant_of(apply(FoldConstants, apply(CanonicalizeSign, before)))
    assert np.array_equal(folded, ((weight.sign() - weight) + weight).numpy())


def w(weight):
    return relax.const(weight.numpy())


def test_zero_dimensional_constants_keep_their_shape(function, apply):
    body = lambda x: R_.add(x, R_.multiply(relax.const(2.0, "float32"), relax.const(0.25, "float32")))  # noqa: E731
    folded = constant_of(apply(FoldConstants, function((3,), body)))
    assert folded.shape == () and folded == 0.5


@pytest.mark.parametrize("shape", [(4,), (1, 4), (2, 4)])
def test_full_folds(function, apply, shape):
    body = lambda x: R_.add(x, R_.full(shape, relax.const(3.0, "float32"), dtype="float32"))  # noqa: E731
    assert np.array_equal(constant_of(apply(FoldConstants, function((2, 4), body))), np.full(shape, 3, "float32"))


def test_do_not_fold_what_reads_the_input(function, check_unchanged):
    check_unchanged(FoldConstants, function((4,), lambda x: R_.multiply(R_.add(x, relax.const(1.0, "float32")), x)))


def test_do_not_fold_what_torch_cannot_evaluate(function, check_unchanged, reasons):
    body = lambda x: R_.add(x, R_.cosh(relax.const(np.ones(4, "float32"))))  # noqa: E731
    check_unchanged(FoldConstants, function((4,), body))
    assert any("is constant but" in line for line in reasons())
