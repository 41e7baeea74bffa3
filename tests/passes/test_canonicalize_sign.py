"""Every spelling of a sign, in Relax and in PyTorch, and what ±0 and NaN become."""

import pytest
import torch
import torch.nn.functional as F
from tvm import relax
from tvm.relax import op as R_
from tvm.script import ir as I
from tvm.script import relax as R

from bnncc.dialect import torch_eval
from bnncc.dialect.ops import attributes, call, is_call
from bnncc.frontends.torch import export_model, to_relax
from bnncc.passes.canonicalize_sign import CanonicalizeSign

ONE, MINUS, ZERO, HALF, TWO = (relax.const(v, "float32") for v in (1.0, -1.0, 0.0, 0.5, 2.0))
N = 17


def full(value):
    return R_.full((N,), relax.const(value, "float32"), dtype="float32")


def test_the_sign_of_bitorch(check):
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 4, 3, 3), "float32")) -> R.Tensor((1, 4, 3, 3), "float32"):
            with R.dataflow():
                s = R.sign(x)
                e = R.equal(s, R.const(0.0, "float32"))
                y = R.where(e, R.const(1.0, "float32"), s)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((1, 4, 3, 3), "float32")) -> R.Tensor((1, 4, 3, 3), "float32"):
            with R.dataflow():
                y = R.bnncc.sign(x, predicate="not_lt")
                R.output(y)
            return y

    check(CanonicalizeSign, Before, Expected)


def test_a_float_chain_around_two_signs(check):
    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((2, 8), "float32"), w: R.Tensor((2, 8), "float32")) -> R.Tensor((2, 8), "float32"):
            with R.dataflow():
                shifted = R.add(x, w)
                clipped = R.clip(shifted, -1.0, 1.0)
                positive = R.greater(clipped, R.const(0.0, "float32"))
                mask = R.astype(positive, "float32")
                twice = R.multiply(R.const(2.0, "float32"), mask)
                a = R.subtract(twice, R.const(1.0, "float32"))
                negative = R.less(w, R.const(0.0, "float32"))
                b = R.where(negative, R.const(-1.0, "float32"), R.const(1.0, "float32"))
                y = R.multiply(a, b)
                R.output(y)
            return y

    @I.ir_module
    class Expected:
        @R.function
        def main(x: R.Tensor((2, 8), "float32"), w: R.Tensor((2, 8), "float32")) -> R.Tensor((2, 8), "float32"):
            with R.dataflow():
                shifted = R.add(x, w)
                a = R.bnncc.sign(shifted, predicate="gt")
                b = R.bnncc.sign(w, predicate="not_lt")
                y = R.multiply(a, b)
                R.output(y)
            return y

    check(CanonicalizeSign, Before, Expected)


SPELLINGS = {
    "sign": (R_.sign, "ternary"),
    "sign+equal+where": (lambda x: R_.where(R_.equal(R_.sign(x), ZERO), ONE, R_.sign(x)), "not_lt"),
    "sign, zeros to −1": (lambda x: R_.where(R_.equal(R_.sign(x), ZERO), MINUS, R_.sign(x)), "gt"),
    "x > 0": (lambda x: R_.where(R_.greater(x, ZERO), ONE, MINUS), "gt"),
    "x >= 0": (lambda x: R_.where(R_.greater_equal(x, ZERO), ONE, MINUS), "ge"),
    "x < 0": (lambda x: R_.where(R_.less(x, ZERO), MINUS, ONE), "not_lt"),
    "x <= 0": (lambda x: R_.where(R_.less_equal(x, ZERO), MINUS, ONE), "not_le"),
    "0 < x": (lambda x: R_.where(R_.less(ZERO, x), ONE, MINUS), "gt"),
    "0 <= x": (lambda x: R_.where(R_.less_equal(ZERO, x), ONE, MINUS), "ge"),
    "0 > x": (lambda x: R_.where(R_.greater(ZERO, x), MINUS, ONE), "not_lt"),
    "0 >= x": (lambda x: R_.where(R_.greater_equal(ZERO, x), MINUS, ONE), "not_le"),
    "−0 as the bound": (lambda x: R_.where(R_.less(x, relax.const(-0.0, "float32")), MINUS, ONE), "not_lt"),
    "not (x < 0)": (lambda x: R_.where(R_.logical_not(R_.less(x, ZERO)), ONE, MINUS), "not_lt"),
    "not (x >= 0)": (lambda x: R_.where(R_.logical_not(R_.greater_equal(x, ZERO)), MINUS, ONE), "ge"),
    "x > 0 or x == 0": (
        lambda x: R_.where(R_.logical_or(R_.greater(x, ZERO), R_.equal(x, ZERO)), ONE, MINUS),
        "ge",
    ),
    "2·mask − 1": (
        lambda x: R_.subtract(R_.multiply(TWO, R_.astype(R_.greater_equal(x, ZERO), "float32")), ONE),
        "ge",
    ),
    "mask·2 − 1": (lambda x: R_.subtract(R_.multiply(R_.astype(R_.greater(x, ZERO), "float32"), TWO), ONE), "gt"),
    "1 − 2·mask": (lambda x: R_.subtract(ONE, R_.multiply(TWO, R_.astype(R_.less(x, ZERO), "float32"))), "not_lt"),
    "(mask − ½)·2": (
        lambda x: R_.multiply(R_.subtract(R_.astype(R_.greater_equal(x, ZERO), "float32"), HALF), TWO),
        "ge",
    ),
    "(mask − ½) / ½": (
        lambda x: R_.divide(R_.subtract(R_.astype(R_.greater_equal(x, ZERO), "float32"), HALF), HALF),
        "ge",
    ),
    "difference of masks": (
        lambda x: R_.subtract(R_.astype(R_.greater(x, ZERO), "float32"), R_.astype(R_.less(x, ZERO), "float32")),
        "ternary",
    ),
    "integers made floats": (
        lambda x: R_.astype(
            R_.where(R_.greater(x, ZERO), relax.const(1, "int64"), relax.const(-1, "int64")), "float32"
        ),
        "gt",
    ),
    "masked_fill of ones": (lambda x: R_.where(R_.less(x, ZERO), MINUS, full(1.0)), "not_lt"),
    "masked_fill of full_like": (lambda x: R_.where(R_.less(x, ZERO), MINUS, R_.full_like(x, ONE)), "not_lt"),
    "masked_fill of ones_like": (lambda x: R_.where(R_.less(x, ZERO), MINUS, R_.ones_like(x)), "not_lt"),
    "masked_fill of a sign": (lambda x: R_.where(R_.equal(R_.sign(x), ZERO), full(1.0), R_.sign(x)), "not_lt"),
    "negative ones": (lambda x: R_.where(R_.greater_equal(x, ZERO), full(1.0), R_.negative(full(1.0))), "ge"),
    "compared with zeros": (lambda x: R_.where(R_.greater_equal(x, full(0.0)), ONE, MINUS), "ge"),
    "sign of a shifted sign": (lambda x: R_.sign(R_.add(R_.sign(x), HALF)), "not_lt"),
    "clip": (lambda x: R_.sign(R_.clip(x, -1.0, 1.0)), "ternary"),
    "clip of a clip": (lambda x: R_.sign(R_.clip(R_.clip(x, -2.0, 3.0), -1.0, 0.5)), "ternary"),
    "clamp from below": (lambda x: R_.where(R_.less(R_.maximum(x, MINUS), ZERO), MINUS, ONE), "not_lt"),
    "clamp from above": (lambda x: R_.where(R_.less(R_.minimum(x, ONE), ZERO), MINUS, ONE), "not_lt"),
    "clamped on one side only": (
        lambda x: R_.where(R_.equal(R_.sign(R_.clip(x, -1.0, 1.0)), ZERO), ONE, R_.sign(x)),
        "not_lt",
    ),
    "tanh": (lambda x: R_.sign(R_.tanh(x)), "ternary"),
    "NaN to +1": (lambda x: R_.where(R_.logical_or(R_.greater(x, ZERO), R_.isnan(x)), ONE, MINUS), "not_le"),
    "a sign of a sign": (lambda x: R_.sign(R_.where(R_.greater(x, ZERO), ONE, MINUS)), "gt"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling(spelling, function, check, evaluate, special):
    body, predicate = SPELLINGS[spelling]
    before = function((N,), body)
    expected = function((N,), lambda x: call("sign", [x], predicate=predicate))
    after = check(CanonicalizeSign, before, expected)
    assert torch.equal(evaluate(after, special), evaluate(before, special))


STRAIGHT_THROUGH = {
    "(s − x) + x": lambda x: R_.add(R_.subtract(R_.where(R_.greater(x, ZERO), ONE, MINUS), x), x),
    "x + (s − x)": lambda x: R_.add(x, R_.subtract(R_.where(R_.greater(x, ZERO), ONE, MINUS), x)),
    "(s − clip(x)) + clip(x)": lambda x: R_.add(
        R_.subtract(R_.where(R_.greater(x, ZERO), ONE, MINUS), R_.clip(x, -1.0, 1.0)), R_.clip(x, -1.0, 1.0)
    ),
    "(s − tanh(x)) + tanh(x)": lambda x: R_.add(
        R_.subtract(R_.where(R_.greater(x, ZERO), ONE, MINUS), R_.tanh(x)), R_.tanh(x)
    ),
}


@pytest.mark.parametrize("spelling", STRAIGHT_THROUGH)
def test_straight_through(spelling, function, check, evaluate):
    before = function((8,), STRAIGHT_THROUGH[spelling])
    expected = function((8,), lambda x: call("sign", [x], predicate="gt", straight_through=1))
    after = check(CanonicalizeSign, before, expected)
    x = torch.randn(8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(evaluate(after, x), evaluate(before, x), atol=1e-6)


def test_scaled_straight_through_keeps_its_factor(function, check):
    """ReActNet's weight: alpha·sign(w) − clip(w) + clip(w) with alpha per output channel."""
    alpha = relax.const(torch.rand(8, 1).numpy())

    def rounds(w):
        return R_.add(R_.subtract(R_.multiply(alpha, R_.sign(w)), R_.clip(w, -1.0, 1.0)), R_.clip(w, -1.0, 1.0))

    def sign(w):
        return R_.multiply(alpha, call("sign", [w], predicate="ternary", straight_through=1))

    check(CanonicalizeSign, function((8, 4), rounds), function((8, 4), sign))


STEPS = relax.const(0.21, "float32")


def clamped(x):
    return relax.BlockBuilder.current().emit(R_.clip(R_.divide(x, STEPS), -4.0, 3.0))


def test_straight_through_rounding(function, check, evaluate, special):
    """LSQ's: equal to the rounding itself, at ties, infinities and NaN too."""

    def before(x):
        v = clamped(x)
        return R_.multiply(R_.add(R_.subtract(R_.round(v), v), v), STEPS)

    for n, values in ((N, special), (4001, torch.linspace(-1.05, 1.05, 4001)), (17, torch.arange(-8, 9) * 0.105)):
        expected = function((n,), lambda x: R_.multiply(R_.round(clamped(x)), STEPS))
        after = check(CanonicalizeSign, function((n,), before), expected)
        got, wanted = evaluate(after, values), evaluate(function((n,), before), values)
        assert torch.equal(got.nan_to_num(9), wanted.nan_to_num(9))


@pytest.mark.parametrize("rounding", [
    lambda x, v: R_.add(R_.subtract(R_.round(x), x), x),  # NaN where x is infinite
    lambda x, v: R_.add(R_.subtract(R_.round(v), v), x),
    lambda x, v: R_.add(R_.subtract(R_.round(v), x), x),
    lambda x, v: R_.add(R_.subtract(R_.floor(v), v), v),
])  # fmt: skip
def test_do_not_take_what_rounds_differently(rounding, function, check_unchanged):
    check_unchanged(CanonicalizeSign, function((8,), lambda x: rounding(x, clamped(x))))


def test_do_not_take_a_straight_through_of_another_variable(function, apply, calls):
    def body(x, y):
        return R_.add(R_.subtract(R_.sign(x), x), y)

    assert "add" in calls(apply(CanonicalizeSign, function((8,), body, params=2)))


def test_weights_are_constants_of_any_value(function, apply):
    weight = relax.const(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).numpy())

    def body(x):
        return R_.matmul(x, R_.where(R_.greater_equal(weight, ZERO), ONE, MINUS))

    after = apply(CanonicalizeSign, function((2, 4), body))
    sign, *_ = (b.value for b in after["main"].body.blocks[0].bindings)
    assert is_call(sign, "bnncc.sign") and sign.args[0].same_as(weight)
    assert attributes(sign) == {"predicate": "ge"}


def test_a_clamp_stays_for_its_other_readers(function, check):
    """x clipped is needed as a float; its sign reads x."""

    def before(x):
        clipped = relax.BlockBuilder.current().emit(R_.clip(x, -1.0, 1.0), "clipped")
        return R_.multiply(clipped, R_.where(R_.greater(clipped, ZERO), ONE, MINUS))

    def expected(x):
        return R_.multiply(R_.clip(x, -1.0, 1.0), call("sign", [x], predicate="gt"))

    check(CanonicalizeSign, function((8,), before), function((8,), expected))


DECLINED = {
    "a comparison with 0.1": lambda x: R_.where(R_.greater(x, relax.const(0.1, "float32")), ONE, MINUS),
    "a comparison with a denormal": lambda x: R_.where(R_.greater(x, relax.const(1e-45, "float32")), ONE, MINUS),
    "a {0, 1} mask": lambda x: R_.astype(R_.greater(x, ZERO), "float32"),
    "a {0, 1} choice": lambda x: R_.where(R_.greater(x, ZERO), ONE, ZERO),
    "a {0, 2} choice": lambda x: R_.where(R_.greater(x, ZERO), TWO, ZERO),
    "a falling sign": lambda x: R_.where(R_.greater(x, ZERO), MINUS, ONE),
    "a scaled sign": lambda x: R_.where(R_.greater(x, ZERO), HALF, relax.const(-0.5, "float32")),
    "integers": lambda x: R_.where(R_.greater(x, ZERO), relax.const(1, "int32"), relax.const(-1, "int32")),
    "equality": lambda x: R_.where(R_.equal(x, ZERO), ONE, MINUS),
    "x itself in one branch": lambda x: R_.where(R_.greater(x, ZERO), ONE, x),
    "a comparison with itself": lambda x: R_.where(R_.greater(x, R_.abs(x)), ONE, MINUS),
    "a constant per channel": lambda x: R_.where(
        R_.greater(x, relax.const(torch.zeros(N).add_(torch.arange(N) % 2).numpy())), ONE, MINUS
    ),
}


@pytest.mark.parametrize("spelling", DECLINED)
def test_do_not_canonicalize(spelling, function, check_unchanged):
    check_unchanged(CanonicalizeSign, function((N,), DECLINED[spelling]))


@pytest.mark.parametrize(
    "inner",
    [
        lambda x: R_.clip(x, 0.0, 1.0),
        lambda x: R_.clip(x, 0.5, 1.0),
        lambda x: R_.clip(x, -1.0, 0.0),
        lambda x: R_.maximum(x, ONE),
        lambda x: R_.maximum(x, ZERO),
        lambda x: R_.minimum(x, MINUS),
        lambda x: R_.nn.relu(x),
        lambda x: R_.add(x, ONE),
        lambda x: R_.multiply(x, HALF),  # the smallest denormal becomes 0
    ],
)
def test_do_not_look_through_what_moves_zero(inner, function, check, evaluate, special):
    before = function((N,), lambda x: R_.sign(inner(x)))
    after = check(CanonicalizeSign, before, function((N,), lambda x: call("sign", [inner(x)], predicate="ternary")))
    assert torch.equal(evaluate(after, special), evaluate(before, special))


def test_do_not_mix_two_inputs(function, check_unchanged):
    check_unchanged(
        CanonicalizeSign,
        function((8,), lambda x, y: R_.where(R_.greater(x, ZERO), ONE, R_.negative(R_.abs(y))), params=2),
    )


def test_do_not_take_where_over_signs_of_two_inputs(function, apply, calls):
    def body(x, y):
        return R_.where(R_.equal(R_.sign(x), ZERO), ONE, R_.sign(y))

    assert calls(apply(CanonicalizeSign, function((8,), body, params=2))) == [
        "bnncc.sign", "equal", "bnncc.sign", "where",
    ]  # fmt: skip


def test_do_not_change_the_dtype(function, check_unchanged):
    """steheaviside of a float64 is a float32: no operator of the dialect changes the type."""
    body = lambda x: R_.where(R_.greater(x, relax.const(0.0, "float64")), ONE, MINUS)  # noqa: E731
    check_unchanged(CanonicalizeSign, function((8,), body, "float64"))


def test_do_not_broadcast(function, check_unchanged):
    """A sign has the shape of what it reads; here the branches are larger."""
    ones = R_.full((5, 8), ONE, dtype="float32")
    check_unchanged(CanonicalizeSign, function((8,), lambda x: R_.where(R_.greater(x, ZERO), ones, R_.negative(ones))))


@pytest.mark.parametrize(
    ("body", "becomes"),
    [
        (lambda x: R_.where(R_.equal(x, ZERO), ONE, R_.sign(x)), "0.0"),
        (
            lambda x: R_.subtract(
                R_.astype(R_.greater_equal(x, ZERO), "float32"), R_.astype(R_.less(x, ZERO), "float32")
            ),
            "0.0",
        ),
    ],
)
def test_do_not_lose_a_nan_that_becomes_zero(body, becomes, function, apply, evaluate, special, reasons):
    before = function((N,), body)
    after = apply(CanonicalizeSign, before)
    assert f"it is ±1 but makes {becomes} of NaN" in reasons()[-1]
    assert torch.equal(evaluate(after, special), evaluate(before, special))


# The same from PyTorch: what people write, and what torch.export and the importer make of it.


def _in_place(x):
    y = x.sign()
    y.masked_fill_(y == 0, 1.0)
    return y


PYTORCH = {
    "bitorch sign": (lambda x: torch.where(torch.sign(x) == 0, torch.tensor(1.0), torch.sign(x)), "not_lt"),
    "full_like": (lambda x: torch.where(torch.sign(x) == 0, torch.full_like(x, 1.0), torch.sign(x)), "not_lt"),
    "bitorch steheaviside": (lambda x: torch.where(x > 0, torch.tensor(1.0), torch.tensor(-1.0)), "gt"),
    "where with numbers": (lambda x: torch.where(x >= 0, 1.0, -1.0), "ge"),
    "where with likes": (lambda x: torch.where(x >= 0, torch.ones_like(x), -torch.ones_like(x)), "ge"),
    "zeros_like": (lambda x: torch.where(x >= torch.zeros_like(x), 1.0, -1.0), "ge"),
    "not": (lambda x: torch.where(~(x < 0), 1.0, -1.0), "not_lt"),
    "integers": (lambda x: torch.where(x > 0, 1, -1).to(torch.float32), "gt"),
    "2·mask − 1": (lambda x: 2 * (x >= 0).float() - 1, "ge"),
    "bool times float": (lambda x: (x >= 0) * 2.0 - 1.0, "ge"),
    "1 − 2·mask": (lambda x: 1 - 2 * (x < 0).float(), "not_lt"),
    "masked_fill": (lambda x: torch.ones_like(x).masked_fill(x < 0, -1.0), "not_lt"),
    "masked_fill of a sign": (lambda x: x.sign().masked_fill(x.sign() == 0, -1.0), "gt"),
    "masked_fill in place": (_in_place, "not_lt"),
    "sgn": (torch.sgn, "ternary"),
    "sign": (torch.sign, "ternary"),
    "hardtanh": (lambda x: torch.sign(F.hardtanh(x)), "ternary"),
    "clamp": (lambda x: torch.where(x.clamp(-1, 1) >= 0, 1.0, -1.0), "ge"),
    "clamp below": (lambda x: torch.sign(torch.clamp(x, min=-1)), "ternary"),
    "heaviside": (lambda x: 2 * torch.heaviside(x, torch.tensor(1.0)) - 1, "ge"),
    "straight-through": (lambda x: (torch.sign(x) - x).detach() + x, "ternary"),
    "Bi-Real": (
        lambda x: torch.sign(x).detach() - torch.clamp(x, -1, 1).detach() + torch.clamp(x, -1, 1),
        "ternary",
    ),
}


class _Quantizers(torch.nn.Module):
    def forward(self, x):
        return [quantizer(x) for quantizer, _ in PYTORCH.values()]


@pytest.fixture(scope="module")
def from_pytorch():
    """The input, and the expression of every output after the pass, by spelling."""
    x = torch.zeros(1, N)
    main = CanonicalizeSign(to_relax(export_model(_Quantizers().eval(), x)).mod)["main"]
    values = {b.var: b.value for b in main.body.blocks[0].bindings}
    outputs = values[main.body.body].fields
    return main.params[0], {name: values[out] for name, out in zip(PYTORCH, outputs, strict=True)}


@pytest.mark.parametrize("spelling", PYTORCH)
def test_spelling_in_pytorch(spelling, from_pytorch, special):
    quantizer, predicate = PYTORCH[spelling]
    x, values = from_pytorch
    sign = values[spelling]
    assert is_call(sign, "bnncc.sign") and sign.args[0].same_as(x)
    assert attributes(sign)["predicate"] == predicate
    if "straight_through" not in attributes(sign):
        assert torch.equal(torch_eval.evaluate_call(sign, {x: special}), quantizer(special))
